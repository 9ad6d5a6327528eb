"""The longest single sequence that trains two steps on this device.

python -m benchmarks.memory.longest OUT_FOLDER --commit HASH [--start 32768] [--most N] [--multiple 8192]
    [--lengths A,B,...] [--budget-s S] [overrides of engine.train, such as experiment=llama_8b_long_h200]

Lengths are doubled until the device runs out of memory, and the gap is then halved; --lengths tries these alone. Each
try is a process of its own; running out of memory, on the device or on the host, is an answer. The search ends after
--budget-s seconds. Writes rows.jsonl: for each try its peak memory beside the plan's, and its speed in the second step;
then the longest length that passed.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.memory.run import in_process
from benchmarks.rows import append, row
from engine.config.load import config_hash, load
from engine.plan.memory import memory as expected_memory

FIXED = [
    "train.steps=2",
    "train.micro_batch=1",
    "train.accum_steps=1",
    "train.eval_batches=0",
    "checkpoint.save_final=false",
    "run.name=longest",
]
_GIB = 2.0**30


@dataclass(slots=True)
class Lengths:
    """Which length to try next, a multiple of `multiple` up to `most`: doubling from `start`, then halving the gap."""

    start: int
    most: int | None
    multiple: int
    passed: int = 0
    failed: int | None = None

    def __iter__(self) -> Iterator[int]:
        while (length := self._next()) is not None:
            yield length

    def _next(self) -> int | None:
        if self.failed is None:
            length = max(self.start, 2 * self.passed)
            if self.most is not None:
                length = min(length, self.most)
        else:
            length = (self.passed + self.failed) // 2
        length = length // self.multiple * self.multiple
        return length if length > self.passed else None

    def tell(self, length: int, *, fits: bool) -> None:
        """What came of a try."""
        if fits:
            self.passed = max(self.passed, length)
        else:
            self.failed = length if self.failed is None else min(length, self.failed)


def words_of(overrides: Sequence[str], length: int) -> list[str]:
    """Overrides of a try."""
    return [*FIXED, *overrides, f"data.seq_len={length}", f"model.max_positions={length}"]


def attempt(words: list[str], out: Path, timeout_s: float | None) -> dict[str, Any]:
    """One try in its own process: what `benchmarks.memory.measure` found; a kill by the kernel is no memory left."""
    # Blocks of several GiB leave gaps that only segments that grow can fill again.
    env = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", **os.environ}
    try:
        return in_process(words, out, timeout_s, env)
    except subprocess.CalledProcessError as error:
        if error.returncode != -signal.SIGKILL:
            raise SystemExit(f"{error}:\n{error.output}") from None
        return {"out_of_memory": "the host's memory: killed", "peak_bytes": 0, "host_peak_bytes": 0}


def main(argv: list[str], measure: Callable[[list[str], Path, float | None], dict[str, Any]] = attempt) -> int:
    """0 if a length has passed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--commit", required=True)
    parser.add_argument("--start", type=int, default=32768)
    parser.add_argument("--most", type=int)
    parser.add_argument("--multiple", type=int, default=8192)
    parser.add_argument("--lengths", type=lambda text: [int(word) for word in text.split(",")])
    parser.add_argument("--budget-s", type=float)
    options, overrides = parser.parse_known_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    lengths = Lengths(options.start, options.most, options.multiple)
    begun = time.perf_counter()
    for length in options.lengths or lengths:
        left = None if options.budget_s is None else options.budget_s - (time.perf_counter() - begun)
        words = words_of(overrides, length)
        try:
            found = measure(words, options.out, left)
        except subprocess.TimeoutExpired:
            print(f"{length:,} tokens: not done in the {left:.0f} s that were left")
            break
        lengths.tell(length, fits="out_of_memory" not in found)
        append(options.out / "rows.jsonl", _rows(words, length, found, options.commit))
    if lengths.passed:
        facts = _facts(words_of(overrides, lengths.passed), options.commit)
        values = [float(lengths.passed)] * 2
        final = row(metric="longest sequence", unit="tokens", values=values, too_long=lengths.failed, **facts)
        append(options.out / "rows.jsonl", [final])
    print(f"longest: {lengths.passed:,} tokens; too long: {lengths.failed}")
    return 0 if lengths.passed else 1


def _facts(words: list[str], commit: str) -> dict[str, Any]:
    cfg = load(words)
    return {
        "case": f"{cfg.model.name} one sequence",
        "system": f"octant, recompute {cfg.train.recompute}, tiles {cfg.train.tiles}",
        "hardware": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "CPU",
        "commit": commit,
        "config_hash": config_hash(cfg),
        "command": f"python -m benchmarks.memory.measure OUT.json {' '.join(words)}",
        "seq_len": cfg.data.seq_len,
    }


def _rows(words: list[str], length: int, found: dict[str, Any], commit: str) -> list[dict[str, Any]]:
    """Peak memory of a try, and its speed if it passed."""
    arithmetic = expected_memory(load(words), 1, 0)
    expected = {name: value / _GIB for name, value in asdict(arithmetic).items()} | {"device": arithmetic.total / _GIB}
    facts, peak = _facts(words, commit), found["peak_bytes"] / _GIB
    entries = [
        row(
            metric="peak device memory",
            unit="GiB",
            values=[peak, peak],
            expected_gib=expected,
            host_peak_gib=found["host_peak_bytes"] / _GIB,
            build_peak_gib=found.get("build_peak_bytes", 0) / _GIB,
            out_of_memory=found.get("out_of_memory"),
            **facts,
        )
    ]
    said = found.get("out_of_memory")
    if said is None:
        speed = length / found["step_s"][-1]
        entries.append(row(metric="speed", unit="tokens/s", values=[speed] * 2, losses=found["losses"], **facts))
        said = f"{speed:,.0f} tokens/s"
    print(f"{length:,} tokens: peak {peak:.1f} GiB, by arithmetic {expected['device']:.1f}; {said}", flush=True)
    return entries


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
