"""How many ranks a run without a launcher starts, and how."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence

import psutil
import pytest
import torch
from torch.distributed import TCPStore

from engine.config import (
    Config,
    DataConfig,
    Device,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    TrainingConfig,
    launch_env,
)
from engine.errors import LaunchError
from engine.train import early, local
from engine.train.stop import StopSignal
from tests.helpers.repo import ROOT


def config(
    device: Device, pp: int = 1, tp: int = 1, dp: int | None = None, threads: int | None = None, context: int = 1
) -> Config:
    return Config(
        model=ModelConfig(name="m", num_layers=4, hidden_size=48, num_heads=6, vocab_size=512, max_positions=64),
        parallel=ParallelConfig(pp=pp, tp=tp, dp=dp, context=context),
        data=DataConfig(source="random", seq_len=32, vocab_size=512),
        optim=OptimConfig(lr=1e-3),
        train=TrainingConfig(steps=1, micro_batch=1, device=device, cpu_threads=threads),
    )


def gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


@pytest.mark.parametrize(
    ("count", "device", "pp", "tp", "dp", "ranks"),
    [
        (0, Device.auto, 1, 1, None, 1),
        (0, Device.auto, 2, 2, None, 4),
        (0, Device.cpu, 2, 2, 2, 8),
        (0, Device.cpu, 1, 1, 3, 3),
        (8, Device.cpu, 2, 1, None, 2),
        (8, Device.auto, 1, 1, None, 8),
        (8, Device.auto, 2, 2, None, 8),
        (6, Device.auto, 2, 2, None, 4),
        (8, Device.cuda, 1, 2, 1, 2),
        (8, Device.cuda, 2, 2, 2, 8),
    ],
)
def test_world_size(
    monkeypatch: pytest.MonkeyPatch, count: int, device: Device, pp: int, tp: int, dp: int | None, ranks: int
) -> None:
    gpus(monkeypatch, count)
    assert local.world_size(config(device, pp, tp, dp)) == ranks


def test_ranks_that_share_a_sequence_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, 8)
    assert local.world_size(config(Device.cpu, context=4)) == 4
    assert local.world_size(config(Device.cpu, pp=2, tp=2, dp=1, context=2)) == 8
    assert local.world_size(config(Device.auto, tp=2, context=2)) == 8


@pytest.mark.parametrize(("pp", "tp", "dp", "wanted"), [(2, 2, 2, 8), (4, 2, None, 8), (1, 1, 5, 5)])
def test_more_ranks_than_gpus_are_refused(
    monkeypatch: pytest.MonkeyPatch, pp: int, tp: int, dp: int | None, wanted: int
) -> None:
    gpus(monkeypatch, 4)
    with pytest.raises(LaunchError) as caught:
        local.world_size(config(Device.auto, pp, tp, dp))
    assert str(caught.value) == (
        f"1. [OCT513] parallel.pp*parallel.context*parallel.tp*parallel.dp={wanted}: this machine shows 4 GPUs and "
        "each rank needs its own. Use degrees whose product is at most 4, start on more machines with torchrun, or "
        "train.device=cpu"
    )


@pytest.mark.parametrize(
    ("count", "device", "threads", "already", "found"),
    [
        (0, Device.cpu, None, None, "2"),
        (0, Device.cpu, 3, None, "3"),
        (4, Device.cuda, None, None, "8"),
        (0, Device.cpu, None, "7", "7"),
    ],
)
def test_every_rank_gets_the_command_and_its_place(
    monkeypatch: pytest.MonkeyPatch, count: int, device: Device, threads: int | None, already: str | None, found: str
) -> None:
    gpus(monkeypatch, count)
    calls: list[tuple[Sequence[str], Sequence[Mapping[str, str]]]] = []

    def record(words: Sequence[str], environments: Sequence[Mapping[str, str]]) -> int:
        calls.append((words, environments))
        return 75

    monkeypatch.setattr(local, "supervise", record)
    monkeypatch.setattr(os, "environ", {"PATH": "/bin"} | ({} if already is None else {"OMP_NUM_THREADS": already}))
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert local.start_ranks(4, config(device, threads=threads), ["a=b", "c='d e'"]) == 75
    ((words, places),) = calls
    assert words == [sys.executable, "-m", "engine.train", "a=b", "c='d e'"]
    assert [place["RANK"] for place in places] == [place["LOCAL_RANK"] for place in places] == list("0123")
    for place in places:
        env = launch_env.read(place)
        assert env is not None and (env.world_size, env.local_world_size, env.master_addr) == (4, 4, "127.0.0.1")
        assert (place["OMP_NUM_THREADS"], place["PATH"]) == (found, "/bin")


def supervised(code: str, ranks: int = 2) -> int:
    """Exit code of processes that run `code`, which knows its place as `rank`."""
    words = [sys.executable, "-c", f"import os, sys, time, signal\nrank = int(os.environ['RANK'])\n{code}"]
    return local.supervise(words, [{**os.environ, "RANK": str(rank)} for rank in range(ranks)], grace_s=0.2)


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("", 0),
        ("sys.exit(75)", 75),
        ("sys.exit(75 if rank else 0)", 75),
        ("sys.exit(3) if rank else time.sleep(60)", 3),
        ("os.kill(os.getpid(), signal.SIGKILL) if rank else time.sleep(60)", 137),
        ("sys.exit(75) if rank else sys.exit(2)", 2),
    ],
)
def test_the_first_failure_ends_all_and_is_the_jobs(code: str, found: int) -> None:
    assert supervised(code) == found


def test_sigterm_reaches_every_rank() -> None:
    # One write: the ranks share the pipe, and `print` writes a line and its end apart where output is unbuffered.
    code = (
        "import os, sys, time, signal\nsignal.signal(signal.SIGTERM, lambda *a: sys.exit(75))\n"
        "os.write(1, b'up\\n')\ntime.sleep(60)"
    )
    program = (
        "import os, sys\nfrom engine.train import local\n"
        f"sys.exit(local.supervise([sys.executable, '-c', {code!r}], [dict(os.environ)] * 3))"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(3)] == ["up\n"] * 3
    process.terminate()
    assert process.wait(30) == 75


def test_a_warning_during_the_start_is_kept_and_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(early, "received", None)
    before = signal.getsignal(signal.SIGUSR1)
    early.keep()
    try:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert early.received == signal.SIGUSR1
        listening = StopSignal()
        assert not listening.agreed()
        listening.install()
        listening.restore()
        assert listening.agreed()
        # The ranks ignore it until they keep it themselves.
        code = "time.sleep(0.5)\nprint(signal.getsignal(signal.SIGUSR1))\nsys.exit(75)"
        assert supervised(code) == 75
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_ranks_end_with_the_process_that_started_them() -> None:
    code = "import os, time\nos.write(1, b'%d\\n' % os.getpid())\ntime.sleep(60)"
    program = (
        "import os, sys\nfrom engine.train import local\n"
        f"local.supervise([sys.executable, '-c', {code!r}], [dict(os.environ)] * 2)"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None
    ranks = [psutil.Process(int(process.stdout.readline())) for _ in range(2)]
    process.kill()
    process.wait(10)
    _, alive = psutil.wait_procs(ranks, timeout=10)
    assert alive == []


def test_a_single_rank_needs_no_port() -> None:
    env = local.alone()
    assert (env.rank, env.world_size, env.local_rank, env.local_world_size, env.master_port) == (0, 1, 0, 1, 0)


def test_ranks_meet_at_a_port_that_is_taken_already() -> None:
    store, meeting = local.meeting_point()
    with socket.socket() as probe, pytest.raises(OSError):
        probe.bind((meeting["MASTER_ADDR"], int(meeting["MASTER_PORT"])))
    guest = TCPStore(meeting["MASTER_ADDR"], int(meeting["MASTER_PORT"]), is_master=False)
    guest.set("word", "here")
    assert store.get("word") == b"here"
