"""Messages in boxes: the real executor on threads, with copies that run on streams of their own, as copy engines do."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from engine.config.enums import PipelineSchedule
from engine.dist.context import AxisGroup
from engine.errors import LaunchError
from engine.parallel.symmetric import require_mapped
from engine.runtime import mailboxes
from engine.runtime.mailboxes import Mailboxes
from engine.topology.in_flight import in_flight
from engine.topology.program import OpKind, Program
from engine.topology.schedule import build
from tests.unit.runtime.test_runtime_executor import SCHEDULES, alone, every_schedule, gradients, run

TIMEOUT_S = 60.0


class Memory:
    """What all stages share: boxes, and flags that say which are full."""

    def __init__(self, stages: int, count: int) -> None:
        self.boxes: list[list[Tensor | None]] = [[None] * count for _ in range(stages)]
        self.full = [[threading.Semaphore(0) for _ in range(count)] for _ in range(stages)]
        self.free = [[threading.Semaphore(0) for _ in range(count)] for _ in range(stages)]


class ThreadBoxes:
    """`Boxes` of one stage. A worker for each ring stands for the stream that copies its messages."""

    def __init__(self, memory: Memory, stage: int) -> None:
        self._memory, self._stage = memory, stage
        self._streams: defaultdict[tuple[int, int], ThreadPoolExecutor] = defaultdict(lambda: ThreadPoolExecutor(1))
        self._sent: list[Future[None]] = []

    def fill(self, stage: int, ring: int, box: int, message: Tensor, *, again: bool) -> None:
        def copy() -> None:
            if again:
                assert self._memory.free[stage][box].acquire(timeout=TIMEOUT_S), "the box was never emptied"
            assert self._memory.boxes[stage][box] is None, "a message was overwritten"
            self._memory.boxes[stage][box] = message.clone()
            self._memory.full[stage][box].release()

        self._sent.append(self._streams[stage, ring].submit(copy))

    def empty(self, source: int, box: int, out: Tensor) -> None:
        assert self._memory.full[self._stage][box].acquire(timeout=TIMEOUT_S), "the box was never filled"
        message = self._memory.boxes[self._stage][box]
        assert message is not None
        out.copy_(message)
        self._memory.boxes[self._stage][box] = None
        self._memory.free[self._stage][box].release()

    def finish(self) -> None:
        for sent in self._sent:
            sent.result(timeout=TIMEOUT_S)
        self._sent.clear()


def ends_of(program: Program) -> Callable[[int], Mailboxes]:
    """For each stage its end of the boxes."""
    cpu = torch.device("cpu")
    memory = Memory(program.stages, Mailboxes(program, 0, cpu).count)
    return lambda stage: Mailboxes(program, stage, cpu).open(ThreadBoxes(memory, stage))


@pytest.mark.parametrize("plenty", [True, False])
@every_schedule
def test_a_step_through_boxes_has_the_gradients_of_one_stage(
    monkeypatch: pytest.MonkeyPatch,
    schedule: PipelineSchedule,
    stages: int,
    micro_batches: int,
    virtual: int,
    plenty: bool,
) -> None:
    """Also where each channel has one box, so that nearly every message waits for the one before it."""
    if not plenty:
        monkeypatch.setattr(mailboxes, "in_flight", lambda program: dict.fromkeys(in_flight(program), 0))
    program = build(schedule, stages, micro_batches, virtual)
    loss, stacks, traces = run(program, train=True, ends=ends_of(program))
    expected_loss, expected = alone(micro_batches)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=0)
    for name, grad in gradients(stacks).items():
        # Micro-batches are added up in another order.
        torch.testing.assert_close(grad, expected[name], rtol=1e-5, atol=1e-6, msg=name)
    assert [[event.op for event in trace] for trace in traces] == [list(ops) for ops in program.ops]


def test_boxes_go_on_where_the_step_before_ended() -> None:
    """Three steps, then an evaluation of another length, over the same boxes."""
    program = build(PipelineSchedule.interleaved, 2, 4, 2)
    evaluation = build(PipelineSchedule.interleaved, 2, 3, 2, forward_only=True)
    ends = ends_of(program)
    kept = {stage: ends(stage) for stage in range(program.stages)}
    for _ in range(3):
        loss, stacks, _ = run(program, train=True, ends=kept.__getitem__)
    torch.testing.assert_close(loss, alone(4)[0], rtol=1e-6, atol=0)
    found = gradients(stacks)
    torch.testing.assert_close(found, alone(4)[1], rtol=1e-5, atol=1e-6)
    loss, _, _ = run(evaluation, train=False, ends=kept.__getitem__)
    torch.testing.assert_close(loss, alone(3)[0], rtol=1e-6, atol=0)


def test_no_two_channels_share_a_box() -> None:
    for schedule, stages, micro_batches, virtual in SCHEDULES:
        program = build(schedule, stages, micro_batches, virtual)
        ends = Mailboxes(program, 0, torch.device("cpu"))
        used: dict[int, list[int]] = {stage: [] for stage in range(stages)}
        for channel in in_flight(program):
            used[channel[2]] += {ends.box(channel, number) for number in range(20)}
        for boxes in used.values():
            assert len(boxes) == len(set(boxes))
            assert all(0 <= box < ends.count for box in boxes)
        assert max(map(len, used.values())) == ends.count


def test_in_flight_counts_what_a_slow_stage_leaves_waiting() -> None:
    # Both warm-up passes of the first stage wait where the second is slow; its gradients come one by one.
    plain = in_flight(build(PipelineSchedule.one_f_one_b, 2, 8))
    assert plain == {(OpKind.send_activation, 0, 1): 2, (OpKind.send_grad, 1, 0): 2}
    # 1F1B bounds it by the stages that are still to come, however many micro-batches there are.
    deep = in_flight(build(PipelineSchedule.one_f_one_b, 4, 32))
    assert [deep[OpKind.send_activation, stage, stage + 1] for stage in range(3)] == [4, 3, 2]


def test_ranks_on_cpus_are_refused() -> None:
    axis = AxisGroup(rank=0, size=2, ranks=(0, 1), group=None)
    with pytest.raises(
        LaunchError, match=r"\[OCT515\] parallel.pipeline_transport=copy_engine: copy engines are GPUs'"
    ):
        require_mapped(axis, torch.device("cpu"), "parallel.pipeline_transport", "copy_engine", "nccl")


def test_more_boxes_than_flags_are_refused() -> None:
    mailboxes.require_flags(31, 8, 2048)
    with pytest.raises(LaunchError) as caught:
        mailboxes.require_flags(32, 8, 2048)
    assert str(caught.value) == (
        "1. [OCT516] parallel.pipeline_transport=copy_engine: 32 boxes on each of 8 stages need 2080 bytes of flags, "
        "and torch keeps 2048. Use parallel.pipeline_transport=nccl, or fewer parallel.virtual_stages"
    )
