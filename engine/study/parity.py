"""`python -m engine.study parity`: does every combination of features compute what one process computes?

For each case of a pairwise covering array the raw gradients of every parameter, ten steps of SGD with momentum and ten
of AdamW with clipping, the losses and the clip norms are compared with `runtime.reference` in fp32. Raw gradients and
SGD, because Adam hides a wrong scale. In bf16 and fp16 gradients and losses are held against one rank's error.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from engine.config.enums import DType, TpOverlap, Transport
from engine.config.load import load
from engine.config.schema import ParallelConfig
from engine.data import prepare
from engine.dist.init import resolve_device_type
from engine.errors import ConfigError, LaunchError
from engine.observe.environment import environment
from engine.observe.log import quiet_libraries, say
from engine.runtime import extensions
from engine.study.cases import FREE, LAYOUT, Case, refusal, sizes_of
from engine.study.compare import limits
from engine.study.covering import Space, choose, covering_size
from engine.study.run import PRELOAD, Row, run_cases

__all__ = ["DEFAULTS", "PRELOAD", "main"]

DEFAULTS = [
    "data=random",
    "data.seq_len=16",
    "data.seed=1",
    "train.steps=10",
    "optim.warmup_steps=0",
    "kernels.compile=off",
    "run.name=parity",
]
"""Overrides that come before the user's: small random samples, which reach every entry of the vocabulary.

Seed 1, because with 0 exactly half of the first samples of BERT are of either class: the gradient of the classifier
cancels to a fortieth of its usual size, and rounding shows (1.6e-5, also of the oracle that groups them otherwise).
"""
ALL, QUICK = 120, 20
"""Cases without options, and with --quick."""
_WORDS = {False: "off", True: "on"}
_OPTIONS = {"world": "worlds", "flavour": "flavours", "schedule": "schedules"}


def main(argv: Sequence[str]) -> int:
    """Run the study; 0 when every case agrees, 1 on any miss."""
    options, overrides = _parse(argv)
    base = load([*DEFAULTS, *overrides])
    base.precision.dtype = DType[options.dtype]
    domains = {name: getattr(options, name) for name in (*LAYOUT, *FREE)}
    _leave_out(domains, resolve_device_type(base.train.device), base.parallel if options.share_gpus else None)
    found = [refusal(base, Case(world=1, zero=stage)) for stage in domains["zero"]]
    if all(found):
        raise ConfigError(found[0])
    space = Space(base, domains)
    if not len(space):
        raise LaunchError.of(
            521, "parity", " ".join(argv), "no combination of the asked values is legal", "Widen --worlds, --pp or --tp"
        )
    cases = choose(space, options.cases or (QUICK if options.quick else ALL))
    say(f"parity of {len(cases)} of {len(space)} legal cases in {options.dtype}: {sizes_of(base.model)}")
    say(f"the first {covering_size(space)} of them cover every pair of values")
    if options.list:
        for case in cases:
            say(str(case))
        return 0
    quiet_libraries(base.logging.verbose)
    prepare(base.data, say)
    path = Path(options.json)
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = {"environment": environment(), "dtype": options.dtype, "limits": limits(base.precision.dtype)}
    rows: list[Row] = []
    for rows in run_cases(base, cases, timeout_s=options.timeout):
        path.write_text(json.dumps(facts | {"cases": rows}, indent=1) + "\n")
    return _conclude(rows, limits(base.precision.dtype), options.json)


def _leave_out(domains: dict[str, Any], device_type: str, shared: ParallelConfig | None) -> None:
    """Without what this machine cannot start: more ranks than GPUs; offload, which needs a compiled extension.

    Args:
        shared: how ranks send, if they may share GPUs: over gloo, from GPU to GPU nothing.
    """
    gpus = torch.cuda.device_count() if device_type == "cuda" else max(domains["world"])
    more = [world for world in domains["world"] if world > gpus]
    if more and shared is None:
        say(f"parity: {gpus} GPUs here, so no layouts of {more} ranks; they run with --share-gpus or train.device=cpu")
        domains["world"] = [world for world in domains["world"] if world <= gpus]
    elif more and shared is not None:
        for axis, fits, instead in (
            ("pp", shared.pipeline_transport is Transport.copy_engine, "parallel.pipeline_transport=copy_engine"),
            ("tp", shared.tp_overlap is not TpOverlap.chunked, "parallel.tp_overlap=symmetric"),
        ):
            if not fits and max(domains[axis]) > 1:
                say(f"parity: {gpus} GPUs for {max(more)} ranks, so {axis}=1 alone; {instead} allows more")
                domains[axis] = [degree for degree in domains[axis] if degree == 1]
    extensions.export()
    if "cpu" in domains["offload"] and not extensions.usable("cpu_adam"):
        say("parity: DeepSpeed's CPU Adam is neither built nor can it be here, so no offload; 'make setup' builds it")
        domains["offload"] = [word for word in domains["offload"] if word != "cpu"]


def _conclude(rows: Sequence[Row], allowed: dict[str, float], path: str) -> int:
    for kind, limit in allowed.items():
        known = [row for row in rows if kind in row["errors"]]
        if known:
            worst = max(known, key=lambda row: row["errors"][kind])
            where = ", ".join([*([worst["at"][kind]] if kind in worst["at"] else []), worst["case"]])
            say(f"worst {kind} error {worst['errors'][kind]:.2e} of {limit:.0e} allowed ({where})")
    say(f"rows in {path}")
    failed = [row for row in rows if row["failed"]]
    if failed:
        say(f"parity FAILED in {len(failed)} of {len(rows)} cases")
        for row in failed:
            say(f"  {row['case']}: {'; '.join(row['failed'])}")
        return 1
    say(f"parity holds in all {len(rows)} cases")
    return 0


def _values(name: str, known: Sequence[Any]) -> Callable[[str], list[Any]]:
    """Reads "1,2" or "on,off" as values of a setting. Degrees may be any number, other settings have fixed values."""

    def read(text: str) -> list[Any]:
        if name in ("world", "pp", "tp", "context", "accum", "zero"):
            low = 0 if name == "zero" else 1
            found = [int(part) for part in text.split(",")]
            if min(found) < low:
                raise argparse.ArgumentTypeError(f"{min(found)} is below {low}")
            return found
        words = {_word(name, value): value for value in known}
        unknown = sorted(set(text.split(",")) - set(words))
        if unknown:
            raise argparse.ArgumentTypeError(f"unknown {unknown}, known: {', '.join(words)}")
        return [words[part] for part in text.split(",")]

    return read


def _word(name: str, value: Any) -> str:
    if name == "tied":
        return "tied" if value else "untied"
    return _WORDS[value] if isinstance(value, bool) else str(value)


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="python -m engine.study parity",
        description="Compare the raw gradients and the steps of every combination of features with one process. "
        "Everything that is not an option is an override of the configuration, such as model=gpt_tiny.",
    )
    for name, known in {**LAYOUT, **FREE}.items():
        words = ",".join(_word(name, value) for value in known)
        option = f"--{_OPTIONS.get(name, name)}"
        parser.add_argument(
            option, dest=name, type=_values(name, known), default=list(known), metavar="LIST", help=f"default {words}"
        )
    parser.add_argument("--cases", type=int, help=f"number of cases (default {ALL})")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK} cases, which cover most pairs of values")
    parser.add_argument(
        "--share-gpus",
        action="store_true",
        help="ranks without a GPU of their own share one, over gloo: right, but slow",
    )
    parser.add_argument("--list", action="store_true", help="name the cases and stop")
    parser.add_argument("--dtype", choices=[str(dtype) for dtype in DType], default="fp32", help="default fp32")
    parser.add_argument("--json", default="runs/parity.json", help="where the rows go (default runs/parity.json)")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds allowed per case (default 120)")
    return parser.parse_known_args(argv)
