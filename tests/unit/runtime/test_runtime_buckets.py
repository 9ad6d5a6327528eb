"""Which backends average gradients themselves."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.distributed as dist

from engine.runtime.buckets import averages_well


@pytest.mark.parametrize(
    ("backend", "dtype", "ranks", "expected"),
    [
        ("nccl", torch.float32, 3, True),
        ("nccl", torch.bfloat16, 4, True),
        # 1/3 in bf16 is 0.2 % too much.
        ("nccl", torch.bfloat16, 3, False),
        ("cpu:gloo,cuda:gloo", torch.float32, 2, False),
    ],
)
def test_nccl_averages_what_it_rounds_rightly(backend: str, dtype: torch.dtype, ranks: int, expected: bool) -> None:
    with mock.patch.object(dist, "get_backend", return_value=backend):
        assert averages_well(dtype, mock.Mock(**{"size.return_value": ranks})) is expected
