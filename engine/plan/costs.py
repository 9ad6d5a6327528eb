"""Parameters and FLOPs of each layer from the config alone, in the order in which the pipeline cuts the layers.

FLOPs count a multiply-add as 2. Attention over s positions costs 4 * Hq * s per token and block forward (Hq = heads *
head_dim), half of it when only the causal half is computed; backward costs twice the forward (PaLM, arXiv 2204.02311,
appendix B).
"""

from __future__ import annotations

from engine.config.derived import ffn_size, head_dim, kv_heads
from engine.config.enums import Activation, Balance, Norm, Positions
from engine.config.schema import ModelConfig


def parameter_counts(model: ModelConfig) -> dict[str, int]:
    """Parameters of each layer, in order. Vocabulary padding is not counted; a tied head counts 0."""
    counts = {"embed.tokens": model.vocab_size * model.hidden_size}
    if model.positions is Positions.learned:
        counts["embed.positions"] = model.max_positions * model.hidden_size
    block = _block_parameters(model)
    counts.update({f"block.{i}": block for i in range(model.num_layers)})
    counts["final_norm"] = _norm_parameters(model)
    counts["head"] = 0 if model.tied_head else model.vocab_size * model.hidden_size
    return counts


def total_parameters(model: ModelConfig) -> int:
    """Parameters of the whole model, tied weights once, without vocabulary padding."""
    return sum(parameter_counts(model).values())


def layer_costs(model: ModelConfig, balance: Balance, seq_len: int) -> list[float]:
    """Cost of each layer of `parameter_counts`, in the same order.

    `parameters`: weights held (a tied head is free). `flops`: causal forward FLOPs of one token; the embedding
    tables are look-ups and cost nothing, the head costs its matrix product even when tied.
    """
    counts = parameter_counts(model)
    if balance is Balance.parameters:
        return [float(n) for n in counts.values()]
    return [_forward_flops(model, name, n, seq_len) for name, n in counts.items()]


def flops_per_token(model: ModelConfig, seq_len: int) -> tuple[float, float]:
    """Training FLOPs (forward and backward) of one token in two conventions: (causal C, full F).

    C = 6 N + 6 L Hq s counts only the causal half of the attention matrix, F = 6 N + 12 L Hq s all of it. N are all
    weights but the token and position tables; a tied head counts, because it is a matrix product.
    """
    counts = parameter_counts(model)
    weights = sum(n for name, n in counts.items() if not name.startswith("embed.") and name != "head")
    weights += model.vocab_size * model.hidden_size
    attention = model.num_layers * model.num_heads * head_dim(model) * seq_len
    return 6.0 * weights + 6.0 * attention, 6.0 * weights + 12.0 * attention


def _forward_flops(model: ModelConfig, name: str, parameters: int, seq_len: int) -> float:
    """Causal forward FLOPs of one token in layer `name`: 2 per weight, plus attention in blocks."""
    if name.startswith("embed."):
        return 0.0
    if name == "head":
        return 2.0 * model.vocab_size * model.hidden_size
    attention = model.num_heads * head_dim(model) * seq_len if name.startswith("block.") else 0
    return 2.0 * parameters + 2.0 * attention


def _block_parameters(model: ModelConfig) -> int:
    """Weights of one block: two norms, q, k, v and output projections, feed-forward."""
    hidden, inner = model.hidden_size, ffn_size(model)
    query, key_value = model.num_heads * head_dim(model), kv_heads(model) * head_dim(model)
    up_projections = 2 if model.activation is Activation.swiglu else 1
    matrices = hidden * (2 * query + 2 * key_value) + (up_projections + 1) * hidden * inner
    biases = query + 2 * key_value + hidden + up_projections * inner + hidden if model.bias else 0
    return matrices + biases + 2 * _norm_parameters(model)


def _norm_parameters(model: ModelConfig) -> int:
    """A weight per channel; a LayerNorm also has a bias per channel when the model has biases."""
    return model.hidden_size * (2 if model.norm is Norm.layernorm and model.bias else 1)
