"""Compiled blocks under ZeRO-3: its hooks stay outside of the graphs, which compute what one process does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from engine.config.load import load
from engine.runtime import zero3
from engine.study.__main__ import main
from tests.helpers.ranks import run_ranks
from tests.ranks.test_flat import Run

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(400)]

COMPILED = ["model=gpt_tiny", "train.device=cpu", "kernels.compile=on", "train.steps=5"]


class OutsideOfGraphs:
    """The linear that the head has. No autograd function itself, whose `apply` is never traced."""

    linear = zero3._CutLinear

    @classmethod
    def apply(cls, *args: Any) -> Any:
        assert not torch.compiler.is_compiling()
        return cls.linear.apply(*args)


def graphs_and_breaks(words: list[str]) -> tuple[list[int], int]:
    """Graphs after each of three steps, and how often one was broken."""
    counters = torch._dynamo.utils.counters
    sizes = ["model.num_layers=3", "data=random", "data.seq_len=16", "zero=z3", "train.accum_steps=2"]
    run, found = Run(load([*COMPILED, *sizes, *words]), dist.get_world_size(), one_pass=False), []
    with mock.patch.object(zero3, "_CutLinear", OutsideOfGraphs):
        for number in range(3):
            run.step(number)
            found.append(counters["stats"]["unique_graphs"])
    return found, len(counters["graph_break"])


@pytest.mark.parametrize("words", [[], ["train.recompute=full"]], ids=["kept", "recomputed"])
def test_a_block_is_one_graph_and_stays_one(words: list[str]) -> None:
    for graphs, breaks in run_ranks(graphs_and_breaks, 2, (words,), timeout_s=200):
        assert graphs == [2] * 3, "the block and the loss"
        assert breaks == 0


def test_compiled_blocks_agree_with_one_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "parity.json"
    lists = ["--worlds", "2", "--zero", "3", "--cases", "2", "--offload", "none", "--accum", "4"]
    assert main(["parity", *COMPILED, *lists, "--json", str(out)]) == 0, capsys.readouterr().out
    assert len(json.loads(out.read_text())["cases"]) == 2
