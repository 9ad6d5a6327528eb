"""The command line of the studies: refusals, exit codes and the report, with the ranks left out."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config.load import load
from engine.study import __main__ as study
from engine.study import parity
from engine.study.cases import Case
from engine.study.compare import Comparison
from engine.study.run import judge

Capture = pytest.CaptureFixture[str]
ONE = {"--tp": "1", "--context": "1", "--schedules": "one_f_one_b", "--accum": "4", "--offload": "none"}
ONE |= {
    "--flavours": "gpt2",
    "--recompute": "none",
    "--tiles": "none",
    "--dropout": "0.0",
    "--length": "fixed",
    "--loss": "plain",
}
SMALL = ["--worlds", "2", "--pp", "1,2", "--zero", "0,1", "--packed", "off"]
SMALL += [word for pair in ONE.items() for word in pair]


def test_without_a_study_it_lists_them(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in ([], ["--help"]):
        assert study.main(argv) == 0
        assert "studies: parity" in capsys.readouterr().out


def test_an_unknown_study_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert study.main(["pairty"]) == 2
    told = "study=pairty: no such study. Nearest: parity, of network, parity, rank, timeline"
    assert capsys.readouterr().err == f"LaunchError:\n1. [OCT520] {told}\n"


class _OrderedError(BaseException):
    """Nobody catches it."""


def test_the_order_of_launches_is_asked_for_before_a_rank_alone_looks_for_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks for a GPU makes CUDA read its variables."""
    looks: list[str] = []

    def order(*_: object) -> None:
        raise _OrderedError

    for name in ("is_available", "device_count", "get_device_name", "set_device"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, name=name: looks.append(name))
    monkeypatch.setattr("engine.dist.init.order_launches", order)
    with pytest.raises(_OrderedError):
        study.main(["rank", "--world", "2", "parallel.tp=2", "model=gpt_tiny"])
    assert looks == []


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
    domains = {"world": [1, 2, 4, 8], "offload": ["none"]}
    parity._leave_out(domains, "cuda", None)
    assert domains["world"] == [1, 2]
    assert "2 GPUs here, so no layouts of [4, 8] ranks; they run with --share-gpus" in capsys.readouterr().out
    domains = {"world": [1, 8], "offload": ["none"]}
    parity._leave_out(domains, "cpu", None)
    assert domains["world"] == [1, 8]


@pytest.mark.parametrize(
    ("words", "pp", "tp", "said"),
    [
        ([], [1], [1, 2], "so pp=1 alone; parallel.pipeline_transport=copy_engine allows more"),
        (["parallel.pipeline_transport=copy_engine"], [1, 2], [1, 2], ""),
        (["parallel.tp_overlap=chunked"], [1], [1], "so tp=1 alone; parallel.tp_overlap=symmetric allows more"),
    ],
    ids=["auto", "copy engines", "chunked"],
)
def test_ranks_that_share_gpus_send_nothing_over_nccl(
    words: list[str], pp: list[int], tp: list[int], said: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    domains = {"world": [1, 8], "pp": [1, 2], "tp": [1, 2], "offload": ["none"]}
    parity._leave_out(domains, "cuda", load([*parity.DEFAULTS, "model=gpt_tiny", *words]).parallel)
    assert (domains["world"], domains["pp"], domains["tp"]) == ([1, 8], pp, tp)
    assert said in capsys.readouterr().out
    for fewer in ([1], [1, 2]):
        domains = {"world": fewer, "pp": [2], "tp": [2], "offload": ["none"]}
        parity._leave_out(domains, "cuda", load([*parity.DEFAULTS, "model=gpt_tiny", *words]).parallel)
        assert domains["pp"] == [2], "there is a GPU for each rank"


def test_offload_without_a_compiler_is_left_out_with_a_word(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(parity.extensions, "usable", lambda name: False)
    domains = {"world": [1], "offload": ["none", "cpu"]}
    parity._leave_out(domains, "cpu", None)
    assert domains["offload"] == ["none"]
    assert "so no offload; 'make setup' builds it" in capsys.readouterr().out


def test_a_wrong_override_is_refused_as_in_training(capsys: pytest.CaptureFixture[str]) -> None:
    assert study.main(["parity", "model.num_layer=3"]) == 2
    assert "[OCT101] model.num_layer=3" in capsys.readouterr().err


def test_an_unknown_flavour_names_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        study.main(["parity", "--flavours", "gpt2,t5"])
    assert caught.value.code == 2
    assert "unknown ['t5'], known: gpt2, llama, bert, neox, qwen2" in capsys.readouterr().err


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Case]:
    """The cases that the study measures; the last of them has a wrong gradient if `WRONG` is the run's name."""
    seen: list[Case] = []

    def run_cases(base: Any, cases: Sequence[Case], *, timeout_s: float) -> Iterator[list[dict[str, Any]]]:
        seen.extend(cases)
        found = [Comparison() for _ in cases]
        if base.run.name == "WRONG":
            found[-1] = Comparison({"gradient": 0.5}, {"gradient": "head.weight"})
        yield [judge(case, comparison) for case, comparison in zip(cases, found, strict=True)]

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
    assert report["limits"] == {"gradient": 1e-5, "loss": 1e-6, "norm": 1e-6, "sgd": 1e-4, "adamw": 1e-4}
    assert [row["failed"] for row in report["cases"]] == [[]] * 8
    assert "parity holds in all 8 cases" in capsys.readouterr().out


def test_a_miss_is_exit_code_1_and_named(asked: list[Case], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["parity", *SMALL, "--quick", "--json", str(tmp_path / "parity.json"), "run.name=WRONG"]
    assert study.main(argv) == 1
    text = capsys.readouterr().out
    assert f"parity FAILED in 1 of {len(asked)} cases" in text
    assert f"{asked[-1]}: gradient of head.weight: 5.00e-01 > 1e-05" in text


def test_the_cases_are_listed_and_none_is_run(asked: list[Case], capsys: pytest.CaptureFixture[str]) -> None:
    assert study.main(["parity", *SMALL, "--cases", "3", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "parity of 3 of 8 legal cases in fp32" in lines[0]
    assert len(lines) == 5
    assert all(line.startswith("pp") for line in lines[2:])
    assert asked == []


def test_a_dtype_is_asked_for_by_option(asked: list[Case], tmp_path: Path) -> None:
    path = tmp_path / "parity.json"
    assert study.main(["parity", *SMALL, "--dtype", "bf16", "--json", str(path)]) == 0
    assert {case.zero for case in asked} == {1}, "the rules allow no 16 bits without ZeRO"
    report = json.loads(path.read_text())
    assert (report["dtype"], report["limits"]["gradient"]) == ("bf16", 2.0)


def test_an_option_of_zero3_alone_is_no_mistake_where_zero3_alone_is_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(parity, "resolve_device_type", lambda device: "cuda")
    words = ["parity", "--list", "--cases", "1", "--tp", "1", "--context", "1", "--offload", "none"]
    words += ["train.device=cuda", "zero.gather=copy_engine"]
    for stages in ("3", "3,0", "0,3"):
        assert study.main([*words, "--zero", stages]) == 0
        assert "zero3" in capsys.readouterr().out
    assert study.main([*words, "--zero", "1"]) == 2
    assert "[OCT320] zero.gather=copy_engine" in capsys.readouterr().err
