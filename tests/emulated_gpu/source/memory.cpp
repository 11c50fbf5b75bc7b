// Memory of devices and pinned memory, and copies between them.
#include "runtime.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>

namespace emulated {

namespace {

constexpr int kMostDevices = 16;
constexpr size_t kPage = 4096;
constexpr size_t kDeviceMemory = 16ull << 30;

std::mutex blocks_mutex;
std::map<uintptr_t, Block> blocks;
size_t used_bytes[kMostDevices];

size_t whole_pages(size_t size) { return (size / kPage + 1) * kPage; }

// Maps the same pages twice, and returns whether that succeeded.
bool map_pinned(Block* block) {
  size_t size = whole_pages(block->size);
  int file = memfd_create("emulated-pinned-memory", MFD_CLOEXEC);
  if (file < 0) return false;
  void* views[2] = {MAP_FAILED, MAP_FAILED};
  if (ftruncate(file, (off_t)size) == 0) {
    for (void*& view : views) {
      view = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    }
  }
  close(file);
  if (views[0] == MAP_FAILED || views[1] == MAP_FAILED) return false;
  block->begin = (uintptr_t)views[0];
  block->stream_view = (char*)views[1];
  return true;
}

bool map_device(Block* block) {
  void* memory = nullptr;
  if (posix_memalign(&memory, kPage, whole_pages(block->size))) return false;
  block->begin = (uintptr_t)memory;
  block->stream_view = (char*)memory;
  return true;
}

cudaError_t allocate(void** address, size_t size, bool is_pinned) {
  if (cudaError_t error = refuse_during_capture("an allocation")) return fail(error);
  Block block{0, size, current_device, is_pinned, nullptr};
  bool is_mapped = is_pinned ? map_pinned(&block) : map_device(&block);
  if (!is_mapped) return fail(cudaErrorMemoryAllocation);
  // Floating-point numbers are NaN until something writes them.
  memset(block.stream_view, 0xFF, size);
  std::lock_guard<std::mutex> lock(blocks_mutex);
  blocks[block.begin] = block;
  if (!is_pinned) used_bytes[block.device] += size;
  *address = (void*)block.begin;
  return cudaSuccess;
}

void unmap(const Block& block) {
  if (!block.is_pinned) {
    memset(block.stream_view, 0xDB, block.size);
    free(block.stream_view);
    return;
  }
  if (block.stream_view == (char*)block.begin) return;  // the user's own memory, registered
  munmap((void*)block.begin, whole_pages(block.size));
  munmap(block.stream_view, whole_pages(block.size));
}

cudaError_t release(void* address) {
  if (!address) return cudaSuccess;
  if (cudaError_t error = refuse_during_capture("a free")) return fail(error);
  // A real device may wait for all its work here, so that a posted receive holds this up. It
  // promises nothing to the host.
  wait_for_device(current_device, false);
  Block block;
  {
    std::lock_guard<std::mutex> lock(blocks_mutex);
    auto found = blocks.find((uintptr_t)address);
    if (found == blocks.end()) return fail(cudaErrorInvalidValue);
    block = found->second;
    blocks.erase(found);
    if (!block.is_pinned) used_bytes[block.device] -= block.size;
  }
  forget_block(block);
  unmap(block);
  return cudaSuccess;
}

cudaError_t copy(void* target, const void* source, size_t size, cudaStream_t handle, bool waits) {
  Stream* stream = stream_of(handle);
  if (size == 0) return cudaSuccess;
  Block block;
  bool is_target_pageable = !find_block(target, &block);
  bool is_source_pageable = !find_block(source, &block);
  Accesses accesses = {
      {(uintptr_t)source, (uintptr_t)source + size, false, "copy"},
      {(uintptr_t)target, (uintptr_t)target + size, true, "copy"},
  };
  {
    std::unique_lock<std::mutex> lock(capture_mutex);
    if (stream->captured_graph && (is_target_pageable || is_source_pageable || waits)) {
      return fail(break_capture(stream, "a copy that waits, or of pageable memory"));
    }
  }
  if (waits) {
    if (cudaError_t error = refuse_during_capture("a copy that waits")) return fail(error);
  }
  if (is_source_pageable) {
    // Pageable memory is read before the call returns.
    const char* bytes = (const char*)source;
    auto buffer = std::make_shared<std::vector<char>>(bytes, bytes + size);
    submit(stream, [=] { memcpy(stream_address(target), buffer->data(), size); }, accesses);
  } else {
    submit(
        stream, [=] { memcpy(stream_address(target), stream_address(source), size); }, accesses);
  }
  if (waits || is_target_pageable) wait_for_stream(stream);
  return cudaSuccess;
}

cudaError_t fill(void* address, int value, size_t size, cudaStream_t handle) {
  Accesses accesses = {{(uintptr_t)address, (uintptr_t)address + size, true, "memset"}};
  submit(stream_of(handle), [=] { memset(stream_address(address), value, size); }, accesses);
  return cudaSuccess;
}

}  // namespace

bool find_block(const void* address, Block* block) {
  std::lock_guard<std::mutex> lock(blocks_mutex);
  auto next = blocks.upper_bound((uintptr_t)address);
  if (next == blocks.begin()) return false;
  const Block& candidate = std::prev(next)->second;
  if ((uintptr_t)address >= candidate.begin + candidate.size) return false;
  *block = candidate;
  return true;
}

void* stream_address(const void* address) {
  Block block;
  if (!find_block(address, &block)) return (void*)address;
  return block.stream_view + ((uintptr_t)address - block.begin);
}

}  // namespace emulated

using namespace emulated;

extern "C" {

cudaError_t cudaMalloc(void** address, size_t size) { return allocate(address, size, false); }

cudaError_t cudaMallocManaged(void** address, size_t size, unsigned) {
  return allocate(address, size, false);
}

cudaError_t cudaHostAlloc(void** address, size_t size, unsigned) {
  return allocate(address, size, true);
}

cudaError_t cudaMallocHost(void** address, size_t size) { return allocate(address, size, true); }

cudaError_t cudaFree(void* address) { return release(address); }

cudaError_t cudaFreeHost(void* address) { return release(address); }

cudaError_t cudaHostRegister(void* address, size_t size, unsigned) {
  std::lock_guard<std::mutex> lock(blocks_mutex);
  uintptr_t begin = (uintptr_t)address;
  blocks[begin] = Block{begin, size, current_device, true, (char*)address};
  return cudaSuccess;
}

cudaError_t cudaHostUnregister(void* address) {
  std::lock_guard<std::mutex> lock(blocks_mutex);
  blocks.erase((uintptr_t)address);
  return cudaSuccess;
}

cudaError_t cudaMemGetInfo(size_t* free_bytes, size_t* total_bytes) {
  std::lock_guard<std::mutex> lock(blocks_mutex);
  *total_bytes = kDeviceMemory;
  *free_bytes = kDeviceMemory - used_bytes[current_device];
  return cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* address) {
  memset(attributes, 0, sizeof *attributes);
  Block block;
  attributes->type = cudaMemoryTypeUnregistered;
  attributes->device = -2;
  if (!find_block(address, &block)) return cudaSuccess;
  attributes->type = block.is_pinned ? cudaMemoryTypeHost : cudaMemoryTypeDevice;
  attributes->device = block.device;
  attributes->devicePointer = (void*)address;
  if (block.is_pinned) attributes->hostPointer = (void*)address;
  return cudaSuccess;
}

cudaError_t cudaMemcpy(void* target, const void* source, size_t size, cudaMemcpyKind) {
  return copy(target, source, size, nullptr, true);
}

cudaError_t cudaMemcpyAsync(
    void* target, const void* source, size_t size, cudaMemcpyKind, cudaStream_t stream) {
  return copy(target, source, size, stream, false);
}

cudaError_t cudaMemcpyPeerAsync(
    void* target, int, const void* source, int, size_t size, cudaStream_t stream) {
  return copy(target, source, size, stream, false);
}

cudaError_t cudaMemset(void* address, int value, size_t size) {
  return fill(address, value, size, nullptr);
}

cudaError_t cudaMemsetAsync(void* address, int value, size_t size, cudaStream_t stream) {
  return fill(address, value, size, stream);
}

}  // extern "C"
