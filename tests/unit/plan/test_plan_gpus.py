"""What the plan expects of GPUs, against what the kernels choose there, what compilers keep, and measured peaks."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition

from engine.config.derived import compiles, fuses_loss, fuses_update, on_gpus
from engine.config.enums import Activation, Device, DType, Family, Kernel, Offload, OptimizerName, Positions, Switch
from engine.config.load import load
from engine.config.schema import Config
from engine.plan.activations import block_activation_bytes
from engine.plan.memory import memory
from engine.runtime.compile import wants_compile
from engine.train.kernels import choose_kernels
from engine_kernels.ops import Kernels, sdpa_attention
from tests.helpers.configs import make
from tests.unit.plan.test_plan_memory import kept_bytes

ROOT = Path(__file__).resolve().parents[3]
SWIGLU = {"model__activation": Activation.swiglu, "model__bias": False}
ROTARY = {"model__positions": Positions.rotary, "model__num_kv_heads": 2}
GIB = 2**30

CASES = [
    {},
    {"precision__dtype": DType.fp32},
    {"precision__dtype": DType.fp16},
    {"parallel__tp": 2},
    {"model__family": Family.bert},
    {"model__family": Family.bert, "zero__stage": 3},
    {"zero__stage": 3},
    {"zero__stage": 0},
    {"optim__name": OptimizerName.muon},
    {"zero__offload_optimizer": Offload.cpu},
    {"zero__stage": 2, "zero__offload_optimizer": Offload.cpu},
    {"kernels__loss": Kernel.torch, "kernels__optimizer": Kernel.torch},
    {"kernels__loss": Kernel.triton, "kernels__optimizer": Kernel.triton, "precision__dtype": DType.fp32},
]


@pytest.mark.parametrize("changes", CASES, ids=str)
def test_kernels_are_those_that_a_gpu_gets(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    cfg, gpu = make(**{"precision__dtype": DType.bf16, **changes}), torch.device("cuda")
    # The others are not asked: theirs needs a GPU that is there.
    monkeypatch.setattr("engine.train.kernels.OPERATIONS", {"loss": "linear_cross_entropy", "optimizer": "adamw"})
    taken = choose_kernels(cfg, gpu).choices
    assert fuses_loss(cfg) is (taken["loss"].impl.name == "triton")
    assert fuses_update(cfg) is ("optimizer" in taken and taken["optimizer"].impl.name == "triton")
    assert compiles(cfg) is wants_compile(cfg, gpu)


@pytest.mark.parametrize(
    ("device", "hardware", "gpus"),
    [(Device.cuda, "cpu", True), (Device.auto, "auto", True), (Device.auto, "cpu", False), (Device.cpu, "h200", False)],
)
def test_an_open_device_is_a_gpu_but_for_the_preset_of_cpus(device: Device, hardware: str, gpus: bool) -> None:
    cfg = make(train__device=device, hardware__name=hardware, precision__dtype=DType.bf16)
    assert {on_gpus(cfg), compiles(cfg), fuses_loss(cfg), fuses_update(cfg)} == {gpus}
    cfg.kernels.compile = Switch.off if gpus else Switch.on
    assert compiles(cfg) is not gpus


def _as_inductor_cuts(run: Callable[..., object]) -> Callable[..., object]:
    """`run` with the tensors kept that inductor keeps, without the code that it would write."""
    backend = aot_autograd(fw_compiler=lambda graph, _: graph, partition_fn=min_cut_rematerialization_partition)
    return torch.compile(run, backend=backend)  # type: ignore[no-any-return]


@pytest.mark.parametrize("dtype", [DType.fp32, DType.bf16])
@pytest.mark.parametrize("changes", [{}, SWIGLU, ROTARY, SWIGLU | ROTARY], ids=["gpt", "swiglu", "rotary", "llama"])
def test_a_compiled_block_keeps_what_is_predicted(changes: dict[str, Any], dtype: DType) -> None:
    torch._dynamo.reset()
    cfg = make(
        train__device=Device.cuda, precision__dtype=dtype, model__hidden_size=192, train__micro_batch=8, **changes
    )
    kept = kept_bytes(cfg, Kernels(attention=sdpa_attention), _as_inductor_cuts)
    # Means and standard deviations of the norms, and the angles, are what is left out.
    assert kept == pytest.approx(block_activation_bytes(cfg), rel=0.015)


PEAKS = [
    ("step/h200/2026-11-23b_ecf5f7e.jsonl", "gpt2_124m"),
    ("step/h200/2026-11-23b_ecf5f7e.jsonl", "gpt_1_3b_accum8"),
    ("step/h200/2026-11-23d_f1dc1d9.jsonl", "gpt_1_3b_accum1"),
    ("step/h200/2026-11-23_6f80103.jsonl", "bert_large"),
    ("step/h200/2026-11-23_6f80103.jsonl", "zero1_gpt_1_3b_accum8_2gpus"),
    ("step/h200/2026-11-23c_ac8fb73.jsonl", "llama_8b"),
    ("step/h200/2026-11-23c_ac8fb73.jsonl", "llama_8b_fp8"),
    ("step/h200/2026-11-23c_ac8fb73.jsonl", "zero1_llama_8b_fp32_2gpus"),
    ("step/h200/2026-11-23c_ac8fb73.jsonl", "gpt_2_8b_without_bubble"),
    ("step/h200/2026-11-23c_ac8fb73.jsonl", "pp2_gpt_2_8b"),
    ("step/h200/2026-11-23d_f1dc1d9.jsonl", "zero1_llama_8b_16_layers"),
    ("step/h200/2026-11-23d_f1dc1d9.jsonl", "zero3_llama_8b_16_layers"),
    ("variants/h200/2026-11-23c_ea1fe3d.jsonl", "zero3_llama_8b_2gpus"),
    ("variants/h200/2026-11-24_9a85661.jsonl", "tp2_llama_8b"),
    ("variants/h200/2026-11-24_9a85661.jsonl", "tp4_llama_8b"),
]
"""Rows of steps with the kernels of today; the last one of its case in the file."""


@pytest.mark.parametrize(("file", "case"), PEAKS)
def test_the_plan_is_within_2_percent_of_the_measured_peak(file: str, case: str) -> None:
    lines = (ROOT / "benchmarks/results" / file).read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if row["case"] == case and "peak_memory_gib" in row]
    row = [row for row in rows if row["system"].startswith("octant") and row["metric"] == "step"][-1]
    cfg = _config_of(row["command"])
    planned = max(memory(cfg, row["gpus"], stage).total for stage in range(cfg.parallel.pp)) / GIB
    assert planned == pytest.approx(row["peak_memory_gib"], rel=0.02)


def _config_of(command: str) -> Config:
    words = shlex.split(command)
    return load([word for word in words[words.index("-m") + 2 :] if "=" in word and not word.startswith("--")])
