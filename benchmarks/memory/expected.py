"""Bytes that a rank should need, by arithmetic, next to which the measured peak stands."""

from __future__ import annotations

from engine.config.derived import padded_vocab
from engine.config.enums import DType, Offload, Recompute
from engine.config.schema import Config
from engine.plan.costs import total_parameters

_BYTES = {DType.fp32: 4, DType.bf16: 2, DType.fp16: 2}


def expected_bytes(cfg: Config) -> dict[str, float]:
    """Device and host bytes of one rank alone (dp=tp=pp=1) in bf16 or fp16 at ZeRO 1 to 3, and their sums.

    Gradients are the fp32 accumulator of the partition; ZeRO 1 also holds them all in the dtype of the run. Adam has
    master weights and two moments; offload adds a gradient and a copy of the weights in the run's dtype. Activations of
    a block: arXiv 2205.05198, section 4.1, without the attention matrix; logits in the run's dtype, in fp32 and their
    gradient.
    """
    weights = float(total_parameters(cfg.model))
    small = _BYTES[cfg.precision.dtype]
    accumulator = _BYTES[cfg.precision.grad_accum if cfg.precision.dtype is DType.bf16 else DType.fp32]
    offloaded = cfg.zero.offload_optimizer is not Offload.none
    tokens = float(cfg.train.micro_batch * cfg.data.seq_len)
    block = 34.0 * tokens * cfg.model.hidden_size
    stored = small * tokens * cfg.model.hidden_size * cfg.model.num_layers
    device = {
        "weights": 0.0 if cfg.zero.offload_params is not Offload.none else small * weights,
        "gradients": (accumulator + (small if cfg.zero.stage == 1 else 0)) * weights,
        "optimizer": 0.0 if offloaded else 12.0 * weights,
        "activations": stored + block if cfg.train.recompute is Recompute.full else block * cfg.model.num_layers,
        "logits": (small + 4.0 + small) * tokens * padded_vocab(cfg.model, 1),
    }
    host = {
        "host optimizer": 12.0 * weights if offloaded else 0.0,
        "host gradients": 4.0 * weights if offloaded else 0.0,
        "host weights": small * weights if cfg.zero.offload_params is not Offload.none or offloaded else 0.0,
    }
    return {**device, "device": sum(device.values()), **host, "host": sum(host.values())}
