"""Octant: a Megatron-style 3D-parallel training engine built on DeepSpeed."""

__version__ = "0.1.0"
