"""Who waits for whom around parts of parameters that other ranks map, on streams that only note it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from engine.runtime.mapped_shards import MappedShards


class Memory:
    def __init__(self, notes: list[str]) -> None:
        self.tensors, self._notes = [torch.zeros(4), torch.zeros(4)], notes

    def meet(self) -> None:
        self._notes.append("meet")


def optimizer(*frozen: nn.Parameter) -> Any:
    weight: Any = nn.Parameter(torch.empty(0))
    weight.ds_id, weight.ds_tensor = 7, torch.arange(4.0)
    flat = weight.ds_tensor.view(-1)
    return SimpleNamespace(
        lp_param_buffer=flat,
        fp16_groups=[[weight]],
        fp16_partitioned_groups_flat=[flat[:]],
        module=nn.ParameterList([weight, *frozen]),
    )


@pytest.fixture
def notes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What streams are told."""
    noted: list[str] = []

    class Event:
        made = 0

        def __init__(self) -> None:
            Event.made += 1
            self.number = Event.made

        def record(self, stream: object) -> None:
            noted.append(f"mark {self.number}")

    stream = SimpleNamespace(wait_event=lambda event: noted.append(f"wait {event.number}"))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    return noted


def test_streams_wait_for_writers_before_they_read_and_for_readers_before_they_write(notes: list[str]) -> None:
    shards = MappedShards(optimizer(), Memory(notes), 1)
    shards._device = torch.device("cuda")

    def told(what: Any, *arguments: Any) -> list[str]:
        notes.clear()
        what(*arguments)
        return list(notes)

    assert told(shards.before_reading) == ["meet", "mark 1"]
    assert told(shards.before_reading) == []
    assert told(shards.gather, []) == ["wait 1", "mark 2"]
    assert told(shards.gather, []) == ["wait 1", "mark 3"]
    assert told(shards.before_writing) == ["wait 3", "meet"]
    assert told(shards.before_reading) == ["meet", "mark 4"]


def test_parts_move_with_all_that_refers_to_them() -> None:
    memory = Memory([])
    found = optimizer()
    (parameter,) = found.fp16_groups[0]
    shards = MappedShards(found, memory, 1)
    assert memory.tensors[1].tolist() == [0, 1, 2, 3]
    memory.tensors[1].fill_(5)
    for tensor in (found.lp_param_buffer, parameter.ds_tensor, found.fp16_partitioned_groups_flat[0]):
        assert tensor.tolist() == [5] * 4
    assert parameter.all_gather_coalesced == shards.gather


def test_a_frozen_parameter_is_none_of_them() -> None:
    with pytest.raises(AssertionError, match="a frozen parameter has no part here"):
        MappedShards(optimizer(nn.Parameter(torch.empty(0))), Memory([]), 0)
