"""Rotary positions (RoFormer, arXiv 2104.09864), in the half-split layout that Llama and GPT-NeoX use."""

from __future__ import annotations

import torch
from torch import Tensor


class RotaryTable:
    """Cosines and sines of position * base^(-2i/R), fp32, shared by all blocks of a stage.

    R dims of each head are turned, the first ones (all in RoFormer, a quarter in GPT-NeoX, arXiv 2204.06745). A plain
    object rather than a buffer: casting the model to bf16 must not touch the angles.
    """

    def __init__(self, positions: int, rotary_dim: int, base: float, device: torch.device) -> None:
        exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim
        angles = torch.outer(torch.arange(positions, dtype=torch.float64), base**-exponents)
        self.cos_SR = torch.cos(angles).float().to(device)
        self.sin_SR = torch.sin(angles).float().to(device)

    def rotate(self, x_BSNH: Tensor, positions_BS: Tensor | None = None) -> Tensor:
        """Rotate each pair (x_i, x_{i + R/2}) by its position's angle; the dtype is kept, the product is fp32.

        Dims from R on stay as they are. Positions are `positions_BS`, int64; None: 0 to S - 1 in each row.
        """
        if positions_BS is None:
            cos, sin = (t[None, : x_BSNH.shape[1], None, :] for t in (self.cos_SR, self.sin_SR))
        else:
            cos, sin = (t[positions_BS][:, :, None, :] for t in (self.cos_SR, self.sin_SR))
        turned = 2 * cos.shape[-1]
        first, second = x_BSNH[..., :turned].float().chunk(2, dim=-1)
        parts = [first * cos - second * sin, second * cos + first * sin]
        if turned == x_BSNH.shape[-1]:
            return torch.cat(parts, dim=-1).to(x_BSNH.dtype)
        return torch.cat([*(part.to(x_BSNH.dtype) for part in parts), x_BSNH[..., turned:]], dim=-1)
