"""The first rank of a layout, alone: it sends what it would send among all, holds what it would hold, and its gradients
are as large."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch import Tensor

from engine.config import Config
from engine.config.load import load
from engine.optim.schedule import learning_rate
from engine.study import loopback
from engine.study.rank import DEFAULTS, with_own_tokens
from engine.train.loop import global_batch
from engine.train.loop import load as read_ahead
from engine.train.session import open_rank
from tests.helpers.command import run_command
from tests.helpers.ranks import run_ranks

pytestmark = pytest.mark.ranks

SMALL = [
    "model=llama_tiny",
    "train.device=cpu",
    "train.cpu_threads=1",
    "data.seq_len=32",
    "train.micro_batch=2",
    "train.accum_steps=2",
]
LAYOUTS = {
    2: [
        ("zero=z1", "precision=bf16"),
        ("zero=z3", "precision=bf16"),
        ("zero=z2",),
        ("zero=z1", "precision=bf16", "optim=muon"),
        ("parallel.tp=2", "parallel.sequence=true", "zero=z1"),
        ("parallel.tp=2", "model=gpt_tiny"),
        ("parallel.context=2",),
        ("parallel.tp=2", "optim=muon", "zero=z1"),
        ("parallel.pp=2", "model.tied_head=true"),
    ],
    4: [("zero=z3", "parallel.tp=2", "precision=bf16"), ("parallel.pp=2", "parallel.dp=2", "zero=z1")],
}
CALLS = {
    "all_gather_into_tensor": 1,
    "reduce_scatter_tensor": 1,
    "all_to_all_single": 1,
    "all_gather": 1,
    "all_reduce": 0,
    "reduce": 0,
    "broadcast": 0,
    "isend": 0,
    "irecv": 0,
}
"""What is counted, and which argument is the message."""
STEPS = 2
LARGER = {"parallel.context=2": 3, "parallel.tp=2": 1.4}
"""How many times as large the gradients of one rank of two may be, or as small; else twice. With context parallelism
queries attend to copies of keys, whose gradients are in one direction."""

Calls = Counter[tuple[str, int, str]]
"""Name, elements and dtype."""
State = list[tuple[str, int]]
"""Kind and elements of what the optimizer holds."""


def messages(cfg: Config) -> tuple[Calls, State, float]:
    """What this rank asks for in the last step, what it holds then, and the norm of the gradients."""
    engine, train = open_rank(cfg)
    size = global_batch(cfg, engine.ctx)
    found: Calls = Counter()
    with read_ahead(train, range(0, STEPS * size, size), cfg, engine.ctx) as batches:
        engine.train_step(next(batches), learning_rate(cfg.optim, 0, STEPS))
        with pytest.MonkeyPatch.context() as patch:
            for name, place in CALLS.items():
                patch.setattr(dist, name, counted(found, name, place, getattr(dist, name)))
            last = engine.train_step(next(batches), learning_rate(cfg.optim, 1, STEPS))
    return found, [(slot.kind, slot.values.numel()) for slot in engine.state().slots], float(last.grad_norm)


def counted(found: Calls, name: str, place: int, call: Callable[..., Any]) -> Callable[..., Any]:
    def counting(*args: Any, **named: Any) -> Any:
        values = [*args, *named.values()]
        message: Tensor = values[place]
        found[name, message.numel(), str(message.dtype)] += 1
        return call(*args, **named)

    return counting


def all_messages(cfgs: list[Config]) -> list[tuple[Calls, State, float]]:
    return [messages(cfg) for cfg in cfgs]


def all_messages_alone(cfgs: list[Config], world: int) -> list[tuple[Calls, State, float]]:
    dist.destroy_process_group()
    loopback.join(world, loopback.Copies())
    return all_messages(cfgs)


@pytest.mark.parametrize("world", LAYOUTS)
def test_it_sends_what_the_first_of_all_ranks_sends(world: int) -> None:
    cfgs = [with_own_tokens(load([*DEFAULTS, *SMALL, *layout])) for layout in LAYOUTS[world]]
    among_all = run_ranks(all_messages, world, (cfgs,), timeout_s=150)[0]
    (alone,) = run_ranks(all_messages_alone, 1, (cfgs, world), timeout_s=150)
    for layout, expected, found in zip(LAYOUTS[world], among_all, alone, strict=True):
        assert sum(expected[0].values()) > 1, layout
        assert found[:2] == expected[:2], layout
        # What a stage of a pipeline gets is noise, and larger than gradients are.
        limit = next((LARGER[word] for word in layout if word in LARGER and world == 2), 2)
        largest = math.inf if "parallel.pp=2" in layout else limit * expected[2]
        assert expected[2] / limit < found[2] < largest, (layout, found[2], expected[2])


def test_the_command_says_times_and_messages(tmp_path: Path) -> None:
    words = [*SMALL, "zero=z3", "precision=bf16", f"run.dir={tmp_path}", "train.steps=5", "logging.every=5"]
    done = run_command(["python", "-m", "engine.study", "rank", "--world", "2", *words], tmp_path, 150)
    assert done.exit_code == 0, done
    lines = done.stdout.splitlines()
    assert lines[0].endswith("llama_tiny, 1.25M parameters on 2 ranks = pp 1 x dp 2 x tp 1, CPU")
    assert lines[-3].startswith("one rank of 2: ")
    assert " ms a step, median of 2 (" in lines[-3]
    assert " tok/s of each rank" in lines[-3]
    assert "all-gather 29, " in lines[-2]
    assert "Losses mean nothing" in lines[-1]
    summary = json.loads((tmp_path / "rank" / "summary.json").read_text())
    tokens = 2 * 2 * 2 * 32
    rate = float(lines[-3].split("; ")[1].split(" tok/s")[0].replace(",", ""))
    assert rate == pytest.approx(tokens / 2 / summary["median_step_s"], abs=1)
    assert summary["messages"]["all-gather"]["count"] == 29
    assert (summary["link_gb_s"], summary["steps_with_infinite_gradients"]) == (None, 0)
    # Half of each micro-batch's gradients, two bytes each.
    assert summary["messages"]["reduce-scatter"]["bytes"] == pytest.approx(2 * 1.25e6, rel=0.02)
    assert not (tmp_path / "rank" / "model").exists()
