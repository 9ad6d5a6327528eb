"""The exit code and the messages of `python -m engine.train`, with the training itself left out."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from engine.config import Config
from engine.config.launch_env import LaunchEnv
from engine.errors import CheckpointError, LaunchError
from engine.train import __main__ as train
from engine.train import local, session

RANK_0 = {"RANK": "0", "WORLD_SIZE": "8", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.fixture
def environ(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The variables of the process, none set by a launcher; to be filled by the test."""
    variables: dict[str, str] = {}
    monkeypatch.setattr(os, "environ", variables)
    return variables


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What would have been checked, started and run, in order."""
    seen: list[tuple[Any, ...]] = []
    monkeypatch.setattr(session, "check_before_launch", lambda cfg: seen.append(("check",)))
    monkeypatch.setattr(session, "run", lambda cfg, env: seen.append(("run", cfg, env)))
    monkeypatch.setattr(local, "start_ranks", lambda count, cfg, argv: seen.append(("start", count, argv)) or 75)
    return seen


def test_under_a_launcher_it_runs_as_this_rank(environ: dict[str, str], runs: list[tuple[Any, ...]]) -> None:
    environ.update(RANK_0)
    assert train.main(["experiment=first_light"]) == 0
    ((kind, cfg, env),) = runs
    assert kind == "run"
    assert isinstance(cfg, Config)
    assert (env.rank, env.world_size, env.master_port) == (0, 8, 29500)


def test_alone_it_runs_in_this_process(environ: dict[str, str], runs: list[tuple[Any, ...]]) -> None:
    assert train.main(["train.device=cpu"]) == 0
    assert [step[0] for step in runs] == ["check", "run"]
    env: LaunchEnv = runs[1][2]
    assert (env.rank, env.world_size, env.local_world_size, env.launcher) == (0, 1, 1, "none")


def test_for_several_ranks_it_checks_once_and_starts_them(environ: dict[str, str], runs: list[tuple[Any, ...]]) -> None:
    argv = ["experiment=first_light", "run.name=x"]
    assert train.main(argv) == 75, "the exit code is that of the ranks"
    assert runs == [("check",), ("start", 8, argv)]


def test_a_refused_launch_is_exit_code_2_with_the_message_on_stderr(
    environ: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    environ["RANK"] = "0"
    assert train.main([]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("LaunchError:\n1. [OCT501] WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT=(not set): ")
    assert "Start with 'torchrun --nproc-per-node=N -m engine.train'" in err


def test_options_are_refused_before_the_launch_is_looked_at(
    environ: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    environ["RANK"] = "two"
    environ["LOCAL_RANK"] = "0"
    assert train.main(["model=gpt_tinny"]) == 2
    assert "ConfigError:\n1. [OCT103] model=gpt_tinny: " in capsys.readouterr().err


@pytest.mark.parametrize("rank", ["two", "8", ""])
def test_a_rank_that_is_none_is_told_so(environ: dict[str, str], rank: str, capsys: pytest.CaptureFixture[str]) -> None:
    environ.update(RANK_0, RANK=rank, LOCAL_RANK="1")
    assert train.main(["experiment=first_light"]) == 2
    assert "LaunchError:\n1. [OCT50" in capsys.readouterr().err


def test_rules_are_checked_against_the_launchers_world(
    environ: dict[str, str], runs: list[tuple[Any, ...]], capsys: pytest.CaptureFixture[str]
) -> None:
    environ.update(RANK_0, WORLD_SIZE="4")
    assert train.main(["experiment=first_light", "optim.lr=0"]) == 2
    err = capsys.readouterr().err
    assert "ConfigError:\n1. [OCT203] parallel.dp=2: dp=2 asked, but the launcher gave world_size 4" in err
    assert "\n2. [OCT301] optim.lr=0.0: " in err
    assert runs == []


def test_rules_are_checked_before_ranks_are_started(
    environ: dict[str, str], runs: list[tuple[Any, ...]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(["experiment=first_light", "zero=z3"]) == 2
    assert "[OCT208] zero.stage=3" in capsys.readouterr().err
    assert runs == []


def test_too_few_gpus_are_refused(
    environ: dict[str, str], runs: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert train.main(["parallel=octant", "train.device=cuda"]) == 2
    err = capsys.readouterr().err
    assert "[OCT513] parallel.pp*parallel.context*parallel.tp*parallel.dp=8: this machine shows 4 GPUs" in err
    assert runs == []


@pytest.mark.parametrize(
    ("rank", "local_rank", "error", "heard"),
    [
        ("0", "0", CheckpointError, True),
        # The same on every rank: one message is enough.
        ("1", "1", CheckpointError, False),
        # The first rank of another host may be the only one that misses a file.
        ("4", "0", CheckpointError, True),
        # A device that is missing is missed by one rank alone.
        ("5", "5", LaunchError, True),
    ],
)
def test_a_refusal_is_heard_from_who_may_be_alone_with_it(
    environ: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    rank: str,
    local_rank: str,
    error: type[LaunchError],
    heard: bool,
) -> None:
    def run(cfg: Config, env: LaunchEnv) -> None:
        raise error.of(600, "option", "value", "rule", "way out")

    monkeypatch.setattr(session, "run", run)
    monkeypatch.setattr(train, "SILENT_WAIT_S", 0.0)
    environ.update(RANK_0, RANK=rank, LOCAL_RANK=local_rank)
    assert train.main(["experiment=first_light"]) == 2
    assert ("option=value: rule. way out" in capsys.readouterr().err) is heard


def test_help_and_show_are_exit_code_0(environ: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["--help"]) == 0
    assert "python -m engine.train" in capsys.readouterr().out
    assert train.main(["--cfg", "job", "train.steps=77"]) == 0
    out, err = capsys.readouterr()
    assert "steps: 77" in out
    assert err == ""
