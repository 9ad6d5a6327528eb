"""`LayerDef`: the one description of a model that pipeline, oracle, planner and weight files share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engine.dist.context import AxisGroup
from engine.parallel.logical import LogicalTensor, logical_of, name_parameters

InitialWeights = Callable[[LogicalTensor], Tensor]
"""Gives the full fp32 value of a logical tensor."""


@dataclass(frozen=True, slots=True)
class LayerDef:
    """One layer of the list: takes one tensor, gives one tensor. Nothing is allocated until `factory` is called.

    Layers with the same `tied_key` are one module wherever they meet on a rank, and copies kept equal across stages;
    the first of them in the list names the parameters. `run(module, x)` replaces `module(x)` where a tied module plays
    a second part.
    """

    name: str
    factory: Callable[[], nn.Module]
    tied_key: str | None = None
    run: Callable[[nn.Module, Tensor], Tensor] | None = None


def owner_of(layers: Sequence[LayerDef], layer: LayerDef) -> LayerDef:
    """The layer that names the parameters of `layer`: the first with its tied key, or itself."""
    if layer.tied_key is None:
        return layer
    return next(other for other in layers if other.tied_key == layer.tied_key)


def materialize(owner_name: str, layer: LayerDef, initial: InitialWeights, *, tp: AxisGroup) -> nn.Module:
    """Build a layer on the CPU in fp32, with this rank's slices of the logical tensors that `initial` gives.

    Every layout asks for the same logical tensors, so a run starts from equal weights in all of them.
    """
    module = layer.factory()
    with torch.no_grad():
        for parameter in name_parameters(owner_name, module):
            logical = logical_of(parameter)
            parameter.copy_(logical.local_slice(initial(logical), tp.rank, tp.size))
    return module


def random_weights(seed: int) -> InitialWeights:
    """The initial weights of a run from scratch: a function of `seed` and each tensor's name."""
    return lambda logical: logical.draw(seed)


def logical_tensors(layers: Sequence[LayerDef]) -> dict[str, LogicalTensor]:
    """Every logical tensor of the model by name, tied ones once; nothing is allocated."""
    found: dict[str, LogicalTensor] = {}
    with torch.device("meta"):
        for layer in layers:
            if owner_of(layers, layer) is layer:
                for parameter in name_parameters(layer.name, layer.factory()):
                    found[logical_of(parameter).name] = logical_of(parameter)
    return found


class WholeModel(nn.Module):
    """The whole list on one rank (of each tensor-parallel slice): tokens in, output of the last layer out."""

    def __init__(self, layers: Sequence[LayerDef], initial: InitialWeights, *, tp: AxisGroup) -> None:
        super().__init__()
        built: dict[str, nn.Module] = {}
        self.modules_ = nn.ModuleList()
        self.steps: list[tuple[int, Callable[[nn.Module, Tensor], Tensor] | None]] = []
        for layer in layers:
            owner = owner_of(layers, layer).name
            if owner not in built:
                built[owner] = materialize(owner, layer, initial, tp=tp)
                self.modules_.append(built[owner])
            self.steps.append((list(built).index(owner), layer.run))

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, S) int64 -> logits (B, S, this rank's columns)."""
        for index, run in self.steps:
            module = self.modules_[index]
            x = module(x) if run is None else run(module, x)
        return x
