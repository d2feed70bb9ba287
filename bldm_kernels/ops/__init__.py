"""The public functions: check the arguments, then call the operator of torch.ops.bldm. One op family a file."""
