"""One builder at a time: waiting, dead owners here and elsewhere, owners that hang, lost ownership."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from engine.data.build import lock
from engine.data.build.lock import Owner, OwnershipLost, Timing, builder_lock, machine
from engine.errors import DataError

FAST = Timing(beat_s=0.02, look_s=0.01, stale_s=0.3)
HOLDER = """
import itertools, sys
from pathlib import Path
from engine.data.build.lock import Timing, builder_lock
timing = Timing(beat_s=0.02, look_s=0.01, stale_s=0.3)
with builder_lock(Path(sys.argv[1]), print, 60, timing) as owner:
    for line in itertools.chain(["held"], sys.stdin):
        owner.advance(len(line))
        print(line.strip(), flush=True)
print("released", flush=True)
"""


def holder(folder: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[3],
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def owner_file(folder: Path, **facts: object) -> Path:
    path = folder.with_name(f"{folder.name}.owner")
    content = {"host": "far", "pid": 4711, "machine": "another boot", "token": "t", "beat": 1, "done": 1, **facts}
    path.write_text(json.dumps(content))
    return path


def test_one_at_a_time_and_nothing_but_the_lock_file_stays(tmp_path: Path) -> None:
    folder = tmp_path / "entry"
    process = holder(folder)
    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        assert process.stdin is not None
        process.stdin.close()

    with builder_lock(folder, say, 60, FAST) as owner:
        assert process.stdout is not None and process.stdout.read() == "released\n"
        owner.check()
        assert json.loads((tmp_path / "entry.owner").read_bytes())["pid"] == os.getpid()
    process.wait(timeout=60)
    assert len(said) == 1
    assert f"waiting for process {process.pid} of " in said[0] and f"which builds {folder}" in said[0]
    assert "at most 60 s without progress (data.wait_s)" in said[0]
    assert [path.name for path in tmp_path.iterdir()] == ["entry.lock"]


def test_killed_holder_is_followed_at_once(tmp_path: Path) -> None:
    process = holder(tmp_path / "entry")
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert (tmp_path / "entry.owner").exists()
    patient = Timing(beat_s=0.02, look_s=0.01, stale_s=3600)
    with builder_lock(tmp_path / "entry", lambda line: None, 60, patient) as owner:
        owner.check()


@pytest.mark.parametrize("facts", [{}, {"machine": ""}, {"machine": machine(), "pid": os.getpid()}])
def test_silent_holder_elsewhere_is_followed_by_the_waiters_clock(tmp_path: Path, facts: dict[str, object]) -> None:
    """Another machine, one that cannot be told, or a process id that is in use again."""
    path = owner_file(tmp_path / "entry", **facts)
    for clock in (0, 2**33):
        owner_file(tmp_path / "entry", **facts)
        os.utime(path, (clock, clock))
        said: list[str] = []
        with builder_lock(tmp_path / "entry", said.append, 60, FAST) as owner:
            owner.check()
        assert "is gone; taking over" in said[-1]
    assert not path.exists()


def test_holder_elsewhere_that_counts_is_not_followed_but_given_up(tmp_path: Path) -> None:
    """It beats, so it lives; it does not get on, so the waiter gives up."""
    folder = tmp_path / "entry"
    path = owner_file(folder)
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(0.02):
            temporary = path.with_name("next")
            temporary.write_bytes(path.read_bytes().replace(b'"beat": ', b'"beat": 1'))
            os.replace(temporary, path)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with (
            pytest.raises(DataError) as caught,
            builder_lock(folder, lambda line: None, 0.8, Timing(beat_s=0.02, look_s=0.01, stale_s=0.4)),
        ):
            pass
    finally:
        stop.set()
        thread.join()
    message = str(caught.value)
    assert "[OCT451] data.wait_s=0.8" in message
    assert f"process 4711 of far holds {path} and made no progress with {folder} for 1 s" in message
    assert "End that process, or set a larger data.wait_s" in message


def test_stopped_holder_is_given_up(tmp_path: Path) -> None:
    process = holder(tmp_path / "entry")
    process.send_signal(signal.SIGSTOP)
    try:
        with pytest.raises(DataError, match="OCT451"), builder_lock(tmp_path / "entry", lambda line: None, 0.2, FAST):
            pass
    finally:
        process.kill()
        process.communicate(timeout=60)


def test_holder_that_was_followed_notices(tmp_path: Path) -> None:
    with builder_lock(tmp_path / "entry", lambda line: None, 60, FAST) as owner:
        owner.advance(1)
        other = owner_file(tmp_path / "entry")
        with pytest.raises(OwnershipLost):
            owner.check()
        owner._thread.join(timeout=20)
        with pytest.raises(OwnershipLost):
            owner.advance(2)
    assert other.exists(), "the other's file is not removed"


def test_file_that_came_in_between_is_put_back(tmp_path: Path) -> None:
    """Two waiters see one dead holder: the slower one must not remove the faster one's file."""
    path = owner_file(tmp_path / "entry", token="dead")
    waiter = lock._Waiter(path, tmp_path / "entry", lambda line: None, 60, Timing(look_s=0, stale_s=-1))
    assert waiter.look()
    path.unlink()
    faster = Owner(path, FAST)
    assert faster.claim()
    waiter.remove()
    faster.check()
    faster.release()
    assert list(tmp_path.iterdir()) == []


def test_file_system_without_flock_relies_on_the_owner_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(file: int, how: int) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", refuse)
    process = holder(tmp_path / "entry")
    said: list[str] = []
    with (
        pytest.raises(DataError, match=rf"process {process.pid} of "),
        builder_lock(tmp_path / "entry", said.append, 0.5, FAST),
    ):
        pass
    process.communicate("", timeout=60)
    with builder_lock(tmp_path / "entry", said.append, 60, FAST):
        pass
