from __future__ import annotations

import subprocess
import sys

import pytest

from engine.config import rules
from engine.config.load import load
from engine.errors import ConfigError
from engine.plan.__main__ import main
from tests.helpers.repo import ROOT

Capture = pytest.CaptureFixture[str]


def test_a_plan_shows_mesh_bubble_and_memory_of_each_stage(capsys: Capture) -> None:
    words = ["--world", "8", "parallel=octant", "train.accum_steps=4", "zero=z2_offload"]
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "gpt_tiny: 1,082,112 parameters on 8 ranks = pp 2 x dp 2 x cp 1 x tp 2"
    assert lines[1] == "global batch: 32 samples = 8,192 tokens; ZeRO-2"
    assert lines[2] == "one_f_one_b with 4 micro-batches: bubble 20.0%"
    assert lines[3] == "MiB on the device of one rank, at the peak of a step:"
    head, first, last = (line.split() for line in lines[4:7])
    assert head[:4] == ["stage", "layers", "parameters", "weights"]
    assert first[:3] == ["0", "embed.tokens..block.2", "462,400"]
    assert last[:2] == ["1", "block.3..head"]
    assert sum(map(float, last[3:-1])) == pytest.approx(float(last[-1]), abs=0.03)
    assert lines[7].startswith("memory of a host for its 8 ranks: 0.021 GiB of offload; this machine")


def test_each_chunk_is_named_and_hosts_are_as_large_as_asked(capsys: Capture) -> None:
    words = ["parallel=interleaved", "train.accum_steps=4", "zero=z1_offload", "--per-host=1", "--world=4"]
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[5].split()[1:3] == ["embed.tokens..block.0,", "block.2..block.3"]
    assert lines[-1].startswith("memory of a host for its 1 ranks: 0.007 GiB of offload")


def test_copies_for_checkpoints_are_told(capsys: Capture) -> None:
    assert main(["parallel=octant", "checkpoint.every=5", "train.steps=5", "--per-host=4"]) == 0
    # 12 bytes for each of the 462,400 parameters of both slices of the first stage, which has three of the four blocks.
    assert "for its 4 ranks: 0.010 GiB of checkpoints" in capsys.readouterr().out


def test_large_models_are_told_in_gib(capsys: Capture) -> None:
    assert main(["model=llama_1b", "precision=bf16"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("GiB on the device")
    assert lines[4].split()[3] == "2.30"


def test_refusals_are_those_of_training_all_at_once(capsys: Capture) -> None:
    words = ["parallel.tp=3", "optim.lr=-1", "zero.stage=3", "parallel.pp=2"]
    assert main([*words, "--world=6"]) == 2
    with pytest.raises(ConfigError) as caught:
        rules.require(load(words), 6)
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"ConfigError:\n{caught.value}\n"
    assert [violation.code for violation in caught.value.violations] == [204, 206, 208, 301]
    assert "Use zero.stage=2, or 'parallel.pp=1 parallel.tp=2'" in err


def test_a_misspelt_option_and_a_world_without_ranks_are_refused(capsys: Capture) -> None:
    assert main(["model.num_layer=3"]) == 2
    assert "[OCT101] model.num_layer=3" in capsys.readouterr().err
    for flag in ("--world", "--per-host"):
        for value in ("0", "-3", "two"):
            with pytest.raises(SystemExit) as caught:
                main([f"{flag}={value}"])
            assert caught.value.code == 2
            told = f"argument {flag}: {value}: expected a number of ranks, 1 or more"
            assert told in capsys.readouterr().err


def test_help_names_its_own_flags_and_training_s_options(capsys: Capture) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert "usage: python -m engine.plan [--world N]" in out
    assert "model.num_layers" in out


def test_a_plan_needs_no_torch() -> None:
    code = "import sys; from engine.plan.__main__ import main; print(main(['zero=z1_offload']), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "0 False", done.stderr
