// The few entries of the driver that torch links by name. A context is always there, and modules
// cannot be loaded.
#include <cstring>

#define NOT_SUPPORTED(name) extern "C" int name() { return 801; }

extern "C" {

int cuInit(unsigned) { return 0; }

int cuDriverGetVersion(int* version) {
  *version = 13020;
  return 0;
}

int cuCtxGetCurrent(void** context) {
  *context = (void*)1;
  return 0;
}

int cuCtxSetCurrent(void*) { return 0; }

int cuCtxGetDevice(int* device) {
  *device = 0;
  return 0;
}

int cuDeviceGet(int* device, int index) {
  *device = index;
  return 0;
}

int cuDeviceGetAttribute(int* value, int, int) {
  *value = 0;
  return 0;
}

int cuDevicePrimaryCtxGetState(int, unsigned* flags, int* is_active) {
  *flags = 0;
  *is_active = 1;
  return 0;
}

int cuDevicePrimaryCtxRetain(void** context, int) {
  *context = (void*)1;
  return 0;
}

int cuGetErrorString(int, const char** text) {
  *text = "an error of the emulated driver";
  return 0;
}

int cuPointerGetAttribute(void* value, int, unsigned long long) {
  memset(value, 0, 4);
  return 0;
}

}  // extern "C"

NOT_SUPPORTED(cuDeviceGetCount)
NOT_SUPPORTED(cuFuncGetAttribute)
NOT_SUPPORTED(cuFuncSetAttribute)
NOT_SUPPORTED(cuFuncSetCacheConfig)
NOT_SUPPORTED(cuLaunchCooperativeKernel)
NOT_SUPPORTED(cuLaunchKernel)
NOT_SUPPORTED(cuLaunchKernelEx)
NOT_SUPPORTED(cuLinkAddData_v2)
NOT_SUPPORTED(cuLinkComplete)
NOT_SUPPORTED(cuLinkCreate_v2)
NOT_SUPPORTED(cuModuleGetFunction)
NOT_SUPPORTED(cuModuleLoad)
NOT_SUPPORTED(cuModuleLoadData)
NOT_SUPPORTED(cuModuleLoadDataEx)
NOT_SUPPORTED(cuModuleUnload)
NOT_SUPPORTED(cuOccupancyMaxActiveBlocksPerMultiprocessor)
NOT_SUPPORTED(cuTensorMapEncodeTiled)
