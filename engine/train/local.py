"""With no launcher, `python -m engine.train` starts its own ranks on this machine."""

from __future__ import annotations

import os
import socket
import sys

import torch

from engine.config.launch_env import LaunchEnv
from engine.config.schema import Config
from engine.dist.init import cpu_threads, resolve_device_type
from engine.errors import LaunchError


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


def start_ranks(count: int, cfg: Config, argv: list[str]) -> None:
    """Become torchrun with `count` local ranks of the same command: it forwards signals and ends with its ranks."""
    local = count if resolve_device_type(cfg.train.device) == "cpu" else 1
    os.environ.setdefault("OMP_NUM_THREADS", str(cpu_threads(cfg.train.cpu_threads, local)))
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", "-m", "engine.train"]
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *launcher, *argv])


def alone() -> LaunchEnv:
    """The place of a single rank that no launcher started."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return LaunchEnv(
        rank=0,
        world_size=1,
        local_rank=0,
        local_world_size=1,
        master_addr="127.0.0.1",
        master_port=port,
        launcher="none",
    )
