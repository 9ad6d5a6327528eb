"""A few parameters of every kind that an optimizer meets, without a model around them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from engine.dist.context import AxisGroup
from engine.parallel.logical import LogicalTensor, make_parameter

# Sizes are such that ZeRO's partitions begin and end inside rows, and that a partition misses some tensors.
LOGICAL = [
    LogicalTensor((13, 6), dim=0, padded=16, role="embedding"),
    LogicalTensor((16, 6), dim=0, segments=(8, 4, 4)),
    LogicalTensor((6, 8), dim=1),
    LogicalTensor((5, 7)),
    LogicalTensor((16,), dim=0, segments=(8, 4, 4), decay=False),
    LogicalTensor((9,), decay=False),
]
TENSORS = {f"t{i}": replace(logical, name=f"t{i}") for i, logical in enumerate(LOGICAL)}


def values(seed: int) -> dict[str, Tensor]:
    """A normal draw for each of `TENSORS`."""
    return {name: replace(logical, init_std=1.0).draw(seed) for name, logical in TENSORS.items()}


class Bowls(nn.Module):
    """Loss sum over elements of `curve (w - goal)^2 / 2`: gradients that are known, and depend on the weights."""

    def __init__(self, tp: AxisGroup, tensors: Mapping[str, LogicalTensor] = TENSORS) -> None:
        super().__init__()
        self.goals = {n: t.local_slice(values(2)[n], tp.rank, tp.size) for n, t in tensors.items()}
        self.curves = {n: t.local_slice(values(3)[n].exp(), tp.rank, tp.size) for n, t in tensors.items()}
        for name, logical in tensors.items():
            start = logical.local_slice(values(1)[name], tp.rank, tp.size)
            parameter = make_parameter(start.shape, logical)
            with torch.no_grad():
                parameter.copy_(start)
            self.register_parameter(name, parameter)

    def forward(self, share: Tensor) -> Tensor:
        """The loss times `share`; sum of the losses of replicas whose shares sum to 1 is that of one process."""
        terms = [(self.curves[n] * (w - self.goals[n]).square()).sum() for n, w in self.named_parameters()]
        return 0.5 * share * torch.stack(terms).sum()
