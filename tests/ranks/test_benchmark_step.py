"""The step benchmarks from their command line, with tiny shapes: that all runs and computes the same, not how fast."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.step import hf, plain, report, torchtitan
from benchmarks.step.cases import CASES
from benchmarks.step.words import quick, words_of
from engine.config.load import load
from engine.config.schema import Config
from engine.data import open_data
from engine.dist.context import ParallelContext
from tests.helpers.repo import ROOT

# Half a minute on two idle cores: nine processes import torch.
pytestmark = [pytest.mark.ranks, pytest.mark.slow, pytest.mark.timeout(600)]

CASE = "zero1_gpt_1_3b_accum8_2gpus"
SYSTEMS = ("octant", "plain", "octant_one_rank", "megatron")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks of Octant and of a peer, and the reference."""
    out = tmp_path_factory.mktemp("step")
    words = ["--commit", "abc", "--quick", "--rounds", "1", "--case", CASE, "--systems", ",".join(SYSTEMS)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.step.run", str(out), *words],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])},
        capture_output=True,
        text=True,
        timeout=580,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def rows_of(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    rows = [json.loads(text) for text in (folder / "rows.jsonl").read_text().splitlines()]
    return {(row["system"], row["metric"]): row for row in rows}


def test_all_systems_have_rows_and_equal_losses(folder: Path) -> None:
    rows = rows_of(folder)
    reference = rows["fp32 reference", "loss"]
    for name in ("octant", "plain"):
        row = rows[name, "step"]
        assert row["losses"][str(reference["step"])] == pytest.approx(reference["p50"], rel=1e-6)
        assert row["losses"]["1"] != pytest.approx(reference["p50"], rel=1e-5)
        assert (row["gpus"], row["n"], row["global_batch"]) == (2, 3, 8)
        assert row["tokens_per_s_per_gpu"] * 2 * row["p50"] == pytest.approx(8 * 64)
        assert (row["quick"], row["commit"], row["suite"]) == (True, "abc", "step")
        assert (row["mfu_c"] is None) is not torch.cuda.is_available()
        assert (name, "breakdown") in rows
    assert "Transformer Engine" in rows["megatron", "unavailable"]["unavailable"]
    assert len(rows) == 8


def test_one_rank_alone_has_times_and_no_losses(folder: Path) -> None:
    row = rows_of(folder)["octant_one_rank", "step"]
    assert (row["gpus"], row["n"], row["global_batch"], row["losses"]) == (2, 3, 8, {})
    assert row["command"].startswith("python -m engine.study rank --world 2 data=random precision=fp32 zero=z1")


def test_rows_name_commands_and_no_folder_of_this_machine(folder: Path) -> None:
    assert str(folder) not in (folder / "rows.jsonl").read_text()
    rows = rows_of(folder)
    assert rows["octant", "step"]["command"].startswith("python -m engine.train data=random precision=fp32 zero=z1")
    started = "python -m torch.distributed.run --standalone --nproc-per-node=2 -m benchmarks.step.plain OUT.json"
    assert rows["plain", "step"]["command"].startswith(started)
    assert not list(folder.rglob("trace.json"))


def test_the_report_reads_the_rows(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report.main([str(folder), "--out", str(tmp_path), "--targets"])
    text = capsys.readouterr().out
    assert "a quick run with tiny shapes, which measures nothing" in text
    assert f"| {CASE} | 2 | octant |" in text
    assert " | none: one rank alone |" in text
    assert f"| {CASE} | at least 97% of the rate per GPU of gpt_1_3b_accum8 | not measured |" in text
    assert [path.suffix for path in tmp_path.iterdir()] == [".png"]


def losses(system: Any, cfg: Config) -> list[float]:
    """Of the steps of one process."""
    step = system.make(cfg, ParallelContext.single(torch.device("cpu")), "")
    split, train = open_data(cfg.data, cfg.model).train, cfg.train
    found = []
    for number in range(train.steps):
        batches = split.micro_batches(
            number * train.micro_batch * train.accum_steps,
            dp_rank=0,
            dp=1,
            micro_batch=train.micro_batch,
            accum_steps=train.accum_steps,
        )
        found.append(float(step(list(batches), 1e-3)))
    return found


@pytest.mark.parametrize(
    ("name", "peer"),
    [("gpt2_124m", "hf"), ("llama_8b", "hf"), ("bert_large", "hf"), ("llama_8b", "torchtitan")],
)
def test_loops_of_peers_start_and_learn_as_octants_model(name: str, peer: str) -> None:
    if peer == "torchtitan":
        pytest.importorskip("torchtitan")
    cfg = load([*words_of(quick(CASES[name])).whole, "precision=fp32", "train.steps=3", "run.name=x"])
    ours, theirs = losses(plain, cfg), losses(import_module(f"benchmarks.step.{peer}"), cfg)
    # Masked tokens are averaged over a micro-batch there, and over the global batch here: BERT's two losses weigh them
    # a little differently.
    assert theirs == pytest.approx(ours, rel=1e-5 if name != "bert_large" else 2e-2)
    assert len(set(ours)) == 3


@pytest.mark.parametrize(
    ("name", "option", "reason"),
    [
        ("gpt2_124m", "train.recompute=none", "torchtitan's Llama 3 is another model than gpt_tiny"),
        ("llama_8b", "model.tied_head=true", "torchtitan's Llama 3 is another model than llama_tiny"),
        ("llama_8b", "train.recompute=full", "recomputation is a part of torchtitan's trainer, not of its model"),
    ],
)
def test_torchtitan_is_not_given_what_it_has_not(name: str, option: str, reason: str) -> None:
    cfg = load([*words_of(quick(CASES[name])).whole, "train.steps=3", "run.name=x", option])
    with pytest.raises(SystemExit, match=f"^{reason}$"):
        torchtitan.build(cfg, torch.device("cpu"))


def test_transformers_is_not_given_what_it_has_not() -> None:
    cfg = load([*words_of(quick(CASES["gpt2_124m"])).whole, "train.steps=3", "run.name=x", "model.bias=false"])
    with pytest.raises(SystemExit, match=r"^transformers has no such model: .*model\.bias=False"):
        hf.build(cfg, torch.device("cpu"))
