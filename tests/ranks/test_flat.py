"""The flat optimizer of ZeRO-1 in bf16: one pass over the state, with the factor and the weights' copy inside."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from engine import runtime
from engine.config.load import load
from engine.config.schema import Config
from engine.data import open_data
from engine.dist.context import ParallelContext
from engine.model.batch import Batch
from engine.model.build import build_layers
from engine.model.feed import Feed
from engine.model.layers import random_weights
from engine.model.loss import NextTokenLoss
from engine.plan.stages import stage_bounds
from engine.runtime.flat import FlatOptimizer
from engine.topology.grid import Grid
from engine.train.kernels import choose_kernels
from engine_kernels.reference.adamw import adamw_step
from tests.helpers.ranks import run_ranks

pytestmark = pytest.mark.ranks

WORDS = ["model=gpt_tiny", "model.num_layers=2", "data=random", "data.seq_len=16", "train.micro_batch=4", "zero=z1"]
WORDS += ["precision=bf16", "train.device=cpu", "train.steps=4", "optim.clip_norm=0.5", "optim.warmup_steps=0"]
CPU = torch.device("cpu")


class Run:
    """An engine whose AdamW is the reference kernel, or torch's."""

    def __init__(self, cfg: Config, world: int, *, one_pass: bool, device: torch.device = CPU) -> None:
        ctx = ParallelContext.create(Grid.from_config(cfg.parallel, world), device)
        layers = build_layers(cfg, ctx, choose_kernels(cfg, ctx.device).kernels)
        update = adamw_step if one_pass else None
        self.engine: Any = runtime.build(layers, stage_bounds(cfg), random_weights(7), cfg, ctx, update)
        self._cfg, self._ctx, self._split = cfg, ctx, open_data(cfg.data, cfg.model).train

    def step(self, number: int, lr: float = 1e-2) -> tuple[float, float]:
        """Loss and gradient norm."""
        result = self.engine.train_step(self._batches(number), lr)
        return float(result.loss), float(result.grad_norm)

    def validate(self) -> float:
        """Loss of what the tenth step would train on."""
        return float(self.engine.eval_step(self._batches(9)))

    def _batches(self, number: int) -> Iterator[Batch]:
        train = self._cfg.train
        return self._split.micro_batches(
            number * train.micro_batch * train.accum_steps * self._ctx.dp.size,
            dp_rank=self._ctx.dp.rank,
            dp=self._ctx.dp.size,
            micro_batch=train.micro_batch,
            accum_steps=train.accum_steps,
        )

    def weights(self) -> dict[str, Tensor]:
        """Masters by logical name."""
        return {logical.name: value.clone() for logical, value in self.engine.parameters()}

    def copies(self) -> dict[str, Tensor]:
        """What the model computes with."""
        self.engine._ds.settle()
        return {p.logical.name: p.detach().clone() for p in self.engine._ds.module.parameters()}

    def steps(self) -> float:
        return float(self.engine.state().numbers["optimizer_steps"])


def both_ways(words: list[str], world: int) -> list[Any]:
    """Losses and norms, then masters and copies, with AdamW in one pass and with torch's."""
    found: list[Any] = []
    for one_pass in (True, False):
        run = Run(load([*WORDS, *words]), world, one_pass=one_pass)
        found.append(([run.step(number) for number in range(4)], run.weights(), run.copies()))
    return found


@pytest.mark.parametrize(
    ("world", "words"),
    [(1, []), (2, ["train.accum_steps=2", "zero.bucket_elements=9000"]), (2, ["parallel=tp2"])],
    ids=["one rank, bf16 sums", "dp2", "tp2"],
)
def test_one_pass_gives_what_clipping_and_torchs_adamw_give(world: int, words: list[str]) -> None:
    for (curve, masters, copies), (other, theirs, _) in [tuple(r) for r in run_ranks(both_ways, world, (words, world))]:
        assert curve[0] == other[0]
        for mine, torchs in zip(curve, other, strict=True):
            assert mine == pytest.approx(torchs, rel=2e-3)
        assert all(norm > 0.5 for _, norm in curve), "nothing was clipped"
        for name, master in masters.items():
            assert torch.equal(copies[name], master.bfloat16()), name
            # Steps of 1e-2 on weights that bf16 gradients moved otherwise once in a while.
            assert float((master - theirs[name]).norm()) <= 2e-2 * float(theirs[name].norm()), name


def dropped(world: int, *words: str) -> tuple[float, bool, list[float]]:
    """Norm of a step whose loss is infinite, whether nothing changed, and steps counted: before, after, and one on."""
    run = Run(load([*WORDS, "train.accum_steps=2", *words]), world, one_pass=True)
    run.step(0)
    forward, before, counted = NextTokenLoss.forward, run.weights(), [run.steps()]

    def infinite(self: NextTokenLoss, logits_BSV: Tensor, feed: Feed) -> Tensor:
        return forward(self, logits_BSV, feed) * float("inf")

    NextTokenLoss.forward = infinite  # type: ignore[method-assign, assignment]
    try:
        _, norm = run.step(1)
    finally:
        NextTokenLoss.forward = forward  # type: ignore[method-assign, assignment]
    stayed = all(torch.equal(value, before[name]) for name, value in run.weights().items())
    counted.append(run.steps())
    run.step(2)
    counted.append(run.steps())
    return norm, stayed, counted


def test_a_step_that_is_not_finite_is_dropped_and_not_counted() -> None:
    for norm, stayed, counted in run_ranks(dropped, 2, (2,)):
        assert norm == float("inf")
        assert stayed
        assert counted == [1.0, 1.0, 2.0]


def small_steps(world: int) -> tuple[float, float, bool]:
    """Loss before and after steps that bf16 cannot tell apart, and whether masters are the weights themselves."""
    words = ["precision.states=bf16", "optim.weight_decay=0", "optim.clip_norm=0", "train.steps=40"]
    run = Run(load([*WORDS, *words]), world, one_pass=False)
    losses = [run.step(0, 3e-4)[0] for _ in range(40)]
    copies = run.copies()
    same = all(torch.equal(copies[name], value.bfloat16()) for name, value in run.weights().items())
    slots = {slot.kind: slot.values.dtype for slot in run.engine.state().slots}
    return losses[0], losses[-1], same and set(slots.values()) == {torch.bfloat16}


class Made(TorchDispatchMode):
    """Elements of the longest fp32 tensor that was made."""

    longest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.dtype is torch.float32:
            self.longest = max(self.longest, out.numel())
        return out


def longest_in_fp32(words: list[str]) -> tuple[int, int]:
    """Of the tensors that the flat optimizer makes at the start, and of the parameters of its larger group."""
    made, whole = Made(), FlatOptimizer.__init__

    def watched(self: FlatOptimizer, *args: Any, **options: Any) -> None:
        with made:
            whole(self, *args, **options)

    with mock.patch.object(FlatOptimizer, "__init__", watched):
        run = Run(load([*WORDS, *words]), 1, one_pass=True)
    return made.longest, max(flat.numel() for flat in run.engine._ds.optimizer.bf16_groups_flat)


def test_bf16_states_have_no_fp32_masters_not_even_at_the_start() -> None:
    for words, share in ((["precision.states=bf16"], 0.0), ([], 1.0)):
        ((longest, largest),) = run_ranks(longest_in_fp32, 1, (words,))
        assert longest <= share * largest + 1, "a scalar is fp32 in both"
        assert longest >= share * largest


def test_bf16_states_learn() -> None:
    for first, last, same in run_ranks(small_steps, 2, (2,)):
        assert same
        assert last < first - 0.5, "the same batch again and again"


def unused_rows(world: int) -> bool:
    """Whether a parameter without a gradient keeps its weight under zero decay, though the step before had one."""
    run = Run(load([*WORDS, "optim.weight_decay=0", "optim.beta1=0", "optim.beta2=0"]), world, one_pass=True)
    run.step(0)
    optimizer = run.engine._ds.optimizer
    lost = optimizer.bf16_groups[0][0]
    before = lost.detach().clone()
    optimizer.accumulate_hp_grads_and_remove_lp = lambda p, i, j: (
        setattr(p, "grad", None) if p is lost else type(optimizer).accumulate_hp_grads_and_remove_lp(optimizer, p, i, j)
    )
    run.step(1)
    return torch.equal(lost.detach(), before)


def test_a_parameter_without_a_gradient_counts_as_zero() -> None:
    assert run_ranks(unused_rows, 1, (1,)) == [True]


def in_buckets(world: int) -> bool:
    """Whether buckets of any size give the bits that one reduction at the end gives."""
    curves = []
    for words in (["zero.overlap_comm=false"], *([f"zero.bucket_elements={size}"] for size in (1, 5000, 10**9))):
        run = Run(load([*WORDS, "train.accum_steps=2", *words]), world, one_pass=True)
        curves.append(([run.step(number) for number in range(2)], run.weights()))
    first, weights = curves[0]
    return all(
        curve == first and all(torch.equal(value, weights[name]) for name, value in masters.items())
        for curve, masters in curves
    )


def test_buckets_of_any_size_give_the_same_bits() -> None:
    assert run_ranks(in_buckets, 2, (2,)) == [True, True]


def waits(world: int) -> int:
    """How often DeepSpeed has waited for the device in five steps; its timers do from the third on."""
    from deepspeed.accelerator import get_accelerator

    run, found = Run(load([*WORDS, "train.accum_steps=2"]), world, one_pass=True), []
    get_accelerator().synchronize = lambda *_: found.append(1)
    for number in range(5):
        run.step(number)
    return len(found)


def sums_of_triton() -> list[Any]:
    """Losses and norms, then masters, with torch's sums and with the kernel's."""
    from engine_kernels.triton.accumulate import accumulate

    found: list[Any] = []
    for kernel in (None, accumulate):
        run = Run(load([*WORDS, "model.hidden_size=32", "train.accum_steps=3"]), 1, one_pass=True)
        if kernel is not None:
            run.engine._ds.optimizer._accumulate = kernel
        found.append(([run.step(number) for number in range(2)], run.weights()))
    return found


def test_sums_of_the_kernel_have_the_bits_of_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    # Named so, gloo's ranks are new processes: Triton reads the variable when it is imported.
    [((curve, masters), (other, theirs))] = run_ranks(sums_of_triton, 1, backend="cpu:gloo", timeout_s=200)
    assert curve == other
    assert all(torch.equal(value, theirs[name]) for name, value in masters.items())


def test_deepspeed_does_not_wait_for_the_device() -> None:
    assert run_ranks(waits, 1, (1,)) == [0]
