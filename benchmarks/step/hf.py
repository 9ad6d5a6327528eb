"""transformers' model in a plain loop: its class for the model's options, from Octant's initial weights.

python -m benchmarks.step.hf OUT.json [--variant compile|liger] [options of benchmarks.step.loop] [overrides]

`compile`: one `torch.compile` of the model, scaled-dot-product attention. `liger`: Liger's kernels for the model, and
its layers compiled. Weights, gradients and moments in `precision.dtype`, torch's fused AdamW and clipping. Nothing is
downloaded: the model is made from a configuration.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.step.loop import Step, TorchLoop, main
from engine.config.enums import Family, Recompute, Switch
from engine.config.schema import Config, OptimConfig
from engine.dist.context import ParallelContext
from engine.dist.init import DTYPES
from engine.model.batch import Batch
from engine.model.build import build_layers
from engine.model.hf import hf_names
from engine.model.hf_config import architecture, hf_config, unlike_theirs
from engine.model.layers import logical_tensors
from engine.train.kernels import choose_kernels


def build(cfg: Config, device: torch.device) -> Any:
    """transformers' model on `device` in `precision.dtype`, with the weights that Octant starts from.

    Raises:
        SystemExit: transformers has no such model.
    """
    import transformers

    if strange := unlike_theirs(cfg.model):
        raise SystemExit(
            f"transformers has no such model: {', '.join(f'{name}={value}' for name, value, _ in strange)}"
        )
    config = hf_config(cfg.model)
    config._attn_implementation = "sdpa"
    config.use_cache = False
    with torch.device(device):
        model = getattr(transformers, architecture(cfg.model))(config).to(DTYPES[cfg.precision.dtype])
    _fill(model, cfg, device)
    if cfg.train.recompute is Recompute.full:
        model.gradient_checkpointing_enable()
    return model.train()


def weights(cfg: Config, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """Octant's initial weights under transformers' names and in its layout, fp32 on the CPU, one after the other."""
    layers = build_layers(cfg, ParallelContext.single(device), choose_kernels(cfg, device).kernels)
    tensors = logical_tensors(layers)
    for own, parts in hf_names(cfg.model).items():
        value = tensors[own].draw(cfg.train.seed)
        for part in parts:
            for name in (part.name, *part.also):
                yield name, part.turned(value[part.start : part.stop])


@torch.no_grad()
def _fill(model: nn.Module, cfg: Config, device: torch.device) -> None:
    theirs = model.state_dict(keep_vars=True)
    # Constants apart, what is left over would keep weights that transformers has drawn.
    left = {name for name, _ in model.named_parameters()}
    for name, value in weights(cfg, device):
        theirs[name].copy_(value)
        left.discard(name)
    if left:
        raise RuntimeError(f"no initial weights for {', '.join(sorted(left))}")


def inputs(batch: Batch, cfg: Config, device: torch.device) -> dict[str, Any]:
    """The arguments of transformers' model: labels of the same positions, not one further to the left."""
    batch = batch.to(device)
    if cfg.model.family is Family.gpt:
        return {"input_ids": batch.tokens_BS, "labels": batch.labels_BS, "shift_labels": batch.labels_BS}
    given: dict[str, Any] = {
        "input_ids": batch.tokens_BS,
        "labels": batch.labels_BS,
        "token_type_ids": batch.token_types_BS,
        "next_sentence_label": batch.sentence_B,
    }
    if batch.lengths_B is not None:
        given["attention_mask"] = (torch.arange(batch.length, device=device) < batch.lengths_B[:, None]).long()
    return {name: value for name, value in given.items() if value is not None}


def optimizer_of(parameters: Iterable[nn.Parameter], optim: OptimConfig, device: torch.device) -> torch.optim.Optimizer:
    """torch's AdamW, fused on GPUs; norms and biases are not decayed."""
    listed = list(parameters)
    groups = [
        {"params": [p for p in listed if p.dim() > 1], "weight_decay": optim.weight_decay},
        {"params": [p for p in listed if p.dim() < 2], "weight_decay": 0.0},
    ]
    betas = (optim.beta1, optim.beta2)
    return torch.optim.AdamW(groups, lr=optim.lr, betas=betas, eps=optim.eps, fused=device.type == "cuda")


class _Shares(nn.Module):
    """transformers' arguments in, a share of the loss out: its losses are means of a micro-batch."""

    def __init__(self, model: nn.Module, count: int) -> None:
        super().__init__()
        self.model, self.count = model, count

    def forward(self, given: dict[str, Any]) -> Tensor:
        loss: Tensor = self.model(**given).loss
        return loss / self.count


def make(cfg: Config, ctx: ParallelContext, variant: str) -> Step:
    """The loop of one rank; `variant` as in the command."""
    if variant == "liger":
        _use_liger(hf_config(cfg.model).model_type)
    model = build(cfg, ctx.device)
    module = _Shares(model, cfg.train.accum_steps * ctx.dp.size)
    if cfg.kernels.compile is Switch.on or (cfg.kernels.compile is Switch.auto and ctx.device.type == "cuda"):
        if variant == "liger":
            for layer in model.get_decoder().layers:
                layer.compile()
        else:
            module.compile()
    optimizer = optimizer_of(model.parameters(), cfg.optim, ctx.device)
    given = partial(inputs, cfg=cfg, device=ctx.device)
    return TorchLoop(module, optimizer, lambda batches: [given(batch) for batch in batches], cfg, ctx)


def _use_liger(model_type: str) -> None:
    """Put Liger's kernels into the classes of one model. Raises SystemExit: it has none for it."""
    patches = import_module("liger_kernel.transformers.monkey_patch").MODEL_TYPE_TO_APPLY_LIGER_FN
    if model_type not in patches:
        raise SystemExit(f"Liger has no kernels for transformers' {model_type}")
    patches[model_type]()


if __name__ == "__main__":
    main(sys.argv[1:], make)
