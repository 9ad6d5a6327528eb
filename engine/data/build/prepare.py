"""From sources to cache entries: the tokenizer first, then shards of tokens on all cores, then one file per split."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.config.enums import BadFiles
from engine.config.schema_data import DataConfig
from engine.data.build.cache import (
    FORMAT,
    META,
    RANDOM_SOURCE,
    SPLITS,
    TOKENIZER,
    TOKENIZER_META,
    entry_folder,
    file_digest,
    folder_digest,
    sealed,
    tokenizer_digest,
    tokenizer_folder,
    trains_tokenizer,
    verify_entry,
    weights,
    writable,
)
from engine.data.build.census import Census
from engine.data.build.foreign import foreign_entry
from engine.data.build.lock import Owner, OwnershipLost, builder_lock, owner_file
from engine.data.build.pool import build_shards
from engine.data.build.progress import Progress
from engine.data.build.sample import sample_texts
from engine.data.build.shard import RECORD, Job, Shard, build_shard, cut_shards, labels_file, rename_once
from engine.data.corpus.documents import bad_file, no_documents, units
from engine.data.corpus.units import Problem
from engine.data.storage.files import read_json, write_json
from engine.data.storage.indexed import IndexedFile, merge
from engine.data.storage.prefix import is_prefix
from engine.data.tokenizer.folder import load_tokenizer, make_tokenizer
from engine.data.tokenizer.vocabulary import Vocabulary, vocabulary_of
from engine.errors import DataError

Say = Callable[[str], None]
_SHOWN_PROBLEMS = 10


def prepare(cfg: DataConfig, say: Say, *, shard_bytes: int | None = None, verify: bool = True) -> None:
    """Make sure that the cache holds the tokenizer and the token files for `cfg`; `cache.entries` tells where.

    `say` gets lines about the progress. Any number of processes may call this at once, on one machine or on a shared
    file system: one builds, the others wait and use its result. A build that ends early, however it does, goes on
    with its finished shards the next time. A finished entry is compared with its digests; nothing is written then, so
    the cache may be read-only. For the source `random` there is nothing to do.

    Args:
        shard_bytes: bytes of input of a shard, in place of what `cut_shards` takes.
        verify: False leaves the comparison to another process of this machine.

    Raises DataError: 40x and 44x the corpus and the tokenizer, 413 and 43x a damaged entry, 414 and 439 the cache
    folder cannot be written, 415 a held-out split is empty, 416 the training split is, 450 a worker died, 451 another
    builder hangs, 452 a Megatron prefix without a tokenizer, 455 data.kind of a prefix.
    """
    sources = list(weights(cfg))
    if RANDOM_SOURCE in sources:
        return
    for source in sources:
        if trains_tokenizer(cfg) and is_prefix(source):
            rule = f"{source} is a Megatron prefix: it holds tokens, and a tokenizer is trained on text"
            way_out = "Set data.tokenizer to the tokenizer that made it"
            raise DataError.of(452, "data.tokenizer", cfg.tokenizer, rule, way_out)
    tokenizer = tokenizer_folder(cfg)
    _build_once(cfg, tokenizer, TOKENIZER_META, say, lambda partial, owner: _make_tokenizer(cfg, partial, owner, say))
    digest = tokenizer_digest(tokenizer)
    for source in sources:
        folder = entry_folder(cfg, source, digest)
        entry = _Entry(cfg, source, folder, tokenizer, digest, shard_bytes, say)
        if not _build_once(cfg, folder, META, say, entry.build) and verify:
            started = time.monotonic()
            meta = verify_entry(folder)
            for path, reason in meta["problems"][:1] if cfg.bad_files is BadFiles.stop else ():
                raise bad_file(cfg, Problem(path, reason))
            took = time.monotonic() - started
            say(f"data: using {folder}" + (f", verified in {took:.1f} s" if took > 1 else ""))


def _build_once(cfg: DataConfig, folder: Path, record: str, say: Say, build: Callable[[Path, Owner], Path]) -> bool:
    """Unless `folder` has its `record`, call `build` with FOLDER.partial and rename what it returns to `folder`.

    False: it was there, or another process built it.
    """
    partial = folder.with_name(f"{folder.name}.partial")
    while not (folder / record).is_file() or _left_over(folder, partial):
        with writable(folder.parent):
            folder.parent.mkdir(parents=True, exist_ok=True)
            try:
                with builder_lock(folder, say, cfg.wait_s) as owner:
                    missing = not (folder / record).is_file()
                    if missing:
                        partial.mkdir(exist_ok=True)
                        _clean(partial)
                        try:
                            done = build(partial, owner)
                            owner.check()
                            rename_once(done, folder, folder / record)
                        except BaseException:
                            shutil.rmtree(_final(partial, owner), ignore_errors=True)
                            raise
                    shutil.rmtree(partial, ignore_errors=True)
                return missing
            except OwnershipLost:
                say(f"data: another process took over {folder}, as this one was silent for too long")
    return False


def _left_over(folder: Path, partial: Path) -> bool:
    """Whether a builder was killed just after it was done, and what it left can be removed."""
    return (partial.exists() or owner_file(folder).exists()) and os.access(folder.parent, os.W_OK)


def _clean(partial: Path) -> None:
    """Remove what killed processes left half done; names of finished shards have no dot."""
    for path in partial.glob("*.*"):
        shutil.rmtree(path, ignore_errors=True)


def _final(partial: Path, owner: Owner) -> Path:
    """Where `owner` puts what is to become the entry; finished shards lie beside it and outlast a failure."""
    return partial / f"final.{owner.token}"


def _make_tokenizer(cfg: DataConfig, partial: Path, owner: Owner, say: Say) -> Path:
    folder = _final(partial, owner)
    folder.mkdir()
    if trains_tokenizer(cfg):
        say(f"data: training the tokenizer {cfg.tokenizer} with {cfg.vocab_size} entries")
    make_tokenizer(cfg.tokenizer, cfg.vocab_size, lambda: sample_texts(cfg, list(weights(cfg)), say), folder)
    write_json(folder / TOKENIZER_META, {"format": FORMAT, "tokenizer": cfg.tokenizer, "digest": folder_digest(folder)})
    return folder


@dataclass(frozen=True, slots=True)
class _Entry:
    """What it takes to build the entry of one source."""

    cfg: DataConfig
    source: str
    folder: Path
    tokenizer: Path
    tokenizer_digest: str
    shard_bytes: int | None
    say: Say

    def build(self, partial: Path, owner: Owner) -> Path:
        """Build it in FOLDER.partial; the finished folder."""
        started = time.monotonic()
        vocabulary = vocabulary_of(self.tokenizer)
        final = _final(partial, owner)
        final.mkdir()
        shutil.copytree(self.tokenizer, final / TOKENIZER, ignore=shutil.ignore_patterns(TOKENIZER_META))
        if is_prefix(self.source):
            self.say(f"data: reading {self.source}.bin to split its documents")
            facts = foreign_entry(self.cfg, self.source, vocabulary, final, self.say)
        else:
            facts = self._tokens(vocabulary, partial, final, owner)
        content = [self.tokenizer_digest, {name: split["digest"] for name, split in facts["splits"].items()}]
        meta = {
            "format": FORMAT,
            "source": self.source,
            "kind": str(self.cfg.kind),
            "vocab_size": vocabulary.size,
            "end": vocabulary.end,
            "valid_fraction": self.cfg.valid_fraction,
            "test_fraction": self.cfg.test_fraction,
            "max_bytes": self.cfg.max_bytes,
            "tokenizer": self.tokenizer_digest,
            "fingerprint": hashlib.blake2b(json.dumps(content).encode(), digest_size=16).hexdigest(),
            **facts,
        }
        write_json(final / META, sealed(meta))
        counts = ", ".join(f"{split['tokens']} {name}" for name, split in facts["splits"].items())
        took = time.monotonic() - started
        self.say(f"data: {self.folder}: {counts} tokens, vocabulary {vocabulary.size}, {took:.1f} s")
        return final

    def _tokens(self, vocabulary: Vocabulary, partial: Path, final: Path, owner: Owner) -> dict[str, Any]:
        found = units(self.cfg, self.source)
        shards = cut_shards(found, self.shard_bytes)
        job = Job(
            cfg=self.cfg, tokenizer=self.tokenizer, vocab_size=vocabulary.size, end=vocabulary.end, folder=partial
        )
        self._run(job, shards, owner)
        records = [read_json(partial / shard.name / RECORD) for shard in shards]
        census = Census()
        for record in records:
            census.add(Census.from_json(record["census"]))
        problems = [Problem(*problem) for record in records for problem in record["problems"]]
        self._show(problems)
        if not census.counts:
            raise no_documents(self.cfg, self.source, len(found), problems)
        census.check(self.cfg, self.source)
        splits = {}
        for name in (split for split in SPLITS if split in census.counts):
            parts = [
                partial / shard.name for shard, record in zip(shards, records, strict=True) if name in record["digests"]
            ]
            merge([part / name for part in parts], final / name, vocabulary.size)
            labels = [part for part in parts if labels_file(part, name).is_file()]
            if labels:
                np.save(labels_file(final, name), np.concatenate([np.load(labels_file(part, name)) for part in labels]))
            splits[name] = _facts(final, name)
            owner.advance(-len(splits))
        types = [record["label_type"] for record in records if record["label_type"]]
        return {
            "prefix": None,
            "splits": splits,
            "bytes": sum(shard.size for shard in shards),
            "label_type": types[0] if types else None,
            "problems": [[problem.path, problem.reason] for problem in problems],
        }

    def _run(self, job: Job, shards: Sequence[Shard], owner: Owner) -> None:
        total = sum(shard.size for shard in shards)
        workers = min(self.cfg.workers or len(os.sched_getaffinity(0)), len(shards))
        self.say(f"data: building {self.folder} from {self.source} ({total / 1e6:.1f} MB, {len(shards)} shards)")
        progress = Progress(self.say, "tokens", total, workers)

        def moved(size: int) -> None:
            progress.add(size)
            owner.advance(progress.done)

        if len(shards) == 1:
            # One shard needs no other process: the library's threads have all cores for it.
            kept = [s for s in shards if build_shard(job, s, lambda: load_tokenizer(job.tokenizer), moved)]
        else:
            kept = build_shards(job, shards, workers, moved)
        progress.end(f"{len(kept)} of {len(shards)} shards were there already" if kept else "")

    def _show(self, problems: Sequence[Problem]) -> None:
        for problem in problems[:_SHOWN_PROBLEMS]:
            self.say(f"data: left out {problem}")
        if len(problems) > _SHOWN_PROBLEMS:
            self.say(f"data: left out {len(problems)} in all; {META} of the entry lists them")


def _facts(final: Path, name: str) -> dict[str, Any]:
    """What the meta file says of one split."""
    file = IndexedFile.open(final / name, "data.cache_dir")
    files = [f"{name}.sums.json", *(path.name for path in [labels_file(final, name)] if path.is_file())]
    return {
        "documents": file.num_documents,
        "sequences": file.num_sequences,
        "tokens": file.num_tokens,
        "digest": file.digest,
        "files": {path: file_digest(final / path) for path in files},
    }
