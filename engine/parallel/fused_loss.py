"""Output projection and cross-entropy in one operation. Shapes: B batch, S sequence, D hidden, V this rank's rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from engine.dist.context import AxisGroup
from engine.parallel.cross_entropy import IGNORE
from engine_kernels.ops import LinearCrossEntropyFn


class Projection(NamedTuple):
    """What logits would be made of: scale * x weight^T + bias. The head gives it in their place.

    A tuple, in which ZeRO-3 finds the tensor whose gradient says that the loss is done with the weight.
    """

    function: LinearCrossEntropyFn
    x_BSD: Tensor
    """All positions of this cp rank, equal on all tp ranks."""
    weight_VD: Callable[[], Tensor]
    """Gives it: under ZeRO-3 it is whole while the loss runs."""
    scale: float
    bias_V: Tensor | None = None


# A chain of kernels with nothing around it to be fused with; compiled, it would be so again for every batch's length.
@torch.compiler.disable
def projected_cross_entropy(
    projection: Projection,
    labels_BS: Tensor,
    targets: Tensor,
    *,
    vocab_size: int,
    tp: AxisGroup,
    smoothing: float,
    z_loss: float,
) -> Tensor:
    """Sum of what `vocab_parallel_cross_entropy` gives for the logits of `projection`, divided by `targets`."""
    return projection.function(
        projection.x_BSD.flatten(0, 1),
        projection.weight_VD(),
        labels_BS.flatten(),
        divisor=targets,
        vocab_size=vocab_size,
        bias_V=projection.bias_V,
        logit_scale=projection.scale,
        smoothing=smoothing,
        z_loss=z_loss,
        ignore_index=IGNORE,
        group=tp.group,
    )
