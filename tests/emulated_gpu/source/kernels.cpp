// Kernels of the wheel: known by name, never run. One that is launched has no CPU function yet.
#include "runtime.h"

#include <cstring>
#include <unordered_map>

using namespace emulated;

namespace {

// Wheels register their kernels before main, so that the table is made at the first of them.
std::unordered_map<const void*, std::string>& kernel_names() {
  static auto* names = new std::unordered_map<const void*, std::string>;
  return *names;
}

cudaError_t refuse_launch(const void* kernel) {
  auto found = kernel_names().find(kernel);
  bool is_known = found != kernel_names().end();
  say("a kernel without a CPU function: %s", is_known ? found->second.c_str() : "unknown");
  return fail(cudaErrorInvalidDeviceFunction);
}

}  // namespace

extern "C" {

void __cudaRegisterFunction(
    void**, const char* kernel, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*, int*) {
  kernel_names().emplace(kernel, name);
}

cudaError_t cudaLaunchKernel(const void* kernel, dim3, dim3, void**, size_t, cudaStream_t) {
  return refuse_launch(kernel);
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t*, const void* kernel, void**) {
  return refuse_launch(kernel);
}

cudaError_t cudaLaunchCooperativeKernel(
    const void* kernel, dim3, dim3, void**, size_t, cudaStream_t) {
  return refuse_launch(kernel);
}

cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3, dim3, void**, size_t, cudaStream_t) {
  return refuse_launch((const void*)kernel);
}

cudaError_t __cudaGetKernel(cudaKernel_t* result, const void* kernel) {
  *result = (cudaKernel_t)kernel;
  return cudaSuccess;
}

cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = dim3{1, 1, 1};
  *block = dim3{1, 1, 1};
  *shared = 0;
  *(void**)stream = nullptr;
  return cudaSuccess;
}

unsigned __cudaPushCallConfiguration(dim3, dim3, size_t, cudaStream_t) { return 0; }

void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}

char __cudaInitModule(void**) { return 1; }

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  memset(attributes, 0, sizeof *attributes);
  attributes->maxThreadsPerBlock = 1024;
  attributes->numRegs = 32;
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* count, const void*, int, size_t) {
  *count = 1;
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
    int* count, const void*, int, size_t, unsigned) {
  *count = 1;
  return cudaSuccess;
}

}  // extern "C"
