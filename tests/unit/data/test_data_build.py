"""Building cache entries: reuse, damage, competing and dying builders, refusals."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from engine.config.schema import DataConfig
from engine.data import build, open_data, prepare
from engine.data.cache import cache_root
from engine.data.corpus import Document, split_position
from engine.data.tokenizer import train_tokenizer
from engine.errors import DataError
from tests.unit.data.data_options import GPT, config

PREPARE = """
import sys
from engine.config.schema import DataConfig
from engine.data import build
{before}
options = dict(source=sys.argv[1], cache_dir=sys.argv[2], seq_len=8, vocab_size=300, valid_fraction=0.3)
build.prepare(DataConfig(**options), lambda line: print(line, flush=True))
"""
HOLD_BEFORE_META = """
def hold(*arguments):
    print("all but meta.json written", flush=True)
    sys.stdin.readline()

build.write_json = hold
"""


def quiet(line: str) -> None:
    pass


def refused(cfg: DataConfig) -> str:
    with pytest.raises(DataError) as caught:
        prepare(cfg, quiet)
    return str(caught.value)


def start(root: Path, before: str = "") -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PREPARE.format(before=before), str(root / "corpus"), str(root / "cache")]
    repository = Path(__file__).parents[3]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=repository)


def read_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def nearest_fraction(message: str) -> float:
    found = re.search(r"Nearest legal: data\.valid_fraction=([\d.]+); 0 means no validation", message)
    assert found is not None, message
    return float(found.group(1))


def documents_in(folder: Path) -> tuple[int, int]:
    meta = json.loads((folder / "meta.json").read_text())
    return meta["train_documents"], meta["valid_documents"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "corpus").mkdir()
    for i in range(12):
        (tmp_path / "corpus" / f"{i:02}.txt").write_text(f"document {i} has number {i * i}\n" * 3)
    return tmp_path


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_two_builds_of_one_corpus_are_equal_to_the_byte(root: Path) -> None:
    one, two = (prepare(config(root, cache_dir=str(root / name)), quiet) for name in "ab")
    assert content(one) == content(two)
    fingerprints = {open_data(config(root, cache_dir=str(root / name)), GPT).fingerprint for name in "ab"}
    assert len(fingerprints) == 1


def test_finished_entry_is_reused_and_nothing_is_written_then(root: Path) -> None:
    said: list[str] = []
    folder = prepare(config(root), said.append)
    assert "building" in said[0] and re.search(r"\d+ training and \d+ validation tokens, vocabulary \d+", said[-1])
    before = content(folder)
    (root / "cache" / f"{folder.name}.lock").unlink()
    said.clear()
    assert prepare(config(root, seq_len=16, seed=5), said.append) == folder
    assert said == [f"data: using {folder}"]
    assert content(folder) == before
    assert [path.name for path in (root / "cache").iterdir()] == [folder.name]


def test_another_corpus_or_option_makes_another_entry(root: Path) -> None:
    folders = [
        prepare(config(root), quiet),
        prepare(config(root, vocab_size=290), quiet),
        prepare(config(root, valid_fraction=0.4), quiet),
        prepare(config(root, max_bytes=700), quiet),
    ]
    (root / "corpus" / "new.txt").write_text("one more document")
    folders.append(prepare(config(root), quiet))
    assert len(set(folders)) == 5


def test_zero_valid_fraction_has_no_validation_split(root: Path) -> None:
    cfg = config(root, valid_fraction=0.0)
    assert not (prepare(cfg, quiet) / "valid.tokens").exists()
    assert open_data(cfg, GPT).valid is None


def test_tokenizer_sample_is_spread_over_the_whole_corpus(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
        seen.extend(texts)
        return train_tokenizer(seen, vocab_size)

    monkeypatch.setattr(build, "TOKENIZER_SAMPLE_BYTES", 500)
    monkeypatch.setattr(build, "train_tokenizer", train)
    prepare(config(root, valid_fraction=0.0), quiet)
    files = [path.read_text() for path in sorted((root / "corpus").iterdir())]
    assert 350 <= sum(map(len, seen)) <= 500
    picked = [files.index(text) for text in seen]
    assert min(picked) <= 3 and max(picked) >= 9


def test_progress_is_said_in_megabytes(root: Path) -> None:
    (root / "corpus" / "long.txt").write_text("a line of a long text\n" * 50_000)
    said: list[str] = []
    prepare(config(root), said.append)
    assert [line for line in said if re.fullmatch(r"data: tokenizer, 1\.1 of 1\.1 MB", line)]
    assert [line for line in said if re.fullmatch(r"data: tokens, 1\.1 of 1\.1 MB", line)]


def test_second_process_waits_for_the_builder_and_reuses_its_entry(root: Path) -> None:
    said: list[str] = []
    waiters: list[subprocess.Popen[str]] = []

    def say(line: str) -> None:
        said.append(line)
        if "building" in line:
            waiters.append(start(root))
            assert "waiting for another process" in read_line(waiters[0])

    folder = prepare(config(root), say)
    rest, _ = waiters[0].communicate(timeout=60)
    assert waiters[0].returncode == 0
    assert "training and" in said[-1]
    assert rest == f"data: using {folder}\n"


def test_waiter_takes_over_when_the_builder_is_killed_and_trusts_nothing_it_left(root: Path) -> None:
    builder = start(root, HOLD_BEFORE_META)
    assert "building" in read_line(builder)
    assert read_line(builder) == "all but meta.json written\n"
    with pytest.raises(DataError, match="OCT412"):
        open_data(config(root), GPT)
    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        if "waiting" in line:
            builder.kill()
            builder.communicate(timeout=60)

    prepare(config(root), say)
    assert builder.returncode == -signal.SIGKILL
    assert ["waiting" in said[0], "building" in said[1], "training and" in said[-1]] == [True] * 3
    assert open_data(config(root), GPT).vocab_size > 256


def test_half_entry_is_built_anew(root: Path) -> None:
    folder = prepare(config(root), quiet)
    complete = content(folder)
    (folder / "meta.json").unlink()
    (folder / "train.tokens").write_bytes(b"half")
    (folder / "train.tokens.tmp").write_bytes(b"half")
    assert prepare(config(root), quiet) == folder
    assert content(folder) == complete


@pytest.mark.parametrize(
    ("name", "code"), [("train.tokens", 410), ("valid.tokens", 410), ("tokenizer.json", 413), ("meta.json", 413)]
)
def test_flipped_byte_in_any_file_is_refused(root: Path, name: str, code: int) -> None:
    folder = prepare(config(root), quiet)
    damaged = bytearray((folder / name).read_bytes())
    damaged[-1 if name.endswith("tokens") else 0] ^= 1
    (folder / name).write_bytes(damaged)
    message = refused(config(root))
    assert f"[OCT{code}] data.cache_dir={folder}" in message
    assert f"{folder / name} " in message and ("is damaged" in message or "cannot be read" in message)
    assert f"Delete the folder {folder}; the next run builds it again" in message


def test_token_file_of_another_entry_and_missing_tokenizer_are_refused(root: Path) -> None:
    folder = prepare(config(root), quiet)
    other = prepare(config(root, valid_fraction=0.5), quiet)
    for name in ("train.tokens", "train.tokens.json"):
        (folder / name).write_bytes((other / name).read_bytes())
    message = refused(config(root))
    assert "[OCT413]" in message and "train.tokens is damaged" in message and "meta.json records" in message
    (other / "tokenizer.json").unlink()
    message = refused(config(root, valid_fraction=0.5))
    assert "[OCT413]" in message and "tokenizer.json cannot be read (No such file or directory)" in message


def test_meta_without_a_field_is_refused(root: Path) -> None:
    folder = prepare(config(root), quiet)
    meta = json.loads((folder / "meta.json").read_text())
    del meta["vocab_size"]
    (folder / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(DataError, match=r"OCT413.*meta\.json cannot be read \(KeyError\('vocab_size'\)\)"):
        open_data(config(root), GPT)


def test_opening_what_was_never_prepared_is_refused(root: Path) -> None:
    with pytest.raises(DataError) as caught:
        open_data(config(root), GPT)
    message = str(caught.value)
    assert f"[OCT412] data.cache_dir={root / 'cache'}" in message
    assert "has no finished entry corpus-300-" in message
    assert "Start the run again" in message


def test_cache_folder_that_cannot_be_written_is_refused(root: Path) -> None:
    (root / "file").write_text("in the way")
    message = refused(config(root, cache_dir=str(root / "file" / "cache")))
    assert f"[OCT414] data.cache_dir={root / 'file' / 'cache'}" in message
    assert "cannot be written" in message and "Not a directory" in message
    assert "XDG_CACHE_HOME" in message


def test_cache_folder_defaults(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_root(config(root, cache_dir=None)) == Path("/xdg/octant")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert cache_root(config(root, cache_dir=None)) == Path("/home/someone/.cache/octant")
    assert cache_root(config(root, cache_dir="~/mine")) == Path("/home/someone/mine")


def test_empty_validation_split_is_refused_and_the_named_fraction_works(root: Path) -> None:
    lowest = min(split_position(Document("", p.read_text())) for p in (root / "corpus").iterdir())
    message = refused(config(root, valid_fraction=lowest / 2))
    assert f"[OCT415] data.valid_fraction={lowest / 2}" in message
    assert "puts all 12 documents into the training split, the validation split is empty" in message
    folder = prepare(config(root, valid_fraction=nearest_fraction(message)), quiet)
    assert documents_in(folder) == (11, 1)


def test_empty_training_split_is_refused_and_the_named_fraction_works(root: Path) -> None:
    message = refused(config(root, valid_fraction=1.0))
    assert "[OCT416] data.valid_fraction=1.0" in message
    assert "into the validation split, the training split is empty" in message
    folder = prepare(config(root, valid_fraction=nearest_fraction(message)), quiet)
    assert documents_in(folder) == (1, 11)


def test_single_document_can_only_train(root: Path) -> None:
    message = refused(config(root, source=str(root / "corpus" / "00.txt"), valid_fraction=0.000001))
    assert "[OCT415]" in message and message.endswith("Nearest legal: data.valid_fraction=0 (no validation)")


def test_corpus_and_vocabulary_refusals_come_through(root: Path) -> None:
    (root / "blank").mkdir()
    (root / "blank" / "a.txt").write_text("")
    assert "[OCT403] data.source=" in refused(config(root, source=str(root / "blank")))
    assert "[OCT401] data.source=" in refused(config(root, source=str(root / "nowhere")))
    assert "[OCT405] data.vocab_size=100" in refused(config(root, vocab_size=100))
