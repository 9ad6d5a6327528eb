"""Passes that are recorded as CUDA graphs: the bits of passes that are launched kernel by kernel."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from engine.config import rules
from engine.config.load import load
from engine.data import open_data
from engine.dist.context import ParallelContext
from engine.dist.spawn import run_ranks
from engine.topology.grid import Grid
from engine.train.loop import global_batch
from engine.train.loop import load as read_ahead
from engine.train.session import build_engine
from tests.helpers.command import run_command

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

STEPS = 8
MODEL = ["model=gpt_tiny", "data=random", "data.seq_len=128", "train.micro_batch=4", "precision=bf16", "zero=z1"]
MODEL += ["model.dropout=0.1", "kernels.compile=on", "zero.overlap_comm=false", "checkpoint.every=0", "run.name=graphs"]
FIXED = ["kernels.deterministic=true"]
Found = tuple[list[tuple[float, float]], dict[str, Tensor], int]


def train(words: list[str]) -> Found:
    """Losses with norms, masters in the end, and replayed passes. Batches wait in page-locked memory, as in a run.

    The host goes ahead of the device, and looks at the losses when all is done.
    """
    cfg = load([*MODEL, *words])
    rules.require(cfg, dist.get_world_size())
    ctx = ParallelContext.create(
        Grid.from_config(cfg.parallel, dist.get_world_size()), torch.device("cuda", torch.cuda.current_device())
    )
    engine = build_engine(cfg, ctx)
    size, results = global_batch(cfg, ctx), []
    split = open_data(cfg.data, cfg.model).train
    with read_ahead(split, range(0, STEPS * size, size), cfg, ctx) as batches:
        for step, batch in enumerate(batches):
            if step in (1, 5):
                engine.eval_step(batch)
            results.append(engine.train_step(batch, 1e-3))
    masters = {logical.name: value.cpu() for logical, value in engine.parameters()}
    curve = [(float(result.loss), float(result.grad_norm)) for result in results]
    graphed = getattr(engine, "graphed", None)
    return curve, masters, 0 if graphed is None else graphed.replays


def both_ways(words: list[str], world: int = 1) -> list[Found]:
    """Of the first rank, without graphs and with them."""
    return [
        run_ranks(train, world, ([*words, f"kernels.cuda_graphs={switch}"],), backend="nccl", timeout_s=300)[0]
        for switch in ("off", "on")
    ]


def require_same(words: list[str], world: int = 1) -> None:
    (curve, masters, none), (other, theirs, replays) = both_ways([*FIXED, *words], world)
    accum = next((int(word[-1]) for word in words if word.startswith("train.accum_steps=")), 1)
    assert none == 0
    assert replays == STEPS * accum - 2 * min(accum, 2), "all but two passes of each kind"
    assert other == curve
    assert masters.keys() == theirs.keys()
    assert [name for name, value in masters.items() if not torch.equal(value, theirs[name])] == []


CASES: dict[str, list[str]] = {
    "gpt": [],
    "gpt in two passes": ["train.accum_steps=2"],
    "gpt, recomputed": ["train.accum_steps=3", "train.recompute=full"],
    "gpt, not compiled": ["train.accum_steps=2", "kernels.compile=off"],
    "llama": ["model=llama_tiny", "train.accum_steps=2"],
    "bert": ["model=bert_tiny", "model.attention_dropout=0", "train.accum_steps=2"],
    "bf16 states": ["precision.states=bf16", "train.accum_steps=2"],
}


@pytest.mark.parametrize("case", CASES)
def test_the_bits_are_those_without_graphs(case: str) -> None:
    require_same(CASES[case])


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9),
    reason="needs a GPU with fp8 tensor cores",
)
def test_fp8_is_recorded_too() -> None:
    require_same(["precision=fp8", "train.accum_steps=2"])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_replicas_reduce_after_their_passes() -> None:
    require_same(["parallel.dp=2", "train.accum_steps=2"], 2)


def test_the_kernels_of_auto_can_be_recorded() -> None:
    # The quickest attention adds up in no fixed order, whose rounding eight steps of bf16 make visible.
    (curve, _, _), (other, _, replays) = both_ways(["train.accum_steps=2"])
    assert replays == 2 * STEPS - 4
    assert [loss for loss, _ in other] == pytest.approx([loss for loss, _ in curve], abs=0.02)


def waits(words: list[str]) -> None:
    """Steps after the first two, which compile, under a watch that raises where the host waits for the device."""
    cfg = load([*MODEL, *words])
    ctx = ParallelContext.create(Grid.from_config(cfg.parallel, 1), torch.device("cuda", torch.cuda.current_device()))
    engine = build_engine(cfg, ctx)
    size, split = global_batch(cfg, ctx), open_data(cfg.data, cfg.model).train
    with read_ahead(split, range(0, STEPS * size, size), cfg, ctx) as batches:
        for step, batch in enumerate(batches):
            # Events are waited for without a word: that of the last step's norm.
            torch.cuda.set_sync_debug_mode("error" if step > 3 else "default")
            engine.train_step(batch, 1e-3)
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("switch", ["off", "on"])
def test_the_host_does_not_wait_for_a_step(switch: str) -> None:
    words = ["train.accum_steps=2", "kernels.optimizer=triton", f"kernels.cuda_graphs={switch}"]
    run_ranks(waits, 1, (words,), backend="nccl", timeout_s=300)


def test_a_run_says_so_and_validates_between(tmp_path: Path) -> None:
    words = [word for word in MODEL if not word.startswith("run.")]
    words += ["train.steps=12", "train.eval_every=4", "train.eval_batches=2", "parallel.dp=1", "train.accum_steps=2"]
    done = run_command([sys.executable, "-m", "engine.train", *words, "kernels.cuda_graphs=auto"], tmp_path, 400)
    assert done.exit_code == 0, str(done)
    assert "cuda graphs: passes are recorded after 2 of each kind" in done.stdout
