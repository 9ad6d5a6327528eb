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
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from engine.checkpoint.hf_reader import CONFIG, HF_INDEX, SINGLE
from engine.checkpoint.initial import weights_of
from engine.checkpoint.manifest import MANIFEST
from engine.checkpoint.model_card import model_card
from engine.checkpoint.reader import Reader
from engine.config.enums import DType, Family
from engine.config.load import from_dict
from engine.config.schema import Config, ModelConfig
from engine.data.tokenizer.vocabulary import vocabulary_of
from engine.errors import CheckpointError, EngineError, Violation
from engine.model.hf import Stored, hf_names
from engine.model.hf_config import hf_config, unlike_theirs
from engine.optim.state import WEIGHT
from engine.parallel.rectangles import Rectangle, matrix_shape

DTYPES = {DType.fp32: torch.float32, DType.bf16: torch.bfloat16, DType.fp16: torch.float16}
_MARGIN = 1 << 24
"""Bytes on disk for everything but the tensors."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor to write: its name there, the part of the logical tensor `own`, and its size in bytes."""

    name: str
    own: str
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
    """Write final weights of a run, or a checkpoint's, as a folder that transformers loads; complete or not at all.

    Args:
        shard_size: most bytes of one file of tensors; a larger tensor has a file of its own.
        tokenizer: a folder to copy instead of the tokenizer in the run's data cache.
        overwrite: replace an earlier export.

    Raises:
        CheckpointError: 611 `source` has no weights, 623 they are another model's, 632 damaged, 624 transformers has
            no such model, 625 `out` exists, 626 the disk is too small, 627 it cannot be written, 628 the tokenizer does
            not fit, 629 fp16 cannot hold a value.
        ConfigError: 110 the run's options cannot be read.
    """
    reader = weights_of(source, "SOURCE")
    cfg = run_config(reader)
    _require_one_of_theirs(cfg.model)
    reader.verify()
    entries = plan(reader, cfg.model, DTYPES[dtype])
    _require_free_name(out, overwrite)
    words = tokenizer or tokenizer_of(cfg, say)
    end = None if words is None else _end_token(words, cfg.model)
    total = sum(entry.size for entry in entries)
    partial = out.with_name(f"{out.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _require_space(partial, total)
        write_shards(partial, reader, entries, DTYPES[dtype], shard_size, say)
        _write_config(partial, cfg.model, dtype, end)
        if words is not None:
            _copy_tokenizer(words, partial)
        (partial / "README.md").write_text(
            model_card(reader.manifest.facts, cfg, dtype, total, words is not None), encoding="utf-8"
        )
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


def _copy_tokenizer(words: Path, folder: Path) -> None:
    """What describes the cache stays there, and config.json and weights are the model's."""
    for path in sorted(words.iterdir()):
        if path.is_file() and path.name not in ("octant.json", CONFIG) and path.suffix in (".json", ".txt", ".model"):
            shutil.copyfile(path, folder / path.name)


def run_config(reader: Reader) -> Config:
    """The options of the run that wrote a checkpoint. Raises ConfigError 110: they are not those of this version."""
    return from_dict(reader.manifest.facts.get("config"), f"{reader.folder / MANIFEST}")


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


def plan(reader: Reader, model: ModelConfig, dtype: torch.dtype) -> list[Entry]:
    """What is to be written, in the order of the model's layers. Raises CheckpointError 623: another model's names."""
    names, shapes = hf_names(model), reader.manifest.shapes.get(WEIGHT, {})
    strange = sorted(names.keys() ^ shapes.keys())
    if strange:
        rule = f"its weights are not those of the model in its {MANIFEST}: {', '.join(strange[:3])}"
        raise CheckpointError.of(623, "SOURCE", reader.folder, rule, "Name a run or a checkpoint that Octant wrote")
    found = []
    for own, parts in names.items():
        for part in parts:
            size = prod(part.shape(shapes[own])) * dtype.itemsize
            written = (part.name,) if model.tied_head or own != "head.bias.weight" else (part.name, *part.also)
            found += [Entry(name, own, part, size) for name in written]
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


def write_shards(
    folder: Path, reader: Reader, entries: list[Entry], dtype: torch.dtype, most: int, say: Callable[[str], None]
) -> None:
    """The tensors in transformers' layout of files: one, or several with an index. Raises CheckpointError 629."""
    cut = shards(entries, most)
    where: dict[str, str] = {}
    for number, shard in enumerate(cut, start=1):
        file = SINGLE if len(cut) == 1 else f"model-{number:05d}-of-{len(cut):05d}.safetensors"
        save_file({entry.name: read(reader, entry, dtype) for entry in shard}, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys((entry.name for entry in shard), file)
        say(f"{file}: {len(shard)} tensors")
    if len(cut) > 1:
        index = {"metadata": {"total_size": sum(entry.size for entry in entries)}, "weight_map": where}
        (folder / HF_INDEX).write_text(json.dumps(index, indent=1))


def read(reader: Reader, entry: Entry, dtype: torch.dtype) -> Tensor:
    """One tensor in their layout and in `dtype`; no more than its rows are read."""
    shape = reader.manifest.shapes[WEIGHT][entry.own]
    height, columns = matrix_shape(shape)
    first, last = entry.part.start, height if entry.part.stop is None else entry.part.stop
    rows = torch.empty(last - first, columns)
    reader.read(WEIGHT, entry.own, Rectangle(first, last, 0, columns), rows)
    rows = rows.view(last - first, *shape[1:])
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
