"""Tensor-parallel layers on an explicit axis group (Megatron-LM, arXiv 1909.08053, section 3)."""
