"""The named cases of this suite as data: what is trained, on how many GPUs, and the figure to reach.

All numbers of a case (model, sequence, batch, precision) are overrides of `engine.train`. `words` merges them in this
order: `COMMON`, `Case.words`, for Octant alone `Case.octant`, then those of the command line; a later word takes the
place of an earlier one for the same option.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

COMMON = (
    "data=random",
    "precision=bf16",
    "zero=z1",
    "optim.lr=2.0e-04",
    "optim.schedule=constant",
    "train.eval_batches=0",
    "checkpoint.save_final=false",
    "logging.plot=false",
    "logging.progress=false",
)
_LEAN = ("train.micro_batch=1", "train.recompute=full", "precision.tf32=true")
"""The fp32 reference of a model too large for plain fp32; its matrix products then round to TF32's 10 bits."""


class Kind(StrEnum):
    """What a target is about."""

    rate = "tok/s per GPU"
    plain = "of the quicker plain compiled loop in the same call"
    case = "of the rate per GPU of"
    faster = "times the rate of"
    samples = "sequences/s"
    tflops = "TFLOP/s C per GPU"
    bubble = "points over the schedule's ideal bubble, by the rate without one of"
    seq_len = "tokens in a sequence"
    parameters = "billion parameters"


@dataclass(frozen=True, slots=True)
class Target:
    """`limit` is the least (of `bubble` the most); `of`: the case whose Octant row is compared with."""

    kind: Kind
    limit: float
    of: str = ""

    @property
    def text(self) -> str:
        """In words."""
        shares = (Kind.plain, Kind.case)
        limit = f"{self.limit:.0%}" if self.kind in shares else f"{self.limit:,g}"
        sign = "at most" if self.kind is Kind.bubble else "at least"
        return f"{sign} {limit} {self.kind}{' ' + self.of if self.of else ''}"


@dataclass(frozen=True, slots=True)
class Case:
    """One line of the table of targets.

    Peers know one layout, data parallelism over all `gpus`: their accumulation follows from Octant's global batch.
    """

    name: str
    words: tuple[str, ...]
    octant: tuple[str, ...] = ()
    """Overrides of Octant alone: its layout, and options that peers have no counterpart of."""
    gpus: int = 1
    targets: tuple[Target, ...] = ()
    warmup: int = 5
    """Steps of a process that are not counted: compilation, allocator, autotuning."""
    measured: int = 12
    """Counted steps of a process; with two rounds twice as many."""
    profiled: int = 2
    """Steps of the first round, after the counted ones, that are profiled."""
    reference_step: int = 10
    """Step (from 1) whose loss is held against fp32; 0: none, the model does not fit or takes too long in fp32."""
    reference: tuple[str, ...] = ()
    """Overrides of the fp32 reference."""


_GPT_1_3B = ("model=gpt_1_3b", "data.seq_len=2048", "train.micro_batch=8")
_GPT_2_8B = ("model=gpt_2_7b", "data.seq_len=2048", "train.micro_batch=4")
_LLAMA_8B = ("model=llama_8b", "data.seq_len=4096", "train.micro_batch=2", "train.accum_steps=4")
_BF16_STATES = ("precision.states=bf16", "precision.grad_accum=bf16")
_TP = ("parallel.sequence=true",)

CASES: dict[str, Case] = {
    case.name: case
    for case in (
        Case("gpt_1_3b_accum1", (*_GPT_1_3B, "train.accum_steps=1"), targets=(Target(Kind.plain, 0.97),)),
        Case(
            "gpt_1_3b_accum8",
            (*_GPT_1_3B, "train.accum_steps=8"),
            targets=(Target(Kind.plain, 0.97), Target(Kind.rate, 66_000)),
            reference=("precision.tf32=true",),
        ),
        Case(
            "gpt2_124m",
            ("model=gpt2_124m", "data.seq_len=1024", "train.micro_batch=64", "train.accum_steps=1"),
            ("kernels.cuda_graphs=on",),
            targets=(Target(Kind.rate, 580_000),),
            measured=20,
        ),
        Case(
            "llama_8b",
            _LLAMA_8B,
            _BF16_STATES,
            targets=(Target(Kind.rate, 12_000),),
            reference_step=5,
            reference=_LEAN,
        ),
        Case(
            "llama_8b_fp8",
            _LLAMA_8B,
            (*_BF16_STATES, "precision=fp8"),
            targets=(Target(Kind.faster, 1.30, "llama_8b"),),
            reference_step=5,
            reference=_LEAN,
        ),
        *(
            Case(
                f"zero1_gpt_1_3b_accum{accum}_{gpus}gpus",
                (*_GPT_1_3B, f"train.accum_steps={accum}"),
                gpus=gpus,
                targets=(Target(Kind.case, 0.97, f"gpt_1_3b_accum{accum}"),),
                reference=("precision.tf32=true",),
            )
            for gpus in (2, 4)
            for accum in (1, 8)
        ),
        *(
            Case(
                f"zero1_llama_8b_{gpus}gpus",
                _LLAMA_8B,
                _BF16_STATES,
                gpus=gpus,
                targets=(Target(Kind.case, 0.97, "llama_8b"),),
                reference_step=0,
            )
            for gpus in (2, 4)
        ),
        Case("zero1_llama_8b_fp32_2gpus", _LLAMA_8B, gpus=2, reference_step=0),
        Case(
            "zero3_llama_8b_2gpus",
            (*_LLAMA_8B, "zero=z3"),
            gpus=2,
            targets=(Target(Kind.case, 0.90, "zero1_llama_8b_fp32_2gpus"),),
            reference_step=0,
        ),
        Case("zero1_llama_8b_16_layers", (*_LLAMA_8B, "model.num_layers=16"), reference_step=0),
        Case(
            # Nothing is sent: what the partitioned layers themselves cost.
            "zero3_llama_8b_16_layers",
            (*_LLAMA_8B, "model.num_layers=16", "zero=z3"),
            targets=(Target(Kind.case, 0.97, "zero1_llama_8b_16_layers"),),
            reference_step=0,
        ),
        Case("zero1_gpt_2_8b_2gpus", (*_GPT_2_8B, "train.accum_steps=4"), gpus=2, reference_step=0),
        Case(
            "zero3_gpt_2_8b_2gpus",
            (*_GPT_2_8B, "train.accum_steps=4", "zero=z3"),
            gpus=2,
            targets=(Target(Kind.case, 0.90, "zero1_gpt_2_8b_2gpus"),),
            reference_step=0,
        ),
        *(
            Case(
                f"tp{gpus}_llama_8b",
                _LLAMA_8B,
                # What tensor parallelism leaves of the memory goes into larger, fewer micro-batches: products and
                # messages get larger, and the host launches fewer.
                (f"parallel.tp={gpus}", *_TP, f"train.micro_batch={2 * gpus}", f"train.accum_steps={4 // gpus}"),
                gpus=gpus,
                targets=(Target(Kind.rate, rate),),
                reference_step=0,
            )
            for gpus, rate in ((2, 9_500), (4, 8_500))
        ),
        Case("gpt_2_8b_without_bubble", (*_GPT_2_8B, "train.accum_steps=8"), measured=10, reference_step=0),
        Case(
            "pp2_gpt_2_8b",
            (*_GPT_2_8B, "train.accum_steps=16"),
            ("parallel.pp=2",),
            gpus=2,
            targets=(Target(Kind.bubble, 3, "gpt_2_8b_without_bubble"),),
            measured=10,
            reference_step=0,
        ),
        *(
            Case(
                f"pp4_{schedule}_gpt_2_8b",
                (*_GPT_2_8B, "train.accum_steps=16"),
                ("parallel.pp=4", f"parallel.schedule={schedule}", *more),
                gpus=4,
                targets=(Target(Kind.bubble, 3, "gpt_2_8b_without_bubble"), Target(Kind.rate, 28_500)),
                measured=10,
                reference_step=0,
            )
            for schedule, more in (
                ("one_f_one_b", ()),
                ("interleaved", ("parallel.virtual_stages=2",)),
                ("dualpipev", ()),
            )
        ),
        Case(
            "offload_gpt_6_7b",
            (
                "model=gpt_6_7b",
                "data.seq_len=2048",
                "train.micro_batch=4",
                "train.accum_steps=32",
                "zero=z1_offload",
                "train.recompute=selective",
            ),
            targets=(Target(Kind.tflops, 450),),
            warmup=1,
            measured=3,
            profiled=1,
            reference_step=0,
        ),
        Case(
            "offload_largest",
            (
                "model=gpt_13b",
                "model.num_layers=54",
                "data.seq_len=2048",
                "train.micro_batch=1",
                "train.accum_steps=1",
                "zero=z1_offload",
                "train.recompute=full",
            ),
            _BF16_STATES,
            targets=(Target(Kind.parameters, 17),),
            warmup=1,
            measured=2,
            profiled=0,
            reference_step=0,
        ),
        Case(
            "bert_large",
            # Post-norm blocks diverge in their first steps at the others' rate: two precisions then part by chance.
            ("model=bert_large", "data.seq_len=512", "train.micro_batch=64", "train.accum_steps=1", "optim.lr=2.0e-05"),
            targets=(Target(Kind.samples, 390),),
            measured=20,
        ),
        Case(
            "long_llama_8b",
            (
                "model=llama_8b",
                "model.max_positions=350208",
                "data.seq_len=350208",
                "train.micro_batch=1",
                "train.accum_steps=1",
                "train.recompute=full",
            ),
            (
                *_BF16_STATES,
                "train.recompute_interval=4",
                "train.recompute_nested=true",
                "train.tiles=block",
                "kernels.loss=triton",
                "kernels.norm=triton",
            ),
            targets=(Target(Kind.seq_len, 350_000),),
            warmup=1,
            measured=1,
            profiled=0,
            reference_step=0,
        ),
    )
}
"""Longer comparisons, such as the losses of 300 steps in fp8 and bf16 on text, are no step times and not in here."""
