"""The fused loss over a vocabulary cut in two: losses and gradients of one rank that holds all of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from engine.dist.context import AxisGroup
from engine.parallel.cross_entropy import vocab_parallel_cross_entropy
from tests.helpers.ranks import backend_of, run_ranks

pytestmark = pytest.mark.ranks

TOKENS, WIDTH, ROWS = 7, 41, 128
CASES: dict[str, dict[str, Any]] = {
    "plain": {"vocab_size": 128},
    "padded": {"vocab_size": 113, "bias": True, "smoothing": 0.1, "z_loss": 0.01, "logit_scale": 0.5},
    "one rank holds padding alone": {"vocab_size": 41, "smoothing": 0.2, "z_loss": 0.1},
    "one entry": {"vocab_size": 1, "bias": True},
}


def tensors(vocab_size: int, bias: bool, device: torch.device) -> tuple[list[Tensor], Tensor]:
    """x, weight and, if asked for, bias; labels, a third of them ignored."""
    draw = torch.Generator().manual_seed(vocab_size)
    values = [torch.randn(TOKENS, WIDTH, generator=draw), torch.randn(ROWS, WIDTH, generator=draw)]
    values += [torch.randn(ROWS, generator=draw)] if bias else []
    labels = torch.randint(0, vocab_size, (TOKENS,), generator=draw)
    labels[torch.rand(TOKENS, generator=draw) < 0.3] = -100
    return [v.to(device) for v in values], labels.to(device)


def own_part(values: list[Tensor]) -> list[Tensor]:
    """x, and this rank's rows of the others."""
    return [values[0], *(v.chunk(dist.get_world_size())[dist.get_rank()] for v in values[1:])]


def measure(function: Callable[..., Tensor], values: list[Tensor], labels: Tensor, **options: Any) -> list[Tensor]:
    """Loss, and gradients of three times the loss."""
    leaves = [v.clone().requires_grad_() for v in values]
    bias = leaves[2] if len(leaves) > 2 else None
    loss = function(*leaves[:2], labels, bias_V=bias, divisor=torch.tensor(17.0, device=labels.device), **options)
    return [loss.detach(), *torch.autograd.grad(3 * loss, leaves)]


def compare(name: str, found: list[Tensor], whole: list[Tensor]) -> None:
    """What a rank of two found, its share of the gradient of x not yet added up, with what one rank finds."""
    dist.all_reduce(found[1])
    for what, got, want in zip(("loss", "x", "weight", "bias"), found, [whole[0], *own_part(whole[1:])], strict=False):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5, msg=lambda m, w=what: f"{name}, {w}: {m}")


def engine_loss(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias_V: Tensor | None,
    divisor: Tensor,
    group: dist.ProcessGroup,
    logit_scale: float = 1.0,
    **options: Any,
) -> Tensor:
    """The loss of models that do not fuse it."""
    axis = AxisGroup(rank=dist.get_rank(), size=2, ranks=(0, 1), group=group)
    logits = x @ weight.t() * logit_scale
    logits = logits if bias_V is None else logits + bias_V
    return vocab_parallel_cross_entropy(logits[None], labels[None], tp=axis, **options).sum() / divisor


def two_ranks() -> None:
    from engine_kernels.reference.linear_cross_entropy import linear_cross_entropy as reference
    from engine_kernels.triton import linear_cross_entropy as module

    fused, group = module.linear_cross_entropy, dist.group.WORLD
    on_gpu = torch.cuda.is_initialized()
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    for name, case in CASES.items():
        options = {k: v for k, v in case.items() if k != "bias"}
        values, labels = tensors(case["vocab_size"], "bias" in case, device)
        whole, parts = measure(fused, values, labels, **options), own_part(values)
        for kind, function in (("fused", fused), ("reference", reference), ("engine", engine_loss)):
            found = measure(function, parts, labels, group=group, **options)
            compare(f"{kind}, {name}", found, whole)
            assert_equal_on_ranks(found[0])
        with mock.patch.object(module, "LOGITS_BYTES", 3 * parts[1].shape[0] * 4):
            compare(f"chunks, {name}", measure(fused, parts, labels, group=group, **options), whole)
        with torch.no_grad():
            constants = {"bias_V": (*parts, None)[2], "divisor": torch.tensor(17.0, device=device), "group": group}
            torch.testing.assert_close(fused(*parts[:2], labels, **constants, **options), whole[0], rtol=1e-5, atol=0)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    compare("compiled", measure(compiled, parts, labels, group=group, **options), whole)
    others(fused, device)


def others(fused: Callable[..., Tensor], device: torch.device) -> None:
    """All labels ignored, no tokens, a label that nobody has, and a table too small."""
    group = dist.group.WORLD
    values, labels = tensors(100, False, device)
    loss, *grads = measure(fused, own_part(values), torch.full_like(labels, -100), group=group, vocab_size=100)
    assert not loss.any()
    assert not any(g.any() for g in grads)
    none = [values[0][:0], own_part(values)[1]]
    loss, *grads = measure(fused, none, labels[:0], group=group, vocab_size=100)
    assert not loss.any()
    assert not grads[1].any()
    loss, *_ = measure(fused, own_part(values), labels.clamp(min=0) + 100, group=group, vocab_size=100)
    assert bool(loss.isnan())
    with pytest.raises(ValueError, match=r"vocab_size 129 is not in 1\.\.128, the rows of weight_VD on all ranks"):
        measure(fused, own_part(values), labels, group=group, vocab_size=129)


def assert_equal_on_ranks(loss: Tensor) -> None:
    both = [torch.empty_like(loss) for _ in range(dist.get_world_size())]
    dist.all_gather(both, loss)
    assert torch.equal(*both)


def test_two_ranks_find_what_one_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    # Named so, gloo's ranks are new processes: Triton reads the variable when it is imported.
    run_ranks(two_ranks, 2, backend="cpu:gloo")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_two_gpus_find_what_one_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    run_ranks(two_ranks, 2, backend=backend_of("cuda", 2))
