"""The kernel benchmarks from their command line, with tiny shapes: that all runs, not how fast."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.kernels import report, table
from tests.helpers.repo import ROOT

SUITES = ("attention", "documents", "loss", "elementwise", "optimizer")
PHASES = {"loss": {"fwd+bwd"}, "optimizer": {"step", "norm", "scale", "first", "add"}}
TUTORIAL = """
from types import SimpleNamespace
import torch

class Config(SimpleNamespace):
    pass

_attn_fwd = SimpleNamespace(
    configs=[Config(kwargs={"BLOCK_M": m, "BLOCK_N": 64}, num_stages=s) for m in (64, 128) for s in (2, 3)]
)

def attention(q, k, v, causal, scale, warp_specialize):
    assert len(_attn_fwd.configs) == 1 and q.is_contiguous() and q.dtype is torch.float16
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)
"""


def command(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.kernels.run", *map(str, words)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])},
        capture_output=True,
        text=True,
        timeout=200,
    )


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in (folder / "rows.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("kernels")
    (found / "tutorial.py").write_text(TUTORIAL)
    done = command(found, "--commit", "abc", "--quick", "--tutorial", found / "tutorial.py")
    assert done.returncode == 0, done.stdout + done.stderr
    return found


def test_every_suite_has_rows_with_figures(folder: Path) -> None:
    rows = rows_of(folder)
    assert list(dict.fromkeys(row["suite"] for row in rows)) == list(SUITES)
    for suite in SUITES:
        phases = {row["metric"] for row in rows if row["suite"] == suite and row["unit"] == "s"}
        assert phases - {"copy"} == PHASES.get(suite, {"fwd", "bwd", "fwd+bwd"})
    for row in rows:
        assert row["quick"]
        assert row["commit"] == "abc"
        assert (row["hardware"] == "CPU") is not torch.cuda.is_available()
        assert {"torch", "triton", "cudnn", "python"} <= set(row["versions"])
        if "unavailable" not in row:
            assert 0 < row["p20"] <= row["p50"] <= row["p80"]
        elif "octant" in row["system"]:
            # A kernel that is there runs.
            assert row["unavailable"].startswith("ModuleNotFoundError")


def test_rows_name_no_folder_of_this_machine(folder: Path) -> None:
    assert str(folder) not in (folder / "rows.jsonl").read_text()
    (command_text,) = {row["command"] for row in rows_of(folder)}
    words = f"--commit abc --suite {','.join(SUITES)} --quick --tutorial tutorial.py"
    assert command_text == f"python -m benchmarks.kernels.run OUT_FOLDER {words}"


def test_torch_is_right_and_auto_is_known(folder: Path) -> None:
    rows = rows_of(folder)
    errors = {(row["case"], row["system"]): row["error"] for row in rows if "error" in row}
    assert all(error < 0.05 for error in errors.values())
    assert {system for _, system in errors} >= {"sdpa", "triton tutorial", "torch", "torch.compile", "torch foreach"}
    auto = [row for row in rows if row["system"].startswith("auto")]
    assert {row["system"] for row in auto} == {"auto", "auto without flash_attn_4"}
    assert all(row["ratio"] >= 1.0 for row in auto)
    assert {row["configurations"] for row in rows if row["system"] == "triton tutorial" and "p50" in row} == {1}


def test_a_second_run_adds_rows_and_leaves_out_what_it_is_told(folder: Path, tmp_path: Path) -> None:
    before = (folder / "rows.jsonl").read_text()
    (tmp_path / "rows.jsonl").write_text(before)
    words = ("--commit", "def", "--quick", "--suite", "optimizer", "--without", "torch foreach", "--budget-s", "30")
    done = command(tmp_path, *words)
    assert done.returncode == 0, done.stderr
    after = (tmp_path / "rows.jsonl").read_text()
    assert after.startswith(before)
    added = [json.loads(text) for text in after[len(before) :].splitlines()]
    assert {(row["suite"], row["commit"]) for row in added} == {("optimizer", "def")}
    assert {row["system"] for row in added} == {"octant triton", "copy", "torch fused + copies", "torch add_"}


def test_report_and_table_read_the_rows(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report.main([str(folder), "--out", str(tmp_path), "--targets"])
    text = capsys.readouterr().out
    assert all(f"\n## {suite}\n" in text for suite in SUITES)
    assert "a quick run with tiny shapes, which measures nothing" in text
    assert text.count("| not measured |") == 10
    assert len(list(tmp_path.glob("*.png"))) >= 5
    table.main([str(folder)])
    assert json.loads(capsys.readouterr().out) == {"attention": {}}


def test_an_unknown_suite_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    done = command(tmp_path, "--commit", "abc", "--quick", "--suite", "loss,convolution")
    assert done.returncode == 2
    known = "(known: attention, documents, loss, elementwise, optimizer)"
    assert f"argument --suite: unknown suite 'convolution' {known}" in done.stderr
    assert list(tmp_path.iterdir()) == []
