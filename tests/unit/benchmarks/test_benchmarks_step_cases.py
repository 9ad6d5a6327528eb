from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.step import run
from benchmarks.step.cases import CASES, Case
from benchmarks.step.words import merged, quick, value_of, words_of
from engine.config import rules
from engine.config.load import load
from engine.plan.costs import total_parameters

LAST = ("train.steps=19", "run.name=case")
PAIRS = [(name, small) for name in CASES for small in (False, True)]


def samples(words: list[str]) -> int:
    degrees = [value_of(words, name) for name in ("train.micro_batch", "train.accum_steps", "parallel.dp")]
    return degrees[0] * degrees[1] * degrees[2]


@pytest.mark.parametrize(("name", "small"), PAIRS)
def test_all_systems_of_a_case_train_on_the_same_global_batches(name: str, small: bool) -> None:
    case = quick(CASES[name]) if small else CASES[name]
    words = words_of(case)
    assert len({samples(found) for found in (words.octant, words.sharded, words.whole, words.reference)}) == 1
    for found in (words.sharded, words.whole):
        assert value_of(found, "parallel.dp") == case.gpus
    shared = [word for word in words.whole if word.startswith(("model", "data", "optim"))]
    assert set(shared) <= set(words.octant) & set(words.reference)


@pytest.mark.parametrize("name", ["llama_8b", "zero3_llama_8b_2gpus", "pp4_interleaved_gpt_2_8b", "offload_largest"])
@pytest.mark.parametrize("small", [False, True])
def test_overrides_are_legal(name: str, small: bool) -> None:
    case = quick(CASES[name]) if small else CASES[name]
    words = words_of(case)
    for found, world in ((words.octant, case.gpus), (words.sharded, case.gpus), (words.reference, 1)):
        # The second round has no profiled steps.
        cfg = load([*found, f"train.steps={case.warmup + case.measured}", "run.name=case"])
        rules.require(cfg, world)
        assert (cfg.data.seq_len == 64) is small
    assert cfg.precision.dtype == "fp32"


def test_targets_are_compared_with_cases_that_exist_and_come_before() -> None:
    names = list(CASES)
    for name, case in CASES.items():
        for target in case.targets:
            assert not target.of or names.index(target.of) < names.index(name)


def test_the_largest_model_and_the_longest_sequence_are_what_their_targets_ask_for() -> None:
    largest = load([*words_of(CASES["offload_largest"]).octant, *LAST])
    assert total_parameters(largest.model) >= 17e9
    longest = load([*words_of(CASES["long_llama_8b"]).whole, *LAST])
    assert longest.data.seq_len >= 350_000


def test_later_words_replace_earlier_ones() -> None:
    assert merged(["zero=z1", "model=a", "zero=z3", "zero.stage=2"]) == ["zero=z3", "model=a", "zero.stage=2"]


def test_overrides_reach_all_systems_but_layout_and_formats_only_octant() -> None:
    mine = ["parallel.tp=2", "precision=fp16", "kernels.cuda_graphs=on"]
    words = words_of(CASES["zero3_llama_8b_2gpus"], ["train.micro_batch=1", *mine])
    everyone = (words.octant, words.sharded, words.whole, words.reference)
    assert all("train.micro_batch=1" in found for found in everyone)
    assert [[word in found for word in mine] for found in everyone] == [[True] * 3] + [[False] * 3] * 3
    assert "zero=z3" in words.sharded
    assert "zero=z1" in words.whole
    # dp is 1 now, and two replicas share its 4 samples.
    assert [value_of(found, "train.accum_steps") for found in everyone] == [4, 2, 2, 4]


def test_a_quick_case_keeps_its_layout() -> None:
    case = quick(CASES["pp4_interleaved_gpt_2_8b"])
    assert case.octant == CASES["pp4_interleaved_gpt_2_8b"].octant
    assert case.gpus == 4
    assert {"model=gpt_tiny", "precision=fp32"} <= set(case.words)
    # Formats that only bf16 has.
    assert "precision=fp32" not in quick(CASES["llama_8b_fp8"]).words
    assert "model=llama_tiny" in quick(CASES["long_llama_8b"]).words
    assert "model=bert_tiny" in quick(CASES["bert_large"]).words


def test_what_cannot_be_shared_is_refused_with_the_numbers() -> None:
    case = Case("odd", ("model=gpt_tiny", "train.micro_batch=3", "train.accum_steps=1"), ("parallel.tp=2",), gpus=2)
    with pytest.raises(ValueError, match="^odd: 3 samples of a step are not a multiple of 6$"):
        words_of(case)
    with pytest.raises(ValueError, match=r"^odd: pp \* tp \* context = 2 does not divide its 3 GPUs$"):
        words_of(replace(case, gpus=3))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--case", "gpt_1_3b"], "argument --case: unknown case 'gpt_1_3b' (known: gpt_1_3b_accum1, "),
        (["--systems", "plain,nanogpt"], "argument --systems: unknown system 'nanogpt' (known: octant, plain, "),
        (["--rounds", "0"], "--rounds 0: must be positive"),
        (["--warmup", "-1"], "--warmup -1: must be at least 0"),
        (["--budget-s", "0"], "--budget-s 0: must be positive"),
        (["train.steps=9"], "train.steps=9: the suite sets it (steps: --warmup and --measured)"),
        (["parallel.dp=2"], "parallel.dp=2: the suite sets it"),
        (["train.micro_batch=auto"], "train.micro_batch=auto: all systems train on the same batches, so a number is"),
        (["parallel.tp=3"], "gpt2_124m: pp * tp * context = 3 does not divide its 1 GPUs"),
    ],
)
def test_command_lines_are_refused(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as refused:
        run.main([str(out), "--commit", "abc", "--case", "gpt2_124m", "--quick", *words])
    assert message in capsys.readouterr().err + str(refused.value)
    assert not out.exists()


def test_without_a_gpu_only_quick_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit):
        run.main([str(tmp_path / "out"), "--commit", "abc", "--case", "gpt2_124m"])
    assert "no CUDA device is visible; on a CPU only --quick runs" in capsys.readouterr().err


def test_steps_of_the_command_line_count(tmp_path: Path) -> None:
    words = [str(tmp_path), "--commit", "abc", "--case", "gpt2_124m,bert_large", "--quick", "--measured", "7"]
    options, overrides = run.options_of([*words, "optim.lr=1e-3"])
    assert overrides == ["optim.lr=1e-3"]
    assert [(case.name, case.warmup, case.measured) for case in run.cases_of(options)] == [
        ("gpt2_124m", 1, 7),
        ("bert_large", 1, 7),
    ]


def test_the_list_says_gpus_and_targets(capsys: pytest.CaptureFixture[str]) -> None:
    run.main(["--list"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(CASES)
    assert "tp2_llama_8b: 2 GPUs: at least 9,500 tok/s per GPU" in lines
    assert "zero1_gpt_2_8b_2gpus: 2 GPUs: for comparison" in lines
