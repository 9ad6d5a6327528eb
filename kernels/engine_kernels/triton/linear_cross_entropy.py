"""Projection to the vocabulary and its cross-entropy over chunks of tokens: logits never exist in full.

The gradients of a loss that is one number are known up to a factor as soon as the loss is. They are computed chunk by
chunk in the forward pass, from logits that are overwritten by their own gradient, and the backward pass multiplies them
by the factor where it is not 1. The products are cuBLAS's. Shapes: T tokens, D hidden, V this rank's rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

from engine_kernels.interpreter import require_gpu
from engine_kernels.reference.linear_cross_entropy import check_linear_cross_entropy
from engine_kernels.triton.linear_cross_entropy_rows import VECTOR_BYTES, Rows, scale_in_place

__all__ = ["linear_cross_entropy"]

LOGITS_BYTES = 504 * 2**20
"""Of a chunk's logits. Every chunk after the first reads the weight's gradient and rounds it once more: in 16 bits the
error stays below twice that of one rounding up to four chunks. 2,048 tokens of 128,256 logits in 16 bits fit, whose
product with a weight 4,096 wide fills two waves of 132 multiprocessors.
"""
TOKENS_MULTIPLE = 128
"""Of a chunk's tokens: the height of cuBLAS's tiles."""
FP16_TOKENS = 8192
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _chunks(tokens: int, row_bytes: int) -> list[slice]:
    """The fewest chunks whose logits fit into LOGITS_BYTES, as even as TOKENS_MULTIPLE allows."""
    fitting = max(1, LOGITS_BYTES // row_bytes)
    multiple = TOKENS_MULTIPLE if fitting >= TOKENS_MULTIPLE else 1
    blocks = triton.cdiv(tokens, multiple)
    count = triton.cdiv(blocks, fitting // multiple)
    edges = [min(tokens, blocks * i // count * multiple) for i in range(count)] + [tokens]
    return [slice(start, end) for start, end in zip(edges, edges[1:], strict=False)]


def _shrink(x: Tensor) -> float:
    """Power of two that multiplies the stored gradient of the weight. See `_division_waits`.

    Not 1 in fp16 with many tokens, the sum of whose gradients could pass the largest number.
    """
    if not _division_waits(x):
        return 1.0
    excess = (int(x.shape[0]) - 1).bit_length() - (FP16_TOKENS - 1).bit_length()
    return 2.0 ** -max(0, excess)


def _division_waits(x: Tensor) -> bool:
    """The gradients are stored before the division by the divisor, which is left for the backward pass.

    A token's share of the mean over a large batch has gradients below the smallest number of fp16 until the loss scale
    has multiplied them, and the backward pass is the first to know it.
    """
    return x.dtype is torch.float16


@dataclass(frozen=True, slots=True)
class _Gradients:
    """Buffers of the gradients; None: not wanted."""

    x: Tensor | None
    weight: Tensor | None
    bias: Tensor | None

    def outputs(self, like: Tensor) -> tuple[Tensor, ...]:
        return tuple(like.new_empty(0) if g is None else g for g in (self.x, self.weight, self.bias))

    def add(self, chunk: slice, x: Tensor, logits: Tensor, weight: Tensor, scale: float, shrink: float) -> None:
        """What a chunk gives, from the gradient of its scaled `logits`. The first chunk starts at zero."""
        if self.x is not None:
            out = self.x[chunk]
            torch.addmm(out, logits, weight, beta=0, alpha=scale, out=out)
        if self.weight is not None:
            # Added to in fp32 and rounded once.
            self.weight.addmm_(logits.t(), x[chunk], beta=min(chunk.start, 1), alpha=scale * shrink)
        if self.bias is not None:
            self.bias.add_(logits.sum(dim=0, dtype=torch.float32))


def _empty_gradients(x: Tensor, weight: Tensor, wants_x: bool, wants_weight: bool, wants_bias: bool) -> _Gradients:
    return _Gradients(
        torch.empty_like(x, memory_format=torch.contiguous_format) if wants_x else None,
        torch.empty_like(weight, memory_format=torch.contiguous_format) if wants_weight else None,
        weight.new_zeros(weight.shape[0], dtype=torch.float32) if wants_bias else None,
    )


def _all_chunks(
    x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, divisor: Tensor, rows: Rows, grads: _Gradients
) -> Tensor:
    """Sum of the losses, fp32; fills the gradients."""
    chunks = _chunks(len(x), rows.stride * x.element_size())
    buffer = x.new_empty((max((c.stop - c.start for c in chunks), default=0), rows.stride))
    losses = x.new_empty(len(x), dtype=torch.float32)
    gradient = any(g is not None for g in (grads.x, grads.weight, grads.bias))
    if grads.weight is not None and not chunks:
        grads.weight.zero_()
    for chunk in chunks:
        part = buffer[: chunk.stop - chunk.start]
        logits = part[:, : weight.shape[0]]
        torch.mm(x[chunk], weight.t(), out=logits)
        rows.run(part, bias, labels[chunk], divisor, losses[chunk], gradient=gradient)
        grads.add(chunk, x, logits, weight, rows.scale, _shrink(x))
    return losses.sum()


@torch.library.custom_op("octant::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    divisor: Tensor,
    vocab_size: int,
    scale: float,
    smoothing: float,
    z_loss: float,
    ignore_index: int,
    group_name: str,
    wants_x: bool,
    wants_weight: bool,
    wants_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss, and those gradients that are wanted; the others are empty. That of the bias is fp32."""
    group = _resolve_process_group(cast(Any, group_name)) if group_name else None
    columns, inner = weight.shape[0], VECTOR_BYTES // x.element_size()
    first = 0 if group is None else dist.get_rank(group) * columns
    rows = Rows(
        stride=triton.cdiv(columns, inner) * inner,
        inner=inner,
        columns=min(max(vocab_size - first, 0), columns),
        first=first,
        vocab_size=vocab_size,
        scale=scale,
        smoothing=smoothing,
        z_loss=z_loss,
        ignore_index=ignore_index,
        group=group,
    )
    grads = _empty_gradients(x, weight, wants_x, wants_weight, wants_bias)
    padded = None if bias is None else F.pad(bias.float(), (0, rows.stride - columns))
    divisor = divisor.reshape(()).float()
    with torch.cuda.device_of(x):
        total = _all_chunks(
            x.contiguous(),
            weight.contiguous(),
            padded,
            labels.contiguous(),
            torch.ones_like(divisor) if _division_waits(x) else divisor,
            rows,
            grads,
        )
    loss = total / divisor
    return loss, *grads.outputs(x)  # type: ignore[return-value]


@_linear_cross_entropy.register_fake
def _(x: Tensor, weight: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return x.new_empty((), dtype=torch.float32), *_empty_gradients(x, weight, *args[-3:]).outputs(x)


@torch.library.custom_op("octant::scale_unless_one_", mutates_args=("x",))
def _scale_unless_one(x: Tensor, factor: Tensor) -> None:
    with torch.cuda.device_of(x):
        scale_in_place(x, factor)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, _, bias, _, divisor, *_ = inputs
    # Otherwise the backward pass would be given zeros in the shape of every gradient.
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:], divisor)
    ctx.wants, ctx.spent = inputs[-3:], False
    ctx.waits, ctx.shrink = _division_waits(x), _shrink(x)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        raise RuntimeError("linear_cross_entropy has no second derivatives: create_graph=True")
    if ctx.spent:
        raise RuntimeError(
            "linear_cross_entropy gave away its gradients in the first backward pass: a second one over the same graph"
            " needs another forward pass"
        )
    ctx.spent = True
    (grad_loss, *_), wants = upstream, ctx.wants
    grad_x, grad_weight, grad_bias, divisor = ctx.saved_tensors
    if grad_loss is None:
        return (None,) * len(ctx.needs_input_grad)
    factor = grad_loss / divisor.reshape(()).float() if ctx.waits else grad_loss
    if wants[0]:
        _scale_unless_one(grad_x, factor)
    if wants[1]:
        _scale_unless_one(grad_weight, factor if ctx.shrink == 1.0 else factor / ctx.shrink)
    given = grad_x, grad_weight, (grad_bias * factor).to(ctx.bias_dtype) if wants[2] else None
    found = [g if w else None for g, w in zip(given, wants, strict=True)]
    return *found, *(None,) * (len(ctx.needs_input_grad) - len(found))


_linear_cross_entropy.register_autograd(_backward, setup_context=_save)


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
    """Sum over the tokens of the loss of `engine_kernels.reference.linear_cross_entropy`, divided by `divisor`.

    The same arguments and result, with differences: fp32, bf16 and fp16 on a GPU; logits are rounded to the dtype of x,
    and their gradients too; one backward pass for each forward pass, without second derivatives. Where no gradient is
    wanted, none is computed. Inputs that are not contiguous are copied.

    Raises:
        ValueError: what the reference refuses, another dtype, or tensors that Triton cannot reach.
        RuntimeError: a second backward pass, or one with create_graph=True.
    """
    check_linear_cross_entropy(x_TD, weight_VD, labels_T, divisor, bias_V, vocab_size, smoothing, group)
    for name, tensor in (("x_TD", x_TD), ("bias_V", bias_V)):
        if tensor is not None and tensor.dtype not in _DTYPES:
            raise ValueError(f"{name} of {tensor.dtype} is not of torch.float32, torch.bfloat16 or torch.float16")
    require_gpu("x_TD", x_TD)
    learns = torch.is_grad_enabled()
    loss, *_ = _linear_cross_entropy(
        x_TD,
        weight_VD,
        bias_V,
        labels_T,
        divisor,
        vocab_size,
        float(logit_scale),
        float(smoothing),
        float(z_loss),
        ignore_index,
        "" if group is None or group.size() == 1 else group.group_name,
        learns and x_TD.requires_grad,
        learns and weight_VD.requires_grad,
        learns and bias_V is not None and bias_V.requires_grad,
    )
    return loss
