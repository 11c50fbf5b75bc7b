// Capture of streams into graphs, and their replay.
//
// A graph runs its operations one after the other, in the order of their capture, on the stream
// that it is launched on. Forked streams of one capture are not checked against each other.
#include "runtime.h"

#include <algorithm>
#include <atomic>
#include <set>
#include <thread>

namespace emulated {

std::mutex capture_mutex;

namespace {

struct Capture {
  Graph* graph;
  Stream* origin;
  std::thread::id owner;
  cudaStreamCaptureMode mode;
  std::set<Stream*> streams;
};

std::vector<Capture*> captures;  // under capture_mutex
thread_local cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;

Capture* capture_of(const Graph* graph) {
  for (Capture* capture : captures) {
    if (capture->graph == graph) return capture;
  }
  return nullptr;
}

void join_capture(Stream* stream, Graph* graph) {
  stream->captured_graph = graph;
  stream->is_capture_broken = false;
  stream->captured_count = 0;
  stream->joined_count = 0;
  if (Capture* capture = capture_of(graph)) capture->streams.insert(stream);
}

// Whether a call of this thread that waits or allocates disturbs a capture.
bool is_disturbed(const Capture* capture) {
  bool is_own = capture->owner == std::this_thread::get_id();
  if (is_own && capture->mode != cudaStreamCaptureModeRelaxed) return true;
  bool is_global = capture->mode == cudaStreamCaptureModeGlobal;
  return is_global && thread_mode == cudaStreamCaptureModeGlobal;
}

cudaError_t end_capture(Capture* capture) {
  bool is_broken = false;
  bool is_joined = true;
  for (Stream* stream : capture->streams) {
    is_broken |= stream->is_capture_broken;
    if (stream != capture->origin && stream->joined_count < stream->captured_count) {
      is_joined = false;
    }
    stream->captured_graph = nullptr;
    stream->is_capture_broken = false;
  }
  captures.erase(std::find(captures.begin(), captures.end(), capture));
  if (is_broken) return cudaErrorStreamCaptureInvalidated;
  if (!is_joined) {
    say("a stream that joined a capture was not joined back");
    return cudaErrorStreamCaptureUnjoined;
  }
  return cudaSuccess;
}

}  // namespace

cudaError_t refuse_during_capture(const char* call) {
  std::lock_guard<std::mutex> lock(capture_mutex);
  if (thread_mode == cudaStreamCaptureModeRelaxed) return cudaSuccess;
  for (Capture* capture : captures) {
    if (!is_disturbed(capture)) continue;
    for (Stream* stream : capture->streams) stream->is_capture_broken = true;
    say("%s during a capture", call);
    return cudaErrorStreamCaptureUnsupported;
  }
  return cudaSuccess;
}

cudaError_t break_capture(Stream* stream, const char* reason) {
  stream->is_capture_broken = true;
  say("%s during a capture", reason);
  return cudaErrorStreamCaptureUnsupported;
}

void record_in_capture(Event* event, Stream* stream) {
  event->captured_graph = stream->captured_graph;
  event->captured_stream = stream;
  event->captured_at = stream->captured_count;
}

cudaError_t wait_in_capture(Stream* stream, Event* event, bool* is_done) {
  *is_done = event->captured_graph || stream->captured_graph;
  if (event->captured_graph) {
    if (!stream->captured_graph) join_capture(stream, event->captured_graph);
    if (stream->captured_graph != event->captured_graph) return cudaErrorStreamCaptureMerge;
    Stream* other = event->captured_stream;
    if (other != stream) other->joined_count = std::max(other->joined_count, event->captured_at);
    return cudaSuccess;
  }
  if (stream->captured_graph && event->recorded > 0) {
    break_capture(stream, "a wait for an event from outside");
    return cudaErrorStreamCaptureIsolation;
  }
  return cudaSuccess;
}

bool add_to_capture(Stream* stream, Operation& operation, const Accesses& accesses) {
  Graph* graph = stream->captured_graph;
  if (!graph) return false;
  graph->operations.push_back(std::move(operation));
  graph->accesses.insert(graph->accesses.end(), accesses.begin(), accesses.end());
  stream->captured_count++;
  return true;
}

}  // namespace emulated

using namespace emulated;

extern "C" {

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(*mode, thread_mode);
  return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t handle, cudaStreamCaptureMode mode) {
  static std::atomic<unsigned long long> next_id{1};
  if ((uintptr_t)handle <= 2) return fail(cudaErrorStreamCaptureUnsupported);
  Stream* stream = stream_of(handle);
  std::lock_guard<std::mutex> lock(capture_mutex);
  if (stream->captured_graph) return fail(cudaErrorIllegalState);
  auto* graph = new Graph;
  graph->id = next_id++;
  captures.push_back(new Capture{graph, stream, std::this_thread::get_id(), mode, {}});
  join_capture(stream, graph);
  return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t* result) {
  Stream* stream = stream_of(handle);
  std::lock_guard<std::mutex> lock(capture_mutex);
  *result = nullptr;
  Capture* capture = capture_of(stream->captured_graph);
  if (!capture) return fail(cudaErrorIllegalState);
  bool is_owner = capture->owner == std::this_thread::get_id();
  if (!is_owner && capture->mode != cudaStreamCaptureModeRelaxed) {
    return fail(cudaErrorStreamCaptureWrongThread);
  }
  if (cudaError_t error = end_capture(capture)) return fail(error);
  *result = (cudaGraph_t)capture->graph;
  return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t handle, cudaStreamCaptureStatus* status) {
  Stream* stream = stream_of(handle);
  std::lock_guard<std::mutex> lock(capture_mutex);
  *status = cudaStreamCaptureStatusNone;
  if (stream->captured_graph) *status = cudaStreamCaptureStatusActive;
  if (stream->is_capture_broken) *status = cudaStreamCaptureStatusInvalidated;
  return cudaSuccess;
}

cudaError_t cudaStreamGetCaptureInfo(
    cudaStream_t handle, cudaStreamCaptureStatus* status, unsigned long long* id,
    cudaGraph_t* graph, const cudaGraphNode_t** dependencies, const cudaGraphEdgeData** edges,
    size_t* count) {
  Graph* captured = stream_of(handle)->captured_graph;
  cudaStreamIsCapturing(handle, status);
  if (id) *id = captured ? captured->id : 0;
  if (graph) *graph = (cudaGraph_t)captured;
  if (dependencies) *dependencies = nullptr;
  if (edges) *edges = nullptr;
  if (count) *count = 0;
  return cudaSuccess;
}

cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t*, size_t* count) {
  *count = ((Graph*)graph)->operations.size();
  return cudaSuccess;
}

cudaError_t cudaGraphNodeGetDependencies(
    cudaGraphNode_t, cudaGraphNode_t*, cudaGraphEdgeData*, size_t* count) {
  *count = 0;
  return cudaSuccess;
}

// What is launched is the graph itself. It is never freed, and its number of nodes is small.
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* result, cudaGraph_t graph, unsigned long long) {
  *result = (cudaGraphExec_t)graph;
  return cudaSuccess;
}

cudaError_t cudaGraphInstantiateWithFlags(
    cudaGraphExec_t* result, cudaGraph_t graph, unsigned long long flags) {
  return cudaGraphInstantiate(result, graph, flags);
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t handle, cudaStream_t stream) {
  auto* graph = (Graph*)handle;
  auto replay = [graph] {
    for (const Operation& operation : graph->operations) operation();
  };
  submit(stream_of(stream), replay, graph->accesses);
  return cudaSuccess;
}

cudaError_t cudaUserObjectCreate(
    cudaUserObject_t* object, void*, cudaHostFn_t, unsigned, unsigned) {
  *object = (cudaUserObject_t) new int;
  return cudaSuccess;
}

}  // extern "C"
