// nccl.h includes this file. The emulation needs none of its types.
#pragma once
