"""What search=coarse_to_fine finds and costs, next to the default learning rate and a full grid of as many whole runs.

python -m benchmarks.search.run OUT_FOLDER --commit HASH [--seeds 3] [--jobs 2] [overrides of engine.train]

A GPT of two layers learns a piece of Python's standard library. One search for each seed of the sampler; the
first one is killed (SIGKILL) when a third of its runs have ended, and started again. Writes rows.jsonl, and fails when
a search does not beat the default, loses a finished run, costs more than 60 % of the grid's steps, or when the searches
end in different regions: rates further apart than a factor of 4, in a space of 4 decades.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.rows import append, row
from engine.tune import records
from engine.tune.records import OPEN, Status, Trial

WORDS = [
    "model=gpt_tiny",
    "model.num_layers=2",
    "model.hidden_size=64",
    "model.num_heads=4",
    "parallel=single",
    "data.seq_len=64",
    "data.max_bytes=1000000",
    "train.micro_batch=8",
    "train.steps=64",
    "train.eval_batches=4",
    "train.device=cpu",
    "checkpoint.every=0",
    "checkpoint.save_final=false",
    "logging.progress=false",
    "logging.plot=false",
]
SPACE = "optim.lr=log(1e-5,1e-1)"
TRIALS = 24
LARGEST_COST = 0.6
REGION = 4.0


def main(argv: list[str]) -> None:
    """Run the searches, judge, write rows."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--commit", required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2)
    options, overrides = parser.parse_known_args(argv)
    words = [*WORDS, *overrides, f"run.dir={options.out}", f"search.jobs={options.jobs}"]
    plain = search(options.out, "default", [*words, "train.seed=1234,1235,1236"])
    default = mean(result(trial) for trial in plain)
    measured: dict[str, list[float]] = {"val_loss": [], "optim.lr": [], "share of the grid's steps": []}
    for seed in range(options.seeds):
        more = [SPACE, "search=coarse_to_fine", f"search.trials={TRIALS}", f"search.seed={seed}"]
        if seed == 0:
            kept = killed(options.out, f"seed{seed}", [*words, *more])
        trials = search(options.out, f"seed{seed}", [*words, *more])
        if seed == 0:
            lost = [number for number, trial in kept.items() if trials[number] != trial]
            assert len(trials) == TRIALS and not lost, f"runs {lost} of {len(trials)} have changed after the kill"
        final = [trial for trial in trials if trial.phase == "final"]
        measured["val_loss"].append(mean(result(trial) for trial in final))
        measured["optim.lr"].append(float(final[0].values["optim.lr"]))
        measured["share of the grid's steps"].append(cost(trials, final[0].steps))
        print({metric: values[-1] for metric, values in measured.items()}, flush=True)
    write(options.out, options.commit, measured, [result(trial) for trial in plain], " ".join([*WORDS, *overrides]))
    rates = measured["optim.lr"]
    assert max(measured["val_loss"]) < default, (measured["val_loss"], default)
    assert max(measured["share of the grid's steps"]) <= LARGEST_COST, measured
    assert max(rates) / min(rates) <= REGION, rates
    print(f"default {default:.4f}, found {measured['val_loss']} at {rates}")


def command(name: str, words: list[str]) -> list[str]:
    """The command of a search in the folder `name`."""
    return [sys.executable, "-m", "engine.train", "-m", *words, f"search.study={name}"]


def search(out: Path, name: str, words: list[str]) -> list[Trial]:
    """Search to the end; its runs."""
    subprocess.run(command(name, words), check=True)
    return records.read(out / name)


def killed(out: Path, name: str, words: list[str]) -> dict[int, Trial]:
    """Search until a third of the runs have ended, then SIGKILL; those runs."""
    process = subprocess.Popen(command(name, words))
    while len(ended := {trial.number: trial for trial in records.read(out / name) if trial.status not in OPEN}) < 8:
        assert process.poll() is None, process.returncode
        time.sleep(0.2)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    return ended


def result(trial: Trial) -> float:
    """Validation loss of a run that has ended well."""
    assert trial.status is Status.done and trial.value is not None, trial
    return trial.value


def cost(trials: list[Trial], steps: int) -> float:
    """Steps of a search over those of as many whole runs."""
    return sum(trial.steps_done for trial in trials) / (TRIALS * steps)


def write(out: Path, commit: str, measured: dict[str, list[float]], default: list[float], words: str) -> None:
    """A row for each metric, the default's loss among them."""
    units = {"val_loss": "nats/token", "optim.lr": "", "share of the grid's steps": ""}
    common: dict[str, Any] = {"case": f"gpt_tiny of 2 layers, {TRIALS} runs", "hardware": "CPU", "commit": commit}
    common["command"] = f"python -m benchmarks.search.run OUT --commit {commit}"
    rows = [
        row(system="coarse_to_fine", metric=metric, unit=units[metric], values=values, **common)
        | {"values": values, "words": words}
        for metric, values in measured.items()
        if len(values) > 1
    ]
    plain = row(system="optim=adamw", metric="val_loss", unit="nats/token", values=default, **common)
    append(out / "rows.jsonl", [*rows, plain | {"values": default, "words": words}])


if __name__ == "__main__":
    main(sys.argv[1:])
