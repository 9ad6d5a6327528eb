"""From a case and the command line to the complete overrides of each kind of system."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from benchmarks.step.cases import COMMON, Case

WARMUP = 5
"""Steps in which the learning rate grows."""


def merged(words: Iterable[str]) -> list[str]:
    """`words` less those that a later one replaces."""
    return list({word.partition("=")[0]: word for word in words}.values())


def value_of(words: Sequence[str], option: str, default: int = 1) -> int:
    """An integer option in merged overrides. Raises ValueError: it is none."""
    found = [word.partition("=")[2] for word in words if word.startswith(f"{option}=")]
    if found and not found[-1].isdecimal():
        raise ValueError(f"{option}={found[-1]}: all systems train on the same batches, so a number is needed")
    return int(found[-1]) if found else default


def quick(case: Case) -> Case:
    """`case` with the same layout at a size for CPUs: that all runs, not how fast."""
    (model,) = (word for word in case.words if word.startswith("model="))
    family = next((name for name in ("llama", "bert") if name in model), "gpt")
    stages = value_of(case.octant, "parallel.pp")
    tiny = [
        f"model={family}_tiny",
        f"model.num_layers={max(2, 2 * stages if stages > 1 else 0)}",
        "data.seq_len=64",
        "train.micro_batch=2",
        f"train.accum_steps={max(2, 2 * stages, case.gpus)}",
        "train.cpu_threads=1",
    ]
    if not any(word.startswith("precision") for word in case.octant):
        # Exact enough to see that all systems compute the same, and at home on CPUs.
        tiny.append("precision=fp32")
    kept = (word for word in case.words if not word.startswith("model."))
    return Case(
        case.name,
        tuple(merged([*kept, *tiny])),
        # What kernels and graphs are asked for is for GPUs.
        tuple(word for word in case.octant if not word.startswith("kernels.")),
        case.gpus,
        warmup=1,
        measured=3,
        reference_step=2 if case.reference_step else 0,
        reference=("train.micro_batch=1",) if case.reference else (),
    )


@dataclass(frozen=True, slots=True)
class Words:
    """Complete overrides of each kind of system in one case. All train on the same global batches."""

    octant: list[str]
    sharded: list[str]
    """Peers with ZeRO."""
    whole: list[str]
    """Peers whose replicas hold everything."""
    reference: list[str]
    """One process in fp32."""


def words_of(case: Case, overrides: Sequence[str] = ()) -> Words:
    """The overrides of `case` and of the command line, whose layout, number formats and CUDA graphs are Octant's alone.

    Raises:
        ValueError: Octant's layout does not fit `case.gpus`, or its global batch cannot be shared by as many replicas.
    """
    # Equal in every round and system, and no longer than the shortest of them.
    common = [*COMMON, f"optim.warmup_steps={min(WARMUP, case.warmup + case.measured)}", *case.words]
    octant = merged([*common, *case.octant, *overrides])
    cut = value_of(octant, "parallel.pp") * value_of(octant, "parallel.tp") * value_of(octant, "parallel.context")
    replicas = case.gpus // cut
    if replicas * cut != case.gpus:
        raise ValueError(f"{case.name}: pp * tp * context = {cut} does not divide its {case.gpus} GPUs")
    samples = value_of(octant, "train.micro_batch") * value_of(octant, "train.accum_steps") * replicas
    own = ("parallel", "precision", "kernels.cuda_graphs")
    shared = [*common, *(word for word in overrides if not word.startswith(own))]
    whole = [*(word for word in shared if not word.startswith("zero")), "zero=z1"]

    def over(count: int, words: Iterable[str]) -> list[str]:
        found = merged(words)
        rows = value_of(found, "train.micro_batch") * count
        if samples % rows:
            raise ValueError(f"{case.name}: {samples} samples of a step are not a multiple of {rows}")
        return merged([*found, f"parallel.dp={count}", f"train.accum_steps={samples // rows}"])

    single = [*whole, *case.reference, "precision=fp32", "kernels.compile=off"]
    return Words(
        merged([*octant, f"parallel.dp={replicas}"]), over(case.gpus, shared), over(case.gpus, whole), over(1, single)
    )
