"""Without other ranks every collective gives back what it got."""

from __future__ import annotations

import pytest
import torch

from engine.dist import collectives as c
from engine.dist.context import SINGLE


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_on_an_axis_of_one_rank_they_are_the_identity(dim: int) -> None:
    x = torch.randn(2, 3, 4)
    assert c.copy_to_axis(x, SINGLE) is x
    assert c.sum_over_axis(x, SINGLE) is x
    for operator in (c.collect_over_axis, c.scatter_sum_over_axis):
        assert operator(x, SINGLE, dim) is x
    assert c.exchange_over_axis(x, SINGLE, split_dim=dim, gather_dim=1 - dim) is x
