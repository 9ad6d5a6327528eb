"""Weights on disk as logical tensors, independent of the layout that wrote them."""
