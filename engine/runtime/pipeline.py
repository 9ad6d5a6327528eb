"""pp>1: DeepSpeed's pipeline over our layers, our stage bounds and our groups; ZeRO 0 and 1 over the replicas."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from deepspeed import comm as ds_comm
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.pipe import schedule
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.pipe.module import LayerSpec, PipelineModule, TiedLayerSpec
from torch import Tensor, nn

from engine.config.schema import Config
from engine.dist.context import ParallelContext
from engine.model.gpt import NextTokenLoss
from engine.model.layers import InitialWeights, LayerDef, materialize, owner_of
from engine.optim.groups import build_optimizer
from engine.parallel.logical import LogicalTensor
from engine.protocols import Batch, StepResult
from engine.runtime import gradients
from engine.runtime.compile import compile_parts, wants_compile
from engine.runtime.ds_axes import mark_parameters, topology
from engine.runtime.ds_config import clips_itself, deepspeed_config


class _Spec(LayerSpec):
    """A `LayerDef` that DeepSpeed can build when it has decided to own it."""

    def __init__(self, build: Callable[[], nn.Module]) -> None:
        super().__init__(nn.Module)
        self._build = build

    def build(self, log: bool = False) -> nn.Module:
        return self._build()


class _TiedSpec(TiedLayerSpec):
    """The same for a layer whose module serves twice."""

    def __init__(self, key: str, build: Callable[[], nn.Module], run: Callable[..., Tensor] | None) -> None:
        super().__init__(key, nn.Module, forward_fn=run, tied_weight_attr="weight")
        self._build = build

    def build(self, log: bool = False) -> nn.Module:
        return self._build()


class _Stage(PipelineModule):
    """`PipelineModule` with stage bounds decided beforehand."""

    def __init__(
        self,
        layers: Sequence[LayerDef],
        bounds: Sequence[int],
        initial: InitialWeights,
        cfg: Config,
        ctx: ParallelContext,
    ) -> None:
        self._bounds = list(bounds)
        specs: list[LayerSpec] = []
        for layer in layers:
            owner = owner_of(layers, layer).name
            build = partial(materialize, owner, layer, initial, tp=ctx.tp)
            specs.append(_Spec(build) if layer.tied_key is None else _TiedSpec(layer.tied_key, build, layer.run))
        loss = NextTokenLoss(cfg.model, ctx)
        super().__init__(specs, topology=topology(ctx), loss_fn=loss)
        mark_parameters(self.parameters())
        if wants_compile(cfg, ctx.device):
            compile_parts(self, loss)

    def _partition_layers(self, method: str = "uniform") -> None:
        self.parts = self._bounds
        self._set_bounds(start=self.parts[self.stage_id], stop=self.parts[self.stage_id + 1])

    def _synchronize_tied_weights(self) -> None:
        # Broadcasting a leaf outside no_grad makes torch warn of a wrong gradient in every backward pass.
        with torch.no_grad():
            super()._synchronize_tied_weights()


class _Engine(PipelineEngine):
    """`PipelineEngine` that calls back between the reduction of the gradients and the optimizer step."""

    before_step: Callable[[], None]

    def _exec_optimizer_step(self, lr_kwargs: dict[str, Any] | None = None) -> None:
        self.before_step()
        super()._exec_optimizer_step(lr_kwargs)

    _INSTRUCTION_MAP = {**PipelineEngine._INSTRUCTION_MAP, schedule.OptimizerStep: _exec_optimizer_step}


class PipelineRunner:
    """`Engine` over a `PipelineEngine`."""

    def __init__(
        self,
        layers: Sequence[LayerDef],
        bounds: Sequence[int],
        initial: InitialWeights,
        cfg: Config,
        ctx: ParallelContext,
    ) -> None:
        self.ctx, self._cfg = ctx, cfg
        self.on_gradients: Callable[[], None] | None = None
        self._norm: Tensor | None = None
        ds_comm.init_distributed(dist_init_required=False)
        stage = _Stage(layers, bounds, initial, cfg, ctx)
        config = deepspeed_config(cfg, ctx)
        self._ds = _Engine(
            args=None,
            model=stage,
            optimizer=build_optimizer(stage.parameters(), cfg.optim, ctx.device),
            mpu=stage.mpu(),
            dist_init_required=False,
            config=config,
            config_class=DeepSpeedConfig(config, stage.mpu()),
        )
        self._ds.before_step = self._before_step
        gradients.mend_norm(self._ds.optimizer, ctx)

    def _before_step(self) -> None:
        if self.on_gradients is not None:
            self.on_gradients()
        if not clips_itself(self._cfg):
            parameters = self._ds.module.parameters()
            self._norm = gradients.clip_by_global_norm(parameters, self._cfg.optim.clip_norm, self.ctx)

    def train_step(self, batches: Iterable[Batch], lr: float) -> StepResult:
        """See `Engine.train_step`; `batches` yields `accum_steps` micro-batches, which fill the pipeline."""
        for group in self._ds.optimizer.param_groups:
            group["lr"] = lr
        self._norm = None
        loss = self._ds.train_batch(iter(batches))
        norm = self._ds.get_global_grad_norm() if self._norm is None else self._norm
        return StepResult(loss=loss, grad_norm=torch.as_tensor(norm, device=self.ctx.device))

    def eval_step(self, batches: Iterable[Batch]) -> Tensor:
        """See `Engine.eval_step`."""
        loss: Tensor = self._ds.eval_batch(iter(batches))
        return loss

    def gradients(self) -> Iterator[tuple[LogicalTensor, Tensor]]:
        """See `Engine.gradients`."""
        value = partial(gradients.full_gradient, zero_stage=self._cfg.zero.stage)
        return gradients.read(self._ds.module.parameters(), value)

    def parameters(self) -> Iterator[tuple[LogicalTensor, Tensor]]:
        """See `Engine.parameters`."""
        return gradients.read(self._ds.module.parameters(), gradients.full_parameter)
