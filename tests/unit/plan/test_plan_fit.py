"""Does it fit, with how much room, and what would help."""

from __future__ import annotations

import re

import pytest

from engine.config import rules
from engine.config.enums import Offload, Recompute
from engine.config.hardware import presets
from engine.config.load import load
from engine.config.schema_hardware import HardwareConfig
from engine.plan.__main__ import main
from engine.plan.fit import (
    GIB,
    budget_bytes,
    peak_bytes,
    predicted,
    report,
    settle_offload,
    sizes,
    ways,
    with_micro_batch,
)
from engine.plan.memory import memory
from tests.helpers.configs import make

Capture = pytest.CaptureFixture[str]
BILLION = ["model=gpt_1_3b", "precision=bf16", "data.seq_len=2048", "train.micro_batch=8"]


def test_the_stage_that_holds_most_decides() -> None:
    cfg = make(parallel__pp=2, train__accum_steps=4)
    assert peak_bytes(cfg, 2) == max(memory(cfg, 2, stage).total for stage in (0, 1))


def test_the_budget_is_the_smaller_of_the_stated_and_the_real_memory_less_the_margin() -> None:
    assert budget_bytes(HardwareConfig(memory_gib=40.0), 80 * GIB) == 38 * GIB
    assert budget_bytes(HardwareConfig(memory_gib=100.0, margin_gib=1.0), 80 * GIB) == 79 * GIB
    assert budget_bytes(HardwareConfig(), 80 * GIB) == 76 * GIB


def test_the_largest_micro_batch_of_the_plan_is_the_last_below_the_budget() -> None:
    cfg = load([*BILLION, "train.micro_batch=auto"])
    among = sizes(cfg, 1, cpu=False)
    found = predicted(cfg, 1, among, 75 * GIB)
    above = among[among.index(found) + 1]
    assert peak_bytes(with_micro_batch(cfg, found), 1) <= 75 * GIB < peak_bytes(with_micro_batch(cfg, above), 1)
    assert predicted(cfg, 1, among, 1) == 1
    assert cfg.train.accum_steps == 1, "what is looked for leaves the config alone"


def test_a_limit_bounds_the_sizes_and_cpus_try_fewer() -> None:
    cfg = make()
    assert (sizes(cfg, 1, cpu=False)[-1], sizes(cfg, 1, cpu=True)[-1]) == (512, 16)
    cfg.train.micro_batch_limit = 5
    assert sizes(cfg, 1, cpu=False) == [1, 2, 3, 4]


def test_every_way_out_is_legal_and_saves_what_it_says() -> None:
    cfg = load([*BILLION, "train.accum_steps=2"])
    found = ways(cfg, 2)
    words = {way.words for way in found}
    assert "train.micro_batch=4 train.accum_steps=4" in words
    assert {"train.recompute=full", "zero.stage=2", "zero.stage=3", "zero.offload_optimizer=cpu"} <= words
    assert [way.saved for way in found] == sorted((way.saved for way in found), reverse=True)
    for way in found:
        changed = load([*BILLION, "train.accum_steps=2", *way.words.split()])
        assert rules.check(changed, 2) == []
        assert peak_bytes(cfg, 2) - peak_bytes(changed, 2) == way.saved > 0


def test_a_way_out_keeps_the_global_batch_and_the_rules_of_pipelines() -> None:
    cfg = load([*BILLION, "train.global_batch=32", "parallel.pp=2"])
    rules.require(cfg, 2)
    words = {way.words for way in ways(cfg, 2)}
    assert "train.micro_batch=4" in words
    assert not any("zero.stage=3" in one for one in words), "pipelines stop at ZeRO-2"


def test_what_is_done_already_is_no_way_out() -> None:
    done = {"train__recompute": Recompute.full, "zero__offload_optimizer": Offload.cpu, "train__micro_batch": 1}
    assert [way for way in ways(make(**done), 1) if "recompute" in way.words or "offload" in way.words] == []


def test_room_and_the_least_recomputation_are_told(capsys: Capture) -> None:
    assert main([*BILLION, "hardware=h100"]) == 0
    out = capsys.readouterr().out
    assert "hardware h100: 79.1 GiB, 989 TFLOP/s in bf16, 3350 GB/s of memory, 900 GB/s between devices" in out
    need = peak_bytes(load(BILLION), 1) / GIB
    room = 79.1 * 0.95 - need
    assert f"\nfits: {need:.2f} GiB of 79.10 GiB, {room:.2f} GiB of room beside a margin of 3.96 GiB\n" in out
    assert "of 75.14 GiB: train.recompute=none is the least that fits\n" in out


def test_selective_recomputation_comes_before_full() -> None:
    cfg = load([*BILLION, "kernels.attention=reference"])
    asked = []
    for total in (400.0, 90.0, 30.0, 20.0):
        *_, line = report(cfg, 1, HardwareConfig(name="x", memory_gib=total, margin_gib=0.0))
        asked.append(line.rpartition(": ")[2].split()[0])
    assert asked == ["train.recompute=none", "train.recompute=selective", "train.recompute=full", "none"]


def test_what_does_not_fit_is_told_what_helps(capsys: Capture) -> None:
    assert main([*BILLION, "hardware=a40", "hardware.margin_gib=2"]) == 0
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("does not fit: ")]
    need = peak_bytes(load(BILLION), 1) / GIB
    told = f"{need:.2f} GiB of 44.30 GiB, {need - 42.3:.2f} GiB too much beside a margin of 2.00 GiB"
    assert line.startswith(f"does not fit: {told}; enough: ")
    assert re.search(r"train\.recompute=full \(\d+\.\d\d GiB less by the plan\)", line)
    assert main([*BILLION, "hardware=l4"]) == 0
    assert "; nothing alone is enough: train.recompute=full (" in capsys.readouterr().out


def test_the_plan_expects_a_micro_batch_where_the_device_is_stated(capsys: Capture) -> None:
    words = [*BILLION[:-1], "train.micro_batch=auto", "train.global_batch=64", "hardware=h200", "--world=2"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert out.startswith("train.micro_batch=auto: by the plan 32 of 1, 2, 4, 8, 16, 32; training tries\n")
    assert "global batch: 64 samples" in out
    assert main([*BILLION[:-1], "train.micro_batch=auto"]) == 2
    err = capsys.readouterr().err
    assert "[OCT390] train.micro_batch=auto" in err
    assert "engine.plan expects one where a preset states the device, as hardware=h200 does" in err


def test_hosts_of_a_stated_device_are_as_large_as_its_preset_says(capsys: Capture) -> None:
    assert main([*BILLION, "hardware=h200", "zero=z1_offload", "zero.offload_ratio=1"]) == 0
    assert f"h200 hosts have {presets()['h200'].host_memory_gib:.1f} GiB" in capsys.readouterr().out


def test_the_least_share_that_fits_is_offloaded() -> None:
    words = [*BILLION, "zero=z1_offload", "train.accum_steps=2"]
    whole = peak_bytes(load([*words, "zero.offload_ratio=1"]), 1)
    none = peak_bytes(load([*BILLION, "zero=z1", "train.accum_steps=2"]), 1)
    for budget, share in ((none, 0.0), ((whole + none) // 2 + 1, 0.5), (whole - 1, 1.0)):
        cfg = load(words)
        said = settle_offload(cfg, 1, budget)
        assert cfg.zero.offload_ratio == share
        assert said is not None
        assert said.startswith(f"zero.offload_ratio={share:g} by the plan: then a device holds ")
    assert settle_offload(cfg, 1, budget) is None, "it is set"
    on_cpu = load(words)
    assert settle_offload(on_cpu, 1, None) is None
    assert on_cpu.zero.offload_ratio == 1.0
    plain = load([*words, "zero.offload_strategy=plain"])
    assert settle_offload(plain, 1, whole) is None
    assert plain.zero.offload_ratio is None


def test_the_plan_tells_the_share_where_the_device_is_stated(capsys: Capture) -> None:
    assert main([*BILLION, "zero=z1_offload", "hardware=h200"]) == 0
    assert "zero.offload_ratio=0 by the plan: then a device holds" in capsys.readouterr().out
