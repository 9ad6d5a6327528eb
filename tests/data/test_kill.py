"""Builds that are killed at any moment, again and again, end in the same bytes."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest

from engine.config.schema_data import DataConfig
from engine.data.build.prepare import prepare
from tests.unit.data.data_options import config

KILLS = 50
SHARD = 400


def start(cfg: DataConfig, log: Path) -> int:
    """Build in a process of its own, which leads a group of its own."""
    child = os.fork()
    if child:
        # Here and there: whoever is first.
        os.setpgid(child, child)
        return child
    status = 1
    try:
        os.setpgid(0, 0)
        with open(log, "a") as file:
            prepare(cfg, lambda line: print(line, file=file, flush=True), shard_bytes=SHARD)
        status = 0
    finally:
        os._exit(status)


def kill_after(child: int, seconds: float) -> bool:
    """Kill the whole group; False: the build was done before."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if os.waitpid(child, os.WNOHANG) != (0, 0):
            return False
        time.sleep(0.001)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


def content(cache: Path) -> dict[str, bytes]:
    """Every file of the cache but the locks' files, which are empty."""
    files = {path: path.read_bytes() for path in cache.rglob("*") if path.is_file()}
    assert all(not files[path] for path in files if path.suffix == ".lock")
    return {str(path.relative_to(cache)): found for path, found in files.items() if path.suffix != ".lock"}


@pytest.mark.slow
def test_build_killed_at_random_moments_gives_the_bytes_of_one_that_was_not(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    for i in range(40):
        (tmp_path / "corpus" / f"{i:02}.txt").write_text(f"document {i} has number {i * i}\n" * 3)
    log = tmp_path / "log"
    started = time.monotonic()
    child = start(config(tmp_path, cache_dir=str(tmp_path / "whole"), workers=2), log)
    assert os.waitpid(child, 0)[1] == 0, log.read_text()
    whole, duration = content(tmp_path / "whole"), time.monotonic() - started
    assert {Path(name).name for name in whole} >= {"meta.json", "train.bin", "valid.idx", "tokenizer.json"}
    moments = random.Random(0)
    kills = caches = 0
    while kills < KILLS:
        cfg = config(tmp_path, cache_dir=str(tmp_path / f"cache{caches}"), workers=2)
        caches += 1
        ended = False
        while not ended:
            child = start(cfg, log)
            # Past the number of kills the build may go on to its end.
            ended = not kill_after(child, moments.uniform(0, 1.5 * duration) if kills < KILLS else 60)
            kills += not ended
        assert content(Path(str(cfg.cache_dir))) == whole, f"after {kills} kills"
    assert "shards were there already" in log.read_text()
