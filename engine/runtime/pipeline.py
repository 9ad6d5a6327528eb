"""pp>1: our executor of pipeline programs over DeepSpeed's optimizers; ZeRO 0 to 2 over the replicas.

DeepSpeed's own `PipelineEngine` runs one schedule, sends shapes before tensors, refuses ZeRO-2 and reads data on the
first and last stage only. What is used of DeepSpeed here is its engine around an optimizer: reduction, ZeRO, loss
scale, offload, step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from engine.config.schema import Config
from engine.dist.context import ParallelContext
from engine.dist.init import DTYPES
from engine.model.batch import Batch
from engine.model.build import build_loss
from engine.model.layers import InitialWeights, LayerDef, build_stacks
from engine.optim.schedule import set_learning_rate
from engine.parallel.logical import LogicalTensor
from engine.protocols import EngineState, StepResult
from engine.runtime import gradients
from engine.runtime.compile import compile_parts, wants_compile
from engine.runtime.ds_axes import Axes, mark_parameters
from engine.runtime.ds_config import clips_itself
from engine.runtime.ds_engine import Engine
from engine.runtime.executor import Executor, StageModel
from engine.runtime.offload import begin_step, make_optimizer
from engine.runtime.shards import attach_pieces
from engine.runtime.state import adopt_state, read_state
from engine.runtime.steps import make_feeds, recomputation, sum_of_shares
from engine.runtime.tied import tied_copies
from engine.runtime.transport import open_messages
from engine.topology.schedule import build as build_program
from engine_kernels.ops import AdamWFn


class PipelineRunner:
    """`Engine` over a stage's chunks."""

    def __init__(
        self,
        layers: Sequence[LayerDef],
        bounds: Sequence[int],
        initial: InitialWeights,
        cfg: Config,
        ctx: ParallelContext,
        adamw_step: AdamWFn | None = None,
    ) -> None:
        self.ctx, self._cfg = ctx, cfg
        self.on_gradients: Callable[[], None] | None = None
        train, parallel = cfg.train, cfg.parallel
        make = partial(build_program, parallel.schedule, ctx.pp.size, train.accum_steps, parallel.virtual_stages)
        program = make()
        chunks = program.chunks_of(ctx.pp.rank)
        spans = [(bounds[chunk], bounds[chunk + 1]) for chunk in chunks]
        built = build_stacks(layers, spans, initial, tp=ctx.tp, **recomputation(cfg))
        stacks = dict(zip(chunks, built, strict=True))
        loss = build_loss(cfg, ctx)
        self._stage = nn.ModuleList(built).to(ctx.device)
        self._tied = tied_copies(layers, bounds, program, stacks, ctx)
        mark_parameters(self._stage.parameters())
        if wants_compile(cfg, ctx.device):
            compile_parts(self._stage, loss, deterministic=cfg.kernels.deterministic)
        optimizer = make_optimizer(self._stage.parameters(), cfg, ctx, adamw_step)
        self._ds = Engine(self._stage, optimizer, cfg, ctx, Axes(ctx))
        gradients.mend_norm(self._ds.optimizer, ctx)
        attach_pieces(self._ds.optimizer, cfg.optim.name)
        for copy in self._tied:
            copy.stand_in()
        model = StageModel(
            chunks=stacks,
            loss=loss,
            backward=self._ds.backward_from,
            width=cfg.model.hidden_size,
            dtype=DTYPES[cfg.precision.dtype],
        )
        channels = open_messages(cfg, ctx, program)
        self.training = Executor(program, model, ctx, channels)
        self._evaluation = Executor(make(forward_only=True), model, ctx, channels)

    def train_step(self, batches: Iterable[Batch], lr: float) -> StepResult:
        """See `Engine.train_step`; `batches` yields `accum_steps` micro-batches, which fill the pipeline."""
        set_learning_rate(self._ds.optimizer, lr)
        if not self._stage.training:
            self._stage.train()
        begin_step(self._ds.optimizer)
        total = self.training.run(make_feeds(batches, self._cfg, self.ctx), train=True)
        for copy in self._tied:
            copy.hand_in(self._ds.backward_from)
        self._ds.reduce()
        if self.on_gradients is not None:
            self.on_gradients()
        norm: Any = None
        if not clips_itself(self._cfg):
            norm = gradients.clip_by_global_norm(self._stage.parameters(), self._cfg.optim.clip_norm, self.ctx)
        self._ds.update()
        if norm is None:
            norm = self._ds.get_global_grad_norm()
        return StepResult(loss=sum_of_shares(total, self.ctx), grad_norm=torch.as_tensor(norm, device=self.ctx.device))

    @torch.no_grad()
    def eval_step(self, batches: Iterable[Batch]) -> Tensor:
        """See `Engine.eval_step`."""
        self._ds.settle()
        self._stage.eval()
        return sum_of_shares(self._evaluation.run(make_feeds(batches, self._cfg, self.ctx), train=False), self.ctx)

    def gradients(self) -> Iterator[tuple[LogicalTensor, Tensor]]:
        """See `Engine.gradients`."""
        scale = gradients.loss_scale_of(self._ds.optimizer)
        value = partial(gradients.full_gradient, zero_stage=self._cfg.zero.stage, loss_scale=scale)
        return gradients.read(self._stage.parameters(), value)

    def parameters(self) -> Iterator[tuple[LogicalTensor, Tensor]]:
        """See `Engine.parameters`."""
        self._ds.settle()
        return gradients.read(self._stage.parameters(), gradients.full_parameter)

    def state(self) -> EngineState:
        """See `Engine.state`."""
        self._ds.settle()
        return read_state(self._ds.optimizer, self._cfg.optim.name)

    def adopt_state(self, numbers: Mapping[str, float]) -> None:
        """See `Engine.adopt_state`."""
        adopt_state(self._ds.optimizer, self._cfg.optim.name, numbers)
