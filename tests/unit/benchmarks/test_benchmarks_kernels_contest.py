from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.kernels import attention
from benchmarks.kernels.attention_systems import AttentionCase, System, situation, systems
from benchmarks.kernels.contest import Bench, Case, Entrant, apart, contest, differentiable, judge_by
from benchmarks.kernels.copying import COPY, copy_case, copy_entrant, write_of_copy
from benchmarks.kernels.documents import lengths_of_documents
from benchmarks.kernels.exact import attention_judge, last_head
from benchmarks.kernels.sheet import Sheet
from benchmarks.kernels.timing import Budget, Timer, reason
from engine_kernels.documents import Documents
from engine_kernels.reference.attention import attention as reference_attention
from engine_kernels.registry import Impl, register

CPU = torch.device("cpu")


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    sheet = Sheet.open(tmp_path / "out", "abc", ["--quick"], CPU, quick=True)
    return Bench(sheet, Timer(CPU, least=3, most=3), Budget(60.0), frozenset({"left out"}))


def rows(bench: Bench) -> list[dict[str, Any]]:
    return [json.loads(text) for text in bench.sheet.path.read_text().splitlines()]


def a_case(wanted: Sequence[Tensor]) -> Case:
    return Case("square", {"fwd": 2e9, "bwd": 4e9}, "gb_per_s", {"suite": "s"}, judge_by(wanted, 1e-3))


def test_systems_take_turns_and_every_other_round_runs_backwards() -> None:
    order: list[str] = []
    calls = {name: {phase: (lambda n=name + phase: order.append(n)) for phase in "12"} for name in "ab"}
    times, failed = Timer(CPU, least=2, most=50).rounds(calls, seconds=0.0)
    # Warm-up of all, then two rounds: the least, although no time was given.
    assert order == ["a1", "a2", "b1", "b2", "a1", "a2", "b1", "b2", "b1", "b2", "a1", "a2"]
    assert {name: {phase: len(v) for phase, v in found.items()} for name, found in times.items()} == {
        "a": {"1": 2, "2": 2},
        "b": {"1": 2, "2": 2},
    }
    assert failed == {}


def test_no_more_samples_than_the_most() -> None:
    times, _ = Timer(CPU, least=2, most=5).rounds({"a": {"fwd": lambda: None}}, seconds=60.0)
    assert len(times["a"]["fwd"]) == 5


def test_a_system_that_breaks_on_the_way_stops_nobody() -> None:
    left = iter(range(2))

    def breaks() -> None:
        if next(left, None) is None:
            raise MemoryError("all of it")

    times, failed = Timer(CPU, least=4, most=4).rounds({"a": {"fwd": breaks}, "b": {"fwd": lambda: None}}, 0.0)
    assert failed == {"a": "MemoryError: all of it"}
    assert list(times) == ["b"]
    assert len(times["b"]["fwd"]) == 4


def test_reasons_are_short_and_name_no_folder() -> None:
    text = reason(ImportError("cannot import name 'x'\n from 'y' (/home/someone/site-packages/y.py)"))
    assert text == "ImportError: cannot import name 'x' from 'y' (y.py)"
    assert reason(KeyError()) == "KeyError"
    assert len(reason(ValueError("x" * 1000))) == 300


def test_results_are_judged_before_they_are_timed(bench: Bench) -> None:
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    grads = [torch.tensor([1.0, 1.0])]

    def late() -> Entrant:
        raise ImportError("No module named 'late'")

    makers = {
        "good": lambda: differentiable(torch.square, [x], grads),
        "bad": lambda: differentiable(lambda y: y * 2.0, [x], grads),
        "nan": lambda: differentiable(lambda y: y.square() * float("nan"), [x], grads),
        "one tensor": lambda: Entrant({"fwd": lambda: None}, [x]),
        "other shape": lambda: Entrant({"fwd": lambda: None}, [x[:1], x]),
        "late": late,
        "left out": late,
    }
    times = contest(bench, a_case([x.detach().square(), 2 * x.detach()]), makers, 1)
    assert list(times) == ["good"]
    found = {(row["system"], row["metric"]): row for row in rows(bench)}
    assert {system: row["unavailable"] for (system, metric), row in found.items() if metric == "unavailable"} == {
        "bad": "wrong result: relative errors 2.4e-01, 4.5e-01, limit 1e-03",
        "nan": "wrong result: relative errors nan, nan, limit 1e-03",
        "one tensor": "wrong result: 1 tensors, not 2",
        "other shape": "wrong result: shape (1,), not (2,)",
        "late": "ImportError: No module named 'late'",
    }
    both = found["good", "fwd+bwd"]
    assert both["n"] == 3
    assert both["error"] == 0.0
    assert both["gb_per_s"] == pytest.approx(6.0 / both["p50"])
    assert both["suite"] == "s"
    assert (both["hardware"], both["architecture"], both["commit"]) == ("CPU", "cpu", "abc")
    assert both["command"] == "python -m benchmarks.kernels.run OUT_FOLDER --quick"
    assert both["versions"]["triton"]
    assert times["good"]["fwd+bwd"] == [a + b for a, b in zip(times["good"]["fwd"], times["good"]["bwd"], strict=True)]


def test_a_suite_whose_time_is_over_builds_nothing_more(bench: Bench) -> None:
    over = Bench(bench.sheet, bench.timer, Budget(0.0))
    built: list[str] = []
    assert contest(over, a_case([]), {"a": lambda: built.append("a")}, 1) == {}
    assert built == []
    assert [row["unavailable"] for row in rows(over)] == ["the suite's time was used up"]


def test_a_system_that_compiles_for_long_leaves_time_to_the_others(bench: Bench) -> None:
    bench.built_s.update({"slow": 21.0, "quick": 19.0})
    case = Case("c", {}, "tflops", {"suite": "s"}, lambda results: {})
    makers = {name: lambda: Entrant({"fwd": lambda: None}, []) for name in bench.built_s}
    assert list(contest(bench, case, makers, 1)) == ["quick"]
    assert rows(bench)[0]["unavailable"] == "compiling it for earlier cases took too much of the suite's time"
    assert bench.built_s["slow"] == 21.0
    assert bench.built_s["quick"] > 19.0


def test_relative_errors() -> None:
    x = torch.tensor([3.0, 4.0])
    assert apart(x, x) == 0.0
    assert apart(x * 1.1, x) == pytest.approx(0.1)
    assert apart(torch.tensor([0.0, 0.5]), torch.zeros(2)) == pytest.approx(0.5)


def test_bandwidth_is_held_against_a_copy_that_may_be_shorter(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.kernels.copying.MOST_BYTES", 400)
    case = Case("c", {"step": 1000.0}, "gb_per_s", {"suite": "s"}, lambda results: {})
    assert copy_case(case).work == {"step": 400.0}
    entrant = copy_entrant(CPU, case.work)
    # 100 elements of 2 bytes, read and written.
    assert entrant.phases["step"]().shape == (100,)
    write_of_copy(bench, case, {COPY: {"step": [1.0, 1.0]}, "ours": {"step": [4.0, 2.0]}})
    (row,) = rows(bench)
    assert (row["system"], row["metric"], row["unit"]) == ("ours", "of copy: step", "ratio")
    assert (row["p20"], row["p80"]) == (pytest.approx(0.625 + 0.2 * 0.625), pytest.approx(0.625 + 0.8 * 0.625))


CASES = {
    "causal": ((2, 9, 4, 2), True, None),
    "full": ((1, 7, 2, 2), False, None),
    "documents": ((2, 8, 4, 1), True, [3, 5, 1, 6, 1]),
}


@pytest.mark.parametrize(("shape", "causal", "pieces"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("step", [1, 2**26])
def test_exact_attention_is_the_reference(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], causal: bool, pieces: list[int] | None, step: int
) -> None:
    monkeypatch.setattr("benchmarks.kernels.exact._SCORES", step * shape[1])
    batch, length, heads, kv_heads = shape
    torch.manual_seed(0)
    leaves = [torch.randn(batch, length, n, 8, requires_grad=True) for n in (heads, kv_heads, kv_heads)]
    documents = None if pieces is None else Documents(torch.tensor([0, *pieces]).cumsum(0).int(), max(pieces))
    out = reference_attention(*leaves, causal=causal, documents=documents)
    dout = torch.randn_like(out)
    results = [out.detach(), *torch.autograd.grad(out, leaves, dout)]
    exact = last_head(*leaves, dout, causal=causal, documents=documents)
    judge = attention_judge(exact)
    assert judge(results)["error"] < 1e-6
    assert judge(results)["apart_from_first"] == 0.0
    for number in range(4):
        wrong = [x.clone() for x in results]
        wrong[number][-1, -1, -1] += wrong[number].std() * 2
        with pytest.raises(Exception, match="wrong result"):
            judge(wrong)
        # Another head than the one that is known exactly.
        wrong = [x.clone() for x in results]
        wrong[number][0, 0, 0] += wrong[number].std() * 2
        with pytest.raises(Exception, match="wrong result"):
            judge(wrong)


def test_lengths_of_documents_fill_their_rows() -> None:
    lengths = lengths_of_documents(40, 8192, 1024.0)
    assert sum(lengths) == 40 * 8192
    assert set(range(8192, 40 * 8192, 8192)) <= set(torch.tensor(lengths).cumsum(0).tolist())
    assert 800 < sum(lengths) / len(lengths) < 1100
    assert lengths == lengths_of_documents(40, 8192, 1024.0)
    assert lengths != lengths_of_documents(40, 8192, 1024.0, seed=1)


def test_attention_cases_are_ordered_by_importance_and_all_there() -> None:
    found = list(attention.cases(quick=False))
    assert [(c.head_dim, c.length // 1024, c.causal) for c in found[:5]] == [(128, k, True) for k in (4, 8, 1, 2, 16)]
    assert len(set(found)) == len(found) == 25
    assert [c.heads // c.kv_heads for c in found].count(4) == 1
    assert all(c.batch * c.length == max(16384, c.length) for c in found)
    assert max(c.length for c in found if not c.causal) == 16384


def test_operations_of_attention() -> None:
    dense = AttentionCase(batch=2, length=4, heads=3, kv_heads=3, head_dim=5, causal=False)
    assert attention.work_of(dense) == {"fwd": 4.0 * 2 * 3 * 16 * 5, "bwd": 2.5 * 4 * 2 * 3 * 16 * 5}
    packed = AttentionCase(batch=2, length=4, heads=3, kv_heads=3, head_dim=5, causal=True, pieces=(1, 3, 4))
    assert attention.work_of(packed)["fwd"] == 4 * 3 * (1 + 9 + 16) * 5 / 2


def test_auto_is_held_against_the_best_with_and_without_flash_attn_4(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine_kernels.registry._IMPLS", {})
    for name in ("flash_attn_4", "flex", "sdpa_cudnn"):
        register(Impl("attention", name, lambda s: None, lambda: None))
    case = AttentionCase(batch=1, length=8, heads=2, kv_heads=2, head_dim=16, causal=True)
    entry = Case(case.name, {}, "tflops", {"suite": "attention"}, lambda results: {})
    seconds = {"flash_attn_4": 1.0, "flex": 3.0, "sdpa_cudnn": 2.0, "triton tutorial": 4.0}
    attention.write_auto(bench, entry, case, {name: {"fwd+bwd": [s, s]} for name, s in seconds.items()})
    attention.write_auto(bench, entry, case, {"flash_attn_4": {"fwd+bwd": [1.0]}})
    found = [(r["system"], r.get("chosen"), r.get("best"), r.get("ratio"), r.get("unavailable")) for r in rows(bench)]
    assert found == [
        ("auto", "flash_attn_4", "flash_attn_4", 1.0, None),
        ("auto without flash_attn_4", "flex", "sdpa_cudnn", 1.5, None),
        ("auto", "flash_attn_4", "flash_attn_4", 1.0, None),
        ("auto without flash_attn_4", None, None, None, "auto takes flex, which was not timed"),
    ]


def test_systems_are_the_registrys_and_the_tutorials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine_kernels.registry._IMPLS", {})
    register(Impl("attention", "flex", lambda s: "needs wings" if s.head_dim == 16 else None, lambda *qkv, causal: qkv))
    register(Impl("attention", "reference", lambda s: None, lambda: None))
    case = AttentionCase(batch=1, length=8, heads=2, kv_heads=2, head_dim=16, causal=True)
    found = systems(case, CPU)
    assert list(found) == ["flex", "triton tutorial"]
    with pytest.raises(Exception, match="needs wings"):
        found["flex"]()
    wide = AttentionCase(batch=1, length=8, heads=2, kv_heads=2, head_dim=32, causal=True)
    system = systems(wide, CPU)["flex"]()
    assert isinstance(system, System)
    assert system.call(1, 2, 3) == (1, 2, 3)
    packed = Documents(torch.tensor([0, 8], dtype=torch.int32), 8)
    assert list(systems(case, CPU, documents=packed)) == ["flex"]
    assert situation(case, CPU).head_dim == 16
