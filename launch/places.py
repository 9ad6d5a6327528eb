"""Templates with places written ${NAME}; every other dollar belongs to the shell."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from string import Template


class Places(Template):
    """`string.Template` that knows only ${CAPITALS}, so that a template is a script to read and to copy."""

    pattern = r"\$(?:\{(?P<braced>[A-Z_]+)\}|(?P<named>(?!))|(?P<escaped>(?!))|(?P<invalid>(?!)))"  # type: ignore[assignment]


def render(template: Path, values: Mapping[str, str | None]) -> str:
    """The text of `template` with its places filled; a line with a place whose value is None is left out.

    Raises:
        KeyError: the template has a place that `values` does not name.
    """
    absent = [f"${{{name}}}" for name, value in values.items() if value is None]
    lines = template.read_text().splitlines(keepends=True)
    kept = "".join(line for line in lines if not any(place in line for place in absent))
    return Places(kept).substitute({name: value for name, value in values.items() if value is not None})
