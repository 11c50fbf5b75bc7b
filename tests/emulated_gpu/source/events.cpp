// Events: what streams and the host wait for.
#include "runtime.h"

#include <chrono>

using namespace emulated;

namespace {

double now_ms() {
  auto now = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration<double, std::milli>(now).count();
}

void pass(Event* event, uint64_t number) {
  {
    std::lock_guard<std::mutex> lock(event->mutex);
    if (number > event->done) event->done = number;
    event->time_ms = now_ms();
  }
  event->changed.notify_all();
}

void wait_until_passed(Event* event, uint64_t number) {
  std::unique_lock<std::mutex> lock(event->mutex);
  event->changed.wait(lock, [&] { return event->done >= number; });
}

uint64_t last_record(Event* event) {
  std::lock_guard<std::mutex> lock(event->mutex);
  return event->recorded;
}

}  // namespace

extern "C" {

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* handle, unsigned flags) {
  auto* event = new Event;
  event->flags = flags;
  event->device = current_device;
  *handle = (cudaEvent_t)event;
  return cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t* handle) { return cudaEventCreateWithFlags(handle, 0); }

// A queue may still hold the event: it is never freed.
cudaError_t cudaEventDestroy(cudaEvent_t) { return cudaSuccess; }

cudaError_t cudaEventRecord(cudaEvent_t handle, cudaStream_t stream_handle) {
  auto* event = (Event*)handle;
  Stream* stream = stream_of(stream_handle);
  {
    std::lock_guard<std::mutex> lock(capture_mutex);
    record_in_capture(event, stream);
    if (stream->captured_graph) return cudaSuccess;
  }
  if (event->device != stream->device) {
    say("an event of device %d is recorded on device %d", event->device, stream->device);
    return fail(cudaErrorInvalidResourceHandle);
  }
  uint64_t number;
  {
    std::lock_guard<std::mutex> lock(event->mutex);
    number = ++event->recorded;
  }
  note_record(event, stream);
  submit(stream, [=] { pass(event, number); });
  return cudaSuccess;
}

cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) {
  return cudaEventRecord(event, stream);
}

cudaError_t cudaEventQuery(cudaEvent_t handle) {
  auto* event = (Event*)handle;
  if (event->captured_graph) return fail(cudaErrorCapturedEvent);
  if (cudaError_t error = refuse_during_capture("cudaEventQuery")) return fail(error);
  {
    std::lock_guard<std::mutex> lock(event->mutex);
    if (event->done < event->recorded) return cudaErrorNotReady;
  }
  // A device may be as slow as it likes. Where races are checked, only what the host has waited
  // for has passed, so that no order comes from luck.
  return host_has_waited_for(event) ? cudaSuccess : cudaErrorNotReady;
}

cudaError_t cudaEventSynchronize(cudaEvent_t handle) {
  auto* event = (Event*)handle;
  if (event->captured_graph) return fail(cudaErrorCapturedEvent);
  if (cudaError_t error = refuse_during_capture("cudaEventSynchronize")) return fail(error);
  VectorClock clock = clock_of(event);
  {
    GilRelease release;
    wait_until_passed(event, last_record(event));
  }
  note_host_wait(clock);
  return cudaSuccess;
}

cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t start_handle, cudaEvent_t end_handle) {
  auto* start = (Event*)start_handle;
  auto* end = (Event*)end_handle;
  if (start->done < start->recorded || end->done < end->recorded) return fail(cudaErrorNotReady);
  if ((start->flags | end->flags) & cudaEventDisableTiming) {
    return fail(cudaErrorInvalidResourceHandle);
  }
  *ms = (float)(end->time_ms - start->time_ms);
  return cudaSuccess;
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream_handle, cudaEvent_t handle, unsigned) {
  auto* event = (Event*)handle;
  Stream* stream = stream_of(stream_handle);
  {
    std::lock_guard<std::mutex> lock(capture_mutex);
    bool is_done = false;
    cudaError_t error = wait_in_capture(stream, event, &is_done);
    if (error) return fail(error);
    if (is_done) return cudaSuccess;
  }
  uint64_t number = last_record(event);
  if (number == 0) return cudaSuccess;  // an event that was never recorded orders nothing
  note_stream_wait(stream, event);
  submit(stream, [=] { wait_until_passed(event, number); });
  return cudaSuccess;
}

}  // extern "C"
