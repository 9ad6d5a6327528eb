"""Counts that do not come out even: layers over stages, samples over validation batches, tokens over rows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.checkpoint.gather import gather_to_main
from engine.config import Balance, Config
from engine.config.derived import sequence_multiple
from engine.config.load import load
from engine.data import Split, open_data, prepare
from engine.dist.context import ParallelContext
from engine.model.batch import IGNORE, Batch
from engine.model.build import build_layers
from engine.model.layers import random_weights
from engine.plan.stages import stage_bounds
from engine.protocols import Engine
from engine.runtime.reference import ReferenceEngine
from engine.topology.grid import Grid
from engine.train.session import build_engine
from engine_kernels.ops import Kernels, sdpa_attention
from tests.helpers.ranks import run_ranks

pytestmark = pytest.mark.ranks

GLOBAL_BATCH = 8
LENGTH_MULTIPLE = 2
CASES = {
    "five blocks over two stages": ("model.num_layers=5", "parallel=pp2", "train.accum_steps=4"),
    "five blocks over four parts": (
        *("model.num_layers=5", "parallel.pp=2", "parallel.schedule=interleaved", "parallel.virtual_stages=2"),
        "train.accum_steps=2",
    ),
    "stages of equal work": ("model.num_layers=5", "parallel=pp2", "parallel.balance=flops", "train.accum_steps=4"),
    "bert's heads on a light stage": (
        *("model=bert_tiny", "model.num_layers=3", "parallel=pp2", "parallel.balance=flops", "train.accum_steps=2"),
    ),
    "rows cut over context": ("model=bert_tiny", "model.num_layers=2", "parallel.context=2", "train.accum_steps=2"),
}
Result = tuple[dict[str, Tensor], float, list[float], list[int]]
"""Gradients, loss, validation losses, stage bounds."""


def config(folder: Path, *words: str) -> Config:
    cfg = load(
        ["model=gpt_tiny", f"data.source={folder / 'texts'}", f"data.cache_dir={folder / 'cache'}"]
        + ["data.variable_length=true", "data.seq_len=24", "data.vocab_size=300", "data.valid_fraction=0.4"]
        + ["model.vocab_size=300", "optim=sgd", "optim.lr=0.5", "train.steps=5", "train.device=cpu", "zero=z1"]
        + ["parallel.balance=parameters", *words]
    )
    cfg.train.micro_batch = GLOBAL_BATCH // cfg.train.accum_steps
    return cfg


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of short documents, each of another length, prepared."""
    root = tmp_path_factory.mktemp("uneven")
    (root / "texts").mkdir()
    for i in range(70):
        words = " ".join(f"word{(i * j) % 37}" for j in range(2 + i % 9))
        (root / "texts" / f"{i}.txt").write_text(f"text {i}: {words}\n")
    prepare(config(root).data, lambda line: None)
    return root


def batches(split: Split, index: int, cfg: Config, ctx: ParallelContext, multiple: int) -> Iterator[Batch]:
    return split.micro_batches(
        index * cfg.train.micro_batch * cfg.train.accum_steps * ctx.dp.size,
        dp_rank=ctx.dp.rank,
        dp=ctx.dp.size,
        micro_batch=cfg.train.micro_batch,
        accum_steps=cfg.train.accum_steps,
        multiple=multiple,
    )


def measured(engine: Engine, cfg: Config, multiple: int, bounds: list[int]) -> Result:
    """A validation of every sample, then one step."""
    data, ctx = open_data(cfg.data, cfg.model), engine.ctx
    assert data.valid is not None
    count = data.valid.num_batches(GLOBAL_BATCH)
    valid = [float(engine.eval_step(batches(data.valid, i, cfg, ctx, multiple))) for i in range(count)]
    gradients: dict[str, Tensor] = {}
    engine.on_gradients = lambda: gradients.update(gather_to_main(engine.gradients(), ctx))
    result = engine.train_step(batches(data.train, 0, cfg, ctx, multiple), 0.5)
    return gradients, float(result.loss), valid, bounds


def on_ranks(cases: list[tuple[str, ...]], folder: Path) -> list[Result]:
    found = []
    for words in cases:
        cfg = config(folder, *words)
        ctx = ParallelContext.create(Grid.from_config(cfg.parallel, 2), torch.device("cpu"))
        bounds = stage_bounds(cfg)
        found.append(measured(build_engine(cfg, ctx), cfg, sequence_multiple(cfg.parallel), bounds))
    return found


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, Result]:
    results = run_ranks(on_ranks, 2, (list(CASES.values()), folder), timeout_s=150)[0]
    return dict(zip(CASES, results, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_it_computes_what_one_process_does(case: str, found: dict[str, Result], folder: Path) -> None:
    cfg, ctx = config(folder, *CASES[case]), ParallelContext.single()
    layers = build_layers(cfg, ctx, Kernels(attention=sdpa_attention))
    engine = ReferenceEngine(layers, random_weights(cfg.train.seed), cfg, ctx)
    expected, loss, valid, _ = measured(engine, cfg, LENGTH_MULTIPLE, [])
    gradients, found_loss, found_valid, _ = found[case]
    assert found_loss == pytest.approx(loss, rel=1e-6)
    assert found_valid == pytest.approx(valid, rel=1e-6)
    assert gradients.keys() == expected.keys()
    total = float(torch.stack([g.double().norm() for g in expected.values()]).norm())
    for name, grad in expected.items():
        scale = max(float(grad.double().norm()), 1e-3 * total)
        assert float((gradients[name].double() - grad.double()).norm()) <= 1e-5 * scale, name


def test_the_cases_are_uneven(found: dict[str, Result], folder: Path) -> None:
    cfg = config(folder)
    valid = open_data(cfg.data, cfg.model).valid
    assert valid is not None
    assert valid.num_samples % GLOBAL_BATCH, "the last validation batch is smaller"
    assert valid.num_batches(GLOBAL_BATCH) > 1
    last = list(batches(valid, valid.num_batches(GLOBAL_BATCH) - 1, cfg, ParallelContext.single(), 1))
    rows = torch.cat([(batch.labels_BS != IGNORE).any(dim=1) for batch in last])
    assert int(rows.sum()) == valid.num_samples % GLOBAL_BATCH
    sizes = {case: [b - a for a, b in zip(bounds, bounds[1:], strict=False)] for case, (*_, bounds) in found.items()}
    assert len(sizes["five blocks over four parts"]) == 4
    assert all(len(set(sizes[case])) > 1 for case in sizes if "over" in case and "context" not in case)
    even, flops = sizes["five blocks over two stages"], sizes["stages of equal work"]
    assert even != flops, "the head costs work that its tied weight does not"
    assert cfg.parallel.balance is Balance.parameters
