"""`LayerDef`: the one description of a model that pipeline, oracle, planner and weight files share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from engine.dist.context import AxisGroup
from engine.model.feed import Feed
from engine.model.host_checkpoints import HostCheckpoints
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
    lends: bool = False
    """Its parameters are handed on to the loss, which uses them in its place."""


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


@dataclass(frozen=True, slots=True)
class RandomWeights:
    """Initial weights of a run from scratch: a function of `seed` and each tensor's name."""

    seed: int

    def __call__(self, logical: LogicalTensor) -> Tensor:
        return logical.draw(self.seed)


def random_weights(seed: int) -> InitialWeights:
    """The initial weights of a run from scratch."""
    return RandomWeights(seed)


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
        nested: a group is computed again as a whole for its blocks' inputs, and then each block for its activations.
        host: where the inputs of groups are kept; None: where they are.

    `before`, if set, is called with the number of a layer before it runs.
    """

    def __init__(
        self,
        layers: Sequence[LayerDef],
        modules: Sequence[nn.Module],
        recompute: int = 0,
        *,
        nested: bool = False,
        host: HostCheckpoints | None = None,
    ) -> None:
        super().__init__()
        self.layers = tuple(layers)
        self._nested, self._host = nested, host
        self.parts = nn.ModuleList(modules)
        self.before: Callable[[int], None] | None = None
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
        kept = nullcontext if self._host is None else self._host.forward_pass()
        for start, end, again in self.groups:
            if again and torch.is_grad_enabled():
                with kept():
                    x = _again(self._span, start, end, self._nested and end - start > 1, x, feed)
            else:
                x = self._span(start, end, False, x, feed)
        return x

    def _span(self, start: int, end: int, nested: bool, x: Any, feed: Feed) -> Any:
        for index in range(start, end):
            if nested:
                x = _again(self._span, index, index + 1, False, x, feed)
            else:
                if self.before is not None:
                    self.before(index)
                x = self.layers[index].run(self.parts[index], x, feed)
        return x


def _again(run: Callable[..., Any], *arguments: Any) -> Any:
    """`run(*arguments)`, of which only the arguments are kept for the backward pass."""
    # Dropout masks are functions of the feed, so no generator state needs to be kept and put back.
    return checkpoint(run, *arguments, use_reentrant=False, preserve_rng_state=False)


def _as_it_is(module: nn.Module) -> nn.Module:
    return module


def build_stacks(
    layers: Sequence[LayerDef],
    spans: Sequence[tuple[int, int]],
    initial: InitialWeights,
    *,
    tp: AxisGroup,
    recompute: int = 0,
    nested: bool = False,
    host: HostCheckpoints | None = None,
    convert: Callable[[nn.Module], nn.Module] = _as_it_is,
) -> list[Stack]:
    """One stack for each span of `layers`; a tied module is built once for all of them.

    Args:
        recompute, nested, host: see `Stack`.
        convert: applied to each module as soon as it is built, so that a whole model need not fit.
    """
    owners = {layer.name: owner_of(layers, layer).name for start, end in spans for layer in layers[start:end]}
    first = {owner: next(layer for layer in layers if owners.get(layer.name) == owner) for owner in owners.values()}
    built = {owner: convert(materialize(owner, layer, initial, tp=tp)) for owner, layer in first.items()}
    return [
        Stack(
            layers[start:end],
            [built[owners[layer.name]] for layer in layers[start:end]],
            recompute,
            nested=nested,
            host=host,
        )
        for start, end in spans
    ]
