// Settings, messages, errors of a thread, and Python's lock.
#include "runtime.h"

#include <dlfcn.h>
#include <unistd.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>

namespace emulated {

thread_local int current_device = 0;
static thread_local cudaError_t last_error = cudaSuccess;

int setting(const char* name, int fallback) {
  const char* value = getenv(name);
  return value ? atoi(value) : fallback;
}

bool checks_races() {
  static bool value = setting("EMULATED_GPU_RACES", 0);
  return value;
}

void say(const char* format, ...) {
  char text[512];
  int length = snprintf(text, sizeof text, "[emulated gpu] process %d: ", getpid());
  va_list arguments;
  va_start(arguments, format);
  length += vsnprintf(text + length, sizeof text - length, format, arguments);
  va_end(arguments);
  if (length > (int)sizeof text - 2) length = sizeof text - 2;
  text[length++] = '\n';
  // One write, so that lines of several processes do not mix.
  if (write(2, text, length) < 0) return;
}

cudaError_t fail(cudaError_t error) {
  last_error = error;
  return error;
}

template <class Function>
static Function python_function(const char* name) {
  return (Function)dlsym(RTLD_DEFAULT, name);
}

GilRelease::GilRelease() {
  static auto is_initialized = python_function<int (*)()>("Py_IsInitialized");
  static auto holds_lock = python_function<int (*)()>("PyGILState_Check");
  static auto release = python_function<void* (*)()>("PyEval_SaveThread");
  if (is_initialized && is_initialized() && holds_lock()) state_ = release();
}

GilRelease::~GilRelease() {
  static auto take = python_function<void (*)(void*)>("PyEval_RestoreThread");
  if (state_) take(state_);
}

}  // namespace emulated

using namespace emulated;

extern "C" {

cudaError_t cudaGetLastError() {
  cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}

cudaError_t cudaPeekAtLastError() { return last_error; }

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "cudaSuccess";
    case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
    case cudaErrorMemoryAllocation: return "cudaErrorMemoryAllocation";
    case cudaErrorInvalidDevice: return "cudaErrorInvalidDevice";
    case cudaErrorInvalidDeviceFunction: return "cudaErrorInvalidDeviceFunction";
    case cudaErrorInvalidResourceHandle: return "cudaErrorInvalidResourceHandle";
    case cudaErrorNotReady: return "cudaErrorNotReady";
    case cudaErrorNotSupported: return "cudaErrorNotSupported";
    case cudaErrorStreamCaptureUnsupported: return "cudaErrorStreamCaptureUnsupported";
    case cudaErrorStreamCaptureInvalidated: return "cudaErrorStreamCaptureInvalidated";
    case cudaErrorStreamCaptureUnjoined: return "cudaErrorStreamCaptureUnjoined";
    case cudaErrorStreamCaptureIsolation: return "cudaErrorStreamCaptureIsolation";
    default: return "cudaErrorEmulated";
  }
}

const char* cudaGetErrorString(cudaError_t error) {
  thread_local char text[96];
  snprintf(text, sizeof text, "emulated CUDA error %d (%s)", (int)error, cudaGetErrorName(error));
  return text;
}

void* emulated_release_gil() { return new GilRelease; }
void emulated_take_gil(void* release) { delete (GilRelease*)release; }

}  // extern "C"
