"""Steps in host memory give the steps of the GPU's optimizer, and an fp16 overflow anywhere is skipped everywhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from engine.checkpoint.gather import gather_to_main
from engine.config.load import load
from engine.config.schema import Config
from engine.data import open_data
from engine.dist.context import ParallelContext
from engine.model.batch import Batch
from engine.protocols import Engine
from engine.topology.grid import Grid
from engine.train.session import build_engine
from tests.helpers.ranks import run_ranks

pytestmark = pytest.mark.ranks

HOST = "zero.offload_optimizer=cpu"


@dataclass(slots=True)
class Curve:
    """What a run did. Gradients are those of the first step, on rank 0."""

    losses: list[float]
    norms: list[float]
    gradients: dict[str, Tensor]


def config(*words: str) -> Config:
    return load(
        ["model=gpt_tiny", "model.num_layers=2", "data=random", "data.seq_len=16", "train.micro_batch=2"]
        + ["train.accum_steps=2", "train.device=cpu", "train.steps=20", "checkpoint.save_final=false", *words]
    )


def start(cfg: Config, world: int) -> tuple[Engine, Callable[[int], Iterator[Batch]]]:
    """This rank's engine, and the micro-batches of a step for it."""
    ctx = ParallelContext.create(Grid.from_config(cfg.parallel, world), torch.device("cpu"))
    split, train = open_data(cfg.data, cfg.model).train, cfg.train

    def batches(step: int) -> Iterator[Batch]:
        yield from split.micro_batches(
            step * train.micro_batch * train.accum_steps * ctx.dp.size,
            dp_rank=ctx.dp.rank,
            dp=ctx.dp.size,
            micro_batch=train.micro_batch,
            accum_steps=train.accum_steps,
        )

    return build_engine(cfg, ctx), batches


def curves(cases: list[tuple[str, ...]], steps: int, world: int) -> list[Curve]:
    """Each case trained at a rate that changes from step to step."""
    found = []
    for words in cases:
        engine, batches = start(config(*words), world)
        curve = Curve([], [], {})

        def read(engine: Engine = engine, curve: Curve = curve) -> None:
            curve.gradients.update(gather_to_main(engine.gradients(), engine.ctx))
            engine.on_gradients = None

        engine.on_gradients = read
        for step in range(steps):
            result = engine.train_step(batches(step), 1e-3 * (1 + step % 3))
            curve.losses.append(float(result.loss))
            curve.norms.append(float(result.grad_norm))
        found.append(curve)
    return found


def require_equal(got: Curve, want: Curve, what: object) -> None:
    """Equal up to the order of additions in fp32."""
    assert got.losses == pytest.approx(want.losses, rel=1e-5), what
    assert got.norms == pytest.approx(want.norms, rel=1e-5), what
    assert got.gradients.keys() == want.gradients.keys()
    # Some gradients, such as a key bias, are zero in theory: those are measured by the global norm.
    floor = 1e-3 * want.norms[0]
    for name, gradient in want.gradients.items():
        error = float((got.gradients[name] - gradient).norm()) / max(float(gradient.norm()), floor)
        assert error <= 1e-5, (what, name)


def test_host_steps_are_the_same_steps_at_every_zero_stage() -> None:
    dp2 = "parallel.dp=2"
    cases = [(dp2, f"zero=z{stage}", *where) for stage in (1, 2, 3) for where in ((), (HOST,))]
    cases.append((dp2, "zero=z3", HOST, "zero.offload_params=cpu"))
    found = run_ranks(curves, 2, (cases, 20, 2), timeout_s=240)[0]
    for words, curve in zip(cases, found, strict=True):
        require_equal(curve, found[0], words)
    assert found[0].losses[-1] < found[0].losses[0]


def test_host_steps_of_a_pipeline_with_a_tied_weight() -> None:
    pp2 = ("parallel.pp=2", "parallel.dp=1", "zero=z1")
    plain, host = run_ranks(curves, 2, ([pp2, (*pp2, HOST)], 20, 2), timeout_s=180)[0]
    require_equal(host, plain, "pp=2, fp32")
    bf16 = run_ranks(curves, 2, ([(*pp2, HOST, "precision=bf16")], 3, 2), timeout_s=120)[0][0]
    # bf16 keeps 8 bits; the gradient of a tied weight that is not summed over the stages is off by 80 %.
    tied = plain.gradients["embed.tokens.weight"]
    assert float((bf16.gradients["embed.tokens.weight"] - tied).norm()) < 0.05 * float(tied.norm())
    assert bf16.norms[:3] == pytest.approx(plain.norms[:3], rel=0.05)


def test_host_zero2_of_a_pipeline_forgets_the_step_before() -> None:
    words = ("parallel.pp=2", "parallel.dp=2", "zero=z2", "model.num_layers=4", "parallel.schedule=dualpipev")
    words = (*words, "train.accum_steps=4")
    plain, host = run_ranks(curves, 4, ([words, (*words, HOST)], 4, 4), timeout_s=180)[0]
    require_equal(host, plain, words)


def test_other_optimizers_step_on_the_host() -> None:
    cases = [("parallel.dp=1", f"optim={name}", *where) for name in ("sgd", "lion") for where in ((), (HOST,))]
    found = run_ranks(curves, 1, (cases, 4, 1), timeout_s=120)[0]
    require_equal(found[1], found[0], "sgd")
    require_equal(found[3], found[2], "lion")


def overflowed(cases: list[tuple[str, ...]], world: int) -> list[tuple[float, bool, float, bool]]:
    """Two steps, the first with an infinite gradient on the last rank: norm and whether weights stayed, of each."""
    found = []
    for words in cases:
        engine, batches = start(config("precision=fp16", *words), world)
        parameter = next(engine._ds.module.parameters())  # type: ignore[attr-defined]
        poison = parameter.register_hook(lambda gradient: gradient * math.inf) if engine.ctx.rank == world - 1 else None
        facts: list[float | bool] = []
        before = {logical.name: value.clone() for logical, value in engine.parameters()}
        for step in range(2):
            norm = float(engine.train_step(batches(step), 1e-3).grad_norm)
            after = {logical.name: value.clone() for logical, value in engine.parameters()}
            facts += [norm, all(torch.equal(before[name], after[name]) for name in before)]
            before = after
            if poison is not None:
                poison.remove()
        found.append(tuple(facts))
    return found  # type: ignore[return-value]


def test_an_overflow_on_one_rank_skips_the_step_on_all() -> None:
    tp2 = ("parallel.dp=1", "parallel.tp=2")
    cases = [(*tp2, "zero=z1"), (*tp2, "zero=z2"), (*tp2, "zero=z3"), (*tp2, "zero=z1", HOST)]
    cases += [("parallel.pp=2", "parallel.dp=1", stage, HOST) for stage in ("zero=z1", "zero=z2")]
    exact = run_ranks(curves, 1, ([("parallel.dp=1",)], 2, 1), timeout_s=60)[0][0]
    for rank in run_ranks(overflowed, 2, (cases, 2), timeout_s=180):
        for words, (norm, stayed, next_norm, next_stayed) in zip(cases, rank, strict=True):
            assert math.isinf(norm), words
            assert stayed, words
            # The step after it: gradients of other data, so the norm only tells that the loss scale is out of it.
            assert 0.2 * exact.norms[1] < next_norm < 5 * exact.norms[1], words
            assert not next_stayed, words


def test_fp16_gradients_are_unscaled() -> None:
    cases = [("parallel.dp=1", "zero=z1")]
    cases += [("parallel.dp=1", f"zero=z{stage}", "precision=fp16") for stage in (1, 2, 3)]
    cases.append((*cases[1], "precision.loss_scale=128"))
    exact, *found = run_ranks(curves, 1, (cases, 2, 1), timeout_s=120)[0]
    for words, curve in zip(cases[1:], found, strict=True):
        # fp16 keeps 11 bits.
        assert curve.norms == pytest.approx(exact.norms, rel=1e-2), words
        for name in ("embed.tokens.weight", "block.1.mlp.up.weight"):
            error = float((curve.gradients[name] - exact.gradients[name]).norm())
            assert error < 1e-2 * float(exact.gradients[name].norm()), (words, name)
