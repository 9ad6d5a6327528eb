"""Rotary positions (RoFormer, arXiv 2104.09864), in the half-split layout that Llama uses."""

from __future__ import annotations

import torch
from torch import Tensor


class RotaryTable:
    """Cosines and sines of position * base^(-2i/H), fp32, shared by all blocks of a stage.

    A plain object rather than a buffer: casting the model to bf16 must not touch the angles.
    """

    def __init__(self, positions: int, head_dim: int, base: float, device: torch.device) -> None:
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
        angles = torch.outer(torch.arange(positions, dtype=torch.float64), base**-exponents)
        self.cos_SH = torch.cos(angles).float().to(device)
        self.sin_SH = torch.sin(angles).float().to(device)

    def rotate(self, x_BSNH: Tensor, positions_BS: Tensor | None = None) -> Tensor:
        """Rotate each pair (x_i, x_{i + H/2}) by its position's angle; the dtype is kept, the product is fp32.

        Positions are `positions_BS`, int64; None: 0 to S - 1 in each row.
        """
        if positions_BS is None:
            cos, sin = (t[None, : x_BSNH.shape[1], None, :] for t in (self.cos_SH, self.sin_SH))
        else:
            cos, sin = (t[positions_BS][:, :, None, :] for t in (self.cos_SH, self.sin_SH))
        first, second = x_BSNH.float().chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x_BSNH.dtype)
