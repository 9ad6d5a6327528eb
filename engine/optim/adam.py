"""Adam's direction (arXiv 1412.6980), the elementwise part of LAMB and of Muon's other parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def adam_direction(
    gradient: Tensor, state: dict[str, Any], step: int, betas: tuple[float, float], eps: float
) -> Tensor:
    """m / (sqrt(v) + eps), both corrected for bias, after `gradient` has entered `exp_avg` and `exp_avg_sq`.

    Args:
        gradient: fp32, any shape.
        state: of the tensor; filled with zeros at the first call.
        step: number of the step, from 1.
    """
    if "exp_avg" not in state:
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(gradient), torch.zeros_like(gradient)
    beta1, beta2 = betas
    mean, square = state["exp_avg"], state["exp_avg_sq"]
    mean.lerp_(gradient, 1 - beta1)
    square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    denominator = (square / (1 - beta2**step)).sqrt_().add_(eps)
    direction: Tensor = mean / (1 - beta1**step)
    return direction.div_(denominator)
