"""One process that builds shards: `engine.data.build.pool` starts it, it takes shards from a pipe until that closes.

Imports no torch and no transformers, so that it starts fast.
"""

from __future__ import annotations

import functools
import os
import queue
import signal
import sys
import threading
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection

from engine.data.build.shard import Job, Shard, build_shard
from engine.data.tokenizer.folder import load_tokenizer
from engine.errors import DataError, Violation


@dataclass(frozen=True, slots=True)
class Moved:
    """`size` more bytes of input are done."""

    size: int


@dataclass(frozen=True, slots=True)
class Done:
    """The shard is finished; `kept`: an earlier build had."""

    shard: Shard
    kept: bool


@dataclass(frozen=True, slots=True)
class Refused:
    """A DataError, by its violations."""

    violations: tuple[Violation, ...]


@dataclass(frozen=True, slots=True)
class Failed:
    """Any other exception, in one line."""

    reason: str


Answer = Moved | Done | Refused | Failed


def main() -> None:
    """Serve the pipe whose number is the first argument."""
    # Ctrl-C reaches all processes of a terminal; the builder ends its workers itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    pipe = Connection(int(sys.argv[1]))
    job: Job = pipe.recv()
    shards: queue.SimpleQueue[Shard] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(pipe, shards), daemon=True).start()
    tokenizer = functools.cache(lambda: load_tokenizer(job.tokenizer))
    while True:
        shard = shards.get()
        try:
            kept = build_shard(job, shard, tokenizer, lambda size: pipe.send(Moved(size)))
            pipe.send(Done(shard, kept))
        except DataError as error:
            pipe.send(Refused(error.violations))
        except Exception as error:
            traceback.print_exc()
            pipe.send(Failed(f"{type(error).__name__}: {error}"))


def _receive(pipe: Connection, shards: queue.SimpleQueue[Shard]) -> None:
    """Pass shards on. The pipe closes when the builder ends, however it does: then so does this process, at once."""
    try:
        while True:
            shards.put(pipe.recv())
    except (EOFError, OSError):
        os._exit(0)
