"""Pipeline schedules: programs for the stages, and what they cost in idle time and memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from engine.config.enums import PipelineSchedule
from engine.errors import TopologyError
from engine.topology import orders
from engine.topology.execution import execute
from engine.topology.program import Op, OpKind, Program
from engine.topology.timeline import Timeline


def build(
    schedule: PipelineSchedule, stages: int, micro_batches: int, virtual_stages: int = 1, forward_only: bool = False
) -> Program:
    """The program of one step.

    Args:
        schedule: one_f_one_b: one chunk per stage. interleaved: `virtual_stages` chunks per stage, chunk c on stage
            c % stages. dualpipev: chunk c on stage c on the way down (c < stages), on stage 2 stages - 1 - c on the way
            back. See `engine.topology.orders`.
        stages: Pipeline ranks p.
        micro_batches: m of one replica. To train, interleaved needs a multiple of p and dualpipev at least 2 p.
        virtual_stages: Chunks per stage of interleaved; 1 for the others.
        forward_only: For evaluation, with any m >= 1.

    Raises:
        TopologyError: 216 a count below 1; 218 counts that do not fit the schedule.
    """
    _check_counts(schedule, stages, micro_batches, virtual_stages)
    if not forward_only:
        _check_micro_batches(schedule, stages, micro_batches)
    order = [_order(schedule, stages, micro_batches, virtual_stages, stage, forward_only) for stage in range(stages)]
    chunks = stages * chunks_per_stage(schedule, virtual_stages)
    if schedule is PipelineSchedule.dualpipev:
        owner = tuple(min(chunk, chunks - 1 - chunk) for chunk in range(chunks))
    else:
        owner = tuple(chunk % stages for chunk in range(chunks))
    return Program(stages, micro_batches, owner, tuple(tuple(_with_transfers(passes, owner)) for passes in order))


def chunks_per_stage(schedule: PipelineSchedule, virtual_stages: int = 1) -> int:
    """Parts of the model that one stage holds."""
    return 2 if schedule is PipelineSchedule.dualpipev else virtual_stages


def simulate(
    schedule: PipelineSchedule,
    stages: int,
    micro_batches: int,
    virtual_stages: int = 1,
    forward_s: float = 1.0,
    backward_s: float = 2.0,
) -> Timeline:
    """One training step with equal stages and free transfers.

    `forward_s` and `backward_s` are a whole stage's; a chunk takes its share of them, so schedules can be compared.
    Raises `TopologyError` as `build` and `execute` do.
    """
    share = chunks_per_stage(schedule, virtual_stages)
    program = build(schedule, stages, micro_batches, virtual_stages)
    return execute(program, forward_s / share, backward_s / share)


def bubble_formula(
    schedule: PipelineSchedule,
    stages: int,
    micro_batches: int,
    virtual_stages: int = 1,
    forward_s: float = 1.0,
    backward_s: float = 2.0,
) -> float:
    """Idle share of `simulate`'s step in closed form: idle / (idle + m (F + B)), F and B a whole stage's seconds.

    one_f_one_b (arXiv 2104.04473, section 2.2.1): idle = (p - 1)(F + B), a share of (p - 1) / (m + p - 1).

    interleaved (section 2.2.2): idle = (p - 1)(F + B) / v, a share of (p - 1) / (v m + p - 1).

    dualpipev with whole backward passes, f = F / 2 and b = B / 2 of a chunk: a chain of passes, each waiting for the
    one before it, bounds the step of 2 m (f + b) + idle seconds from below. The longest of three is the step's time.
    F0, F1, B0, B1 are passes on the way down (0) and back (1). The last stage runs p times (F0 F1), m - p times
    (F0 B1 F1 B0), p times (B1 B0).

    1. The first F0 on p - 1 stages, all passes of the last stage, the last B0 on p - 1 stages: idle = (p - 1)(f + b).
    2. Slow forward. The first F0 on p - 1 stages; the last stage up to its last F1, which is 2 m f + (2 m - 2 p - 1) b;
       that F1 on the p - 1 other stages; one B0 and the last B1 on stage 0; that B1 on p - 1 stages, the last B0 on p.
       These are 2 m b, so idle = 2 (p - 1) f.
    3. Slow backward. The first 2 p - 1 F0, F1 and B1 on stage 0; that B1 on p - 1 stages; the last stage after it, so
       without p (F0 F1), F0 and B1; the last B0 on p - 1 stages: idle = 2 (p - 1) b - f.

    Raises:
        TopologyError: as `build`.
    """
    _check_counts(schedule, stages, micro_batches, virtual_stages)
    _check_micro_batches(schedule, stages, micro_batches)
    below, both = stages - 1, forward_s + backward_s
    if schedule is PipelineSchedule.dualpipev:
        forward, backward = forward_s / 2, backward_s / 2
        idle = max(below * both / 2, 2 * below * forward, 2 * below * backward - forward)
    else:
        idle = below * both / virtual_stages
    return idle / (idle + micro_batches * both)


def peak_formula(
    schedule: PipelineSchedule, stages: int, micro_batches: int, stage: int, virtual_stages: int = 1
) -> int:
    """Most activations of a chunk and micro-batch that `stage` holds at once in a training step.

    1F1B and interleaved: the warm-up and one more, min(p - stage, m) and min(2 (p - stage - 1) + (v - 1) p + 1, v m).
    dualpipev: 2 p + 1 on every stage. The steps before the main one leave 2 (p - stage - 1) + 2 (stage + 1) = 2 p
    forward passes open; from then on backward and forward take turns, and the main step starts with a forward pass.

    Raises:
        TopologyError: as `build`; 216 also for a stage that is not in the pipeline.
    """
    _check_counts(schedule, stages, micro_batches, virtual_stages)
    _check_micro_batches(schedule, stages, micro_batches)
    if not 0 <= stage < stages:
        raise TopologyError.of(216, "stage", stage, f"the pipeline has {stages} stages", f"Use 0..{stages - 1}")
    if schedule is PipelineSchedule.dualpipev:
        return 2 * stages + 1
    below = stages - stage - 1
    warmup = 2 * below + (virtual_stages - 1) * stages if schedule is PipelineSchedule.interleaved else below
    return min(warmup + 1, virtual_stages * micro_batches)


def _order(
    schedule: PipelineSchedule, stages: int, micro_batches: int, virtual_stages: int, stage: int, forward_only: bool
) -> list[Op]:
    if schedule is PipelineSchedule.dualpipev:
        order = orders.forward_only_v if forward_only else orders.dualpipev
        return order(stages, micro_batches, stage)
    if forward_only:
        return orders.forward_only(stages, micro_batches, virtual_stages, stage)
    interleaved = schedule is PipelineSchedule.interleaved
    return orders.one_f_one_b(stages, micro_batches, virtual_stages, stage, interleaved=interleaved)


def _with_transfers(passes: Sequence[Op], owner: Sequence[int]) -> Iterator[Op]:
    transfers = {
        OpKind.forward: (OpKind.recv_activation, OpKind.send_activation, 1),
        OpKind.backward: (OpKind.recv_grad, OpKind.send_grad, -1),
    }
    for op in passes:
        receive, send, step = transfers[op.kind]
        before, after = op.chunk - step, op.chunk + step
        if 0 <= before < len(owner) and owner[before] != owner[op.chunk]:
            yield Op(receive, op.micro_batch, op.chunk)
        yield op
        if 0 <= after < len(owner) and owner[after] != owner[op.chunk]:
            yield Op(send, op.micro_batch, op.chunk)


def _check_counts(schedule: PipelineSchedule, stages: int, micro_batches: int, virtual_stages: int) -> None:
    counts = (
        ("parallel.pp", stages),
        ("train.accum_steps", micro_batches),
        ("parallel.virtual_stages", virtual_stages),
    )
    for option, value in counts:
        if value < 1:
            raise TopologyError.of(216, option, value, "a schedule needs at least 1", f"Use {option}=1")
    if virtual_stages > 1 and schedule is not PipelineSchedule.interleaved:
        rule = f"parallel.schedule={schedule} fixes the chunks per stage at {chunks_per_stage(schedule)}"
        way_out = "Use parallel.virtual_stages=1, or parallel.schedule=interleaved"
        raise TopologyError.of(218, "parallel.virtual_stages", virtual_stages, rule, way_out)


def _check_micro_batches(schedule: PipelineSchedule, stages: int, micro_batches: int) -> None:
    option = "train.accum_steps"
    if schedule is PipelineSchedule.interleaved and micro_batches % stages:
        up = micro_batches + stages - micro_batches % stages
        down = up - stages
        rule = f"interleaved takes micro-batches in groups of parallel.pp={stages}"
        way_out = f"Use {option}={f'{down} or {up}' if down else up}"
        raise TopologyError.of(218, option, micro_batches, rule, way_out)
    if schedule is PipelineSchedule.dualpipev and micro_batches < 2 * stages:
        rule = f"dualpipev needs at least 2 * parallel.pp = {2 * stages} micro-batches"
        raise TopologyError.of(218, option, micro_batches, rule, f"Use {option}={2 * stages}")
