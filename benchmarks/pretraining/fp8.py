"""Training in fp8 next to bf16: the same model, initial weights, samples and rates, loss by loss.

python -m benchmarks.pretraining.fp8 OUT [--steps 300] [--commit HASH] [overrides of engine.train]

The default is a quarter of Llama 3 8B's blocks on Python's standard library, for one GPU (`data.source=FOLDER` for
other text). Writes OUT/rows.jsonl with both curves. Exit code 1: the mean loss of the last steps, or that of
validation, is more than LIMIT from bf16's.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch

from benchmarks.pretraining.run import train
from benchmarks.rows import append, row
from engine.config.load import config_hash, load
from engine.data import prepare
from engine.observe.environment import environment

LIMIT = 5e-3
"""Largest difference of the mean losses, as a share of bf16's."""
LAST = 20
"""Steps whose losses are averaged, so that the noise of single ones does not decide."""
WARM_UP = 20
"""Steps that are not timed."""
DEFAULTS = [
    *("model=llama_8b", "model.num_layers=8", "model.vocab_size=16384", "data=python", "data.seq_len=2048"),
    *("parallel=single", "zero=z1", "train.micro_batch=8", "train.eval_batches=16", "optim.lr=3e-4"),
]


@dataclass(slots=True, kw_only=True)
class Run:
    """Losses of the steps and of the last validation (nats), and tokens per second without the warm-up."""

    losses: list[float]
    validation: float
    tokens_per_s: float

    @property
    def final(self) -> float:
        """Mean loss of the last steps."""
        return mean(self.losses[-LAST:])


def main(argv: list[str]) -> int:
    """Train in both precisions and write what came out; 0 when the losses are within the limit."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pretraining.fp8")
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--commit", default=(environment()["git"] or {}).get("commit", "unknown"))
    options, overrides = parser.parse_known_args(argv)
    words = [*DEFAULTS, *overrides, f"train.steps={options.steps}"]
    prepare(load(words).data, print)
    runs = {name: run_of(train([*words, f"precision={name}"], options.out, name)) for name in ("bf16", "fp8")}
    apart = differences(runs["fp8"], runs["bf16"])
    append(options.out / "rows.jsonl", [_row(name, run, words, options.commit, apart) for name, run in runs.items()])
    for name, run in runs.items():
        print(
            f"{name}: loss {run.losses[0]:.4f} to {run.final:.4f} (mean of the last {LAST}), validation "
            f"{run.validation:.4f}, {run.tokens_per_s:,.0f} tok/s",
            flush=True,
        )
    speed = runs["fp8"].tokens_per_s / runs["bf16"].tokens_per_s
    said = ", ".join(f"{what} {value:+.3%}" for what, value in apart.items())
    print(f"fp8 next to bf16: {said} (limit {LIMIT:.1%}), {speed:.2f} times the tokens per second")
    return int(any(abs(value) > LIMIT for value in apart.values()))


def run_of(lines: list[dict[str, Any]]) -> Run:
    """What a run's metrics hold; the last validation comes after the last step."""
    steps = [line for line in lines if "loss" in line]
    timed = steps[WARM_UP:] or steps
    validation = [float(line["val_loss"]) for line in lines if "val_loss" in line][-1]
    return Run(
        losses=[float(line["loss"]) for line in steps],
        validation=validation,
        tokens_per_s=median(float(line["tokens_per_s"]) for line in timed),
    )


def differences(fp8: Run, bf16: Run) -> dict[str, float]:
    """Relative difference of the mean loss of the last steps, and of validation; negative: fp8's is lower."""
    return {"training": fp8.final / bf16.final - 1, "validation": fp8.validation / bf16.validation - 1}


def _row(name: str, run: Run, words: list[str], commit: str, apart: dict[str, float]) -> dict[str, Any]:
    cfg = load([*words, f"precision={name}"])
    batch = cfg.train.micro_batch * cfg.train.accum_steps * (cfg.parallel.dp or 1)
    return row(
        case=f"{cfg.model.name} {cfg.model.num_layers} blocks seq {cfg.data.seq_len} global batch {batch} steps "
        f"{cfg.train.steps}",
        system=f"octant {name}",
        metric=f"loss of the last {LAST} steps",
        unit="nats",
        values=run.losses[-LAST:],
        hardware=torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        commit=commit,
        losses=run.losses,
        validation=run.validation,
        tokens_per_s=run.tokens_per_s,
        relative_to_bf16=apart if name == "fp8" else None,
        limit=LIMIT,
        config_hash=config_hash(cfg),
        command=f"python -m benchmarks.pretraining.fp8 OUT {' '.join(words)}",
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
