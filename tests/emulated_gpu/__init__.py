"""An emulated GPU: a CUDA runtime and an NCCL on the CPU, under an unmodified torch."""
