"""A system as a process of its own: started with its output in a log, ended in time, its failure in one line."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

GRACE_S = 15.0
"""Seconds that a process has to end its ranks when it is told to stop."""
_LONGEST = 400
_MEMORY = re.compile(r"OutOfMemoryError|out of memory", re.IGNORECASE)
_ERROR = re.compile(r"^(?:\[\w+\]:\s?)?(?:[\w.]+\.)?(\w*(?:Error|Exception)): ?(.*)$")
"""The last line of a traceback or the first of a refusal, with the rank that torchrun puts before it."""


def run(words: Sequence[str], log: Path, seconds: float, env: Mapping[str, str]) -> str | None:
    """Run `words` to its end, at most `seconds`, output added to `log`; why it failed, None where it did not."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        file.write(f"\n$ {' '.join(words)}\n")
        file.flush()
        start = file.tell()
        # Its ranks are ended with it: they share its process group.
        process = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT, env=env, start_new_session=True)
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            return f"stopped after {seconds:.0f} s: the budget was over"
        finally:
            _end(process)
    if code == 0:
        return None
    with log.open(errors="replace") as file:
        file.seek(start)
        return reason(file.read(), code)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End what is left of the process group, gently first."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        try:
            process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            continue


def reason(text: str, code: int) -> str:
    """Why a process ended with `code`, from what it printed: out of memory before all else, then the first error."""
    lines = text.splitlines()
    if memory := next((line.strip() for line in lines if _MEMORY.search(line)), None):
        return memory[:_LONGEST]
    for index, line in enumerate(lines):
        if match := _ERROR.match(line):
            # Octant's refusals name the kind of error, and say the rest in the lines after it.
            rest = match[2] or " ".join(word.strip() for word in lines[index + 1 :] if word.strip())
            return f"{match[1]}: {rest}"[:_LONGEST]
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    last = next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")
    return f"exit code {code}: {last}"[:_LONGEST]
