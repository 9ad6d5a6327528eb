"""What the commands of `python -m engine.data` share: words of the command line, errors, and JSON files."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from engine.config import entry
from engine.config.bounds import bound_violations
from engine.config.load import load
from engine.config.rules_data import source_violations
from engine.config.schema import Config
from engine.config.schema_data import DataConfig
from engine.data.build.cache import RANDOM_SOURCE, entries, read_meta
from engine.data.build.prepare import prepare
from engine.errors import ConfigError, DataError

WIDTH = 120
"""Columns of what is printed."""
Work = Callable[[argparse.Namespace, list[str]], int]


def parser_of(command: str, description: str, words: str = "") -> argparse.ArgumentParser:
    """A parser whose help names all defaults, and what the words mean that are not its own."""
    return argparse.ArgumentParser(
        prog=f"python -m engine.data {command}",
        usage=f"python -m engine.data {command} [option ...] [group=choice ...] [option=value ...] {words}".rstrip(),
        description=description,
        epilog="The words without dashes are those of training (`python -m engine.train --help` lists them); `data.` "
        "may be left out: data=text source=texts vocab_size=8000",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )


def run(parser: argparse.ArgumentParser, argv: Sequence[str], work: Work) -> int:
    """`work(options, other words)`, with refusals on stderr. Exit code: that of `work`, 2 refused, 130 interrupted."""
    try:
        options, words = parser.parse_known_args(list(argv))
    except SystemExit as ended:  # argparse: help was printed, or what is wrong with an option
        return ended.code if isinstance(ended.code, int) else 2
    return entry.run(lambda: work(options, words))


def data_config(argv: Sequence[str]) -> DataConfig:
    """The data section that training would get from these words; `data.` may be left out before its options.

    Raises ConfigError as `engine.config.load`, for numbers of the section outside their range and for sources that do
    not fit together; HelpRequested.
    """
    return full_config(argv, ("data.",)).data


def full_config(argv: Sequence[str], checked: tuple[str, ...] = ("data.", "model.")) -> Config:
    """As `data_config`, all sections; those of `checked` have their numbers within range."""
    names = "|".join(field.name for field in fields(DataConfig))
    cfg = load([re.sub(rf"^(\+*)({names})(?=[.=])", r"\1data.\2", word) for word in argv])
    bounds = [violation for violation in bound_violations(cfg) if violation.option.startswith(checked)]
    # What is wrong with the weights may be a number out of all range: one message of it is enough.
    broken = bounds or source_violations(cfg)
    if broken:
        raise ConfigError(broken)
    return cfg


def within(option: str, value: float, low: float, high: float) -> None:
    """Raises DataError 471 when the number of a command's option is not in `low` .. `high`."""
    if not low <= value <= high:
        nearest = min(max(value, low), high) if value == value else low
        rule = f"it must be from {low:,} to {high:,}"
        raise DataError.of(471, option, value, rule, f"Nearest legal: {option} {nearest}")


def require_corpus(cfg: DataConfig, what: str) -> None:
    """Raises DataError 473 for random tokens, which have no documents and no files."""
    if cfg.source == RANDOM_SOURCE and not cfg.blend:
        rule = f"random tokens are made when they are read, and have no {what}"
        raise DataError.of(473, "data.source", cfg.source, rule, "Use another source, such as data.source=python")


def ready(cfg: DataConfig) -> None:
    """Build what was never built, as training would; what is there is used as it is (`verify` reads all of it)."""
    try:
        for folder, _ in entries(cfg):
            read_meta(folder)
    except DataError as error:
        if error.violations[0].code != 412:
            raise
        prepare(cfg, lambda line: print(line, file=sys.stderr, flush=True))


def write_report(path: Path, content: dict[str, Any]) -> None:
    """Write `content` as JSON for `--json`. Raises DataError 474."""
    with_folder(path, "--json", lambda: path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8"))
    print(f"wrote {path}")


def with_folder(path: Path, option: str, write: Callable[[], object]) -> None:
    """Make the folder of `path` and call `write`. Raises DataError 474 about `option` when that fails."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write()
    except OSError as error:
        way_out = "Give a file in a folder that can be written"
        raise DataError.of(474, option, path, f"it cannot be written ({error})", way_out) from error
