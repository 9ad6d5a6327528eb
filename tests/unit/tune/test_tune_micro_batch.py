"""`train.micro_batch=auto` around its trials: what is started, how its endings are read, what is kept and refused."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import pytest
import torch

from engine.config.load import load
from engine.errors import ConfigError, LaunchError
from engine.train import __main__ as train
from engine.train import local, session
from engine.tune import __main__ as tune
from engine.tune import micro_batch, trial

Capture = pytest.CaptureFixture[str]
GIB = 2**30


class Machine:
    """Answers trials without training: `peak(size)` bytes, out of memory above `room`."""

    def __init__(self) -> None:
        self.room, self.sizes, self.words = 10 * GIB, list[int](), list[list[str]]()
        self.code: int | None = None
        self.said = b""

    def supervise(
        self, words: Sequence[str], environments: Sequence[Mapping[str, str]], *, output: IO[bytes], grace_s: float
    ) -> int:
        folder, overrides = Path(words[3]), list(words[4:])
        size = int(
            next(word for word in reversed(overrides) if word.startswith("train.micro_batch=")).partition("=")[2]
        )
        self.sizes.append(size)
        self.words.append(overrides)
        output.write(self.said)
        if self.code is not None:
            return self.code
        peak = GIB * size
        fits = peak <= self.room
        for rank in range(len(environments)):
            # Rank 0 waits for the others, and is ended with them.
            if fits or rank or len(environments) == 1:
                told = {"fits": fits, "peak_bytes": peak if fits else None, "reason": "" if fits else "no more"}
                (folder / f"{rank}.json").write_text(json.dumps(told))
        return 0 if fits else trial.EXHAUSTED


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    made = Machine()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "environ", {})
    monkeypatch.setattr(local, "supervise", made.supervise)
    monkeypatch.setattr(local, "places", lambda count, cfg: (None, [{}] * count))
    monkeypatch.setattr(session, "prepare", lambda cfg, device, verify: None)
    monkeypatch.setattr(session, "check_before_launch", lambda cfg: None)
    monkeypatch.setattr(micro_batch, "rank_budget", lambda cfg, ranks: 10 * GIB)
    return made


WORDS = ["train.device=cpu", "parallel.dp=2", "run.name=x", "train.micro_batch=auto"]


def settled(*words: str) -> list[str]:
    argv = [*WORDS, *words]
    return micro_batch.settled(load(argv), argv, 2)


def test_the_number_takes_the_place_of_auto_and_is_told(machine: Machine, capsys: Capture) -> None:
    assert settled()[-1] == "train.micro_batch=8"
    out = capsys.readouterr().out
    assert (
        "train.micro_batch=auto: trying 1, 2, 3, 4, 6, 8, 12, 16 in 10.00 GiB (margin left out) of each rank\n" in out
    )
    assert "  micro-batch 12: no more (" in out
    assert "train.micro_batch=8: peak 8.00 GiB of 10.00 GiB (margin left out); 12 does not fit: no more; " in out
    record = json.loads(os.environ[session.FOUND])
    assert record["micro_batch"] == 8
    assert {one["size"]: one["fits"] for one in record["attempts"]}.items() >= {8: True, 12: False}.items()
    assert len(machine.sizes) == len(set(machine.sizes))


def test_a_trial_is_the_run_with_a_number_and_without_a_past(machine: Machine) -> None:
    settled("train.global_batch=64", "checkpoint.initial_weights=runs/other", "data.variable_length=true")
    cfg = load(machine.words[0])
    assert (cfg.train.global_batch, cfg.checkpoint.initial_weights, cfg.data.variable_length) == (None, None, False)
    accum = [word for words in machine.words for word in words if word.startswith("train.accum_steps=")]
    assert accum == ["train.accum_steps=2"] * len(machine.words)
    assert set(machine.sizes) <= {1, 2, 4, 8, 16}


def test_a_pipeline_is_tried_with_all_its_micro_batches(machine: Machine) -> None:
    argv = ["train.device=cpu", "parallel.pp=2", "train.accum_steps=8", "train.micro_batch=auto"]
    micro_batch.settled(load(argv), argv, 2)
    assert all("train.accum_steps=8" in words for words in machine.words)


def test_all_that_may_be_tried_can_fit(machine: Machine, capsys: Capture) -> None:
    assert settled("train.micro_batch_limit=4")[-1] == "train.micro_batch=4"
    assert "; the largest that may be tried; " in capsys.readouterr().out


def test_resuming_takes_what_was_found_and_another_layout_looks_anew(machine: Machine, capsys: Capture) -> None:
    settled()
    folder = Path("runs/x")
    (folder / "micro_batch.json").write_text(os.environ.pop(session.FOUND))
    tried = len(machine.sizes)
    assert settled("run.resume=true", "train.steps=300")[-1] == "train.micro_batch=8"
    assert len(machine.sizes) == tried
    assert "train.micro_batch=auto: 8, as runs/x/micro_batch.json says\n" in capsys.readouterr().out
    machine.room = 4 * GIB
    assert settled("run.resume=true", "train.recompute=full")[-1] == "train.micro_batch=4"
    assert "is of another model, layout or device: train.micro_batch is looked for anew" in capsys.readouterr().out
    assert settled()[-1] == "train.micro_batch=4", "a run that begins looks for itself"


def test_nothing_that_fits_is_refused_with_legal_ways_out(machine: Machine) -> None:
    machine.room = 0
    with pytest.raises(LaunchError) as caught:
        settled()
    text = str(caught.value)
    assert (
        "[OCT593] train.micro_batch=auto: not even 1 fits into 10.00 GiB (margin left out) of a rank: no more. " in text
    )
    assert "zero.stage=3 (" in text


def test_a_trial_that_fails_otherwise_ends_the_search_with_its_last_words(machine: Machine) -> None:
    machine.code, machine.said = 1, b"Traceback\nValueError: odd\n"
    with pytest.raises(LaunchError, match=r"OCT592\].*, and not for want of memory: Traceback \| ValueError: odd"):
        settled()
    machine.code = 0
    with pytest.raises(LaunchError, match="OCT592"):
        settled()


def test_a_rank_that_linux_kills_counts_as_out_of_memory(machine: Machine) -> None:
    machine.code = 128 + signal.SIGKILL
    with pytest.raises(LaunchError, match=r"OCT593\].*a rank was killed, as Linux does where the host's memory is"):
        settled()


def test_signals_end_the_search(machine: Machine) -> None:
    machine.code = 128 + signal.SIGINT
    with pytest.raises(KeyboardInterrupt):
        settled()
    machine.code = 128 + signal.SIGTERM
    with pytest.raises(SystemExit) as caught:
        settled()
    assert caught.value.code == 143
    assert len(machine.sizes) == 2


def test_a_launcher_s_ranks_are_sent_to_the_command(machine: Machine, capsys: Capture) -> None:
    os.environ.update(RANK="0", WORLD_SIZE="2", LOCAL_RANK="0", MASTER_ADDR="localhost", MASTER_PORT="29500")
    assert train.main(["train.device=cpu", "train.micro_batch=auto"]) == 2
    err = capsys.readouterr().err
    assert "[OCT390] train.micro_batch=auto: " in err
    assert "Use the number that python -m engine.tune micro_batch finds with the same options" in err
    assert tune.main(["micro_batch", "train.device=cpu"]) == 2
    assert "[OCT595] train.micro_batch=auto: a launcher has started this, and" in capsys.readouterr().err
    assert machine.sizes == []


def test_options_that_break_rules_are_refused_before_a_trial(machine: Machine) -> None:
    with pytest.raises(ConfigError, match=r"OCT392\] train.global_batch=7: "):
        settled("train.global_batch=7")
    with pytest.raises(ConfigError, match="OCT301"):
        settled("optim.lr=-1")
    assert machine.sizes == []


def test_training_starts_with_the_number(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []
    monkeypatch.setattr(local, "start_ranks", lambda count, cfg, argv: started.append((cfg, argv)) or 0)
    assert train.main(WORDS) == 0
    [(cfg, argv)] = started
    assert cfg.train.micro_batch == 8
    assert argv == [*WORDS, "train.micro_batch=8"]


def test_the_command_prints_the_override(machine: Machine, capsys: Capture) -> None:
    assert tune.main(["micro_batch", "train.device=cpu", "train.micro_batch=3"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "train.micro_batch=8"


def test_a_trial_is_no_command_for_people(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "environ", {})
    with pytest.raises(LaunchError, match=r"OCT594\] .*Run python -m engine.tune micro_batch"):
        trial.main([str(tmp_path)])


def test_a_preset_found_by_name_does_not_bound_a_larger_variant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA GH200 144G HBM3e")
    monkeypatch.setattr(trial, "memory_bytes", lambda cfg, ranks: 140 * GIB)
    cfg = load([])
    assert trial.rank_budget(cfg, 1) == 133 * GIB
    cfg.hardware.memory_gib = 40.0
    assert trial.rank_budget(cfg, 1) == 38 * GIB


def test_a_rank_s_budget_on_cpus_is_its_share_of_the_host_or_what_is_stated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "available_bytes", lambda: 40 * GIB)
    words = ["train.device=cpu"]
    assert trial.rank_budget(load(words), 2) == 19 * GIB
    assert trial.rank_budget(load([*words, "hardware.memory_gib=10", "hardware.margin_gib=1"]), 2) == 9 * GIB
    monkeypatch.setattr(trial, "available_bytes", lambda: None)
    assert trial.rank_budget(load(words), 2) is None
    assert trial.rank_budget(load([*words, "hardware.memory_gib=10"]), 2) == round(9.5 * GIB)
