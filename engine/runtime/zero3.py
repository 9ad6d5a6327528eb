"""ZeRO-3 without a whole model on any rank: each layer is cut as soon as it is built."""

from __future__ import annotations

import deepspeed
import torch
from deepspeed import comm as ds_comm
from deepspeed.runtime.zero.linear import LinearFunctionForZeroStage3
from deepspeed.runtime.zero.partition_parameters import InsertPostInitMethodToModuleSubClasses
from deepspeed.runtime.zero.utils import is_zero_param
from torch import Tensor, nn
from torch.nn import functional

from engine.config.schema import Config
from engine.dist.context import ParallelContext
from engine.dist.init import DTYPES
from engine.model.layers import Stack
from engine.runtime.ds_axes import Axes
from engine.runtime.ds_config import deepspeed_config


class Partitioner:
    """Cuts layer after layer over the ranks that share parameters (ZeRO-Infinity, arXiv 2104.07857, section 7.2).

    A rank then holds its part of every layer and one layer whole, on its device in the dtype of the run and in host
    memory in fp32. With `zero.offload_params` the parts go straight to host memory or NVMe. Parameters keep
    their attributes; weights are those of the first of the ranks. Collective.
    """

    def __init__(self, cfg: Config, ctx: ParallelContext, axes: Axes) -> None:
        ds_comm.init_distributed(dist_init_required=False)
        self._dtype = DTYPES[cfg.precision.dtype]
        self._config, self._axes = deepspeed_config(cfg, ctx), axes
        # A message for each parameter, straight to where it is used; a common one would be copied to its parts. Not in
        # the engine's configuration, where it would end reading ahead.
        self._config["zero_optimization"]["stage3_allgather_sequential"] = True
        self._disk: object | None = None

    def __call__(self, layer: nn.Module) -> nn.Module:
        """`layer`, cut in place; what an earlier call has cut stays as it is."""
        for parameter in layer.parameters():
            if not hasattr(parameter, "ds_id"):
                parameter.data = parameter.data.to(self._dtype)
        init = deepspeed.zero.Init(
            module=layer,
            data_parallel_group=self._axes.get_data_parallel_group(),
            config_dict_or_path=self._config,
            mpu=self._axes,
            param_swapper=self._disk,
        )
        # One owner of the buffers for NVMe, whatever the number of layers.
        self._disk = init.param_swapper
        return layer


def lend(model: Stack, loss: nn.Module) -> None:
    """Gather what layers of `model` lend to `loss` while that runs, as its own parameters would be."""
    for layer, module in zip(model.layers, model.parts, strict=True):
        if layer.lends:
            for parameter in module.parameters():
                deepspeed.zero.register_external_parameter(loss, parameter)


def replace_linear() -> None:
    """Give layers torch's linear where DeepSpeed has put its own in its place: in graphs, and rounded as torch does.

    A graph computes with whole weights. On torch 2.11 DeepSpeed's linear, which adds its bias in place, gives gradients
    of zero in one (https://github.com/pytorch/pytorch/issues/180642). Its backward pass also asks the weight whether it
    is cut, which ties the graph to that one: a graph for each block, and none at all from the ninth on.
    """
    functional.linear = _linear


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if torch.compiler.is_compiling() or not is_zero_param(weight):
        return _torch_linear(input, weight, bias)
    found: Tensor = _CutLinear.apply(input, weight, bias)
    return found


def _torch_linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    found: Tensor = InsertPostInitMethodToModuleSubClasses.linear_bk(input, weight, bias)
    return found


class _CutLinear(LinearFunctionForZeroStage3):
    """DeepSpeed's, which keeps no view of a weight that is cut after it, with torch's result.

    Its own rounds the product to the input's dtype, adds the bias and rounds again: in bf16 errors are 1.4 times as
    large as those of torch, which adds the bias in fp32.
    """

    @staticmethod
    def forward(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """(..., in), (out, in), (out,) -> (..., out)."""
        found = _torch_linear(input, weight, bias)
        # torch's is a view of rows, and what an autograd function returns as a view may not be changed in place.
        result: Tensor = torch.ops.aten._unsafe_view(found, found.shape)
        return result
