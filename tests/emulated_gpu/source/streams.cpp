// Streams: a queue and a thread each. Delays make any order happen that CUDA allows.
#include "runtime.h"

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <set>
#include <thread>

namespace emulated {

namespace {

constexpr int kMostDevices = 16;

std::mutex streams_mutex;
std::vector<Stream*> streams;
Stream* default_streams[kMostDevices];
void (*run_python)(long) = nullptr;

uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

// The delay before an operation, in microseconds. It follows from the seed, the rank, the stream's
// number and the operation's number, so that a seed repeats. Of sixteen, one is very long.
int delay_us(const Stream* stream, uint64_t operation) {
  static int most = setting("EMULATED_GPU_DELAY_US", 0);
  static uint64_t seed = (uint64_t)setting("EMULATED_GPU_SEED", 1);
  static uint64_t rank = (uint64_t)setting("RANK", 0);
  if (!most) return 0;
  uint64_t number = mix(mix(mix(mix(seed) + rank) + (uint64_t)stream->number) + operation);
  int delay = (int)(number % (uint64_t)most);
  return (number >> 32) % 16 == 0 ? 20 * delay : delay;
}

void work(Stream* stream) {
  for (;;) {
    Operation operation;
    uint64_t number;
    {
      std::unique_lock<std::mutex> lock(stream->mutex);
      stream->changed.wait(lock, [&] { return !stream->queue.empty(); });
      operation = std::move(stream->queue.front());
      stream->queue.pop_front();
      number = stream->done;
    }
    if (int delay = delay_us(stream, number)) {
      std::this_thread::sleep_for(std::chrono::microseconds(delay));
    }
    operation();
    {
      std::lock_guard<std::mutex> lock(stream->mutex);
      stream->done++;
    }
    stream->changed.notify_all();
  }
}

Stream* make_stream(int device, int priority) {
  auto* stream = new Stream;
  stream->device = device;
  stream->priority = priority;
  std::lock_guard<std::mutex> lock(streams_mutex);
  stream->number = (int)streams.size();
  streams.push_back(stream);
  return stream;
}

Stream* stream_on(void* handle, int device) {
  int previous = current_device;
  current_device = device;
  Stream* stream = stream_of((cudaStream_t)handle);
  current_device = previous;
  return stream;
}

// Returns the same text, in memory that is never freed.
const char* keep(const char* text) {
  static std::mutex mutex;
  static std::set<std::string> texts;
  std::lock_guard<std::mutex> lock(mutex);
  return texts.insert(text).first->c_str();
}

Accesses make_accesses(
    int count, const uintptr_t* begins, const uintptr_t* ends, const unsigned char* writes,
    const char* label) {
  Accesses accesses;
  for (int i = 0; i < count; i++) {
    accesses.push_back({begins[i], ends[i], writes[i] != 0, label});
  }
  return accesses;
}

}  // namespace

Stream* stream_of(cudaStream_t handle) {
  // The small numbers stand for the default streams of the current device.
  if ((uintptr_t)handle > 2) return (Stream*)handle;
  static std::mutex mutex;
  std::lock_guard<std::mutex> lock(mutex);
  Stream*& stream = default_streams[current_device];
  if (!stream) stream = make_stream(current_device, 0);
  return stream;
}

void submit(Stream* stream, Operation operation, const Accesses& accesses) {
  {
    std::lock_guard<std::mutex> lock(capture_mutex);
    if (add_to_capture(stream, operation, accesses)) return;
  }
  note_use(stream, accesses);
  std::lock_guard<std::mutex> lock(stream->mutex);
  if (stream->submitted == 0) std::thread(work, stream).detach();
  stream->queue.push_back(std::move(operation));
  stream->submitted++;
  stream->changed.notify_all();
}

void wait_for_stream(Stream* stream, bool host_learns) {
  GilRelease release;
  VectorClock clock = clock_of(stream);
  {
    std::unique_lock<std::mutex> lock(stream->mutex);
    uint64_t target = stream->submitted;
    stream->changed.wait(lock, [&] { return stream->done >= target; });
  }
  if (host_learns) note_host_wait(clock);
}

void wait_for_device(int device, bool host_learns) {
  std::vector<Stream*> all;
  {
    std::lock_guard<std::mutex> lock(streams_mutex);
    all = streams;
  }
  for (Stream* stream : all) {
    if (stream->device == device) wait_for_stream(stream, host_learns);
  }
}

}  // namespace emulated

using namespace emulated;

extern "C" {

// -- for the Python side and the emulated NCCL

void emulated_set_python(void (*run)(long)) { run_python = run; }

void emulated_enqueue(
    void* handle, int device, long number, int count, const uintptr_t* begins,
    const uintptr_t* ends, const unsigned char* writes, const char* label) {
  Accesses accesses = make_accesses(count, begins, ends, writes, keep(label));
  submit(stream_on(handle, device), [number] { run_python(number); }, accesses);
}

void emulated_submit(cudaStream_t handle, const Operation& operation, const Accesses& accesses) {
  submit(stream_of(handle), operation, accesses);
}

int emulated_is_capturing(void* handle, int device) {
  return stream_on(handle, device)->captured_graph != nullptr;
}

// For a test: the delay before an operation of a stream.
int emulated_delay_us(void* handle, unsigned long operation) {
  return delay_us(stream_of((cudaStream_t)handle), operation);
}

// -- CUDA's own

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* handle, unsigned, int priority) {
  *handle = (cudaStream_t)make_stream(current_device, priority);
  return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* handle, unsigned flags) {
  return cudaStreamCreateWithPriority(handle, flags, 0);
}

cudaError_t cudaStreamCreate(cudaStream_t* handle) {
  return cudaStreamCreateWithPriority(handle, 0, 0);
}

// A stream's thread may still have work: the stream is never freed.
cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }

cudaError_t cudaStreamGetPriority(cudaStream_t handle, int* priority) {
  *priority = stream_of(handle)->priority;
  return cudaSuccess;
}

cudaError_t cudaStreamQuery(cudaStream_t handle) {
  Stream* stream = stream_of(handle);
  if (stream->captured_graph) return fail(cudaErrorStreamCaptureUnsupported);
  std::lock_guard<std::mutex> lock(stream->mutex);
  return stream->done == stream->submitted ? cudaSuccess : cudaErrorNotReady;
}

cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
  Stream* stream = stream_of(handle);
  {
    std::lock_guard<std::mutex> lock(capture_mutex);
    if (stream->captured_graph) {
      return fail(break_capture(stream, "the host waits for the stream"));
    }
  }
  if (cudaError_t error = refuse_during_capture("cudaStreamSynchronize")) return fail(error);
  wait_for_stream(stream);
  return cudaSuccess;
}

cudaError_t cudaStreamAddCallback(
    cudaStream_t handle, cudaStreamCallback_t function, void* argument, unsigned) {
  submit(stream_of(handle), [=] { function(handle, cudaSuccess, argument); });
  return cudaSuccess;
}

cudaError_t cudaLaunchHostFunc(cudaStream_t handle, cudaHostFn_t function, void* argument) {
  submit(stream_of(handle), [=] { function(argument); });
  return cudaSuccess;
}

}  // extern "C"
