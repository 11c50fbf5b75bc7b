// nccl.h includes this file, and needs only the types of the runtime.
#pragma once
#include <cuda_runtime_api.h>
