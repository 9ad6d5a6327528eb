"""Saving: a copy to host memory that the step waits for, and a commit that nobody waits for.

The ranks write their parts into `NAME.partial`. When all have, rank 0 adds the manifest, renames the folder and
puts the marker into it. Whatever dies in between, what is there without a marker is no checkpoint, and those from
before are untouched.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch.distributed as dist

from engine.checkpoint.manifest import COMPLETE, MANIFEST, Manifest, ShardFile, seal
from engine.checkpoint.shard_file import Snapshot, Source, sources, write_shard
from engine.errors import CheckpointError, EngineError
from engine.observe.log import warn
from engine.optim.state import WEIGHT
from engine.protocols import Engine

PARTIAL = ".partial"
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
        also: Callable[[Path, Sequence[str]], None] | None = None,
    ) -> None:
        """
        Args:
            asynchronous: write in the background, through a group of its own that no other collective uses. A save
                needs as much host memory as this rank writes; this one keeps it for the next.
            weights_only: leave out the optimizer.
            also: told of files of a finished checkpoint, to copy them elsewhere: every rank of its own, and then rank 0
                of what makes it complete. Its OSError is a warning.
        """
        self._engine, self._ctx = engine, engine.ctx
        self._asynchronous, self._weights_only, self._also = asynchronous, weights_only, also
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() and dist.get_world_size() > 1 else None
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
        self.wait()
        started = time.perf_counter()
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
                self._snapshot = None
        self.stall_s = time.perf_counter() - started

    def wait(self) -> None:
        """Wait until the last save is on disk.

        Raises:
            CheckpointError: 635 the disk is too small, 636 a rank could not write; on every rank alike.
        """
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def close(self) -> None:
        """Wait as `wait`, and give the memory back."""
        try:
            self.wait()
        finally:
            self._pool.shutdown()
            self._snapshot = None

    def _write(
        self, folder: Path, facts: dict[str, Any], parts: list[Source], content: memoryview, then: Callable[[], None]
    ) -> None:
        partial = folder.with_name(folder.name + PARTIAL)
        sizes = self._gather(len(content))
        self._agree(lambda: _make_room(folder, partial, sum(sizes)), folder)
        file: ShardFile | None = None
        trouble = ""
        try:
            if parts:
                file = write_shard(partial / f"rank-{self._ctx.rank:05d}.safetensors", parts, content)
        except OSError as error:
            trouble = f"rank {self._ctx.rank}: {error}"
        gathered = self._gather((trouble, file, {(part.kind, part.name): part.shape for part in parts}))

        def finish() -> None:
            troubles = [found for found, _, _ in gathered if found]
            if troubles:
                raise _unwritten(folder, troubles)
            commit(folder, facts, [(file, shapes) for _, file, shapes in gathered if file is not None])
            then()

        self._agree(finish, folder)
        if self._also is not None:
            self._copy(folder, [file.name] if file is not None else [])

    def _copy(self, folder: Path, names: list[str]) -> None:
        trouble = self._try_to_copy(folder, names)
        if not any(self._gather(trouble)) and self._ctx.is_main:
            self._try_to_copy(folder, [MANIFEST, COMPLETE])

    def _try_to_copy(self, folder: Path, names: list[str]) -> str:
        assert self._also is not None
        try:
            self._also(folder, names)
        except OSError as error:
            warn(f"rank {self._ctx.rank}: {folder.name} is here and not in checkpoint.mirror ({error})")
            return str(error) or "?"
        return ""

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


def commit(
    folder: Path, facts: dict[str, Any], written: Sequence[tuple[ShardFile, Mapping[tuple[str, str], tuple[int, ...]]]]
) -> None:
    """Turn FOLDER.partial, into which every rank has written its file, into the checkpoint `folder`.

    Args:
        written: each file, and the shape of each logical tensor in it by kind and name.

    Raises:
        OSError: it cannot be written, or the files lack elements.
    """
    partial = folder.with_name(folder.name + PARTIAL)
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    for _, found in written:
        for (kind, name), shape in found.items():
            shapes.setdefault(kind, {})[name] = shape
    manifest = Manifest(facts, shapes, tuple(file for file, _ in written))
    gaps = manifest.gaps()
    if gaps:
        raise OSError(f"the ranks' parts do not make up {gaps[:3]}")
    content = manifest.encode()
    write_durably(partial / MANIFEST, content)
    sync_folder(partial)
    old = folder.with_name(f"{folder.name}.old")
    if folder.exists():
        # Only where a run goes on from before it: a checkpoint of the same step that it could not use, or was not to.
        (folder / COMPLETE).unlink(missing_ok=True)
        shutil.rmtree(old, ignore_errors=True)
        os.rename(folder, old)
    os.rename(partial, folder)
    sync_folder(folder.parent)
    try:
        write_durably(folder / f"{COMPLETE}.tmp", seal(content).encode())
        os.rename(folder / f"{COMPLETE}.tmp", folder / COMPLETE)
        sync_folder(folder)
    except OSError:
        # Without a marker nobody would ever remove it, and it fills the disk for the ones to come.
        shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def write_durably(path: Path, content: bytes) -> None:
    """Write a new file that is on disk when this returns. Raises OSError."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        view = memoryview(content)
        while view:
            view = view[os.write(descriptor, view) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
