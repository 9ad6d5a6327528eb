"""The network study's verdicts and its command line, without ranks."""

from __future__ import annotations

import pytest

from engine.study import __main__ as study
from engine.study.network_judge import Link, differences, slow
from engine.study.network_measure import AllReduce, pairs_of

FAST, SLOW = 10e9, 4e9


def ring(speeds: list[float]) -> list[Link]:
    """Links 0-1, 1-2, ..., last-0."""
    return [Link((rank, (rank + 1) % len(speeds)), 1e-5, speed) for rank, speed in enumerate(speeds)]


def test_equal_links_are_not_slow() -> None:
    assert slow(ring([FAST, 0.6 * FAST, FAST, FAST]), ["a"] * 4) == []


def test_a_slow_link_is_named_and_its_ranks_are_not() -> None:
    (found,) = slow(ring([FAST, SLOW, FAST, FAST]), ["a", "b", "c", "d"])
    assert str(found) == "slow link 1 on b - 2 on c: 4 GB/s, 40% of the median"


@pytest.mark.parametrize("ranks", [3, 4, 8])
def test_a_rank_with_slow_links_only_is_named_once(ranks: int) -> None:
    (found,) = slow(ring([FAST, SLOW, SLOW, *[FAST] * (ranks - 3)]), ["a"] * ranks)
    assert (found.what, found.name) == ("rank", "2 on a")


def test_a_slow_host_is_named_and_not_its_ranks() -> None:
    hosts = ["a", "a", "b", "b", "c", "c"]
    links = [Link((rank, rank + 1), 1e-6, 100e9) for rank in (0, 2, 4)]
    links += [Link((0, 4), 1e-5, FAST), Link((1, 5), 1e-5, FAST), Link((1, 2), 1e-5, SLOW), Link((3, 4), 1e-5, SLOW)]
    (found,) = slow(links, hosts)
    assert (found.what, found.name, found.bandwidth) == ("host", "b", SLOW)


def test_links_between_hosts_are_not_held_against_those_inside() -> None:
    links = [Link((0, 1), 1e-6, 100e9), Link((2, 3), 1e-6, 100e9), Link((1, 2), 1e-5, FAST), Link((0, 3), 1e-5, FAST)]
    assert slow(links, ["a", "a", "b", "b"]) == []


def test_hosts_that_differ_are_named() -> None:
    facts = [{"host": host, "torch": version, "python": "3.12"} for host, version in zip("aabc", "1121", strict=True)]
    assert differences(facts, ("torch", "python")) == {"torch": "1 on a, c; 2 on b"}


def test_pairs() -> None:
    assert pairs_of(2, "neighbours") == [(0, 1)]
    assert pairs_of(4, "neighbours") == [(0, 1), (0, 3), (1, 2), (2, 3)]
    assert len(pairs_of(5, "all")) == 10


def test_bandwidths_are_those_of_nccl_tests() -> None:
    done = AllReduce(size=8 * 10**9, seconds=2.0)
    assert done.bandwidth == 4e9
    assert done.bus_bandwidth(4) == 6e9


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--timeout", "0"], "argument --timeout: 0 is not a number above 0"),
        (["--sizes", "4096,0"], "argument --sizes: 0 is below 1"),
        (["--ranks", "-1"], "argument --ranks: -1 is below 1"),
        (["--pairs", "some"], "argument --pairs: invalid choice: 'some'"),
    ],
)
def test_a_wrong_option_is_refused(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        study.main(["network", *words])
    assert caught.value.code == 2
    assert said in capsys.readouterr().err
