"""Bytes that each rank of a layout holds, from the config alone.

Symbols: P parameters of the rank, e bytes of `precision.dtype`, n = dp * context ranks that ZeRO shards over, b micro
batch, L = seq_len / context positions, R = L / tp with `parallel.sequence`, else L.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from engine.config.derived import ffn_size, head_dim, kv_heads, padded_vocab, writes_checkpoints
from engine.config.enums import Activation, Attention, DType, Offload, OptimizerName, Recompute
from engine.config.schema import Config
from engine.plan.costs import block_parameters, parameter_counts
from engine.plan.stages import chunk_owners, chunks, layers_of
from engine.topology.program import OpKind
from engine.topology.schedule import simulate
from engine.topology.timeline import Timeline

_MASTER = 4
"""Bytes of an fp32 weight."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes of one rank: on its device, and in its host's memory for offload and for checkpoints."""

    weights: int
    gradients: int
    optimizer: int
    buffers: int
    activations: int
    logits: int
    host: int
    snapshot: int

    @property
    def total(self) -> int:
        """Bytes on the device."""
        return self.weights + self.gradients + self.optimizer + self.buffers + self.activations + self.logits


def memory(cfg: Config, world_size: int, stage: int) -> Memory:
    """What one rank of pipeline rank `stage` holds at the peak of a step. The rules hold for `cfg`.

    weights: e P; / n at ZeRO 3; none with offloaded parameters. gradients: g P, g the bytes in which they are added up
    (4, or 2 for bf16 with precision.grad_accum=bf16), at ZeRO 1 and e P more where sums are wider than gradients; / n
    from ZeRO 2 on, where an offloaded optimizer takes them to the host, but for a sum in fp32 of smaller gradients at
    ZeRO 2, which DeepSpeed adds up on the device before. optimizer: fp32 weights 4 P from ZeRO 1 on and the state of
    `state_bytes`, / n, less the offloaded share r. host: r (fp32 weights, state, fp32 gradients 4 P, and before stage 3
    below fp32 a copy of the weights e P) / n, and e P / n for offloaded parameters; what is on NVMe is in neither.
    buffers: with n > 1 a reduce bucket of e bytes per element, two with overlap_comm and pp=1; at ZeRO 3 the largest
    layer too, gathered. snapshot: fp32 weights and state, / n at every stage, where the run writes checkpoints.
    activations: `activation_bytes` over the schedule. logits: (e + 8) b L padded_vocab / tp on the
    rank of the head, for logits, fp32 probabilities and their fp32 gradient: more than a fused loss needs
    (`kernels.loss`), which the plan does not count on, since it runs on GPUs only.
    """
    zero, parallel = cfg.zero, cfg.parallel
    shards = world_size // (parallel.pp * parallel.tp)
    held = rank_parameters(cfg, stage)
    count, width = sum(held.values()), element_bytes(cfg.precision.dtype)
    summed = element_bytes(cfg.precision.grad_accum) if cfg.precision.dtype is DType.bf16 else _MASTER
    elsewhere = zero.offload_optimizer is not Offload.none
    kept_twice = zero.stage == 1 and summed > width and not elsewhere
    share = zero.offload_ratio if elsewhere else 0.0
    state = (_MASTER * count * (zero.stage > 0) + state_bytes(cfg, held)) / (shards if zero.stage else 1)
    weights = width * count / (shards if zero.stage == 3 else 1)
    stays = zero.stage < 2 or (zero.stage == 2 and summed > width)
    gradients = summed * count / (shards if zero.stage >= 2 else 1) * (1 if stays else 1 - share)
    gradients += width * count * kept_twice
    copy = width if width < _MASTER and zero.stage < 3 else 0
    host = share * (state + (_MASTER + copy) * count / shards) if zero.offload_optimizer is Offload.cpu else 0.0
    host += weights if zero.offload_params is Offload.cpu else 0.0
    head = "head" in layers_of(cfg, stage)
    vocabulary = padded_vocab(cfg.model, parallel.tp) // parallel.tp
    return Memory(
        weights=0 if zero.offload_params is not Offload.none else round(weights),
        gradients=round(gradients),
        optimizer=round(state * (1 - share)),
        buffers=_buffer_elements(cfg, shards, held) * width,
        activations=_peak_activations(cfg, stage),
        logits=(width + 8) * _positions(cfg) * vocabulary if head else 0,
        host=round(host),
        snapshot=round(_saved_bytes(cfg, held) / shards) if writes_checkpoints(cfg) else 0,
    )


def rank_parameters(cfg: Config, stage: int) -> dict[str, int]:
    """Parameters of each layer on one rank of pipeline rank `stage`: the vocabulary padded and cut by tp, the blocks'
    matrices cut by tp, the rest whole. A tied head counts where the rank does not hold the embedding.
    """
    model, tp = cfg.model, cfg.parallel.tp
    names, counts = layers_of(cfg, stage), parameter_counts(cfg.model)
    rows = padded_vocab(model, tp) // tp
    cut, whole = block_parameters(model)
    held = {}
    for name in names:
        if name.startswith("block."):
            held[name] = cut // tp + whole
        elif name == "head.bias":
            held[name] = rows
        elif name == "embed.tokens" or (name == "head" and not (model.tied_head and "embed.tokens" in names)):
            held[name] = rows * model.hidden_size
        else:
            held[name] = counts[name]
    return held


def _saved_bytes(cfg: Config, held: dict[str, int]) -> int:
    """fp32 weights and state of what a stage saves: a tied head is saved with the embedding."""
    copied = cfg.model.tied_head and "embed.tokens" not in held
    own = {name: count for name, count in held.items() if not (copied and name == "head")}
    return _MASTER * sum(own.values()) + state_bytes(cfg, own)


def state_bytes(cfg: Config, held: dict[str, int]) -> int:
    """Optimizer state of the parameters `held`, fp32: two moments (8 bytes each parameter) for adamw and lamb, one for
    lion and for sgd with momentum; muon one for the blocks' matrices and two for the rest. Adafactor's means of rows
    and columns are left out.
    """
    count, name = sum(held.values()), cfg.optim.name
    if name is OptimizerName.muon:
        matrices = block_parameters(cfg.model)[0] // cfg.parallel.tp * sum(key.startswith("block.") for key in held)
        return 8 * count - 4 * matrices
    moments = {OptimizerName.adamw: 2, OptimizerName.lamb: 2, OptimizerName.lion: 1}
    return 4 * count * moments.get(name, int(name is OptimizerName.sgd and cfg.optim.momentum > 0))


def block_activation_bytes(cfg: Config) -> int:
    """What one block keeps of one micro-batch for its backward pass, without recomputation of the whole block.

    Korthikanti et al. (arXiv 2205.05198, sections 4.1, 4.2) for any feed-forward and head sizes, with fused attention,
    and without masks, which are computed again: e b (4 R D + L (2 Hq + 2 Hk + f F) / tp), plus the attention core.
    The terms: inputs of the norms (with parallel_residual one for both, 3 R D) and of the two column-parallel layers,
    which gather them again; queries, attention output, keys and values (Hk / tp at least `context` heads, which are
    repeated for it); f = 2 of GELU, 4 of SwiGLU. Core: 4 bytes per head and position (log-sum-exp) of a fused kernel;
    the reference keeps the b N L seq_len / tp weights in fp32, twice with dropout, and keys and values repeated for all
    query heads.
    `recompute=selective` drops the core.
    """
    model, parallel = cfg.model, cfg.parallel
    tp, cp, width, positions = parallel.tp, parallel.context, element_bytes(cfg.precision.dtype), _positions(cfg)
    residual = positions // (tp if parallel.sequence else 1)
    heads, kv = model.num_heads // tp, max(kv_heads(model) // tp, cp if cp > 1 else 0)
    reference = cfg.kernels.attention is Attention.reference
    selective = cfg.train.recompute is Recompute.selective
    queries = heads * head_dim(model)
    keys = queries if reference and not selective else kv * head_dim(model)
    inner = (4 if model.activation is Activation.swiglu else 2) * (ffn_size(model) // tp)
    streams = 3 if model.parallel_residual else 4
    kept = streams * residual * model.hidden_size + positions * (2 * queries + 2 * keys + inner)
    core = 4 * positions * heads
    if reference:
        core = 4 * positions * heads * cfg.data.seq_len * (2 if model.attention_dropout > 0 else 1)
    return width * kept + (0 if selective else core)


def activation_bytes(cfg: Config, blocks: int) -> tuple[int, int]:
    """Bytes that a chunk of `blocks` blocks keeps for each micro-batch in flight, and those of a group at work.

    With `recompute=full` (arXiv 2205.05198, section 5) each group of recompute_interval blocks keeps its input,
    e b R D, and only the group whose backward pass runs has its blocks' activations. Else each block keeps its own.
    """
    whole = block_activation_bytes(cfg)
    if cfg.train.recompute is not Recompute.full:
        return blocks * whole, 0
    interval = cfg.train.recompute_interval
    residual = _positions(cfg) // (cfg.parallel.tp if cfg.parallel.sequence else 1)
    one_input = element_bytes(cfg.precision.dtype) * residual * cfg.model.hidden_size
    return -(-blocks // interval) * one_input, min(blocks, interval) * whole


def element_bytes(dtype: DType) -> int:
    """Bytes of one element."""
    return 4 if dtype is DType.fp32 else 2


def step_timeline(cfg: Config) -> Timeline:
    """One step of the schedule with equal stages, backward passes twice as long as forward passes."""
    parallel = cfg.parallel
    return simulate(parallel.schedule, parallel.pp, cfg.train.accum_steps, parallel.virtual_stages)


def _positions(cfg: Config) -> int:
    """b L."""
    return cfg.train.micro_batch * (cfg.data.seq_len // cfg.parallel.context)


def _buffer_elements(cfg: Config, shards: int, held: dict[str, int]) -> int:
    """Elements of the buckets that ZeRO communicates in, and of the layer that stage 3 gathers."""
    if cfg.zero.stage == 0 or shards == 1:
        return 0
    buckets = 2 if cfg.zero.overlap_comm and cfg.parallel.pp == 1 else 1
    gathered = max(held.values()) if cfg.zero.stage == 3 else 0
    return buckets * min(cfg.zero.bucket_elements, sum(held.values())) + gathered


def _peak_activations(cfg: Config, stage: int) -> int:
    """Most bytes in flight on pipeline rank `stage`, each chunk by its own blocks, plus one group at work."""
    blocks = [sum(name.startswith("block.") for name in names) for names in chunks(cfg)]
    mine = [chunk for chunk, owner in enumerate(chunk_owners(cfg)) if owner == stage]
    kept = {chunk: activation_bytes(cfg, blocks[chunk]) for chunk in mine}
    change: defaultdict[OpKind, int] = defaultdict(int, {OpKind.forward: 1, OpKind.backward: -1})
    held = peak = 0
    for event in step_timeline(cfg).events[stage]:
        held += change[event.op.kind] * kept[event.op.chunk][0]
        peak = max(peak, held)
    return peak + max(working for _, working in kept.values())
