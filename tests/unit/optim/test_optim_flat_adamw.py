"""AdamW by a kernel of ours against torch's, and each with the other's state."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine.config import OptimizerName
from engine.dist.context import SINGLE
from engine.optim.flat_adamw import FlatAdamW
from engine.optim.pieces import Piece
from engine.optim.schedule import set_learning_rate
from engine.optim.state import WEIGHT, Held
from engine.parallel.logical import logical_of
from engine_kernels.reference.adamw import adamw_step
from tests.helpers.tensors import Bowls

OPTIONS: dict[str, Any] = {"lr": 0.05, "betas": (0.9, 0.95), "eps": 1e-8}
GROUPS = [{"weight_decay": 0.3, "lr_scale": 1.0}, {"lr_scale": 0.5}]
SHAPES = [(41,), (7, 6), (1,), (0,), ()]


def parameters(seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def groups(found: list[nn.Parameter]) -> list[dict[str, Any]]:
    return [{**group, "params": found[i::2]} for i, group in enumerate(GROUPS)]


def ours(found: list[nn.Parameter]) -> torch.optim.Optimizer:
    return FlatAdamW(groups(found), **OPTIONS, update=adamw_step)


def torchs(found: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups(found), **OPTIONS | {"weight_decay": 0.0})


def train(found: list[nn.Parameter], optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for number in range(first, last):
        generator = torch.Generator().manual_seed(100 + number)
        set_learning_rate(optimizer, 0.05 / number)
        for parameter in found:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


def same(found: list[nn.Parameter], wanted: list[nn.Parameter]) -> None:
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def test_steps_are_those_of_torch() -> None:
    found, wanted = parameters(), parameters()
    train(found, ours(found), 1, 6)
    train(wanted, torchs(wanted), 1, 6)
    same(found, wanted)
    assert not torch.equal(found[0], parameters()[0])


@pytest.mark.parametrize(("before", "after"), [(ours, torchs), (torchs, ours), (ours, ours)])
def test_each_goes_on_from_the_state_of_the_other(before: Any, after: Any) -> None:
    found, wanted = parameters(), parameters()
    old, straight = before(found), torchs(wanted)
    train(found, old, 1, 4)
    new = after(found)
    loaded = deepcopy(old.state_dict())
    # Options of the other's groups that this one has not are no state.
    loaded["param_groups"] = new.state_dict()["param_groups"]
    new.load_state_dict(loaded)
    train(found, new, 4, 7)
    train(wanted, straight, 1, 7)
    same(found, wanted)


def test_the_state_has_the_names_of_torch() -> None:
    found, wanted = parameters(), parameters()
    one, other = ours(found), torchs(wanted)
    train(found, one, 1, 3)
    train(wanted, other, 1, 3)
    for mine, theirs in zip(found, wanted, strict=True):
        assert one.state[mine].keys() == other.state[theirs].keys()
        assert int(one.state[mine]["step"]) == int(other.state[theirs]["step"]) == 2
        for kind in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(one.state[mine][kind], other.state[theirs][kind])


def test_checkpoints_hold_it_as_they_hold_that_of_torch() -> None:
    model = Bowls(SINGLE)
    parameter = next(model.parameters())
    optimizer = FlatAdamW([{"params": [parameter]}], **OPTIONS, update=adamw_step)
    logical, shape = logical_of(parameter), tuple(parameter.shape)
    piece = Piece(logical=logical, local_shape=shape, start=0, offset=0, size=parameter.numel())
    held = Held(optimizer, OptimizerName.adamw, optimizer.param_groups[0], parameter, [piece], False)
    slots = {slot.kind: slot for slot in held.slots()}
    assert slots.keys() == {WEIGHT, "exp_avg", "exp_avg_sq"}
    assert held.steps == 0
    slots["exp_avg"].values.fill_(2.0)
    held.count(5)
    parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert held.steps == 6
    torch.testing.assert_close(slots["exp_avg"].values, torch.full_like(slots["exp_avg"].values, 1.8))


def test_a_step_reads_nothing_from_the_device() -> None:
    """Tensors on meta have no values that could be read."""
    found = [nn.Parameter(parameter.to("meta")) for parameter in parameters()]
    optimizer = ours(found)
    for _ in range(2):
        for parameter in found:
            parameter.grad = torch.empty_like(parameter)
        optimizer.step()
    assert [optimizer.state[parameter]["step"] for parameter in found] == [2] * len(found)


def test_a_tensor_without_gradient_stays() -> None:
    found = parameters()
    optimizer = ours(found)
    found[0].grad = torch.ones_like(found[0])
    optimizer.step()
    same(found[1:], parameters()[1:])
    assert list(optimizer.state) == [found[0]]


NONE = {"grad_scale": None, "copy_out": None}


def test_the_kernel_sees_flat_tensors_and_the_options_of_the_group() -> None:
    seen: list[dict[str, Any]] = []

    def update(*tensors: Tensor, **options: Any) -> None:
        seen.append({"shapes": [tuple(tensor.shape) for tensor in tensors], **options})

    parameter = nn.Parameter(torch.ones(7, 6))
    parameter.grad = torch.ones(6, 7).t()
    optimizer = FlatAdamW([{"params": [parameter], "weight_decay": 0.1}], **OPTIONS, update=update)
    optimizer.step()
    assert seen == [{"shapes": [(42,)] * 4, **OPTIONS, "weight_decay": 0.1, "step": 1, **NONE}]


def test_a_mistake_is_refused_by_the_kernel() -> None:
    parameter = nn.Parameter(torch.ones(3))
    parameter.grad = torch.ones(3)
    optimizer = FlatAdamW([{"params": [parameter]}], **OPTIONS | {"lr": -1.0}, update=adamw_step)
    with pytest.raises(ValueError, match=r"lr=-1.0 must not be negative"):
        optimizer.step()
