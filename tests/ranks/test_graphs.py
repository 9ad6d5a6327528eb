"""Training with passes that run again on the same memory, and with a tape in place of CUDA graphs: the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from engine.checkpoint.restore import load as load_state
from engine.checkpoint.restore import open_verified
from engine.checkpoint.save import Saver
from engine.config.load import load
from tests.helpers.ranks import run_ranks
from tests.helpers.tape import Tape
from tests.ranks.test_flat import WORDS, Run

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(300)]

STEPS = 5
DROPS = ["model.dropout=0.1", "optim.weight_decay=0.1"]
Curve = list[tuple[float, float]]


class Validated(Run):
    """A run that looks at other samples before some of its steps."""

    def step(self, number: int, lr: float = 1e-2) -> tuple[float, float]:
        if number % 2:
            sizes = {"dp_rank": self._ctx.dp.rank, "dp": self._ctx.dp.size, "micro_batch": 2, "accum_steps": 1}
            self.engine.eval_step(self._split.micro_batches(1000, **sizes))
        return super().step(number, lr)


def run_of(words: list[str], how: str) -> Validated:
    """`how`: "off", "on" as on a CPU, or "tape"."""
    switch = "off" if how == "off" else "on"
    run = Validated(
        load([*WORDS, *DROPS, *words, f"kernels.cuda_graphs={switch}"]), dist.get_world_size(), one_pass=True
    )
    if how == "tape":
        run.engine.graphed._recorder = Tape()
    return run


def in_each_way(words: list[str]) -> list[tuple[Curve, dict[str, Tensor], int]]:
    """Losses with norms, masters and repeated passes."""
    found = []
    for how in ("off", "on", "tape"):
        run = run_of(words, how)
        curve = [run.step(number) for number in range(STEPS)]
        found.append((curve, run.weights(), run.engine.graphed.replays if how != "off" else 0))
    return found


def same(mine: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    return mine.keys() == others.keys() and all(torch.equal(value, others[name]) for name, value in mine.items())


CASES: dict[str, tuple[int, list[str]]] = {
    "gpt": (1, []),
    "gpt in three passes": (1, ["train.accum_steps=3"]),
    "replicas": (2, ["train.accum_steps=3", "zero.overlap_comm=false"]),
    "recomputed": (1, ["train.accum_steps=2", "train.recompute=full"]),
    "bert": (1, ["model=bert_tiny", "model.num_layers=2", "train.accum_steps=2", "model.attention_dropout=0"]),
    "fp8": (1, ["precision=fp8"]),
    "llama, bf16 states": (1, ["model=llama_tiny", "train.accum_steps=2", "precision.states=bf16"]),
    "another optimizer": (1, ["optim=sgd", "train.accum_steps=2"]),
}


@pytest.mark.parametrize("case", CASES)
def test_the_bits_are_those_without_graphs(case: str) -> None:
    world, words = CASES[case]
    accum = next((int(word[-1]) for word in words if word.startswith("train.accum_steps")), 1)
    for (curve, masters, _), *others in run_ranks(in_each_way, world, (words,), timeout_s=120):
        for other, theirs, replays in others:
            assert curve == other
            assert same(masters, theirs)
            assert replays == STEPS * accum - 2 * min(accum, 2), "all but two passes of each kind"


def lost(how: str) -> Any:
    """Curve, masters and kinds of passes, where a parameter has no gradient in the first of three passes of a step."""
    run = run_of(["train.accum_steps=3"], how)
    optimizer = run.engine._ds.optimizer
    take = type(optimizer).accumulate_hp_grads_and_remove_lp

    def loses(parameter: Any, group: int, index: int) -> None:
        if (group, index) == (0, 2) and run.engine._ds.micro_steps % 3 == 0:
            parameter.grad = None
        else:
            take(optimizer, parameter, group, index)

    optimizer.accumulate_hp_grads_and_remove_lp = loses
    curve = [run.step(number) for number in range(STEPS)]
    return curve, run.weights(), len(run.engine.graphed._kinds) if how != "off" else 0


def test_a_parameter_without_a_gradient_in_one_pass_makes_another_kind() -> None:
    [(curve, masters, _)] = run_ranks(lost, 1, ("off",))
    [(other, theirs, kinds)] = run_ranks(lost, 1, ("tape",))
    assert curve == other
    assert same(masters, theirs)
    assert kinds == 3, "nothing is there yet, all but one, all"


def saved(folder: Path, how: str) -> tuple[Curve, dict[str, Tensor]]:
    """All steps; the state after the second is saved into `folder`."""
    run = run_of(["train.accum_steps=2"], how)
    saver = Saver(run.engine, asynchronous=False)
    curve = []
    for number in range(STEPS):
        if number == 2:
            saver.save(folder, {"step": 2, "samples": 0})
        curve.append(run.step(number))
    saver.close()
    return curve, run.weights()


def resumed(folder: Path, late: int) -> tuple[Curve, dict[str, Tensor]]:
    """The steps from the third on, from what was saved; read after `late` steps, whose passes may be recorded."""
    run = run_of(["train.accum_steps=2"], "tape")
    for number in range(late):
        run.step(number + 7)
    load_state(run.engine, open_verified([folder], print))
    return [run.step(number) for number in range(2, STEPS)], run.weights()


@pytest.mark.parametrize("late", [0, 3])
def test_a_run_goes_on_as_it_would_have(late: int, tmp_path: Path) -> None:
    [(curve, masters)] = run_ranks(saved, 1, (tmp_path / "a", "off"))
    [(other, theirs)] = run_ranks(saved, 1, (tmp_path / "b", "tape"))
    assert curve == other
    assert same(masters, theirs)
    [(rest, ours)] = run_ranks(resumed, 1, (tmp_path / "b", late))
    assert rest == curve[2:]
    assert same(ours, masters)


def nodes_kept(words: list[str]) -> list[str]:
    """Parameters whose node that adds up gradients outlives its passes."""
    run, found = run_of(words, "on"), []
    run.step(0)
    for name, parameter in run.engine._ds.module.named_parameters():
        for _ in range(2):
            ((node, _), *_) = parameter.view_as(parameter).grad_fn.next_functions
            if "seen" in node.metadata:
                found.append(name)
            node.metadata["seen"] = True
            del node
    return found


@pytest.mark.parametrize("words", [[], ["precision.states=bf16"]], ids=["masters", "bf16 states"])
def test_no_node_outlives_its_passes(words: list[str]) -> None:
    # A node stays on the stream that it was made on: one of the set-up would end a recording on another.
    assert run_ranks(nodes_kept, 1, (words,), timeout_s=120) == [[]]
