"""Where the rows of one run go: the facts that all share are gathered once, and every row is on disk when written."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks.rows import append, percentiles, row

PEERS = ("liger-kernel", "flash-attn-4", "flash-attn")
"""Distributions of other kernels; a version of those that are installed stands in each row."""


@dataclass(frozen=True)
class Sheet:
    """Rows of one command."""

    path: Path
    commit: str
    command: str
    device: torch.device
    quick: bool

    @classmethod
    def open(cls, folder: Path, commit: str, words: Sequence[str], device: torch.device, *, quick: bool) -> Sheet:
        """Rows go to `rows.jsonl` in `folder`, after those that are there. `words`: of the command, less the folder."""
        folder.mkdir(parents=True, exist_ok=True)
        command = f"python -m benchmarks.kernels.run OUT_FOLDER {shlex.join(words)}"
        return cls(folder / "rows.jsonl", commit, command, device, quick)

    def add(
        self, case: str, system: str, metric: str, unit: str, values: Sequence[float], **facts: Any
    ) -> dict[str, Any]:
        """Write one figure; a single value is its own p20, p50 and p80."""
        spread = percentiles(values if len(values) > 1 else [*values, *values])
        head = {"case": case, "system": system, "metric": metric, "unit": unit, **spread, "n": len(values)}
        entry = {**self._around, **head, **facts}
        append(self.path, [entry])
        return entry

    def unavailable(self, case: str, system: str, reason: str, **facts: Any) -> None:
        """Write that `system` has no figure for `case`, and why."""
        around = {key: value for key, value in self._around.items() if key not in ("p20", "p50", "p80", "n")}
        head = {"case": case, "system": system, "metric": "unavailable", "unit": "", "values": {}}
        append(self.path, [{**around, **head, **facts, "unavailable": reason}])
        print(f"  {system}: unavailable: {reason}", flush=True)

    @cached_property
    def _around(self) -> dict[str, Any]:
        """A row without its figure. Its facts are read once: git and the devices are asked for them."""
        cuda = self.device.type == "cuda"
        base = row(
            case="",
            system="",
            metric="",
            unit="",
            values=[0.0, 0.0],
            hardware=torch.cuda.get_device_name(self.device) if cuda else "CPU",
            commit=self.commit,
            command=self.command,
            architecture=architecture(self.device),
            quick=self.quick,
        )
        base["versions"] |= {"cudnn": torch.backends.cudnn.version() if cuda else None, **_installed(PEERS)}
        return base


def architecture(device: torch.device) -> str:
    """`sm90` for compute capability 9.0, `cpu` without a GPU."""
    if device.type != "cuda":
        return "cpu"
    return "sm{}{}".format(*torch.cuda.get_device_capability(device))


def _installed(names: Sequence[str]) -> dict[str, str]:
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
