"""The command line of the studies: refusals, exit codes and the report, with the ranks left out."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.study import __main__ as study
from engine.study import parity
from engine.study.cases import Case
from engine.study.measure import Comparison

SMALL = ["--worlds", "2", "--pp", "1,2", "--tp", "1", "--zero", "0,1", "--accum", "4", "--flavours", "gpt2"]


def test_without_a_study_it_lists_them(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in ([], ["--help"]):
        assert study.main(argv) == 0
        assert "studies: parity" in capsys.readouterr().out


def test_an_unknown_study_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert study.main(["pairty"]) == 2
    assert capsys.readouterr().err == "LaunchError:\n1. [OCT520] study=pairty: no such study. Nearest: parity\n"


def test_nothing_legal_to_compare_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert study.main(["parity", "--worlds", "3", "--pp", "2"]) == 2
    text = capsys.readouterr().err
    assert "[OCT521] parity=--worlds 3 --pp 2: no combination of the asked values is legal" in text
    assert "Widen --worlds, --pp or --tp" in text


def test_the_reason_why_nothing_is_legal_is_given(capsys: pytest.CaptureFixture[str]) -> None:
    assert study.main(["parity", "data.seq_len=100000"]) == 2
    assert "[OCT305] data.seq_len=100000" in capsys.readouterr().err


@pytest.mark.parametrize(("option", "value"), [("--pp", "0"), ("--worlds", "2,0"), ("--accum", "-1"), ("--zero", "-1")])
def test_a_number_out_of_range_is_refused(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        study.main(["parity", option, value])
    assert caught.value.code == 2
    assert f"argument {option}: {value.split(',')[-1]} is below" in capsys.readouterr().err


def test_more_ranks_than_gpus_are_left_out_with_a_word(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert parity._possible([1, 2, 4, 8], "cuda") == [1, 2]
    assert "2 GPUs here, so no layouts of [4, 8] ranks" in capsys.readouterr().out
    assert parity._possible([1, 8], "cpu") == [1, 8]


def test_a_wrong_override_is_refused_as_in_training(capsys: pytest.CaptureFixture[str]) -> None:
    assert study.main(["parity", "model.num_layer=3"]) == 2
    assert "[OCT101] model.num_layer=3" in capsys.readouterr().err


def test_an_unknown_flavour_names_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        study.main(["parity", "--flavours", "gpt2,bert"])
    assert caught.value.code == 2
    assert "unknown ['bert'], known: gpt2, llama" in capsys.readouterr().err


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Case]:
    """The cases that the study measures; the last of them has a wrong gradient if `WRONG` is the run's name."""
    seen: list[Case] = []

    def run_cases(base: Any, cases: Sequence[Case], *, timeout_s: float) -> Iterator[list[dict[str, Any]]]:
        seen.extend(cases)
        found = [Comparison() for _ in cases]
        if base.run.name == "WRONG":
            found[-1] = Comparison(gradient=0.5, gradient_at="head.weight")
        yield [parity._judge(case, comparison) for case, comparison in zip(cases, found, strict=True)]

    monkeypatch.setattr(parity, "run_cases", run_cases)
    monkeypatch.setattr(parity, "prepare", lambda data, show: None)
    monkeypatch.setattr(parity, "environment", lambda: {"python": "3"})
    return seen


def test_agreement_is_exit_code_0_and_a_report(
    asked: list[Case], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "new" / "parity.json"
    assert study.main(["parity", *SMALL, "--json", str(path), "model.num_layers=2"]) == 0
    assert {(case.pp, case.dp, case.zero, case.tied) for case in asked} == {
        (pp, 2 // pp, zero, tied) for pp in (1, 2) for zero in (0, 1) for tied in (True, False)
    }
    report = json.loads(path.read_text())
    assert report["limits"] == {"gradient": 1e-5, "loss": 1e-6, "norm": 1e-6, "parameters": 1e-4}
    assert [row["failed"] for row in report["cases"]] == [[]] * 8
    assert "parity holds in all 8 cases" in capsys.readouterr().out


def test_a_miss_is_exit_code_1_and_named(asked: list[Case], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["parity", *SMALL, "--quick", "--json", str(tmp_path / "parity.json"), "run.name=WRONG"]
    assert study.main(argv) == 1
    text = capsys.readouterr().out
    assert f"parity FAILED in 1 of {len(asked)} cases" in text
    assert f"{asked[-1]}: gradient of head.weight: 5.00e-01 > 1e-05" in text
