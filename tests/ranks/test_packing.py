"""Attention inside documents: every layout computes what one process does, and what the documents alone give."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import pytest
import torch
from torch import Tensor

from engine.checkpoint.gather import gather_to_main
from engine.config import Config
from engine.config.load import load
from engine.dist.context import ParallelContext
from engine.model.batch import Batch
from engine.model.build import build_layers
from engine.model.layers import random_weights
from engine.protocols import Engine
from engine.runtime.reference import ReferenceEngine
from engine.topology.grid import Grid
from engine.train.kernels import choose_kernels
from engine.train.session import build_engine
from tests.helpers.packed import documents_alone, packed_batch
from tests.helpers.ranks import run_ranks

pytestmark = pytest.mark.ranks

LLAMA = ("model.positions=rotary", "model.norm=rmsnorm", "model.activation=swiglu", "model.num_kv_heads=2")
UNTIED = "model.tied_head=false"
DROPOUT = ("model.dropout=0.1", "model.attention_dropout=0.1", "kernels.attention=reference")
LAYOUTS = {
    "tp2 and sequence": ("parallel=tp2", "parallel.sequence=true"),
    "context 2": ("parallel.context=2",),
    "pp2": ("parallel=pp2",),
    "dp2 and ZeRO-3": ("parallel.dp=2", "zero=z3"),
}
MODELS = {
    "gpt2": (),
    "llama": (*LLAMA, UNTIED),
    "llama with dropout, recomputed": (*LLAMA, *DROPOUT, "train.recompute=selective"),
}
CASES = [(layout, model) for layout in LAYOUTS for model in MODELS if layout != "dp2 and ZeRO-3" or model == "gpt2"]
LENGTHS = [[[5, 1, 10], [16]], [[2, 2, 3, 6], [7, 9]], [[1, 15], [8, 8]], [[4, 12], [3, 3, 10]]]
PADDING = [[0, 0], [3, 0], [0, 0], [0, 0]]
Result = tuple[float, dict[str, Tensor]]


def config(*words: str) -> Config:
    return load(
        ["model=gpt_tiny", "model.num_layers=2", "data=random", "data.seq_len=16", "data.document_mask=true"]
        + ["optim=sgd", "train.device=cpu", "train.steps=5", "zero=z1", *words]
    )


def micro_batches(cfg: Config) -> list[Batch]:
    """The global batch: four micro-batches of two rows."""
    return [
        packed_batch(cfg.model, lengths, first=2 * index, padding=fill)
        for index, (lengths, fill) in enumerate(zip(LENGTHS, PADDING, strict=True))
    ]


def measured(engine: Engine, batches: Iterator[Batch]) -> Result:
    gradients: dict[str, Tensor] = {}
    engine.on_gradients = lambda: gradients.update(gather_to_main(engine.gradients(), engine.ctx))
    return float(engine.train_step(batches, 0.0).loss), gradients


def on_ranks() -> list[Result]:
    found = []
    for layout, model in CASES:
        cfg = config(*LAYOUTS[layout], *MODELS[model])
        ctx = ParallelContext.create(Grid.from_config(cfg.parallel, 2), torch.device("cpu"))
        cfg.train.micro_batch, cfg.train.accum_steps = 2, 4 // ctx.dp.size
        mine = micro_batches(cfg)[ctx.dp.rank :: ctx.dp.size]
        found.append(measured(build_engine(cfg, ctx), iter(mine)))
    return found


@pytest.fixture(scope="module")
def found() -> dict[tuple[str, str], Result]:
    return dict(zip(CASES, run_ranks(on_ranks, 2, (), timeout_s=240)[0], strict=True))


@cache
def oracle(model: str, alone: bool) -> Result:
    """One process over the packed micro-batches, or over their documents one at a time."""
    cfg, ctx = config(*MODELS[model]), ParallelContext.single()
    batches = micro_batches(cfg)
    if alone:
        batches = [one for batch in batches for one in documents_alone(batch)]
    layers = build_layers(cfg, ctx, choose_kernels(cfg, ctx.device).kernels)
    return measured(ReferenceEngine(layers, random_weights(cfg.train.seed), cfg, ctx), iter(batches))


def assert_equal(found: Result, expected: Result) -> None:
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    assert found[1].keys() == expected[1].keys()
    total = float(torch.stack([g.double().norm() for g in expected[1].values()]).norm())
    for name, grad in expected[1].items():
        scale = max(float(grad.double().norm()), 1e-3 * total)
        assert float((found[1][name].double() - grad.double()).norm()) <= 1e-5 * scale, name


@pytest.mark.parametrize(("layout", "model"), CASES)
def test_a_layout_computes_what_one_process_does(layout: str, model: str, found: dict[tuple[str, str], Result]) -> None:
    assert_equal(found[layout, model], oracle(model, alone=False))


@pytest.mark.parametrize(("layout", "model"), [case for case in CASES if "dropout" not in case[1]])
def test_a_layout_computes_what_the_documents_alone_give(
    layout: str, model: str, found: dict[tuple[str, str], Result]
) -> None:
    assert_equal(found[layout, model], oracle(model, alone=True))
