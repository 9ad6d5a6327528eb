"""A rank alone: what its group answers, what is reported, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from engine.config.load import load
from engine.errors import LaunchError
from engine.protocols import StepResult
from engine.study import loopback, rank
from engine.study.loopback import Copies, Loopback, Sent

SUM, AVG, MAX = dist.ReduceOp.SUM, dist.ReduceOp.AVG, dist.ReduceOp.MAX


@pytest.fixture(autouse=True)
def _nothing_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loopback, "sent", type(loopback.sent)(Sent))


@pytest.fixture
def group() -> Loopback:
    """The second of four."""
    return Loopback(1, 4, Copies())


def scattered(operation: Any) -> Any:
    options = dist.ReduceScatterOptions()
    options.reduceOp = operation
    return options


def test_what_all_others_have_is_as_large(group: Loopback) -> None:
    own, every, mine = torch.tensor([1.0, 2.0]), torch.empty(8), torch.empty(2)
    group.all_gather_single(every, own).wait()
    assert every.tolist() == [1.0, 2.0] * 4
    every = torch.arange(8.0)
    group.reduce_scatter_single(mine, every, scattered(SUM)).wait()
    assert mine.tolist() == [4.0, 6.0]
    group.reduce_scatter_single(mine, every, scattered(AVG)).wait()
    assert mine.tolist() == [2.0, 3.0]
    group.all_to_all_single(every, torch.arange(8.0), [], []).wait()
    assert every.tolist() == [2.0, 3.0] * 4


def test_a_gather_may_be_in_place(group: Loopback) -> None:
    every = torch.arange(8.0)
    group.all_gather_single(every, every[2:4]).wait()
    assert every.tolist() == [2.0, 3.0] * 4


@pytest.mark.parametrize(("operation", "expected"), [(SUM, [2.0, 4.0]), (AVG, [1.0, 2.0]), (MAX, [1.0, 2.0])])
def test_a_sum_is_that_of_independent_terms_and_an_average_that_of_copies(
    group: Loopback, operation: Any, expected: list[float]
) -> None:
    options, whole = dist.AllreduceOptions(), torch.tensor([1.0, 2.0])
    options.reduceOp = operation
    group.allreduce([whole], options).wait()
    assert whole.tolist() == expected


def test_counts_are_those_of_copies(group: Loopback) -> None:
    whole = torch.tensor([3, 5])
    group.allreduce([whole]).wait()
    assert whole.tolist() == [12, 20]


@pytest.mark.parametrize(("root", "expected"), [(1, [2.0]), (0, [1.0])])
def test_the_root_alone_has_the_sum(group: Loopback, root: int, expected: list[float]) -> None:
    options, whole = dist.ReduceOptions(), torch.tensor([1.0])
    options.reduceOp, options.rootRank = SUM, root
    group.reduce([whole], options).wait()
    assert whole.tolist() == expected


def test_uneven_parts_go_where_they_were_asked_for(group: Loopback) -> None:
    received = torch.full((7,), -1.0)
    # To each of the four, and from each: the others send what this rank has for itself, as far as it goes.
    group.all_to_all_single(received, torch.arange(6.0), [2, 2, 1, 2], [1, 2, 0, 3]).wait()
    assert received.tolist() == [1.0, 2.0, 1.0, 2.0, 1.0, 1.0, 2.0]


@pytest.mark.parametrize(
    ("kind", "call", "size"),
    [
        ("all-gather", lambda g, x: g.all_gather_single(x.repeat(4), x), 3 * 40),
        ("reduce-scatter", lambda g, x: g.reduce_scatter_single(x, x.repeat(4), scattered(SUM)), 3 * 40),
        ("all-to-all", lambda g, x: g.all_to_all_single(x[:8].clone(), x[:8], [], []), 24),
        ("all-reduce", lambda g, x: g.allreduce([x]), 60),
        ("broadcast", lambda g, x: g.broadcast([x]), 40),
        ("send", lambda g, x: g.send([x], 0, 0), 40),
        ("receive", lambda g, x: g.recv([x], 0, 0), 0),
    ],
)
def test_what_goes_around_a_ring_is_counted(
    group: Loopback, kind: str, call: Callable[[Loopback, Tensor], dist.Work], size: float
) -> None:
    for _ in range(2):
        assert call(group, torch.ones(10)).wait()
    assert dict(loopback.sent) == {kind: Sent(2, 2 * size)}


def test_lists_of_floats_are_messages_and_those_of_integers_are_not(group: Loopback) -> None:
    for own, count in ((torch.ones(3), 1), (torch.ones(3, dtype=torch.uint8), 0)):
        every = [torch.zeros_like(own) for _ in range(4)]
        loopback.sent.clear()
        group.allgather([every], [own]).wait()
        assert all(torch.equal(one, own) for one in every)
        assert dict(loopback.sent) == ({"all-gather": Sent(1, 36)} if count else {})


def test_what_lies_in_host_memory_never_takes_a_gpus_link() -> None:
    group, whole = Loopback(0, 4, None), torch.ones(3)  # type: ignore[arg-type]
    group.allreduce([whole]).wait()
    group.broadcast([whole]).wait()
    group.all_gather_single(torch.empty(12), whole).wait()
    assert whole.tolist() == [2.0] * 3


@pytest.mark.parametrize(
    ("words", "size"),
    [
        ([], 256),
        (["data=random", "data.vocab_size=300"], 256),
        (["data=random", "data.vocab_size=100"], 100),
        (["data=text", "data.source=python"], None),
    ],
)
def test_random_tokens_are_those_of_the_first_rank(words: list[str], size: int | None) -> None:
    base = load(["model=gpt_tiny", "model.vocab_size=512", "parallel.tp=2", *(words or ["data=random"])])
    given = base.data.vocab_size
    assert rank.with_own_tokens(base).data.vocab_size == (given if size is None else size)


def test_what_arrives_is_noise_and_finite(group: Loopback) -> None:
    small, large, number = torch.full((3,), torch.nan), torch.full((2, 400), torch.nan), torch.ones(2, dtype=torch.long)
    for message in (small, large, number):
        group.recv([message], 0, 0).wait()
    assert small.isfinite().all()
    assert 0.8 < large.std() < 1.2
    assert not number.any()


def test_steps_whose_gradients_are_infinite_are_named(group: Loopback) -> None:
    messages, summary = rank.Messages(), dict[str, Any]()
    messages.before_training()
    for norm in (torch.inf, 1.0, 1.0, 1.0, torch.nan, torch.inf):
        group.broadcast([torch.ones(1)])
        messages.after_step(1, StepResult(torch.tensor(1.0), torch.tensor(norm)), 1e-3, 0.0)
    messages.after_training(summary)
    assert summary["steps_with_infinite_gradients"] == 2
    last = rank._report(summary, messages, 2, load(["model=gpt_tiny"]))[-1]
    assert last.startswith("gradients of 2 measured steps were not finite, ")
    assert last.endswith("such times are too short")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["train.steps=3"],
            "[OCT527] train.steps=3: the first 3 steps are warm-up and not measured. Use train.steps=4 or more",
        ),
        (
            ["checkpoint.save_final=true"],
            "[OCT527] checkpoint.save_final=True: the weights of one rank alone are those of no training. Use "
            "checkpoint.save_final=false; python -m engine.train trains",
        ),
        (
            ["checkpoint.every=4"],
            "[OCT527] checkpoint.every=4: the weights of one rank alone are those of no training. Use "
            "checkpoint.every=0; python -m engine.train trains",
        ),
        (
            ["zero=z3", "zero.gather=copy_engine"],
            "[OCT527] zero.gather=copy_engine: copy engines read the memory of other ranks, and there are none. Use "
            "zero.gather=auto, whose messages are stood in for",
        ),
        (
            ["parallel.tp=2", "parallel.sequence=true", "parallel.tp_overlap=symmetric"],
            "[OCT527] parallel.tp_overlap=symmetric: copy engines read the memory of other ranks, and there are none. "
            "Use parallel.tp_overlap=auto, whose messages are stood in for",
        ),
    ],
)
def test_refused(words: list[str], message: str) -> None:
    with pytest.raises(LaunchError) as caught:
        rank.main(["--world", "2", "model=gpt_tiny", *words])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--world", "1"], "argument --world: 1 is no whole number above 1; one rank is python -m engine.train"),
        (["--world", "x"], "argument --world: x is no whole number above 1; one rank is python -m engine.train"),
        ([], "the following arguments are required: --world"),
        (["--world", "2", "--link-gb-s", "0"], "argument --link-gb-s: 0 is not a number of GB/s above 0"),
        (["--world", "2", "--link-gb-s", "fast"], "argument --link-gb-s: fast is not a number of GB/s above 0"),
    ],
)
def test_options_that_cannot_be_read(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        rank.main(argv)
    assert message in capsys.readouterr().err


def test_a_layout_of_another_size_is_refused() -> None:
    with pytest.raises(Exception, match="parallel.dp"):
        rank.main(["--world", "4", "model=gpt_tiny", "parallel.dp=3"])


def test_a_link_that_no_preset_knows_has_to_be_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Unheard-of")
    with pytest.raises(LaunchError) as caught:
        rank._wire(load(["model=gpt_tiny"]), torch.device("cuda"), None)
    expected = "[OCT528] hardware.link_gb_s=None: how fast NVIDIA Unheard-of sends to others is not known. Give "
    assert expected + "--link-gb-s, GB/s of one direction" in str(caught.value)
