"""Without other ranks every collective gives back what it got; and what is copied has the same bits."""

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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int64, torch.complex128], ids=str)
@pytest.mark.parametrize("shape", [(3, 2, 5, 16), (3, 2, 5, 7), (1, 2, 1, 8), (2, 0, 3, 8), (2, 3, 4, 0)], ids=str)
def test_a_packed_tensor_has_the_same_bits(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    count = 1
    for size in shape:
        count *= size
    # Any bits, so also such as are no numbers.
    raw = torch.randint(0, 256, ((count + 9) * dtype.itemsize,), dtype=torch.uint8).view(dtype)
    for first in (0, 1, 8):
        whole = raw[first : first + count].view(shape)
        for order in ((0, 1, 2, 3), (1, 0, 2, 3), (2, 1, 0, 3), (0, 3, 1, 2)):
            x = whole.permute(order)
            found = c.packed(x)
            assert found.is_contiguous()
            assert (found.shape, found.dtype) == (x.shape, dtype)
            assert torch.equal(found.flatten().view(torch.uint8), x.contiguous().flatten().view(torch.uint8))


def test_rows_of_whole_16_bytes_are_copied_so(monkeypatch: pytest.MonkeyPatch) -> None:
    copied = []
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda x: copied.append(x.dtype) or x.clone())
    c.packed(torch.zeros(4, 2, 8, dtype=torch.bfloat16).transpose(0, 1))
    c.packed(torch.zeros(4, 2, 7, dtype=torch.bfloat16).transpose(0, 1))
    assert copied == [torch.complex128, torch.bfloat16]
