"""With no launcher, `python -m engine.train` starts its own ranks on this machine."""

from __future__ import annotations

import ctypes
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import IO

import torch
import torch.distributed as dist

from engine.config.entry import STOPPED
from engine.config.launch_env import LaunchEnv
from engine.config.schema import Config
from engine.dist.init import cpu_threads, resolve_device_type
from engine.errors import LaunchError
from engine.train import early

GRACE_S = 10.0
"""Seconds that the other ranks have to end on their own when one has failed."""
FORWARDED = (signal.SIGTERM, signal.SIGUSR1)
_POLL_S = 0.05
_PR_SET_PDEATHSIG = 1
"""From linux/prctl.h."""


def world_size(cfg: Config) -> int:
    """Ranks of a run without a launcher: pp * context * tp * dp, where an unset dp uses all GPUs, or is 1 on the CPU.

    Raises:
        LaunchError: more ranks than visible GPUs.
    """
    one_replica = max(1, cfg.parallel.pp * cfg.parallel.context * cfg.parallel.tp)
    if resolve_device_type(cfg.train.device) == "cpu":
        return one_replica * (cfg.parallel.dp or 1)
    gpus = torch.cuda.device_count()
    wanted = one_replica * (cfg.parallel.dp or max(1, gpus // one_replica))
    if wanted > gpus:
        raise LaunchError.of(
            513,
            "parallel.pp*parallel.context*parallel.tp*parallel.dp",
            wanted,
            f"this machine shows {gpus} GPUs and each rank needs its own",
            f"Use degrees whose product is at most {gpus}, start on more machines with torchrun, or train.device=cpu",
        )
    return wanted


def start_ranks(count: int, cfg: Config, argv: list[str]) -> int:
    """Run `count` local ranks of the same command to their end; the exit code of the job.

    The first rank that fails ends the others. SIGTERM and SIGUSR1 reach every rank, which saves and stops; when this
    process dies in whatever way, the kernel sends them SIGTERM.
    """
    store, environments = places(count, cfg)
    code = supervise([sys.executable, "-m", "engine.train", *argv], environments)
    del store  # It has to outlive the ranks.
    return code


def places(count: int, cfg: Config) -> tuple[dist.TCPStore, list[dict[str, str]]]:
    """The environments of `count` local ranks, and the store at which they meet, which has to outlive them."""
    local = count if resolve_device_type(cfg.train.device) == "cpu" else 1
    store, meeting = meeting_point()
    common = dict(os.environ) | meeting
    common.setdefault("OMP_NUM_THREADS", str(cpu_threads(cfg.train.cpu_threads, local)))
    sizes = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    return store, [common | {"RANK": str(rank), "LOCAL_RANK": str(rank), **sizes} for rank in range(count)]


def meeting_point() -> tuple[dist.TCPStore, dict[str, str]]:
    """A store of this process for ranks on this machine, and the variables that lead them to it.

    A port that is looked for and left to rank 0 may be taken by another program before rank 0 listens there.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    # The name by which torch knows that whoever started the ranks listens.
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    return store, meeting


def supervise(
    words: Sequence[str],
    environments: Sequence[Mapping[str, str]],
    *,
    output: IO[bytes] | None = None,
    grace_s: float = GRACE_S,
) -> int:
    """Run `words` once in each of the environments, to their end, as `start_ranks` does; the exit code of all.

    What they print goes to `output`, if given. 0 when all end well, 75 when some have saved and stopped, else that of
    the first that fails, or 128 and its signal.
    """
    sys.stdout.flush()
    ranks: list[subprocess.Popen[bytes]] = []
    came: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        came.append(number)
        _forward(ranks, number, frame)

    # Before the first rank starts: it may be quick to say that it runs, and be answered with a signal.
    before = {number: signal.signal(number, forward) for number in (*FORWARDED, signal.SIGINT)}
    try:
        for env in environments:
            ranks.append(
                subprocess.Popen(
                    words,
                    env=env,
                    stdout=output,
                    stderr=None if output is None else subprocess.STDOUT,
                    preexec_fn=die_with(os.getpid()),
                )
            )
            for number in came:
                _forward(ranks[-1:], number, None)
        if early.received is not None:
            _forward(ranks, early.received, None)
        return _watch(ranks, grace_s)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def die_with(parent: int) -> Callable[[], None]:
    """What a rank does first: ask the kernel for SIGTERM when `parent` dies."""
    libc = ctypes.CDLL(None)

    def ask() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        # Until the rank listens: a warning must not end it.
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        if os.getppid() != parent:  # It died before it could be watched.
            os._exit(1)

    return ask


def _forward(ranks: Sequence[subprocess.Popen[bytes]], number: int, frame: FrameType | None) -> None:
    # The terminal sends Ctrl-C to the ranks itself.
    for rank in ranks if number != signal.SIGINT else ():
        if rank.poll() is None:
            rank.send_signal(number)


def _watch(ranks: Sequence[subprocess.Popen[bytes]], grace_s: float) -> int:
    """Wait until all have ended; one that fails gives the others `grace_s` seconds, and then they are killed."""
    deadline, code = math.inf, 0
    while True:
        running = [rank for rank in ranks if rank.poll() is None]
        ended = [rank.returncode for rank in ranks if rank.returncode is not None]
        failed = [ending for ending in ended if ending not in (0, STOPPED)]
        if failed and not code:
            code = failed[0] if failed[0] > 0 else 128 - failed[0]
            deadline = time.monotonic() + grace_s
        if not running:
            return code or max(ended)
        if time.monotonic() > deadline:
            for rank in running:
                rank.kill()
        time.sleep(_POLL_S)


def alone() -> LaunchEnv:
    """The place of a single rank that no launcher started; it meets nobody, and needs no port."""
    return LaunchEnv(
        rank=0,
        world_size=1,
        local_rank=0,
        local_world_size=1,
        master_addr="127.0.0.1",
        master_port=0,
        launcher="none",
    )
