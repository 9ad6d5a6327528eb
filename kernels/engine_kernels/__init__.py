"""Kernels of Octant: one public function per operation, several implementations behind a registry.

Imports torch and triton, never `engine`.
"""
