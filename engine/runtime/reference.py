"""The oracle: one process, plain PyTorch, no DeepSpeed in its steps. Any layout must give its losses and gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from engine.config.derived import width_ratio
from engine.config.schema import Config
from engine.dist.context import ParallelContext
from engine.model.batch import Batch
from engine.model.build import build_loss
from engine.model.feed import Feed
from engine.model.layers import InitialWeights, LayerDef, build_stacks
from engine.optim.groups import build_optimizer
from engine.optim.schedule import set_learning_rate
from engine.parallel.logical import LogicalTensor, logical_of
from engine.protocols import EngineState, StepResult
from engine.runtime.state import adopt_state, read_state
from engine.runtime.steps import make_feeds


class ReferenceEngine:
    """`Engine` on a single rank, in fp32. `batches` are all micro-batches of the global batch, in any grouping."""

    def __init__(self, layers: Sequence[LayerDef], initial: InitialWeights, cfg: Config, ctx: ParallelContext) -> None:
        self.ctx, self._cfg = ctx, cfg
        self.on_gradients: Callable[[], None] | None = None
        (model,) = build_stacks(layers, [(0, len(layers))], initial, tp=ctx.tp)
        self.model = model.to(ctx.device)
        self._loss = build_loss(cfg, ctx)
        self._optimizer = build_optimizer(self.model.parameters(), cfg.optim, ctx, width_ratio=width_ratio(cfg.model))

    def train_step(self, batches: Iterable[Batch], lr: float) -> StepResult:
        """See `Engine.train_step`."""
        set_learning_rate(self._optimizer, lr)
        self.model.train()
        self._optimizer.zero_grad()
        total = torch.zeros((), device=self.ctx.device)
        for feed in make_feeds(batches, self._cfg, self.ctx):
            share = self._share(feed)
            share.backward()
            total += share.detach()
        if self.on_gradients is not None:
            self.on_gradients()
        norm = self._clip(self._cfg.optim.clip_norm)
        self._optimizer.step()
        return StepResult(loss=total, grad_norm=norm)

    def _clip(self, limit: float) -> Tensor:
        """The global norm, in fp64 as in `engine.runtime.gradients`, and clipping by it."""
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = torch.stack([g.double().square().sum() for g in gradients]).sum().sqrt()
        if 0 < limit < float(norm):
            for gradient in gradients:
                gradient.mul_(limit / (float(norm) + 1e-6))
        return norm.float()

    @torch.no_grad()
    def eval_step(self, batches: Iterable[Batch]) -> Tensor:
        """See `Engine.eval_step`."""
        self.model.eval()
        return torch.stack([self._share(feed) for feed in make_feeds(batches, self._cfg, self.ctx)]).sum()

    def gradients(self) -> Iterator[tuple[LogicalTensor, Tensor]]:
        """See `Engine.gradients`."""
        for parameter in self.model.parameters():
            assert parameter.grad is not None
            yield logical_of(parameter), parameter.grad

    def parameters(self) -> Iterator[tuple[LogicalTensor, Tensor]]:
        """See `Engine.parameters`."""
        for parameter in self.model.parameters():
            yield logical_of(parameter), parameter.detach()

    def state(self) -> EngineState:
        """See `Engine.state`."""
        return read_state(self._optimizer, self._cfg.optim.name)

    def adopt_state(self, numbers: Mapping[str, float]) -> None:
        """See `Engine.adopt_state`."""
        adopt_state(self._optimizer, self._cfg.optim.name, numbers)

    def _share(self, feed: Feed) -> Tensor:
        share: Tensor = self._loss(self.model(None, feed), feed)
        return share
