"""Cross-entropy over logits cut by vocabulary, without gathering them (Megatron-LM, arXiv 1909.08053, section 3)."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from engine.dist.context import AxisGroup

IGNORE = -100
"""Label of a position without a target."""


def mask_padding(logits_BSV: Tensor, vocab_size: int, tp: AxisGroup) -> Tensor:
    """Set the columns past `vocab_size` to -inf, in place on fp32 logits, so that padding takes no probability.

    Args:
        logits_BSV: this rank's columns, (B, S, padded / t).
    """
    columns = logits_BSV.shape[-1]
    real = min(max(vocab_size - tp.rank * columns, 0), columns)
    if real < columns:
        logits_BSV[..., real:] = float("-inf")
    return logits_BSV


class _VocabParallelCrossEntropy(torch.autograd.Function):
    """Per-token loss Z - (1 - e) z_target - e mean_v z_v + w Z^2, with Z = log sum_v exp z_v.

    Its gradient is (1 + 2 w Z) softmax(z) - (1 - e) onehot(target) - e / V.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits_BSV: Tensor,
        labels_BS: Tensor,
        vocab_size: int,
        tp: AxisGroup,
        smoothing: float,
        z_loss: float,
    ) -> Tensor:
        columns = logits_BSV.shape[-1]
        real = min(max(vocab_size - tp.rank * columns, 0), columns)
        logits = mask_padding(logits_BSV.float().clone(), vocab_size, tp)
        largest_BS = logits.amax(dim=-1)
        dist.all_reduce(largest_BS, op=dist.ReduceOp.MAX, group=tp.group)
        local = labels_BS - tp.rank * columns
        elsewhere = (local < 0) | (local >= columns)
        local = local.masked_fill(elsewhere, 0)
        target_BS = logits.gather(-1, local.unsqueeze(-1)).squeeze(-1) - largest_BS
        target_BS = target_BS.masked_fill(elsewhere, 0.0)
        shifted = logits.sub_(largest_BS.unsqueeze(-1))
        mean_BS = shifted[..., :real].sum(dim=-1) / vocab_size if smoothing else torch.zeros_like(target_BS)
        probabilities = shifted.exp_()
        sums = torch.stack([probabilities.sum(dim=-1), target_BS, mean_BS])
        dist.all_reduce(sums, group=tp.group)
        total_BS, target_BS, mean_BS = sums.unbind(0)
        log_total_BS = total_BS.log()
        log_partition_BS = log_total_BS + largest_BS
        ctx.save_for_backward(
            probabilities.div_(total_BS.unsqueeze(-1)), local, elsewhere, labels_BS == IGNORE, log_partition_BS
        )
        ctx.dtype, ctx.smoothing, ctx.z_loss, ctx.real, ctx.vocab_size = (
            logits_BSV.dtype,
            smoothing,
            z_loss,
            real,
            vocab_size,
        )
        losses_BS = log_total_BS - (1 - smoothing) * target_BS - smoothing * mean_BS
        if z_loss:
            losses_BS = losses_BS + z_loss * log_partition_BS.square()
        return losses_BS.masked_fill(labels_BS == IGNORE, 0.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        probabilities, local, elsewhere, ignored, log_partition_BS = ctx.saved_tensors
        onehot = (~elsewhere).to(probabilities.dtype).unsqueeze(-1) * (1 - ctx.smoothing)
        if ctx.z_loss:
            probabilities = probabilities * (1 + 2 * ctx.z_loss * log_partition_BS).unsqueeze(-1)
        grad = probabilities.scatter_add(-1, local.unsqueeze(-1), -onehot)
        if ctx.smoothing:
            grad[..., : ctx.real] -= ctx.smoothing / ctx.vocab_size
        scale = grads[0].masked_fill(ignored, 0.0).unsqueeze(-1)
        return (grad * scale).to(ctx.dtype), None, None, None, None, None


# See `engine.dist.collectives`: torch 2.11 compiles such functions to zero gradients.
@torch.compiler.disable
def _vocab_parallel(
    logits_BSV: Tensor, labels_BS: Tensor, vocab_size: int, tp: AxisGroup, smoothing: float, z_loss: float
) -> Tensor:
    losses_BS: Tensor = _VocabParallelCrossEntropy.apply(logits_BSV, labels_BS, vocab_size, tp, smoothing, z_loss)
    return losses_BS


def vocab_parallel_cross_entropy(
    logits_BSV: Tensor,
    labels_BS: Tensor,
    *,
    vocab_size: int,
    tp: AxisGroup,
    smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """Loss of each token in nats, computed in fp32; 0 where the label is `IGNORE`.

    Args:
        logits_BSV: this rank's columns of the logits, (B, S, padded / t), any float dtype.
        labels_BS: target tokens (B, S) int64, below `vocab_size` or `IGNORE`, equal on all ranks.
        vocab_size: logical vocabulary; columns past it take no part.
        smoothing: probability that the target gives up to the whole vocabulary, evenly (arXiv 1512.00567, section 7).
        z_loss: weight of the squared log-partition (PaLM, arXiv 2204.02311, section 5).

    Returns:
        (B, S) fp32, equal on all ranks of the axis.
    """
    if tp.group is not None:
        return _vocab_parallel(logits_BSV, labels_BS, vocab_size, tp, smoothing, z_loss)
    logits = logits_BSV[..., :vocab_size].float()
    losses = F.cross_entropy(
        logits.flatten(0, -2), labels_BS.flatten(), reduction="none", ignore_index=IGNORE, label_smoothing=smoothing
    ).view(labels_BS.shape)
    if z_loss:
        partition_BS = torch.logsumexp(logits, dim=-1).square()
        losses = losses + z_loss * partition_BS.masked_fill(labels_BS == IGNORE, 0.0)
    return losses
