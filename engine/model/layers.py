"""`LayerDef`: the one description of a model that pipeline, oracle, planner and weight files share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from engine.dist.context import AxisGroup
from engine.model.feed import Feed
from engine.parallel.logical import LogicalTensor, logical_of, name_parameters

InitialWeights = Callable[[LogicalTensor], Tensor]
"""Gives the full fp32 value of a logical tensor."""


@dataclass(frozen=True, slots=True)
class LayerDef:
    """One layer of the list. Nothing is allocated until `factory` is called.

    `run(module, x, feed)` takes the output of the layer before (None for the first) and the micro-batch. Between layers
    goes one tensor, the residual stream (B, L, D), but a layer that is `glued` to the one before it shares its stage
    and may take anything. Layers with the same `tied_key` are one module wherever they meet on a rank, and copies kept
    equal across stages; the first of them in the list names the parameters.
    """

    name: str
    factory: Callable[[], nn.Module]
    run: Callable[[nn.Module, Any, Feed], Any]
    tied_key: str | None = None
    glued: bool = False
    repeats: bool = False
    """A transformer block: full recomputation groups these."""


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


class Stack(nn.Module):
    """Consecutive layers on one rank: the residual stream (None before the first layer) in, the last one's output out.

    Args:
        layers, modules: one module for each layer; a tied module may stand twice, in several stacks too.
        recompute: blocks in one group whose activations are computed again in the backward pass; 0: none.
    """

    def __init__(self, layers: Sequence[LayerDef], modules: Sequence[nn.Module], recompute: int = 0) -> None:
        super().__init__()
        self.layers = tuple(layers)
        self.parts = nn.ModuleList(modules)
        self.groups: list[tuple[int, int, bool]] = []
        index = 0
        while index < len(layers):
            end = index + 1
            while recompute and layers[index].repeats and end < len(layers) and layers[end].repeats:
                if end - index == recompute:
                    break
                end += 1
            self.groups.append((index, end, bool(recompute) and layers[index].repeats))
            index = end

    def forward(self, x: Tensor | None, feed: Feed) -> Any:
        """Tokens come from `feed`; the last layer of the model gives what its loss takes."""
        for start, end, again in self.groups:
            if again and torch.is_grad_enabled():
                # Dropout masks are functions of the feed, so no generator state needs to be kept and put back.
                x = checkpoint(self._span, start, end, x, feed, use_reentrant=False, preserve_rng_state=False)
            else:
                x = self._span(start, end, x, feed)
        return x

    def _span(self, start: int, end: int, x: Any, feed: Feed) -> Any:
        for index in range(start, end):
            x = self.layers[index].run(self.parts[index], x, feed)
        return x


def build_stacks(
    layers: Sequence[LayerDef],
    spans: Sequence[tuple[int, int]],
    initial: InitialWeights,
    *,
    tp: AxisGroup,
    recompute: int = 0,
    convert: Callable[[nn.Module], nn.Module] = lambda module: module,
) -> list[Stack]:
    """One stack for each span of `layers`; a tied module is built once for all of them.

    Args:
        convert: applied to each module as soon as it is built, so that a whole model need not fit.
    """
    built: dict[str, nn.Module] = {}
    stacks = []
    for start, end in spans:
        modules = []
        for layer in layers[start:end]:
            owner = owner_of(layers, layer).name
            if owner not in built:
                built[owner] = convert(materialize(owner, layer, initial, tp=tp))
            modules.append(built[owner])
        stacks.append(Stack(layers[start:end], modules, recompute))
    return stacks
