"""Host memory: what offload and checkpoints need on each machine, and what this one has (codes 345, 383, 396)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate
from operator import attrgetter
from pathlib import Path

from engine.config.derived import streams
from engine.config.enums import Device, Offload
from engine.config.schema import Config
from engine.errors import ConfigError, Violation
from engine.plan.memory import Memory, memory
from engine.topology.grid import Grid

GIB = 2**30
_CGROUPS = (
    ("sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory.current", "sys/fs/cgroup/memory.stat", "inactive_file"),
    (
        "sys/fs/cgroup/memory/memory.limit_in_bytes",
        "sys/fs/cgroup/memory/memory.usage_in_bytes",
        "sys/fs/cgroup/memory/memory.stat",
        "total_inactive_file",
    ),
)
"""Files of cgroups v2 and v1: limit, use, statistics, and the statistic of what the kernel gives back when asked."""


def require(cfg: Config, world_size: int, local_ranks: int, available: int | None = None) -> None:
    """Refuse what does not fit into the memory of a host with `local_ranks` of the ranks.

    `available` are its free bytes; None looks at this machine, and lets everything pass where that cannot be seen.
    The rules hold for `cfg`. Raises `ConfigError`: 345 offloaded state, 396 inputs of recomputed groups, 383 the copies
    that checkpoints are made from, each beside those before it.
    """
    if streams(cfg) and cfg.zero.offload_ratio is None and cfg.train.device is not Device.cpu:
        # What stays on a GPU is only known where the GPU is.
        cfg = replace(cfg, zero=replace(cfg.zero, offload_ratio=0.0))
    free = available_bytes() if available is None else available
    needs = [of(cfg, world_size, local_ranks) for of in (host_bytes, input_bytes, snapshot_bytes)]
    sums = list(accumulate(needs, lambda one, other: [a + b for a, b in zip(one, other, strict=True)]))
    if free is None or max(sums[-1]) <= free:
        return
    hosts = -(-sum(sums[-1]) // max(free, 1))
    spread = f"spread the replicas over at least {hosts} such hosts"
    here, amount = f"{local_ranks} ranks of this host", [f"{max(need) / GIB:.1f} GiB" for need in needs]
    if max(sums[0]) > free:
        on_cpu = cfg.zero.offload_optimizer is Offload.cpu
        option = "zero.offload_optimizer" if on_cpu else "zero.offload_params"
        disk = f", {option}=nvme" if cfg.zero.stage == 3 else ""
        rule, value, code = f"{here} would keep {amount[0]} in its memory", str(Offload.cpu), 345
        way_out = f"Use {option}=none{disk}, or {spread}"
    elif max(sums[1]) > free:
        option, value, code = "train.recompute_offload", "true", 396
        rule = f"inputs of recomputed groups of {here} need {amount[1]} in its memory"
        fewer = f"train.recompute_interval={2 * cfg.train.recompute_interval}"
        way_out = f"Use {fewer}, which keeps half of them, train.recompute_offload=false, or {spread}"
    else:
        option, value, code = "checkpoint.every", str(cfg.checkpoint.every), 383
        rule, way_out = f"checkpoints of {here} need {amount[2]} in its memory", f"Use checkpoint.every=0, or {spread}"
    if code == 383 and max(sums[1]):
        rule += f" beside {max(sums[1]) / GIB:.1f} GiB of offloaded state"
    elif code == 396 and max(sums[0]):
        rule += f" beside {amount[0]} of offloaded state"
    rule += f", and {free / GIB:.1f} GiB are free"
    raise ConfigError(Violation(code=code, option=option, value=value, rule=rule, way_out=way_out))


def host_bytes(cfg: Config, world_size: int, local_ranks: int) -> list[int]:
    """Bytes of offloaded state and parameters on each host, when every `local_ranks` ranks in order share one."""
    return _per_host(cfg, world_size, local_ranks, attrgetter("host"))


def input_bytes(cfg: Config, world_size: int, local_ranks: int) -> list[int]:
    """Bytes of the inputs of recomputed groups on each host, as `host_bytes`."""
    return _per_host(cfg, world_size, local_ranks, attrgetter("inputs"))


def snapshot_bytes(cfg: Config, world_size: int, local_ranks: int) -> list[int]:
    """Bytes of the copies that checkpoints are written from on each host, as `host_bytes`."""
    return _per_host(cfg, world_size, local_ranks, attrgetter("snapshot"))


def _per_host(cfg: Config, world_size: int, local_ranks: int, of: Callable[[Memory], int]) -> list[int]:
    grid = Grid.from_config(cfg.parallel, world_size)
    of_stage = [of(memory(cfg, world_size, stage)) for stage in range(grid.pp)]
    ranks = [of_stage[grid.coord(rank).pp] for rank in range(world_size)]
    return [sum(ranks[start : start + local_ranks]) for start in range(0, world_size, local_ranks)]


def available_bytes(root: Path = Path("/")) -> int | None:
    """Bytes that new allocations of this process can get: MemAvailable, or what its cgroup's limit leaves if less.

    None where there is no /proc/meminfo. `root` is the folder that holds `proc` and `sys`.
    """
    meminfo = root / "proc/meminfo"
    if not meminfo.is_file():
        return None
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
    free = [int(fields["MemAvailable"].split()[0]) * 1024]
    for limit, current, stat, reclaimable in _CGROUPS:
        text = _read(root / limit)
        if text.isdigit():
            statistics = dict(line.split(" ", 1) for line in _read(root / stat).splitlines() if " " in line)
            used = int(_read(root / current) or 0) - int(statistics.get(reclaimable, 0))
            free.append(max(0, int(text) - max(0, used)))
    return min(free)


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
