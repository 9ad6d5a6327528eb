"""The interpreter of pipeline programs: stages as threads, messages through queues, the real model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from queue import Queue
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from engine.config.enums import PipelineSchedule
from engine.dist.context import SINGLE, AxisGroup, ParallelContext
from engine.model.batch import Batch
from engine.model.build import build_loss
from engine.model.layers import Stack, build_stacks
from engine.parallel.logical import logical_of
from engine.runtime.channels import Channels
from engine.runtime.executor import Executor, StageModel
from engine.runtime.steps import make_feeds
from engine.topology.program import COMPUTE, Op, OpKind, Program
from engine.topology.schedule import build
from engine.topology.timeline import Event, Timeline
from tests.helpers.models import GPT2, batch_of, config_of, layers_of, noisy_weights

ONE = ParallelContext.single()
MODEL = replace(GPT2, num_layers=6, tied_head=False, dropout=0.2)
CONFIG = config_of(MODEL)
SCHEDULES = [
    (PipelineSchedule.one_f_one_b, 2, 5, 1),
    (PipelineSchedule.one_f_one_b, 4, 2, 1),
    (PipelineSchedule.interleaved, 2, 4, 2),
    (PipelineSchedule.interleaved, 2, 2, 4),
    (PipelineSchedule.dualpipev, 2, 4, 1),
    (PipelineSchedule.dualpipev, 4, 8, 1),
]
every_schedule = pytest.mark.parametrize(("schedule", "stages", "micro_batches", "virtual"), SCHEDULES)


class Post:
    """Queues between all stages: one for each message, so that order is the programs' alone."""

    def __init__(self) -> None:
        self.boxes: defaultdict[tuple[bool, int, int], Queue[Tensor]] = defaultdict(Queue)
        self.shapes: set[tuple[int, ...]] = set()


class Letter:
    """A posted receive."""

    def __init__(self, box: Queue[Tensor], shape: tuple[int, ...]) -> None:
        self._box, self._shape = box, shape

    def take(self) -> Tensor:
        tensor = self._box.get(timeout=30)
        assert tuple(tensor.shape) == self._shape, "a receive knows the shape of its message"
        return tensor


class FakeChannels:
    """Stands for `Channels` of one stage."""

    def __init__(self, post: Post) -> None:
        self._post, self.finished = post, 0

    def send(self, op: Op, tensor: Tensor) -> None:
        gradient = op.kind is OpKind.send_grad
        self._post.boxes[gradient, op.chunk + (-1 if gradient else 1), op.micro_batch].put(tensor.detach().clone())

    def receive(self, op: Op, shape: tuple[int, ...], dtype: torch.dtype) -> Letter:
        assert dtype is torch.float32
        return Letter(self._post.boxes[op.kind is OpKind.recv_grad, op.chunk, op.micro_batch], shape)

    def finish(self) -> None:
        self.finished += 1


def micro_batches(count: int) -> list[Batch]:
    """Micro-batches of different lengths."""
    return [batch_of(MODEL, 2, 6 + 2 * (i % 3), first=2 * i, padded=True) for i in range(count)]


def chunk_stacks(chunks: int) -> list[Stack]:
    """The model in `chunks` parts, each with modules of its own."""
    layers = layers_of(MODEL)
    bounds = [round(i * len(layers) / chunks) for i in range(chunks + 1)]
    spans = list(zip(bounds, bounds[1:], strict=False))
    return [build_stacks(layers, [span], noisy_weights(), tp=SINGLE)[0].train() for span in spans]


def run(
    program: Program, *, train: bool, ends: Callable[[int], Any] | None = None
) -> tuple[Tensor, list[Stack], list[list[Event]]]:
    """One step of all stages: the loss, the model's parts and what each stage did. `ends`: a stage's channels."""
    stacks, post = chunk_stacks(program.chunks), Post()
    feeds = make_feeds(micro_batches(program.micro_batches), CONFIG, ONE)

    def stage(rank: int) -> tuple[Tensor, list[Event]]:
        pp = AxisGroup(rank=rank, size=program.stages, ranks=tuple(range(program.stages)), group=None)
        model = StageModel(
            chunks={chunk: stacks[chunk] for chunk in program.chunks_of(rank)},
            loss=build_loss(CONFIG, ONE),
            backward=lambda output, gradient: torch.autograd.backward(output, gradient),
            width=MODEL.hidden_size,
            dtype=torch.float32,
        )
        channels = FakeChannels(post) if ends is None else ends(rank)
        executor = Executor(program, model, replace(ONE, pp=pp), cast(Channels, channels))
        executor.trace = []
        total = executor.run(feeds, train=train)
        assert ends is not None or channels.finished == 1
        return total, executor.trace

    with ThreadPoolExecutor(program.stages) as pool:
        totals, traces = zip(*pool.map(stage, range(program.stages)), strict=True)
    assert all(box.empty() for box in post.boxes.values()), "every message was taken"
    return torch.stack(totals).sum(), stacks, list(traces)


def alone(count: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of the same step without a pipeline."""
    (whole,) = chunk_stacks(1)
    loss = build_loss(CONFIG, ONE)
    total = torch.zeros(())
    for feed in make_feeds(micro_batches(count), CONFIG, ONE):
        share = loss(whole(None, feed), feed)
        share.backward()
        total += share.detach()
    return total, gradients([whole])


def gradients(stacks: Sequence[Stack]) -> dict[str, Tensor]:
    found: dict[str, Any] = {logical_of(p).name: p.grad for stack in stacks for p in stack.parameters()}
    return found


@every_schedule
def test_a_step_has_the_loss_and_gradients_of_one_stage(
    schedule: PipelineSchedule, stages: int, micro_batches: int, virtual: int
) -> None:
    program = build(schedule, stages, micro_batches, virtual)
    loss, stacks, traces = run(program, train=True)
    expected_loss, expected = alone(micro_batches)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=0)
    found = gradients(stacks)
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        # Micro-batches are added up in another order.
        torch.testing.assert_close(found[name], grad, rtol=1e-5, atol=1e-6, msg=name)
    assert [[event.op for event in trace] for trace in traces] == [list(ops) for ops in program.ops]


@every_schedule
def test_an_evaluation_has_the_loss_and_leaves_no_gradient(
    schedule: PipelineSchedule, stages: int, micro_batches: int, virtual: int
) -> None:
    for count in (micro_batches, 1):
        program = build(schedule, stages, count, virtual, forward_only=True)
        loss, stacks, traces = run(program, train=False)
        torch.testing.assert_close(loss, alone(count)[0], rtol=1e-6, atol=0)
        assert all(grad is None for grad in gradients(stacks).values())
        assert [[event.op for event in trace] for trace in traces] == [list(ops) for ops in program.ops]


def test_the_trace_is_a_timeline() -> None:
    program = build(PipelineSchedule.dualpipev, 2, 4)
    _, _, traces = run(program, train=True)
    timeline = Timeline.from_events(event for trace in traces for event in trace)
    for stage, events in enumerate(timeline.events):
        assert [event.op for event in events] == list(program.ops[stage])
        for before, after in zip(events, events[1:], strict=False):
            assert before.end <= after.start
    assert 0 < timeline.ideal < timeline.makespan
    assert {event.op.kind for events in timeline.events for event in events} >= set(COMPUTE)
