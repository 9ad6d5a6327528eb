"""A weight that two stages hold: stages as threads, whose copies hand in one gradient."""

from __future__ import annotations

from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from engine.dist.context import SINGLE, AxisGroup
from engine.parallel.embedding import VocabParallelEmbedding
from engine.runtime.tied import TiedCopy
from tests.helpers.threads import on_axis

V, D = 7, 3
TOKENS = [torch.tensor([[0, 3, 3]]), torch.tensor([[6, 1, 3]])]
X = [torch.randn(1, 3, D, generator=torch.Generator().manual_seed(i)) for i in range(2)]


def table(dtype: torch.dtype = torch.float32) -> VocabParallelEmbedding:
    module = VocabParallelEmbedding(V, D, padded=V, tp=SINGLE, init_std=1.0)
    with torch.no_grad():
        module.weight.copy_(torch.randn(V, D, generator=torch.Generator().manual_seed(9)))
    return module.to(dtype)


def use(module: nn.Module, stage: int, step: int, dtype: torch.dtype) -> None:
    """Backward pass of a micro-batch: the first stage looks up, the last projects."""
    out = module(TOKENS[step]) if stage == 0 else module(X[step].to(dtype), project=True)
    out.float().square().sum().backward()


def copies(dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, bool, list[Tensor | None]]]:
    """Two steps of two micro-batches on two stages: summed gradient, mark, and the weight's gradient before it."""

    def stage(pp: AxisGroup) -> tuple[Tensor, bool, list[Tensor | None]]:
        module = table(dtype)
        copy = TiedCopy(module, cast(dist.ProcessGroup, pp.group), names_it=pp.rank == 0)
        copy.stand_in()
        before = []
        for _ in range(2):
            module.weight.grad = None
            for step in range(2):
                use(module, pp.rank, step, dtype)
            before.append(module.weight.grad)
            copy.hand_in(lambda output, gradient: torch.autograd.backward(output, gradient))
        assert module.weight.grad is not None
        return module.weight.grad, module.weight.ds_pipe_replicated, before

    return on_axis(stage, 2)


def test_every_copy_gets_the_sum_of_all_uses_once_a_step() -> None:
    whole = table()
    for step in range(2):
        for stage in range(2):
            use(whole, stage, step, torch.float32)
    (first, first_mark, before), (second, second_mark, _) = copies()
    assert before == [None, None], "nothing else than the sum reaches the weight"
    assert torch.equal(first, second)
    torch.testing.assert_close(first, whole.weight.grad, rtol=1e-5, atol=1e-5)
    assert (first_mark, second_mark) == (False, True), "norms count the copy that names the parameter"


def test_gradients_of_bf16_copies_add_up_in_fp32() -> None:
    parts = []
    for stage in range(2):
        for step in range(2):
            module = table(torch.bfloat16)
            use(module, stage, step, torch.bfloat16)
            assert module.weight.grad is not None
            parts.append(module.weight.grad.float())
    (first, _, _), (second, _, _) = copies(torch.bfloat16)
    assert first.dtype is torch.bfloat16
    assert torch.equal(first, (parts[0] + parts[1] + (parts[2] + parts[3])).bfloat16())
    assert torch.equal(first, second)


def test_the_stand_in_sees_what_the_optimizer_writes() -> None:
    def stage(pp: AxisGroup) -> None:
        module = table()
        TiedCopy(module, cast(dist.ProcessGroup, pp.group), names_it=True).stand_in()
        with torch.no_grad():
            module.weight.fill_(2.0)
        assert set(module(TOKENS[0]).flatten().tolist()) == {2.0}

    on_axis(stage, 2)
