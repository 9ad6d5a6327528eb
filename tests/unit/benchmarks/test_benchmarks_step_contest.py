from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.kernels.sheet import Sheet
from benchmarks.step import systems
from benchmarks.step.cases import CASES
from benchmarks.step.contest import Budget, Contest
from benchmarks.step.figures import facts, hardware_flops_per_token
from benchmarks.step.systems import ONE_RANK, REFERENCE, Place, Record
from benchmarks.step.words import quick, words_of
from engine.config.load import load

LLAMA = ["model=llama_tiny", "data=random", "data.seq_len=64", "train.micro_batch=2", "train.accum_steps=4"]


def contest(folder: Path, name: str = "gpt_1_3b_accum8", seconds: float = 100.0) -> Contest:
    case = quick(CASES[name])
    sheet = Sheet(folder / "rows.jsonl", "abc", "command", torch.device("cpu"), True)
    return Contest(case, words_of(case), sheet, Budget(seconds), "now")


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in (folder / "rows.jsonl").read_text().splitlines()]


@pytest.fixture
def began(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str]]]:
    """Systems in the order in which they were started. `hf` fails; the others' first step takes 50 s, and their further
    ones longer the later they were started."""
    found: list[tuple[str, list[str]]] = []

    def measure(name: str, case: object, words: list[str], place: Place, *, profile: bool = False) -> Record | str:
        found.append((name, words))
        steps = int(words[-1].partition("=")[2]) if words[-1].startswith("train.steps") else 6
        if profile and name != "hf":
            trace = systems.trace_of(name, case, place.folder)  # type: ignore[arg-type]
            trace.parent.mkdir(parents=True)
            trace.write_text('{"traceEvents": []}')
        if name == "hf":
            return "torch.OutOfMemoryError: CUDA out of memory"
        return Record(
            [50.0, *[len(found) + 0.5] * (steps - 1)], [9.0 - 0.1 * n for n in range(steps)], None, "python x"
        )

    monkeypatch.setattr("benchmarks.step.systems.measure", measure)
    return found


def test_rounds_alternate_and_a_system_that_fails_is_tried_once(tmp_path: Path, began: list[Any]) -> None:
    contest(tmp_path).run(["octant", "hf", "plain"], rounds=2)
    assert [name for name, _ in began] == ["octant", "hf", "plain", "plain", "octant", REFERENCE]
    words = dict(began[:3])["octant"]
    assert words[-3:] == ["train.steps=6", "profile.start=4", "profile.steps=2"]
    # Only the first round is profiled.
    assert began[4][1][-1] == "train.steps=4"
    rows = rows_of(tmp_path)
    (failed,) = (row for row in rows if "unavailable" in row)
    assert (failed["system"], failed["unavailable"]) == ("hf", "torch.OutOfMemoryError: CUDA out of memory")
    last = [row for row in rows if row["system"] == "octant" and row["metric"] == "step"][-1]
    # Three counted steps of each round, neither the first nor the profiled ones.
    assert (last["n"], last["rounds"], last["p50"]) == (6, 2, 3.5)
    assert last["losses"] == {"1": 9.0, "2": 8.9, "4": pytest.approx(8.7)}
    assert last["mfu_c"] is last["hfu"] is last["peak_memory_gib"] is None
    assert last["quick"]
    (loss,) = (row for row in rows if row["system"] == REFERENCE)
    assert (loss["metric"], loss["step"], loss["p50"], loss["products"]) == ("loss", 2, 8.9, "fp32")
    notes = {row["note"] for row in rows if row["metric"] == "breakdown"}
    assert notes == {"the trace has no work of a GPU in it"}
    assert not list(tmp_path.rglob("trace.json"))


def test_the_reference_runs_alone_where_only_it_is_named(tmp_path: Path, began: list[Any]) -> None:
    contest(tmp_path).run([REFERENCE], rounds=2)
    assert [name for name, _ in began] == [REFERENCE]
    (row,) = rows_of(tmp_path)
    assert (row["system"], row["metric"], row["step"]) == (REFERENCE, "loss", 2)


def test_what_does_not_fit_the_budget_is_said(tmp_path: Path, began: list[Any]) -> None:
    contest(tmp_path, seconds=1e-9).run(["octant", "megatron"], rounds=2)
    assert began == []
    found = {row["system"]: row["unavailable"] for row in rows_of(tmp_path)}
    assert found["octant"] == "not begun: the budget of 0 s was over"
    assert found["megatron"].startswith("megatron-core's fast layers are those of Transformer Engine")


def test_a_round_that_does_not_fit_leaves_the_figures_of_the_first(
    tmp_path: Path, began: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    found = contest(tmp_path)
    found.run(["plain"], rounds=1)
    found._took["plain"] = 1e9
    found._measure("plain", 1)
    assert "plain: no round 2: not begun: the budget of 100 s was over" in capsys.readouterr().out
    assert not [row for row in rows_of(tmp_path) if "unavailable" in row]


def test_more_gpus_than_there_are_is_a_reason(
    tmp_path: Path, began: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.step.systems.visible_gpus", lambda: ["3"])
    contest(tmp_path, "tp2_llama_8b").run(["octant"], rounds=1)
    (row,) = rows_of(tmp_path)
    assert row["unavailable"] == "needs 2 GPUs, and 1 are visible"


def test_one_rank_alone_takes_one_gpu_and_has_no_losses(
    tmp_path: Path, began: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.step.systems.visible_gpus", lambda: ["3"])
    contest(tmp_path, "zero1_gpt_1_3b_accum8_2gpus").run([ONE_RANK], rounds=1)
    assert [name for name, _ in began] == [ONE_RANK]
    row = next(row for row in rows_of(tmp_path) if row["metric"] == "step")
    assert (row["gpus"], row["losses"]) == (2, {})


def test_one_rank_of_one_is_no_other_system(tmp_path: Path, began: list[Any]) -> None:
    contest(tmp_path).run([ONE_RANK], rounds=1)
    (row,) = rows_of(tmp_path)
    assert (row["unavailable"], began) == ("the case has one rank", [])


@pytest.mark.parametrize("infinite", [0, 2])
def test_one_rank_whose_gradients_are_infinite_is_no_measurement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, infinite: int
) -> None:
    def run(*_: object) -> None:
        folder = tmp_path / "runs" / "tp2_llama_8b"
        folder.mkdir(parents=True)
        (folder / "summary.json").write_text(json.dumps({"steps_with_infinite_gradients": infinite}))
        (folder / "metrics.jsonl").write_text('{"step_s": 0.5, "loss": 9.0}\n')

    monkeypatch.setattr("benchmarks.step.process.run", run)
    found = systems.measure(ONE_RANK, CASES["tp2_llama_8b"], [], Place(tmp_path, 10.0))
    if infinite:
        assert found == "gradients of 2 steps were not finite, which is less work"
    else:
        assert isinstance(found, Record)
        assert found.step_s == [0.5]


def test_rates_of_two_gpus_and_the_bubble() -> None:
    words = ["parallel=single", "parallel.pp=2", "parallel.dp=1", "train.steps=2", "run.name=x", "model.num_layers=2"]
    found = facts(load([*LLAMA, *words]), 2, 0.5, "NVIDIA H200")
    assert found["global_batch"] == 8
    assert (found["tokens_per_s"], found["tokens_per_s_per_gpu"], found["samples_per_s"]) == (1024.0, 512.0, 16.0)
    assert found["ideal_bubble"] == pytest.approx(1 / 5)
    assert found["tflops_c"] == pytest.approx(found["mfu_c"] * 989)
    assert found["hfu"] == found["mfu_c"] < found["mfu_f"]


def test_recomputed_flops_count_for_the_hardware() -> None:
    end = ["train.steps=2", "run.name=x"]
    none, selective, full = (
        hardware_flops_per_token(load([*LLAMA, *end, f"train.recompute={kind}"]))
        for kind in ("none", "selective", "full")
    )
    # Four blocks of width 128: scores and values of 8 heads of 16 over half of 64 positions.
    assert selective - none == 4 * (4 * 128 * 32)
    matrices = 128 * (128 + 2 * 64 + 128) + 3 * 128 * 352
    assert full - none == 4 * (2 * (matrices + 2 * 128) + 4 * 128 * 32)
