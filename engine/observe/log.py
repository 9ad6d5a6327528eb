"""Log lines of rank 0, and silence for libraries that talk too much."""

from __future__ import annotations

import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from typing import TextIO

from tqdm import tqdm

RANK_VARIABLES = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK")
"""Where launchers put the global rank, in the order they are read before `configure`."""

_rank: int | None = None


@dataclass(frozen=True, slots=True)
class QuietLogger:
    """A logger whose records below `level` are dropped."""

    name: str
    level: int
    reason: str


@dataclass(frozen=True, slots=True)
class QuietWarning:
    """A `warnings` filter: the message starts with the regular expression `message`."""

    message: str
    category: type[Warning]
    reason: str


QUIET_LOGGERS = (
    QuietLogger("DeepSpeed", logging.ERROR, "every rank repeats its configuration and its guesses about the hardware"),
    QuietLogger("torch.distributed", logging.ERROR, "every rank reports start-up details; failures are raised anyway"),
    QuietLogger("transformers", logging.ERROR, "advice about models and tokenizers that Octant does not run"),
    QuietLogger("matplotlib", logging.ERROR, "announces the font cache on the first plot of a fresh machine"),
)

QUIET_WARNINGS = (
    QuietWarning(r"`torch\.jit\.\w+` is deprecated", DeprecationWarning, "DeepSpeed scripts a few functions on import"),
    QuietWarning(r"`torch\.jit\.\w+` is deprecated", FutureWarning, "the same notice in newer torch"),
    QuietWarning(
        r"`torch\.distributed\.\w+` is deprecated", FutureWarning, "DeepSpeed calls older names of collectives"
    ),
    QuietWarning(r"The pynvml package is deprecated", FutureWarning, "comes from torch.cuda, whatever we call"),
)

QUIET_VARIABLES = (("TRANSFORMERS_VERBOSITY", "error", "transformers resets its logger's level when it is imported"),)


def configure(rank: int) -> None:
    """Tell the log which global rank this process is. Only rank 0 prints."""
    global _rank
    _rank = rank


def is_main() -> bool:
    """True on rank 0. Before `configure` the launcher's variables decide; without any, the process is alone."""
    if _rank is not None:
        return _rank == 0
    return next((os.environ[name] for name in RANK_VARIABLES if name in os.environ), "0") == "0"


def say(message: str) -> None:
    """Print one line to stdout on rank 0, above a progress bar if one is drawn."""
    _print(message, sys.stdout)


def warn(message: str) -> None:
    """Print `warning: message` to stderr on rank 0."""
    _print(f"warning: {message}", sys.stderr)


def _print(message: str, stream: TextIO) -> None:
    if is_main():
        tqdm.write(message, file=stream)
        stream.flush()


class _AtLeast(logging.Filter):
    """Drops records below a level. Unlike the logger's own level it survives a library that sets that on import."""

    def __init__(self, level: int) -> None:
        super().__init__()
        self.level = level

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= self.level


def quiet_libraries(verbose: bool) -> None:
    """Silence the entries of `QUIET_LOGGERS`, `QUIET_WARNINGS` and `QUIET_VARIABLES`; errors always pass.

    Call it before the libraries are imported. With `verbose` nothing is changed.
    """
    if verbose:
        return
    for entry in QUIET_LOGGERS:
        logger = logging.getLogger(entry.name)
        logger.setLevel(entry.level)
        if not any(isinstance(known, _AtLeast) for known in logger.filters):
            logger.addFilter(_AtLeast(entry.level))
    for warning in QUIET_WARNINGS:
        warnings.filterwarnings("ignore", message=warning.message, category=warning.category)
    for name, value, _ in QUIET_VARIABLES:
        os.environ.setdefault(name, value)


class _HeldStream(io.TextIOBase):
    """Collects text while held; afterwards passes it on.

    A library imported inside the block may keep this stream for good, and its later output must not be lost.
    """

    def __init__(self, target: TextIO, held: list[str]) -> None:
        self._target = target
        self._held: list[str] | None = held

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        if self._held is None:
            return self._target.write(text)
        self._held.append(text)
        return len(text)

    def flush(self) -> None:
        if self._held is None:
            self._target.flush()

    def release(self) -> None:
        self._held = None


@contextmanager
def captured_output(keep: bool) -> Iterator[None]:
    """Swallow what a library call prints through `sys.stdout` and `sys.stderr`.

    The swallowed text is written to stderr, on any rank, when an exception leaves the block.

    Args:
        keep: let the output through as it comes (for `logging.verbose=true`).
    """
    if keep:
        yield
        return
    held: list[str] = []
    out, err = _HeldStream(sys.stdout, held), _HeldStream(sys.stderr, held)
    try:
        with redirect_stdout(out), redirect_stderr(err):
            yield
    except BaseException:
        if held:
            sys.stderr.write("".join(["--- output of the call that failed ---\n", *held, "\n"]))
            sys.stderr.flush()
        raise
    finally:
        out.release()
        err.release()
