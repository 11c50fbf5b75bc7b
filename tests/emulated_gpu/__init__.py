"""An emulated GPU: a CUDA runtime and an NCCL on the CPU, under an unmodified torch."""

DEVICE_NAME = "Emulated GPU"  # as torch.cuda.get_device_name() gives it
