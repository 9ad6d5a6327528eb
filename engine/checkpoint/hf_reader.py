"""Initial weights from a Hugging Face folder: config.json and safetensors, never a pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.config.derived import ffn_size, head_dim, kv_heads, qkv_bias
from engine.config.enums import Family, Positions
from engine.config.schema import ModelConfig
from engine.errors import CheckpointError, Violation
from engine.model.hf import BERT_HEADS, HFFamily, HFNames, Stored, canonical_names, hf_family, hf_names
from engine.model.hf_options import UnreadableField, model_of, unlike_ours
from engine.model.layers import InitialWeights
from engine.parallel.logical import LogicalTensor

OPTION = "checkpoint.initial_weights"
CONFIG, SINGLE, HF_INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_SHAPES = ("family", "num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_dim", "ffn_size")
_KINDS = (
    *("positions", "parallel_residual", "norm", "norm_eps", "activation", "bias", "qkv_bias", "tied_head"),
    *("token_types", "mup_base_width"),
)


def is_hf_folder(root: Path) -> bool:
    """Whether `root` looks like one that transformers wrote, pickled or not."""
    return (root / CONFIG).is_file() or any(pickles(root)) or (root / SINGLE).is_file() or (root / HF_INDEX).is_file()


def pickles(root: Path) -> list[str]:
    """Names of files that would run code of whoever made them when they are opened."""
    return sorted(path.name for pattern in _PICKLES for path in root.glob(pattern))


def hf_reader(folder: str, model: ModelConfig, wanted: Mapping[str, LogicalTensor]) -> InitialWeights:
    """Initial weights from a Hugging Face folder, in fp32 whatever its dtype.

    Each tensor is read when it is asked for, so that a rank reads those of its layers. A BERT without heads, as
    encoders of sentences are, gets a new head for masked tokens, the same at every start.

    Args:
        model: the model of the run; the folder's config.json must mean the same.
        wanted: every logical tensor of it.

    Raises:
        CheckpointError: 616 only pickles, 617 not readable, 618 a model that ours cannot be, 619 other options, 620
            another vocabulary, 621 tensors missing or unknown, 622 a shard is missing or damaged, or another shape.
    """
    root = Path(folder)
    files = tensor_files(root)
    _require_same_model(root, model)
    names = canonical_names(hf_family(model), files)
    parts = hf_names(model)
    fresh = _new_heads(model, parts, set(names))
    _require_names(root, model, {own: stored for own, stored in parts.items() if own not in fresh}, set(names))
    where = {key: (root / files[name], name) for key, name in names.items()}
    for own, logical in wanted.items():
        for part in () if own in fresh else parts[own]:
            _require_shape(root, where[part.name], part, logical)

    def value(logical: LogicalTensor) -> Tensor:
        if logical.name in fresh:
            return logical.draw(0)
        found = []
        for part in parts[logical.name]:
            path, name = where[part.name]
            with safe_open(path, "pt") as file:
                found.append(part.turned_back(file.get_tensor(name).float()))
        return torch.cat(found) if len(found) > 1 else found[0]

    return value


def _new_heads(model: ModelConfig, parts: HFNames, names: set[str]) -> set[str]:
    """Logical tensors of a BERT's heads of which the folder has none at all."""
    if model.family is not Family.bert or any(name.startswith("cls.") for name in names):
        return set()
    return {own for own, stored in parts.items() if all(part.name.startswith("cls.") for part in stored)}


def tensor_files(root: Path) -> dict[str, str]:
    """File of each tensor of a Hugging Face folder. Raises CheckpointError: 616 only pickles, 617 none or no index."""
    if (root / HF_INDEX).is_file():
        try:
            found = {str(name): str(file) for name, file in _json(root / HF_INDEX)["weight_map"].items()}
        except (KeyError, TypeError, AttributeError) as error:
            raise _unreadable(root, f"{HF_INDEX} is no index of tensors ({error!r})") from error
        strange = sorted(
            {file for file in found.values() if Path(file).name != file or Path(file).suffix[1:] != "safetensors"}
        )
        if strange:
            raise _unreadable(root, f"{HF_INDEX} names files that are no safetensors beside it: {strange[:3]}")
        return found
    if (root / SINGLE).is_file():
        try:
            with safe_open(root / SINGLE, "pt") as file:
                return dict.fromkeys(file.keys(), SINGLE)
        except (OSError, SafetensorError) as error:
            raise _unreadable(root, f"{SINGLE} is damaged ({error})") from error
    if pickles(root):
        raise CheckpointError.of(
            616,
            OPTION,
            root,
            f"its weights are pickled ({', '.join(pickles(root))}): opening a pickle runs code of whoever made it",
            f"Name a folder with {SINGLE}: most models have one, and save_pretrained of transformers writes it",
        )
    raise _unreadable(root, f"it holds neither {SINGLE} nor {HF_INDEX}")


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _unreadable(path.parent, f"{path.name} cannot be read ({error})") from error


def _unreadable(root: Path, rule: str) -> Exception:
    way_out = f"Name a Hugging Face folder with {CONFIG} and {SINGLE} (or {HF_INDEX} and its shards)"
    return CheckpointError.of(617, OPTION, root, rule, way_out)


def _require_same_model(root: Path, model: ModelConfig) -> None:
    """Refuse what is none of our models (618), or another than the run's (619, 620), option by option."""
    raw = _json(root / CONFIG)
    try:
        strange = unlike_ours(raw)
        theirs = None if strange else model_of(raw)
    except (AttributeError, TypeError, UnreadableField) as error:
        raise _unreadable(root, f"{CONFIG} has a field without meaning ({error})") from error
    if theirs is None:
        raise CheckpointError(
            [
                Violation(
                    code=618,
                    option=OPTION,
                    value=root,
                    rule=f"its {CONFIG} has {name}={value!r}: {why}",
                    way_out="Use weights of a GPT-2, GPT-NeoX, Llama, Mistral, Qwen2 or BERT without it",
                )
                for name, value, why in strange
            ]
        )
    found = []
    for name in differing(model, theirs):
        want = _plain(theirs, name)
        code, rule = 619, f"{root / CONFIG} says {want}"
        if name == "vocab_size":
            size = "smaller" if want < model.vocab_size else "larger"
            code, rule = 620, f"the vocabulary of {root} is {size}: {want} tokens"
        out = f"model.{name}={want}"
        have = _plain(model, name)
        found.append(Violation(code=code, option=f"model.{name}", value=have, rule=rule, way_out=f"Set {out}"))
    if found:
        together = " ".join(violation.way_out.removeprefix("Set ") for violation in found)
        found[-1] = replace(found[-1], way_out=f"{found[-1].way_out}. All together: {together}")
        raise CheckpointError(found)


def differing(model: ModelConfig, theirs: ModelConfig) -> list[str]:
    """Options in which `model` is another model than `theirs`. Sentence heads and dropout are the run's own choice."""
    names = [*_SHAPES, "vocab_size", *_KINDS]
    if theirs.positions is Positions.rotary:
        names += ["rotary_base", "rotary_fraction"]
    found = [name for name in names if _plain(model, name) != _plain(theirs, name)]
    # Rotary positions have no weights: fewer of them are a part of the same model.
    more = model.max_positions > theirs.max_positions
    fewer = model.max_positions < theirs.max_positions and theirs.positions is Positions.learned
    return [*found, "max_positions"] if more or fewer else found


def _plain(model: ModelConfig, name: str) -> Any:
    """An option as it is typed, with the value that None stands for."""
    derived = {"num_kv_heads": kv_heads, "head_dim": head_dim, "ffn_size": ffn_size, "qkv_bias": qkv_bias}
    value = derived[name](model) if name in derived else getattr(model, name)
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return value


def _require_names(root: Path, model: ModelConfig, parts: Mapping[str, tuple[Stored, ...]], names: set[str]) -> None:
    """Refuse tensors that are missing or that no layer would read (621)."""
    stored = [part for several in parts.values() for part in several]
    needed = {part.name for part in stored}
    known = needed | {other for part in stored for other in part.also}
    if model.family is Family.bert:
        known |= {name for name in names if name.startswith(BERT_HEADS)}
    missing, extra = sorted(needed - names), sorted(names - known)
    if not missing and not extra:
        return
    way_out = "Copy the folder again, or use weights of the whole model"
    if hf_family(model) is HFFamily.bert and missing and all(name.startswith(BERT_HEADS) for name in missing):
        way_out = "Set model.sentence_head=none"
    rule = f"{len(missing)} tensors of this model are missing {missing[:3]}, {len(extra)} are unknown to it {extra[:3]}"
    raise CheckpointError.of(621, OPTION, root, rule, way_out)


def _require_shape(root: Path, where: tuple[Path, str], part: Stored, logical: LogicalTensor) -> None:
    """Refuse a tensor that cannot be read or has another shape than `config.json` means (622)."""
    path, name = where
    try:
        with safe_open(path, "pt") as file:
            shape = tuple(file.get_slice(name).get_shape())
    except (OSError, SafetensorError) as error:
        rule = f"{path.name} is missing or damaged ({error})"
        raise CheckpointError.of(622, OPTION, root, rule, "Copy the folder again") from error
    if shape != part.shape(logical.shape):
        expected = list(part.shape(logical.shape))
        rule = f"{name} has shape {list(shape)}, and {CONFIG} means {expected}"
        raise CheckpointError.of(622, OPTION, root, rule, "Copy the folder again: config and weights are of two models")
