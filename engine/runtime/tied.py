"""Weights that several pipeline stages hold: one gradient for all copies."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence

import torch.distributed as dist
from torch import Tensor, nn

from engine.dist.context import ParallelContext
from engine.model.layers import LayerDef, Stack
from engine.topology.program import Program


class TiedCopy:
    """This stage's copy of a tied weight.

    In the passes a stand-in that shares its memory takes its place, so that DeepSpeed sees no gradient that is not yet
    summed over the stages: ZeRO-2 would reduce and cut it after each micro-batch, with other cuts on other stages. The
    gradient adds up in fp32 beside it, and is handed in once, at the end of the step.
    """

    def __init__(self, module: nn.Module, group: dist.ProcessGroup, *, names_it: bool) -> None:
        self._module, self._group = module, group
        self._weight: nn.Parameter = module.weight  # type: ignore[assignment]
        # DeepSpeed's norms pass over what is marked.
        self._weight.ds_pipe_replicated = not names_it  # type: ignore[attr-defined]
        self._total: Tensor | None = None

    def stand_in(self) -> None:
        """Take the weight's place in the passes. Called when the weight has its final memory."""
        stand_in = self._weight.detach().requires_grad_()
        stand_in.register_post_accumulate_grad_hook(self._add)
        self._module.stand_in = stand_in

    def _add(self, stand_in: Tensor) -> None:
        assert stand_in.grad is not None
        if self._total is None:
            self._total = stand_in.grad.float()
        else:
            self._total += stand_in.grad
        stand_in.grad = None

    def hand_in(self, backward: Callable[[Tensor, Tensor], None]) -> None:
        """Sum the gradients of all copies and hand this one the sum through `backward`. Collective over the stages."""
        assert self._total is not None
        dist.all_reduce(self._total, group=self._group)
        backward(self._weight.view_as(self._weight), self._total.to(self._weight.dtype))
        self._total = None


def tied_copies(
    layers: Sequence[LayerDef],
    bounds: Sequence[int],
    program: Program,
    stacks: Mapping[int, Stack],
    ctx: ParallelContext,
) -> list[TiedCopy]:
    """The tied weights of this stage that other stages hold too. Collective.

    The first stage with a copy names the parameter: there it counts in norms and is saved.
    """
    chunk_of = [bisect_right(bounds, index) - 1 for index in range(len(layers))]
    found = []
    for key in sorted({layer.tied_key for layer in layers if layer.tied_key is not None}):
        places = [index for index, layer in enumerate(layers) if layer.tied_key == key]
        stages = sorted({program.owner[chunk_of[index]] for index in places})
        if len(stages) == 1:
            continue
        for ranks in ctx.grid.groups("pp"):
            group = dist.new_group([ranks[stage] for stage in stages])
            if ctx.pp.rank in stages and ctx.rank in ranks:
                mine = next(index for index in places if program.owner[chunk_of[index]] == ctx.pp.rank)
                module = stacks[chunk_of[mine]].parts[mine - bounds[chunk_of[mine]]]
                found.append(TiedCopy(module, group, names_it=program.owner[chunk_of[places[0]]] == ctx.pp.rank))
    return found
