"""Saving: a copy to host memory that the step waits for, and a commit that nobody waits for.

The ranks write their parts into `NAME.partial`. When all have, rank 0 adds the manifest, renames the folder and
puts the marker into it. Whatever dies in between, what is there without a marker is no checkpoint, and those from
before are untouched.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist

from engine.checkpoint.commit import PARTIAL, commit
from engine.checkpoint.manifest import COMPLETE, MANIFEST, ShardFile
from engine.checkpoint.shard_file import Snapshot, Source, sources, write_shard
from engine.dist import init
from engine.errors import CheckpointError, EngineError
from engine.observe.log import warn
from engine.optim.state import WEIGHT
from engine.protocols import Engine

_MARGIN = 1 << 24
"""Bytes on disk for everything but the tensors."""
_WAIT = "Free space, or point run.dir to a disk with more"


class Saver:
    """Writes checkpoints of one engine, one after the other. Collective; every rank makes one and uses it alike."""

    def __init__(
        self,
        engine: Engine,
        *,
        asynchronous: bool,
        weights_only: bool = False,
        also: Copier | None = None,
    ) -> None:
        """
        Args:
            asynchronous: write in the background, through a group of its own that no other collective uses. A save
                needs as much host memory as this rank writes; this one keeps it for the next.
            weights_only: leave out the optimizer.
            also: where to copy finished checkpoints; trouble with it is a warning.
        """
        self._engine, self._ctx = engine, engine.ctx
        self._asynchronous, self._weights_only, self._also = asynchronous, weights_only, also
        self._group = _group()
        self._snapshot: Snapshot | None = None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._running: Future[None] | None = None
        self.stall_s = 0.0
        """Seconds that the last `save` took before it returned."""

    def prepare(self) -> int:
        """Take the host memory that saves need, and return how many bytes this rank writes."""
        parts = self._parts()
        self._snapshot = Snapshot(parts, pinned=self._ctx.device.type == "cuda")
        return len(self._snapshot.bytes)

    def _parts(self) -> list[Source]:
        slots = self._engine.state().slots
        return sources([slot for slot in slots if slot.kind == WEIGHT or not self._weights_only], self._ctx)

    def save(self, folder: Path, facts: dict[str, Any], then: Callable[[], None] = lambda: None) -> None:
        """Start to write the state as it is now into the new `folder`; `then` is called on rank 0 when it is there.

        Waits for the copy to host memory, and before it for the save before.

        Args:
            facts: of the run, for the manifest: JSON values.

        Raises:
            CheckpointError: see `wait`; of this save, when it is not asynchronous.
        """
        started = time.perf_counter()
        self.wait()
        state = self._engine.state()
        parts = self._parts()
        if self._snapshot is None:
            self.prepare()
        assert self._snapshot is not None
        self._snapshot.take(parts)
        whole = {**facts, "numbers": state.numbers}
        self._running = self._pool.submit(self._write, folder, whole, parts, self._snapshot.bytes, then)
        if not self._asynchronous:
            try:
                self.wait()
            finally:
                self._drop()
        self.stall_s = time.perf_counter() - started

    def _drop(self) -> None:
        if self._snapshot is not None:
            self._snapshot.free()
        self._snapshot = None

    def wait(self) -> None:
        """Wait until the last save is on disk.

        Raises:
            CheckpointError: 635 the disk is too small, 636 a rank could not write; on every rank alike.
        """
        running, self._running = self._running, None
        if running is not None:
            running.result()

    @property
    def failed(self) -> bool:
        """Whether the last save has ended, and not well. `wait` raises why."""
        return self._running is not None and self._running.done() and self._running.exception() is not None

    def close(self) -> None:
        """Wait as `wait`, and give the memory back."""
        try:
            self.wait()
        finally:
            self._pool.shutdown()
            self._drop()

    def _write(
        self, folder: Path, facts: dict[str, Any], parts: list[Source], content: memoryview, then: Callable[[], None]
    ) -> None:
        partial = folder.with_name(folder.name + PARTIAL)
        sizes = self._gather(len(content))
        self._agree(lambda: _make_room(folder, partial, sum(sizes)), folder)
        file, trouble = self._write_part(partial, parts, content)
        gathered = self._gather((trouble, file, {(part.kind, part.name): part.shape for part in parts}))

        def finish() -> None:
            troubles = [found for found, _, _ in gathered if found]
            if troubles:
                raise _unwritten(folder, troubles)
            commit(folder, facts, [(file, shapes) for _, file, shapes in gathered if file is not None])

        self._agree(finish, folder)
        if self._ctx.is_main:
            then()
        if self._also is not None:
            self._copy(self._also, folder, file)

    def _write_part(self, partial: Path, parts: list[Source], content: memoryview) -> tuple[ShardFile | None, str]:
        """This rank's file, and what went wrong with it: the others must hear of it, whatever it is."""
        try:
            name = f"rank-{self._ctx.rank:05d}.safetensors"
            return (write_shard(partial / name, parts, content) if parts else None), ""
        except Exception as error:
            return None, f"rank {self._ctx.rank}: {error}"

    def _copy(self, also: Copier, folder: Path, file: ShardFile | None) -> None:
        """Every rank its own file, between rank 0's removal of an old marker there and the new one. Never raises."""
        trouble = _try(lambda: also.begin(folder)) if self._ctx.is_main else ""
        try:
            troubles = self._gather(trouble)
            trouble = _try(lambda: also.put(folder, file.name)) if file is not None else ""
            troubles += self._gather(trouble)
        except RuntimeError as error:  # Another rank took longer than the group waits.
            troubles = [str(error)]
        if self._ctx.is_main:
            found = [line for line in troubles if line] or [_try(lambda: also.put(folder, MANIFEST, COMPLETE))]
            if any(found):
                warn(f"{folder.name} is here and not in checkpoint.mirror ({'; '.join(found[:3])})")

    def _gather(self, value: Any) -> list[Any]:
        """`value` of every rank."""
        if self._group is None:
            return [value]
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, value, group=self._group)
        return found

    def _agree(self, work: Callable[[], None], folder: Path) -> None:
        """Do `work` on rank 0; every rank raises what it raises. Raises CheckpointError."""
        outcome: list[EngineError | None] = [None]
        if self._ctx.is_main:
            try:
                work()
            except CheckpointError as error:
                outcome[0] = error
            except OSError as error:
                outcome[0] = _unwritten(folder, [f"rank 0: {error}"])
            if outcome[0] is not None:
                shutil.rmtree(folder.with_name(folder.name + PARTIAL), ignore_errors=True)
        if self._group is not None:
            violations: list[Any] = [outcome[0].violations if outcome[0] is not None else None]
            dist.broadcast_object_list(violations, src=0, group=self._group)
            outcome[0] = CheckpointError(violations[0]) if violations[0] is not None else None
        if outcome[0] is not None:
            raise outcome[0]


class Copier(Protocol):
    """A second home for finished checkpoints. Both raise OSError."""

    def begin(self, folder: Path) -> None:
        """What is there under the name of `folder` is finished no more."""

    def put(self, folder: Path, *names: str) -> None:
        """Copy these files of `folder`, in this order."""


def _group() -> dist.ProcessGroup | None:
    """A group for the background alone; a wait ends when a rank takes hours longer than another."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    return init.host_group(timedelta(hours=6))


def _try(work: Callable[[], None]) -> str:
    """What goes wrong in `work`; empty: nothing."""
    try:
        work()
    except OSError as error:
        return str(error) or type(error).__name__
    return ""


def _make_room(folder: Path, partial: Path, size: int) -> None:
    """An empty folder to write into, on a disk that has `size` bytes (635)."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    # What a save that was killed left behind must not be taken for this one's.
    shutil.rmtree(partial, ignore_errors=True)
    free = shutil.disk_usage(folder.parent).free
    if free < size + _MARGIN:
        rule = f"a checkpoint is {size:,} bytes, and the disk of {folder.parent} has {free:,} left"
        raise CheckpointError.of(635, "run.dir", folder.parent, rule, f"{_WAIT}, or lower checkpoint.keep_last")
    os.mkdir(partial)


def _unwritten(folder: Path, troubles: Sequence[str]) -> EngineError:
    rule = f"it could not be written ({'; '.join(troubles[:3])}); checkpoints from before are as they were"
    way_out = f"{_WAIT}, that all hosts share and this user may write"
    return CheckpointError.of(636, "run.dir", folder, rule, way_out)
