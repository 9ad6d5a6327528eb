"""The README.md of an exported model: what it is and how it was trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.config.enums import DType, Family
from engine.config.schema import Config
from engine.model.hf_config import architecture


def model_card(facts: Mapping[str, Any], cfg: Config, dtype: DType, total: int, tokenizer: bool) -> str:
    """The page.

    Args:
        facts: of the checkpoint, from its manifest.
        total: bytes of the tensors.
        tokenizer: whether the model's tokenizer is beside it.
    """
    model, layout, train = cfg.model, cfg.parallel, cfg.train
    metrics, versions = facts.get("metrics", {}), facts.get("environment", {}).get("packages", {})
    data = (
        ", ".join(f"{name} ({share:g})" for name, share in cfg.data.blend.items())
        if cfg.data.blend
        else cfg.data.source
    )
    degrees = f"pp {layout.pp}, tp {layout.tp}, context {layout.context}, dp {layout.dp or 'as launched'}"
    size = f"{model.num_layers} blocks, width {model.hidden_size}, {model.num_heads} heads, {model.vocab_size} tokens"
    rows = {
        "architecture": f"{architecture(model)}: {size}, {model.max_positions} positions",
        "tensors": f"{dtype}, {total:,} bytes",
        "steps": facts["step"],
        "samples": facts["samples"],
        **{name.replace("_", " "): f"{float(value):.4f}" for name, value in metrics.items() if name.endswith("loss")},
        "data": data,
        "sequence length": cfg.data.seq_len,
        "seeds": f"train {train.seed}, data {cfg.data.seed}",
        "optimizer": f"{cfg.optim.name}, peak learning rate {cfg.optim.lr:g}",
        "trained in": f"{cfg.precision.dtype}, ZeRO-{cfg.zero.stage}, {degrees}",
        **({"torch": versions["torch"]} if "torch" in versions else {}),
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    loader = architecture(model) if model.family is Family.bert else "AutoModelForCausalLM"
    lines = [f"from transformers import AutoTokenizer, {loader}" if tokenizer else f"from transformers import {loader}"]
    lines.append(f'model = {loader}.from_pretrained("FOLDER")')
    if tokenizer:
        lines.append('tokenizer = AutoTokenizer.from_pretrained("FOLDER")')
    code = "\n".join(lines)
    return (
        f"---\nlibrary_name: transformers\n---\n\n# {cfg.run.name}\n\n{model.name}, trained with Octant.\n\n"
        f"| | |\n|---|---|\n{table}\n\n```python\n{code}\n```\n"
    )
