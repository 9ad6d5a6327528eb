"""Run a function on several local ranks: for studies, and for tests that need a process group."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_POLL_S = 0.02
_GRACE_S = 3.0
PRELOAD = ["torch", "torch.distributed", "numpy"]
_SHARING = "cpu:gloo,cuda:gloo"
"""Backend of ranks that share GPUs, of which NCCL wants one for each rank."""


def backend_of(device_type: str, world_size: int) -> str:
    """Backend for so many local ranks on `cpu` or `cuda`: on fewer GPUs they share them, for correctness alone."""
    if device_type == "cpu":
        return "gloo"
    return "nccl" if torch.cuda.device_count() >= world_size else _SHARING


class RankFailure(RuntimeError):
    """A rank raised, died or hung. The message holds the first traceback and the end of every rank's output."""


def run_ranks(
    fn: Callable[..., Any],
    world_size: int,
    args: Sequence[object] = (),
    *,
    backend: str = "gloo",
    timeout_s: float = 60.0,
    preload: Sequence[str] = (),
    on_tick: Callable[[], None] | None = None,
) -> list[Any]:
    """Call `fn(*args)` in `world_size` processes that share a process group; results in rank order.

    On the CPU ranks are forked from a server that has already imported torch and `preload`, which makes them start in a
    fraction of a second, with one thread each; on NCCL they are spawned, one per GPU. Ranks that share GPUs are spawned
    too; their collectives pass through host memory, and memory is mapped of each other as between GPUs.

    Args:
        fn: importable by name in a fresh process. Its result must be picklable.
        timeout_s: seconds after which every rank's stack is collected and the ranks are killed.
        on_tick: called in this process between looks at the ranks.

    Raises:
        RankFailure: a rank raised, died or was still running at the time limit.
    """
    context: Any = multiprocessing.get_context("forkserver" if backend == "gloo" else "spawn")
    if backend == "gloo":
        # Also where this process, with a GPU to see, has named that one: DeepSpeed decides when the server imports it.
        os.environ["DS_ACCELERATOR"] = "cpu"
        context.set_forkserver_preload([*PRELOAD, *preload])
    with tempfile.TemporaryDirectory(prefix="octant-ranks-") as name:
        folder = Path(name)
        # A file, because multiprocessing would pass each tensor as an open descriptor.
        (folder / "call").write_bytes(pickle.dumps((fn, tuple(args))))
        ranks = [
            context.Process(target=_rank_main, args=(rank, world_size, backend, name, timeout_s), daemon=True)
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        _watch(ranks, folder, timeout_s, on_tick)
        return [pickle.loads((folder / f"{rank}.result").read_bytes()) for rank in range(world_size)]


def _watch(ranks: Sequence[BaseProcess], folder: Path, timeout_s: float, on_tick: Callable[[], None] | None) -> None:
    """Wait for all ranks; on the first failure or at the time limit, stop the others and raise."""
    deadline = time.monotonic() + timeout_s
    try:
        while any(process.is_alive() for process in ranks):
            time.sleep(_POLL_S)
            if on_tick is not None:
                on_tick()
            if any(process.exitcode not in (None, 0) for process in ranks):
                _wait(ranks, _GRACE_S)
                break
            if time.monotonic() > deadline:
                for process in ranks:
                    if process.pid is not None and process.is_alive():
                        os.kill(process.pid, signal.SIGUSR1)
                time.sleep(0.5)
                raise RankFailure(f"ranks still running after {timeout_s:.0f} s\n{_outputs(ranks, folder)}")
    finally:
        for process in ranks:
            if process.is_alive():
                process.kill()
        _wait(ranks, _GRACE_S)
    if any(process.exitcode != 0 for process in ranks):
        raise RankFailure(_first_error(folder) + _outputs(ranks, folder))


def _wait(ranks: Sequence[BaseProcess], limit_s: float) -> None:
    end = time.monotonic() + limit_s
    for process in ranks:
        process.join(max(0.0, end - time.monotonic()))


def _first_error(folder: Path) -> str:
    """The traceback that was written first; the others are usually its consequences."""
    errors = sorted(folder.glob("*.error"), key=lambda path: path.stat().st_mtime_ns)
    return f"rank {errors[0].stem}:\n{errors[0].read_text()}\n" if errors else "a rank died without a traceback\n"


def _outputs(ranks: Sequence[BaseProcess], folder: Path) -> str:
    parts = []
    for rank, process in enumerate(ranks):
        path = folder / f"{rank}.output"
        text = path.read_text(errors="replace")[-4000:] if path.exists() else ""
        parts.append(f"--- rank {rank} (exit code {process.exitcode}) ---\n{text}")
    return "\n".join(parts)


def _rank_main(rank: int, world_size: int, backend: str, name: str, timeout_s: float) -> None:
    """Body of one rank: own output file, own traceback file, one thread."""
    folder = Path(name)
    output = os.open(folder / f"{rank}.output", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    faulthandler.register(signal.SIGUSR1, file=sys.stderr, all_threads=True)
    try:
        local = rank if backend != _SHARING else rank % torch.cuda.device_count()
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(local), WORLD_SIZE=str(world_size))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
        if backend in ("nccl", _SHARING):
            torch.cuda.set_device(local)
        else:
            torch.set_num_threads(1)
        if backend == _SHARING:
            os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
        dist.init_process_group(
            backend,
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout_s),
        )
        fn, args = pickle.loads((folder / "call").read_bytes())
        result = fn(*args)
        (folder / f"{rank}.result").write_bytes(pickle.dumps(result))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        (folder / f"{rank}.error").write_text(traceback.format_exc())
        os._exit(1)
    os._exit(0)
