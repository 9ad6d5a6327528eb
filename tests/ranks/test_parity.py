"""Every layout computes what one process computes, and the study that says so notices when it is not true."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.config.load import load
from engine.config.schema import Config
from engine.study import parity
from engine.study.__main__ import main
from engine.study.cases import Case
from tests.helpers import faults

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(600)]


def tiny() -> Config:
    return load([*parity.DEFAULTS, "model=gpt_tiny", "train.device=cpu"])


def test_covering_subset_of_all_layouts_agrees_with_one_process(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "parity.json"
    code = main(["parity", "model=gpt_tiny", "train.device=cpu", "--quick", "--json", str(out)])
    assert code == 0, capsys.readouterr().out
    report = json.loads(out.read_text())
    cases = [row["case"] for row in report["cases"]]
    assert len(cases) >= 15
    assert {word for case in cases for word in case.split()} >= {"pp4", "tp4", "dp8", "zero3", "accum4", "llama-untied"}
    for row in report["cases"]:
        assert 0 < row["gradient"] <= 1e-5, "an error of exactly zero would mean that nothing was compared"
        assert row["loss"] <= 1e-6
        assert row["norm"] <= 1e-6


@pytest.mark.parametrize(
    ("plant", "case", "named"),
    [
        (faults.divide_by_accumulation_twice, Case(2, 2, 1, 0, 4, "gpt2", False), r"gradient of (embed|block\.[01])\."),
        (faults.forget_row_bias_reduction, Case(2, 1, 2, 1, 1, "gpt2", True), r"gradient of .*(out|down)\.bias"),
        (faults.forget_tied_reduction, Case(2, 2, 1, 1, 1, "gpt2", True), r"gradient of embed\.tokens\.weight"),
        (faults.sum_over_replicas, Case(2, 1, 1, 0, 1, "gpt2", True), r"gradient of .*: [19]\.\d+e[+-]0\d"),
        (faults.sum_over_replicas, Case(2, 1, 1, 1, 1, "llama", False), r"gradient of .*: [19]\.\d+e[+-]0\d"),
        (
            faults.let_padding_into_softmax,
            Case(2, 1, 2, 0, 1, "llama", False),
            r"gradient of (head|final_norm)\.weight.*loss: ",
        ),
    ],
    ids=lambda value: value.__name__ if callable(value) else None,
)
def test_planted_fault_is_found_and_named(plant: Callable[[], None], case: Case, named: str) -> None:
    *_, rows = parity.run_cases(tiny(), [case], timeout_s=120, before_case=plant)
    (row,) = rows
    verdict = "; ".join(row["failed"])
    assert re.search(named, verdict), verdict


def test_a_miss_is_a_nonzero_exit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(parity, "GRADIENT", 1e-12)
    options = ["--worlds", "1", "--zero", "1", "--accum", "1", "--flavours", "gpt2", "--tied", "tied"]
    code = main(["parity", "model=gpt_tiny", "train.device=cpu", *options, "--json", str(tmp_path / "p.json")])
    said = capsys.readouterr().out
    assert code == 1
    assert "parity FAILED in 1 of 1 cases" in said
    assert re.search(r"gradient of [\w.]+: \d\.\d+e-\d+ > 1e-12", said)
