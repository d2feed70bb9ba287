"""The Triton kernels of bldm_kernels.inference; imported only where Triton is (see ../choice.py)."""
