"""Optimizers give one process's weights in every layout, whatever pieces of the tensors ZeRO hands them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor

from engine.checkpoint.gather import gather_to_main
from engine.config import OptimConfig, OptimizerName
from engine.config.load import load
from engine.data import open_data
from engine.dist.context import SINGLE, ParallelContext
from engine.dist.spawn import run_ranks
from engine.optim.groups import build_optimizer
from engine.optim.schedule import set_learning_rate
from engine.runtime.ds_axes import Axes, mark_parameters
from engine.runtime.ds_engine import allow_fp16_on_cpus
from engine.runtime.gradients import mend_norm
from engine.runtime.shards import attach_pieces
from engine.topology.grid import Grid
from engine.train.session import build_engine
from tests.helpers.tensors import TENSORS, Bowls, values

pytestmark = pytest.mark.ranks

STEPS = 5
NAMES = list(OptimizerName)
RATES = {name: 0.5 if name is OptimizerName.sgd else 0.05 for name in NAMES}


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    pp: int = 1
    dp: int = 1
    cp: int = 1
    tp: int = 1
    zero: int = 0
    dtype: str = "fp32"

    @property
    def grid(self) -> Grid:
        return Grid(pp=self.pp, dp=self.dp, cp=self.cp, tp=self.tp)

    @property
    def world(self) -> int:
        return self.pp * self.dp * self.cp * self.tp


def options(name: OptimizerName) -> OptimConfig:
    return OptimConfig(name=name, lr=RATES[name], weight_decay=0.3, momentum=0.9 if name is OptimizerName.sgd else 0.0)


def one_process(name: OptimizerName) -> dict[str, Tensor]:
    """The weights of `Bowls` after `STEPS` steps, padding cut off."""
    model = Bowls(SINGLE)
    optimizer = build_optimizer(model.parameters(), options(name), ParallelContext.single())
    for step in range(STEPS):
        set_learning_rate(optimizer, RATES[name] / (step + 1))
        optimizer.zero_grad()
        model(torch.tensor(1.0)).backward()
        optimizer.step()
    return {n: p.detach()[: TENSORS[n].shape[0]] for n, p in model.named_parameters()}


def ds_settings(layout: Layout, replicas: int) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "train_batch_size": replicas,
        "gradient_clipping": 0.0,
        # At the default, ZeRO-3 keeps small parameters whole on all ranks.
        "zero_optimization": {"stage": layout.zero, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
    }
    if layout.dtype == "bf16":
        settings |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    if layout.dtype == "fp16":
        settings |= {"fp16": {"enabled": True, "loss_scale": 128.0}, "data_types": {"grad_accum_dtype": "fp32"}}
    return settings


def trained(layout: Layout, names: list[OptimizerName]) -> dict[OptimizerName, dict[str, Tensor]]:
    """This rank's slices after `STEPS` steps; replica r gives r + 1 times the gradient of replica 0."""
    ctx = ParallelContext.create(layout.grid, torch.device("cpu"))
    axes = Axes(ctx)
    held = {n: t for i, (n, t) in enumerate(TENSORS.items()) if i % layout.pp == ctx.pp.rank}
    share = 2 * (ctx.reduce.rank + 1) / (ctx.reduce.size + 1)
    found = {}
    for name in names:
        model = Bowls(ctx.tp, held)
        mark_parameters(model.parameters())
        allow_fp16_on_cpus()
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=build_optimizer(model.parameters(), options(name), ctx),
            config=ds_settings(layout, ctx.reduce.size),
            mpu=axes,
            dist_init_required=False,
        )
        mend_norm(engine.optimizer, ctx)
        attach_pieces(engine.optimizer, name)
        for step in range(STEPS):
            set_learning_rate(engine.optimizer, RATES[name] / (step + 1))
            engine.backward(engine(torch.tensor(share)))
            engine.step()
        found[name] = {n: whole(p).clone() for n, p in engine.module.named_parameters()}
    return found


def trained_in_all(layouts: list[Layout], names: list[OptimizerName]) -> list[dict[OptimizerName, dict[str, Tensor]]]:
    return [trained(layout, names) for layout in layouts]


def whole(parameter: torch.nn.Parameter) -> Tensor:
    master = safe_get_full_fp32_param(parameter)
    return parameter.detach().float() if master is None else master


def distances(layouts: list[Layout], names: list[OptimizerName]) -> dict[str, float]:
    """For each layout and optimizer the largest distance of a tensor from one process's, over the distance moved."""
    ranks = run_ranks(trained_in_all, layouts[0].world, (layouts, names), timeout_s=240, preload=["deepspeed"])
    start, found = values(1), {}
    for number, layout in enumerate(layouts):
        for name in names:
            wanted, errors = one_process(name), []
            for tensor, logical in TENSORS.items():
                rows = [[ranks[r][number][name].get(tensor) for r in group] for group in layout.grid.groups("tp")]
                copies = [logical.assemble(row) for row in rows if row[0] is not None]
                assert len(copies) == layout.dp * layout.cp
                moved = (wanted[tensor] - start[tensor]).norm()
                errors += [float((copy - wanted[tensor]).norm() / moved) for copy in copies]
            found[f"{layout} {name}"] = max(errors)
    return found


LAYOUTS = {
    2: [Layout(dp=2), Layout(dp=2, zero=1), Layout(dp=2, zero=2), Layout(dp=2, zero=3), Layout(tp=2)],
    3: [Layout(dp=3, zero=1), Layout(dp=3, zero=3)],
    4: [
        Layout(dp=2, tp=2),
        Layout(dp=2, tp=2, zero=1),
        Layout(dp=2, tp=2, zero=3),
        Layout(dp=2, cp=2, zero=2),
        Layout(pp=2, tp=2, zero=1),
        Layout(pp=2, dp=2, zero=1),
    ],
}


@pytest.mark.parametrize("world", LAYOUTS)
def test_layouts_give_the_weights_of_one_process(world: int) -> None:
    found = distances(LAYOUTS[world], NAMES)
    assert len(found) == len(LAYOUTS[world]) * len(NAMES)
    assert {case: error for case, error in found.items() if not error <= 1e-4} == {}


def test_half_precision_finds_its_pieces() -> None:
    """Gradients of 8 or 11 bits: a wrong piece would be off by the distance moved."""
    found = distances([Layout(dp=2, zero=1, dtype="bf16"), Layout(dp=2, zero=1, dtype="fp16")], NAMES)
    assert {case: error for case, error in found.items() if not error <= 0.1} == {}


# An eps far above the rounding of gradients, which Adam's ratio would make much of where a gradient is almost zero.
# No biases: the gradient of a key's bias is zero but for rounding, and these optimizers make a full step of any sign.
MODEL = ["model=llama_tiny", "model.num_layers=2", "model.vocab_size=203", "data=random", "data.vocab_size=203"]
RUN = ["data.seq_len=16", "train.device=cpu", "train.steps=5", "checkpoint.save_final=false", "optim.warmup_steps=0"]
ONE = ("train.micro_batch=4",)
Moved = tuple[dict[str, Tensor], dict[str, Tensor]]
RUNS = {
    2: [
        ("train.micro_batch=2", "parallel.dp=2", "zero=z0"),
        ("train.micro_batch=2", "parallel.dp=2", "zero=z2"),
        ("train.micro_batch=2", "parallel.dp=2", "zero=z3"),
    ],
    4: [
        ("train.micro_batch=2", "parallel.dp=2", "parallel.tp=2", "zero=z1"),
        ("train.micro_batch=2", "train.accum_steps=2", "parallel.pp=2", "parallel.tp=2", "zero=z1"),
    ],
}


def weights(runs: list[tuple[str, ...]], world: int, names: list[OptimizerName]) -> list[dict[OptimizerName, Moved]]:
    """The logical tensors before and after `STEPS` steps of each run with each optimizer, on rank 0."""
    found: list[dict[OptimizerName, Moved]] = []
    for words in runs:
        found.append({})
        for name in names:
            cfg = load([*MODEL, *RUN, *words, f"optim={name}", "optim.weight_decay=0.1", "optim.eps=1e-5"])
            ctx = ParallelContext.create(Grid.from_config(cfg.parallel, world), torch.device("cpu"))
            data, engine = open_data(cfg.data, cfg.model).train, build_engine(cfg, ctx)
            start = gather_to_main(engine.parameters(), ctx)
            sizes = {"micro_batch": cfg.train.micro_batch, "accum_steps": cfg.train.accum_steps}
            rows = cfg.train.micro_batch * cfg.train.accum_steps * ctx.dp.size
            for step in range(STEPS):
                batches = data.micro_batches(step * rows, dp_rank=ctx.dp.rank, dp=ctx.dp.size, **sizes)
                engine.train_step(batches, RATES[name] / 10)
            found[-1][name] = start, gather_to_main(engine.parameters(), ctx)
    return found


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return float(torch.stack([(a[k] - b[k]).norm() for k in a]).norm())


@pytest.mark.timeout(900)
def test_models_in_layouts_have_the_weights_of_one_process() -> None:
    """Over all tensors at once: in a small one a single tiny gradient, half rounding, may be a good share of a step."""
    (one_rank,) = run_ranks(weights, 1, ([ONE], 1, NAMES), timeout_s=300, preload=["deepspeed"])[0]
    errors = {}
    for world, runs in RUNS.items():
        ranks = run_ranks(weights, world, (runs, world, NAMES), timeout_s=400, preload=["deepspeed"])
        for words, found in zip(runs, ranks[0], strict=True):
            for name, (start, wanted) in one_rank.items():
                errors[" ".join(words), name] = distance(found[name][1], wanted) / distance(start, wanted)
    assert {case: error for case, error in errors.items() if not error <= 1e-4} == {}
