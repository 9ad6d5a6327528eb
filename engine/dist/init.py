"""From launcher variables to a device and a process group."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist

from engine.config.enums import Device, DType, Transport, TpOverlap
from engine.config.launch_env import LaunchEnv
from engine.config.schema import ParallelConfig
from engine.errors import LaunchError

DTYPES = {DType.fp32: torch.float32, DType.bf16: torch.bfloat16, DType.fp16: torch.float16}
"""Dtype of parameters and activations for each `precision.dtype`."""
LOOPBACK = "loopback"
"""Backend of a rank that is alone, see `engine.study.rank`."""


def resolve_device_type(device: Device) -> str:
    """`cpu` or `cuda`.

    Raises:
        LaunchError: CUDA is asked for and no GPU is visible.
    """
    available = torch.cuda.is_available()
    if device is Device.cuda and not available:
        raise LaunchError.of(
            510, "train.device", "cuda", "no CUDA device is visible to this process", "Use train.device=cpu or auto"
        )
    return "cuda" if available and device is not Device.cpu else "cpu"


def local_device(device_type: str, local_rank: int) -> torch.device:
    """This rank's device. On GPUs each local rank owns one card.

    Raises:
        LaunchError: more local ranks than visible GPUs.
    """
    if device_type == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise LaunchError.of(
            511,
            "LOCAL_RANK",
            local_rank,
            f"this host shows {count} GPUs and each local rank needs its own",
            f"Start at most {count} ranks on this host, or use train.device=cpu",
        )
    return torch.device("cuda", local_rank)


def cpu_threads(threads: int | None, local_world_size: int) -> int:
    """Intra-op threads of one rank: as asked, as Slurm was asked, or this machine's cores shared among its ranks."""
    given = os.environ.get("SLURM_CPUS_PER_TASK", "")
    return threads or int(given if given.isdecimal() else 0) or max(1, (os.cpu_count() or 1) // local_world_size)


def set_numerics(device: torch.device, threads: int | None, local_world_size: int, *, tf32: bool) -> None:
    """Fix what changes results from one start to the next: threads on the CPU, TF32 on GPUs.

    Reductions on the CPU are cut by thread, so equal losses under every launcher need an equal count, whatever the
    launcher exported.
    """
    torch.set_num_threads(cpu_threads(threads, local_world_size))
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = tf32
        torch.backends.cudnn.allow_tf32 = tf32


def order_launches(parallel: ParallelConfig, zero_stage: int) -> None:
    """Tell CUDA through how many queues it launches kernels.

    One, so that they start in the order of their launch, where NCCL's collectives run beside products.

    A product launched after a collective would else often take all multiprocessors first, and the collective begin when
    it is done. Not with pipelines and ZeRO-3, where one queue would hold back whatever is launched after a message or a
    prefetch that waits, and not for copy engines, which need no multiprocessors.

    As many as there are where copy engines carry a pipeline's messages: a message that waits for its box must not hold
    back the passes, as it may where its stream shares their queue.

    What the user has set stays. Called before CUDA is first used.
    """
    if parallel.pp > 1 and parallel.pipeline_transport is Transport.copy_engine:
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    alone = parallel.pp == 1 and zero_stage < 3
    if parallel.tp > 1 and alone and parallel.tp_overlap in (TpOverlap.auto, TpOverlap.chunked):
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")


def export(env: LaunchEnv) -> None:
    """Put the rank into the variables that libraries read, whichever launcher named it."""
    os.environ.update(
        RANK=str(env.rank),
        WORLD_SIZE=str(env.world_size),
        LOCAL_RANK=str(env.local_rank),
        MASTER_ADDR=env.master_addr,
        MASTER_PORT=str(env.master_port),
    )


def init_process_group(env: LaunchEnv, device: torch.device, timeout_s: float) -> None:
    """Join the job's default process group: NCCL on GPUs, gloo on CPUs."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    alone = env.world_size == 1
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=None if alone else f"tcp://{env.master_addr}:{env.master_port}",
        store=dist.HashStore() if alone else None,
        rank=env.rank,
        world_size=env.world_size,
        timeout=timedelta(seconds=timeout_s),
        device_id=device if device.type == "cuda" else None,
    )


def has_nccl(group: dist.ProcessGroup | None) -> bool:
    """Whether messages of `group` are NCCL's, or pass for such."""
    return dist.get_backend(group) in ("nccl", LOOPBACK)


def host_group(timeout: timedelta | None = None) -> dist.ProcessGroup | None:
    """Another group of all ranks, for tensors in host memory. Collective."""
    backend = LOOPBACK if dist.get_backend() == LOOPBACK else "gloo"
    group: dist.ProcessGroup | None = dist.new_group(backend=backend, timeout=timeout)
    return group


def require_equal_config(config_hash: str, data_fingerprint: str) -> None:
    """Compare config and data of all ranks before any of them builds a model.

    Raises:
        LaunchError: 512 some ranks hold another config than rank 0, 514 other data; they are named.
    """
    everyone: list[tuple[str, str] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (config_hash, data_fingerprint))
    first = everyone[0]
    assert first is not None
    for index, code, option, what, way_out in (
        (0, 512, "config", "another configuration", "Start every rank with the same overrides and conf/ folder"),
        (
            1,
            514,
            "data.source",
            "other data",
            "Put the same corpus, and the same Python for data=python, on every host",
        ),
    ):
        differ = [rank for rank, values in enumerate(everyone) if values is None or values[index] != first[index]]
        if differ:
            rule = f"ranks {differ} were started with {what} than rank 0"
            raise LaunchError.of(code, option, first[index], rule, way_out)


def shutdown() -> None:
    """Leave the process group together: a rank that closes its connections while another still works breaks it."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
