"""Read global batches ahead of the training loop, in a thread of its own.

Every rank that needs text reads all of it from the page cache; no rank reads for another. For 64 rows of 1024 tokens
(`benchmarks.data.reading`, two cores, gloo) 2 ranks that all read have the batch in 1.9 ms, 2.8 ms when one
broadcasts; 4 ranks in 2.1 and 3.8 ms, though they then spend 7.5 ms of CPU time together instead of 4.3. Those 1.9 ms
a rank pass beside the step, while a broadcast would need a process group of the thread's own and let one slow reader
stop all. Stages that need no text ask for none (`Split.micro_batches`).
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields, replace
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from engine.model.batch import Batch, Documents

Read = Callable[[int], Iterable[Batch]]
"""First sample of a global batch -> this replica's micro-batches of it."""


class Loader:
    """The micro-batches of one global batch after another: exactly those of `read(first)`, for each of `firsts`.

    A thread stays `prefetch` global batches ahead. It holds no more than that: 16 bytes for each token of this
    replica's rows (24 with segments) and 4 for each document where documents are masked, so 2 global batches of 64
    rows of 4096 tokens for each replica are 8 MiB. With `prefetch` 0 there is no thread, and every batch is read when
    it is asked for.

    For a CUDA device batches are copied to page-locked memory, from where copies to the device do not wait.

    Use as a context manager, or call `close`: the thread then ends after the micro-batch it is reading. What `read`
    raises is raised to who asks for the batch in question, and again to who asks once more.
    """

    def __init__(self, read: Read, firsts: Sequence[int], *, prefetch: int, device: torch.device) -> None:
        self._read, self._firsts, self._prefetch, self._device = read, firsts, prefetch, device
        self._given = 0
        self._ready: deque[list[Batch]] = deque()
        self._error: BaseException | None = None
        self._closed = False
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self.wait_s = 0.0
        """How long the last batch was waited for, seconds."""
        if prefetch and firsts:
            # A daemon: a file system that hangs must not keep the process from ending.
            self._thread = threading.Thread(target=self._read_ahead, name="octant-loader", daemon=True)
            self._thread.start()

    def __iter__(self) -> Iterator[list[Batch]]:
        return self

    def __next__(self) -> list[Batch]:
        """The micro-batches of the next global batch."""
        if self._given == len(self._firsts):
            raise StopIteration
        start = time.perf_counter()
        batch = self._wait() if self._thread is not None else list(self._batches(self._firsts[self._given]))
        self._given += 1
        self.wait_s = time.perf_counter() - start
        return batch

    def _wait(self) -> list[Batch]:
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._error is not None or self._closed)
            if self._ready:
                batch = self._ready.popleft()
                self._changed.notify()
                return batch
        if self._error is not None:
            raise self._error
        raise ValueError("the loader is closed")

    def _read_ahead(self) -> None:
        try:
            if self._device.type == "cuda":
                # Else page-locked memory would start a context on the first device.
                torch.cuda.set_device(self._device)
            for first in self._firsts:
                with self._changed:
                    self._changed.wait_for(self._has_room)
                batch = []
                micros = self._batches(first)
                while not self._closed and (micro := next(micros, None)) is not None:
                    batch.append(micro)
                with self._changed:
                    if self._closed:
                        return
                    self._ready.append(batch)
                    self._changed.notify()
        except BaseException as error:
            with self._changed:
                self._error = error
                self._changed.notify()

    def _has_room(self) -> bool:
        return self._closed or len(self._ready) < self._prefetch

    def _batches(self, first: int) -> Iterator[Batch]:
        for batch in self._read(first):
            yield with_tensors(batch, page_locked) if self._device.type == "cuda" else batch

    def close(self) -> None:
        """End the thread and drop what it has read."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()
        self._ready.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def page_locked(tensor: Tensor) -> Tensor:
    """A copy in page-locked memory. One thread makes it: torch's own would start a pool for the thread that reads."""
    copy = torch.empty_like(tensor, pin_memory=True)
    np.copyto(copy.numpy(), tensor.numpy())
    return copy


def with_tensors(batch: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    """`batch` with `change` applied to each of its tensors, those of `documents` too."""

    def changed(value: Any) -> Any:
        if isinstance(value, Batch | Documents):
            return replace(value, **{field.name: changed(getattr(value, field.name)) for field in fields(value)})
        return change(value) if isinstance(value, Tensor) else value

    result: Batch = changed(batch)
    return result
