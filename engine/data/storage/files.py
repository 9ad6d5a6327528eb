"""Files that are either complete under their name or absent: temporary name, sync, rename."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any


def temporary_name(path: Path) -> Path:
    """The name beside `path` under which it is written."""
    return path.with_name(f"{path.name}.tmp")


def replace(temporary: Path, path: Path) -> None:
    """Sync the closed file `temporary` and rename it to `path` in one step, over what is there. Raises OSError."""
    _sync(temporary)
    os.replace(temporary, path)
    # Not every network file system can sync a folder; a rename that a power cut undoes leaves the file absent.
    with suppress(OSError):
        _sync(path.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, content: object) -> None:
    """Write `content` to `path`, whole or not at all. Raises OSError."""
    temporary = temporary_name(path)
    try:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises OSError or ValueError."""
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError("not a JSON object")
    return content
