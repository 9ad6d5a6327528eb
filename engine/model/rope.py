"""Rotary positions (RoFormer, arXiv 2104.09864), in the half-split layout that Llama and GPT-NeoX use."""

from __future__ import annotations

import torch


class RotaryTable:
    """Cosines and sines of position * base^(-2i/R), fp32, (positions, R/2), shared by all blocks of a stage.

    R dims of each head are turned, the first ones (all in RoFormer, a quarter in GPT-NeoX, arXiv 2204.06745). A plain
    object rather than a buffer: casting the model to bf16 must not touch the angles.
    """

    def __init__(self, positions: int, rotary_dim: int, base: float, device: torch.device) -> None:
        exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim
        angles = torch.outer(torch.arange(positions, dtype=torch.float64), base**-exponents)
        self.cos_SR = torch.cos(angles).float().to(device)
        self.sin_SR = torch.sin(angles).float().to(device)
