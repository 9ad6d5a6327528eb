"""The learning rate at the corners of each shape."""

from __future__ import annotations

import math

import pytest
import torch

from engine.config import OptimConfig, ScheduleName
from engine.optim.schedule import learning_rate, set_learning_rate


def rates(schedule: ScheduleName, total: int = 100, **options: float | int | None) -> list[float]:
    cfg = OptimConfig(lr=2.0, schedule=schedule, **{"warmup_steps": 10, "min_lr_ratio": 0.1, **options})
    return [learning_rate(cfg, step, total) for step in range(total + 20)]


@pytest.mark.parametrize("schedule", list(ScheduleName))
def test_warm_up_rises_from_one_part_to_the_peak(schedule: ScheduleName) -> None:
    found = rates(schedule)
    assert found[:10] == pytest.approx([2.0 * (i + 1) / 10 for i in range(10)])
    assert found[10] == 2.0, "the schedule starts at the peak"


@pytest.mark.parametrize("schedule", list(ScheduleName))
def test_without_warm_up_the_first_step_is_at_the_peak(schedule: ScheduleName) -> None:
    assert rates(schedule, warmup_steps=0)[0] == 2.0


def test_warm_up_that_is_not_set_takes_a_twentieth() -> None:
    found = rates(ScheduleName.constant, warmup_steps=None)
    assert found[:6] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0, 2.0])


@pytest.mark.parametrize(
    ("schedule", "quarter", "half", "end"),
    [
        (ScheduleName.cosine, 0.2 + 1.8 * 0.5 * (1 + math.sqrt(0.5)), 1.1, 0.2),
        (ScheduleName.linear, 0.2 + 1.8 * 0.75, 1.1, 0.2),
        (ScheduleName.constant, 2.0, 2.0, 2.0),
    ],
)
def test_decay_at_its_quarter_half_and_end(schedule: ScheduleName, quarter: float, half: float, end: float) -> None:
    found = rates(schedule, warmup_steps=20)
    assert (found[40], found[60], found[100]) == pytest.approx((quarter, half, end))
    assert found[100:] == pytest.approx([end] * 20), "flat after the end"
    assert found[99] > end or schedule is ScheduleName.constant


@pytest.mark.parametrize("schedule", [ScheduleName.cosine, ScheduleName.linear])
def test_decay_can_end_before_or_after_training(schedule: ScheduleName) -> None:
    early = rates(schedule, decay_steps=50)
    assert early[49] > early[50]
    assert early[50:] == pytest.approx([0.2] * 70)
    late = rates(schedule, decay_steps=110)
    assert late[60] == pytest.approx(1.1)
    assert late[99] > 0.2
    assert late[110] == pytest.approx(0.2)


@pytest.mark.parametrize("schedule", [ScheduleName.cosine, ScheduleName.linear])
def test_the_floor_is_a_share_of_the_peak(schedule: ScheduleName) -> None:
    assert rates(schedule, min_lr_ratio=0.0)[100] == pytest.approx(0.0, abs=1e-15)
    assert rates(schedule, min_lr_ratio=1.0)[10:] == pytest.approx([2.0] * 110)


@pytest.mark.parametrize("schedule", list(ScheduleName))
def test_the_rate_never_rises_after_the_warm_up_nor_passes_the_peak(schedule: ScheduleName) -> None:
    found = rates(schedule)
    assert max(found) == 2.0
    assert found[10:] == sorted(found[10:], reverse=True)


def test_a_run_that_is_all_warm_up_divides_by_nothing() -> None:
    assert rates(ScheduleName.cosine, total=10)[9] == 2.0
    assert rates(ScheduleName.cosine, total=1, warmup_steps=None)[0] == 2.0


def test_inverse_sqrt_falls_with_the_root_of_the_step() -> None:
    found = rates(ScheduleName.inverse_sqrt)
    assert (found[40], found[90]) == pytest.approx((1.0, 2.0 / 3))
    assert found[119] == pytest.approx(2.0 * math.sqrt(10 / 119)), "it goes on past the end of the run"


def test_inverse_sqrt_without_warm_up_counts_from_the_first_step() -> None:
    found = rates(ScheduleName.inverse_sqrt, warmup_steps=0)
    assert found[:4] == pytest.approx([2.0, 2.0 / math.sqrt(2), 2.0 / math.sqrt(3), 1.0])


def test_wsd_is_stable_and_falls_in_its_last_steps() -> None:
    found = rates(ScheduleName.wsd, cooldown_steps=20)
    assert found[10:81] == [2.0] * 71
    assert found[81] < 2.0
    assert (found[85], found[90], found[100]) == pytest.approx((2.0 - 1.8 / 4, 1.1, 0.2))
    assert found[100:] == pytest.approx([0.2] * 20)


def test_wsd_that_sets_no_cooldown_takes_a_tenth() -> None:
    found = rates(ScheduleName.wsd)
    assert (found[90], found[95], found[100]) == pytest.approx((2.0, 1.1, 0.2))


@pytest.mark.parametrize(("cooldown", "last_stable"), [(0, 99), (500, 10)])
def test_a_cooldown_of_nothing_or_of_more_than_the_run(cooldown: int, last_stable: int) -> None:
    found = rates(ScheduleName.wsd, cooldown_steps=cooldown)
    assert found[last_stable] == 2.0
    assert found[last_stable + 1] < 2.0
    assert found[100] == pytest.approx(0.2)


def test_wsd_can_cool_down_before_training_ends() -> None:
    found = rates(ScheduleName.wsd, cooldown_steps=20, decay_steps=60)
    assert (found[40], found[50], found[60], found[99]) == pytest.approx((2.0, 1.1, 0.2, 0.2))


def test_each_group_has_its_own_share_of_the_rate() -> None:
    weights = [torch.zeros(1, requires_grad=True) for _ in range(2)]
    groups = [{"params": [w], "lr_scale": scale} for w, scale in zip(weights, (1.0, 0.25), strict=True)]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    set_learning_rate(optimizer, 0.8)
    set_learning_rate(optimizer, 0.4)
    for weight in weights:
        weight.grad = torch.ones(1)
    optimizer.step()
    assert [float(w.detach()) for w in weights] == pytest.approx([-0.4, -0.1])
