"""What an optimizer remembers, as pieces of logical tensors: another instance goes on from it to the last bit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from engine.checkpoint.reader import Reader
from engine.checkpoint.shard_file import placed
from engine.config import OptimConfig, OptimizerName
from engine.dist.context import SINGLE, ParallelContext
from engine.optim.groups import build_optimizer
from engine.optim.pieces import LogicalOptimizer, Piece
from engine.optim.state import WEIGHT, Held, Slot, kinds_of
from engine.parallel.logical import logical_of
from engine.parallel.rectangles import matrix_shape
from engine_kernels.reference.adamw import adamw_step
from tests.helpers.checkpoints import fill, write_checkpoint
from tests.helpers.tensors import TENSORS, Bowls, values

CTX = ParallelContext.single()
STEPS = 3
MATRICES = {name for name, logical in TENSORS.items() if len(logical.shape) == 2}
HIDDEN = {name for name, logical in TENSORS.items() if logical.role == "matrix"}
ALL = set(TENSORS)
KINDS: dict[str, dict[str, set[str]]] = {
    "adamw": {"exp_avg": ALL, "exp_avg_sq": ALL},
    "adamw by a kernel": {"exp_avg": ALL, "exp_avg_sq": ALL},
    "lamb": {"exp_avg": ALL, "exp_avg_sq": ALL},
    "lion": {"exp_avg": ALL},
    "sgd": {},
    "sgd with momentum": {"momentum_buffer": ALL},
    "muon": {"momentum_buffer": HIDDEN, "exp_avg": ALL - HIDDEN, "exp_avg_sq": ALL - HIDDEN},
    "adafactor": {"row_mean": MATRICES, "column_mean": MATRICES, "square": ALL - MATRICES},
}
"""Which tensors have which kinds of state, beside their weights."""
COUNTED = {"adamw", "adamw by a kernel", "lamb", "muon", "adafactor"}
by_name = pytest.mark.parametrize("name", KINDS)


def options(name: str) -> OptimConfig:
    momentum = 0.9 if "momentum" in name else 0.0
    return OptimConfig(name=OptimizerName[name.split()[0]], lr=0.05, weight_decay=0.3, momentum=momentum)


class Whole:
    """An optimizer over parameters, as one process has it."""

    def __init__(self, name: str, scale: float = 1.0) -> None:
        self.cfg, self.model = options(name), Bowls(SINGLE)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.mul_(scale)
        kernel = adamw_step if "kernel" in name else None
        self.optimizer = build_optimizer(self.model.parameters(), self.cfg, CTX, adamw_step=kernel)

    def held(self) -> list[Held]:
        found = []
        for group in self.optimizer.param_groups:
            for tensor in group["params"]:
                shape = tuple(tensor.shape)
                piece = Piece(logical=logical_of(tensor), local_shape=shape, start=0, offset=0, size=tensor.numel())
                found.append(Held(self.optimizer, self.cfg.name, group, tensor, [piece], False))
        return found

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.model(torch.tensor(1.0)).backward()
        self.optimizer.step()


class Flat(Whole):
    """The same over flat tensors with gaps, one per group, as ZeRO has it on one rank."""

    def __init__(self, name: str, scale: float = 1.0) -> None:
        super().__init__(name, scale)
        self.pieces: dict[Tensor, list[Piece]] = {}
        for group in self.optimizer.param_groups:
            flat = torch.zeros(sum(p.numel() + 3 for p in group["params"]) + 2)
            self.pieces[flat] = list(self._move(group["params"], flat))
            group["params"] = [flat]
        if isinstance(self.optimizer, LogicalOptimizer):
            self.optimizer.attach(self.pieces, sharded=True)

    @staticmethod
    def _move(parameters: Sequence[nn.Parameter], flat: Tensor) -> Sequence[Piece]:
        found, offset = [], 2
        for p in parameters:
            piece = Piece(logical=logical_of(p), local_shape=tuple(p.shape), start=0, offset=offset, size=p.numel())
            piece.of(flat).copy_(p.detach().view(-1))
            p.data = piece.of(flat).view(p.shape)
            found.append(piece)
            offset += p.numel() + 3
        return found

    def held(self) -> list[Held]:
        pairs = zip(self.optimizer.param_groups, self.pieces.items(), strict=True)
        return [Held(self.optimizer, self.cfg.name, group, flat, parts, True) for group, (flat, parts) in pairs]

    def step(self) -> None:
        self.model.zero_grad()
        self.model(torch.tensor(1.0)).backward()
        gradients = {logical_of(p).name: p.grad for p in self.model.parameters() if p.grad is not None}
        for flat, parts in self.pieces.items():
            flat.grad = torch.zeros_like(flat)
            for part in parts:
                part.of(flat.grad).copy_(gradients[part.logical.name].view(-1))
        self.optimizer.step()


def slots_of(run: Whole) -> list[Slot]:
    return [slot for held in run.held() for slot in held.slots()]


def logical_state(slots: Sequence[Slot]) -> dict[str, dict[str, Tensor]]:
    """Whole logical tensors by kind and name, from one rank's slots."""
    found: dict[str, dict[str, Tensor]] = {}
    for slot in slots:
        logical = slot.piece.logical
        matrix = torch.full(matrix_shape(logical.shape), torch.nan)
        for (top, bottom, left, right), part in placed(slot, CTX):
            matrix[top:bottom, left:right] = part
        found.setdefault(slot.kind, {})[logical.name] = matrix.view(logical.shape)
    return found


def adopt(run: Whole, reader: Reader, steps: int) -> None:
    fill(slots_of(run), reader, CTX)
    for held in run.held():
        held.count(steps)


@by_name
@pytest.mark.parametrize(("first", "second"), [(Whole, Whole), (Flat, Flat), (Whole, Flat), (Flat, Whole)])
def test_another_instance_goes_on_to_the_last_bit(
    name: str, first: type[Whole], second: type[Whole], tmp_path: Path
) -> None:
    run = first(name)
    for _ in range(STEPS):
        run.step()
    steps = max(held.steps for held in run.held())
    assert steps == (STEPS if name in COUNTED else 0)
    reader = Reader(write_checkpoint(tmp_path / "x", logical_state(slots_of(run))))
    other = second(name, scale=3.0)
    adopt(other, reader, steps)
    for _ in range(2):
        run.step()
        other.step()
    same(logical_state(slots_of(other)), logical_state(slots_of(run)))
    assert max(held.steps for held in other.held()) == (STEPS + 2 if name in COUNTED else 0)


def same(found: Mapping[str, Mapping[str, Tensor]], wanted: Mapping[str, Mapping[str, Tensor]]) -> None:
    assert {kind: set(named) for kind, named in found.items()} == {kind: set(named) for kind, named in wanted.items()}
    unequal = [
        f"{kind} {name}"
        for kind, named in wanted.items()
        for name, value in named.items()
        if not torch.equal(found[kind][name], value)
    ]
    assert unequal == []


@by_name
def test_each_kind_of_state_is_there_for_its_tensors(name: str) -> None:
    run = Whole(name)
    run.step()
    found = logical_state(slots_of(run))
    assert {kind: set(named) for kind, named in found.items()} == {WEIGHT: ALL, **KINDS[name]}
    for kind, named in found.items():
        for tensor, value in named.items():
            rows, columns = (*TENSORS[tensor].shape, 1)[:2]
            expected = {"row_mean": (rows,), "column_mean": (columns,)}.get(kind, TENSORS[tensor].shape)
            assert value.shape == expected
            assert value.isfinite().all()
            assert value.any()


@by_name
def test_state_that_no_step_has_made_yet_is_zero_and_the_first_step_as_ever(name: str) -> None:
    run, plain = Whole(name), Whole(name)
    found = logical_state(slots_of(run))
    for tensor, value in found.pop(WEIGHT).items():
        assert torch.equal(value, values(1)[tensor])
    assert set(found) == set(KINDS[name])
    assert not any(value.any() for named in found.values() for value in named.values())
    assert max(held.steps for held in run.held()) == 0
    for _ in range(2):
        run.step()
        plain.step()
    same(logical_state(slots_of(run)), logical_state(slots_of(plain)))


@by_name
@pytest.mark.parametrize("kind", [Whole, Flat])
def test_slots_are_live_memory(name: str, kind: type[Whole]) -> None:
    run = kind(name)
    run.step()
    for slot in slots_of(run):
        assert slot.values.dtype is torch.float32
        assert slot.values.is_contiguous()
        slot.values.fill_(5.0)
    assert all((slot.values == 5.0).all() for slot in slots_of(run))
    assert all((p == 5.0).all() for p in run.model.parameters())


def test_what_all_replicas_hold_is_told_from_what_zero_has_cut() -> None:
    assert all(slot.shared for slot in slots_of(Whole("adafactor")))
    cut = {slot.kind: slot.shared for slot in slots_of(Flat("adafactor"))}
    assert cut == {WEIGHT: False, "square": False, "row_mean": True, "column_mean": True}


def test_a_piece_that_other_ranks_hold_has_no_slot() -> None:
    (weight, *_) = Whole("adamw").held()
    empty = Piece(logical=weight.pieces[0].logical, local_shape=(13, 6), start=0, offset=0, size=0)
    held = Held(weight.optimizer, weight.name, weight.group, weight.tensor, [empty], True)
    assert list(held.slots()) == []


@pytest.mark.parametrize("name", sorted(COUNTED))
def test_steps_matter(name: str, tmp_path: Path) -> None:
    """The same state with another count gives another update: the count is not for show."""
    run = Whole(name)
    for _ in range(STEPS):
        run.step()
    reader = Reader(write_checkpoint(tmp_path / "x", logical_state(slots_of(run))))
    one, other = Whole(name), Whole(name)
    adopt(one, reader, STEPS)
    adopt(other, reader, STEPS + 7)
    one.step()
    other.step()
    moved = {n: p.detach() for n, p in one.model.named_parameters()}
    assert any(not torch.equal(p, moved[n]) for n, p in other.model.named_parameters())


@by_name
def test_kinds_are_known_before_there_is_an_optimizer(name: str) -> None:
    found = {slot.kind for held in Whole(name).held() for slot in held.slots()}
    assert kinds_of(options(name)) == found == {WEIGHT, *KINDS[name]}
