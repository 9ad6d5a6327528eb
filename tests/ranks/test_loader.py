"""Stages that read no text compute what they compute when all read, and no prefetching changes a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import pytest
import torch

from engine.config.load import load
from engine.config.schema import Config
from engine.data import open_data
from engine.dist.context import ParallelContext
from engine.model.batch import IGNORE, Batch
from engine.topology.grid import Grid
from engine.train import loop
from engine.train.session import build_engine
from tests.helpers.ranks import run_ranks

pytestmark = pytest.mark.ranks

STEPS = 2
CASES = {
    "bert": ("model=bert_tiny", "parallel.pp=4", "parallel.balance=parameters", "data.variable_length=true"),
    "dualpipev": ("model=llama_tiny", "parallel.pp=2", "parallel.schedule=dualpipev"),
}
SILENT = {"bert": {2}, "dualpipev": {2, 3}}
"""Ranks that read no text: `bert` adds segments on its second stage; of dualpipev the second stage in two replicas."""

Curve = list[tuple[float, float]]


def config(words: Sequence[str]) -> Config:
    return load(
        ["data=random", "data.seq_len=16", "train.micro_batch=3", "train.accum_steps=4", "optim=sgd", "optim.lr=0.5"]
        + ["train.device=cpu", "train.steps=2", "checkpoint.save_final=false", *words]
    )


def blank(batch: Batch) -> bool:
    return not batch.tokens_BS.any() and bool((batch.labels_BS == IGNORE).all())


def curves(cases: dict[str, tuple[str, ...]], world: int) -> dict[str, tuple[Curve, Curve, bool]]:
    """Losses and norms when each stage reads what it needs and when all read, and whether this rank reads nothing."""
    found = {}
    for name, words in cases.items():
        cfg = config(words)
        ctx = ParallelContext.create(Grid.from_config(cfg.parallel, world), torch.device("cpu"))
        split, size = open_data(cfg.data, cfg.model).train, loop.global_batch(cfg, ctx)
        firsts = range(0, size * STEPS, size)

        def run(read: Callable[[Config, int], bool], cfg: Config = cfg, ctx: ParallelContext = ctx) -> Curve:
            loop.reads_text = read
            engine = build_engine(cfg, ctx)

            def step(batches: Iterable[Batch]) -> tuple[float, float]:
                result = engine.train_step(batches, 0.5)
                return float(result.loss), float(result.grad_norm)

            with loop.load(split, firsts, cfg, ctx) as loader:  # noqa: B023  (called in this turn of the loop)
                return [step(batches) for batches in loader]

        needed = loop.reads_text
        mine = run(needed)
        with loop.load(split, firsts, cfg, ctx) as loader:
            silent = all(blank(batch) for batches in loader for batch in batches)
        cfg.data.prefetch = 0
        found[name] = mine, run(lambda cfg, stage: True), silent
        loop.reads_text = needed
    return found


def test_stages_without_text_give_the_same_losses_and_gradients() -> None:
    found = run_ranks(curves, 4, (CASES, 4), timeout_s=240)
    for name, silent in SILENT.items():
        assert {rank for rank, result in enumerate(found) if result[name][2]} == silent, name
        for result in found:
            needed, everything, _ = result[name]
            assert needed == everything == found[0][name][0], name
