"""From a run's weights to a Hugging Face folder, tensor by tensor; never more than one shard in memory."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from engine.checkpoint.hf_reader import CONFIG, HF_INDEX, SINGLE
from engine.checkpoint.model_card import model_card
from engine.checkpoint.weights import INDEX
from engine.config.enums import DType, Family
from engine.config.load import read_resolved
from engine.config.schema import Config, ModelConfig
from engine.data.tokenizer.vocabulary import vocabulary_of
from engine.errors import CheckpointError, EngineError, Violation
from engine.model.hf import Stored, hf_names
from engine.model.hf_config import hf_config, unlike_theirs

DTYPES = {DType.fp32: torch.float32, DType.bf16: torch.bfloat16, DType.fp16: torch.float16}
_MARGIN = 1 << 24
"""Bytes on disk for everything but the tensors."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor to write: its name there, the part of the logical tensor `own` in `path`, and its size in bytes."""

    name: str
    own: str
    path: Path
    part: Stored
    size: int


def export(
    source: Path,
    out: Path,
    *,
    dtype: DType = DType.fp32,
    shard_size: int = 5 * 10**9,
    tokenizer: Path | None = None,
    overwrite: bool = False,
    say: Callable[[str], None] = print,
) -> None:
    """Write run folder `source` as a folder that transformers loads; complete or not there at all.

    Args:
        shard_size: most bytes of one file of tensors; a larger tensor has a file of its own.
        tokenizer: a folder to copy instead of the tokenizer in the run's data cache.
        overwrite: replace an earlier export.

    Raises:
        CheckpointError: 623 `source` has no weights, 624 transformers has no such model, 625 `out` exists, 626 the disk
            is too small, 627 it cannot be written, 628 the tokenizer does not fit, 629 fp16 cannot hold a value.
        ConfigError: 110 config.yaml cannot be read.
    """
    cfg = run_config(source)
    _require_one_of_theirs(cfg.model)
    entries = plan(source, cfg.model, DTYPES[dtype])
    _require_free_name(out, overwrite)
    words = tokenizer or tokenizer_of(cfg, say)
    end = None if words is None else _end_token(words, cfg.model)
    total = sum(entry.size for entry in entries)
    partial = out.with_name(f"{out.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _require_space(partial, total)
        write_shards(partial, entries, DTYPES[dtype], shard_size, say)
        _write_config(partial, cfg.model, dtype, end)
        if words is not None:
            for path in sorted(words.iterdir()):
                # Ours describes the cache, and config.json and weights are the model's.
                if (
                    path.is_file()
                    and path.name not in ("octant.json", CONFIG)
                    and path.suffix in (".json", ".txt", ".model")
                ):
                    shutil.copyfile(path, partial / path.name)
        (partial / "README.md").write_text(model_card(source, cfg, dtype, total, words is not None), encoding="utf-8")
        for path in partial.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        if out.exists():
            shutil.rmtree(out)
        os.replace(partial, out)
    except (OSError, SafetensorError) as error:
        way_out = "Name a folder on a disk with room that this user may write"
        raise CheckpointError.of(627, "OUT", out, f"it cannot be written ({error})", way_out) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    say(f"wrote {out}: {len(entries)} tensors, {total:,} bytes")


def run_config(source: Path) -> Config:
    """The options of run folder `source`. Raises CheckpointError 623: it is none, or has no weights."""
    lacking = [name for name in ("config.yaml", f"weights/{INDEX}") if not (source / name).is_file()]
    if lacking:
        rule = f"it has no {' and no '.join(lacking)}"
        way_out = "Name the folder of a run that ended with checkpoint.save_final=true, such as runs/mine"
        raise CheckpointError.of(623, "SOURCE", source, rule, way_out)
    return read_resolved(source / "config.yaml")


def _require_one_of_theirs(model: ModelConfig) -> None:
    strange = unlike_theirs(model)
    if strange:
        rule = "transformers' model has {want} there, and no other code would load these weights"
        way_out = "Train with model.{name}; weights/ itself is plain safetensors"
        raise CheckpointError(
            [
                Violation(
                    code=624,
                    option=option,
                    value=value,
                    rule=rule.format(want=want),
                    way_out=way_out.format(
                        name=f"{option.removeprefix('model.')}={want if want != 'None' else 'null'}"
                    ),
                )
                for option, value, want in strange
            ]
        )


def plan(source: Path, model: ModelConfig, dtype: torch.dtype) -> list[Entry]:
    """What is to be written, in the order of the model's layers. Raises CheckpointError 623: weights are damaged."""
    root = source / "weights"
    names = hf_names(model)
    found = []
    try:
        where = json.loads((root / INDEX).read_text())["weight_map"]
        lacking = sorted(names.keys() ^ where.keys())
        if lacking:
            raise KeyError(f"not in both config.yaml's model and the index: {', '.join(lacking[:3])}")
        for own, file in where.items():
            with safe_open(root / file, "pt") as shard:
                shape = tuple(shard.get_slice(own).get_shape())
            for part in names[own]:
                size = prod(part.shape(shape)) * dtype.itemsize
                written = (part.name,) if model.tied_head or own != "head.bias.weight" else (part.name, *part.also)
                found += [Entry(name, own, root / file, part, size) for name in written]
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        way_out = "Copy the run folder again, or train again"
        raise CheckpointError.of(623, "SOURCE", source, f"its weights are damaged ({error})", way_out) from error
    return found


def tokenizer_of(cfg: Config, say: Callable[[str], None]) -> Path | None:
    """The run's tokenizer in the data cache, where it still is."""
    from engine.data.build.cache import RANDOM_SOURCE, TOKENIZER_META, tokenizer_folder

    if cfg.data.source == RANDOM_SOURCE and not cfg.data.blend:
        return None
    try:
        folder = tokenizer_folder(cfg.data)
        if (folder / TOKENIZER_META).is_file():
            return folder
        reason = f"{folder} is not there"
    except (EngineError, OSError) as error:
        reason = str(error)
    say(f"no tokenizer is copied, give one with --tokenizer: {reason}")
    return None


def _end_token(folder: Path, model: ModelConfig) -> int:
    """The token that ends a document. Raises CheckpointError 628: no tokenizer of this model."""
    way_out = "Name the folder with the tokenizer.json that the run was trained with"
    try:
        vocabulary = vocabulary_of(folder)
    except EngineError as error:
        raise CheckpointError.of(628, "--tokenizer", folder, error.violations[0].rule, way_out) from error
    if vocabulary.size > model.vocab_size:
        rule = f"it has {vocabulary.size} tokens, and the model {model.vocab_size} (model.vocab_size)"
        raise CheckpointError.of(628, "--tokenizer", folder, rule, way_out)
    return vocabulary.end


def _require_free_name(out: Path, overwrite: bool) -> None:
    """Refuse what is there already, and to replace anything but an earlier export (625)."""
    if not out.exists():
        return
    if not overwrite:
        raise CheckpointError.of(625, "OUT", out, "it exists already", "Take another name, or add --overwrite")
    if out.is_symlink() or not (out / CONFIG).is_file():
        rule = f"--overwrite replaces earlier exports only, and this has no {CONFIG}"
        raise CheckpointError.of(625, "OUT", out, rule, "Take another name")


def _require_space(folder: Path, total: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < total + _MARGIN:
        rule = f"the tensors need {total:,} bytes, and its disk has {free:,} left"
        raise CheckpointError.of(
            626, "OUT", folder.with_suffix(""), rule, "Free space, or use --dtype bf16: half of fp32"
        )


def shards(entries: list[Entry], most: int) -> list[list[Entry]]:
    """Consecutive entries, each shard at most `most` bytes or a single tensor."""
    found: list[list[Entry]] = []
    size = 0
    for entry in entries:
        if not found or size + entry.size > most:
            found.append([])
            size = 0
        found[-1].append(entry)
        size += entry.size
    return found


def write_shards(folder: Path, entries: list[Entry], dtype: torch.dtype, most: int, say: Callable[[str], None]) -> None:
    """The tensors in transformers' layout of files: one, or several with an index. Raises CheckpointError 629."""
    cut = shards(entries, most)
    where: dict[str, str] = {}
    for number, shard in enumerate(cut, start=1):
        file = SINGLE if len(cut) == 1 else f"model-{number:05d}-of-{len(cut):05d}.safetensors"
        save_file({entry.name: read(entry, dtype) for entry in shard}, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys((entry.name for entry in shard), file)
        say(f"{file}: {len(shard)} tensors")
    if len(cut) > 1:
        index = {"metadata": {"total_size": sum(entry.size for entry in entries)}, "weight_map": where}
        (folder / HF_INDEX).write_text(json.dumps(index, indent=1))


def read(entry: Entry, dtype: torch.dtype) -> Tensor:
    """One tensor in their layout and in `dtype`; no more than its rows are read."""
    with safe_open(entry.path, "pt") as file:
        rows: Tensor = file.get_slice(entry.own)[entry.part.start : entry.part.stop]
    value = entry.part.turned(rows).to(dtype).contiguous()
    if dtype is torch.float16 and not torch.equal(value.isfinite(), entry.part.turned(rows).isfinite()):
        largest = float(rows.abs().max())
        rule = f"{entry.own} has values up to {largest:g}, and fp16 ends at 65504"
        raise CheckpointError.of(629, "--dtype", "fp16", rule, "Use --dtype bf16, or fp32")
    return value


def _write_config(folder: Path, model: ModelConfig, dtype: DType, end: int | None) -> None:
    import transformers

    config = hf_config(model, end)
    config.dtype = str(DTYPES[dtype]).removeprefix("torch.")
    (folder / CONFIG).write_text(config.to_json_string(use_diff=True), encoding="utf-8")
    if model.family is Family.gpt:
        ids = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
        transformers.GenerationConfig(**ids, max_length=model.max_positions).save_pretrained(folder)
