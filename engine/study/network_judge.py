"""What the measurements of `engine.study network` say: hosts that differ, links and hosts that are slow."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

SLOW = 0.5
"""A link or a host below this share of the median is slow."""
MUST_AGREE = ("python", "torch", "deepspeed", "cuda", "nccl", "commit")
"""Facts that ranks of one job must share: with others they hang, fail or compute something else."""
SHOULD_AGREE = ("device",)


@dataclass(frozen=True, slots=True)
class Link:
    """A pair of ranks: seconds of the smallest message one way, bytes per second of a large one."""

    ranks: tuple[int, int]
    latency_s: float
    bandwidth: float


@dataclass(frozen=True, slots=True)
class Slow:
    """What is below `SLOW` of the median of its kind: `what` is a link, a rank or a host."""

    what: str
    name: str
    bandwidth: float
    median: float

    def __str__(self) -> str:
        share = self.bandwidth / self.median
        return f"slow {self.what} {self.name}: {self.bandwidth / 1e9:.3g} GB/s, {share:.0%} of the median"


def differences(facts: Sequence[Mapping[str, Any]], names: Iterable[str]) -> dict[str, str]:
    """For each fact of `names` that not all ranks share: which hosts have what, most frequent value first."""
    found = {}
    for name in names:
        hosts: defaultdict[str, list[str]] = defaultdict(list)
        counts = Counter(str(fact[name]) for fact in facts)
        for fact in facts:
            if fact["host"] not in hosts[str(fact[name])]:
                hosts[str(fact[name])].append(str(fact["host"]))
        if len(counts) > 1:
            found[name] = "; ".join(f"{value} on {', '.join(hosts[value])}" for value, _ in counts.most_common())
    return found


def slow(links: Sequence[Link], hosts: Sequence[str]) -> list[Slow]:
    """Slow hosts, ranks and links. `hosts` names the host of each rank.

    Links inside a host and between hosts are of different kinds and judged apart. A rank is as good as its best link,
    so that a slow one does not drag its neighbours down; the median is over ranks. A slow link of a slow rank, and a
    slow rank of a slow host, is not named again. Two ranks have one link, and nothing to compare it with.
    """
    found: list[Slow] = []
    for between in (False, True):
        kind = [link for link in links if (hosts[link.ranks[0]] != hosts[link.ranks[1]]) == between]
        best: defaultdict[int, float] = defaultdict(float)
        for link in kind:
            for rank in link.ranks:
                best[rank] = max(best[rank], link.bandwidth)
        if best:
            found += _of_kind(kind, best, median(best.values()), hosts, between)
    return found


def _of_kind(
    links: Sequence[Link], best: Mapping[int, float], typical: float, hosts: Sequence[str], between: bool
) -> list[Slow]:
    limit = SLOW * typical
    of_host: defaultdict[str, float] = defaultdict(float)
    for rank, bandwidth in best.items():
        of_host[hosts[rank]] = max(of_host[hosts[rank]], bandwidth)
    bad_hosts = {host for host, bandwidth in of_host.items() if between and bandwidth < limit}
    found = [Slow("host", host, of_host[host], typical) for host in sorted(bad_hosts)]
    bad_ranks = {rank for rank, bandwidth in best.items() if bandwidth < limit}
    for rank in sorted(bad_ranks):
        if hosts[rank] not in bad_hosts:
            found.append(Slow("rank", f"{rank} on {hosts[rank]}", best[rank], typical))
    for link in links:
        if link.bandwidth < limit and not bad_ranks & set(link.ranks):
            first, second = (f"{rank} on {hosts[rank]}" for rank in link.ranks)
            found.append(Slow("link", f"{first} - {second}", link.bandwidth, typical))
    return found
