"""`train.micro_batch=auto` with real processes: it finds the edge of the memory, and changes nothing else."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml

from tests.helpers.command import clean_env, run_command

pytestmark = [pytest.mark.ranks, pytest.mark.slow, pytest.mark.timeout(600)]

# A loss of 2000 classes over 128 positions: some 8 MiB for each sample. Of 47 samples, micro-batches of 1 and 47.
WORDS = (
    "data=random data.seq_len=128 train.device=cpu train.cpu_threads=1 parallel.dp=2 zero.bucket_elements=100000 "
    "train.steps=2 optim.warmup_steps=1 train.eval_batches=0 train.global_batch=94 "
    "checkpoint.save_final=false logging.plot=false"
)
IMPORTED = "import engine.tune.trial, engine.runtime.zero; print(engine.tune.trial._status()['VmRSS'])"


def octant(words: str, folder: Path) -> str:
    done = run_command(f"python -m engine.train {words} {WORDS}", folder, 500, env=clean_env())
    assert done.exit_code == 0, done
    return done.stdout


def steps(run: Path) -> list[tuple[float, float]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(row["loss"], row["grad_norm"]) for row in rows]


def test_the_largest_that_fits_is_found_and_trains_as_if_it_had_been_typed(tmp_path: Path) -> None:
    # What a rank takes before it trains is another with every build of torch.
    imported = run_command([sys.executable, "-c", IMPORTED], tmp_path, 100, env=clean_env())
    memory = (int(imported.stdout.split()[-1]) + 300 * 2**20) / 2**30
    bound = f"hardware.memory_gib={memory} hardware.margin_gib=0 train.micro_batch_limit=64"
    said = octant(f"train.micro_batch=auto {bound} run.name=found", tmp_path)
    assert "train.micro_batch=auto: trying 1, 47 in " in said
    record = json.loads((tmp_path / "runs/found/micro_batch.json").read_text())
    large, small = record["attempts"]
    assert (large["size"], large["fits"], small["size"], small["fits"], record["micro_batch"]) == (
        47,
        False,
        1,
        True,
        1,
    )
    assert record["why"] == f"47 does not fit: {large['reason']}"
    assert 0 < small["peak_bytes"] <= record["budget_bytes"] == round(memory * 2**30)
    stored = yaml.safe_load((tmp_path / "runs/found/config.yaml").read_text())["train"]
    assert (stored["micro_batch"], stored["accum_steps"], stored["global_batch"]) == (1, 47, 94)
    octant("train.micro_batch=1 run.name=typed", tmp_path)
    assert not (tmp_path / "runs/typed/micro_batch.json").exists()
    assert steps(tmp_path / "runs/found") == steps(tmp_path / "runs/typed")
    assert len(steps(tmp_path / "runs/found")) == 2
