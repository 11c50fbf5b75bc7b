"""CPU functions in place of CUDA's kernels, for a torch whose CUDA runtime is the emulated one."""
