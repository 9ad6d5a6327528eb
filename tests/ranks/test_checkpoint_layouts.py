"""State goes from any layout to any other without losing a bit, and training goes on as if it had never stopped."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest
import torch

from engine.checkpoint.compare import logical_hashes
from engine.checkpoint.reader import Reader
from engine.checkpoint.restore import load as load_state
from engine.checkpoint.restore import require_same_optimizer
from engine.checkpoint.save import Saver
from engine.config.derived import sequence_multiple
from engine.config.load import load, to_dict
from engine.config.schema import Config
from engine.data import open_data
from engine.dist.context import ParallelContext
from engine.optim.schedule import learning_rate
from engine.optim.state import kinds_of
from engine.topology.grid import Grid
from engine.train.session import build_engine
from tests.helpers.ranks import run_ranks

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(600)]

GLOBAL_BATCH = 8
BEGUN, AGAIN, END = 3, 6, 9
"""Steps before the first checkpoint, before the second, and in all."""
LONG = 23
"""Steps in all of those that go on for twenty, and of the schedule of the learning rate."""
# The embedding's 203 rows are padded; 2 of the 4 query heads share a key and a value.
SIZES = ("model.num_layers=4", "model.hidden_size=32", "model.num_heads=4", "model.num_kv_heads=2", "model.ffn_size=64")
SIZES += ("model.vocab_size=203", "model.vocab_multiple=4", "model.max_positions=16", "data=random", "data.seq_len=16")
MODELS = {
    "tied": ("model=gpt_tiny", *SIZES),
    "untied": ("model=llama_tiny", "model.head_dim=8", *SIZES),
    "bert": ("model=bert_tiny", *SIZES),
}
# An eps above the rounding of gradients, which Adam's ratio would make much of where a gradient is almost zero.
ADAMW = ("optim=adamw", "optim.lr=1e-3", "optim.eps=1e-5")
OTHERS = {
    "lion": ("optim=lion", "optim.lr=1e-4"),
    "sgd": ("optim=sgd", "optim.lr=0.1", "optim.momentum=0.9"),
    "lamb": ("optim=lamb", "optim.lr=1e-2", "optim.eps=1e-5"),
    "adafactor": ("optim=adafactor", "optim.lr=1e-3"),
    "muon": ("optim=muon", "optim.lr=1e-2", "optim.eps=1e-5"),
}
PIPE = ("parallel.pp=2", "train.accum_steps=4")
INTERLEAVED = (*PIPE, "parallel.schedule=interleaved", "parallel.virtual_stages=2")
DUALPIPEV = (*PIPE, "parallel.schedule=dualpipev")
FIRST = (*PIPE, "parallel.tp=2", "zero=z1")
SAME = "pp2 tp2 zero1"
LAYOUTS = {
    1: {
        "one rank zero0": ("zero=z0",),
        "one rank zero3": ("zero=z3", "train.accum_steps=2"),
    },
    2: {
        "dp2 zero1": ("parallel.dp=2", "zero=z1"),
        "dp2 zero2 offload": ("parallel.dp=2", "zero=z2_offload"),
        "dp2 zero3 offload": ("parallel.dp=2", "zero=z3_offload"),
        "tp2 zero0": ("parallel.tp=2", "parallel.sequence=true", "zero=z0"),
        "context2 zero3": ("parallel.context=2", "zero=z3"),
        "interleaved zero2": (*INTERLEAVED, "zero=z2"),
        "dualpipev zero0": (*DUALPIPEV, "zero=z0"),
    },
    4: {
        SAME: FIRST,
        "dp2 tp2 zero3": ("parallel.dp=2", "parallel.tp=2", "zero=z3"),
        "pp2 dp2 zero2": (*PIPE, "parallel.dp=2", "zero=z2"),
        "context2 dp2 zero1": ("parallel.context=2", "parallel.dp=2", "zero=z1"),
    },
}
BF16, FP16 = ("precision=bf16",), ("precision=fp16", "precision.scale_window=4", "precision.initial_scale_power=20")
HALVES = {
    "bf16 dp2 zero1": ("parallel.dp=2", "zero=z1", *BF16),
    "bf16 dp2 zero3": ("parallel.dp=2", "zero=z3", *BF16),
    "bf16 sums, interleaved": (*INTERLEAVED, "zero=z1", *BF16, "precision.grad_accum=bf16"),
    "fp16 dp2 zero1": ("parallel.dp=2", "zero=z1", *FP16),
    "fp16 pp2 zero2": (*PIPE, "zero=z2", *FP16),
}


@dataclass
class Curve:
    """What some steps gave, and the engine's numbers at the start and at the end."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    before: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """Train from step `first` on, from the state in `source` or anew, and save after each of the steps `saves`."""

    words: tuple[str, ...]
    out: str
    first: int = 0
    source: str | None = None
    saves: tuple[int, ...] = (BEGUN, END)


def config(words: tuple[str, ...]) -> Config:
    cfg = load(
        ["data.vocab_size=203", "train.device=cpu", f"train.steps={LONG}", "optim.warmup_steps=5"]
        + ["optim.schedule=cosine", "model.dropout=0.1", "model.attention_dropout=0.0", *words]
    )
    cfg.train.micro_batch = GLOBAL_BATCH // cfg.train.accum_steps // (cfg.parallel.dp or 1)
    return cfg


def perform(tasks: list[Task], world: int) -> list[Curve]:
    """Each task on these ranks, one after the other."""
    return [curve_of(task, world) for task in tasks]


def curve_of(task: Task, world: int) -> Curve:
    cfg, found = config(task.words), Curve()
    ctx = ParallelContext.create(Grid.from_config(cfg.parallel, world), torch.device("cpu"))
    data = open_data(cfg.data, cfg.model).train
    engine = build_engine(cfg, ctx, empty=task.source is not None)
    saver = Saver(engine, asynchronous=True)
    if task.source is not None:
        reader = Reader(Path(task.source))
        require_same_optimizer(reader, kinds_of(cfg.optim))
        load_state(engine, reader)
    found.before = engine.state().numbers
    assert {slot.kind for slot in engine.state().slots} <= kinds_of(cfg.optim)

    def save(step: int) -> None:
        if step in task.saves:
            facts = {"step": step, "samples": step * GLOBAL_BATCH, "config": to_dict(cfg)}
            saver.save(Path(task.out, str(step)), facts)

    if task.first:
        save(task.first)
    for step in range(task.first, max(task.saves)):
        batches = data.micro_batches(
            step * GLOBAL_BATCH,
            dp_rank=ctx.dp.rank,
            dp=ctx.dp.size,
            micro_batch=cfg.train.micro_batch,
            accum_steps=cfg.train.accum_steps,
            multiple=sequence_multiple(cfg.parallel),
        )
        result = engine.train_step(batches, learning_rate(cfg.optim, step, LONG))
        found.losses.append(float(result.loss))
        found.norms.append(float(result.grad_norm))
        save(step + 1)
    saver.close()
    found.after = engine.state().numbers
    return found


@cache
def hashes(folder: str) -> dict[tuple[str, str], str]:
    reader = Reader(Path(folder))
    reader.verify()
    return logical_hashes(reader)


def run(tasks: list[Task], world: int) -> list[Curve]:
    found: list[Curve] = run_ranks(perform, world, (tasks, world), timeout_s=300)[0]
    return found


def relative(found: list[float], wanted: list[float]) -> float:
    """The largest difference of the losses after `BEGUN` steps from those of no interruption."""
    assert len(found) >= END - BEGUN
    return max(abs(a - b) / abs(b) for a, b in zip(found, wanted[BEGUN : BEGUN + len(found)], strict=True))


def require_no_difference(name: str, source: str, out: str, curve: Curve, again: Curve) -> None:
    """Loaded and saved: the same bits. Stopped half way and loaded in the same layout: the same bits to the end."""
    end = BEGUN + len(curve.losses)
    assert hashes(f"{out}/{BEGUN}") == hashes(source), name
    assert again.losses == curve.losses[AGAIN - BEGUN :], name
    assert again.norms == curve.norms[AGAIN - BEGUN :], name
    assert again.after == curve.after, name
    assert hashes(f"{out}-again/{AGAIN}") == hashes(f"{out}/{AGAIN}"), name
    assert hashes(f"{out}-again/{end}") == hashes(f"{out}/{end}"), name
    assert hashes(f"{out}/{end}") != hashes(source), "training changes it"


def both(words: tuple[str, ...], source: str, out: str, end: int = END) -> list[Task]:
    """From `source` to the end, and once more from a checkpoint half way."""
    first = Task(words, out, BEGUN, source, (BEGUN, AGAIN, end))
    return [first, Task(words, f"{out}-again", AGAIN, f"{out}/{AGAIN}", (AGAIN, end))]


def require_layouts(models: dict[str, dict[int, list[str]]], root: Path, long: tuple[str, ...]) -> dict[str, float]:
    """Go on from pp2 tp2 in each of the layouts of each model, 4 ranks in front, which train what others start from.

    How far the losses are from those of no interruption.
    """
    wholes: dict[str, Curve] = {}
    errors: dict[str, float] = {}
    for world in (4, 2, 1):
        tasks = []
        if world == 4:
            ends = {model: LONG if SAME in worlds[4] else END for model, worlds in models.items()}
            tasks = [Task((*MODELS[m], *ADAMW, *FIRST), str(root / m), saves=(BEGUN, end)) for m, end in ends.items()]
        cases = [(model, name) for model, worlds in models.items() for name in worlds.get(world, [])]
        for model, name in cases:
            words = (*MODELS[model], *ADAMW, *LAYOUTS[world][name])
            tasks += both(
                words, str(root / model / str(BEGUN)), f"{root / model} {name}", LONG if name in long else END
            )
        curves = iter(run(tasks, world) if tasks else [])
        if world == 4:
            wholes = {model: next(curves) for model in models}
        for model, name in cases:
            out, curve = f"{root / model} {name}", next(curves)
            require_no_difference(name, str(root / model / str(BEGUN)), out, curve, next(curves))
            errors[f"{model} {name}"] = relative(curve.losses, wholes[model].losses)
            if name == SAME:
                assert curve.losses == wholes[model].losses[BEGUN:]
                assert curve.norms == wholes[model].norms[BEGUN:]
                assert hashes(f"{out}/{LONG}") == hashes(str(root / model / str(LONG)))
    return errors


def test_layouts_go_on_from_another(tmp_path: Path) -> None:
    """All layouts with tied weights and grouped heads, some with the other models."""
    some = {2: ["interleaved zero2", "context2 zero3"], 4: ["dp2 tp2 zero3"]}
    models = {"tied": {world: list(named) for world, named in LAYOUTS.items()}, "untied": some, "bert": some}
    errors = require_layouts(models, tmp_path, long=(SAME, "dp2 zero2 offload"))
    assert len(errors) == 13 + 2 * 3
    assert {name: error for name, error in errors.items() if not error <= 1e-5} == {}
    assert errors[f"tied {SAME}"] == 0
    # Were all this one layout, or nothing compared, it would be so of the others.
    assert sum(error > 0 for error in errors.values()) >= 12


def test_16_bits_go_on_from_fp32_and_back(tmp_path: Path) -> None:
    common = (*MODELS["tied"], *ADAMW)
    (whole,) = run([Task((*common, "zero=z0"), str(tmp_path / "whole"))], 1)
    source = str(tmp_path / "whole" / str(BEGUN))
    tasks = [t for name, words in HALVES.items() for t in both((*common, *words), source, str(tmp_path / name))]
    curves = run(tasks, 2)
    for number, name in enumerate(HALVES):
        curve, again = curves[2 * number : 2 * number + 2]
        require_no_difference(name, source, str(tmp_path / name), curve, again)
        assert 1e-7 < relative(curve.losses, whole.losses) < 1e-2, "16 bits were asked for"
    back = [
        Task((*common, "zero=z0"), f"{tmp_path / name} back", AGAIN, f"{tmp_path / name}/{AGAIN}", (AGAIN, AGAIN + 1))
        for name in HALVES
    ]
    for name, curve in zip(HALVES, run(back, 1), strict=True):
        assert hashes(f"{tmp_path / name} back/{AGAIN}") == hashes(f"{tmp_path / name}/{AGAIN}"), name
        assert abs(curve.losses[0] / whole.losses[AGAIN] - 1) < 1e-2, name


def test_the_loss_scale_comes_back(tmp_path: Path) -> None:
    """It begins so high that steps are left out, and has grown again when the state is saved."""
    common = (*MODELS["tied"], *ADAMW, *FP16, "precision.initial_scale_power=30")
    task = Task((*common, "parallel.dp=2", "zero=z2"), str(tmp_path / "whole"), saves=(20,))
    (before,) = run([task], 2)
    scale = before.after["loss_scale.cur_scale"]
    assert scale < 2**30
    assert before.after["loss_scale.last_overflow_iter"] >= 0
    assert before.after["loss_scale.cur_iter"] == 20
    source = str(tmp_path / "whole" / "20")
    words = {"zero3": ("parallel.dp=2", "zero=z3"), "pp2": (*PIPE, "zero=z1"), "same": ("parallel.dp=2", "zero=z2")}
    tasks = [Task((*common, *w), str(tmp_path / name), 20, source, (20, LONG)) for name, w in words.items()]
    for name, curve in zip(words, run(tasks, 2), strict=True):
        assert curve.before == before.after, name
        assert curve.after["loss_scale.cur_iter"] == LONG, name


def test_every_optimizer_changes_its_layout(tmp_path: Path) -> None:
    """From ZeRO over two replicas to a pipeline and to one rank, while in the first one training goes on."""
    whole = {
        name: Task((*MODELS["tied"], *o, "parallel.dp=2", "zero=z2"), str(tmp_path / name))
        for name, o in OTHERS.items()
    }
    moved = {
        world: {name: (*MODELS["tied"], *o, *words) for name, o in OTHERS.items()}
        for world, words in {2: (*PIPE, "zero=z1"), 1: ("zero=z0",)}.items()
    }
    errors: dict[str, float] = {}
    wholes: list[Curve] = []
    for world, named in moved.items():
        tasks = [] if wholes else list(whole.values())
        for name, words in named.items():
            tasks += both(words, f"{tmp_path / name}/{BEGUN}", f"{tmp_path / name} on {world}")
        curves = run(tasks, world)
        wholes, curves = (wholes, curves) if wholes else (curves[: len(whole)], curves[len(whole) :])
        for number, name in enumerate(named):
            curve, again = curves[2 * number : 2 * number + 2]
            require_no_difference(name, f"{tmp_path / name}/{BEGUN}", f"{tmp_path / name} on {world}", curve, again)
            errors[f"{name} on {world}"] = relative(curve.losses, wholes[number].losses)
    assert len(errors) == 2 * len(OTHERS)
    assert {name: error for name, error in errors.items() if not error <= 1e-5} == {}
