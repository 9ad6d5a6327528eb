"""A run on Triton's AdamW, in its interpreter, that goes on from a checkpoint to the last bit."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from engine.checkpoint.compare import logical_hashes
from engine.checkpoint.reader import Reader
from tests.helpers.command import Done, clean_env, run_command

pytestmark = pytest.mark.ranks

MODEL = ("model=gpt_tiny", "model.num_layers=2", "model.hidden_size=32", "model.num_heads=4", "model.vocab_size=263")
MODEL += ("data=random", "data.seq_len=16", "data.vocab_size=263", "train.steps=4", "train.micro_batch=2")
QUIET = ("train.eval_batches=0", "logging.progress=false", "logging.plot=false", "checkpoint.every=2")
COMMAND = [sys.executable, "-m", "engine.train", *MODEL, *QUIET, "train.device=cpu", "kernels.optimizer=triton"]


def train(root: Path, name: str, *more: str) -> Done:
    command = [*COMMAND, f"run.dir={root}", f"run.name={name}", *more]
    done = run_command(command, root, 120, env=clean_env({"TRITON_INTERPRET": "1"}))
    assert done.exit_code == 0, done
    return done


def rows(run: Path) -> list[tuple[int, float, float]]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"], row["grad_norm"]) for row in found if "loss" in row]


@pytest.mark.parametrize("how", [("precision=bf16", "zero=z1"), ("zero=z3",)], ids=["bf16", "zero3"])
def test_it_goes_on_to_the_last_bit(how: tuple[str, ...], tmp_path: Path) -> None:
    said = train(tmp_path, "whole", *how).stdout
    assert "kernels: attention sdpa, loss torch, norm torch, activation torch, optimizer triton" in said
    load = f"checkpoint.load={tmp_path / 'whole' / 'checkpoints' / 'step-00000002'}"
    assert "going on from" in train(tmp_path, "second-half", *how, load).stdout
    assert rows(tmp_path / "second-half") == rows(tmp_path / "whole")[2:]
    hashes = [logical_hashes(Reader(tmp_path / run / "checkpoints/step-00000004")) for run in ("whole", "second-half")]
    assert hashes[0] == hashes[1]
    record = json.loads((tmp_path / "whole" / "kernels.json").read_text())
    assert record["optimizer"] == {"implementation": "triton", "asked": "triton", "passed_over": {}}
    assert record["norm"]["asked"] == "auto"
    assert record["norm"]["passed_over"] == {"triton": "Triton's interpreter is for tests"}
