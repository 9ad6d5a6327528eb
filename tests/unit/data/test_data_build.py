"""Building cache entries: what they hold, reuse, competing and dying builders."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from engine.config.enums import SampleKind
from engine.data.build import prepare as build
from engine.data.build.cache import entries, read_meta
from engine.data.build.lock import machine, owner_file
from engine.data.build.prepare import prepare
from engine.data.build.shard import build_shard
from engine.data.corpus.documents import Document, split_position
from engine.data.storage.indexed import IndexedFile
from engine.data.tokenizer.folder import load_tokenizer
from engine.errors import DataError
from tests.unit.data.build_helpers import built, content, counts, make_corpus, quiet, refused
from tests.unit.data.data_options import config

PREPARE = """
import sys
from engine.config.schema_data import DataConfig
from engine.data.build import prepare as build
{before}
options = dict(source=sys.argv[1], cache_dir=sys.argv[2], seq_len=8, vocab_size=300, valid_fraction=0.3)
build.prepare(DataConfig(**options), lambda line: print(line, flush=True))
"""
HOLD_BEFORE_META = """
written = build.write_json
def hold(path, content):
    if path.name == "meta.json":
        print("all but meta.json written", flush=True)
        sys.stdin.readline()
    written(path, content)

build.write_json = hold
"""


def start(root: Path, before: str = "") -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PREPARE.format(before=before), str(root / "corpus"), str(root / "cache")]
    repository = Path(__file__).parents[3]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=repository)


def read_until(process: subprocess.Popen[str], words: str) -> None:
    assert process.stdout is not None
    assert any(words in line for line in process.stdout), f"ended without {words!r}"


def texts(folder: Path, name: str) -> list[str]:
    """Documents of a split, each ended by the token that ends documents."""
    file, tokenizer = IndexedFile.open(folder / name), load_tokenizer(folder / "tokenizer")
    end = read_meta(folder)["end"]
    found = [file.document(number).tolist() for number in range(file.num_documents)]
    assert all(ids[-1] == end and end not in ids[:-1] for ids in found)
    return [tokenizer.decode(ids[:-1]) for ids in found]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_corpus(tmp_path, 12)


def test_splits_hold_all_documents_in_order_each_ended_once(root: Path) -> None:
    cfg = config(root, test_fraction=0.3)
    folder = built(cfg)
    found = {name: texts(folder, name) for name in ("train", "valid", "test")}
    expected: dict[str, list[str]] = {"train": [], "valid": [], "test": []}
    for path in sorted((root / "corpus").iterdir()):
        position = split_position(Document("", (path.read_text(),)))
        expected["valid" if position < 0.3 else "test" if position < 0.6 else "train"].append(path.read_text())
    assert found == expected and all(found.values())
    meta = read_meta(folder)
    assert counts(folder) == {name: len(documents) for name, documents in expected.items()}
    for name, split in meta["splits"].items():
        file = IndexedFile.open(folder / name)
        facts = {key: split[key] for key in ("documents", "sequences", "tokens", "digest")}
        sizes = {"documents": file.num_documents, "sequences": file.num_sequences, "tokens": file.num_tokens}
        assert facts == {**sizes, "digest": file.digest}
    assert (meta["kind"], meta["prefix"], meta["label_type"], meta["problems"]) == ("text", None, None, [])
    assert meta["vocab_size"] == load_tokenizer(folder / "tokenizer").get_vocab_size() <= 300
    assert meta["bytes"] == sum(path.stat().st_size for path in (root / "corpus").iterdir())


def records(path: Path, rows: list[dict[str, object]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_completions_are_two_sequences_with_one_end(root: Path) -> None:
    rows: list[dict[str, object]] = [{"prompt": f"What is {i}?", "completion": f" It is {i * i}."} for i in range(9)]
    cfg = config(root, source=records(root / "a.jsonl", rows), kind=SampleKind.completion, valid_fraction=0.0)
    folder = built(cfg)
    file, tokenizer = IndexedFile.open(folder / "train"), load_tokenizer(folder / "tokenizer")
    assert file.num_sequences == 2 * file.num_documents == 18
    ids = [file.sequence(i).tolist() for i in range(18)]
    assert [tokenizer.decode(prompt) for prompt in ids[::2]] == [row["prompt"] for row in rows]
    assert all(completion[-1] == read_meta(folder)["end"] for completion in ids[1::2])
    assert [tokenizer.decode(completion[:-1]) for completion in ids[1::2]] == [row["completion"] for row in rows]


@pytest.mark.parametrize(("unit", "label_type"), [(1, "class"), (0.5, "score")])
def test_rows_have_labels_and_no_end(root: Path, unit: float, label_type: str) -> None:
    rows: list[dict[str, object]] = [{"text": f"a{i}", "b": f"word {i}", "label": i * unit} for i in range(20)]
    source = records(root / "a.jsonl", rows)
    folder = built(config(root, source=source, kind=SampleKind.rows, pair_field="b"))
    tokenizer, found = load_tokenizer(folder / "tokenizer"), {}
    for name in ("train", "valid"):
        file, labels = IndexedFile.open(folder / name), np.load(folder / f"{name}.labels.npy")
        assert labels.dtype == np.float64 and labels.shape == (file.num_documents,)
        for i, label in enumerate(labels.tolist()):
            found[tuple(tokenizer.decode(file.sequence(2 * i + part).tolist()) for part in (0, 1))] = label
    assert found == {(row["text"], row["b"]): row["label"] for row in rows}
    assert read_meta(folder)["label_type"] == label_type
    damaged = bytearray((folder / "valid.labels.npy").read_bytes())
    damaged[-1] ^= 1
    (folder / "valid.labels.npy").write_bytes(damaged)
    assert "valid.labels.npy is damaged" in refused(config(root, source=source, kind=SampleKind.rows, pair_field="b"))


def test_two_builds_of_one_corpus_are_equal_to_the_byte(root: Path) -> None:
    one, two = (built(config(root, cache_dir=str(root / name))) for name in "ab")
    assert content(one) == content(two)


def test_finished_entry_is_reused_and_nothing_is_written_then(root: Path) -> None:
    said: list[str] = []
    folder = built(config(root), said.append)
    assert re.search(rf"{folder}: \d+ train, \d+ valid tokens, vocabulary \d+", said[-1])
    before = content(root / "cache")
    said.clear()
    assert built(config(root, seq_len=16, seed=5, workers=7), said.append) == folder
    assert said == [f"data: using {folder}"]
    assert content(root / "cache") == before
    assert not [path for path in (root / "cache").iterdir() if path.suffix in (".partial", ".owner")]


def test_nothing_held_out_has_no_such_files(root: Path) -> None:
    folder = built(config(root, valid_fraction=0.0))
    assert counts(folder) == {"train": 12}
    assert sorted(path.name for path in folder.iterdir()) == [
        "meta.json", "tokenizer", "train.bin", "train.idx", "train.sums.json",
    ]  # fmt: skip


def test_sources_of_a_blend_share_a_tokenizer(root: Path) -> None:
    (root / "other").mkdir()
    for i in range(9):
        (root / "other" / f"{i}.txt").write_text(f"something else {i}\n" * 3)
    blend = {str(root / "corpus"): 3.0, str(root / "other"): 1.0}
    cfg = config(root, blend=blend)
    prepare(cfg, quiet)
    found = entries(cfg)
    assert [share for _, share in found] == [0.75, 0.25]
    metas = [read_meta(folder) for folder, _ in found]
    assert [meta["source"] for meta in metas] == list(blend)
    assert metas[0]["tokenizer"] == metas[1]["tokenizer"]
    entry, tokenizer = found[1][0], load_tokenizer(found[1][0] / "tokenizer")
    assert tokenizer.encode("document").ids == load_tokenizer(found[0][0] / "tokenizer").encode("document").ids
    assert "something else 0\n" * 3 in texts(entry, "train") + texts(entry, "valid")
    assert built(config(root)) not in [folder for folder, _ in found], "its tokenizer is of one source only"


def test_random_tokens_need_no_entry(root: Path) -> None:
    cfg = config(root, source="random")
    prepare(cfg, quiet)
    assert entries(cfg) == [] and not (root / "cache").exists()


def test_problems_are_listed_and_recorded(root: Path) -> None:
    for i in range(13):
        (root / "corpus" / f"bad{i:02}.txt").write_bytes(b"\xff\xfe\xfd")
    said: list[str] = []
    folder = built(config(root), said.append)
    listed = [line for line in said if "left out" in line]
    assert len(listed) == 11 and "bad00.txt" in listed[0]
    assert listed[-1] == "data: left out 13 in all; meta.json of the entry lists them"
    assert [Path(path).name for path, _ in read_meta(folder)["problems"]] == [f"bad{i:02}.txt" for i in range(13)]
    assert sum(counts(folder).values()) == 12


def test_second_process_waits_for_the_builder_and_reuses_its_entry(root: Path) -> None:
    said: list[str] = []
    waiters: list[subprocess.Popen[str]] = []

    def say(line: str) -> None:
        said.append(line)
        if "building" in line:
            waiters.append(start(root))
            read_until(waiters[0], "waiting for process")

    folder = built(config(root), say)
    rest, _ = waiters[0].communicate(timeout=60)
    assert waiters[0].returncode == 0
    assert rest == f"data: using {folder}\n"


def test_waiter_takes_over_when_the_builder_is_killed_and_trusts_nothing_it_left(root: Path) -> None:
    builder = start(root, HOLD_BEFORE_META)
    read_until(builder, "all but meta.json written")
    with pytest.raises(DataError, match="OCT412"):
        read_meta(entries(config(root))[0][0])
    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        if "waiting" in line:
            builder.kill()
            builder.communicate(timeout=60)

    folder = built(config(root), say)
    assert builder.returncode == -signal.SIGKILL
    assert any("1 of 1 shards were there already" in line for line in said)
    assert content(folder) == content(built(config(root, cache_dir=str(root / "again"))))


def test_disk_that_is_full_is_refused_and_the_build_can_go_on(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> bool:
        raise DataError.of(439, "data.cache_dir", root, "no space", "free some")

    monkeypatch.setattr(build, "build_shard", full)
    assert "[OCT439]" in refused(config(root))
    monkeypatch.setattr(build, "build_shard", build_shard)
    assert counts(built(config(root)))["train"] > 0


def test_what_a_builder_left_that_was_killed_when_done_is_removed(root: Path) -> None:
    folder = built(config(root))
    before = content(root / "cache")
    partial = folder.with_name(f"{folder.name}.partial")
    (partial / "shard-00000").mkdir(parents=True)
    dead = subprocess.Popen(["true"])
    dead.wait()
    owner_file(folder).write_text(json.dumps({"machine": machine(), "pid": dead.pid}))
    lock = f"{folder.name}.lock"
    said: list[str] = []
    assert built(config(root), said.append) == folder
    assert not partial.exists() and content(root / "cache") == {**before, lock: b""}
    assert said[-1] == f"data: using {folder}"
