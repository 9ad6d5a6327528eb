"""`train.micro_batch=auto` on a GPU that is told to be smaller: the next size runs out of memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.helpers.command import clean_env, run_command

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
WORDS = (
    "experiment=gpt2_124m_1gpu data=random data.seq_len=1024 model=gpt2_124m parallel.dp=1 train.accum_steps=2 "
    "train.steps=4 kernels.deterministic=true optim.warmup_steps=1 train.eval_batches=0 checkpoint.save_final=false "
    "logging.plot=false"
)


def octant(words: str, folder: Path) -> None:
    done = run_command(f"python -m engine.train {words} {WORDS}", folder, 800, env=clean_env())
    assert done.exit_code == 0, done


def test_the_largest_that_fits_is_found_and_trains_as_if_it_had_been_typed(tmp_path: Path) -> None:
    octant("train.micro_batch=auto hardware.memory_gib=24 run.name=found", tmp_path)
    record = json.loads((tmp_path / "runs/found/micro_batch.json").read_text())
    size, tried = record["micro_batch"], {one["size"]: one for one in record["attempts"]}
    above = tried[record["sizes"][record["sizes"].index(size) + 1]]
    assert not above["fits"], record
    assert above["reason"]
    assert tried[size]["peak_bytes"] <= record["budget_bytes"] == round(24 * 0.95 * 2**30)
    octant(f"train.micro_batch={size} run.name=typed", tmp_path)
    rows = [(tmp_path / f"runs/{name}/metrics.jsonl").read_text().splitlines() for name in ("found", "typed")]
    found, typed = ([json.loads(line)["loss"] for line in lines] for lines in rows)
    assert found == typed
    assert json.loads(rows[0][-1])["peak_memory_gib"] <= 24 * 0.95
