"""torchtitan's Llama 3 model in a plain loop, its blocks and the loss compiled as its trainer does.

python -m benchmarks.step.torchtitan OUT.json [options of benchmarks.step.loop] [overrides]

For torchtitan 0.2.2. Its trainer reads its own data sets and tokenizers and draws its own weights, so it is its model
that is measured: from Octant's initial weights, with weights, gradients and moments in `precision.dtype` and torch's
fused AdamW. Several GPUs hold a replica each.
"""

from __future__ import annotations

import sys
from functools import partial
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.step import hf
from benchmarks.step.loop import Step, TorchLoop, main
from engine.config.derived import ffn_size, head_dim, kv_heads
from engine.config.enums import Recompute, Switch
from engine.config.schema import Config
from engine.dist.context import ParallelContext
from engine.dist.init import DTYPES
from engine.model.batch import IGNORE, Batch
from engine.model.hf import HFFamily, hf_family
from engine.model.hf_config import unlike_theirs


def build(cfg: Config, device: torch.device) -> nn.Module:
    """torchtitan's model on `device` in `precision.dtype`, with the weights that Octant starts from.

    Raises:
        SystemExit: torchtitan's Llama is another model, or recomputation is asked for, which its trainer adds.
    """
    model = cfg.model
    same = hf_family(model) is HFFamily.llama and not unlike_theirs(model) and not (model.bias or model.tied_head)
    if not same or head_dim(model) * model.num_heads != model.hidden_size:
        raise SystemExit(f"torchtitan's Llama 3 is another model than {model.name}")
    if cfg.train.recompute is not Recompute.none:
        raise SystemExit("recomputation is a part of torchtitan's trainer, not of its model")
    theirs = import_module("torchtitan.models.llama3")
    scaling = import_module("torchtitan.models.llama3.model.args").RoPEScalingArgs
    args = theirs.TransformerModelArgs(
        dim=model.hidden_size,
        n_layers=model.num_layers,
        n_heads=model.num_heads,
        n_kv_heads=kv_heads(model),
        vocab_size=model.vocab_size,
        # The inner width is 8/3 of dim times a factor, here 2, rounded up to a multiple.
        multiple_of=ffn_size(model),
        ffn_dim_multiplier=1 / model.hidden_size,
        norm_eps=model.norm_eps,
        rope_theta=model.rotary_base,
        rope_scaling_args=scaling(scaling_factor=1.0),
        max_seq_len=cfg.data.seq_len,
    )
    with torch.device(device):
        made: nn.Module = theirs.Transformer(args)
    for parameter in made.parameters():
        # The rotary table is complex and stays as it is.
        parameter.data = parameter.data.to(DTYPES[cfg.precision.dtype])
    adapter = theirs.Llama3StateDictAdapter(args, None)
    named = dict(made.named_parameters())
    with torch.no_grad():
        for name, value in hf.weights(cfg, device):
            ((own, turned),) = adapter.from_hf({name: value}).items()
            named.pop(own).copy_(turned)
    if named:
        raise RuntimeError(f"no initial weights for {', '.join(sorted(named))}")
    return made.train()


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE)


class _Shares(nn.Module):
    """Tokens and labels in, a share of the loss out."""

    def __init__(self, model: nn.Module, count: int, compiled: bool) -> None:
        super().__init__()
        self.model, self.count = model, count
        self.loss: Any = torch.compile(_cross_entropy) if compiled else _cross_entropy

    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        tokens, labels = batch
        share: Tensor = self.loss(self.model(tokens), labels) / self.count
        return share


def make(cfg: Config, ctx: ParallelContext, variant: str) -> Step:
    """The loop of one rank; there are no variants."""
    model = build(cfg, ctx.device)
    compiled = cfg.kernels.compile is Switch.on or (cfg.kernels.compile is Switch.auto and ctx.device.type == "cuda")
    if compiled:
        for layer in model.get_submodule("layers").children():
            layer.compile(fullgraph=True)
    module = _Shares(model, cfg.train.accum_steps * ctx.dp.size, compiled)
    optimizer = hf.optimizer_of(model.parameters(), cfg.optim, ctx.device)
    return TorchLoop(module, optimizer, partial(_feeds, device=ctx.device), cfg, ctx)


def _feeds(batches: list[Batch], device: torch.device) -> list[tuple[Tensor, Tensor]]:
    moved = [batch.to(device) for batch in batches]
    return [(batch.tokens_BS, batch.labels_BS) for batch in moved]


if __name__ == "__main__":
    main(sys.argv[1:], make)
