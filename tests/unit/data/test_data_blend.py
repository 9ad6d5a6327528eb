"""Blends: the order of sources, their exact proportions, and the samples of each."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from engine.config.schema import ModelConfig
from engine.data import open_data, prepare
from engine.data.samples.blend import MAX_CYCLE, MIN_CYCLE, cycle, exact_shares, interleaved
from engine.data.storage.indexed import IndexedFile
from tests.unit.data.data_options import GPT, NEXT_SENTENCE, by_number, config, read, tokens_of

WEIGHTS = [(0.7, 0.3), (0.5, 0.5), (1.0, 2.0, 4.0), (0.05, 0.9, 0.05), (0.31, 0.27, 0.22, 0.2), (0.999, 0.001), (3.0,)]


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_the_order_is_megatrons(weights: tuple[float, ...]) -> None:
    """The first 10000 samples of megatron-core's own helper."""
    helpers = pytest.importorskip(
        "megatron.core.datasets.helpers_cpp", reason="needs megatron-core with its compiled helpers"
    )
    size, total = 10_000, np.array(weights) / sum(weights)
    sources, within = np.zeros(size, dtype=np.int16), np.zeros(size, dtype=np.int64)
    helpers.build_blending_indices(sources, within, total, len(weights), size, False)
    found = cycle(weights).place(np.arange(size))
    assert found[0].tolist() == sources.tolist() and found[1].tolist() == within.tolist()


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_no_prefix_strays_from_the_proportions(weights: tuple[float, ...]) -> None:
    shares = [weight / sum(weights) for weight in weights]
    order = cycle(weights)
    numbers = np.arange(2 * len(order.sources) + 100)
    sources, within = order.place(numbers)
    bound = 1.0 if len(weights) <= 2 else len(weights) - 1
    for source, share in enumerate(shares):
        chosen = sources == source
        assert within[chosen].tolist() == list(range(int(chosen.sum()))), "each source is read without gaps"
        assert np.abs(np.cumsum(chosen) - share * (numbers + 1)).max() < bound + 1e-6
        assert order.counts[source] * sum(map(Fraction, weights)) == pytest.approx(len(order.sources) * weights[source])


def test_a_sample_far_away_is_looked_up_at_once() -> None:
    order = cycle((0.7, 0.3))
    length = len(order.sources)
    assert length >= MIN_CYCLE and length % 10 == 0
    sources, within = order.place(np.array([3, 10**9 * length + 3]))
    assert sources[0] == sources[1]
    assert within[1] - within[0] == 10**9 * int(order.counts[sources[0]])


def test_shares_are_the_fractions_that_were_meant() -> None:
    assert exact_shares([0.1, 0.2]) == [Fraction(1, 3), Fraction(2, 3)]
    assert exact_shares([1 / 7, 6 / 7]) == [Fraction(1, 7), Fraction(6, 7)]
    odd = exact_shares([0.123457, 0.200003, 0.676543])
    assert sum(odd) == 1 and max(share.denominator for share in odd) <= MAX_CYCLE
    assert [float(share) for share in odd] == pytest.approx([0.123456, 0.200002, 0.676541], abs=2e-6)


def test_held_out_samples_of_all_sources_are_mixed_evenly() -> None:
    found = interleaved([2, 4]).tolist()
    assert [source for source, _ in found] == [1, 0, 1, 1, 0, 1]
    assert [sample for source, sample in found if source == 1] == [0, 1, 2, 3]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("blend")
    for name, count in (("a", 14), ("b", 30)):
        (root / name).mkdir()
        for i in range(count):
            (root / name / f"{i}.txt").write_text(f"{name} text {i} holds {i * i % 17} things {name * 9} {i}\n")
    prepare(config(root, **blend(root)), lambda line: None)
    return root


def blend(root: Path, a: float = 0.75) -> dict[str, object]:
    return {"source": "", "blend": {str(root / "a"): a, str(root / "b"): 1 - a}}


def test_a_blend_reads_each_source_in_its_own_shuffled_epochs(root: Path) -> None:
    data = open_data(config(root, **blend(root)), GPT)
    alone = {}
    for name in "ab":
        folder = next(path for path in (root / "cache").glob(f"{name}-*") if path.is_dir())
        tokens = tokens_of(folder / "train")
        alone[name] = sorted(tokens[i : i + 8] for i in range(0, len(tokens) - 8, 8))
    n = len(alone["a"])
    assert data.train.num_samples == n + len(alone["b"])
    batch = read(data.train, 4 * n).tokens_BS.tolist()
    sources, _ = cycle((0.75, 0.25)).place(np.arange(4 * n))
    of_a = [row for row, source in zip(batch, sources, strict=True) if source == 0]
    assert len(of_a) == 3 * n
    epochs = [of_a[i : i + n] for i in range(0, 3 * n, n)]
    assert all(sorted(epoch) == alone["a"] for epoch in epochs) and epochs[0] != epochs[1]
    assert all(row in alone["b"] for row, source in zip(batch, sources, strict=True) if source == 1)


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (GPT, {}),
        (GPT, {"document_mask": True}),
        (GPT, {"variable_length": True}),
        (NEXT_SENTENCE, {}),
        (NEXT_SENTENCE, {"variable_length": True}),
    ],
)
def test_a_blend_is_the_same_in_every_layout(root: Path, model: ModelConfig, options: dict[str, object]) -> None:
    cfg = config(root, **blend(root), **{"seq_len": 12, **options})
    split = open_data(cfg, model).train
    whole = by_number(split, 2, 1, 24, 1)
    for dp, micro, accum in ((2, 3, 4), (4, 6, 1), (1, 8, 3)):
        found = by_number(split, 2, dp, micro, accum)
        if model is GPT and "variable_length" in options:
            # How far a row is padded depends on its micro-batch.
            assert {n: [t for t in row[1] if t != -100] for n, row in found.items()} == {  # type: ignore[attr-defined]
                n: [t for t in row[1] if t != -100]
                for n, row in whole.items()  # type: ignore[attr-defined]
            }
        else:
            assert found == whole


def test_validation_of_a_blend_reads_all_sources_once(root: Path) -> None:
    data = open_data(config(root, **blend(root)), GPT)
    assert data.valid is not None
    batch = read(data.valid, data.valid.num_samples)
    files = [IndexedFile.open(path / "valid") for path in (root / "cache").glob("[ab]-*") if path.is_dir()]
    assert data.valid.num_samples == sum((file.num_tokens - 1) // 8 for file in files)
    assert len({tuple(row) for row in batch.tokens_BS.tolist()}) == data.valid.num_samples


def test_weights_change_the_fingerprint(root: Path) -> None:
    found = {open_data(config(root, **blend(root, a)), GPT).fingerprint for a in (0.75, 0.5)}
    assert len(found) == 2
