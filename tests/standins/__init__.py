"""Small independent samplers of the same shape and signature as those of other code bases, around fixed logits.

Nothing here is theirs or uses this library: each follows its code base's conventions in plain PyTorch, so that what
`bldm.accelerate` makes of it can be compared with what it does itself.
"""
