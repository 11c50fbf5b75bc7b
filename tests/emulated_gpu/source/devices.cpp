// Devices and their properties. All devices of a process are alike.
#include "runtime.h"

#include <dlfcn.h>

#include <cstdio>
#include <cstring>

using namespace emulated;

namespace {

constexpr int kMajor = 9;
constexpr int kMultiprocessors = 132;
constexpr int kWarp = 32;
constexpr int kBlockThreads = 1024;
constexpr int kMultiprocessorThreads = 2048;
constexpr int kRegisters = 65536;
constexpr size_t kMemory = 16ull << 30;
constexpr size_t kSharedMemory = 49152;
constexpr size_t kMostSharedMemory = 232448;
constexpr int kVersion = 13020;

int device_count() {
  static int count = setting("EMULATED_GPU_DEVICES", 2);
  return count;
}

}  // namespace

extern "C" {

cudaError_t cudaGetDeviceCount(int* count) {
  *count = device_count();
  return *count ? cudaSuccess : fail(cudaErrorNoDevice);
}

cudaError_t cudaGetDevice(int* device) {
  *device = current_device;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= device_count()) return fail(cudaErrorInvalidDevice);
  current_device = device;
  return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  memset(properties, 0, sizeof *properties);
  snprintf(properties->name, sizeof properties->name, "Emulated GPU");
  properties->uuid.bytes[15] = (char)(device + 1);
  properties->totalGlobalMem = kMemory;
  properties->major = kMajor;
  properties->multiProcessorCount = kMultiprocessors;
  properties->warpSize = kWarp;
  properties->maxThreadsPerBlock = kBlockThreads;
  properties->maxThreadsPerMultiProcessor = kMultiprocessorThreads;
  properties->sharedMemPerBlock = kSharedMemory;
  properties->sharedMemPerBlockOptin = kMostSharedMemory;
  properties->sharedMemPerMultiprocessor = kMostSharedMemory + 1024;
  properties->regsPerBlock = kRegisters;
  properties->regsPerMultiprocessor = kRegisters;
  for (int i = 0; i < 3; i++) {
    properties->maxThreadsDim[i] = kBlockThreads;
    properties->maxGridSize[i] = 65535;
  }
  properties->l2CacheSize = 50 << 20;
  properties->pciBusID = device + 1;
  properties->unifiedAddressing = 1;
  properties->concurrentKernels = 1;
  properties->canMapHostMemory = 1;
  properties->asyncEngineCount = 3;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = kMajor; break;
    case cudaDevAttrMultiProcessorCount: *value = kMultiprocessors; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = kBlockThreads; break;
    case cudaDevAttrWarpSize: *value = kWarp; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = kMultiprocessorThreads; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = kSharedMemory; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = kMostSharedMemory; break;
    case cudaDevAttrMaxRegistersPerBlock: *value = kRegisters; break;
    case cudaDevAttrPciBusId: *value = device + 1; break;
    case cudaDevAttrUnifiedAddressing: *value = 1; break;
    default: *value = 0;
  }
  return cudaSuccess;
}

cudaError_t cudaDeviceGetPCIBusId(char* text, int size, int device) {
  snprintf(text, size, "0000:%02x:00.0", device + 1);
  return cudaSuccess;
}

cudaError_t cudaDeviceGetStreamPriorityRange(int* lowest, int* highest) {
  if (lowest) *lowest = 0;
  if (highest) *highest = -5;
  return cudaSuccess;
}

cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) {
  *can = 1;
  return cudaSuccess;
}

cudaError_t cudaDeviceSynchronize() {
  if (cudaError_t error = refuse_during_capture("cudaDeviceSynchronize")) return fail(error);
  wait_for_device(current_device);
  return cudaSuccess;
}

cudaError_t cudaDeviceGetGraphMemAttribute(int, cudaGraphMemAttributeType, void* value) {
  memset(value, 0, sizeof(uint64_t));
  return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int* version) {
  *version = kVersion;
  return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = kVersion;
  return cudaSuccess;
}

cudaError_t cudaGetDriverEntryPointByVersion(
    const char* name, void** function, unsigned, unsigned long long,
    cudaDriverEntryPointQueryResult* result) {
  static void* driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_GLOBAL);
  *function = driver ? dlsym(driver, name) : nullptr;
  if (result) {
    *result = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  }
  return cudaSuccess;
}

}  // extern "C"
