"""pp=1: the whole model on each tensor-parallel slice, ZeRO 0-3 over the replicas."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from engine.config.schema import Config
from engine.dist.context import ParallelContext
from engine.model.batch import Batch
from engine.model.build import ModelWithLoss, build_loss
from engine.model.feed import Feed
from engine.model.layers import InitialWeights, LayerDef, build_stacks
from engine.parallel.logical import LogicalTensor
from engine.protocols import EngineState, StepResult
from engine.runtime import gradients
from engine.runtime.compile import compile_parts, wants_compile
from engine.runtime.ds_axes import Axes, mark_parameters
from engine.runtime.ds_config import clips_itself, overlaps
from engine.runtime.ds_engine import Engine
from engine.runtime.flat import FlatOptimizer
from engine.runtime.graphs import CudaRecorder, GraphedPasses, Repeater, wants_graphs
from engine.runtime.offload import begin_step, make_optimizer, set_rate
from engine.runtime.shards import attach_pieces
from engine.runtime.state import adopt_state, read_state
from engine.runtime.steps import make_feeds, recomputation, sum_of_shares
from engine.runtime.zero3 import Partitioner, lend, replace_linear
from engine_kernels.ops import AdamWFn


class ZeroRunner:
    """`Engine` over a `DeepSpeedEngine`."""

    def __init__(
        self,
        layers: Sequence[LayerDef],
        initial: InitialWeights,
        cfg: Config,
        ctx: ParallelContext,
        adamw_step: AdamWFn | None = None,
    ) -> None:
        self.ctx, self._cfg = ctx, cfg
        self.on_gradients: Callable[[], None] | None = None
        axes = Axes(ctx)
        cut: dict[str, Any] = {"convert": Partitioner(cfg, ctx, axes)} if cfg.zero.stage == 3 else {}
        (model,) = build_stacks(layers, [(0, len(layers))], initial, tp=ctx.tp, **recomputation(cfg), **cut)
        mark_parameters(model.parameters())
        loss = build_loss(cfg, ctx)
        if wants_compile(cfg, ctx.device):
            compile_parts(model, loss, deterministic=cfg.kernels.deterministic, hooked=cfg.zero.stage == 3)
        if cfg.zero.stage == 3:
            replace_linear()
            lend(model, loss)
        whole = ModelWithLoss(model, loss).to(ctx.device)
        self._ds = Engine(whole, make_optimizer(whole.parameters(), cfg, ctx, adamw_step), cfg, ctx, axes)
        if isinstance(self._ds.optimizer, FlatOptimizer) and overlaps(cfg, ctx):
            model.before = self._ds.optimizer.gather_beside(part.parameters() for part in model.parts)
        gradients.mend_norm(self._ds.optimizer, ctx)
        attach_pieces(self._ds.optimizer, cfg.optim.name)
        self.graphed: GraphedPasses | None = None
        if wants_graphs(cfg, ctx):
            recorder = CudaRecorder(ctx.device) if ctx.device.type == "cuda" else Repeater()
            self.graphed = GraphedPasses(self._launch, self._ds.optimizer.fp32_groups_has_gradients, recorder)

    def train_step(self, batches: Iterable[Batch], lr: float) -> StepResult:
        """See `Engine.train_step`; `batches` yields `accum_steps` micro-batches."""
        set_rate(self._ds.optimizer, lr)
        begin_step(self._ds.optimizer)
        if not self._ds.module.training:
            self._ds.train()
        total = torch.zeros((), device=self.ctx.device)
        norm: Tensor | None = None
        for feed in make_feeds(batches, self._cfg, self.ctx):
            total += self._pass(feed)
            if self._ds.is_gradient_accumulation_boundary():
                if self.on_gradients is not None:
                    self.on_gradients()
                if not clips_itself(self._cfg):
                    norm = gradients.clip_by_global_norm(
                        self._ds.module.parameters(), self._cfg.optim.clip_norm, self.ctx
                    )
                # Not after the step, whose weights travel by the same group beside what follows.
                total = sum_of_shares(total, self.ctx)
            self._ds.step()
        if norm is None:
            norm = torch.as_tensor(self._ds.get_global_grad_norm(), device=self.ctx.device)
        return StepResult(loss=total, grad_norm=norm)

    def _pass(self, feed: Feed) -> Tensor:
        """Forward and backward pass of a micro-batch; its share of the loss."""
        if self.graphed is not None:
            with self._ds.around_backward():
                return self.graphed(feed)
        share: Tensor = self._ds(feed)
        self._ds.backward(self._scaled(share))
        return share.detach()

    def _launch(self, feed: Feed) -> Tensor:
        """`_pass` without what DeepSpeed does on the host in its own passes, down to the last bit."""
        share: Tensor = self._ds.module.forward(feed)
        torch.autograd.backward(self._scaled(share) / self._ds.gradient_accumulation_steps())
        return share.detach()

    def _scaled(self, share: Tensor) -> Tensor:
        """Shares are summed over micro-batches and ranks; DeepSpeed averages over both."""
        return share * float(self._cfg.train.accum_steps * self.ctx.reduce.size)

    @torch.no_grad()
    def eval_step(self, batches: Iterable[Batch]) -> Tensor:
        """See `Engine.eval_step`."""
        self._ds.settle()
        self._ds.eval()
        shares = [self._ds(feed) for feed in make_feeds(batches, self._cfg, self.ctx)]
        return sum_of_shares(torch.stack(shares).sum(), self.ctx)

    def gradients(self) -> Iterator[tuple[LogicalTensor, Tensor]]:
        """See `Engine.gradients`."""
        scale = gradients.loss_scale_of(self._ds.optimizer)
        value = partial(gradients.full_gradient, zero_stage=self._cfg.zero.stage, loss_scale=scale)
        return gradients.read(self._ds.module.parameters(), value)

    def parameters(self) -> Iterator[tuple[LogicalTensor, Tensor]]:
        """See `Engine.parameters`."""
        self._ds.settle()
        return gradients.read(self._ds.module.parameters(), gradients.full_parameter)

    def state(self) -> EngineState:
        """See `Engine.state`."""
        self._ds.settle()
        return read_state(self._ds.optimizer, self._cfg.optim.name)

    def adopt_state(self, numbers: Mapping[str, float]) -> None:
        """See `Engine.adopt_state`."""
        adopt_state(self._ds.optimizer, self._cfg.optim.name, numbers)
