"""A stand-in for training that takes no time, for tests of searches."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from engine.config.sweep import quoted
from engine.tune import drive, runner

PYTHON = sys.executable
# Validation loss falls to the distance of the rate from 1e-3 in decades; some rates have accidents of their own.
TRAIN = """#!{python} -S
import json, math, os, sys, time
words = dict(word.lstrip("+").split("=", 1) for word in sys.argv[3:])
folder = os.path.join(words["run.dir"].strip("'"), words["run.name"].strip("'"))
os.makedirs(folder, exist_ok=True)
open(os.path.join(folder, "starts"), "a").write("x")
lr, steps = float(words["optim.lr"]), int(words.get("train.steps", 8))
if lr == 7.0:
    print("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB", file=sys.stderr); sys.exit(1)
if lr == 8.0:
    print("[OCT301] optim.lr=8", file=sys.stderr); sys.exit(2)
if lr == 9.0:
    print("Traceback: boom", file=sys.stderr); sys.exit(1)
if lr == 6.0 and len(open(os.path.join(folder, "starts")).read()) == 1:
    sys.exit(75)
last = math.nan if lr == 5.0 else abs(math.log10(lr) + 3)
slow = {slow} and last > 0.5 and int(words["run.name"].strip("'")) >= {slow_from}
with open(os.path.join(folder, "metrics.jsonl"), "w") as file:
    for step in range(1, steps + 1):
        file.write(json.dumps({{"step": step, "loss": 1.0}}) + "\\n")
        file.write(json.dumps({{"step": step, "val_loss": last + 1 / step}}) + "\\n")
        file.flush()
        if slow and step == 2:
            time.sleep(20)
open(os.path.join(folder, "summary.json"), "w").write("{{}}")
"""


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, *, slow: bool = False, slow_from: int = 0) -> None:
    """Let searches start the stand-in. `slow`: runs from this number on with bad rates hang at their second step."""
    path = folder / "train"
    path.write_text(TRAIN.format(python=PYTHON, slow=slow, slow_from=slow_from))
    path.chmod(0o755)
    monkeypatch.setattr(runner.sys, "executable", str(path))
    monkeypatch.setattr(drive, "POLL_S", 0.01)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def words(root: Path, *more: str) -> list[str]:
    """The command line of a search in `<root>/s`."""
    return ["-m", "train.device=cpu", "train.steps=8", quoted("run.dir", str(root)), "search.study=s", *more]
