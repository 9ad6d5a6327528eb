"""The promise about data: one global sequence of samples, whoever reads it and whoever built it."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.config.schema import ParallelConfig
from engine.data import Split, open_data
from engine.data.build.prepare import prepare
from engine.topology.grid import Grid
from tests.unit.data.data_options import BERTS, GPT, config, make_corpus, sequence_hash

LAYOUTS = [
    {},
    {"dp": 2, "pp": 2, "tp": 2},
    {"dp": 8},
    {"dp": 4, "tp": 2},
    {"dp": 4, "pp": 2},
    {"dp": 2, "context": 2, "tp": 2},
    {"dp": 2, "pp": 4},
    {"pp": 2, "context": 2, "tp": 2},
]
CASES: dict[str, tuple[dict[str, object], str]] = {
    "gpt": ({}, "gpt"),
    "packed gpt": ({"document_mask": True}, "gpt"),
    "masked language model": ({"whole_words": True}, "next"),
}
STEP, STEPS = 160, 63


def replicas(layout: dict[str, int]) -> int:
    """dp of a layout, by the arithmetic of training."""
    world = layout.get("dp", 1) * layout.get("pp", 1) * layout.get("tp", 1) * layout.get("context", 1)
    return Grid.from_config(ParallelConfig(**layout), world).dp


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The same corpus, built by one process and by four."""
    found = []
    for workers in (1, 4):
        root = tmp_path_factory.mktemp(f"workers{workers}")
        make_corpus(root / "corpus", lines=60)
        prepare(config(root, workers=workers), lambda line: None, shard_bytes=2000)
        found.append(root)
    return found


def opened(root: Path, case: str, seed: int = 0) -> Split:
    options, model = CASES[case]
    return open_data(config(root, seq_len=16, seed=seed, **options), (BERTS | {"gpt": GPT})[model]).train


@pytest.mark.parametrize("case", CASES)
def test_ten_thousand_samples_are_the_same_in_every_layout_and_after_a_stop(roots: list[Path], case: str) -> None:
    """Tokens, labels, segments, classes and documents of 10080 samples, hashed in order: 8 layouts, 2 micro-batches,
    1 and 4 processes that built the files, and runs that stop after 37 steps and go on with other replicas."""
    plans = [[(STEPS, dp, micro, STEP // dp // micro)] for dp in map(replicas, LAYOUTS) for micro in (5, 20)]
    plans += [[(37, 2, 10, 8), (26, 8, 10, 2)], [(37, 4, 10, 4), (13, 1, 20, 16)]]
    hashes = {sequence_hash(opened(root, case), plan) for root in roots for plan in plans}
    assert len(hashes) == 1
    assert sequence_hash(opened(roots[0], case, seed=1), plans[-1]) not in hashes
