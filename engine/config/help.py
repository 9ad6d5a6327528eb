"""The text of `--help`, made from the schema and the YAML folders so that it cannot go stale."""

from __future__ import annotations

import re
import textwrap
from enum import Enum
from pathlib import Path

from engine.config.options import Option, is_missing, options, sections
from engine.config.overrides import FLAGS, choices, groups

_USAGE = """\
usage: python -m engine.train [group=choice ...] [section.option=value ...]

`deepspeed --module engine.train`, `torchrun -m engine.train` and `srun python -m engine.train` take the same words."""


def help_text(folder: Path) -> str:
    """Usage, groups with their choices, and every option with type, default and the first sentence of its docstring."""
    parts = [_USAGE, f"Flags: {', '.join(FLAGS)}", "", "Groups (group=choice):"]
    for group in groups(folder):
        parts += textwrap.wrap(
            f"{group:<11} {', '.join(choices(folder, group))}", 110, initial_indent="  ", subsequent_indent=" " * 14
        )
    for name, cls in sections().items():
        parts += ["", f"{name}: {_first_sentence(cls.__doc__ or '')}"]
        for option in options().values():
            if option.path.startswith(f"{name}."):
                parts += _option_lines(option)
    return "\n".join(parts) + "\n"


def _option_lines(option: Option) -> list[str]:
    default = "must be set" if is_missing(option) else f"default {_shown(option.default)}"
    head = f"  {option.path} ({option.words}; {default})"
    text = _first_sentence(option.doc)
    return [head, *textwrap.wrap(text, 110, initial_indent=" " * 6, subsequent_indent=" " * 6)]


def _shown(default: object) -> str:
    if default is None:
        return "null"
    if isinstance(default, bool):
        return str(default).lower()
    return default.name if isinstance(default, Enum) else str(default)


def _first_sentence(text: str) -> str:
    flat = " ".join(text.split())
    match = re.match(r".+?[.](?= [A-Z]|$)", flat)
    return match[0] if match else flat
