"""One builder at a time, on one machine and on file systems that many machines share.

Two locks in a row. `flock` on NAME.lock: the kernel drops it when its holder dies, but some network file systems keep
it to one machine. NAME.owner, made with O_CREAT|O_EXCL: seen by every machine; its holder counts up in it, and whoever
waits takes over once the count stood still for `stale_s` of the waiter's own clock, so clocks need not agree, or at
once when the holder is a process of this machine that is gone.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import DataError


class OwnershipLost(Exception):
    """Another machine took this process for dead and builds now."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Seconds between two counts of a holder, between two looks of a waiter, and until a silent holder is dead."""

    beat_s: float = 1.0
    look_s: float = 0.5
    stale_s: float = 30.0


TIMING = Timing()


def machine() -> str:
    """Name of this boot of this machine, and of this container: process ids mean the same wherever it is equal."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def owner_file(folder: Path) -> Path:
    """The file that is there while somebody builds `folder`, or died over it."""
    return folder.with_name(f"{folder.name}.owner")


class Owner:
    """The holder of NAME.owner. `advance` tells waiters that the build moves; they give up on one that does not."""

    def __init__(self, path: Path, timing: Timing) -> None:
        self._path, self._timing = path, timing
        self._facts: dict[str, Any] = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "machine": machine(),
            "token": secrets.token_hex(8),
        }
        self._beat = self._done = 0
        self._lost = threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beats, name="build lock", daemon=True)

    @property
    def token(self) -> str:
        """Hex digits that no other owner has."""
        return str(self._facts["token"])

    def claim(self) -> bool:
        """Make the owner file and begin to count in it. False: somebody else's is there."""
        try:
            with open(self._path, "xb") as file:
                try:
                    _put(file.fileno(), self._content())
                except BaseException:
                    # Others would wait for a holder that never was.
                    self._path.unlink(missing_ok=True)
                    raise
        except FileExistsError:
            return False
        self._thread.start()
        return True

    def advance(self, done: int) -> None:
        """`done`: any number that changes as the build goes on. Costs nothing; the next count looks at the file.

        Raises OwnershipLost.
        """
        self._done = done
        if self._lost.is_set():
            raise OwnershipLost(str(self._path))

    def check(self) -> None:
        """Raise OwnershipLost when the owner file is gone or another's."""
        if self._lost.is_set() or not self._mine():
            raise OwnershipLost(str(self._path))

    def release(self) -> None:
        """Stop counting and remove the owner file, if it is still this process's."""
        self._stop.set()
        self._thread.join()
        if self._mine():
            self._path.unlink(missing_ok=True)
        # A waiter that was killed while it removed a dead owner leaves such a file.
        for aside in self._path.parent.glob(f"{self._path.name}.*"):
            aside.unlink(missing_ok=True)

    def _content(self) -> bytes:
        return json.dumps({**self._facts, "beat": self._beat, "done": self._done}).encode()

    def _mine(self) -> bool:
        return _token(_look(self._path)) == self.token

    def _beats(self) -> None:
        while not self._stop.wait(self._timing.beat_s):
            # An error of the file system is no proof of anything: the next beat tries again.
            with suppress(OSError):
                if not self._mine():
                    self._lost.set()
                    return
                self._beat += 1
                file = os.open(self._path, os.O_WRONLY)
                try:
                    _put(file, self._content())
                finally:
                    os.close(file)


def _put(file: int, content: bytes) -> None:
    """One write of a fixed length, so that nobody reads a mixture of two; synced, so that other machines see it."""
    os.pwrite(file, content.ljust(512), 0)
    os.fsync(file)


def _look(path: Path) -> bytes | None:
    """What the owner file says; None: there is none. Opening it makes a network file system ask its server."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _facts(content: bytes | None) -> dict[str, Any]:
    try:
        found = json.loads(content or b"{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _token(content: bytes | None) -> object:
    return _facts(content).get("token")


class _Waiter:
    """Watches the owner file for one process that waits."""

    def __init__(self, path: Path, folder: Path, say: Callable[[str], None], wait_s: float, timing: Timing) -> None:
        self._path, self._folder, self._say, self._wait_s, self._timing = path, folder, say, wait_s, timing
        self._content: bytes | None = None
        self._done: object = None
        self._said = False
        self._changed = self._moved = time.monotonic()

    def look(self) -> bool:
        """True when the owner file's holder is dead; else say once who builds, wait a little. Raises DataError 451."""
        now, content = time.monotonic(), _look(self._path)
        facts = _facts(content)
        if content != self._content:
            self._content, self._changed = content, now
        done = (facts.get("token"), facts.get("done"))
        if done != self._done:
            self._done, self._moved = done, now
        who = f"process {facts.get('pid')} of {facts.get('host')}" if facts else "another process"
        if content is not None and (self._gone(facts) or now - self._changed > self._timing.stale_s):
            return True
        if not self._said:
            self._said = True
            limit = f"at most {self._wait_s:g} s without progress (data.wait_s)"
            self._say(f"data: waiting for {who}, which builds {self._folder}; {limit}")
        if now - self._moved > self._wait_s:
            raise DataError.of(
                451,
                "data.wait_s",
                self._wait_s,
                f"{who} holds {self._path} and made no progress with {self._folder} for {now - self._moved:.0f} s",
                "End that process, or set a larger data.wait_s",
            )
        time.sleep(self._timing.look_s)
        return False

    def remove(self) -> None:
        """Take the dead holder's file away. A file that came in between is put back."""
        aside = self._path.with_name(f"{self._path.name}.{secrets.token_hex(4)}")
        with suppress(FileNotFoundError):
            os.rename(self._path, aside)
            if _token(_look(aside)) != _token(self._content):
                with suppress(FileExistsError):
                    os.link(aside, self._path)
            aside.unlink()

    def _gone(self, facts: dict[str, Any]) -> bool:
        here = machine()
        if not here or facts.get("machine") != here or not isinstance(facts.get("pid"), int):
            return False
        try:
            os.kill(facts["pid"], 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass
        return False


@contextmanager
def builder_lock(folder: Path, say: Callable[[str], None], wait_s: float, timing: Timing = TIMING) -> Iterator[Owner]:
    """Let one process at a time build `folder`; the others wait here, and say once for whom.

    The files NAME.lock (stays) and NAME.owner lie beside the folder; theirs must exist and be writable.
    Raises DataError 451 when the holder made no progress for `wait_s` seconds, OSError as files do.
    """
    path = owner_file(folder)
    waiter = _Waiter(path, folder, say, wait_s, timing)
    with ExitStack() as stack:
        file = stack.enter_context(open(folder.with_name(f"{folder.name}.lock"), "ab"))
        while not _flock(file.fileno()):
            waiter.look()
        owner = Owner(path, timing)
        while not owner.claim():
            if waiter.look():
                say(f"data: the process that built {folder} is gone; taking over")
                waiter.remove()
        stack.callback(owner.release)
        yield owner


def _flock(file: int) -> bool:
    """Whether the lock is held now; a file system without locks leaves it to the owner file."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True
