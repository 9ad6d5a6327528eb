from __future__ import annotations

import pytest
import torch

from engine.config import Attention
from engine_kernels import ops
from engine_kernels.registry import Impl, KernelUnavailable, Situation, choose, implementations, register

CPU = Situation(torch.device("cpu"), torch.float32, head_dim=64)
GPU = Situation(torch.device("cuda"), torch.bfloat16, head_dim=64)


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


def test_attention_on_the_cpu_is_torchs_own() -> None:
    choice = choose("attention", "auto", CPU)
    assert choice.impl.fn is ops.sdpa_attention
    assert choice.refused == (("sdpa_cudnn", "needs a CUDA device"),)


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
    assert choice.refused == (() if reason is None else (("sdpa_cudnn", reason),))
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
    assert choice.refused == (() if reason is None else (("sdpa_cudnn", reason),))


def test_cudnn_is_passed_over_for_documents_and_refused_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    packed = Situation(GPU.device, GPU.dtype, head_dim=64, documents=True)
    choice = choose("attention", "auto", packed)
    reason = "has no attention inside the documents of packed rows in torch"
    assert choice.impl.fn is ops.sdpa_attention
    assert choice.refused == (("sdpa_cudnn", reason),)
    with pytest.raises(KernelUnavailable, match=rf"attention=sdpa_cudnn cannot run here \(sdpa_cudnn: {reason}\)"):
        choose("attention", "sdpa_cudnn", packed)
