"""Whether a source is a Megatron prefix, and whether its files changed. Reads no content."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path


def is_prefix(source: str) -> bool:
    """Whether `source` is PREFIX of PREFIX.bin and PREFIX.idx."""
    return all(os.path.isfile(f"{source}{suffix}") for suffix in (".bin", ".idx"))


def prefix_fingerprint(source: str) -> str:
    """Changes with the place, the sizes and the times of modification of both files."""
    facts: list[object] = [str(Path(source).absolute())]
    for suffix in (".bin", ".idx"):
        info = Path(f"{source}{suffix}").stat()
        facts += [info.st_size, info.st_mtime_ns]
    return hashlib.blake2b(json.dumps(facts).encode(), digest_size=16).hexdigest()
