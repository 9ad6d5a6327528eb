"""Memory that ranks map of each other: whose is where, and what of it is counted."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch

from engine.dist.context import AxisGroup
from engine.parallel import symmetric


def test_each_rank_holds_its_own_and_maps_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = mock.Mock()
    theirs.empty.side_effect = torch.empty
    theirs.rendezvous.return_value.get_buffer.side_effect = lambda rank, size, dtype: torch.full(
        size, float(rank), dtype=dtype
    )
    monkeypatch.setattr(symmetric, "library", lambda: theirs)
    device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda found: 1000 if found is device else 0)
    before = symmetric.peak_bytes(device)
    assert before >= 1000
    assert symmetric.peak_bytes(torch.device("cpu")) == 0
    group: Any = mock.Mock()
    mapped = symmetric.Mapped(10, torch.bfloat16, torch.device("cpu"), AxisGroup(1, 3, (0, 1, 2), group), 1.5)
    own = theirs.rendezvous.call_args.args[0]
    assert mapped.tensors[1] is own
    assert own.shape == (10,)
    assert [float(mapped.tensors[rank][0]) for rank in (0, 2)] == [0.0, 2.0]
    assert symmetric.peak_bytes(device) - before == 20
    mapped.meet()
    theirs.rendezvous.return_value.barrier.assert_called_once_with(timeout_ms=1500)
    del mapped
    assert symmetric.peak_bytes(device) == before
