"""Bytes of one micro-batch on one rank: what blocks keep for the backward pass, on the device or in host memory, and
what one of them needs beside that while it is differentiated.

Symbols as in `engine.plan.memory`; Hq, Hk: widths of all query heads and of all key heads.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.config.derived import compiles, ffn_size, fp8_linears, fuses_loss, head_dim, kv_heads, padded_vocab
from engine.config.enums import Activation, Attention, DType, Kernel, Positions, Recompute, Tiles
from engine.config.schema import Config

LOSS_CHUNK = 504 * 2**20
"""Most bytes of logits that the fused loss holds at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """Bytes of a chunk of blocks: for each micro-batch in flight, there of its host, and of the group at work."""

    device: int
    host: int
    working: int


def block_activation_bytes(cfg: Config) -> int:
    """What one block keeps of one micro-batch for its backward pass, without recomputation of the whole block.

    Korthikanti et al. (arXiv 2205.05198, sections 4.1, 4.2) for any feed-forward and head sizes, with fused attention,
    and without masks, which are computed again: e b (4 R D + L (2 Hq + 2 Hk + f F) / tp), plus the attention core.
    The terms: inputs of the norms (with parallel_residual one for both, 3 R D) and of the two column-parallel layers,
    which gather them again; queries, attention output, keys and values (Hk / tp at least `context` heads, which are
    repeated for it), with rotary positions queries and keys before they are turned too; f = 2 of GELU, 3 of SwiGLU
    (4 where it is neither compiled nor fused). Core: 4 bytes per head and position (log-sum-exp) of a fused kernel;
    the reference keeps the b N L seq_len / tp weights in fp32, twice with dropout, and keys and values repeated for all
    query heads.
    `recompute=selective` drops the core. `tiles=mlp` keeps the feed-forward's input only, f = 0 and one stream less;
    `tiles=block` the block's input, queries, keys, values and the core's output: e b (R D + L (2 Hq + 2 Hk) / tp).
    `precision.fp8` keeps inputs of linears in one byte: see `_fp8_bytes`.
    """
    model, parallel = cfg.model, cfg.parallel
    tp, cp, width, positions = parallel.tp, parallel.context, element_bytes(cfg.precision.dtype), _positions(cfg)
    residual = _residual(cfg)
    heads, kv = model.num_heads // tp, max(kv_heads(model) // tp, cp if cp > 1 else 0)
    reference = cfg.kernels.attention is Attention.reference
    selective = cfg.train.recompute is Recompute.selective
    queries = heads * head_dim(model)
    copied = reference and not selective
    keys = queries if copied else kv * head_dim(model)
    turned = queries + keys if model.positions is Positions.rotary and not copied else 0
    inner = _inner_tensors(cfg) * (ffn_size(model) // tp)
    streams = 3 if model.parallel_residual else 4
    if cfg.train.tiles is not Tiles.none:
        streams, inner = 1 if cfg.train.tiles is Tiles.block else streams - 1, 0
        turned = 0 if cfg.train.tiles is Tiles.block else turned
    kept = streams * residual * model.hidden_size + positions * (2 * queries + 2 * keys + turned + inner)
    core = 4 * positions * heads
    if reference:
        core = 4 * positions * heads * cfg.data.seq_len * (2 if model.attention_dropout > 0 else 1)
    return width * kept + _fp8_bytes(cfg, residual, positions) + (0 if selective else core)


def _inner_tensors(cfg: Config) -> int:
    """f: what a feed-forward keeps of its inner width for each position."""
    if cfg.model.activation is not Activation.swiglu:
        return 2
    return 3 if compiles(cfg) or cfg.kernels.activation is Kernel.triton else 4


def _fp8_bytes(cfg: Config, residual: int, positions: int) -> int:
    """What a block keeps more, or less, with linears in fp8; nothing where blocks differ, or in tiles.

    Compiled, the rounded inputs are made again from what is kept anyway: neither outputs of norms, but where sequence
    parallelism gathers them, nor the last linear's input are kept. Else each input is kept in fp8: column-parallel
    layers keep L D, all positions, in place of e R D; the last linear L F / tp less. A fused attention core keeps its
    output besides, so that the linear behind it keeps L Hq / tp more, and else that much less.
    """
    names, tp, width = fp8_linears(cfg), cfg.parallel.tp, element_bytes(cfg.precision.dtype)
    if cfg.precision.fp8_bf16_ends or cfg.train.tiles is not Tiles.none:
        return 0
    again = compiles(cfg)
    column = ((0 if again and residual == positions else positions) - width * residual) * cfg.model.hidden_size
    fused = cfg.kernels.attention is not Attention.reference and cfg.train.recompute is not Recompute.selective
    queries = positions * cfg.model.num_heads * head_dim(cfg.model) // tp
    change = {
        "attention.qkv": column,
        "attention.out": (0 if again else queries) if fused else -queries,
        "mlp.up": column,
        "mlp.down": -(width if again else 1) * positions * ffn_size(cfg.model) // tp,
    }
    return sum(size for name, size in change.items() if name in names)


def activation_bytes(cfg: Config, blocks: int) -> Kept:
    """What a chunk of `blocks` blocks keeps.

    With `recompute=full` (arXiv 2205.05198, section 5) each group of recompute_interval blocks keeps its input,
    e b R D, and only the group whose backward pass runs has its blocks' activations; nested, their inputs but the
    first, and those of one block. In host memory with recompute_offload, but for two inputs on their way. Without, each
    block keeps its own.
    """
    train, whole = cfg.train, block_activation_bytes(cfg)
    if train.recompute is not Recompute.full:
        return Kept(device=blocks * whole, host=0, working=0)
    together = min(blocks, train.recompute_interval)
    one_input = element_bytes(cfg.precision.dtype) * _residual(cfg) * cfg.model.hidden_size
    inputs = -(-blocks // train.recompute_interval) * one_input
    working = max(together - 1, 0) * one_input + whole if train.recompute_nested else together * whole
    if train.recompute_offload:
        return Kept(device=0, host=inputs, working=working + min(2 * one_input, inputs))
    return Kept(device=inputs, host=0, working=working)


def working_bytes(cfg: Config) -> int:
    """What the backward pass of one block needs beside what the block keeps: gradients, and tiles at work.

    The larger of two. Attention: e b (R D + L (2 Hq + 2 Hk) / tp) for the gradients of the residual stream, of output,
    queries, keys and values, and the fp32 sums 4 b L Hq / tp that fused kernels add the queries' gradients up in.
    Feed-forward: e b 2 R D for the gradients of both ends of the residual stream, with tiles=block e b L Hq / tp for
    the core's output, and the inside: e b L g F / tp, g = 3 for SwiGLU and 2 for GELU; in tiles that of one tile, its
    activations too, and the sums of the weights' gradients in fp32 with the one that is added.
    """
    model, parallel, width, positions = cfg.model, cfg.parallel, element_bytes(cfg.precision.dtype), _positions(cfg)
    residual = _residual(cfg) * model.hidden_size
    queries = model.num_heads // parallel.tp * head_dim(model)
    keys = kv_heads(model) // parallel.tp * head_dim(model)
    attention = width * (residual + positions * (2 * queries + 2 * keys)) + 4 * positions * queries
    inner = ffn_size(model) // parallel.tp
    gated = model.activation is Activation.swiglu
    tiles, whole = cfg.train.tiles, cfg.train.tiles is Tiles.block
    feed = width * (2 * residual + whole * positions * queries)
    gradients = (3 if gated else 2) * inner
    if tiles is Tiles.none:
        return max(attention, feed + width * positions * gradients)
    inside = gradients + (4 if gated else 2) * inner + (4 if whole else 2) * model.hidden_size
    matrices = model.hidden_size * ((3 if gated else 2) * inner + whole * queries)
    feed += width * min(cfg.train.tile_tokens, positions) * inside + (4 + width) * matrices
    return max(attention, feed)


def loss_bytes(cfg: Config) -> int:
    """Of the output projection and the loss.

    (e + 8) b L padded_vocab / tp: logits, fp32 probabilities and their fp32 gradient. Where the loss is fused 3 e b R D
    for input and output of the last norm and the gradient of that, a chunk of logits, and the weight's gradient.
    With sequence parallelism e b L D besides for the gathered positions, and with triton for their gradient too.
    """
    width, positions = element_bytes(cfg.precision.dtype), _positions(cfg)
    rows = padded_vocab(cfg.model, cfg.parallel.tp) // cfg.parallel.tp
    residual = _residual(cfg)
    gathered = positions if residual < positions else 0
    if not fuses_loss(cfg):
        return (width + 8) * positions * rows + width * gathered * cfg.model.hidden_size
    chunk = min(width * positions * rows, LOSS_CHUNK)
    return width * (3 * residual + 2 * gathered + rows) * cfg.model.hidden_size + chunk


def element_bytes(dtype: DType) -> int:
    """Bytes of one element."""
    return 4 if dtype is DType.fp32 else 2


def _positions(cfg: Config) -> int:
    """b L."""
    return cfg.train.micro_batch * (cfg.data.seq_len // cfg.parallel.context)


def _residual(cfg: Config) -> int:
    """b R."""
    return _positions(cfg) // (cfg.parallel.tp if cfg.parallel.sequence else 1)
