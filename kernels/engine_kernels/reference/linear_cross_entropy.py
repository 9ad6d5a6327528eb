"""Projection to the vocabulary and its cross-entropy, written out. Shapes: T tokens, D hidden, V this rank's rows."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["check_linear_cross_entropy", "linear_cross_entropy"]


def _check_shapes(x_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, divisor: Tensor, bias_V: Tensor | None) -> None:
    if x_TD.dim() != 2:
        raise ValueError(f"x_TD of shape {tuple(x_TD.shape)} does not have the two dims (tokens, hidden)")
    if weight_VD.dim() != 2 or weight_VD.shape[1] != x_TD.shape[1]:
        raise ValueError(f"weight_VD of shape {tuple(weight_VD.shape)} is not (vocabulary, {x_TD.shape[1]}) as x_TD")
    if labels_T.shape != x_TD.shape[:1]:
        raise ValueError(f"labels_T of shape {tuple(labels_T.shape)} is not ({x_TD.shape[0]},), one for each of x_TD")
    if divisor.numel() != 1:
        raise ValueError(f"divisor of shape {tuple(divisor.shape)} is not one number")
    if bias_V is not None and bias_V.shape != weight_VD.shape[:1]:
        raise ValueError(f"bias_V of shape {tuple(bias_V.shape)} is not ({weight_VD.shape[0]},) as weight_VD")


def _check_kinds(x_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, divisor: Tensor, bias_V: Tensor | None) -> None:
    if not x_TD.dtype.is_floating_point:
        raise ValueError(f"x_TD of {x_TD.dtype} is not of a floating dtype")
    if weight_VD.dtype is not x_TD.dtype:
        raise ValueError(f"weight_VD of {weight_VD.dtype} is not of the dtype of x_TD, {x_TD.dtype}")
    if labels_T.dtype is not torch.int64:
        raise ValueError(f"labels_T of {labels_T.dtype} is not of torch.int64")
    if bias_V is not None and not bias_V.dtype.is_floating_point:
        raise ValueError(f"bias_V of {bias_V.dtype} is not of a floating dtype")
    if divisor.requires_grad:
        raise ValueError("divisor with requires_grad=True: it is a constant, and gets no gradient")
    others = {"weight_VD": weight_VD, "labels_T": labels_T, "divisor": divisor, "bias_V": bias_V}
    for name, tensor in others.items():
        if tensor is not None and tensor.device != x_TD.device:
            raise ValueError(f"{name} on {tensor.device} is not on the device of x_TD, {x_TD.device}")


def check_linear_cross_entropy(
    x_TD: Tensor,
    weight_VD: Tensor,
    labels_T: Tensor,
    divisor: Tensor,
    bias_V: Tensor | None,
    vocab_size: int,
    smoothing: float,
    group: dist.ProcessGroup | None,
) -> None:
    """Refuse what `linear_cross_entropy` cannot compute.

    Raises:
        ValueError: names the argument, its value and the rule.
    """
    _check_shapes(x_TD, weight_VD, labels_T, divisor, bias_V)
    _check_kinds(x_TD, weight_VD, labels_T, divisor, bias_V)
    rows = weight_VD.shape[0] * (1 if group is None else group.size())
    if not 0 < vocab_size <= rows:
        raise ValueError(f"vocab_size {vocab_size} is not in 1..{rows}, the rows of weight_VD on all ranks")
    if not 0.0 <= smoothing < 1.0:
        raise ValueError(f"smoothing {smoothing} is not in [0, 1)")


class _Sum(torch.autograd.Function):
    """Sum over the ranks of terms that each rank differentiates alone: every rank holds the same loss."""

    @staticmethod
    def forward(ctx: Any, terms: Tensor, group: dist.ProcessGroup) -> Tensor:
        total = terms.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def _statistics(
    z_TV: Tensor, local_T: Tensor, real: int, vocab_size: int, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Over all ranks: sum of exp(z - largest), target - largest, mean of z - largest, and the largest logit."""
    columns = z_TV.shape[-1]
    padding_V = torch.arange(columns, device=z_TV.device) >= real
    z_TV = z_TV.masked_fill(padding_V, float("-inf"))
    largest_T = z_TV.detach().amax(dim=-1)
    if group is not None:
        dist.all_reduce(largest_T, op=dist.ReduceOp.MAX, group=group)
    shifted_TV = z_TV - largest_T[:, None]
    elsewhere_T = (local_T < 0) | (local_T >= min(real, columns))
    target_T = shifted_TV.gather(-1, local_T.masked_fill(elsewhere_T, 0)[:, None])[:, 0].masked_fill(elsewhere_T, 0.0)
    mean_T = shifted_TV.masked_fill(padding_V, 0.0).sum(dim=-1) / vocab_size
    sums = torch.stack([shifted_TV.exp().sum(dim=-1), target_T, mean_T])
    if group is not None:
        sums = cast(Tensor, _Sum.apply(sums, group))
    total_T, target_T, mean_T = sums.unbind(0)
    return total_T, target_T, mean_T, largest_T


def linear_cross_entropy(
    x_TD: Tensor,
    weight_VD: Tensor,
    labels_T: Tensor,
    *,
    divisor: Tensor,
    vocab_size: int,
    bias_V: Tensor | None = None,
    logit_scale: float = 1.0,
    smoothing: float = 0.0,
    z_loss: float = 0.0,
    ignore_index: int = -100,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Sum over the tokens of Z - (1 - e) z_target - e mean_v z_v + w Z^2, divided by `divisor`.

    z = logit_scale * x weight^T + bias over the logical vocabulary, Z = log sum_v exp z_v, e = `smoothing` (arXiv
    1512.00567, section 7), w = `z_loss` (PaLM, arXiv 2204.02311, section 5). The vocabulary is cut over ranks as in
    Megatron-LM (arXiv 1909.08053, section 3).

    Args:
        x_TD: (T, D), a floating dtype; the product is rounded to it, the rest is in fp32 (fp64 for fp64).
        weight_VD: this rank's rows of the table, (V, D), in the dtype of x. Rank r of `group` holds rows r V and on.
        labels_T: int64 (T,), global numbers below `vocab_size`, or `ignore_index`: such a token counts nothing.
            Any other label makes the loss and its gradients NaN.
        divisor: one number on the same device, without gradient.
        vocab_size: logical vocabulary. Rows past it are padding: no probability, and a gradient of exactly zero.
        bias_V: this rank's biases, (V,), or None.
        group: the ranks that hold the vocabulary; None: all of it is here. All others than `weight_VD` and `bias_V` are
            equal on its ranks.

    Returns:
        Scalar in fp32 (fp64 for fp64), equal on all ranks. The gradient of x is this rank's share: the caller adds up.

    Raises:
        ValueError: shapes, dtypes, devices or numbers that do not fit.
    """
    check_linear_cross_entropy(x_TD, weight_VD, labels_T, divisor, bias_V, vocab_size, smoothing, group)
    first = 0 if group is None else dist.get_rank(group) * weight_VD.shape[0]
    z_TV = (x_TD @ weight_VD.t()).to(torch.promote_types(x_TD.dtype, torch.float32)) * logit_scale
    if bias_V is not None:
        z_TV = z_TV + bias_V.to(z_TV.dtype)
    ignored_T = labels_T == ignore_index
    labels_T = labels_T.masked_fill(ignored_T, 0)
    total_T, target_T, mean_T, largest_T = _statistics(z_TV, labels_T - first, vocab_size - first, vocab_size, group)
    partition_T = total_T.log() + largest_T
    losses_T = total_T.log() - (1 - smoothing) * target_T + z_loss * partition_T.square()
    if smoothing:
        losses_T = losses_T - smoothing * mean_T
    unknown_T = (labels_T < 0) | (labels_T >= vocab_size)
    losses_T = losses_T * torch.ones_like(losses_T).masked_fill(unknown_T, float("nan"))
    return losses_T.masked_fill(ignored_T, 0.0).sum() / divisor.to(losses_T.dtype).reshape(())
