"""The kernels of a run: what the choices are asked about, what is said of them, and how they are refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from engine.config import Activation, Attention, Config, DType, Kernel, Norm, OptimizerName, Positions, Switch
from engine.config.enums import Family, Fp8, Fp8Kernel, Offload, OffloadStrategy
from engine.dist.context import ParallelContext
from engine.errors import ConfigError
from engine.train.describe import describe
from engine.train.kernels import OPERATIONS, choose_kernels, situation
from engine_kernels import scaled_mm
from engine_kernels.ops import Kernels, sdpa_attention
from engine_kernels.reference.fp8_linear import emulated
from engine_kernels.registry import operations
from tests.helpers.configs import make

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def llama(**changes: object) -> Config:
    cfg = make(precision__dtype=DType.bf16, **changes)
    cfg.model.positions, cfg.model.norm, cfg.model.activation = Positions.rotary, Norm.rmsnorm, Activation.swiglu
    return cfg


def names(cfg: Config, device: torch.device = GPU) -> dict[str, str]:
    return {option: choice.impl.name for option, choice in choose_kernels(cfg, device).choices.items()}


def fp8(**changes: object) -> Config:
    return make(precision__dtype=DType.bf16, precision__fp8=Fp8.tensorwise, **changes)


def test_every_operation_has_an_option() -> None:
    assert sorted(OPERATIONS.values()) == sorted(operations())


def test_what_the_implementations_are_asked_about() -> None:
    found = situation(make(), CPU)
    assert (found.device, found.dtype, found.head_dim, found.length, found.width) == (CPU, torch.float32, 8, 32, 48)
    assert (found.groups, found.causal, found.padded, found.dropout, found.documents) == (1, True, False, False, False)
    assert (found.compiled, found.deterministic, found.gathered, found.flat) == (False, False, False, True)
    cfg = make(kernels__compile=Switch.on, kernels__deterministic=True, data__document_mask=True, zero__stage=3)
    cfg.model.num_kv_heads, cfg.model.attention_dropout = 2, 0.1
    found = situation(cfg, CPU)
    assert (found.groups, found.compiled, found.deterministic, found.documents) == (3, True, True, True)
    assert (found.dropout, found.gathered, found.flat) == (True, False, True)
    assert situation(make(zero__stage=3, model__family=Family.bert), CPU).gathered, "its loss reads the head's bias too"
    bert = situation(make(model__family=Family.bert, zero__stage=0), CPU)
    assert (bert.causal, bert.padded, bert.flat) == (False, True, False)


def test_on_a_cpu_all_is_torchs_and_said_in_a_line() -> None:
    chosen = choose_kernels(make(), CPU)
    assert chosen.kernels == Kernels(attention=sdpa_attention)
    assert list(chosen.lines(CPU)) == [
        "kernels: attention sdpa, loss torch, norm torch, activation torch, optimizer torch"
    ]


@pytest.mark.usefixtures("hopper")
def test_on_a_gpu_the_reasons_are_said_too() -> None:
    cfg = llama(kernels__attention=Attention.sdpa)
    later = "torch; not triton: is taken when asked for: whole training steps are measured in bf16 alone"
    fuses = "torch; not triton: torch.compile fuses torch's with what stands around it"
    assert list(choose_kernels(cfg, GPU).lines(GPU)) == [
        "attention: sdpa",
        "loss, norm: triton",
        f"rotary: {fuses}",
        "activation, optimizer: triton",
    ]
    assert {names(fp8())[option] for option in ("norm", "activation")} == {"torch"}
    cfg.kernels.compile = Switch.off
    cfg.parallel.tp = 2
    assert list(choose_kernels(cfg, GPU).lines(GPU)) == [
        "attention: sdpa",
        "loss, norm, rotary, activation, optimizer: triton",
    ]
    cfg.precision.dtype = DType.fp16
    assert list(choose_kernels(cfg, GPU).lines(GPU))[-1] == f"optimizer: {later}"


@pytest.mark.usefixtures("hopper")
def test_fp8_is_multiplied_by_tensor_cores_and_emulated_on_cpus() -> None:
    assert "fp8" not in names(make())
    assert names(fp8())["fp8"] == "scaled_mm"
    assert choose_kernels(fp8(), GPU).kernels.linear is scaled_mm.linear
    assert names(fp8(kernels__fp8=Fp8Kernel.emulated))["fp8"] == "emulated"
    chosen = choose_kernels(fp8(), CPU)
    assert chosen.kernels.linear is emulated
    assert next(iter(chosen.lines(CPU))).endswith("optimizer torch, fp8 emulated")
    assert chosen.record()["fp8"]["passed_over"] == {"scaled_mm": "needs a CUDA device"}


def test_fp8_is_refused_where_it_would_be_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    slow = "Use precision=bf16, or kernels.fp8=emulated, which shows how fp8 trains and is slower than bf16"
    reason = "scaled_mm: needs compute capability 8.9 for tensor cores with fp8, and this GPU has 8.0"
    with pytest.raises(ConfigError) as caught:
        choose_kernels(fp8(), GPU)
    assert str(caught.value) == (
        f"1. [OCT330] kernels.fp8=auto: fp8_linear would only be emulated on this GPU ({reason}). {slow}"
    )
    with pytest.raises(ConfigError) as caught:
        choose_kernels(fp8(kernels__fp8=Fp8Kernel.scaled_mm), GPU)
    assert str(caught.value) == (
        f"1. [OCT330] kernels.fp8=scaled_mm: fp8_linear=scaled_mm cannot run here ({reason}). Known: scaled_mm, "
        f"emulated, auto. {slow}"
    )
    assert names(fp8(kernels__fp8=Fp8Kernel.emulated))["fp8"] == "emulated"


def test_what_is_said_of_fp8() -> None:
    def said(cfg: Config) -> list[str]:
        lines = describe(cfg, ParallelContext.single(), [], [0], choose_kernels(cfg, CPU))
        return [line for line in lines if line.startswith("fp8")]

    assert said(make()) == []
    every = "fp8 tensorwise: attention.qkv, attention.out, mlp.up, mlp.down of blocks"
    assert said(fp8()) == [f"{every} 0 to 3"]
    assert said(fp8(precision__fp8_bf16_ends=1)) == [f"{every} 1 to 2"]
    assert said(fp8(model__ffn_size=100)) == [
        "fp8 tensorwise: attention.qkv, attention.out of blocks 0 to 3; in bf16, as their sizes are no multiples of "
        "16: mlp.up (100 x 48), mlp.down (48 x 100)"
    ]


@pytest.mark.usefixtures("hopper")
def test_zero_and_offload_decide_on_loss_and_optimizer() -> None:
    with pytest.raises(ConfigError, match="reads weights of several layers in the loss, as bert's do"):
        names(make(zero__stage=3, kernels__loss=Kernel.triton, model__family=Family.bert))
    asked = names(llama(zero__stage=3, kernels__optimizer=Kernel.triton))
    assert (asked["loss"], asked["optimizer"]) == ("triton", "triton")
    offload = {"zero__offload_optimizer": Offload.cpu}
    assert names(llama(**offload))["optimizer"] == "triton", "of streamed state a part stays on the device"
    assert "optimizer" not in names(llama(**offload, zero__offload_strategy=OffloadStrategy.plain))
    assert "optimizer" not in names(llama(optim__name=OptimizerName.lion))
    assert "rotary" not in names(make(precision__dtype=DType.bf16))


def test_choices_are_recorded() -> None:
    cfg = make(kernels__norm=Kernel.torch)
    record = choose_kernels(cfg, CPU).record()
    assert list(record) == ["attention", "loss", "norm", "activation", "optimizer"]
    assert record["norm"] == {"implementation": "torch", "asked": "torch", "passed_over": {}}
    assert record["attention"]["implementation"] == "sdpa"
    assert record["attention"]["passed_over"]["sdpa_cudnn"] == "needs a CUDA device"
    assert record["loss"]["asked"] == "auto"


@pytest.mark.parametrize("option", ["loss", "norm", "activation", "optimizer"])
def test_a_kernel_that_cannot_run_here_is_refused(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ConfigError) as caught:
        choose_kernels(make(**{f"kernels__{option}": Kernel.triton}), CPU)
    assert str(caught.value) == (
        f"1. [OCT330] kernels.{option}=triton: {OPERATIONS[option]}=triton cannot run here (triton: needs a CUDA "
        f"device, or TRITON_INTERPRET=1). Known: triton, torch, auto. Use kernels.{option}=auto"
    )


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("option", "change", "reason"),
    [
        (
            "loss",
            {"zero__stage": 3, "model__family": Family.bert},
            "reads weights of several layers in the loss, as bert's do, and ZeRO-3 lends it those of one",
        ),
        ("optimizer", {"optim__name": OptimizerName.sgd}, "steps by adamw, not by sgd"),
        (
            "optimizer",
            {"zero__offload_optimizer": Offload.cpu, "zero__stage": 2},
            "steps by adamw, not by adamw in host memory",
        ),
        ("norm", {"model__hidden_size": 24576}, "takes hidden sizes up to 16384, not 24576"),
    ],
)
def test_a_kernel_that_does_not_suit_the_run_is_refused(option: str, change: dict[str, object], reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        choose_kernels(llama(**{f"kernels__{option}": Kernel.triton}, **change), GPU)
    assert f"[OCT330] kernels.{option}=triton: " in str(caught.value)
    assert f"(triton: {reason})" in str(caught.value)


def test_all_refusals_are_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ConfigError) as caught:
        choose_kernels(make(kernels__loss=Kernel.triton, kernels__norm=Kernel.triton), CPU)
    assert [violation.option for violation in caught.value.violations] == ["kernels.loss", "kernels.norm"]


@pytest.mark.usefixtures("hopper")
def test_what_is_said_of_cuda_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H200")

    def said(device: torch.device, **changes: object) -> list[str]:
        cfg = llama(kernels__attention=Attention.sdpa, zero__stage=1, **changes)
        ctx = replace(ParallelContext.single(), device=device)
        lines = describe(cfg, ctx, [], [0], choose_kernels(cfg, device))
        return [line for line in lines if line.startswith("cuda graphs")]

    line = "cuda graphs: passes are recorded after 2 of each kind; validation is launched kernel by kernel"
    assert said(GPU, kernels__cuda_graphs=Switch.on) == said(GPU, kernels__cuda_graphs=Switch.auto) == [line]
    assert said(GPU, kernels__cuda_graphs=Switch.auto, model__attention_dropout=0.1) == []
    assert said(GPU) == said(CPU, kernels__cuda_graphs=Switch.on) == []
