"""The network study between real ranks: measured, a slow rank named, and no wait without an end."""

from __future__ import annotations

import json
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from engine.config.launch_env import LaunchEnv
from engine.errors import LaunchError
from engine.study.network_judge import slow
from engine.study.network_measure import all_reduce, links, pairs_of
from engine.study.network_meet import meet
from tests.helpers.command import clean_env, free_port, run_command
from tests.helpers.ranks import run_ranks

pytestmark = pytest.mark.ranks

SLOW_RANK, DELAY_S, SLOW_S = 2, 0.03, 0.3
"""Each rank waits before it sends, so that what else the machine does makes no difference."""
FACTS = {"python": "3.12", "torch": "2", "deepspeed": "1", "cuda": None, "nccl": None, "commit": "c", "device": "cpu"}


def place(rank: int, world: int, port: int) -> LaunchEnv:
    return LaunchEnv(
        rank=rank,
        world_size=world,
        local_rank=0,
        local_world_size=1,
        master_addr="127.0.0.1",
        master_port=port,
        launcher="env",
    )


def facts(rank: int, **other: Any) -> dict[str, Any]:
    return {"rank": rank, "host": f"host{rank}", **FACTS, **other}


def measured_with_a_slow_rank() -> list[str]:
    """Body of a rank. One of them takes its time before it sends."""
    send, delay = dist.send, SLOW_S if dist.get_rank() == SLOW_RANK else DELAY_S

    def late(*args: Any) -> None:
        threading.Event().wait(delay)
        send(*args)

    dist.send = late
    cpu = torch.device("cpu")
    assert all_reduce(4096, cpu).seconds > 0
    found = links(pairs_of(dist.get_world_size(), "neighbours"), 65536, cpu)
    return [f"{one.what} {one.name}" for one in slow(found, ["here"] * dist.get_world_size())]


def test_a_slow_rank_is_named_on_every_rank() -> None:
    assert run_ranks(measured_with_a_slow_rank, 4) == [[f"rank {SLOW_RANK} on here"]] * 4


def test_alone_it_starts_local_ranks_and_writes_rows(tmp_path: Path) -> None:
    words = (
        f"{sys.executable} -m engine.study network --device cpu --ranks 2 --sizes 4096,65536 --json rows/network.jsonl"
    )
    done = run_command(words, tmp_path, 120)
    assert done.exit_code == 0, str(done)
    rows = [json.loads(line) for line in (tmp_path / "rows/network.jsonl").read_text().splitlines()]
    assert [row["kind"] for row in rows] == ["rank", "rank", "all_reduce", "all_reduce", "link"]
    assert [row["size"] for row in rows if row["kind"] == "all_reduce"] == [4096, 65536]
    assert rows[-1]["ranks"] == [0, 1] and rows[-1]["bandwidth"] > 0 and rows[-1]["latency_s"] > 0
    assert rows[0]["torch"] and rows[0]["host"] == rows[1]["host"]
    assert "no slow links or hosts" in done.stdout


def test_a_rank_that_never_comes_is_named() -> None:
    with pytest.raises(LaunchError) as caught:
        meet(place(0, 3, free_port()), facts(0), 0.5)
    said = str(caught.value)
    assert "[OCT524] WORLD_SIZE=3: ranks [1, 2] did not come to 127.0.0.1:" in said
    assert "within 0.5 s; came: 0 on host0" in said
    assert "firewall" in said and "GLOO_SOCKET_IFNAME" in said


def test_a_rank_that_cannot_reach_the_first_says_where_it_tried() -> None:
    port = free_port()
    with pytest.raises(LaunchError) as caught:
        meet(place(1, 2, port), facts(1), 0.5)
    said = str(caught.value)
    assert f"[OCT523] MASTER_ADDR:MASTER_PORT=127.0.0.1:{port}: rank 1 on host1 could not connect there" in said
    assert "firewall" in said


def test_other_versions_are_refused_with_the_hosts_named(capsys: pytest.CaptureFixture[str]) -> None:
    port = free_port()
    others = [facts(0), facts(1, torch="3", device="gpu"), facts(2)]
    with ThreadPoolExecutor(3) as pool:
        ranks = [pool.submit(meet, place(rank, 3, port), others[rank], 20.0) for rank in range(3)]
        errors = [rank.exception(timeout=60) for rank in ranks]
    assert all(isinstance(error, LaunchError) for error in errors)
    assert "[OCT525] versions=torch: the hosts differ in torch: 2 on host0, host2; 3 on host1" in str(errors[0])
    assert "See what rank 0 says" in str(errors[1])
    with ThreadPoolExecutor(2) as pool:
        env, others = place(0, 2, free_port()), [facts(0), facts(1, device="gpu")]
        ranks = [pool.submit(meet, replace(env, rank=rank), others[rank], 20.0) for rank in range(2)]
        assert ranks[1].result(60)[1] == others
    assert "warning: the hosts differ in device: cpu on host0; gpu on host1" in capsys.readouterr().err


def test_a_wait_that_hangs_ends_the_process_and_says_for_what(tmp_path: Path) -> None:
    script = (
        "import threading\nfrom engine.study.network_meet import bounded\n"
        "with bounded('an all-reduce of 4 bytes', 3, 'h', 0.2):\n    threading.Event().wait()\n"
    )
    done = run_command([sys.executable, "-c", script], tmp_path, 60, env=clean_env())
    assert done.exit_code == 2
    assert "[OCT526] network=an all-reduce of 4 bytes: rank 3 on h: still waiting after 0.2 s" in done.stderr
