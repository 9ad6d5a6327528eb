"""In which order a stage runs its forward and backward passes, one function per family of schedules."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from engine.topology.program import Op, OpKind


def one_f_one_b(stages: int, micro_batches: int, virtual_stages: int, stage: int, *, interleaved: bool) -> list[Op]:
    """Warm-up of forward passes, then one forward and one backward in turn, then the remaining backward passes.

    Plain: PipeDream-Flush as in Megatron-LM (arXiv 2104.04473, section 2.2.1), stages - stage - 1 passes of warm-up.
    Interleaved (section 2.2.2): the stage holds `virtual_stages` chunks, `stages` apart, and takes micro-batches in
    groups of `stages`, each group through all of its chunks; the warm-up has 2 (stages - stage - 1) +
    (virtual_stages - 1) stages passes.
    """
    forwards = _in_groups(OpKind.forward, stages, micro_batches, range(virtual_stages), stage)
    backwards = _in_groups(OpKind.backward, stages, micro_batches, reversed(range(virtual_stages)), stage)
    below = stages - stage - 1
    warmup = min(2 * below + (virtual_stages - 1) * stages if interleaved else below, len(forwards))
    steady = len(forwards) - warmup
    pairs = zip(forwards[warmup:], backwards[:steady], strict=True)
    return [*forwards[:warmup], *(op for pair in pairs for op in pair), *backwards[steady:]]


def dualpipev(stages: int, micro_batches: int, stage: int) -> list[Op]:
    """DualPipeV (DeepSeek-V3, arXiv 2412.19437, section 3.2.1, cut in half) with whole backward passes.

    The stage holds chunk `stage` of the way down and chunk 2 stages - 1 - stage of the way back. The eight steps and
    their lengths are those of DeepSpeed's `DualPipeVSchedule`; the last one only has split weight gradients.
    """
    down, back = stage, 2 * stages - 1 - stage
    f0, f1 = (_passes(OpKind.forward, chunk, micro_batches) for chunk in (down, back))
    b0, b1 = (_passes(OpKind.backward, chunk, micro_batches) for chunk in (down, back))
    below = stages - stage - 1
    turns = [
        *[f0] * (2 * below),
        *[f0, f1] * (stage + 1),
        *[b1, f1] * below,
        *[f0, b1, f1, b0] * (micro_batches - 2 * stages + stage + 1),
        *[b1, f1, b0] * below,
        *[b1, b0] * (stage + 1),
        *[b0] * below,
    ]
    return [next(turn) for turn in turns]


def forward_only(stages: int, micro_batches: int, virtual_stages: int, stage: int) -> list[Op]:
    """The forward passes of the plain and the interleaved schedule; a last group may be incomplete."""
    return _in_groups(OpKind.forward, stages, micro_batches, range(virtual_stages), stage)


def forward_only_v(stages: int, micro_batches: int, stage: int) -> list[Op]:
    """Forward passes down and back: a micro-batch enters in every second slot, so the two ways never collide."""
    passes = [Op(OpKind.forward, i, chunk) for chunk in (stage, 2 * stages - 1 - stage) for i in range(micro_batches)]
    return sorted(passes, key=lambda op: op.chunk + 2 * op.micro_batch)


def _in_groups(kind: OpKind, stages: int, micro_batches: int, parts: Iterable[int], stage: int) -> list[Op]:
    parts = tuple(parts)
    return [
        Op(kind, i, part * stages + stage)
        for first in range(0, micro_batches, stages)
        for part in parts
        for i in range(first, min(first + stages, micro_batches))
    ]


def _passes(kind: OpKind, chunk: int, micro_batches: int) -> Iterator[Op]:
    return (Op(kind, i, chunk) for i in range(micro_batches))
