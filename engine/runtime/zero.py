"""pp=1: the whole model on each tensor-parallel slice, ZeRO 0-3 over the replicas."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

from engine.config.schema import Config
from engine.dist.context import ParallelContext
from engine.model.gpt import NextTokenLoss
from engine.model.layers import InitialWeights, LayerDef, WholeModel
from engine.optim.groups import build_optimizer
from engine.parallel.logical import LogicalTensor
from engine.protocols import Batch, StepResult
from engine.runtime import gradients
from engine.runtime.compile import compile_parts, wants_compile
from engine.runtime.ds_axes import TensorDataUnit, mark_parameters
from engine.runtime.ds_config import clips_itself, deepspeed_config


class _ModelWithLoss(nn.Module):
    """What DeepSpeed sees: tokens and labels in, loss out."""

    def __init__(self, model: nn.Module, loss: nn.Module) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, tokens_BS: Tensor, labels_BS: Tensor) -> Tensor:
        loss: Tensor = self.loss(self.model(tokens_BS), labels_BS)
        return loss


class ZeroRunner:
    """`Engine` over a `DeepSpeedEngine`."""

    def __init__(self, layers: Sequence[LayerDef], initial: InitialWeights, cfg: Config, ctx: ParallelContext) -> None:
        self.ctx, self._cfg = ctx, cfg
        self.on_gradients: Callable[[], None] | None = None
        model = WholeModel(layers, initial, tp=ctx.tp)
        mark_parameters(model.parameters())
        loss = NextTokenLoss(cfg.model, ctx)
        if wants_compile(cfg, ctx.device):
            compile_parts(model, loss)
        whole = _ModelWithLoss(model, loss).to(ctx.device)
        self._ds, *_ = deepspeed.initialize(
            model=whole,
            optimizer=build_optimizer(whole.parameters(), cfg.optim, ctx.device),
            config=deepspeed_config(cfg, ctx),
            mpu=TensorDataUnit(ctx),
            dist_init_required=False,
        )
        gradients.mend_norm(self._ds.optimizer, ctx)

    def train_step(self, batches: Iterable[Batch], lr: float) -> StepResult:
        """See `Engine.train_step`; `batches` yields `accum_steps` micro-batches."""
        for group in self._ds.optimizer.param_groups:
            group["lr"] = lr
        self._ds.train()
        total = torch.zeros((), device=self.ctx.device)
        norm: Tensor | None = None
        for batch in batches:
            loss = self._ds(*(t.to(self.ctx.device, non_blocking=True) for t in batch))
            self._ds.backward(loss)
            total += loss.detach()
            if self._ds.is_gradient_accumulation_boundary():
                if self.on_gradients is not None:
                    self.on_gradients()
                if not clips_itself(self._cfg):
                    norm = gradients.clip_by_global_norm(
                        self._ds.module.parameters(), self._cfg.optim.clip_norm, self.ctx
                    )
            self._ds.step()
        if norm is None:
            norm = torch.as_tensor(self._ds.get_global_grad_norm(), device=self.ctx.device)
        return StepResult(loss=self._mean_over_replicas(total / self._cfg.train.accum_steps), grad_norm=norm)

    @torch.no_grad()
    def eval_step(self, batches: Iterable[Batch]) -> Tensor:
        """See `Engine.eval_step`."""
        self._ds.eval()
        losses = [self._ds(*(t.to(self.ctx.device) for t in batch)) for batch in batches]
        return self._mean_over_replicas(torch.stack(losses).mean())

    def gradients(self) -> Iterator[tuple[LogicalTensor, Tensor]]:
        """See `Engine.gradients`."""
        value = partial(gradients.full_gradient, zero_stage=self._cfg.zero.stage)
        return gradients.read(self._ds.module.parameters(), value)

    def parameters(self) -> Iterator[tuple[LogicalTensor, Tensor]]:
        """See `Engine.parameters`."""
        return gradients.read(self._ds.module.parameters(), gradients.full_parameter)

    def _mean_over_replicas(self, loss: Tensor) -> Tensor:
        if self.ctx.dp.group is not None:
            dist.all_reduce(loss, group=self.ctx.dp.group)
            loss /= self.ctx.dp.size
        return loss
