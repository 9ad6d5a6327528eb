"""The kernels of a run: what the choices are asked about, what is said of them, and how they are refused."""

from __future__ import annotations

import pytest
import torch

from engine.config import Activation, Attention, Config, DType, Kernel, Norm, OptimizerName, Positions, Switch
from engine.config.enums import Family, Offload
from engine.errors import ConfigError
from engine.train.kernels import OPERATIONS, choose_kernels, situation
from engine_kernels.ops import Kernels, sdpa_attention
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
    assert (found.dropout, found.gathered, found.flat) == (True, True, True)
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
    later = "torch; not triton: is taken when asked for: whole training steps with it are not measured yet"
    fuses = "torch; not triton: torch.compile fuses torch's with what stands around it"
    assert list(choose_kernels(cfg, GPU).lines(GPU)) == [
        "attention: sdpa",
        f"loss: {later}",
        f"norm, rotary, activation: {fuses}",
        f"optimizer: {later}",
    ]
    cfg.kernels.compile = Switch.off
    assert list(choose_kernels(cfg, GPU).lines(GPU)) == [
        "attention: sdpa",
        f"loss: {later}",
        "norm, rotary, activation: triton",
        f"optimizer: {later}",
    ]


@pytest.mark.usefixtures("hopper")
def test_zero_and_offload_decide_on_loss_and_optimizer() -> None:
    with pytest.raises(ConfigError, match="reads the output projection's weight in the loss, and ZeRO-3 gathers it"):
        names(llama(zero__stage=3, kernels__loss=Kernel.triton))
    asked = names(llama(zero__stage=3, kernels__optimizer=Kernel.triton))
    assert (asked["loss"], asked["optimizer"]) == ("torch", "triton")
    assert "optimizer" not in names(llama(zero__offload_optimizer=Offload.cpu))
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
            {"zero__stage": 3},
            "reads the output projection's weight in the loss, and ZeRO-3 gathers it for that layer alone",
        ),
        ("optimizer", {"optim__name": OptimizerName.sgd}, "steps by adamw, not by sgd"),
        ("optimizer", {"zero__offload_optimizer": Offload.cpu}, "steps by adamw, not by adamw in host memory"),
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
