"""A process that is killed at any file operation of a save leaves whole checkpoints, and the next save works.

Every operation of every rank is a moment to die: a first run counts them, then each is met once. What is written at
that moment is written by half.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from engine.checkpoint.manifest import is_complete
from engine.checkpoint.reader import Reader
from engine.checkpoint.restore import candidates
from engine.checkpoint.retention import CHECKPOINTS, LATEST, complete_steps, step_folder, tidy
from engine.checkpoint.save import Saver
from engine.dist.context import ParallelContext
from engine.dist.spawn import PRELOAD
from engine.topology.grid import Grid
from tests.helpers.slotted import Slotted, facts, kept, names_in, require_draw

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(600)]

OPERATIONS = (
    *("open", "write", "pwrite", "fsync", "ftruncate", "mkdir", "rename", "replace", "unlink", "remove", "rmdir"),
    *("link", "symlink"),
)
NEW, LATER = 9, 10
"""Draws of the save that is killed, and of the one after it."""


@dataclass(frozen=True)
class Scene:
    """What is there, and what is saved."""

    world: int
    step: int
    keep_last: int
    old: tuple[int, ...] = (1, 2)
    """Complete checkpoints, each with the draw of its own number."""


SCENES = {
    "one rank": Scene(world=1, step=3, keep_last=2),
    "two ranks": Scene(world=2, step=3, keep_last=2),
    "in the place of a checkpoint": Scene(world=1, step=2, keep_last=1),
}


def save(engine: Slotted, run: Path, step: int, draw: int, keep_last: int, *, asynchronous: bool = True) -> None:
    saver = Saver(engine.fill(draw).engine, asynchronous=asynchronous)
    done = partial(tidy, run / CHECKPOINTS, kept(keep_last=keep_last), refuse_to_warn)
    saver.save(step_folder(run, step), facts(step, draw), done)
    saver.close()


def refuse_to_warn(line: str) -> None:
    raise AssertionError(line)


class Countdown:
    """Counts the file operations of this process, and kills it at one of them. 0: at none."""

    def __init__(self, fatal: int) -> None:
        self.fatal, self.count, self.names = fatal, 0, []  # type: ignore[var-annotated]
        for name in OPERATIONS:
            setattr(os, name, self._wrap(name, getattr(os, name)))

    def _wrap(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **keywords: Any) -> Any:
            self.count += 1
            self.names.append(name)
            if self.count == self.fatal:
                if name in ("write", "pwrite"):
                    descriptor, content, *rest = args
                    real(descriptor, content[: len(content) // 2], *rest)
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **keywords)

        return counted


def rank_body(scene: Scene, rank: int, run: Path, store: Path, fatal: int, notes: Path) -> None:
    if scene.world == 1:
        ctx = ParallelContext.single()
    else:
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=scene.world, timeout=timedelta(seconds=20)
        )
        ctx = ParallelContext.create(Grid(dp=scene.world), torch.device("cpu"))
    engine = Slotted(ctx)
    countdown = Countdown(fatal)
    save(engine, run, scene.step, NEW, scene.keep_last)
    notes.write_text("\n".join(countdown.names))
    if scene.world > 1:
        dist.barrier()


def ranks(scene: Scene, work: Path, run: Path, victim: int, fatal: int) -> list[int]:
    """Fork the ranks; how each ended, as `os.waitstatus_to_exitcode` says."""
    store = work / "store"
    store.unlink(missing_ok=True)
    children = []
    for rank in range(scene.world):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                output = os.open(work / f"output-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
                os.dup2(output, 1)
                os.dup2(output, 2)
                rank_body(scene, rank, run, store, fatal if rank == victim else 0, work / f"notes-{rank}")
                code = 0
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    return [wait_for(child) for child in children]


def wait_for(child: int, limit_s: float = 30.0) -> int:
    """A rank that hangs when another has died is a failure too."""
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise AssertionError("a rank hangs after another one has died")


def require_whole(scene: Scene, run: Path) -> int:
    """Every checkpoint that counts is whole; returns the draw of the newest."""
    found = candidates(run)
    draws = [require_draw(Reader(folder)) for folder in found]
    assert set(draws) <= {*scene.old, NEW}, draws
    named = (run / CHECKPOINTS / LATEST).read_text().strip()
    # While a checkpoint is replaced, there is none of its name.
    assert is_complete(run / CHECKPOINTS / named) or named == step_folder(run, scene.step).name
    return draws[0]


def enumerate_kills(scene: Scene, work: Path) -> dict[str, Any]:
    """Kill each rank at each operation of a save. Runs in a process without threads, which can fork."""
    torch.set_num_threads(1)
    before = work / "before"
    for step in scene.old:
        save(Slotted(ParallelContext.single()), before, step, step, 2, asynchronous=False)
    shutil.copytree(before, work / "counted")
    assert ranks(scene, work, work / "counted", 0, 0) == [0] * scene.world
    names = [(work / f"notes-{rank}").read_text().splitlines() for rank in range(scene.world)]
    newest, run = [], work / "run"
    for victim, operations in enumerate(names):
        for fatal in range(1, len(operations) + 1):
            shutil.copytree(before, run)
            codes = ranks(scene, work, run, victim, fatal)
            where = f"rank {victim}, operation {fatal}, {operations[fatal - 1]}: {codes}"
            assert codes[victim] == -signal.SIGKILL, where
            try:
                newest.append(require_whole(scene, run))
                require_next_save(scene, run)
            except Exception as error:
                raise AssertionError(f"{where}; {names_in(run / CHECKPOINTS)}") from error
            shutil.rmtree(run)
    return {"names": names, "newest": newest}


def require_next_save(scene: Scene, run: Path) -> None:
    """What was left behind is in nobody's way, and in no checkpoint."""
    for step in (scene.step, scene.step + 1):
        save(Slotted(ParallelContext.single()), run, step, LATER, scene.keep_last, asynchronous=False)
        assert require_draw(Reader(candidates(run)[0])) == LATER
        assert names_in(step_folder(run, step)) == ["COMPLETE", "manifest.json", "rank-00000.safetensors"]
    folder = run / CHECKPOINTS
    assert names_in(folder) == sorted([LATEST, *(path.name for path in complete_steps(folder))])
    assert len(complete_steps(folder)) == scene.keep_last


@pytest.fixture(scope="module")
def server() -> Any:
    """A process that has imported everything and can be forked; nothing else runs in it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with ProcessPoolExecutor(1, context) as pool:
        yield pool


@pytest.mark.parametrize("name", SCENES)
def test_a_save_killed_at_any_file_operation(name: str, server: ProcessPoolExecutor, tmp_path: Path) -> None:
    scene = SCENES[name]
    found = server.submit(enumerate_kills, scene, tmp_path).result(timeout=300)
    names, newest = found["names"], found["newest"]
    assert len(newest) == sum(map(len, names))
    # The save and the deletions of retention are both in what was met.
    assert {"open", "pwrite", "write", "fsync", "mkdir", "rename", "replace", "unlink", "rmdir"} <= set(names[0])
    assert all({"pwrite", "fsync"} <= set(each) for each in names[1:])
    assert newest[0] == scene.old[-1], "at first nothing has changed"
    assert NEW in newest, "at some moment the new one counts"
    assert newest[len(names[0]) - 1] == NEW, "it goes on counting while old ones are removed"
