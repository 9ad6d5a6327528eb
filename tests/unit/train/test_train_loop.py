"""What a run says of itself before it starts, which kernel it takes, and the order in which the loop calls."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

import engine
from engine.config import Attention, Config, DataConfig, DType, OptimConfig, OptimizerName, TrainingConfig
from engine.config.enums import PipelineSchedule
from engine.data import Data
from engine.dist.context import AxisGroup, ParallelContext
from engine.errors import CheckpointError, ConfigError
from engine.plan.costs import parameter_counts
from engine.protocols import Engine, StepResult
from engine.topology.grid import Grid
from engine.train.describe import describe
from engine.train.kernels import choose_kernels
from engine.train.loop import Cursor, StopRequested, fit, reads_text
from tests.helpers.models import preset

CPU = torch.device("cpu")


def config(model: str = "gpt_tiny") -> Config:
    return Config(
        model=deepcopy(preset(model)),
        data=DataConfig(source="random", seq_len=128, vocab_size=2000),
        optim=OptimConfig(lr=0.5, warmup_steps=2),
        train=TrainingConfig(steps=3, micro_batch=4, accum_steps=3),
    )


def lines(cfg: Config, pp: int, dp: int, tp: int, bounds: list[int], cp: int = 1) -> list[str]:
    ctx = replace(ParallelContext.single(), grid=Grid(pp=pp, dp=dp, cp=cp, tp=tp))
    return list(describe(cfg, ctx, list(parameter_counts(cfg.model)), bounds, choose_kernels(cfg, CPU)))


def test_a_run_with_stages_is_described_in_numbers() -> None:
    # A block of gpt_tiny holds 12 * 128^2 weights, and 4 * 128 + 9 * 128 of norms and biases: 198,272. The tables hold
    # (2000 + 256) * 128 = 288,768, the last norm 256, the tied head none.
    assert lines(config(), 2, 2, 2, [0, 3, 8]) == [
        f"Octant {engine.__version__}: gpt_tiny, 1.08M parameters on 8 ranks = pp 2 x dp 2 x tp 2, CPU",
        "global batch 24 = micro 4 x accum 3 x dp 2 samples of 128 tokens = 3,072 tokens; ZeRO-1, fp32, adamw",
        "stage 0: embed.tokens .. block.0, 3 layers, 487k parameters",
        "stage 1: block.1 .. head, 5 layers, 595k parameters",
        "one_f_one_b with 3 micro-batches: bubble 25% if stages are equal; more train.accum_steps shrink it",
        "kernels: attention sdpa, loss torch, norm torch, activation torch, optimizer torch",
    ]


def test_parts_of_a_stage_are_listed_and_its_bubble_is_that_of_its_schedule() -> None:
    cfg = config("bert_tiny")
    cfg.parallel.schedule, cfg.parallel.virtual_stages, cfg.train.accum_steps = PipelineSchedule.interleaved, 2, 4
    cfg.parallel.context = 2
    found = lines(cfg, 2, 1, 1, [0, 3, 4, 5, 9], cp=2)
    assert found[0].endswith("4 ranks = pp 2 x dp 1 x tp 1 x context 2, CPU")
    assert found[2].startswith("stage 0: embed.tokens .. block.0, block.2 .. block.2, 4 layers, ")
    assert found[3].startswith("stage 1: block.1 .. block.1, block.3 .. head.bias, 5 layers, ")
    # (p - 1) / (v m + p - 1), arXiv 2104.04473, section 2.2.2.
    assert found[4].startswith("interleaved with 4 micro-batches: bubble 11% ")


def test_without_stages_none_are_listed() -> None:
    cfg = config("llama_tiny")
    cfg.zero.stage, cfg.precision.dtype, cfg.optim.name = 3, DType.bf16, OptimizerName.sgd
    cfg.kernels.attention = Attention.reference
    first, second, *rest = lines(cfg, 1, 4, 1, [0, 7])
    assert "4 ranks = pp 1 x dp 4 x tp 1" in first
    assert second.startswith("global batch 48 = micro 4 x accum 3 x dp 4 ")
    assert second.endswith("ZeRO-3, bf16, sgd")
    assert rest == ["kernels: attention reference, loss torch, norm torch, rotary torch, activation torch"]


def test_an_attention_that_cannot_run_here_is_refused() -> None:
    cfg = config()
    cfg.kernels.attention = Attention.sdpa_cudnn
    with pytest.raises(ConfigError) as caught:
        choose_kernels(cfg, CPU)
    assert str(caught.value) == (
        "1. [OCT330] kernels.attention=sdpa_cudnn: attention=sdpa_cudnn cannot run here (sdpa_cudnn: needs a CUDA "
        "device). Known: flash_attn_4, sdpa_cudnn, flash_attn, sdpa, triton, sdpa_flash, flex, reference, auto. "
        "Use kernels.attention=auto"
    )


def test_cudnn_attention_is_refused_for_packed_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    cfg = config()
    cfg.kernels.attention, cfg.data.document_mask, cfg.precision.dtype = Attention.sdpa_cudnn, True, DType.bf16
    with pytest.raises(ConfigError) as caught:
        choose_kernels(cfg, torch.device("cuda"))
    assert str(caught.value) == (
        "1. [OCT330] kernels.attention=sdpa_cudnn: attention=sdpa_cudnn cannot run here (sdpa_cudnn: has no attention "
        "inside the documents of packed rows in torch). "
        "Known: flash_attn_4, sdpa_cudnn, flash_attn, sdpa, triton, sdpa_flash, flex, reference, auto. "
        "Use kernels.attention=auto"
    )


PLACE = {"dp_rank": 1, "dp": 2, "micro_batch": 4, "accum_steps": 3, "multiple": 1, "read": True}


class FakeSplit:
    """Gives its arguments as the only micro-batch."""

    num_samples = 8

    def micro_batches(self, first_sample: int, **place: int) -> Iterator[Any]:
        yield first_sample, place


class FakeEngine:
    """Writes down what it is given; the loss is the number of steps so far."""

    def __init__(self, log: list[Any]) -> None:
        dp = AxisGroup(rank=1, size=2, ranks=(0, 1), group=None)
        self.ctx = replace(ParallelContext.single(), dp=dp)
        self.log = log
        self.steps = 0

    def train_step(self, batches: Iterable[Any], lr: float) -> StepResult:
        self.log.append(("train", *batches, lr))
        self.steps += 1
        return StepResult(loss=torch.tensor(float(self.steps)), grad_norm=torch.tensor(1.0))


class FakeHook:
    def __init__(self, name: str, log: list[Any]) -> None:
        self.name, self.log = name, log

    def before_training(self) -> None:
        self.log.append((self.name, "before"))

    def after_step(self, step: int, result: StepResult, lr: float, data_wait_s: float) -> None:
        assert data_wait_s > 0
        self.log.append((self.name, step, float(result.loss), lr))

    def after_training(self, summary: dict[str, Any]) -> None:
        self.log.append((self.name, "after", dict(summary)))
        summary[self.name] = len(summary)

    def after_stop(self, step: int) -> None:
        self.log.append((self.name, "stopped", step))


def test_the_loop_reads_this_replicas_batches_and_calls_the_hooks_in_order() -> None:
    log: list[Any] = []
    data = cast(Data, SimpleNamespace(train=FakeSplit()))
    cfg = config()
    cfg.parallel.context, cfg.parallel.tp, cfg.parallel.sequence = 2, 2, True
    summary = fit(FakeEngine(log), data, cfg, [FakeHook("a", log), FakeHook("b", log)])  # type: ignore[arg-type]
    place = PLACE | {"multiple": 4}
    expected: list[Any] = [("a", "before"), ("b", "before")]
    # Two steps of warm-up to the peak, and the first of the decay, which starts at the peak.
    for step, lr in enumerate((0.25, 0.5, 0.5)):
        expected += [
            ("train", (24 * step, place), lr),
            ("a", step + 1, step + 1.0, lr),
            ("b", step + 1, step + 1.0, lr),
        ]
    assert log == [*expected, ("a", "after", {}), ("b", "after", {"a": 0})]
    assert summary == {"a": 0, "b": 1}


@pytest.mark.parametrize("prefetch", [0, 2])
def test_the_loop_goes_on_where_another_layout_stopped(prefetch: int) -> None:
    log: list[Any] = []
    cfg = config()
    cfg.data.prefetch = prefetch
    data = cast(Data, SimpleNamespace(train=FakeSplit()))
    fit(cast(Engine, FakeEngine(log)), data, cfg, [], Cursor(step=1, samples=40))
    assert log == [("train", (40, PLACE), 0.5), ("train", (64, PLACE), 0.5)]


def test_a_cursor_counts_the_samples_of_steps_since_its_own() -> None:
    assert Cursor().after(3, 24) == Cursor(step=3, samples=72)
    # Steps 5 to 7 with batches of another size.
    assert Cursor(step=4, samples=96).after(7, 10) == Cursor(step=7, samples=126)


def test_what_one_hook_cannot_write_costs_no_other_hook_its_results() -> None:
    class Refusing(FakeHook):
        def after_training(self, summary: dict[str, Any]) -> None:
            raise CheckpointError.of(636, self.name, "value", "rule", "way out")

    log: list[Any] = []
    hooks = [Refusing("first", log), FakeHook("between", log), Refusing("second", log), FakeHook("last", log)]
    with pytest.raises(CheckpointError, match="OCT636. first=value"):
        fit(cast(Engine, FakeEngine(log)), cast(Data, SimpleNamespace(train=FakeSplit())), config(), hooks)
    assert log[-2:] == [("between", "after", {}), ("last", "after", {"between": 0})]


def test_a_hook_can_end_the_training_early() -> None:
    class Stopping(FakeHook):
        def after_step(self, step: int, result: StepResult, lr: float, data_wait_s: float) -> None:
            if step == 2:
                raise StopRequested(step)

    log: list[Any] = []
    before = threading.active_count()
    with pytest.raises(StopRequested, match="stopped after step 2"):
        fit(
            cast(Engine, FakeEngine(log)),
            cast(Data, SimpleNamespace(train=FakeSplit())),
            config(),
            [FakeHook("first", log), Stopping("second", log)],
        )
    assert threading.active_count() == before
    assert sum(entry[0] == "train" for entry in log) == 2
    assert log[-2:] == [("first", "stopped", 2), ("second", "stopped", 2)]
    assert not [entry for entry in log if entry[1] == "after"]


def test_a_step_that_fails_ends_the_reading() -> None:
    class Failing(FakeEngine):
        def train_step(self, batches: Iterable[Any], lr: float) -> StepResult:
            raise KeyboardInterrupt

    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        fit(cast(Engine, Failing([])), cast(Data, SimpleNamespace(train=FakeSplit())), config(), [])
    assert threading.active_count() == before


def reading_stages(model: str, schedule: PipelineSchedule, pp: int, parts: int = 1, layers: int = 8) -> list[int]:
    cfg = config(model)
    cfg.model.num_layers = layers
    cfg.parallel.pp, cfg.parallel.schedule, cfg.parallel.virtual_stages = pp, schedule, parts
    return [stage for stage in range(pp) if reads_text(cfg, stage)]


def test_stages_between_the_embeddings_and_the_loss_read_no_text() -> None:
    plain, interleaved = PipelineSchedule.one_f_one_b, PipelineSchedule.interleaved
    assert reading_stages("gpt_tiny", plain, 1) == [0]
    assert reading_stages("gpt_tiny", plain, 4) == [0, 3]
    assert reading_stages("llama_tiny", interleaved, 4, parts=2) == [0, 3]
    assert reading_stages("gpt_tiny", PipelineSchedule.dualpipev, 4, layers=16) == [0], "it holds both ends"


def test_the_stage_that_adds_segments_reads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.plan.stages.stage_bounds", lambda cfg: (0, 1, 3, 5, 13))
    assert reading_stages("bert_tiny", PipelineSchedule.one_f_one_b, 4) == [0, 1, 3]
    assert reading_stages("gpt_tiny", PipelineSchedule.one_f_one_b, 4) == [0, 3], "positions are no text"
