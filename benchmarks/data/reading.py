"""Who should read, and when: `python -m benchmarks.data.reading OUT.jsonl`.

- Ranks that share a batch (tensor parallel): all read it from the page cache, or one reads and broadcasts it over gloo,
  as one message. Wall time until all have it, and the CPU time of all of them together.
- A loop in Python whose thread keeps a CPU busy with many small operations: time of its own work in a step and time it
  waits for the batch, when batches are read in place and when a thread reads ahead.
"""

from __future__ import annotations

import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.data.loader import ACCUM, CASES, MICRO_BATCH, opened, write_corpus
from benchmarks.rows import append, row
from engine.data.loader import Loader
from engine.data.samples.batches import Split
from engine.dist.spawn import run_ranks
from engine.model.batch import Batch

CASE = "gpt, documents masked"
SIZE = MICRO_BATCH * ACCUM
STEPS, WARMUP = 60, 10
SMALL_OPERATIONS = 2000
CPU = torch.device("cpu")

Read = Callable[[int], Iterator[Batch]]
Figures = dict[str, list[float]]


def reader(split: Split) -> Read:
    """Global batches of one replica."""
    return partial(split.micro_batches, dp_rank=0, dp=1, micro_batch=MICRO_BATCH, accum_steps=ACCUM)


def all_read(read: Read, first: int) -> None:
    """Each rank reads the batch."""
    list(read(first))


def one_reads(read: Read, first: int) -> None:
    """Rank 0 reads tokens and labels and broadcasts them; of masked documents only their ends would be more."""
    length = int(CASES[CASE][1]["seq_len"])  # type: ignore[call-overload]
    message = torch.empty((2, ACCUM, MICRO_BATCH, length), dtype=torch.int64)
    if dist.get_rank() == 0:
        for index, batch in enumerate(read(first)):
            message[0, index], message[1, index] = batch.tokens_BS, batch.labels_BS
    dist.broadcast(message, 0)


def time_ranks(prefix: Path) -> dict[str, Figures]:
    """Seconds of each global batch, both ways by turns, so that other work on the machine meets both alike.

    No batch is read twice: the second time its pages would be in the processor's cache.
    """
    read = reader(opened(prefix, *CASES[CASE]))
    found: dict[str, Figures] = {fn.__name__: {"wall_s": [], "cpu_s": []} for fn in (all_read, one_reads)}
    for step in range(STEPS):
        for turn, fn in enumerate((all_read, one_reads) if step % 2 else (one_reads, all_read)):
            dist.barrier()
            wall, cpu = time.perf_counter(), time.process_time()
            fn(read, (2 * step + turn) * SIZE)
            times = torch.tensor([time.perf_counter() - wall, time.process_time() - cpu])
            slowest = times.clone()
            dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
            dist.all_reduce(times)
            if step >= WARMUP:
                found[fn.__name__]["wall_s"].append(float(slowest[0]))
                found[fn.__name__]["cpu_s"].append(float(times[1]))
    return found


def time_prefetch(prefix: Path) -> dict[str, Figures]:
    """Seconds of the loop's own work and of its waiting, in each step."""
    read = reader(opened(prefix, *CASES[CASE]))
    found: dict[str, Figures] = {}
    loaders = {ahead: Loader(read, range(0, SIZE * STEPS, SIZE), prefetch=ahead, device=CPU) for ahead in (0, 2)}
    small = torch.zeros(64)
    for step in range(STEPS):
        for ahead, loader in loaders.items():
            next(loader)
            start = time.perf_counter()
            for _ in range(SMALL_OPERATIONS):
                small.add_(1.0)
            if step >= WARMUP:
                figures = found.setdefault(f"prefetch {ahead}", {"work_s": [], "wait_s": []})
                figures["work_s"].append(time.perf_counter() - start)
                figures["wait_s"].append(loader.wait_s)
    for loader in loaders.values():
        loader.close()
    return found


def main(argv: list[str]) -> None:
    """Measure and append the rows to the file."""
    torch.set_num_threads(1)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
    found: dict[str, dict[str, Figures]] = {}
    with tempfile.TemporaryDirectory() as folder:
        prefix = Path(folder, "corpus")
        write_corpus(prefix)
        for world in (2, 4):
            found[f"{world} ranks"] = run_ranks(time_ranks, world, (prefix,), timeout_s=300)[0]
        found["1 rank"] = time_prefetch(prefix)
    rows: list[dict[str, Any]] = [
        row(
            case=f"{CASE}, seq_len {CASES[CASE][1]['seq_len']}, {SIZE} rows, {ranks}",
            system=way,
            metric=metric,
            unit="s",
            values=values,
            hardware=f"{platform.machine()}, 2 cores",
            commit=commit.stdout.strip(),
            command="python -m benchmarks.data.reading",
        )
        for ranks, ways in found.items()
        for way, figures in ways.items()
        for metric, values in figures.items()
    ]
    append(Path(argv[0]), rows)
    for entry in rows:
        print(f"{entry['case']}, {entry['system']}: {entry['metric']} {entry['p50'] * 1e3:.2f} ms")


if __name__ == "__main__":
    main(sys.argv[1:])
