"""The functions that a model and its optimizer are built with, one for each operation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch.distributed as dist
from torch import Tensor

from engine_kernels import plain
from engine_kernels.documents import Documents
from engine_kernels.reference import rotary
from engine_kernels.reference.activation import GeluForm
from engine_kernels.reference.attention import AttentionDropout
from engine_kernels.registry import Choice


class AttentionFn(Protocol):
    """(B,S,N,H), (B,S,K,H), (B,S,K,H) -> (B,S,N,H); see `engine_kernels.ops.attention`."""

    def __call__(
        self,
        q_BSNH: Tensor,
        k_BSKH: Tensor,
        v_BSKH: Tensor,
        *,
        causal: bool,
        scale: float | None = None,
        lengths_B: Tensor | None = None,
        dropout: AttentionDropout | None = None,
        documents: Documents | None = None,
        window: int | None = None,
    ) -> Tensor: ...


class RmsNormFn(Protocol):
    """See `engine_kernels.reference.norm.rms_norm`."""

    def __call__(self, x: Tensor, weight_D: Tensor, *, eps: float) -> Tensor: ...


class LayerNormFn(Protocol):
    """See `engine_kernels.reference.norm.layer_norm`."""

    def __call__(self, x: Tensor, weight_D: Tensor, bias_D: Tensor | None, *, eps: float) -> Tensor: ...


class AddRmsNormFn(Protocol):
    """See `engine_kernels.plain.add_rms_norm`."""

    def __call__(
        self, x: Tensor, residual: Tensor | None, weight_D: Tensor, *, eps: float
    ) -> tuple[Tensor, Tensor]: ...


class AddLayerNormFn(Protocol):
    """See `engine_kernels.plain.add_layer_norm`."""

    def __call__(
        self, x: Tensor, residual: Tensor | None, weight_D: Tensor, bias_D: Tensor | None, *, eps: float
    ) -> tuple[Tensor, Tensor]: ...


class RotateFn(Protocol):
    """See `engine_kernels.reference.rotary.rotate_qk`."""

    def __call__(
        self, q_BSNH: Tensor, k_BSKH: Tensor, cos_SR: Tensor, sin_SR: Tensor, positions_BS: Tensor | None = None
    ) -> tuple[Tensor, Tensor]: ...


class SwigluFn(Protocol):
    """See `engine_kernels.reference.activation.swiglu`."""

    def __call__(self, h: Tensor) -> Tensor: ...


class GeluFn(Protocol):
    """See `engine_kernels.reference.activation.gelu`."""

    def __call__(self, h: Tensor, *, approximate: GeluForm) -> Tensor: ...


class LinearFn(Protocol):
    """x W^T + b, (..., D) and (O, D) -> (..., O)."""

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor: ...


class LinearCrossEntropyFn(Protocol):
    """See `engine_kernels.reference.linear_cross_entropy.linear_cross_entropy`."""

    def __call__(
        self,
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
    ) -> Tensor: ...


class AdamWFn(Protocol):
    """See `engine_kernels.reference.adamw.adamw_step`."""

    def __call__(
        self,
        parameter: Tensor,
        gradient: Tensor,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        step: int,
        grad_scale: Tensor | None = None,
        copy_out: Tensor | None = None,
    ) -> None: ...


class AccumulateFn(Protocol):
    """See `engine_kernels.plain.accumulate`."""

    def __call__(self, total: Tensor, x: Tensor, *, first: bool) -> None: ...


class Norms(NamedTuple):
    """What an implementation of "norm" has."""

    rms_norm: RmsNormFn
    layer_norm: LayerNormFn
    add_rms_norm: AddRmsNormFn
    add_layer_norm: AddLayerNormFn


class Activations(NamedTuple):
    """What an implementation of "activation" has."""

    swiglu: SwigluFn
    gelu: GeluFn


class Linear(NamedTuple):
    """An implementation of a linear layer, and what it takes."""

    linear: LinearFn
    multiple: int = 1
    """Both sizes of the weight are multiples of it."""

    def of_sizes(self, rows: int, columns: int) -> Linear:
        """This one, or torch's for a weight (rows, columns) that it does not take."""
        return self if rows % self.multiple == columns % self.multiple == 0 else PLAIN_LINEAR


PLAIN_LINEAR = Linear(plain.linear)
"""torch's, in the dtype of its operands."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    """Chosen once, before the model is built; but for attention plain torch where nothing was chosen."""

    attention: AttentionFn
    rms_norm: RmsNormFn = plain.rms_norm
    layer_norm: LayerNormFn = plain.layer_norm
    add_rms_norm: AddRmsNormFn = plain.add_rms_norm
    add_layer_norm: AddLayerNormFn = plain.add_layer_norm
    rotate_qk: RotateFn = rotary.rotate_qk
    swiglu: SwigluFn = plain.swiglu
    gelu: GeluFn = plain.gelu
    linear: Linear = PLAIN_LINEAR
    """Of the blocks' projections."""
    linear_cross_entropy: LinearCrossEntropyFn | None = None
    """None: the loss is computed from logits."""
    adamw_step: AdamWFn | None = None
    """None: torch.optim.AdamW."""


def kernels_of(choices: Mapping[str, Choice]) -> Kernels:
    """The functions of `choices`, by operation; "attention" is among them."""
    names = {"rotary": "rotate_qk", "adamw": "adamw_step", "fp8_linear": "linear"}
    given: dict[str, Any] = {}
    for op, choice in choices.items():
        fn = choice.impl.fn
        given |= fn._asdict() if isinstance(fn, (Norms, Activations)) else {names.get(op, op): fn}
    return Kernels(**given)
