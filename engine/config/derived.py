"""What optional fields mean when they are None, and sizes that follow from the others."""

from __future__ import annotations

from engine.config.schema import ModelConfig, OptimConfig


def head_dim(model: ModelConfig) -> int:
    """Width H of one attention head: `model.head_dim`, or hidden_size / num_heads."""
    return model.hidden_size // model.num_heads if model.head_dim is None else model.head_dim


def kv_heads(model: ModelConfig) -> int:
    """Key and value heads: `model.num_kv_heads`, or as many as query heads."""
    return model.num_heads if model.num_kv_heads is None else model.num_kv_heads


def ffn_size(model: ModelConfig) -> int:
    """Inner width F of the feed-forward: `model.ffn_size`, or 4 * hidden_size."""
    return 4 * model.hidden_size if model.ffn_size is None else model.ffn_size


def padded_vocab(model: ModelConfig, tp: int) -> int:
    """Rows of the embedding over all tp ranks: the vocabulary rounded up to a multiple of `vocab_multiple` * tp."""
    multiple = model.vocab_multiple * tp
    return -(-model.vocab_size // multiple) * multiple


def warmup_steps(optim: OptimConfig, total_steps: int) -> int:
    """Steps of warm-up: `optim.warmup_steps`, or a twentieth of the run."""
    return total_steps // 20 if optim.warmup_steps is None else optim.warmup_steps
