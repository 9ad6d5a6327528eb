"""What the parity study does not show: bf16, gradients that are not finite, weights across layouts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.checkpoint.gather import gather_to_main
from engine.checkpoint.initial import initial_weights
from engine.checkpoint.reader import Reader
from engine.checkpoint.save import Saver
from engine.config.derived import sequence_multiple
from engine.config.load import load
from engine.config.schema import Config
from engine.data import Split, open_data
from engine.dist.context import ParallelContext
from engine.errors import CheckpointError
from engine.model.batch import Batch
from engine.model.feed import Feed
from engine.model.layers import logical_tensors, random_weights
from engine.model.loss import NextTokenLoss
from engine.protocols import Engine
from engine.topology.grid import Grid
from engine.train.session import build_engine
from tests.helpers.checkpoints import facts_of
from tests.helpers.models import layers_of
from tests.helpers.ranks import run_ranks

pytestmark = pytest.mark.ranks


def config(*words: str) -> Config:
    return load(
        ["model=gpt_tiny", "model.num_layers=2", "data=random", "data.seq_len=16", "train.micro_batch=4", "optim=sgd"]
        + ["train.device=cpu", "train.steps=5", "optim.lr=0.5", "checkpoint.save_final=false", *words]
    )


def start(cfg: Config, world: int) -> tuple[Engine, Callable[[int], Iterator[Batch]]]:
    """This rank's engine, and the micro-batches of a step for it."""
    ctx = ParallelContext.create(Grid.from_config(cfg.parallel, world), torch.device("cpu"))
    split = open_data(cfg.data, cfg.model).train
    return build_engine(cfg, ctx), lambda step: batches_of(split, step, cfg, ctx)


def batches_of(split: Split, index: int, cfg: Config, ctx: ParallelContext) -> Iterator[Batch]:
    """This replica's micro-batches of a global batch."""
    return split.micro_batches(
        index * cfg.train.micro_batch * cfg.train.accum_steps * ctx.dp.size,
        dp_rank=ctx.dp.rank,
        dp=ctx.dp.size,
        micro_batch=cfg.train.micro_batch,
        accum_steps=cfg.train.accum_steps,
        multiple=sequence_multiple(cfg.parallel),
    )


def curves(cases: list[tuple[str, ...]], world: int) -> list[list[tuple[float, float]]]:
    """Losses and norms of three steps of each case."""
    found = []
    for words in cases:
        engine, batches = start(config(*words), world)
        results = [engine.train_step(batches(step), 0.5) for step in range(3)]
        found.append([(float(r.loss), float(r.grad_norm)) for r in results])
    return found


def test_bf16_layouts_follow_one_rank_in_fp32() -> None:
    bf16 = ("precision=bf16", "train.accum_steps=4")
    one_rank = run_ranks(curves, 1, ([("train.accum_steps=4",), (*bf16, "zero=z1")], 1))[0]
    cases = [
        (*bf16, "parallel=tp2", "zero=z1"),
        (*bf16, "parallel=tp2", "zero=z2"),
        (*bf16, "parallel=tp2", "zero=z3"),
        (*bf16, "parallel=tp2", "zero=z1", "precision.grad_accum=bf16"),
        (*bf16, "parallel=pp2", "zero=z1"),
        (*bf16, "parallel=pp2", "zero=z1", "model.tied_head=false"),
    ]
    found = run_ranks(curves, 2, (cases, 2))[0]
    exact, reference = one_rank
    assert reference != exact, "bf16 was asked for"
    for words, curve in zip(cases[:-1], found, strict=False):
        for (loss, norm), (true_loss, true_norm) in zip(curve, exact, strict=True):
            assert loss == pytest.approx(true_loss, rel=5e-4), words
            assert norm == pytest.approx(true_norm, rel=1e-2), words
    assert found[-1][0][0] != pytest.approx(exact[0][0], rel=1e-5), "another model has another loss"


def poisoned(words: tuple[str, ...], world: int) -> tuple[float, bool]:
    """The norm of a step whose loss is infinite, and whether the weights stayed."""
    forward = NextTokenLoss.forward

    def infinite(self: NextTokenLoss, logits_BSV: Tensor, feed: Feed) -> Tensor:
        return forward(self, logits_BSV, feed) * float("inf")

    NextTokenLoss.forward = infinite  # type: ignore[method-assign]
    engine, batches = start(config(*words), world)
    before = gather_to_main(engine.parameters(), engine.ctx)
    norm = float(engine.train_step(batches(0), 0.5).grad_norm)
    after = gather_to_main(engine.parameters(), engine.ctx)
    return norm, all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("layout", ["single", "pp2"])
@pytest.mark.parametrize("zero", ["z0", "z1"])
def test_a_step_that_is_not_finite_changes_nothing(layout: str, zero: str) -> None:
    world = 2 if layout == "pp2" else 1
    norm, stayed = run_ranks(poisoned, world, ((f"parallel={layout}", f"zero={zero}", "train.accum_steps=2"), world))[0]
    assert not torch.tensor(norm).isfinite()
    assert stayed


def saved(words: tuple[str, ...], world: int, folder: str) -> str:
    """Write the weights; what was refused."""
    engine, _ = start(config(*words), world)
    saver = Saver(engine, asynchronous=False, weights_only=True)
    try:
        saver.save(Path(folder), facts_of())
        saver.close()
    except CheckpointError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    "layout",
    [
        # Stages of equal work have no block on the last one: its second rank would have nothing to write.
        ("parallel.pp=2", "parallel.tp=2", "zero=z1", "parallel.balance=parameters"),
        ("parallel.dp=2", "parallel.context=2", "zero=z3"),
        ("parallel.dp=2", "parallel.tp=2", "zero=z0"),
    ],
)
def test_weights_are_the_logical_tensors_whatever_the_layout(layout: tuple[str, ...], tmp_path: Path) -> None:
    assert run_ranks(saved, 4, (layout, 4, str(tmp_path / "weights")), timeout_s=120) == [""] * 4
    assert [path.name for path in tmp_path.iterdir()] == ["weights"]
    cfg = config()
    wanted = logical_tensors(layers_of(cfg.model))
    manifest = Reader(tmp_path / "weights").manifest
    assert len(manifest.files) == 4, "every rank writes a part"
    elements = sum(prod(logical.shape) for logical in wanted.values())
    assert manifest.size - sum(file.header for file in manifest.files) == 4 * elements, "nothing is written twice"
    draw = random_weights(cfg.train.seed)
    read = initial_weights(str(tmp_path / "weights"), cfg.model, wanted, verify=True)
    for logical in wanted.values():
        assert torch.equal(read(logical), draw(logical)), logical.name


def test_weights_that_cannot_be_written_are_refused_on_every_rank(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for said in run_ranks(saved, 2, (("parallel=pp2",), 2, str(tmp_path / "file" / "weights"))):
        assert "[OCT636] run.dir=" in said
        assert "it could not be written (rank 0: " in said
        assert "Free space, or point run.dir to a disk with more, that all hosts share" in said
