"""Cross-entropy over logits cut by vocabulary, without gathering them (Megatron-LM, arXiv 1909.08053, section 3)."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from engine.dist.context import AxisGroup


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
    """Per-token loss log(sum_v exp z_v) - z_target; its gradient is softmax(z) - onehot(target)."""

    @staticmethod
    def forward(ctx: Any, logits_BSV: Tensor, labels_BS: Tensor, vocab_size: int, tp: AxisGroup) -> Tensor:
        columns = logits_BSV.shape[-1]
        logits = mask_padding(logits_BSV.float().clone(), vocab_size, tp)
        largest_BS = logits.amax(dim=-1)
        dist.all_reduce(largest_BS, op=dist.ReduceOp.MAX, group=tp.group)
        local = labels_BS - tp.rank * columns
        elsewhere = (local < 0) | (local >= columns)
        local = local.masked_fill(elsewhere, 0)
        target_BS = logits.gather(-1, local.unsqueeze(-1)).squeeze(-1) - largest_BS
        target_BS = target_BS.masked_fill(elsewhere, 0.0)
        probabilities = logits.sub_(largest_BS.unsqueeze(-1)).exp_()
        sums = torch.stack([probabilities.sum(dim=-1), target_BS])
        dist.all_reduce(sums, group=tp.group)
        total_BS, target_BS = sums.unbind(0)
        ctx.save_for_backward(probabilities.div_(total_BS.unsqueeze(-1)), local, elsewhere)
        ctx.dtype = logits_BSV.dtype
        return total_BS.log() - target_BS

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        probabilities, local, elsewhere = ctx.saved_tensors
        onehot = (~elsewhere).to(probabilities.dtype).unsqueeze(-1)
        grad = probabilities.scatter_add(-1, local.unsqueeze(-1), -onehot)
        return (grad * grads[0].unsqueeze(-1)).to(ctx.dtype), None, None, None


def vocab_parallel_cross_entropy(logits_BSV: Tensor, labels_BS: Tensor, *, vocab_size: int, tp: AxisGroup) -> Tensor:
    """Loss of each token in nats, computed in fp32.

    Args:
        logits_BSV: this rank's columns of the logits, (B, S, padded / t), any float dtype.
        labels_BS: target tokens (B, S) int64, below `vocab_size`, equal on all ranks.
        vocab_size: logical vocabulary; columns past it take no part.

    Returns:
        (B, S) fp32, equal on all ranks of the axis.
    """
    if tp.group is None:
        logits = logits_BSV[..., :vocab_size].float()
        return F.cross_entropy(logits.flatten(0, -2), labels_BS.flatten(), reduction="none").view(labels_BS.shape)
    return _VocabParallelCrossEntropy.apply(logits_BSV, labels_BS, vocab_size, tp)
