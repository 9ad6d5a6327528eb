"""Reading ahead: order, how far, errors, the end of the thread."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Iterator

import pytest
import torch

from engine.data.loader import Loader, with_tensors
from engine.model.batch import Batch, Documents

CPU = torch.device("cpu")
FIRSTS = range(12, 60, 8)
WAIT_S = 30.0


def batch(first: int) -> Batch:
    tokens = torch.full((2, 3), first)
    return Batch(tokens_BS=tokens, labels_BS=tokens, samples_B=torch.arange(first, first + 2))


class Reader:
    """Two micro-batches for each first sample; `begun` tells what was asked for, `broken` where reading fails."""

    def __init__(self, broken: int | None = None) -> None:
        self.begun: list[int] = []
        self.broken = broken

    def __call__(self, first: int) -> Iterator[Batch]:
        self.begun.append(first)
        yield batch(first)
        if first == self.broken:
            raise OSError(f"no page for {first}")
        yield batch(first + 4)


def loaders() -> int:
    return sum(thread.name == "octant-loader" for thread in threading.enumerate())


@pytest.mark.parametrize("prefetch", [0, 1, 2, 9])
def test_all_micro_batches_come_in_order(prefetch: int) -> None:
    with Loader(Reader(), FIRSTS, prefetch=prefetch, device=CPU) as loader:
        found = [[int(micro.samples_B[0]) for micro in micros] for micros in loader]
    assert found == [[first, first + 4] for first in FIRSTS]
    assert loader.wait_s > 0


def test_nothing_to_read_starts_no_thread() -> None:
    with Loader(Reader(), range(0), prefetch=2, device=CPU) as loader:
        assert loaders() == 0
        assert list(loader) == []


@pytest.mark.parametrize("prefetch", [1, 2])
def test_the_thread_reads_as_far_ahead_as_asked_and_no_further(prefetch: int) -> None:
    reader, held = Reader(), threading.Event()

    class Watched(Loader):
        """Tells when the thread waits for room."""

        def _has_room(self) -> bool:
            room = super()._has_room()
            if not room:
                held.set()
            return room

    with Watched(reader, FIRSTS, prefetch=prefetch, device=CPU) as loader:
        for given in range(1, 4):
            assert held.wait(WAIT_S)
            assert reader.begun == list(FIRSTS[: given - 1 + prefetch])
            held.clear()
            next(loader)


@pytest.mark.parametrize("prefetch", [0, 2])
def test_an_error_comes_where_its_batch_would_with_the_place_it_was_raised(prefetch: int) -> None:
    with Loader(Reader(broken=FIRSTS[2]), FIRSTS, prefetch=prefetch, device=CPU) as loader:
        assert [int(next(loader)[0].samples_B[0]) for _ in range(2)] == list(FIRSTS[:2])
        for _ in range(2):
            with pytest.raises(OSError, match="no page for 28") as caught:
                next(loader)
            frames = traceback.extract_tb(caught.value.__traceback__)
            assert (frames[-1].name, frames[-1].line) == ("__call__", 'raise OSError(f"no page for {first}")')
    assert loaders() == 0


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_what_the_trainer_raises_ends_the_thread_in_the_middle_of_a_batch(error: type[BaseException]) -> None:
    going, go_on, begun = threading.Event(), threading.Event(), []

    def read(first: int) -> Iterator[Batch]:
        for micro in range(1000):
            begun.append(micro)
            going.set()
            assert go_on.wait(WAIT_S)
            yield batch(first)

    class Released(Loader):
        """Lets the micro-batch that is being read come in when closing has begun."""

        def close(self) -> None:
            self._closed = True
            go_on.set()
            super().close()

    with pytest.raises(error), Released(read, FIRSTS, prefetch=2, device=CPU):
        assert going.wait(WAIT_S)
        raise error
    assert begun == [0]
    assert loaders() == 0


def test_a_closed_loader_gives_nothing_more() -> None:
    loader = Loader(Reader(), FIRSTS, prefetch=1, device=CPU)
    loader.close()
    with pytest.raises(ValueError, match="closed"):
        next(loader)


def test_the_tensors_of_documents_are_changed_too() -> None:
    whole = Batch(
        tokens_BS=torch.zeros(1, 4),
        labels_BS=torch.zeros(1, 4),
        samples_B=torch.zeros(1),
        documents=Documents(starts=torch.zeros(3), longest=2),
    )
    changed = with_tensors(whole, lambda tensor: tensor + 1)
    assert changed.documents is not None
    for tensor in (changed.tokens_BS, changed.labels_BS, changed.samples_B, changed.documents.starts):
        assert bool((tensor == 1).all())
    assert (changed.documents.longest, changed.documents.host, changed.lengths_B) == (2, None, None)


def test_for_a_gpu_the_thread_copies_to_page_locked_memory_on_its_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    # No GPU here: what torch is asked for is written down instead.
    calls: list[object] = []

    def empty_like(tensor: torch.Tensor, *, pin_memory: bool) -> torch.Tensor:
        calls.append((threading.current_thread().name, pin_memory))
        return torch.zeros(tensor.shape, dtype=tensor.dtype)

    monkeypatch.setattr(torch.cuda, "set_device", calls.append)
    monkeypatch.setattr(torch, "empty_like", empty_like)
    with Loader(Reader(), FIRSTS[:1], prefetch=1, device=torch.device("cuda", 1)) as loader:
        (micros,) = loader
    for micro, first in zip(micros, (12, 16), strict=True):
        expected = batch(first)
        assert torch.equal(micro.tokens_BS, expected.tokens_BS)
        assert torch.equal(micro.samples_B, expected.samples_B)
    assert calls == [torch.device("cuda", 1), *[("octant-loader", True)] * 6], "three tensors of each micro-batch, once"
