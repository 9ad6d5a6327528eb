"""Presets of devices: found by name, with values set beside them on top, and each value with its source."""

from __future__ import annotations

import re

import pytest

from engine.config import rules
from engine.config.hardware import GIB, margin_bytes, preset_of, presets, resolve, stated_bytes
from engine.config.load import config_hash, load
from engine.config.schema_hardware import HardwareConfig
from tests.helpers.configs import make
from tests.helpers.repo import ROOT


def test_each_card_is_one_preset_s_alone() -> None:
    names = ["H200", "H200 NVL", "H100 80GB HBM3", "H100 PCIe", "A100-SXM4-40GB", "A100-SXM4-80GB", "L4", "L40", "L40S"]
    for name in names:
        found = [key for key, preset in presets().items() if preset.pattern and re.fullmatch(preset.pattern, name)]
        assert len(found) == 1, (name, found)
    assert len({found.name for found in map(preset_of, names) if found is not None}) == len(names)


def test_a_preset_is_named_as_its_file_and_every_fact_of_a_gpu_but_the_host_s_is_stated() -> None:
    for name, preset in presets().items():
        assert preset.name == name
        if name != "cpu":
            facts = (preset.pattern, preset.memory_gib, preset.bf16_tflops, preset.memory_gb_s, preset.link_gb_s)
            assert all(facts), name


def test_every_figure_has_its_source_beside_it() -> None:
    for path in (ROOT / "conf" / "hardware").glob("*.yaml"):
        lines = [line for line in path.read_text().splitlines() if re.match(r"\w+: [\d.]+", line)]
        assert [line for line in lines if "  # " not in line] == [], path.name
        assert not lines or "Source" in path.read_text().splitlines()[1]


def test_auto_takes_the_device_s_preset_and_what_is_set_beside_it_wins() -> None:
    found = resolve(HardwareConfig(memory_gib=40.0), "NVIDIA H200")
    assert (found.name, found.memory_gib, found.bf16_tflops) == ("h200", 40.0, 989.0)
    assert resolve(HardwareConfig(), None).name == "cpu"
    assert resolve(HardwareConfig(margin_gib=1.0), "NVIDIA T1000") == HardwareConfig(margin_gib=1.0)


def test_a_stated_preset_holds_on_every_machine() -> None:
    asked = load(["hardware=h200"]).hardware
    assert asked == presets()["h200"]
    assert resolve(asked, None) == resolve(asked, "NVIDIA L4") == asked


def test_five_percent_stay_free_unless_the_margin_is_set() -> None:
    assert margin_bytes(HardwareConfig(), 100 * GIB) == 5 * GIB
    assert margin_bytes(HardwareConfig(margin_gib=0.5), 100 * GIB) == GIB // 2
    assert stated_bytes(HardwareConfig(memory_gib=1.5)) == 3 * GIB // 2
    assert stated_bytes(HardwareConfig()) is None


def test_the_device_is_no_part_of_what_is_trained() -> None:
    assert config_hash(make(hardware__name="h200", hardware__memory_gib=139.8)) == config_hash(make())


@pytest.mark.parametrize(("option", "value"), [("memory_gib", 0.0), ("bf16_tflops", -1.0), ("margin_gib", -0.5)])
def test_impossible_figures_are_refused(option: str, value: float) -> None:
    [found] = rules.check(make(**{f"hardware__{option}": value}), 1)
    assert (found.code, found.option, found.value) == (301, f"hardware.{option}", value)
