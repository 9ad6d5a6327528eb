"""What is known of a device: the presets of `conf/hardware/`, found by the device's name or by their own."""

from __future__ import annotations

import dataclasses
import functools
import re

import yaml  # type: ignore[import-untyped]

from engine.config.load import conf_dir
from engine.config.schema_hardware import HardwareConfig

AUTO = "auto"
GIB = 2**30
_MARGIN = 0.05


@functools.cache
def presets() -> dict[str, HardwareConfig]:
    """Every preset of `conf/hardware/` but `auto`, by name."""
    found = {}
    for path in sorted((conf_dir() / "hardware").glob("*.yaml")):
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        del values["defaults"]
        found[path.stem] = HardwareConfig(**values)
    del found[AUTO]
    return found


def preset_of(device_name: str) -> HardwareConfig | None:
    """The preset of the device that `torch.cuda.get_device_name` calls `device_name`.

    None for an unknown card and for a slice of a card (MIG): no figure is better than a wrong one.
    """
    name = device_name.strip().removeprefix("NVIDIA ")
    known = presets().values()
    return next((found for found in known if found.pattern is not None and re.fullmatch(found.pattern, name)), None)


def resolve(asked: HardwareConfig, device_name: str | None) -> HardwareConfig:
    """What holds on a device of this name (None: the CPU): `asked`, or with `hardware=auto` the device's preset under
    the values that are set beside it.
    """
    if asked.name != AUTO:
        return asked
    found = presets()["cpu"] if device_name is None else preset_of(device_name) or HardwareConfig()
    given = {key: value for key, value in dataclasses.asdict(asked).items() if value is not None and key != "name"}
    return dataclasses.replace(found, **given)


def margin_bytes(hardware: HardwareConfig, memory: int) -> int:
    """Bytes of a device with `memory` bytes that are left free: `hardware.margin_gib`, or 5 % of them."""
    return round(memory * _MARGIN if hardware.margin_gib is None else hardware.margin_gib * GIB)


def stated_bytes(hardware: HardwareConfig) -> int | None:
    """`hardware.memory_gib` in bytes."""
    return None if hardware.memory_gib is None else round(hardware.memory_gib * GIB)
