// The emulated CUDA runtime: what its files share.
//
// Device memory is host memory. Every stream is a thread with a queue of operations. Kernels do not
// run: the Python side puts a CPU function into the queue in place of each.
#pragma once

#include <cuda_runtime_api.h>

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <mutex>
#include <string>
#include <vector>

namespace emulated {

using Operation = std::function<void()>;

// How much of everything each actor has done, as far as the owner of the clock knows.
// Actor 0 is the host, and actor n + 1 is stream n.
using VectorClock = std::vector<uint64_t>;

// Bytes that an operation reads or writes. The label lives as long as the process.
struct Access {
  uintptr_t begin;
  uintptr_t end;
  bool is_write;
  const char* label;
};
using Accesses = std::vector<Access>;

struct Graph {
  unsigned long long id = 0;
  std::vector<Operation> operations;
  Accesses accesses;
};

struct Stream {
  int device = 0;
  int priority = 0;
  int number = 0;

  std::mutex mutex;
  std::condition_variable changed;
  std::deque<Operation> queue;
  uint64_t submitted = 0;
  uint64_t done = 0;

  VectorClock clock;

  // While the stream is captured: the graph, and how far other streams have waited for it.
  Graph* captured_graph = nullptr;
  bool is_capture_broken = false;
  uint64_t captured_count = 0;
  uint64_t joined_count = 0;
};

struct Event {
  int device = 0;
  unsigned flags = 0;

  std::mutex mutex;
  std::condition_variable changed;
  uint64_t recorded = 0;
  uint64_t done = 0;
  double time_ms = 0;

  VectorClock clock;

  // If it was last recorded in a capture.
  Graph* captured_graph = nullptr;
  Stream* captured_stream = nullptr;
  uint64_t captured_at = 0;
};

// A piece of memory that the runtime gave out. Streams use pinned memory through a second mapping,
// so that the host's own one can be protected.
struct Block {
  uintptr_t begin;
  size_t size;
  int device;
  bool is_pinned;
  char* stream_view;
};

// -- settings.cpp: EMULATED_GPU_* in the environment
int setting(const char* name, int fallback);
bool checks_races();
void say(const char* format, ...) __attribute__((format(printf, 1, 2)));
extern thread_local int current_device;
cudaError_t fail(cudaError_t error);  // keeps it for cudaGetLastError

// Lets Python go on while this thread waits: what it waits for may be a function of Python's.
class GilRelease {
 public:
  GilRelease();
  ~GilRelease();

 private:
  void* state_ = nullptr;
};

// -- memory.cpp
bool find_block(const void* address, Block* block);
void* stream_address(const void* address);  // where a stream finds the bytes of an address

// -- streams.cpp
Stream* stream_of(cudaStream_t handle);
void submit(Stream* stream, Operation operation, const Accesses& accesses = {});
void wait_for_stream(Stream* stream, bool host_learns = true);
void wait_for_device(int device, bool host_learns = true);

// -- graphs.cpp
extern std::mutex capture_mutex;
// Breaks the captures that the calling thread disturbs by a call that waits or allocates.
cudaError_t refuse_during_capture(const char* call);
cudaError_t break_capture(Stream* stream, const char* reason);
// All three with capture_mutex held.
void record_in_capture(Event* event, Stream* stream);
cudaError_t wait_in_capture(Stream* stream, Event* event, bool* is_done);
bool add_to_capture(Stream* stream, Operation& operation, const Accesses& accesses);

// -- races.cpp: each does nothing unless EMULATED_GPU_RACES=1
void note_use(Stream* stream, const Accesses& accesses);
void note_record(Event* event, Stream* stream);
void note_stream_wait(Stream* stream, Event* event);
void note_host_wait(const VectorClock& clock);
VectorClock clock_of(const Stream* stream);
VectorClock clock_of(const Event* event);
bool host_has_waited_for(const Event* event);
void forget_block(const Block& block);

}  // namespace emulated

// For the emulated NCCL, which is a library of its own.
extern "C" {
void emulated_submit(
    cudaStream_t stream, const emulated::Operation& operation,
    const emulated::Accesses& accesses);
void* emulated_release_gil();
void emulated_take_gil(void* release);
}
