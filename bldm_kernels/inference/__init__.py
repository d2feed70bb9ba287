"""Kernels of inference only: the pieces of a transformer denoiser that an engine chains inside one CUDA graph.

Plain functions on tensors, without autograd: a file a family. Each has the plain PyTorch that specifies it, which also runs
on the CPU and for what the kernel does not take; `supports` of a file says what it takes.
"""
