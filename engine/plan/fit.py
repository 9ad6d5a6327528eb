"""Does a layout fit into a device, with how much room, and what would make it fit."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

from engine.config import rules
from engine.config.batch import candidates, is_number
from engine.config.derived import streams
from engine.config.enums import Offload, Recompute
from engine.config.hardware import margin_bytes, stated_bytes
from engine.config.schema import Config
from engine.config.schema_hardware import HardwareConfig
from engine.plan.memory import memory

GIB = 2**30
GPU_LIMIT, CPU_LIMIT = 512, 16
"""Largest micro-batch that `auto` tries when `train.micro_batch_limit` is None."""

_SHARES = 20
"""Parts in which the offloaded share of the state is chosen."""
_WORTH = 0.01
"""Share of what a rank holds below which a saving is not worth a word."""


@dataclass(frozen=True, slots=True)
class Way:
    """Overrides that save memory, and by how many bytes of the plan."""

    words: str
    saved: int

    def __str__(self) -> str:
        return f"{self.words} ({size_of(self.saved)} less by the plan)"


def size_of(count: int) -> str:
    """Bytes for people."""
    return f"{count / GIB:.2f} GiB" if count >= GIB else f"{count / 2**20:.1f} MiB"


def peak_bytes(cfg: Config, world_size: int) -> int:
    """Bytes on the device of the rank that holds most, at the peak of a step. The rules hold for `cfg`."""
    return max(memory(cfg, world_size, stage).total for stage in range(cfg.parallel.pp))


def budget_bytes(hardware: HardwareConfig, memory_bytes: int) -> int:
    """What a rank may take of a device with `memory_bytes`, or fewer in `hardware.memory_gib`: all but the margin."""
    stated = stated_bytes(hardware)
    usable = memory_bytes if stated is None else min(memory_bytes, stated)
    return usable - margin_bytes(hardware, usable)


def sizes(cfg: Config, world_size: int, *, cpu: bool) -> list[int]:
    """Micro-batches that `auto` chooses from, ascending."""
    limit = cfg.train.micro_batch_limit
    return candidates(cfg, world_size, limit if limit is not None else CPU_LIMIT if cpu else GPU_LIMIT)


def with_micro_batch(cfg: Config, size: int) -> Config:
    """A copy of `cfg` with this micro-batch."""
    changed = copy.deepcopy(cfg)
    changed.train.micro_batch = size
    return changed


def predicted(cfg: Config, world_size: int, among: Sequence[int], budget: int) -> int:
    """The largest of the ascending sizes `among` that the plan lets into `budget` bytes; the first when none fits."""
    found = among[0]
    for size in among:
        trial = with_micro_batch(cfg, size)
        rules.require(trial, world_size)
        if peak_bytes(trial, world_size) > budget:
            break
        found = size
    return found


def settle_offload(cfg: Config, world_size: int, budget: int | None) -> str | None:
    """Set `zero.offload_ratio` where state is streamed and it is None: the least that lets the plan into `budget` bytes
    of the device, in steps of a twentieth; all where no step does or the device has no memory of its own (None).

    Returns what there is to say of it. The rules hold for `cfg`.
    """
    if not streams(cfg) or cfg.zero.offload_ratio is not None:
        return None
    cfg.zero.offload_ratio = 1.0
    if budget is None:
        return None
    for twentieths in range(_SHARES + 1):
        cfg.zero.offload_ratio = twentieths / _SHARES
        need = peak_bytes(cfg, world_size)
        if need <= budget:
            break
    return (
        f"zero.offload_ratio={cfg.zero.offload_ratio:g} by the plan: then a device holds {size_of(need)}, and "
        f"{size_of(budget)} may be taken"
    )


def ways(cfg: Config, world_size: int) -> list[Way]:
    """Legal changes that save memory on the device without changing what is trained, the largest saving first."""
    need, found = peak_bytes(cfg, world_size), []
    for words in _alternatives(cfg):
        trial = copy.deepcopy(cfg)
        # A settled accumulation belongs to the micro-batch that is changed.
        trial.train.accum_steps = cfg.train.accum_steps if cfg.train.global_batch is None else 1
        for path, value in words.items():
            section, option = path.split(".")
            setattr(getattr(trial, section), option, value)
        if not rules.check(trial, world_size):
            saved = need - peak_bytes(trial, world_size)
            if saved > need * _WORTH:
                found.append(Way(" ".join(f"{path}={value}" for path, value in words.items()), saved))
    return sorted(found, key=lambda way: -way.saved)


def _alternatives(cfg: Config) -> Iterator[dict[str, object]]:
    train, zero = cfg.train, cfg.zero
    if is_number(cfg) and train.micro_batch > 1:
        smaller = max(size for size in range(1, train.micro_batch) if train.micro_batch % size == 0)
        more: dict[str, object] = {}
        if train.global_batch is None:
            more["train.accum_steps"] = train.accum_steps * (train.micro_batch // smaller)
        yield {"train.micro_batch": smaller, **more}
    for recompute in (Recompute.selective, Recompute.full):
        if train.recompute is Recompute.none or (train.recompute, recompute) == (Recompute.selective, Recompute.full):
            yield {"train.recompute": recompute}
    for stage in range(zero.stage + 1, 4):
        yield {"zero.stage": stage}
    if zero.offload_optimizer is Offload.none:
        yield {"zero.offload_optimizer": Offload.cpu} | ({"zero.stage": 1} if zero.stage == 0 else {})


def report(cfg: Config, world_size: int, hardware: HardwareConfig) -> Iterator[str]:
    """What a device with stated memory makes of the plan: facts, room, and the recomputation that it asks for."""
    stated = stated_bytes(hardware)
    if stated is None:
        return
    yield f"hardware {hardware.name}: {', '.join(_facts(hardware))}"
    budget, need = budget_bytes(hardware, stated), peak_bytes(cfg, world_size)
    beside = f"beside a margin of {size_of(margin_bytes(hardware, stated))}"
    told = f"{size_of(need)} of {size_of(stated)}"
    if need <= budget:
        yield f"fits: {told}, {size_of(budget - need)} of room {beside}"
    else:
        excess = need - budget
        yield f"does not fit: {told}, {size_of(excess)} too much {beside}; {_help(cfg, world_size, excess)}"
    yield _recompute(cfg, world_size, budget)


def _help(cfg: Config, world_size: int, excess: int) -> str:
    """What saves `excess` bytes by itself, or what saves most."""
    known = ways(cfg, world_size)
    enough = [way for way in known if way.saved >= excess]
    if not known:
        return "no option saves any: more ranks, or a smaller model"
    return f"{'enough' if enough else 'nothing alone is enough'}: {' or '.join(map(str, (enough or known)[:3]))}"


def _facts(hardware: HardwareConfig) -> Iterator[str]:
    units = {
        "memory_gib": "{:g} GiB",
        "memory_gb_s": "{:g} GB/s of memory",
        "bf16_tflops": "{:g} TFLOP/s in bf16",
        "link_gb_s": "{:g} GB/s between devices",
        "host_memory_gib": "{:g} GiB of host memory",
    }
    for field in fields(hardware):
        value = getattr(hardware, field.name)
        if field.name in units and value is not None:
            yield units[field.name].format(value)


def _recompute(cfg: Config, world_size: int, budget: int) -> str:
    """The least recomputation that fits: none where it does, else selective, else full."""
    needs = {}
    for recompute in Recompute:
        trial = copy.deepcopy(cfg)
        trial.train.recompute = recompute
        needs[recompute] = peak_bytes(trial, world_size)
    least = next((recompute for recompute, need in needs.items() if need <= budget), None)
    table = ", ".join(f"{recompute} {size_of(need)}" for recompute, need in needs.items())
    advice = "none of them fits" if least is None else f"train.recompute={least} is the least that fits"
    return f"recompute: {table}, of {size_of(budget)}: {advice}"
