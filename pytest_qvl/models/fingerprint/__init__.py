"""Digests of tensors: on the CPU, and in one CUDA kernel over a table of pointers."""
