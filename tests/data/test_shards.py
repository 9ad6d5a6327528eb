"""Parallel building: the cut into shards, any number of workers, workers that die, progress, the tokenizer's sample."""

from __future__ import annotations

import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from engine.config.schema_data import DataConfig
from engine.data.build import prepare as build
from engine.data.build import progress
from engine.data.build import sample as tokenizer_sample
from engine.data.build import shard as shard_module
from engine.data.build.progress import Progress
from engine.data.build.sample import even_units, sample_texts
from engine.data.build.shard import Job, Shard, build_shard, cut_shards
from engine.data.corpus.documents import units
from engine.data.corpus.units import Unit
from engine.data.tokenizer.folder import load_tokenizer
from engine.errors import DataError
from tests.unit.data.build_helpers import built, content, make_corpus, quiet
from tests.unit.data.data_options import config

SHARD = 700


def unit(size: int, name: str = "a", limit: int | None = None) -> Unit:
    return Unit(name, f"/{name}", "text", size, limit=limit)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_corpus(tmp_path, 30, lines=4)


def build_small(cfg: DataConfig, say: Callable[[str], None] = quiet, shard_bytes: int = SHARD) -> Path:
    return built(cfg, say, shard_bytes)


def test_shards_are_runs_of_all_units() -> None:
    found = [unit(size) for size in (3, 3, 3, 20, 1, 9, 1)] + [unit(90, limit=2)]
    shards = cut_shards(found, 8)
    assert [[u.size for u in shard.units] for shard in shards] == [[3, 3, 3], [20], [1, 9], [1, 90]]
    assert [shard.size for shard in shards] == [9, 20, 10, 3]
    assert [shard.number for shard in shards] == [0, 1, 2, 3]
    assert cut_shards([], 8) == []


def test_a_larger_corpus_has_more_shards_for_more_cores_up_to_a_size(root: Path) -> None:
    (unit,) = units(config(root, include="00.txt"), str(root / "corpus"))
    mebibyte = replace(unit, size=1 << 20)
    assert [len(cut_shards([mebibyte] * n)) for n in (3, 8, 60, 640)] == [1, 2, 15, 64]
    assert {shard.size for shard in cut_shards([mebibyte] * 4096)} == {32 << 20}


def test_identity_of_a_shard_is_that_of_its_units() -> None:
    one, two = Shard(0, (unit(1), unit(2))), Shard(5, (unit(1), unit(2)))
    assert one.identity == two.identity
    assert len({one.identity, Shard(0, (unit(1),)).identity, Shard(0, (unit(1), unit(3))).identity}) == 3


def test_result_is_the_same_with_any_number_of_workers_and_any_shards(root: Path) -> None:
    results = [
        content(build_small(config(root, cache_dir=str(root / name), workers=workers), shard_bytes=size))
        for name, workers, size in (("one", 1, SHARD), ("two", 2, SHARD), ("five", 5, SHARD), ("whole", 1, 1 << 20))
    ]
    assert results[0] == results[1] == results[2] == results[3]


@pytest.mark.parametrize(
    ("ending", "words"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "was killed (SIGKILL), as the system does when memory runs out"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "was ended by SIGSEGV"),
        ("os._exit(3)", "ended with exit code 3"),
        ("raise ValueError('what is this')", "failed (ValueError: what is this)"),
    ],
)
def test_worker_that_dies_is_reported_and_finished_shards_are_kept(
    root: Path, monkeypatch: pytest.MonkeyPatch, ending: str, words: str
) -> None:
    """A sitecustomize makes the worker end in the shard that holds file 20."""
    (root / "site").mkdir()
    (root / "site" / "sitecustomize.py").write_text(
        "import builtins, os, signal, sys\n"
        "if 'engine.data.build.worker' in ' '.join(sys.orig_argv):\n"
        "    def check(event, arguments):\n"
        "        if event == 'open' and str(arguments[0]).endswith('20.txt'):\n"
        f"            {ending}\n"
        "    sys.addaudithook(check)\n"
    )
    cfg = config(root, workers=1)
    with monkeypatch.context() as patched:
        patched.syspath_prepend(str(root / "site"))
        with pytest.raises(DataError) as caught:
            build_small(cfg)
    message = str(caught.value)
    assert "[OCT450] data.workers=1: the process that built shard " in message
    number = int(re.search(r"shard (\d+)", message).group(1))  # type: ignore[union-attr]
    assert str(root / "corpus") in message and words in message
    assert "Finished shards are kept" in message
    said: list[str] = []
    folder = build_small(cfg, said.append)
    assert any(f"{number} of 5 shards were there already" in line for line in said)
    assert content(folder) == content(build_small(config(root, cache_dir=str(root / "again"))))


def test_damaged_and_foreign_shards_of_an_earlier_build_are_built_anew(root: Path) -> None:
    cfg = config(root, workers=2)
    complete = content(build_small(cfg))
    cfg = config(root, workers=2, cache_dir=str(root / "other"))

    def stop(line: str) -> None:
        if "data: tokens" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_small(cfg, stop)
    (partial,) = (path for path in (root / "other").glob("corpus-*.partial"))
    shards = sorted(path.name for path in partial.iterdir() if "." not in path.name)
    assert shards == [f"shard-{i:05}" for i in range(5)]
    flipped = bytearray((partial / "shard-00001" / "train.bin").read_bytes())
    flipped[3] ^= 1
    (partial / "shard-00001" / "train.bin").write_bytes(flipped)
    record = json.loads((partial / "shard-00003" / "shard.json").read_text())
    (partial / "shard-00003" / "shard.json").write_text(json.dumps({**record, "identity": "another"}))
    (partial / "shard-00004" / "shard.json").unlink()
    (partial / "shard-00002.abcd").mkdir()
    said: list[str] = []
    assert content(build_small(cfg, said.append)) == complete
    assert any("2 of 5 shards were there already" in line for line in said)
    assert not partial.exists()


def test_interrupted_build_leaves_no_process(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "Progress", partial(Progress, every_s=0))
    children: set[int] = set()
    before = _children()

    def stop(line: str) -> None:
        if " left, " in line:
            children.update(_children() - before)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        build_small(config(root, workers=2), stop)
    assert len(children) == 2 and not children & _children()


def test_reports_of_a_shard_add_up_to_its_size(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = build_small(config(root)) / "tokenizer"
    (shard,) = cut_shards(units(config(root), str(root / "corpus")))
    job = Job(cfg=config(root), tokenizer=tokenizer, vocab_size=300, end=0, folder=root)
    for batch in (1, 300, 1 << 20):
        monkeypatch.setattr(shard_module, "_BATCH_BYTES", batch)
        sizes: list[int] = []
        assert not build_shard(job, shard, lambda: load_tokenizer(tokenizer), sizes.append)
        assert sum(sizes) == shard.size == sum(path.stat().st_size for path in (root / "corpus").iterdir())
        assert batch > 300 or len(sizes) > 5
        assert build_shard(job, shard, lambda: load_tokenizer(tokenizer), sizes.append), "it is there"
        shutil.rmtree(root / shard.name)


BUILDER = """
import os, signal, sys
from functools import partial
from pathlib import Path
from engine.config.schema_data import DataConfig
from engine.data.build import prepare as build
from engine.data.build.progress import Progress

def say(line):
    if " left, " in line:
        print(Path(f"/proc/self/task/{os.getpid()}/children").read_text(), flush=True)
        os.kill(os.getpid(), int(sys.argv[3]))

build.Progress = partial(Progress, every_s=0)
options = dict(source=sys.argv[1], cache_dir=sys.argv[2], seq_len=8, vocab_size=300, valid_fraction=0.3, workers=2)
build.prepare(DataConfig(**options), say, shard_bytes=700)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_workers_end_with_their_builder_and_the_next_build_goes_on(root: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-c", BUILDER, str(root / "corpus"), str(root / "cache"), str(int(number))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=Path(__file__).parents[3])
    assert done.returncode == -number, done.stderr
    workers = list(map(int, done.stdout.split()))
    assert len(workers) == 2
    for worker in workers:
        with suppress(ProcessLookupError):
            handle = os.pidfd_open(worker)
            assert select.select([handle], [], [], 20)[0], "the worker lives on"
            os.close(handle)
    cfg = config(root, workers=2)
    assert content(build_small(cfg)) == content(build_small(config(root, cache_dir=str(root / "again"))))


def _children() -> set[int]:
    return set(map(int, Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()))


def test_progress_is_said_in_megabytes_with_speed_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    said: list[str] = []
    work = Progress(said.append, "tokens", 30_000_000, 2, every_s=5.0)
    for second, size in ((2, 4_000_000), (4, 4_000_000), (5, 2_000_000), (6, 0), (9, 0)):
        clock[0] = second
        work.add(size)
    assert said == ["data: tokens, 10.0 of 30.0 MB, 2.0 MB/s, 10 s left, 2 workers"]
    clock[0] = 10
    work.add(20_000_000)
    clock[0] = 15
    work.end("all well")
    assert said[-1] == "data: tokens, 30.0 of 30.0 MB, 2.0 MB/s, 15.0 s, all well"


def test_tokenizer_sample_is_spread_over_the_training_documents(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [path.read_text() for path in sorted((root / "corpus").iterdir())]
    whole = sum(map(len, files))
    monkeypatch.setattr(tokenizer_sample, "SAMPLE_BYTES", whole // 3)
    cfg = config(root, valid_fraction=0.0)
    seen = list(sample_texts(cfg, [cfg.source], lambda line: None))
    assert abs(sum(map(len, seen)) - whole // 3) <= 2 * max(map(len, files))
    picked = [files.index(text) for text in seen]
    assert picked == sorted(picked) and max(b - a for a, b in zip([-1, *picked], [*picked, 30], strict=True)) <= 5
    half = config(root, valid_fraction=0.5)
    monkeypatch.setattr(tokenizer_sample, "SAMPLE_BYTES", whole)
    assert 5 <= len(list(sample_texts(half, [half.source], lambda line: None))) <= 25


def test_of_a_large_corpus_units_at_even_distances_are_read() -> None:
    found = [unit(10, str(i)) for i in range(100)]
    assert [int(u.name) for u in even_units(found, 100)] == list(range(9, 100, 10))
    assert even_units(found, 5000) == found
    assert even_units([unit(50), unit(60, "b")], 5) == [unit(60, "b")]
