"""Peak memory and step time of a large model on one GPU, with the optimizer there and in host memory.

python -m benchmarks.memory.run OUT_FOLDER --commit HASH [--steps 6] [--places none,cpu] [overrides of engine.train]

By default GPT 6.7B in bf16, ZeRO-2, micro-batch 1, sequence 2048, full recomputation: by arithmetic 113 GiB on the
device, or 39 GiB there and 112 GiB in host memory. Host memory is not page-locked by default: torch rounds each locked
block up to a power of two, and ZeRO-2's blocks are whole parameter groups. Writes rows.jsonl.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.rows import append, row
from engine.config.load import config_hash, load
from engine.config.schema import Config
from engine.plan.memory import memory as expected_memory

WARMUP = 2
"""Steps left out of the times: allocator, autotuning, the first touch of host memory."""
WORDS = [
    "model=gpt_6_7b",
    "data=random",
    "data.seq_len=2048",
    "parallel=single",
    "zero=z2",
    "zero.pin_memory=false",
    "precision=bf16",
    "optim=adamw",
    "train.micro_batch=1",
    "train.accum_steps=1",
    "train.recompute=full",
    "train.eval_batches=0",
    "kernels.compile=off",
    "run.name=memory",
]
_GIB = 2.0**30


def main(argv: list[str]) -> None:
    """Measure each place of the optimizer in a process of its own."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--commit", required=True)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--places", default="none,cpu")
    options, overrides = parser.parse_known_args(argv)
    if options.steps < WARMUP + 2:
        parser.error(f"--steps {options.steps}: {WARMUP} warm up and at least two are measured")
    options.out.mkdir(parents=True, exist_ok=True)
    hardware = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "CPU"
    for place in options.places.split(","):
        words = [*WORDS, f"train.steps={options.steps}", f"zero.offload_optimizer={place}", *overrides]
        start = time.perf_counter()
        try:
            found = in_process(words, options.out)
        except subprocess.CalledProcessError as error:
            raise SystemExit(f"{error}:\n{error.output}") from None
        entries = _rows(load(words), words, found, hardware, options.commit)
        append(options.out / "rows.jsonl", entries)
        print(f"{place}: {time.perf_counter() - start:.0f} s in all", flush=True)


def in_process(
    words: list[str], out: Path, timeout_s: float | None = None, env: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """What `benchmarks.memory.measure` finds for `words`, in a process of its own that logs into `out`.

    Raises:
        subprocess.CalledProcessError: it failed; a negative code is a signal. The kernel kills with 9 when host memory
            runs out. With the end of the log.
        subprocess.TimeoutExpired: it took longer than `timeout_s`.
    """
    target, log = out / "measure.json", out / "measure.log"
    target.unlink(missing_ok=True)
    with log.open("a") as file:
        command = [sys.executable, "-m", "benchmarks.memory.measure", str(target), *words]
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False, timeout=timeout_s, env=env)
    if done.returncode or not target.exists():
        raise subprocess.CalledProcessError(done.returncode, command, output=log.read_text()[-6000:])
    found: dict[str, Any] = json.loads(target.read_text())
    return found


def _rows(cfg: Config, words: list[str], found: dict[str, Any], hardware: str, commit: str) -> list[dict[str, Any]]:
    """A row of step times and one of peak memory; of memory alone when the device ran out of it."""
    arithmetic = expected_memory(cfg, 1, 0)
    expected = {name: value / _GIB for name, value in asdict(arithmetic).items()} | {"device": arithmetic.total / _GIB}
    facts: dict[str, Any] = {
        "case": f"{cfg.model.name} seq {cfg.data.seq_len} micro {cfg.train.micro_batch} zero {cfg.zero.stage}",
        "system": f"octant, optimizer offload {cfg.zero.offload_optimizer}",
        "hardware": hardware,
        "commit": commit,
        "config_hash": config_hash(cfg),
        "command": f"python -m benchmarks.memory.measure OUT.json {' '.join(words)}",
    }
    peak = found["peak_bytes"] / _GIB
    memory = row(
        metric="peak device memory",
        unit="GiB",
        values=[peak, peak],
        expected_gib=expected,
        host_peak_gib=found["host_peak_bytes"] / _GIB,
        build_peak_gib=found.get("build_peak_bytes", 0) / _GIB,
        out_of_memory=found.get("out_of_memory"),
        **facts,
    )
    print(
        f"{facts['system']}: peak {peak:.1f} GiB, by arithmetic {expected['device']:.1f}; host "
        f"{memory['host_peak_gib']:.1f}, by arithmetic {expected['host']:.1f}"
    )
    if "out_of_memory" in found:
        print(f"  out of memory: {found['out_of_memory']}")
        return [memory]
    seconds = found["step_s"][WARMUP:]
    step = row(metric="step", unit="s", values=seconds, build_s=found["build_s"], losses=found["losses"], **facts)
    print(f"  step p50 {step['p50']:.2f} s, built in {found['build_s']:.0f} s")
    return [memory, step]


if __name__ == "__main__":
    main(sys.argv[1:])
