"""Kernels in Triton, which compiles them for the GPU at their first call; nothing is built when Octant is installed.

On a machine without a GPU they run in Triton's interpreter where TRITON_INTERPRET=1 is set before they are imported.
"""

from engine_kernels.interpreter import interpreted, round_to_bf16

if interpreted():
    round_to_bf16()
