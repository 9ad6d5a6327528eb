"""The rate of a partly offloaded optimizer."""

from __future__ import annotations

from types import SimpleNamespace

from engine.runtime.offload import set_rate


def test_the_part_that_stays_on_the_gpu_follows_the_schedule_too() -> None:
    shared = {"lr": 1.0, "lr_scale": 0.5}
    backup = SimpleNamespace(param_groups=[{"lr": 1.0}, shared])
    optimizer = SimpleNamespace(param_groups=[{"lr": 1.0, "lr_scale": 1.0}, shared], backup_optimizer=backup)
    set_rate(optimizer, 0.1)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.05]
    assert [group["lr"] for group in backup.param_groups] == [0.1, 0.05]


def test_without_such_a_part_only_the_optimizer_is_set() -> None:
    optimizer = SimpleNamespace(param_groups=[{"lr": 1.0, "lr_scale": 2.0}])
    set_rate(optimizer, 0.1)
    assert optimizer.param_groups[0]["lr"] == 0.2
