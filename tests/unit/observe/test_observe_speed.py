from __future__ import annotations

import pytest

from engine.observe.flops import mfu, peak_flops
from engine.observe.throughput import WINDOW_STEPS, StepTimer


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("A100-SXM4-40GB", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165),
    ],
)
def test_peak_of_a_known_card(name: str, tflops: float) -> None:
    assert peak_flops(name) == pytest.approx(tflops * 1e12)


@pytest.mark.parametrize(
    "name",
    [
        "Tesla V100-SXM2-16GB",  # no bf16
        "Tesla T4",
        "NVIDIA A10G",  # another card than the A10
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",  # a slice has a part of the peak
        "cpu",
        "",
    ],
)
def test_no_peak_for_other_cards(name: str) -> None:
    assert peak_flops(name) is None


def test_mfu_is_used_over_possible_flops() -> None:
    # 10 471 tokens/s at 48.2 GFLOP each on an H200.
    assert mfu(10_471, 48.2e9, 989e12) == pytest.approx(0.5103, abs=1e-4)


def test_no_speed_before_the_first_step() -> None:
    timer = StepTimer()
    assert (timer.tokens_per_s(), timer.step_s(), timer.time_left_s(5)) == (None, None, None)


def test_slow_first_steps_are_dropped_once_there_are_others() -> None:
    timer = StepTimer()
    timer.add(60.0, 1000)
    timer.add(20.0, 1000)
    assert timer.tokens_per_s() == pytest.approx(25.0)
    timer.add(0.5, 1000)
    assert timer.tokens_per_s() == pytest.approx(2000.0)
    assert timer.step_s() == pytest.approx(0.5)


def test_speed_is_total_tokens_over_total_time() -> None:
    timer = StepTimer()
    for duration, tokens in ((9, 1), (9, 1), (1, 100), (3, 100)):
        timer.add(duration, tokens)
    assert timer.tokens_per_s() == pytest.approx(50.0)
    assert timer.time_left_s(10) == pytest.approx(20.0)
    assert timer.time_left_s(-1) == 0


def test_the_window_forgets_old_steps() -> None:
    timer = StepTimer()
    for _ in range(2 + WINDOW_STEPS):
        timer.add(1.0, 10)
    for _ in range(WINDOW_STEPS):
        timer.add(2.0, 10)
    assert timer.tokens_per_s() == pytest.approx(5.0)
