"""Closed choices. A member's name is what one types on the command line."""

from __future__ import annotations

from enum import StrEnum


class Norm(StrEnum):
    """Normalisation before each sublayer."""

    layernorm = "layernorm"
    rmsnorm = "rmsnorm"


class Activation(StrEnum):
    """Feed-forward nonlinearity. `swiglu` has a gate and an up projection, the others one projection."""

    gelu = "gelu"
    gelu_tanh = "gelu_tanh"
    swiglu = "swiglu"


class Positions(StrEnum):
    """How positions enter: a learned table added to the embeddings, or rotary angles applied to queries and keys."""

    learned = "learned"
    rotary = "rotary"


class DType(StrEnum):
    """Dtype of parameters and activations in forward and backward. Optimizer state is fp32 in both."""

    fp32 = "fp32"
    bf16 = "bf16"


class OptimizerName(StrEnum):
    adamw = "adamw"
    sgd = "sgd"


class ScheduleName(StrEnum):
    """Shape of the learning rate after warm-up."""

    cosine = "cosine"
    linear = "linear"
    constant = "constant"


class Balance(StrEnum):
    """Which cost the pipeline stages share evenly."""

    parameters = "parameters"
    flops = "flops"


class Device(StrEnum):
    """`auto` takes CUDA when a GPU is visible, otherwise the CPU."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Switch(StrEnum):
    """`auto` is on where it pays (GPUs), off elsewhere."""

    auto = "auto"
    on = "on"
    off = "off"


class Attention(StrEnum):
    """Attention implementation; `auto` takes the first that can run here."""

    auto = "auto"
    sdpa_cudnn = "sdpa_cudnn"
    sdpa = "sdpa"
    reference = "reference"


class WandbMode(StrEnum):
    disabled = "disabled"
    offline = "offline"
    online = "online"
