"""One rank's file: safetensors, made of what lies scattered in memory, and shared out so that all is written once."""

from __future__ import annotations

import errno
import hashlib
import os
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from engine.checkpoint import manifest as sizes
from engine.checkpoint import shard_file
from engine.checkpoint.shard_file import Snapshot, Source, header_of, placed, sources, write_shard
from engine.dist.context import AxisGroup, ParallelContext
from engine.optim.pieces import Piece
from engine.optim.state import Slot
from engine.parallel.logical import LogicalTensor
from engine.parallel.rectangles import Rectangle
from tests.helpers.checkpoints import bands, draws, write_parts

STATE = {"weight": draws({"a": (6, 4), "b": (5,), "c": (), "d": (2, 3, 2)}), "exp_avg": draws({"a": (6, 4)}, 1)}


def axis(rank: int, size: int) -> AxisGroup:
    return AxisGroup(rank=rank, size=size, ranks=tuple(range(size)), group=None)


def context(*, tp: tuple[int, int] = (0, 1), reduce: tuple[int, int] = (0, 1)) -> ParallelContext:
    """Rank and size of the two axes."""
    return replace(ParallelContext.single(), tp=axis(*tp), reduce=axis(*reduce))


def slot(logical: LogicalTensor, *, shared: bool = False, copy: bool = False) -> Slot:
    """A whole slice on one rank."""
    size = prod(logical.shape)
    piece = Piece(logical=logical, local_shape=logical.shape, start=0, offset=0, size=size, copy=copy)
    return Slot("weight", piece, torch.arange(float(size)), shared)


@pytest.mark.parametrize("files", [1, 2])
def test_others_can_read_our_files(files: int, tmp_path: Path) -> None:
    seen: set[str] = set()
    for rank, parts in enumerate(bands(STATE, files)):
        path = tmp_path / f"rank-{rank:05d}.safetensors"
        write_parts(path, parts)
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            for part in parts:
                top, bottom, left, right = part.rectangle
                name = f"{part.kind}/{part.name}"
                whole = STATE[part.kind][part.name]
                if name in file.keys():  # noqa: SIM118  (no mapping)
                    assert torch.equal(file.get_tensor(name), whole)
                else:
                    name += f"[{top}:{bottom},{left}:{right}]"
                    band = whole.view(len(whole), -1)[top:bottom, left:right]
                    assert torch.equal(file.get_tensor(name), band)
                seen.add(name)
            assert len(parts) == len(list(file.keys()))
    wholes = {f"{kind}/{name}" for kind, named in STATE.items() for name in named}
    # One row cannot be cut.
    assert seen & wholes == (wholes if files == 1 else {"weight/c"})


def test_what_is_returned_describes_the_file(tmp_path: Path) -> None:
    path = tmp_path / "rank-00003.safetensors"
    (parts,) = bands(STATE, 1)
    found = write_parts(path, parts)
    content = path.read_bytes()
    assert (found.name, found.size) == (path.name, len(content))
    assert found.header % 64 == 0
    assert found.header == 8 + int.from_bytes(content[:8], "little")
    assert found.sha256 == (hashlib.sha256(content).hexdigest(),)
    for part, source in zip(found.parts(), parts, strict=True):
        stored = torch.frombuffer(
            bytearray(content), dtype=torch.float32, count=part.rectangle.size, offset=part.offset
        )
        assert torch.equal(stored.view(part.rectangle.shape), source.values)


@pytest.mark.parametrize("block", [64, 100, 1000])
def test_blocks_may_end_anywhere(block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also inside the header, and inside an element."""
    (parts,) = bands(STATE, 1)
    whole = tmp_path / "whole.safetensors"
    write_parts(whole, parts)
    monkeypatch.setattr(shard_file, "BLOCK", block)
    monkeypatch.setattr(sizes, "BLOCK", block)
    found = write_parts(tmp_path / "cut.safetensors", parts)
    content = (tmp_path / "cut.safetensors").read_bytes()
    assert content == whole.read_bytes()
    assert len(content) > 64
    expected = [hashlib.sha256(content[first : first + block]).hexdigest() for first in range(0, len(content), block)]
    assert list(found.sha256) == expected
    assert type(found).from_json(found.to_json()) == found


def test_a_system_that_writes_a_little_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (parts,) = bands(STATE, 1)
    write_parts(tmp_path / "whole.safetensors", parts)
    right = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, view, place: right(file, view[:7], place))
    write_parts(tmp_path / "bits.safetensors", parts)
    assert (tmp_path / "bits.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


def test_a_file_that_is_there_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_text("mine")
    with pytest.raises(FileExistsError):
        write_parts(tmp_path / "x.safetensors", bands(STATE, 1)[0])
    assert (tmp_path / "x.safetensors").read_text() == "mine"


def test_a_write_that_fails_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space left"):
        write_parts(tmp_path / "x.safetensors", bands(STATE, 1)[0])


def test_nothing_to_write_is_a_header(tmp_path: Path) -> None:
    found = write_shard(tmp_path / "x.safetensors", [], Snapshot([], pinned=False).bytes)
    assert (found.size, found.rectangles) == (found.header, ())
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert list(file.keys()) == []


def test_a_snapshot_is_a_copy_that_later_steps_do_not_change() -> None:
    values = torch.arange(12.0).view(3, 4)
    parts = [Source("weight", "a", (9, 9), Rectangle(0, 3, 1, 3), values[:, 1:3])]
    copy = Snapshot(parts, pinned=False)
    copy.take(parts)
    before = bytes(copy.bytes)
    values.zero_()
    assert bytes(copy.bytes) == before == torch.tensor([1.0, 2, 5, 6, 9, 10]).numpy().tobytes()
    copy.take(parts)
    assert not any(copy.bytes)


def test_headers_are_aligned_whatever_the_names_are() -> None:
    for length in range(70):
        parts = [Source("weight", "n" * length, (1,), Rectangle(0, 1, 0, 1), torch.zeros(1, 1))]
        assert len(header_of(parts)) % 64 == 0


def test_rectangles_are_views_of_the_slots_memory() -> None:
    logical = LogicalTensor((4, 6), dim=1, name="a")
    flat = torch.arange(100.0)
    piece = Piece(logical=logical, local_shape=(4, 3), start=2, offset=10, size=8)
    ctx = context(tp=(1, 2))
    found = placed(Slot("weight", piece, piece.of(flat), False), ctx)
    assert [rectangle for rectangle, _ in found] == [
        Rectangle(0, 1, 5, 6),
        Rectangle(1, 3, 3, 6),
        Rectangle(3, 4, 3, 4),
    ]
    assert [values.flatten().tolist() for _, values in found] == [[10.0], [11.0, 12, 13, 14, 15, 16], [17.0]]
    for _, values in found:
        values.fill_(-1)
    assert flat.nonzero().numel() == 99
    assert (flat == -1).nonzero().flatten().tolist() == list(range(10, 18))


def names(slots: list[Slot], ctx: ParallelContext) -> list[str]:
    return [source.name for source in sources(slots, ctx)]


def test_what_replicas_share_is_written_once_and_by_size() -> None:
    slots = [slot(LogicalTensor((size,), name=str(size)), shared=True) for size in (9, 4, 4, 2)]
    written = [names(slots, context(reduce=(rank, 3))) for rank in range(3)]
    assert written == [["9"], ["4", "2"], ["4"]]


def test_what_zero_has_cut_every_replica_writes() -> None:
    slots = [slot(LogicalTensor((4,), name="cut"))]
    assert [names(slots, context(reduce=(rank, 2))) for rank in range(2)] == [["cut"], ["cut"]]


def test_of_what_all_tensor_parallel_ranks_hold_the_first_writes() -> None:
    slots = [slot(LogicalTensor((4,), name="whole")), slot(LogicalTensor((4, 2), dim=0, name="cut"))]
    assert names(slots, context(tp=(0, 2))) == ["whole", "cut"]
    assert names(slots, context(tp=(1, 2))) == ["cut"]


def test_what_tensor_parallel_ranks_skip_does_not_count_as_a_load() -> None:
    """Every tp rank shares out the tensors that it has to write, and only these."""
    slots = [slot(LogicalTensor((9,), name="whole"), shared=True)]
    slots += [slot(LogicalTensor((4,), dim=0, name=name), shared=True) for name in "ab"]
    assert [names(slots, context(tp=(1, 2), reduce=(rank, 2))) for rank in range(2)] == [["a"], ["b"]]


def test_a_tied_weight_is_its_first_stages() -> None:
    assert names([slot(LogicalTensor((4,), name="embed"), copy=True)], context()) == []
