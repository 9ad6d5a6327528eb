from __future__ import annotations

from engine.dist.rng import stream_seed


def test_a_purpose_has_one_seed_of_63_bits() -> None:
    seeds = [stream_seed(seed, "init", f"block.{i}") for seed in range(20) for i in range(20)]
    assert len(set(seeds)) == 400
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert max(seeds) > 2**62, "the high bits are used"
    assert seeds == [stream_seed(seed, "init", f"block.{i}") for seed in range(20) for i in range(20)]


def test_seeds_of_earlier_runs_stay_what_they_were() -> None:
    # Of the documented hash: another value means that no earlier run can be repeated.
    assert stream_seed(1234, "init", "embed.tokens.weight") == 380_837_671_629_745_231


def test_purposes_do_not_run_into_each_other() -> None:
    assert stream_seed(1, "dropout", 1, 2) != stream_seed(1, "dropout", 2, 1)
    assert stream_seed(1, "dropout", 12) != stream_seed(1, "dropout", 1, 2)
    assert stream_seed(11, "x") != stream_seed(1, "1", "x")
