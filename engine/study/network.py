"""`python -m engine.study network`: who is there, and how fast are the wires between them?

Start it as training is started, with torchrun, srun or deepspeed; alone it starts ranks on this machine. Before a long
run it finds hosts with other versions, closed ports, and links and hosts that are slower than the rest.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from engine.config import launch_env
from engine.config.enums import Device
from engine.config.launch_env import LaunchEnv
from engine.dist import init
from engine.observe import log
from engine.study import network_measure as measure
from engine.study.network_judge import Link, slow
from engine.study.network_meet import Facts, bounded, facts_of, meet

LOCAL_CPU_RANKS = 2

Row = dict[str, Any]


def main(argv: Sequence[str]) -> int:
    """0 when nothing is slow, 1 when something is; a refusal ends with 2, as does a wait that was too long.

    Raises:
        LaunchError: see `launch_env.read`, `meet` and `bounded`.
    """
    options = _parse(argv)
    env = launch_env.read(os.environ)
    if env is None:
        return _start_local(options, argv)
    log.configure(env.rank)
    device = init.local_device(init.resolve_device_type(Device[options.device]), env.local_rank)
    init.set_numerics(device, None, env.local_world_size, tf32=False)
    store, everyone = meet(env, facts_of(env, device), options.timeout)
    for facts in everyone:
        log.say(f"rank {facts['rank']:4} on {facts['host']}: {facts['device']}, torch {facts['torch']}")
    with bounded("the process group", env.rank, everyone[env.rank]["host"], options.timeout):
        _join(env, store, device, options.timeout)
    rows = _measure(options, env, everyone, device)
    if options.json and env.rank == 0:
        Path(options.json).parent.mkdir(parents=True, exist_ok=True)
        Path(options.json).write_text("".join(json.dumps(row) + "\n" for row in rows))
        log.say(f"rows in {options.json}")
    with bounded("the end of the others", env.rank, everyone[env.rank]["host"], options.timeout):
        init.shutdown()
    return int(any(row["kind"] == "slow" for row in rows))


def _start_local(options: argparse.Namespace, argv: Sequence[str]) -> int:
    """The same command once for each rank of this machine: a GPU each, or two on the CPU."""
    from engine.train import local

    cuda = init.resolve_device_type(Device[options.device]) == "cuda"
    count = options.ranks or (torch.cuda.device_count() if cuda else LOCAL_CPU_RANKS)
    store, meeting = local.meeting_point()
    common = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), **meeting}
    places = [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
    words = [sys.executable, "-m", "engine.study", "network", *argv]
    code = local.supervise(words, [os.environ | place for place in places])
    del store  # It has to outlive the ranks.
    return code


def _join(env: LaunchEnv, store: dist.Store, device: torch.device, timeout_s: float) -> None:
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        store=dist.PrefixStore("group", store),
        rank=env.rank,
        world_size=env.world_size,
        # `bounded` speaks first.
        timeout=timedelta(seconds=2 * timeout_s),
        device_id=device if cuda else None,
    )
    dist.barrier()


def _measure(options: argparse.Namespace, env: LaunchEnv, everyone: list[Facts], device: torch.device) -> list[Row]:
    """Rows of every rank, all-reduce and link, and of what is slow. Collective."""
    host, world = everyone[env.rank]["host"], env.world_size
    rows: list[Row] = [{"kind": "rank", **facts} for facts in everyone]
    if world == 1:
        log.say("one rank has no network")
        return rows
    log.say(f"{'all-reduce':>14} {'time':>12} {'algbw GB/s':>11} {'busbw GB/s':>11}")
    for size in options.sizes or measure.SIZES[device.type]:
        with bounded(f"an all-reduce of {size} bytes", env.rank, host, options.timeout):
            done = measure.all_reduce(size, device)
        bus = done.bus_bandwidth(world)
        log.say(f"{size:12} B {done.seconds * 1e6:9.0f} us {done.bandwidth / 1e9:11.3f} {bus / 1e9:11.3f}")
        rows.append({"kind": "all_reduce", **asdict(done), "bandwidth": done.bandwidth, "bus_bandwidth": bus})
    links: list[Link] = []
    log.say(f"{'ranks':>14} {'latency':>12} {'GB/s':>11}")
    for pair in measure.pairs_of(world, options.pairs):
        with bounded(f"messages between ranks {pair[0]} and {pair[1]}", env.rank, host, options.timeout):
            links += measure.links([pair], measure.LINK_BYTES[device.type], device)
        link, names = links[-1], [everyone[rank]["host"] for rank in pair]
        log.say(f"{pair[0]:6} - {pair[1]:5} {link.latency_s * 1e6:9.0f} us {link.bandwidth / 1e9:11.3f}")
        rows.append({"kind": "link", **asdict(link), "hosts": names})
    found = slow(links, [facts["host"] for facts in everyone])
    for one in found:
        log.warn(str(one))
    log.say("no slow links or hosts" if not found else f"{len(found)} slow links, ranks or hosts, see the warnings")
    return rows + [{"kind": "slow", **asdict(one)} for one in found]


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return value


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return int(text)


def _sizes(text: str) -> list[int]:
    return [_count(part) for part in text.split(",")]


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m engine.study network",
        description="Meet all ranks, compare their versions, and measure the network between them. Exit code 1: "
        "something is slower than half of the median.",
    )
    parser.add_argument("--ranks", type=_count, help="local ranks when no launcher started this (default: GPUs, or 2)")
    parser.add_argument("--device", choices=[str(device) for device in Device], default="auto")
    parser.add_argument("--sizes", type=_sizes, help="bytes of the all-reduces, such as 4096,1048576")
    parser.add_argument("--pairs", choices=["neighbours", "all"], default="neighbours", help="default neighbours")
    parser.add_argument("--timeout", type=_positive, default=60.0, help="longest wait, seconds (default 60)")
    parser.add_argument("--json", metavar="FILE", help="write rows there, one JSON object a line")
    # DeepSpeed's launcher appends it; the rank is read from the environment.
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)
    return parser.parse_args(argv)
