"""Parameters and FLOPs of each layer from the config alone, in the order in which the pipeline cuts the layers.

FLOPs count a multiply-add as 2. Attention over s positions costs 4 * Hq * s per token and block forward (Hq = heads *
head_dim), half of it when only the causal half is computed; backward costs twice the forward (PaLM, arXiv 2204.02311,
appendix B).
"""

from __future__ import annotations

from engine.config.derived import ffn_size, head_dim, is_causal, kv_heads, qkv_bias
from engine.config.enums import Activation, Balance, Norm, Positions, SentenceHead
from engine.config.schema import ModelConfig

GLUED = frozenset({"head", "head.bias"})
"""Layers of `bert` that stay on the stage of the layer before them."""


def parameter_counts(model: ModelConfig) -> dict[str, int]:
    """Parameters of each layer, in order. Vocabulary padding is not counted; a tied head counts 0."""
    hidden = model.hidden_size
    counts = {"embed.tokens": model.vocab_size * hidden}
    if not is_causal(model):
        counts["embed.rest"] = (model.max_positions + model.token_types) * hidden + norm_parameters(model)
    elif model.positions is Positions.learned:
        counts["embed.positions"] = model.max_positions * hidden
    block = sum(block_parameters(model))
    counts.update({f"block.{i}": block for i in range(model.num_layers)})
    if is_causal(model):
        counts["final_norm"] = norm_parameters(model)
    else:
        counts["head.transform"] = _square(model) + norm_parameters(model) + _sentence_parameters(model)
    counts["head"] = 0 if model.tied_head else model.vocab_size * hidden
    if not is_causal(model):
        counts["head.bias"] = model.vocab_size
    return counts


def total_parameters(model: ModelConfig) -> int:
    """Parameters of the whole model, tied weights once, without vocabulary padding."""
    return sum(parameter_counts(model).values())


def layer_costs(model: ModelConfig, balance: Balance, seq_len: int) -> list[float]:
    """Cost of each layer of `parameter_counts`, in the same order.

    `parameters`: weights held (a tied head is free). `flops`: forward FLOPs of one token, with the causal half of the
    attention matrix for `gpt` and all of it for `bert`; the embedding tables are look-ups and cost nothing, the head
    costs its matrix product even when tied.
    """
    if balance is Balance.parameters:
        return [float(n) for n in parameter_counts(model).values()]
    return _forward_flops(model, seq_len, _attended(model) * seq_len)


def flops_per_token(model: ModelConfig, seq_len: int) -> tuple[float, float]:
    """Training FLOPs (forward and backward) of one token in two conventions: (causal C, full F).

    C = 6 N + 6 L Hq s counts only the causal half of the attention matrix, F = 6 N + 12 L Hq s all of it. N are all
    weights but those of the embeddings; a tied head counts, because it is a matrix product. A `bert` model computes all
    of it, so C = F; its sentence head counts for one token in s.
    """
    causal = _forward_flops(model, seq_len, _attended(model) * seq_len)
    return 3.0 * sum(causal), 3.0 * sum(_forward_flops(model, seq_len, seq_len))


def block_parameters(model: ModelConfig) -> tuple[int, int]:
    """Weights of one block that tensor parallelism cuts, and those that every rank holds.

    Cut: query, key, value, output and feed-forward matrices, and the biases of all but the two output projections,
    which are whole, as are the two norms.
    """
    hidden, inner = model.hidden_size, ffn_size(model)
    query, key_value = model.num_heads * head_dim(model), kv_heads(model) * head_dim(model)
    up_projections = 2 if model.activation is Activation.swiglu else 1
    matrices = hidden * (2 * query + 2 * key_value) + (up_projections + 1) * hidden * inner
    biases = (query + 2 * key_value) * qkv_bias(model) + up_projections * inner * model.bias
    return matrices + biases, (2 * hidden if model.bias else 0) + 2 * norm_parameters(model)


def norm_parameters(model: ModelConfig) -> int:
    """A weight per channel; a LayerNorm also has a bias per channel when the model has biases."""
    return model.hidden_size * (2 if model.norm is Norm.layernorm and model.bias else 1)


def _forward_flops(model: ModelConfig, seq_len: int, attended: float) -> list[float]:
    """Forward FLOPs of one token in each layer that attends to `attended` positions on average: 2 per weight used."""
    found = []
    for name, parameters in parameter_counts(model).items():
        flops = 0.0 if name.startswith("embed.") else 2.0 * parameters
        if name == "head":
            flops = 2.0 * model.vocab_size * model.hidden_size
        elif name == "head.transform":
            flops -= 2.0 * _sentence_parameters(model) * (1 - 1 / seq_len)
        elif name.startswith("block."):
            flops += 4.0 * model.num_heads * head_dim(model) * attended
        found.append(flops)
    return found


def _attended(model: ModelConfig) -> float:
    """Share of the positions that a token attends to on average."""
    return 0.5 if is_causal(model) else 1.0


def _square(model: ModelConfig) -> int:
    """A dense layer of the width of the residual stream."""
    return model.hidden_size * (model.hidden_size + model.bias)


def _sentence_parameters(model: ModelConfig) -> int:
    """Pooler and two-way classifier."""
    if model.sentence_head is SentenceHead.none:
        return 0
    return _square(model) + 2 * (model.hidden_size + model.bias)
