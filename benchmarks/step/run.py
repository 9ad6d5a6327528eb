"""Octant next to a plain PyTorch loop, in alternation on the same GPU.

python -m benchmarks.step.run OUT_FOLDER --commit HASH [--accum 1,8] [--rounds 2] [overrides of engine.train]

Writes rows.jsonl: step time, tokens/s, MFU, peak memory and losses of both, and where a profiled step's time goes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.rows import append, row
from benchmarks.step.breakdown import breakdown
from engine.config.load import config_hash, load
from engine.config.schema import Config
from engine.observe.flops import mfu, peak_flops
from engine.plan.costs import flops_per_token

WARMUP = 8
"""Steps left out: compilation, allocator, autotuning."""
STEPS = {1: 38, 8: 28}
_MODULES = {"octant": "engine.train", "plain": "benchmarks.step.plain OUT.json"}
PROFILED = ["profile.start=8", "profile.steps=2", "train.steps=10"]


def main(argv: list[str]) -> None:
    """Measure both systems in alternation, then profile each once."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--commit", required=True)
    parser.add_argument("--accum", default="1,8")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--no-profile", action="store_true")
    options, overrides = parser.parse_known_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    hardware = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "CPU"
    for accum in map(int, options.accum.split(",")):
        words = ["experiment=gpt_1_3b_h200", *overrides, f"train.accum_steps={accum}"]
        cfg = load([*words, f"train.steps={STEPS.get(accum, 30)}"])
        found: dict[str, list[dict[str, Any]]] = {"octant": [], "plain": []}
        for turn in range(options.rounds):
            for system in ("plain", "octant") if turn % 2 else ("octant", "plain"):
                found[system].append(_run(system, [*words, f"train.steps={cfg.train.steps}"], options.out))
        for system, runs in found.items():
            append(options.out / "rows.jsonl", [_row(system, runs, cfg, words, hardware, options.commit)])
    if not options.no_profile:
        case = _case(load(["experiment=gpt_1_3b_h200", *overrides, "train.accum_steps=1"]))
        _profile(options.out, overrides, case, hardware, options.commit)


def _run(system: str, words: list[str], out: Path, profile: Path | None = None) -> dict[str, Any]:
    """One process of `system`; step seconds, losses and peak memory."""
    start = time.perf_counter()
    if system == "plain":
        target = out / "plain.json"
        extra = ["--profile", str(profile)] if profile else []
        _call(["-m", "benchmarks.step.plain", str(target), *extra, *words], out / "plain.log")
        result: dict[str, Any] = json.loads(target.read_text())
    else:
        runs = out / "runs"
        _call(
            ["-m", "engine.train", *words, f"run.dir={runs}", "run.name=octant", "run.overwrite=true"],
            out / "octant.log",
        )
        lines = [json.loads(line) for line in (runs / "octant" / "metrics.jsonl").read_text().splitlines()]
        result = {
            "step_s": [line["step_s"] for line in lines],
            "losses": [line["loss"] for line in lines],
            "peak_memory_gib": lines[-1].get("peak_memory_gib", 0.0),
        }
    median = sorted(result["step_s"][WARMUP:] or result["step_s"])[len(result["step_s"][WARMUP:] or [0]) // 2]
    print(f"{system}: {median * 1e3:.1f} ms per step, {time.perf_counter() - start:.0f} s in all", flush=True)
    return result


def _call(arguments: list[str], log: Path) -> None:
    with log.open("a") as file:
        done = subprocess.run([sys.executable, *arguments], stdout=file, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{log.read_text()[-6000:]}")


def _row(
    system: str, runs: list[dict[str, Any]], cfg: Config, words: list[str], hardware: str, commit: str
) -> dict[str, Any]:
    seconds = [value for run in runs for value in run["step_s"][WARMUP:]]
    tokens = cfg.train.micro_batch * cfg.train.accum_steps * cfg.data.seq_len
    median = sorted(seconds)[len(seconds) // 2]
    peak = peak_flops(hardware)
    causal, full = flops_per_token(cfg.model, cfg.data.seq_len)
    entry = row(
        case=_case(cfg),
        system=system,
        metric="step",
        unit="s",
        values=seconds,
        hardware=hardware,
        commit=commit,
        tokens_per_s=tokens / median,
        mfu_c=mfu(tokens / median, causal, peak) if peak else None,
        mfu_f=mfu(tokens / median, full, peak) if peak else None,
        peak_memory_gib=max(run["peak_memory_gib"] for run in runs),
        losses={str(step): runs[0]["losses"][step - 1] for step in (1, 10, 20, len(runs[0]["losses"]))},
        config_hash=config_hash(cfg),
        command=f"python -m {_MODULES[system]} {' '.join(words)}",
    )
    print(
        f"{entry['case']} {system}: p50 {entry['p50'] * 1e3:.1f} ms, {entry['tokens_per_s']:.0f} tok/s, "
        f"C {entry['mfu_c'] or 0:.1%} F {entry['mfu_f'] or 0:.1%}, {entry['peak_memory_gib']:.1f} GiB",
        flush=True,
    )
    return entry


def _case(cfg: Config) -> str:
    return f"{cfg.model.name} seq {cfg.data.seq_len} micro {cfg.train.micro_batch} accum {cfg.train.accum_steps}"


def _profile(out: Path, overrides: list[str], case: str, hardware: str, commit: str) -> None:
    """Two profiled steps of each system at accumulation 1."""
    tables = {}
    for system in ("octant", "plain"):
        folder = out / "profile-plain" if system == "plain" else out / "runs" / "octant" / "profile"
        words = ["experiment=gpt_1_3b_h200", *overrides, "train.accum_steps=1", *PROFILED]
        _run(system, words, out, folder)
        tables[system] = breakdown(folder / "trace.json", steps=2)
        (folder / "trace.json").unlink()
        facts = {"case": case, "system": system, "metric": "breakdown of a profiled step", "unit": "ms", "n": 2}
        append(out / "rows.jsonl", [facts | {"values": tables[system], "hardware": hardware, "commit": commit}])
    names = sorted({name for table in tables.values() for name in table}, key=lambda n: -tables["octant"].get(n, 0.0))
    print(f"{'ms per step':32} {'octant':>8} {'plain':>8}")
    for name in names:
        print(f"{name:32} {tables['octant'].get(name, 0.0):8.1f} {tables['plain'].get(name, 0.0):8.1f}")


if __name__ == "__main__":
    main(sys.argv[1:])
