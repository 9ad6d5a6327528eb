"""ZeRO-3 without a whole model on any rank: each layer is cut as soon as it is built."""

from __future__ import annotations

import deepspeed
import torch
from deepspeed import comm as ds_comm
from deepspeed.runtime.zero import linear as ds_linear
from deepspeed.runtime.zero.utils import is_zero_param
from torch import nn

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


def share_graphs() -> None:
    """Let all compiled blocks have one graph: what they compute with is whole, so their linears need not ask.

    The backward pass of DeepSpeed's linear asks each weight whether it is cut. torch 2.11 then ties a graph to the
    weight's number: a graph for each block, and none at all from the ninth on.
    """
    ds_linear.is_zero_param = _may_be_cut


def _may_be_cut(parameter: object) -> bool:
    return not torch.compiler.is_compiling() and is_zero_param(parameter)
