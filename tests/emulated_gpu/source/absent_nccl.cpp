// Entries of NCCL that torch links by name and this project does not need. Some are newer than the
// headers of an older NCCL, so none is read here.
#include <cstdint>

#define DO_NOTHING(name) extern "C" int name() { return 0; }
#define INVALID_USAGE(name) extern "C" int name() { return 5; }

extern "C" int ncclCommMemStats(void*, int, uint64_t* value) {
  *value = 0;
  return 0;
}

DO_NOTHING(ncclCommDeregister)
DO_NOTHING(ncclRedOpDestroy)

INVALID_USAGE(ncclAlltoAll)
INVALID_USAGE(ncclCommGetUniqueId)
INVALID_USAGE(ncclCommGrow)
INVALID_USAGE(ncclCommInitAll)
INVALID_USAGE(ncclCommResume)
INVALID_USAGE(ncclCommShrink)
INVALID_USAGE(ncclCommSplit)
INVALID_USAGE(ncclCommSuspend)
INVALID_USAGE(ncclCommWindowDeregister)
INVALID_USAGE(ncclCommWindowRegister)
INVALID_USAGE(ncclDevCommCreate)
INVALID_USAGE(ncclDevCommDestroy)
INVALID_USAGE(ncclGather)
INVALID_USAGE(ncclGetLsaMultimemDevicePointer)
INVALID_USAGE(ncclGetPeerDevicePointer)
INVALID_USAGE(ncclPutSignal)
INVALID_USAGE(ncclRedOpCreatePreMulSum)
INVALID_USAGE(ncclReduce)
INVALID_USAGE(ncclReduceScatter)
INVALID_USAGE(ncclScatter)
INVALID_USAGE(ncclSignal)
INVALID_USAGE(ncclWaitSignal)
INVALID_USAGE(ncclWinGetUserPtr)
