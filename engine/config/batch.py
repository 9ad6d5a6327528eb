"""Micro-batch, accumulation and global batch: what follows from the others, and what goes together (390..393)."""

from __future__ import annotations

from collections.abc import Iterator

from engine.config.rules_parallel import accum_fits
from engine.config.schema import Config, ParallelConfig
from engine.errors import Violation

AUTO = "auto"
FIND = "python -m engine.tune micro_batch"
"""The command that finds `train.micro_batch=auto`."""


def is_auto(cfg: Config) -> bool:
    """Whether the micro-batch is still to be found."""
    return str(cfg.train.micro_batch) == AUTO


def is_number(cfg: Config) -> bool:
    """Whether the micro-batch is a whole number."""
    return type(cfg.train.micro_batch) is int


def replicas(parallel: ParallelConfig, world_size: int) -> int:
    """dp of `world_size` ranks; 0 where the degrees do not fit them."""
    size = parallel.pp * parallel.context * parallel.tp
    return world_size // size if size > 0 and world_size % size == 0 else 0


def settle(cfg: Config, world_size: int) -> None:
    """Set `train.accum_steps` to what `train.global_batch` asks for, where the numbers fit; see `batch_violations`."""
    wanted = _accum_steps(cfg, replicas(cfg.parallel, world_size))
    if wanted is not None and cfg.train.accum_steps == 1:
        cfg.train.accum_steps = wanted


def _accum_steps(cfg: Config, dp: int) -> int | None:
    """global_batch / (micro_batch * dp); None where that is no whole number, or nobody asks."""
    train = cfg.train
    if train.global_batch is None or not is_number(cfg) or min(train.micro_batch, train.global_batch, dp) < 1:
        return None
    accum, rest = divmod(train.global_batch, train.micro_batch * dp)
    return None if rest or not accum else accum


def candidates(cfg: Config, world_size: int, limit: int) -> list[int]:
    """Micro-batches from which `auto` takes the largest that fits, ascending, none above `limit`.

    With `train.global_batch` those that divide a replica's share of it and leave a number of micro-batches that the
    schedule can run. Without, the global batch grows with the micro-batch: powers of two and halfway between them.
    """
    train, parallel = cfg.train, cfg.parallel
    if train.global_batch is None:
        sizes = {step << power for power in range(limit.bit_length()) for step in (2, 3)}
        return [1, *sorted(size for size in sizes if size <= limit)] if limit > 1 else [1]
    dp = replicas(parallel, world_size)
    if not dp or train.global_batch % dp:
        return []
    share = train.global_batch // dp
    return [
        size
        for size in range(1, min(share, limit) + 1)
        if share % size == 0
        and train.accum_steps in (1, share // size)
        and accum_fits(parallel.schedule, share // size, parallel.pp)
    ]


def batch_violations(cfg: Config, world_size: int) -> Iterator[Violation]:
    """A micro-batch that is a number (390, 391), and a global batch that it divides (392) as asked (393)."""
    train, dp = cfg.train, replicas(cfg.parallel, world_size)
    if is_auto(cfg):
        rule = "it is found by trial before python -m engine.train starts its own ranks, and here a number is needed"
        way_out = (
            f"Use the number that {FIND} finds with the same options; "
            "python -m engine.plan expects one where a preset states the device, as hardware=h200 does"
        )
        yield Violation(code=390, option="train.micro_batch", value=AUTO, rule=rule, way_out=way_out)
    elif not is_number(cfg):
        rule, way_out = "expected an integer or auto", "Use train.micro_batch=1, or train.micro_batch=auto"
        yield Violation(code=391, option="train.micro_batch", value=train.micro_batch, rule=rule, way_out=way_out)
    elif train.global_batch is not None and min(train.global_batch, train.micro_batch, dp) >= 1:
        accum = _accum_steps(cfg, dp)
        if accum is None:
            yield _indivisible(cfg, train.global_batch, dp)
        elif train.accum_steps not in (1, accum):
            rule = (
                f"train.global_batch {train.global_batch} = micro {train.micro_batch} x accum {accum} x dp {dp} samples"
            )
            way_out = f"Use train.accum_steps={accum}, or train.global_batch=null"
            yield Violation(code=393, option="train.accum_steps", value=train.accum_steps, rule=rule, way_out=way_out)


def _indivisible(cfg: Config, size: int, dp: int) -> Violation:
    micro = cfg.train.micro_batch
    multiple = micro * dp
    near = sorted({size - size % multiple, size - size % multiple + multiple} - {0})
    ways = [f"train.global_batch={' or '.join(map(str, near))}"]
    if size % dp == 0:
        share = size // dp
        nearest = min((d for d in range(1, share + 1) if share % d == 0), key=lambda d: (abs(d - micro), d))
        ways.append(f"train.micro_batch={nearest}")
    rule = f"not a multiple of micro {micro} x dp {dp} = {multiple} samples, of which accumulation makes up a step"
    way_out = f"Use {', or '.join(ways)}"
    return Violation(code=392, option="train.global_batch", value=size, rule=rule, way_out=way_out)
