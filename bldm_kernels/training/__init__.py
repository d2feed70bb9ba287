"""Parts of a transformer block with gradients, for training in bfloat16 on a GPU: what PyTorch does in several passes over large
tensors, in one. They are operators (`torch.ops.bldm`), which torch.compile leaves as they are; each costs Python more time than
the kernels it replaces, so they pay within a CUDA graph.
"""
