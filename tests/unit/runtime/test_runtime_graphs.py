"""Passes that are recorded: after how many, for which flags and feeds, and what a recording reads."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.config.enums import DType, Switch
from engine.dist.context import ParallelContext
from engine.model.batch import Documents
from engine.model.feed import Feed
from engine.runtime.graphs import EAGER, GraphedPasses, Repeater, wants_graphs
from tests.helpers.configs import make
from tests.helpers.tape import Tape


def feed(number: int, **changes: Any) -> Feed:
    """Two rows of four tokens."""
    tokens = torch.full((2, 4), number)
    options: dict[str, Any] = dict.fromkeys(("types_BL", "lengths_B", "documents", "document_positions_BS"))
    options |= {"tokens_BS": tokens, "labels_BS": tokens + 1, "sentence_B": None, "positions_L": torch.arange(4)}
    options |= {"samples_B": torch.tensor([number, number + 1]), "first_sample": number, "whole_length": 4, "seed": 7}
    return Feed(**options | {"targets": torch.tensor(8.0), "sentences": torch.tensor(1.0)} | changes)


class Model:
    """Two parameters, the second of which has no gradient in feeds with lengths. Sums are copied to, then added to."""

    def __init__(self) -> None:
        self.flags = [[False], [False]]
        self.sums = [torch.full((), -1.0), torch.full((), -1.0)]
        self.calls: list[Feed] = []

    def __call__(self, feed: Feed) -> Tensor:
        self.calls.append(feed)
        share = feed.tokens_BS.sum() / feed.targets
        for index in (0, 1) if feed.lengths_B is None else (0,):
            seen, total = self.flags[index], self.sums[index]
            (total.add_ if seen[0] else total.copy_)(share)
            seen[0] = True
        return share

    def begin_step(self) -> None:
        for flags in self.flags:
            flags[:] = [False]


@pytest.fixture(params=[Repeater, Tape])
def passes(request: pytest.FixtureRequest) -> tuple[Model, GraphedPasses]:
    model = Model()
    return model, GraphedPasses(model, model.flags, request.param())


def step(model: Model, graphed: GraphedPasses, feeds: list[Feed]) -> tuple[list[float], list[float]]:
    """Shares and sums."""
    model.begin_step()
    return [float(graphed(one)) for one in feeds], [float(total) for total in model.sums]


def test_sums_and_shares_are_those_of_the_passes(passes: tuple[Model, GraphedPasses]) -> None:
    model, graphed = passes
    for first in range(5):
        shares, sums = step(model, graphed, [feed(first), feed(first + 3), feed(first + 5)])
        assert shares == [float(first), first + 3.0, first + 5.0]
        assert sums == [3 * first + 8.0] * 2
        assert model.flags == [[True], [True]]
    # All but two passes that copy, and two that add.
    assert graphed.replays == 5 * 3 - 2 * EAGER


def test_nothing_runs_as_it_is_once_a_pass_is_recorded() -> None:
    """Its activations would lie beside the memory of the graphs."""
    model, order = Model(), list[str]()

    class Said(Tape):
        def run(self, work: Any) -> None:
            order.append("run")
            work()

        def record(self, work: Any) -> Any:
            order.append("record")
            return super().record(work)

    graphed = GraphedPasses(model, model.flags, Said())
    for accum in (1, 2, 5):
        order.clear()
        graphed = GraphedPasses(model, model.flags, Said())
        for first in range(4):
            step(model, graphed, [feed(first + place) for place in range(accum)])
        kinds = min(accum, 2)
        assert order == ["run"] * order.count("run") + ["record"] * kinds
        assert order.count("run") <= EAGER * accum


def test_a_recording_reads_copies_of_its_own() -> None:
    model = Model()
    graphed = GraphedPasses(model, model.flags, Tape())
    for number in range(6):
        given = feed(number)
        shares, _ = step(model, graphed, [given])
        given.tokens_BS.fill_(99)
        assert shares == [float(number)]
    assert len(model.calls) == EAGER + 1, "once more to be recorded"
    (one,) = {id(call) for call in model.calls}
    assert one != id(given)


@pytest.mark.parametrize(
    "changes",
    [
        {"tokens_BS": torch.full((2, 3), 5)},
        {"tokens_BS": torch.full((2, 4), 5, dtype=torch.int32)},
        {"lengths_B": torch.tensor([3, 4])},
        {"whole_length": 5},
        {"seed": 8},
        {"documents": Documents(torch.tensor([0, 4, 8]), 4)},
    ],
    ids=str,
)
def test_another_signature_runs_as_it_is(changes: dict[str, Any], passes: tuple[Model, GraphedPasses]) -> None:
    model, graphed = passes
    for number in range(4):
        step(model, graphed, [feed(number)])
    other = replace(feed(5), **changes)
    replays, calls = graphed.replays, len(model.calls)
    shares, sums = step(model, graphed, [feed(1), other, other, feed(2)])
    assert len(model.calls) >= calls + 2 and any(call is other for call in model.calls)
    wanted = float(other.tokens_BS.sum() / 8)
    assert shares == [1.0, wanted, wanted, 2.0]
    assert sums == [3 + 2 * wanted, 3.0 if other.lengths_B is not None else 3 + 2 * wanted]
    assert graphed.replays == replays + 1, "a kind that is new here runs as it is at first"


def test_the_first_sample_is_no_part_of_the_signature() -> None:
    model = Model()
    graphed = GraphedPasses(model, model.flags, Tape())
    for number in range(EAGER + 2):
        step(model, graphed, [replace(feed(number), first_sample=number * 100)])
    assert graphed.replays == 2


def test_the_signature_is_that_of_the_last_feeds_before_anything_is_recorded() -> None:
    model = Model()
    graphed = GraphedPasses(model, model.flags, Tape())
    step(model, graphed, [replace(feed(1), lengths_B=torch.tensor([3, 4]))])
    for number in range(EAGER + 3):
        assert step(model, graphed, [feed(number)]) == ([float(number)], [float(number)] * 2)
    assert graphed.replays == 3


def test_what_the_host_reads_is_no_part_of_a_recording() -> None:
    model = Model()
    graphed = GraphedPasses(lambda one: torch.tensor(float(one.tokens_BS.sum())), model.flags, Tape())
    for number in range(EAGER):
        graphed(feed(number))
    with pytest.raises(AssertionError, match="makes the host wait"):
        graphed(feed(3))


def test_who_gets_graphs() -> None:
    here = ParallelContext.single()
    there = replace(here, device=torch.device("cuda"))
    fitting = {"precision__dtype": DType.bf16, "zero__stage": 1}
    wanted = {
        Switch.off: (False, False, False),
        Switch.auto: (False, True, False),
        Switch.on: (True, True, True),
    }
    for switch, (on_cpu, on_gpu, unfit) in wanted.items():
        cfg = make(kernels__cuda_graphs=switch, **fitting)
        assert (wants_graphs(cfg, here), wants_graphs(cfg, there)) == (on_cpu, on_gpu)
        # What is asked for by name and does not fit is refused before.
        assert wants_graphs(make(kernels__cuda_graphs=switch), there) is unfit
