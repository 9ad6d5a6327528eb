"""AdamW (arXiv 1711.05101, algorithm 2) by a kernel that passes once over each tensor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from engine_kernels.ops import AdamWFn
from engine_kernels.reference.adamw import adamw_step


class FlatAdamW(torch.optim.Optimizer):
    """torch.optim.AdamW with another kernel, for the flat fp32 tensors that ZeRO makes of parameters.

    The state has the names that torch's has, and either loads that of the other. Steps are counted on the host, so
    that no step waits for the device.

    Args:
        groups: parameter groups; contiguous tensors of any shape. `weight_decay` is 0 where a group has none.
        lr, betas, eps: as torch.optim.AdamW has them.
        update: the kernel; see `engine_kernels.reference.adamw.adamw_step`.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        update: AdamWFn,
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self._update = update

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every tensor that has a gradient.

        Raises:
            ValueError: the kernel does not take the tensors or the options.
        """
        for group in self.param_groups:
            for tensor in group["params"]:
                if tensor.grad is not None:
                    self.update(group, tensor, tensor.grad)

    @torch.no_grad()
    def update(
        self,
        group: dict[str, Any],
        tensor: Tensor,
        gradient: Tensor,
        grad_scale: Tensor | None = None,
        copy_out: Tensor | None = None,
    ) -> None:
        """One step of one tensor of `group`.

        Args:
            gradient: of as many elements; fp32 or 16 bits.
            grad_scale: factor of the gradient, fp32, one number on the device. NaN drops the step there.
            copy_out: takes the new values in its own dtype.

        Raises:
            ValueError: the kernel does not take the tensors or the options.
        """
        step, state = self.count(tensor), self.state[tensor]
        self._update(
            tensor.view(-1),
            gradient.reshape(-1),
            state["exp_avg"].view(-1),
            state["exp_avg_sq"].view(-1),
            lr=group["lr"],
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            step=step,
            grad_scale=grad_scale,
            copy_out=None if copy_out is None else copy_out.view(-1),
        )

    def count(self, tensor: Tensor) -> int:
        """Number of the step of `tensor` that is about to be made, from 1; makes its state at the first."""
        state = self.state[tensor]
        for moment in ("exp_avg", "exp_avg_sq"):
            if moment not in state:
                state[moment] = torch.zeros_like(tensor)
        # Only what torch's AdamW has counted is a tensor, and only at the first step after loading it.
        state["step"] = int(state.get("step", 0)) + 1
        return int(state["step"])

    @torch.no_grad()
    def update_on_host(
        self, options: Mapping[str, Any], tensor: Tensor, gradient: Tensor, start: int, step: int
    ) -> None:
        """Step number `step`, as `count` gave it, of the elements of `tensor` from `start` on, in host memory.

        Args:
            options: lr, betas, eps and weight_decay.
            tensor: (n,), fp32 or bf16.
            gradient: fp32 (m,); may be changed.
        """
        state, stop = self.state[tensor], start + gradient.numel()
        value, mean, square = (x.detach()[start:stop] for x in (tensor, state["exp_avg"], state["exp_avg_sq"]))
        beta1, beta2 = options["betas"]
        rates = {name: options[name] for name in ("lr", "eps", "weight_decay")}
        if tensor.dtype is torch.bfloat16:
            adamw_step(value, gradient, mean, square, betas=(beta1, beta2), step=step, **rates)
            return
        # torch counts the step that it makes.
        done = [torch.tensor(float(step - 1))]
        more: dict[str, Any] = {"beta1": beta1, "beta2": beta2, "amsgrad": False, "maximize": False, **rates}
        adamw([value], [gradient], [mean], [square], [], done, fused=True, **more)

    def uncount(self) -> None:
        """The last step of every tensor was dropped."""
        for state in self.state.values():
            state["step"] -= 1
