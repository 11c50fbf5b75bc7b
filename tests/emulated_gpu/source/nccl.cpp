// NCCL between processes of one machine: operations wait in the streams of the emulated runtime.
//
// A receive that is posted occupies its stream until the message comes, without a timeout. A send
// ends when it was received (EMULATED_GPU_BUFFERED_SENDS=1: at once). Ranks that do not agree on an
// operation end the process, with what each of them expected.
#include "runtime.h"
#include "sockets.h"

#include <nccl.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <thread>

using emulated::Aborted;
using emulated::Accesses;
using emulated::Connections;
using emulated::Operation;

namespace {

constexpr int kFaultStatus = 86;  // of a process that two ranks' disagreement ends
constexpr int kCollective = -1;   // the lane of an operation that involves all ranks

enum Kind : uint32_t { kPoint, kAllReduce, kAllGather, kBroadcast, kFinalize };
const char* const kKindNames[] = {
    "a send or receive", "an all-reduce", "an all-gather", "a broadcast", "the end"};

// What goes before the bytes of an operation.
struct Head {
  uint32_t kind;
  uint32_t type;
  uint32_t reduction;
  uint32_t unused;
  uint64_t bytes;
};

struct Comm {
  Comm(std::string id, int rank, int size, int device)
      : id(id), rank(rank), size(size), device(device), connections(id, rank, size, device) {}

  std::string id;
  int rank, size, device;
  Connections connections;
  std::mutex mutex;
  std::set<cudaStream_t> streams;  // that operations were given to
  bool is_finalized = false;
};

struct Call {
  Comm* comm;
  int lane;  // calls of one lane run in turn, those of others at the same time
  cudaStream_t stream;
  Operation run;
  Accesses accesses;
};

thread_local int group_depth = 0;
thread_local std::vector<Call> group_calls;

bool setting(const char* name) {
  const char* value = getenv(name);
  return value && atoi(value);
}

[[noreturn]] void end_process(const Comm* comm, const std::string& text) {
  fprintf(stderr, "[emulated gpu] process %d: NCCL rank %d of %d: %s\n", getpid(), comm->rank,
          comm->size, text.c_str());
  fflush(stderr);
  _exit(kFaultStatus);
}

std::string describe(const Head& head) {
  std::string text = kKindNames[head.kind];
  text += " of " + std::to_string(head.bytes) + " bytes";
  if (head.kind == kPoint) return text;
  return text + ", type " + std::to_string(head.type) + ", reduction " +
         std::to_string(head.reduction);
}

size_t size_of(const Comm* comm, ncclDataType_t type) {
  switch (type) {
    case ncclInt8:
    case ncclUint8: return 1;
    case ncclFloat16:
    case ncclBfloat16: return 2;
    case ncclInt32:
    case ncclUint32:
    case ncclFloat32: return 4;
    case ncclInt64:
    case ncclUint64:
    case ncclFloat64: return 8;
    default: end_process(comm, "unknown type " + std::to_string((int)type));
  }
}

// -- transfers, in the thread of a stream

void send_message(Comm* comm, int peer, const Head& head, const void* data) {
  Connections& connections = comm->connections;
  int socket = connections.out(peer);
  connections.write_to(socket, &head, sizeof head);
  connections.write_to(socket, data, head.bytes);
  if (setting("EMULATED_GPU_BUFFERED_SENDS")) return;
  char answer;
  connections.read_from(socket, &answer, 1);
}

void receive_message(Comm* comm, int peer, const Head& expected, void* data) {
  Connections& connections = comm->connections;
  int socket = connections.in(peer);
  Head head;
  connections.read_from(socket, &head, sizeof head);
  // Of a message NCCL compares nothing at all. The emulation compares what must be equal.
  Head found = head;
  if (head.kind == kPoint) found.type = expected.type;
  if (memcmp(&found, &expected, sizeof found)) {
    end_process(comm, "rank " + std::to_string(peer) + " has " + describe(head) + ", expected " +
                          describe(expected));
  }
  connections.read_from(socket, data, head.bytes);
  if (setting("EMULATED_GPU_BUFFERED_SENDS")) return;
  connections.write_to(socket, "a", 1);
}

void run_together(const std::vector<Operation>& operations) {
  std::vector<std::thread> threads;
  for (const Operation& operation : operations) {
    threads.emplace_back([&operation] {
      try {
        operation();
      } catch (Aborted&) {
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

using Parts = std::vector<std::vector<char>>;

// Returns what every rank has, in the order of the ranks.
Parts exchange(Comm* comm, const Head& head, const void* data) {
  Parts parts(comm->size, std::vector<char>(head.bytes));
  memcpy(parts[comm->rank].data(), data, head.bytes);
  std::vector<Operation> operations;
  for (int peer = 0; peer < comm->size; peer++) {
    if (peer == comm->rank) continue;
    const char* own = parts[comm->rank].data();
    char* other = parts[peer].data();
    operations.push_back([=] { send_message(comm, peer, head, own); });
    operations.push_back([=] { receive_message(comm, peer, head, other); });
  }
  run_together(operations);
  return parts;
}

// -- reductions: over the ranks in their order, so that all ranks get the same bits

struct Bfloat16 {
  uint16_t bits;
  explicit Bfloat16(float value) {
    uint32_t wide;
    memcpy(&wide, &value, sizeof wide);
    bits = (uint16_t)((wide + 0x7FFF + ((wide >> 16) & 1)) >> 16);
  }
  operator float() const {
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, sizeof value);
    return value;
  }
};

template <class T>
T combine(T a, T b, ncclRedOp_t reduction) {
  switch (reduction) {
    case ncclProd: return a * b;
    case ncclMax: return a > b ? a : b;
    case ncclMin: return a < b ? a : b;
    default: return a + b;
  }
}

// Sums are made in the type `Wide`.
template <class T, class Wide = T>
void reduce(void* result, const Parts& parts, size_t count, ncclRedOp_t reduction) {
  for (size_t i = 0; i < count; i++) {
    Wide value = (Wide)((const T*)parts[0].data())[i];
    for (size_t rank = 1; rank < parts.size(); rank++) {
      value = combine(value, (Wide)((const T*)parts[rank].data())[i], reduction);
    }
    if (reduction == ncclAvg) value = value / (Wide)parts.size();
    ((T*)result)[i] = (T)value;
  }
}

void reduce_type(
    void* result, const Parts& parts, size_t count, ncclDataType_t type, ncclRedOp_t reduction) {
  switch (type) {
    case ncclInt8: return reduce<int8_t>(result, parts, count, reduction);
    case ncclUint8: return reduce<uint8_t>(result, parts, count, reduction);
    case ncclInt32: return reduce<int32_t>(result, parts, count, reduction);
    case ncclUint32: return reduce<uint32_t>(result, parts, count, reduction);
    case ncclInt64: return reduce<int64_t>(result, parts, count, reduction);
    case ncclUint64: return reduce<uint64_t>(result, parts, count, reduction);
    case ncclFloat16: return reduce<_Float16, float>(result, parts, count, reduction);
    case ncclBfloat16: return reduce<Bfloat16, float>(result, parts, count, reduction);
    case ncclFloat32: return reduce<float>(result, parts, count, reduction);
    case ncclFloat64: return reduce<double>(result, parts, count, reduction);
    default: return;  // size_of has refused it
  }
}

// -- queues and groups

void enqueue(const std::vector<Call>& calls) {
  Accesses accesses;
  std::map<std::pair<Comm*, int>, std::vector<Operation>> lanes;
  for (const Call& call : calls) {
    accesses.insert(accesses.end(), call.accesses.begin(), call.accesses.end());
    lanes[{call.comm, call.lane}].push_back(call.run);
    std::lock_guard<std::mutex> lock(call.comm->mutex);
    call.comm->streams.insert(call.stream);
  }
  std::vector<Operation> collectives;
  std::vector<Operation> transfers;
  for (auto& [key, operations] : lanes) {
    auto run_lane = [operations = operations] {
      for (const Operation& operation : operations) operation();
    };
    (key.second == kCollective ? collectives : transfers).push_back(run_lane);
  }
  auto run = [collectives, transfers] {
    try {
      for (const Operation& operation : collectives) operation();
      if (transfers.size() == 1) {
        transfers[0]();
      } else {
        run_together(transfers);
      }
    } catch (Aborted&) {
    }
  };
  emulated_submit(calls[0].stream, run, accesses);
}

ncclResult_t add_call(Call call) {
  if (group_depth) {
    group_calls.push_back(std::move(call));
  } else {
    enqueue({call});
  }
  return ncclSuccess;
}

emulated::Access read_access(const void* data, size_t size, const char* label) {
  return {(uintptr_t)data, (uintptr_t)data + size, false, label};
}

emulated::Access write_access(const void* data, size_t size, const char* label) {
  return {(uintptr_t)data, (uintptr_t)data + size, true, label};
}

// -- the life of a communicator

ncclResult_t create(ncclComm_t* result, int size, const ncclUniqueId& id, int rank) {
  int device;
  cudaGetDevice(&device);
  auto* comm = new Comm(id.internal, rank, size, device);
  void* gil = emulated_release_gil();
  bool is_connected = comm->connections.connect();
  emulated_take_gil(gil);
  if (!is_connected) return ncclSystemError;
  if (comm->connections.shares_device() && !setting("NCCL_MULTI_RANK_GPU_ENABLE")) {
    fprintf(stderr, "[emulated gpu] Duplicate GPU detected: two ranks use device %d\n", device);
    return ncclInvalidUsage;
  }
  *result = (ncclComm_t)comm;
  return ncclSuccess;
}

// Waits for what the other ranks have to say at the end, and says it.
ncclResult_t meet_at_the_end(Comm* comm) {
  Connections& connections = comm->connections;
  Head end{kFinalize, 0, 0, 0, 0};
  for (int peer = 0; peer < comm->size; peer++) {
    if (peer == comm->rank) continue;
    if (!connections.write_to(connections.out(peer), &end, sizeof end, true)) {
      return ncclRemoteError;
    }
  }
  for (int peer = 0; peer < comm->size; peer++) {
    if (peer == comm->rank) continue;
    Head head;
    if (!connections.read_from(connections.in(peer), &head, sizeof head, true)) {
      return ncclRemoteError;
    }
    if (head.kind != kFinalize) {
      end_process(comm, "rank " + std::to_string(peer) + " has " + describe(head) +
                            ", expected the end");
    }
  }
  return ncclSuccess;
}

ncclResult_t finalize(Comm* comm) {
  std::set<cudaStream_t> streams;
  {
    std::lock_guard<std::mutex> lock(comm->mutex);
    if (comm->is_finalized) return ncclSuccess;
    comm->is_finalized = true;
    streams = comm->streams;
  }
  for (cudaStream_t stream : streams) cudaStreamSynchronize(stream);
  void* gil = emulated_release_gil();
  ncclResult_t result = meet_at_the_end(comm);
  emulated_take_gil(gil);
  return result;
}

}  // namespace

extern "C" {

ncclResult_t ncclGetVersion(int* version) {
  *version = NCCL_VERSION_CODE;
  return ncclSuccess;
}

ncclResult_t ncclGetUniqueId(ncclUniqueId* id) {
  std::random_device random;
  memset(id, 0, sizeof *id);
  snprintf(id->internal, sizeof id->internal, "%08x%08x", random(), random());
  return ncclSuccess;
}

ncclResult_t ncclCommInitRank(ncclComm_t* comm, int size, ncclUniqueId id, int rank) {
  return create(comm, size, id, rank);
}

ncclResult_t ncclCommInitRankConfig(
    ncclComm_t* comm, int size, ncclUniqueId id, int rank, ncclConfig_t*) {
  return create(comm, size, id, rank);
}

ncclResult_t ncclCommInitRankScalable(
    ncclComm_t* comm, int size, int rank, int, ncclUniqueId* ids, ncclConfig_t*) {
  return create(comm, size, ids[0], rank);
}

// Waits for the streams and for the other ranks.
ncclResult_t ncclCommFinalize(ncclComm_t comm) { return finalize((Comm*)comm); }

// Queues may still hold the communicator: it is never freed.
ncclResult_t ncclCommDestroy(ncclComm_t handle) {
  auto* comm = (Comm*)handle;
  ncclResult_t result = finalize(comm);
  comm->connections.close_all();
  return result;
}

// Ends what waits, here and in whatever the communicator is given later. Waits for nobody.
ncclResult_t ncclCommAbort(ncclComm_t handle) {
  auto* comm = (Comm*)handle;
  comm->connections.abort();
  std::lock_guard<std::mutex> lock(comm->mutex);
  comm->is_finalized = true;
  return ncclSuccess;
}

ncclResult_t ncclCommRevoke(ncclComm_t comm, int) { return ncclCommAbort(comm); }

ncclResult_t ncclCommGetAsyncError(ncclComm_t, ncclResult_t* error) {
  *error = ncclSuccess;
  return ncclSuccess;
}

ncclResult_t ncclCommCount(const ncclComm_t comm, int* size) {
  *size = ((Comm*)comm)->size;
  return ncclSuccess;
}

ncclResult_t ncclCommUserRank(const ncclComm_t comm, int* rank) {
  *rank = ((Comm*)comm)->rank;
  return ncclSuccess;
}

ncclResult_t ncclCommCuDevice(const ncclComm_t comm, int* device) {
  *device = ((Comm*)comm)->device;
  return ncclSuccess;
}

ncclResult_t ncclCommRegister(const ncclComm_t, void*, size_t, void** handle) {
  *handle = nullptr;
  return ncclSuccess;
}

ncclResult_t ncclMemAlloc(void** address, size_t size) {
  return cudaMalloc(address, size) ? ncclUnhandledCudaError : ncclSuccess;
}

ncclResult_t ncclMemFree(void* address) {
  return cudaFree(address) ? ncclUnhandledCudaError : ncclSuccess;
}

const char* ncclGetErrorString(ncclResult_t) { return "an error of the emulated NCCL"; }

const char* ncclGetLastError(ncclComm_t) { return "an error of the emulated NCCL"; }

ncclResult_t ncclGroupStart() {
  group_depth++;
  return ncclSuccess;
}

ncclResult_t ncclGroupEnd() {
  if (--group_depth) return ncclSuccess;
  std::map<cudaStream_t, std::vector<Call>> by_stream;
  for (Call& call : group_calls) by_stream[call.stream].push_back(std::move(call));
  group_calls.clear();
  for (auto& [stream, calls] : by_stream) enqueue(calls);
  return ncclSuccess;
}

ncclResult_t ncclGroupSimulateEnd(ncclSimInfo_t*) { return ncclGroupEnd(); }

ncclResult_t ncclSend(
    const void* data, size_t count, ncclDataType_t type, int peer, ncclComm_t handle,
    cudaStream_t stream) {
  auto* comm = (Comm*)handle;
  Head head{kPoint, (uint32_t)type, 0, 0, count * size_of(comm, type)};
  auto run = [=] { send_message(comm, peer, head, data); };
  return add_call({comm, 2 * peer, stream, run, {read_access(data, head.bytes, "NCCL send")}});
}

ncclResult_t ncclRecv(
    void* data, size_t count, ncclDataType_t type, int peer, ncclComm_t handle,
    cudaStream_t stream) {
  auto* comm = (Comm*)handle;
  Head head{kPoint, (uint32_t)type, 0, 0, count * size_of(comm, type)};
  auto run = [=] { receive_message(comm, peer, head, data); };
  Accesses accesses = {write_access(data, head.bytes, "NCCL receive")};
  return add_call({comm, 2 * peer + 1, stream, run, accesses});
}

ncclResult_t ncclAllReduce(
    const void* source, void* target, size_t count, ncclDataType_t type, ncclRedOp_t reduction,
    ncclComm_t handle, cudaStream_t stream) {
  auto* comm = (Comm*)handle;
  if (reduction > ncclAvg) return ncclInvalidArgument;
  Head head{kAllReduce, (uint32_t)type, (uint32_t)reduction, 0, count * size_of(comm, type)};
  auto run = [=] {
    Parts parts = exchange(comm, head, source);
    reduce_type(target, parts, count, type, reduction);
  };
  Accesses accesses = {
      read_access(source, head.bytes, "NCCL all-reduce"),
      write_access(target, head.bytes, "NCCL all-reduce")};
  return add_call({comm, kCollective, stream, run, accesses});
}

ncclResult_t ncclAllGather(
    const void* source, void* target, size_t count, ncclDataType_t type, ncclComm_t handle,
    cudaStream_t stream) {
  auto* comm = (Comm*)handle;
  Head head{kAllGather, (uint32_t)type, 0, 0, count * size_of(comm, type)};
  auto run = [=] {
    Parts parts = exchange(comm, head, source);
    for (int rank = 0; rank < comm->size; rank++) {
      memcpy((char*)target + rank * head.bytes, parts[rank].data(), head.bytes);
    }
  };
  Accesses accesses = {
      read_access(source, head.bytes, "NCCL all-gather"),
      write_access(target, head.bytes * comm->size, "NCCL all-gather")};
  return add_call({comm, kCollective, stream, run, accesses});
}

ncclResult_t ncclBroadcast(
    const void* source, void* target, size_t count, ncclDataType_t type, int root,
    ncclComm_t handle, cudaStream_t stream) {
  auto* comm = (Comm*)handle;
  Head head{kBroadcast, (uint32_t)type, 0, 0, count * size_of(comm, type)};
  auto run = [=] {
    if (comm->rank != root) return receive_message(comm, root, head, target);
    if (source != target) memcpy(target, source, head.bytes);
    for (int peer = 0; peer < comm->size; peer++) {
      if (peer != root) send_message(comm, peer, head, source);
    }
  };
  Accesses accesses = {write_access(target, head.bytes, "NCCL broadcast")};
  if (comm->rank == root) accesses.push_back(read_access(source, head.bytes, "NCCL broadcast"));
  return add_call({comm, kCollective, stream, run, accesses});
}

ncclResult_t ncclBcast(
    void* data, size_t count, ncclDataType_t type, int root, ncclComm_t comm,
    cudaStream_t stream) {
  return ncclBroadcast(data, data, count, type, root, comm, stream);
}

}  // extern "C"
