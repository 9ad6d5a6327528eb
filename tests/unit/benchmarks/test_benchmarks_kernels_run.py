from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.kernels import run

WORDS = ["--commit", "abc", "--quick"]


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(run, "_prepare_compiler", lambda: None)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--commit", "abc"], "no CUDA device is visible; on a CPU only --quick runs"),
        ([*WORDS, "--budget-s", "0"], "--budget-s 0: must be positive"),
        ([*WORDS, "--suite", ""], "unknown suite '' (known: attention, documents, loss, elementwise, optimizer)"),
        (["--quick"], "the following arguments are required: --commit"),
    ],
)
def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as caught:
        run.main([str(tmp_path / "out"), *words])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_rows_go_to_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        run.main([str(tmp_path / "file"), *WORDS])
    assert "file is a file; rows are added to rows.jsonl in a folder" in capsys.readouterr().err


def test_a_suite_that_breaks_stops_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []

    def breaks(*_: object) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr("benchmarks.kernels.loss.run", breaks)
    monkeypatch.setattr("benchmarks.kernels.optimizer.run", ran.append)
    with pytest.raises(SystemExit, match="ended early: loss"):
        run.main([str(tmp_path), *WORDS, "--suite", "loss,optimizer"])
    assert len(ran) == 1
    (row,) = [json.loads(text) for text in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert (row["suite"], row["system"]) == ("loss", "all")
    assert row["unavailable"] == "RuntimeError: an illegal memory access was encountered"
