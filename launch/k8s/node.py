"""The main process of a pod: finds its node's place in the job and runs the node's ranks to their end.

    python node.py --nodes N --ranks R --master HOST:PORT [--config-hash HASH] [--module MODULE] -- overrides

The node's rank is JOB_COMPLETION_INDEX, which Kubernetes sets in the pods of an Indexed Job. torchrun would do for the
ranks, but ends with 1 whatever they end with, and the pod failure policy needs their codes: see `engine.train`.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence

from engine.config import entry
from engine.config.load import config_hash, load
from engine.errors import LaunchError

DNS_TIMEOUT_S = 900.0
"""The name of pod 0 is there once the pod has an address, which may be after its image was pulled."""
_POLL_S = 1.0


def main(argv: Sequence[str]) -> int:
    """Exit code: as `engine.train`, or 128 and the number of the signal that ended a rank; 1 when pod 0 has no address.

    Raises:
        LaunchError: 560 the config differs from the one submitted, and as `node_rank`.
    """
    options = _parser().parse_args(argv)
    rank = node_rank(os.environ, options.nodes)
    if options.config_hash is not None:
        _require_config(options.config_hash, options.overrides)
    host, _, port = options.master.rpartition(":")
    try:
        wait_for_name(host, DNS_TIMEOUT_S)
    except LaunchError as error:
        # Not 2, for which the Job would not be tried again: pod 0 may be waiting for a machine.
        print(f"LaunchError:\n{error}", file=sys.stderr)
        return 1
    from engine.train import local

    places = environments(rank, options.nodes, options.ranks, host, port)
    return local.supervise(
        [sys.executable, "-m", options.module, *options.overrides], [os.environ | place for place in places]
    )


def node_rank(environ: Mapping[str, str], nodes: int) -> int:
    """The rank of this node. Raises `LaunchError` 561: there is none below `nodes`."""
    text = environ.get("JOB_COMPLETION_INDEX", "(not set)")
    if not text.isdecimal() or int(text) >= nodes:
        raise LaunchError.of(
            561,
            "JOB_COMPLETION_INDEX",
            text,
            f"the rank of this node is a number below --nodes {nodes}",
            "Use completionMode: Indexed, and completions equal to --nodes",
        )
    return int(text)


def environments(node: int, nodes: int, ranks: int, host: str, port: str) -> list[dict[str, str]]:
    """The variables that torchrun would set for each of the `ranks` of node `node`."""
    common = {
        "WORLD_SIZE": str(nodes * ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": host,
        "MASTER_PORT": port,
    }
    return [common | {"RANK": str(node * ranks + local), "LOCAL_RANK": str(local)} for local in range(ranks)]


def wait_for_name(host: str, timeout_s: float) -> None:
    """Wait until the name of pod 0 has an address. Raises `LaunchError` 562: it has none after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            socket.getaddrinfo(host, None)
        except socket.gaierror as error:
            if time.monotonic() > deadline:
                raise LaunchError.of(
                    562,
                    "--master",
                    host,
                    f"no address for this name after {timeout_s:.0f} s ({error})",
                    "See whether pod 0 runs (kubectl get pods), whether the headless Service selects it, and the "
                    "cluster's DNS",
                ) from error
            time.sleep(_POLL_S)
        else:
            return


def _require_config(expected: str, overrides: Sequence[str]) -> None:
    found = config_hash(load(overrides))
    if found != expected:
        raise LaunchError.of(
            560,
            "--config-hash",
            expected,
            f"the image composes another config than the one submitted, with the hash {found}",
            "Build the image from the commit that launch/submit.py ran from",
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="node.py", description="Run the ranks of one node of an Indexed Job.")
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--ranks", type=int, required=True, help="ranks of this node")
    parser.add_argument("--master", required=True, help="HOST:PORT where rank 0 listens")
    parser.add_argument("--config-hash", help="refuse to train another config")
    parser.add_argument("--module", default="engine.train", help="what each rank runs (default engine.train)")
    parser.add_argument("overrides", nargs="*")
    return parser


if __name__ == "__main__":
    # The kernel drops a signal that the main process of a pod does not handle, and nothing is to be saved yet.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(entry.STOPPED))
    sys.exit(entry.run(lambda: main(sys.argv[1:])))
