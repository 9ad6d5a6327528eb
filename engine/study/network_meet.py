"""Ranks find each other for `engine.study network`; every wait is bounded and ends with what to look at."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from engine.config.launch_env import LaunchEnv
from engine.errors import LaunchError
from engine.observe.environment import environment
from engine.study.network_judge import MUST_AGREE, SHOULD_AGREE, differences

Facts = dict[str, Any]
"""rank, host, device, python, torch, deepspeed, cuda, nccl, commit of one rank."""

_VERDICT = "verdict"
_SLACK_S = 5.0
_INTERFACES = "that GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name an interface that reaches the other hosts"


def facts_of(env: LaunchEnv, device: torch.device) -> Facts:
    """This rank and what it runs on."""
    found, packages = environment(), environment()["packages"]
    return {
        "rank": env.rank,
        "host": socket.gethostname(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "python": found["python"],
        "torch": packages["torch"],
        "deepspeed": packages["deepspeed"],
        "cuda": found["cuda"],
        "nccl": found["nccl"],
        "commit": (found["git"] or {}).get("commit"),
    }


def meet(env: LaunchEnv, facts: Facts, timeout_s: float) -> tuple[dist.Store, list[Facts]]:
    """The store at rank 0's address, and the facts of all ranks.

    Raises:
        LaunchError: 523 rank 0 cannot be reached, 524 ranks that never came, 525 versions that differ.
    """
    where = f"{env.master_addr}:{env.master_port}"
    # torchrun's agent listens there already.
    listens = env.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    limit = timedelta(seconds=timeout_s)
    try:
        whole = dist.TCPStore(
            env.master_addr, env.master_port, is_master=listens, timeout=limit, wait_for_workers=False
        )
    except (dist.DistError, RuntimeError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise LaunchError.of(
            523,
            "MASTER_ADDR:MASTER_PORT",
            where,
            f"rank {env.rank} on {facts['host']} could not {'listen' if listens else 'connect'} there within "
            f"{timeout_s:g} s ({first})",
            "Check that rank 0 runs, that the address is that of its host, that no other job holds the port, and that "
            "no firewall closes it",
        ) from error
    store = dist.PrefixStore("octant-network", whole)
    store.set(f"facts/{env.rank}", json.dumps(facts))
    if env.rank == 0:
        _judge(env, store, where, timeout_s)
    try:
        store.wait([_VERDICT], timedelta(seconds=timeout_s + _SLACK_S))
    except (dist.DistError, RuntimeError) as error:
        raise LaunchError.of(
            523,
            "MASTER_ADDR:MASTER_PORT",
            where,
            f"rank {env.rank} on {facts['host']} lost rank 0 while the ranks met",
            "See what rank 0 says",
        ) from error
    if store.get(_VERDICT) != b"ok":
        raise LaunchError.of(523, "network", where, f"rank {env.rank} ends, as rank 0 does", "See what rank 0 says")
    everyone = [json.loads(store.get(f"facts/{rank}")) for rank in range(env.world_size)]
    return store, everyone


def _judge(env: LaunchEnv, store: dist.Store, where: str, timeout_s: float) -> None:
    """Rank 0 waits for all and says whether they go on."""
    keys = [f"facts/{rank}" for rank in range(env.world_size)]
    try:
        store.wait(keys, timedelta(seconds=timeout_s))
    except (dist.DistError, RuntimeError) as error:
        store.set(_VERDICT, "missing")
        here = [rank for rank, key in enumerate(keys) if store.check([key])]
        missing = sorted(set(range(env.world_size)) - set(here))
        came = ", ".join(f"{rank} on {json.loads(store.get(keys[rank]))['host']}" for rank in here)
        raise LaunchError.of(
            524,
            "WORLD_SIZE",
            env.world_size,
            f"ranks {missing} did not come to {where} within {timeout_s:g} s; came: {came}",
            "Check that they were started with the same MASTER_ADDR and MASTER_PORT, that the address is that of rank "
            f"0's host, that no firewall closes the port, and {_INTERFACES}",
        ) from error
    found = [json.loads(store.get(key)) for key in keys]
    differ = differences(found, MUST_AGREE)
    store.set(_VERDICT, "differ" if differ else "ok")
    if differ:
        rule = ", ".join(f"{name}: {text}" for name, text in differ.items())
        raise LaunchError.of(
            525, "versions", ", ".join(differ), f"the hosts differ in {rule}", "Give every host the same environment"
        )
    for name, text in differences(found, SHOULD_AGREE).items():
        print(f"warning: the hosts differ in {name}: {text}", file=sys.stderr, flush=True)


@contextmanager
def bounded(what: str, rank: int, host: str, timeout_s: float) -> Iterator[None]:
    """End this process with exit code 2 when the block takes longer than `timeout_s`, and say what it waited for.

    A thread, because a rank that waits in a collective of NCCL sees no exception. Raises `LaunchError` 526 when the
    other side has gone.
    """

    def give_up() -> None:
        print(f"LaunchError:\n{_stuck(what, rank, host, f'still waiting after {timeout_s:g} s')}", file=sys.stderr)
        sys.stderr.flush()
        os._exit(LaunchError.exit_code)

    timer = threading.Timer(timeout_s, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    except RuntimeError as error:
        raise _stuck(what, rank, host, str(error).splitlines()[0]) from error
    finally:
        timer.cancel()


def _stuck(what: str, rank: int, host: str, why: str) -> LaunchError:
    return LaunchError.of(
        526,
        "network",
        what,
        f"rank {rank} on {host}: {why}",
        "See which rank has ended or says nothing; check that its host runs, that ports between the hosts are open, "
        f"and {_INTERFACES}",
    )
