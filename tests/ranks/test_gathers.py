"""New weights that arrive beside the forward pass: each layer waits for its own, and whoever reads them for all."""

from __future__ import annotations

from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from engine.config.load import load
from engine.runtime import flat
from engine.runtime.gathers import Gathers
from tests.helpers.ranks import run_ranks
from tests.ranks.test_flat import WORDS, Run

pytestmark = pytest.mark.ranks

broadcast = dist.broadcast


class Late:
    """A message that comes when somebody waits for it; what it will overwrite is no number until then."""

    def __init__(self, part: Tensor, rank: int, group: dist.ProcessGroup) -> None:
        self._message = partial(broadcast, part, rank, group=group)
        if dist.get_rank() != rank:
            part.fill_(torch.nan)

    def wait(self) -> None:
        self._message()


def late(part: Tensor, rank: int, group: dist.ProcessGroup, async_op: bool = False) -> Any:
    return Late(part, rank, group) if async_op else broadcast(part, rank, group=group)


def trained(words: list[str], elements: int) -> tuple[list[Any], dict[str, Tensor], list[list[int]]]:
    """Losses and norms of three steps and of a validation, weights, and messages left when each layer computed."""
    run = Run(load([*WORDS, "train.accum_steps=2", *words]), dist.get_world_size(), one_pass=True)
    model, optimizer = run.engine._ds.module.model, run.engine._ds.optimizer
    left: list[list[int]] = []
    if model.before is not None:
        parts = [list(part.parameters()) for part in model.parts]
        with mock.patch.object(flat, "Gathers", partial(Gathers, elements=elements)):
            wait = optimizer.gather_beside(parts)

        def before(layer: int) -> None:
            wait(layer)
            if layer == 0:
                left.append([])
            left[-1].append(optimizer._gathers.left)

        model.before = before
    with mock.patch.object(dist, "broadcast", late):
        curve: list[Any] = [run.step(number) for number in range(3)]
        copies = run.weights() and run.copies()
        curve += [run.step(3), run.validate(), run.step(4)]
    return curve, copies, left


def both(words: list[str], elements: int) -> list[Any]:
    return [trained(words, elements), trained([*words, "zero.overlap_comm=false"], elements)]


@pytest.mark.parametrize(
    ("world", "words", "elements"),
    [
        (2, [], 1),
        (2, ["precision.states=bf16", "model.tied_head=false"], 30_000),
        (3, ["train.recompute=full"], 1),
    ],
    ids=["dp2", "bf16 states", "dp3, recomputed"],
)
def test_a_layer_waits_for_its_own_weights_and_computes_with_all_of_them(
    world: int, words: list[str], elements: int
) -> None:
    for (curve, weights, left), (expected, others, never) in run_ranks(both, world, (words, elements)):
        assert curve == expected
        assert all(torch.equal(value, others[name]) for name, value in weights.items())
        assert never == []
        # Five steps of two micro-batches, each with a pass, and a validation of two; recomputed, a pass runs on.
        assert not any(left[0]), "nothing is under way before the first step"
        first = left[2]
        assert first == sorted(first, reverse=True)
        assert first[0] > first[-1] == 0, first
        assert not any(left[3]), "the second micro-batch"


def test_stretches_end_at_parameters_and_leave_two_layers_ahead_from_who_holds_them() -> None:
    group: Any = object()
    parameters = [torch.nn.Parameter(torch.empty(size)) for size in (3, 5, 1, 7, 6, 6)]
    small = torch.nn.Parameter(torch.empty(2))
    layers = [[parameters[0]], [small, parameters[1]], [small], [parameters[0], parameters[3]], [parameters[4]]]
    with mock.patch.object(dist, "get_process_group_ranks", lambda _: [4, 6]):
        gathers = Gathers(torch.arange(30.0), parameters, [*layers, [parameters[5]]], group, elements=6)
    sent: list[tuple[list[float], int]] = []
    works = [mock.Mock() for _ in range(5)]

    def send(part: Tensor, rank: int, group: Any, async_op: bool) -> Any:
        sent.append((part.tolist(), rank))
        return works[len(sent) - 1]

    states = []
    with mock.patch.object(dist, "broadcast", send):
        gathers.begin()
        assert sent == [([*map(float, range(8))], 4)]
        for layer in range(6):
            gathers.wait_for(layer)
            states.append((len(sent), [work.wait.call_count for work in works], gathers.left))
        gathers.finish()
    # Partitions of 15: the second stretch, 8 to 16, is of both. The last two elements are padding.
    assert sent[1:3] == [([*map(float, range(8, 15))], 4), ([15.0], 6)]
    assert sent[3:] == [([*map(float, range(16, 22))], 6), ([*map(float, range(22, 28))], 6)]
    assert states == [
        (1, [1, 0, 0, 0, 0], 3),
        (3, [1, 0, 0, 0, 0], 3),
        (4, [1, 0, 0, 0, 0], 3),
        (5, [1, 1, 1, 0, 0], 2),
        (5, [1, 1, 1, 1, 0], 1),
        (5, [1, 1, 1, 1, 1], 0),
    ]
    assert [work.wait.call_count for work in works] == [1] * 5


def test_weights_that_no_layer_waited_for_are_sent_in_the_end() -> None:
    parameters = [torch.nn.Parameter(torch.empty(4)) for _ in range(5)]
    with mock.patch.object(dist, "get_process_group_ranks", lambda _: [0]):
        gathers = Gathers(torch.zeros(20), parameters, [[one] for one in parameters], mock.Mock(), elements=1)
    with mock.patch.object(dist, "broadcast") as message:
        gathers.begin()
        assert message.call_count == 2
        gathers.finish()
        assert (message.call_count, message.return_value.wait.call_count, gathers.left) == (5, 5, 0)
        gathers.begin()
        assert message.call_count == 7
