"""Checkpoints from and to GPUs: page-locked copies, states of every kind, and a run that goes on."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from engine.checkpoint.compare import logical_hashes
from engine.checkpoint.reader import Reader
from engine.checkpoint.restore import load as load_state
from engine.checkpoint.restore import open_verified
from engine.checkpoint.save import Saver
from engine.config.load import load
from engine.data import open_data
from engine.dist.context import ParallelContext
from engine.dist.spawn import run_ranks
from engine.topology.grid import Grid
from engine.train.loop import global_batch
from engine.train.loop import load as read_ahead
from engine.train.session import build_engine
from tests.helpers.command import run_command

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
MODEL = ("model=llama_tiny", "data=random", "data.seq_len=128", "kernels.compile=off", "checkpoint.every=0")
KINDS = {
    "bf16 zero1": ("precision=bf16", "zero=z1"),
    "bf16 zero2 offload": ("precision=bf16", "zero=z2_offload"),
    "bf16 zero3": ("precision=bf16", "zero=z3"),
    "bf16 zero3 offload": ("precision=bf16", "zero=z3_offload"),
    "fp16 zero2": ("precision=fp16", "zero=z2"),
    "fp32 zero0": ("precision=fp32", "zero=z0"),
    "bf16 zero1 muon": ("precision=bf16", "zero=z1", "optim=muon"),
    "bf16 zero3 adafactor": ("precision=bf16", "zero=z3", "optim=adafactor"),
}


def losses(words: tuple[str, ...], folder: Path, begin: Path | None) -> list[float]:
    """Body of a rank: three steps from nothing, or two from `begin`; what it had first is saved into `folder`."""
    cfg = load([*words, "run.name=gpu"])
    ctx = ParallelContext.create(
        Grid.from_config(cfg.parallel, dist.get_world_size()), torch.device("cuda", torch.cuda.current_device())
    )
    engine = build_engine(cfg, ctx, empty=begin is not None)
    if begin is not None:
        load_state(engine, open_verified([begin], print))
    size = global_batch(cfg, ctx)
    saver = Saver(engine, asynchronous=True)
    found = []
    with read_ahead(open_data(cfg.data, cfg.model).train, [size * step for step in range(4)], cfg, ctx) as batches:
        for step in range(4):
            if step == 2:
                saver.save(folder, {"step": 2, "samples": 2 * size})
            batch = next(batches)
            if begin is None or step >= 2:
                found.append(float(engine.train_step(batch, 1e-3).loss))
    saver.close()
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_comes_back_bit_equal_while_training_goes_on(kind: str, tmp_path: Path) -> None:
    words = (*MODEL, *KINDS[kind])
    [[_, _, *straight]] = run_ranks(losses, 1, (words, tmp_path / "a", None), backend="nccl", timeout_s=200)
    [again] = run_ranks(losses, 1, (words, tmp_path / "b", tmp_path / "a"), backend="nccl", timeout_s=200)
    assert logical_hashes(Reader(tmp_path / "a")) == logical_hashes(Reader(tmp_path / "b"))
    # The backward pass of fused attention adds up in no fixed order.
    assert again[0] == straight[0] and again[1] == pytest.approx(straight[1], rel=1e-4)


def test_a_run_goes_on_in_another_precision_and_stage(tmp_path: Path) -> None:
    command = f"{sys.executable} -m engine.train {' '.join(MODEL[:3])} train.steps=30 run.dir={tmp_path} optim.lr=1e-3 "
    first = run_command(f"{command} checkpoint.every=15 precision=bf16 zero=z1 run.name=a", tmp_path, 200)
    assert first.exit_code == 0, first
    begin = f"checkpoint.load={tmp_path}/a/checkpoints/step-00000015"
    second = run_command(f"{command} {begin} precision=fp32 zero=z3 run.name=b", tmp_path, 200)
    assert second.exit_code == 0, second
    assert "going on from" in second.stdout
    rows = [json.loads(line) for line in (tmp_path / "b" / "metrics.jsonl").read_text().splitlines()]
    whole = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    mine, theirs = ({row["step"]: row["loss"] for row in part if "loss" in row} for part in (rows, whole))
    assert list(mine) == list(range(16, 31))
    assert all(mine[step] == pytest.approx(theirs[step], rel=3e-3) for step in mine)
