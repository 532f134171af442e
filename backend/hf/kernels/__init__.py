"""Triton kernels, each file with its floor. Imported only where a CUDA device was chosen."""
