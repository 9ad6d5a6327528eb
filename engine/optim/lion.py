"""Lion: the sign of an interpolated momentum, with decoupled weight decay (arXiv 2302.06675, algorithm 2)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch


class Lion(torch.optim.Optimizer):
    """w <- w - lr (sign(b1 m + (1 - b1) g) + decay w), then m <- b2 m + (1 - b2) g.

    Elementwise, so that pieces of tensors need no care. An element whose gradient was always zero does not move.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], *, lr: float, betas: tuple[float, float]) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every tensor that has a gradient."""
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for tensor in group["params"]:
                if tensor.grad is None:
                    continue
                state = self.state[tensor]
                if "exp_avg" not in state:
                    state["exp_avg"] = torch.zeros_like(tensor)
                mean = state["exp_avg"]
                tensor.mul_(1 - group["lr"] * group["weight_decay"])
                tensor.add_(mean.lerp(tensor.grad, 1 - beta1).sign_(), alpha=-group["lr"])
                mean.lerp_(tensor.grad, 1 - beta2)
