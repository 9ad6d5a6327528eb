from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from engine.config import Attention, Kernel
from engine_kernels import ops
from engine_kernels.kernels import Kernels, kernels_of
from engine_kernels.reference.fp8_linear import emulated
from engine_kernels.registry import Impl, KernelUnavailable, Situation, choose, implementations, operations, register

CPU = Situation(torch.device("cpu"), torch.float32, head_dim=64)
GPU = Situation(torch.device("cuda"), torch.bfloat16, head_dim=64)


def ops_of_triton() -> list[str]:
    """The operations that have an implementation in Triton."""
    return [op for op in operations() if any(impl.name == "triton" for impl in implementations(op))]


@pytest.fixture(autouse=True)
def _unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of registration alone; measurements have tests of their own."""
    monkeypatch.setattr("engine_kernels.measured._table", lambda: {})


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> str:
    """An operation whose first two implementations cannot run."""
    monkeypatch.setattr("engine_kernels.registry._IMPLS", {})
    for name, reason in (("fast", "needs wings"), ("newer", "needs time"), ("plain", None), ("slow", None)):
        register(Impl("toy", name, lambda s, reason=reason: reason, lambda: None))
    return "toy"


def test_auto_takes_the_first_that_can_run_and_says_why_not_the_others(toy: str) -> None:
    choice = choose(toy, "auto", CPU)
    assert choice.impl.name == "plain"
    assert choice.refused == (("fast", "needs wings"), ("newer", "needs time"))
    assert str(choice) == "toy: plain; not fast: needs wings; not newer: needs time"


def test_a_name_is_taken_as_asked(toy: str) -> None:
    choice = choose(toy, "slow", CPU)
    assert (choice.impl.name, choice.refused) == ("slow", ())
    assert str(choice) == "toy: slow"


def test_an_explicit_choice_that_cannot_run_is_refused_with_the_reason(toy: str) -> None:
    with pytest.raises(KernelUnavailable) as caught:
        choose(toy, "newer", CPU)
    assert str(caught.value) == ("toy=newer cannot run here (newer: needs time). Known: fast, newer, plain, slow, auto")


def test_an_unknown_name_is_refused_with_the_known_ones(toy: str) -> None:
    with pytest.raises(KernelUnavailable, match=r"toy=foo cannot run here \(no such implementation\)\. Known: fast, "):
        choose(toy, "foo", CPU)


def test_an_operation_without_any_implementation_that_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine_kernels.registry._IMPLS", {})
    register(Impl("toy", "fast", lambda s: "needs wings", lambda: None))
    with pytest.raises(KernelUnavailable, match=r"toy=auto cannot run here \(fast: needs wings\)"):
        choose("toy", "auto", CPU)


def test_the_situation_reaches_the_implementation(toy: str) -> None:
    register(Impl("other", "wide", lambda s: None if s.head_dim > 64 else f"not {s.head_dim}", lambda: None))
    with pytest.raises(KernelUnavailable, match="wide: not 64"):
        choose("other", "wide", CPU)


def test_the_configs_choices_are_the_implementations_of_attention() -> None:
    assert [impl.name for impl in implementations("attention")] == [
        c.name for c in Attention if c is not Attention.auto
    ]


@pytest.mark.parametrize("op", ["linear_cross_entropy", "norm", "rotary", "activation", "adamw"])
def test_the_configs_choices_are_the_implementations_of_the_others(op: str) -> None:
    assert [impl.name for impl in implementations(op)] == [c.name for c in Kernel if c is not Kernel.auto]


def test_a_reluctant_one_is_taken_where_no_other_can_run_or_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine_kernels.registry._IMPLS", {})
    register(Impl("toy", "shy", lambda s: None, lambda: None, lambda s: "is slow"))
    assert str(choose("toy", "auto", CPU)) == "toy: shy"
    register(Impl("toy", "plain", lambda s: None, lambda: None))
    choice = choose("toy", "auto", CPU)
    assert (choice.impl.name, choice.slower, choice.refused) == ("plain", (("shy", "is slow"),), ())
    assert str(choose("toy", "shy", CPU)) == "toy: shy"


def test_attention_on_the_cpu_is_torchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    choice = choose("attention", "auto", CPU)
    assert choice.impl.fn is ops.sdpa_attention
    assert dict(choice.passed_over) == {
        "triton": "needs a CUDA device, or TRITON_INTERPRET=1",
        **dict.fromkeys(("flash_attn_4", "sdpa_cudnn", "flash_attn", "sdpa_flash", "flex"), "needs a CUDA device"),
    }


@pytest.mark.parametrize("op", ["attention", "linear_cross_entropy", "norm", "rotary", "activation", "adamw"])
def test_auto_never_takes_the_interpreter(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    choice = choose(op, "auto", CPU)
    assert choice.impl.name == ("sdpa" if op == "attention" else "torch")
    assert ("triton", "Triton's interpreter is for tests") in choice.slower
    assert choose(op, "triton", CPU).impl.name == "triton"


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


LATER = "is taken when asked for: whole training steps are measured in bf16 alone"
FUSES = "torch.compile fuses torch's with what stands around it"
ZERO3 = "reads weights of several layers in the loss, as bert's do, and ZeRO-3 lends it those of one"
ALONE = "is launched for each parameter alone, where torch steps many at once"


@pytest.mark.parametrize(
    ("op", "change", "chosen", "why_not_triton"),
    [
        ("norm", {}, "triton", None),
        ("rotary", {}, "triton", None),
        ("activation", {}, "triton", None),
        ("norm", {"compiled": True}, "triton", None),
        ("rotary", {"compiled": True}, "torch", FUSES),
        ("activation", {"compiled": True}, "triton", None),
        ("norm", {"compiled": True, "fp8": True}, "torch", FUSES),
        ("activation", {"compiled": True, "fp8": True}, "torch", FUSES),
        ("norm", {"compiled": True, "dtype": torch.float32}, "torch", FUSES),
        ("activation", {"compiled": True, "dtype": torch.float16}, "torch", FUSES),
        ("linear_cross_entropy", {"compiled": True}, "triton", None),
        ("linear_cross_entropy", {"dtype": torch.float16}, "torch", LATER),
        ("linear_cross_entropy", {"gathered": True}, "torch", ZERO3),
        ("adamw", {"compiled": True}, "triton", None),
        ("adamw", {"dtype": torch.float32}, "torch", LATER),
        ("adamw", {"flat": False}, "torch", ALONE),
        ("adamw", {"update": "lion"}, "torch", "steps by adamw, not by lion"),
        ("norm", {"width": 16384}, "triton", None),
        ("norm", {"width": 16385}, "torch", "takes hidden sizes up to 16384, not 16385"),
        ("activation", {"dtype": torch.float64}, "torch", "takes bf16, fp16 and fp32, not torch.float64"),
    ],
)
@pytest.mark.usefixtures("hopper")
def test_what_auto_takes_on_a_gpu(op: str, change: dict[str, Any], chosen: str, why_not_triton: str | None) -> None:
    choice = choose(op, "auto", replace(GPU, **change))
    assert choice.impl.name == chosen
    assert dict(choice.passed_over).get("triton") == why_not_triton


@pytest.mark.usefixtures("hopper")
def test_what_auto_would_rather_not_take_can_be_asked_for() -> None:
    shy = replace(GPU, compiled=True, flat=False)
    assert [choose(op, "triton", shy).impl.name for op in ops_of_triton()] == ["triton"] * 6


@pytest.mark.parametrize(
    ("op", "change", "reason"),
    [
        ("linear_cross_entropy", {"gathered": True}, ZERO3),
        ("norm", {"width": 20000}, "takes hidden sizes up to 16384, not 20000"),
        ("adamw", {"update": "adamw in host memory"}, "steps by adamw, not by adamw in host memory"),
        ("attention", {"head_dim": 264}, "takes head dims up to 256, not 264"),
        ("rotary", {"device": torch.device("cpu")}, "needs a CUDA device, or TRITON_INTERPRET=1"),
    ],
)
@pytest.mark.usefixtures("hopper")
def test_refusals_of_triton(op: str, change: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    names = ", ".join(impl.name for impl in implementations(op))
    with pytest.raises(KernelUnavailable) as caught:
        choose(op, "triton", replace(GPU, **change))
    assert str(caught.value) == f"{op}=triton cannot run here (triton: {reason}). Known: {names}, auto"


def test_triton_needs_a_gpu_that_it_compiles_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    for op in ops_of_triton():
        with pytest.raises(KernelUnavailable, match=r"triton: needs compute capability 8\.0"):
            choose(op, "triton", GPU)


def test_without_triton_torch_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine_kernels.ops.find_spec", lambda name: None)
    missing = ops._triton("norm")
    assert missing.supports(GPU) == "Triton is not installed"


@pytest.mark.usefixtures("hopper")
def test_kernels_in_no_fixed_order_are_passed_over_for_the_same_bits() -> None:
    choice = choose("attention", "auto", replace(GPU, deterministic=True))
    reason = "adds up gradients in no fixed order"
    assert {name for name, said in choice.refused if said == reason} == {
        "flash_attn_4",
        "sdpa_cudnn",
        "sdpa",
        "sdpa_flash",
    }
    assert choice.impl.name in ("flash_attn", "triton")


def test_functions_of_choices() -> None:
    chosen = {op: choose(op, "auto", CPU) for op in operations()}
    assert kernels_of(chosen) == Kernels(attention=ops.sdpa_attention, linear=emulated)


@pytest.mark.parametrize(
    ("capability", "dtype", "width", "reason"),
    [
        ((9, 0), torch.bfloat16, 128, None),
        ((10, 0), torch.float16, 64, None),
        ((8, 9), torch.bfloat16, 64, "slower than the flash backend before compute capability 9.0"),
        ((9, 0), torch.float32, 64, "takes bf16 and fp16, not torch.float32"),
        ((9, 0), torch.bfloat16, 132, "takes head dims that are multiples of 8 up to 128, not 132"),
        ((9, 0), torch.bfloat16, 100, "takes head dims that are multiples of 8 up to 128, not 100"),
        ((9, 0), torch.bfloat16, 136, "takes head dims that are multiples of 8 up to 128, not 136"),
    ],
)
def test_what_cudnn_takes(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dtype: torch.dtype, width: int, reason: str | None
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    choice = choose("attention", "auto", Situation(GPU.device, dtype, head_dim=width))
    assert dict(choice.refused).get("sdpa_cudnn") == reason
    assert choice.impl.name == ("sdpa_cudnn" if reason is None else "sdpa")


@pytest.mark.parametrize(
    ("version", "dropout", "reason"),
    [
        (91002, True, None),
        (91200, False, None),
        (91200, True, "drops no attention weights in cuDNN 9.11 to 9.13, and this is 91200"),
        (91400, True, None),
    ],
)
def test_cudnn_versions_that_cannot_drop(
    monkeypatch: pytest.MonkeyPatch, version: int, dropout: bool, reason: str | None
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: version)
    choice = choose("attention", "auto", Situation(GPU.device, GPU.dtype, head_dim=64, dropout=dropout))
    assert dict(choice.refused).get("sdpa_cudnn") == reason


def test_cudnn_is_passed_over_for_documents_and_refused_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    packed = Situation(GPU.device, GPU.dtype, head_dim=64, documents=True)
    choice = choose("attention", "auto", packed)
    reason = "has no attention inside the documents of packed rows in torch"
    assert choice.impl.fn is ops.sdpa_attention
    assert ("sdpa_cudnn", reason) in choice.refused
    with pytest.raises(KernelUnavailable, match=rf"attention=sdpa_cudnn cannot run here \(sdpa_cudnn: {reason}\)"):
        choose("attention", "sdpa_cudnn", packed)


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"window": True}, "holds a mask of all pairs of positions for a window"),
        ({"documents": True, "dropout": True}, "has a call for every length of a document where weights are dropped"),
    ],
)
def test_auto_leaves_sdpa_where_it_would_hold_or_do_too_much(change: dict[str, Any], reason: str) -> None:
    choice = choose("attention", "auto", replace(GPU, **change))
    assert choice.impl.name == "triton"
    assert dict(choice.slower)["sdpa"] == reason


@pytest.mark.usefixtures("hopper")
def test_what_is_not_measured_is_said_to_be_so(monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"head_dim": 64, "length": 4096, "causal": True, "documents": False, "hardware": "a GPU"}
    table = {"attention": {"sm90": [row | {"forward_backward_us": {"triton": 1.0, "sdpa": 2.0}}]}}
    monkeypatch.setattr("engine_kernels.measured._table", lambda: table)
    monkeypatch.setattr("engine_kernels.measured._architecture", lambda device: "sm90")
    choice = choose("attention", "auto", GPU)
    assert choice.impl.name == "triton"
    assert dict(choice.slower)["sdpa_cudnn"] == "is not measured on this architecture"
    assert dict(choice.slower)["sdpa"].startswith("2.00 times the time on a GPU")
    # A mask for padding slows down each in its own way, so nothing measured speaks for it.
    assert choose("attention", "auto", replace(GPU, causal=False, padded=True)).impl.name == "sdpa_cudnn"
