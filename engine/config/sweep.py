"""The command line of several runs: which options take which values, in Hydra's grammar for sweeps.

Beside Hydra's `1,2`, `choice(1,2)`, `range(1,4)`, `glob(*)`, `interval(0,1)` and `tag(log,interval(1e-5,1e-2))` there
is `log(1e-5,1e-2)` for the last of them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, IntervalSweep, Override, Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import OmegaConf

from engine.config import overrides
from engine.config.load import conf_dir, load, to_dict
from engine.config.options import find
from engine.config.schema import Config
from engine.errors import ConfigError

APART = ("search", "launch", "run")
"""Sections that say how runs are started and where they go: a run inside a search is given its own."""
_LOG = re.compile(r"=log\((.*)\)$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """An option and its values: either `choices`, or the numbers from `low` to `high`."""

    option: str
    """An option such as `optim.lr`, or a group such as `parallel`."""
    choices: tuple[str, ...] = ()
    """As typed on the command line."""
    low: float = math.nan
    high: float = math.nan
    log: bool = False
    """Equal ratios are equally likely, not equal differences."""
    integer: bool = False

    def word(self, value: object) -> str:
        """The override that sets `value`."""
        return f"{self.option}={value!r}" if isinstance(value, float) else f"{self.option}={value}"

    @property
    def first(self) -> str:
        """An override with one of the values."""
        if self.choices:
            return self.word(self.choices[0])
        return self.word(int(self.low) if self.integer else self.low)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """A command line taken apart, and the configuration of its first run."""

    words: tuple[str, ...]
    """Overrides that all runs share, without those of `APART`."""
    axes: tuple[Axis, ...]
    cfg: Config


def read(argv: Sequence[str], folder: Path | None = None) -> Sweep:
    """Take the words after `python -m engine.train -m` apart.

    Raises:
        ConfigError: 571 an option that a search sets itself, 581 values that cannot be read, 582 an empty range; else
            as `load` does.
        HelpRequested: as `load` does.
    """
    folder = conf_dir() if folder is None else folder
    single, axes = [], list[Axis]()
    for text in argv:
        override = None if text.startswith("-") else _parsed(text)
        if override is None or not override.is_sweep_override():
            single.append(text)
        else:
            axes.append(_axis(override, text, folder))
    cfg = load([*single, *(axis.first for axis in axes)], folder=folder)
    typed = {axis.option for axis in axes}
    spaced = [axis_of(key, text, folder) for key, text in cfg.search.space.items() if key not in typed]
    if spaced:
        axes += spaced
        cfg = load([*single, *(axis.first for axis in axes)], folder=folder)
    words = tuple(text for text in single if not text.startswith("-") and section_of(text) not in APART)
    return Sweep(words=words, axes=tuple(axes), cfg=cfg)


def section_of(word: str) -> str:
    """Section or group that an override is about."""
    return word.lstrip("+~").partition("=")[0].partition(".")[0]


def axis_of(option: str, text: str, folder: Path) -> Axis:
    """The axis that `search.space.<option>=<text>` means. Raises as `read` does."""
    override = _parsed(f"{option}={text}")
    if override is None or not override.is_sweep_override():
        way_out = "Write log(1e-5,1e-2), interval(0,0.2), range(1,4), choice(1,2) or 1,2"
        rule = "these are not several values"
        raise ConfigError.of(581, f"search.space.{option}", text, rule, way_out)
    return _axis(override, f"{option}={text}", folder)


def _parsed(text: str) -> Override | None:
    """The override; None when Hydra cannot read it, which `load` then says."""
    try:
        return OverridesParser.create().parse_override(_LOG.sub(r"=tag(log,interval(\1))", text))
    except HydraException:
        return None


def _axis(override: Override, text: str, folder: Path) -> Axis:
    option, given = override.key_or_group, text.partition("=")[2]
    if section_of(option) in APART:
        rule = "a search sets it for each of its runs" if option.startswith("run") else "all runs of a search share it"
        raise ConfigError.of(571, option, given, rule, f"Give {option} one value, or leave it out")
    value: Any = override.value()
    if isinstance(value, Glob):
        names = value.filter(overrides.choices(folder, option))
        if not names:
            known = ", ".join(overrides.choices(folder, option))
            raise ConfigError.of(581, option, given, "no choice has such a name", f"Known: {known}")
        return Axis(option=option, choices=tuple(names))
    if not isinstance(value, IntervalSweep):
        return Axis(option=option, choices=tuple(map(str, override.sweep_string_iterator())))
    low, high, log = float(value.start or 0.0), float(value.end or 0.0), "log" in value.tags
    if not low < high or (log and low <= 0):
        rule = "a logarithmic range begins above 0 and rises" if log else "a range rises"
        if log:
            way_out = f"Use {option}=log({low if low > 0 else 1e-5:g},{high if high > max(low, 1e-5) else 1e-2:g})"
        else:
            way_out = f"Use {option}=interval({high:g},{low:g})" if high < low else "Give two different numbers"
        raise ConfigError.of(582, option, given, rule, way_out)
    found = find(option)
    integer = found is not None and "an integer" in found.words
    return Axis(option=option, low=low, high=high, log=log, integer=integer)


def quoted(option: str, value: str) -> str:
    """The override that sets a text with whatever signs it has."""
    return f"{option}={QuotedString(value, quote=Quote.single).with_quotes()}"


def differences(words: Sequence[str], folder: Path | None = None) -> str:
    """YAML of an experiment that composes to what `words` do: the options that differ from the defaults.

    `run`, `search` and `launch` stay out. Raises as `load` does.
    """
    plain, ours = to_dict(load([], folder=folder)), to_dict(load(words, folder=folder))
    changed = {
        section: {key: value for key, value in values.items() if value != plain[section][key]}
        for section, values in ours.items()
        if section not in APART
    }
    return OmegaConf.to_yaml(OmegaConf.create({section: values for section, values in changed.items() if values}))
