"""Bytes that each rank of a layout holds, from the config alone.

Symbols: P parameters of the rank, e bytes of `precision.dtype`, n = dp * context ranks that ZeRO shards over, b micro
batch, L = seq_len / context positions, R = L / tp with `parallel.sequence`, else L.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from engine.config.derived import (
    bucket_elements,
    fuses_update,
    has_own_stage3,
    offload_share,
    padded_vocab,
    rotary_dim,
    streams,
    writes_checkpoints,
)
from engine.config.enums import DType, Offload, OptimizerName, Positions
from engine.config.schema import Config
from engine.plan.activations import activation_bytes, element_bytes, loss_bytes, working_bytes
from engine.plan.costs import block_parameters, parameter_counts
from engine.plan.stages import chunk_owners, chunks, layers_of
from engine.topology.program import OpKind
from engine.topology.schedule import simulate
from engine.topology.timeline import Timeline

_MASTER = 4
"""Bytes of an fp32 weight."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes of one rank: on its device, and in its host's memory for offload, inputs of groups and checkpoints."""

    weights: int
    gradients: int
    optimizer: int
    buffers: int
    activations: int
    logits: int
    working: int
    host: int
    inputs: int
    snapshot: int

    @property
    def total(self) -> int:
        """Bytes on the device."""
        states = self.weights + self.gradients + self.optimizer + self.buffers
        return states + self.activations + self.logits + self.working


def memory(cfg: Config, world_size: int, stage: int) -> Memory:
    """What one rank of pipeline rank `stage` holds at the peak of a step. The rules hold for `cfg`.

    weights: e P; / n at ZeRO 3; none with offloaded parameters. gradients: g P, g the bytes in which they are added up
    (4, or 2 for bf16 with precision.grad_accum=bf16, or where AdamW in one pass over bf16 gradients has one of each to
    add up), at ZeRO 1 in fp16 e P more, since sums are wider than gradients; / n from ZeRO 2 on, where an offloaded
    optimizer takes them to the host, but for a sum in fp32 of smaller gradients at ZeRO 2, which DeepSpeed adds up on
    the device before. optimizer: fp32 weights 4 P from ZeRO 1 on and the state of `state_bytes`, / n, less the
    offloaded share r; with precision.states=bf16 half of the state alone. host: r (fp32 weights, state, fp32 gradients
    4 P, and before stage 3 below fp32 a copy of the weights e P) / n, and e P / n for offloaded parameters; what is on
    NVMe is in neither. Streamed state leaves the gradients on the device; host: r (fp32 weights and state, or with
    precision.states=bf16 weights e P and the half of the state, and with a delay fp32 gradients) / n.
    buffers: with n > 1 a reduce bucket of e bytes per element, two with overlap_comm and pp=1; at ZeRO 3 the two
    largest neighbouring layers too, gathered, and without offload, with n = 1 too, their gradients, made and reduced.
    Rotary angles are buffers too, fp32. snapshot: fp32 weights and state, / n at every stage, where the run writes
    checkpoints.
    activations: `activation_bytes` over the schedule, inputs: those of it in host memory. logits: `loss_bytes` on the
    rank of the head. working: `working_bytes`, less the logits, which are gone when blocks are differentiated.
    """
    zero, parallel = cfg.zero, cfg.parallel
    shards = world_size // (parallel.pp * parallel.tp)
    held = rank_parameters(cfg, stage)
    count, width = sum(held.values()), element_bytes(cfg.precision.dtype)
    summed = element_bytes(cfg.precision.grad_accum) if cfg.precision.dtype is DType.bf16 else _MASTER
    streamed, share = streams(cfg), offload_share(cfg)
    elsewhere = share > 0 and not streamed
    flat = cfg.precision.dtype is DType.bf16 and zero.stage == 1 and not elsewhere
    if flat and fuses_update(cfg) and shards == parallel.pp == cfg.train.accum_steps == 1:
        summed = width
    kept_twice = zero.stage == 1 and summed > width and not elsewhere and not flat
    state = (_MASTER * count * (zero.stage > 0) + state_bytes(cfg, held)) / (shards if zero.stage else 1)
    if cfg.precision.states is DType.bf16:
        state = state_bytes(cfg, held) / 2 / shards
    weights = width * count / (shards if zero.stage == 3 else 1)
    stays = zero.stage < 2 or (zero.stage == 2 and summed > width)
    gradients = summed * count / (shards if zero.stage >= 2 else 1) * (1 if stays else 1 - share)
    gradients += width * count * kept_twice
    copy = width if width < _MASTER and zero.stage < 3 else 0
    host = share * (state + (_MASTER + copy) * count / shards) if zero.offload_optimizer is Offload.cpu else 0.0
    if streamed:
        own = width if cfg.precision.states is DType.bf16 else 0
        host = share * (state + (own + _MASTER * zero.offload_delay) * count / shards)
    host += weights if zero.offload_params is Offload.cpu else 0.0
    logits = loss_bytes(cfg) if "head" in layers_of(cfg, stage) else 0
    activations, inputs = _peak_activations(cfg, stage)
    return Memory(
        weights=0 if zero.offload_params is not Offload.none else round(weights),
        gradients=round(gradients),
        optimizer=round(state * (1 - share)),
        buffers=_buffer_elements(cfg, shards, held) * width + _angle_bytes(cfg),
        activations=activations,
        logits=logits,
        working=max(0, working_bytes(cfg) - logits),
        host=round(host),
        inputs=inputs,
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


def step_timeline(cfg: Config) -> Timeline:
    """One step of the schedule with equal stages, backward passes twice as long as forward passes."""
    parallel = cfg.parallel
    return simulate(parallel.schedule, parallel.pp, cfg.train.accum_steps, parallel.virtual_stages)


def _buffer_elements(cfg: Config, shards: int, held: dict[str, int]) -> int:
    """Elements of the buckets that ZeRO communicates in, and of two layers that stage 3 gathers, one ahead, and as many
    of gradients that wait to be reduced, or with one replica to be added up.
    """
    layers = list(held.values())
    gathered = max(map(sum, zip(layers, [*layers[1:], 0], strict=True))) if cfg.zero.stage == 3 else 0
    waiting = gathered if has_own_stage3(cfg) else 0
    if cfg.zero.stage == 0 or shards == 1:
        return waiting
    buckets = 2 if cfg.zero.overlap_comm and cfg.parallel.pp == 1 else 1
    return buckets * min(bucket_elements(cfg), sum(held.values())) + gathered + waiting


def _angle_bytes(cfg: Config) -> int:
    """fp32 cosines and sines of every position."""
    model = cfg.model
    return 4 * model.max_positions * rotary_dim(model) if model.positions is Positions.rotary else 0


def _peak_activations(cfg: Config, stage: int) -> tuple[int, int]:
    """Most bytes in flight on pipeline rank `stage` and its host, each chunk by its own blocks.

    On the device one group at work too.
    """
    blocks = [sum(name.startswith("block.") for name in names) for names in chunks(cfg)]
    mine = [chunk for chunk, owner in enumerate(chunk_owners(cfg)) if owner == stage]
    kept = {chunk: activation_bytes(cfg, blocks[chunk]) for chunk in mine}
    change: defaultdict[OpKind, int] = defaultdict(int, {OpKind.forward: 1, OpKind.backward: -1})
    held = peak = away = most = 0
    for event in step_timeline(cfg).events[stage]:
        held += change[event.op.kind] * kept[event.op.chunk].device
        away += change[event.op.kind] * kept[event.op.chunk].host
        peak, most = max(peak, held), max(most, away)
    return peak + max(one.working for one in kept.values()), most
