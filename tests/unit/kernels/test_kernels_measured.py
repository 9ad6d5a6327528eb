"""The times that `auto` goes by: which measurement, and what the registry makes of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from engine_kernels import measured
from engine_kernels.measured import times
from engine_kernels.registry import Impl, Situation, choose, register

HERE = Situation(torch.device("cuda"), torch.bfloat16, head_dim=128, length=4096)


def row(head_dim: int, length: int, us: dict[str, float], causal: bool = True, documents: bool = False) -> Any:
    return {
        "hardware": "H200",
        "head_dim": head_dim,
        "length": length,
        "causal": causal,
        "documents": documents,
        "forward_backward_us": us,
    }


ROWS = [
    row(64, 1024, {"fast": 1.0}),
    row(64, 8192, {"fast": 2.0}),
    row(128, 1024, {"fast": 3.0, "plain": 6.0}),
    row(128, 8192, {"fast": 8.0, "plain": 4.0}),
    row(128, 4096, {"fast": 5.0}, causal=False),
    row(128, 4096, {"fast": 6.0}, documents=True),
]


@pytest.fixture(autouse=True)
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "_table", lambda: {"toy": {"sm90": ROWS}})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    measured._architecture.cache_clear()
    monkeypatch.setattr("engine_kernels.registry._IMPLS", {})
    for name in ("plain", "fast", "new"):
        register(Impl("toy", name, lambda s: None, None))


@pytest.mark.parametrize(
    ("change", "us"),
    [
        ({"head_dim": 64, "length": 1000}, {"fast": 1.0}),
        ({"head_dim": 80, "length": 100_000}, {"fast": 2.0}),
        ({"length": 2048}, {"fast": 3.0, "plain": 6.0}),
        ({"length": 3000}, {"fast": 8.0, "plain": 4.0}),
        ({"head_dim": 256, "length": 1}, {"fast": 3.0, "plain": 6.0}),
        ({"length": 0}, {"fast": 8.0, "plain": 4.0}),
        ({"causal": False}, {"fast": 5.0}),
        ({"documents": True}, {"fast": 6.0}),
        ({"dtype": torch.float16}, {"fast": 8.0, "plain": 4.0}),
    ],
)
def test_the_nearest_measurement_counts(change: dict[str, Any], us: dict[str, float]) -> None:
    assert times("toy", replace(HERE, **change)).us == us


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": torch.float32},
        {"dropout": True},
        {"window": True},
        {"device": torch.device("cpu")},
        {"causal": False, "documents": True},
    ],
)
def test_what_was_not_measured(change: dict[str, Any]) -> None:
    assert times("toy", replace(HERE, **change)).us == {}
    assert choose("toy", "auto", replace(HERE, **change)).impl.name == "plain"


def test_an_architecture_or_an_operation_that_was_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    assert times("other", HERE).us == {}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    measured._architecture.cache_clear()
    assert times("toy", HERE).us == {}


def test_the_quickest_is_taken_and_the_others_get_their_times() -> None:
    choice = choose("toy", "auto", replace(HERE, length=1024))
    assert choice.impl.name == "fast"
    assert choice.slower == (
        ("plain", "2.00 times the time on H200 at head dim 128, length 1024"),
        ("new", "is not measured on this architecture"),
    )
    assert str(choose("toy", "auto", HERE)) == (
        "toy: plain; not fast: 2.00 times the time on H200 at head dim 128, length 8192; "
        "not new: is not measured on this architecture"
    )


def test_one_that_cannot_run_or_is_reluctant_is_passed_over_however_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine_kernels.registry._IMPLS", {})
    register(Impl("toy", "fast", lambda s: "needs wings", None))
    register(Impl("toy", "plain", lambda s: None, None, lambda s: "is shy"))
    register(Impl("toy", "new", lambda s: None, None))
    choice = choose("toy", "auto", replace(HERE, length=1024))
    assert choice.impl.name == "new"
    assert choice.passed_over == (("plain", "is shy"), ("fast", "needs wings"))


def test_a_measurement_of_what_is_not_registered_is_no_matter() -> None:
    assert choose("toy", "auto", replace(HERE, head_dim=64)).impl.name == "fast"
