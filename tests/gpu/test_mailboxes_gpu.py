"""Copy engines between two GPUs, or two ranks of one: boxes under load, and layouts against one process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from engine.dist.context import ParallelContext
from engine.runtime.mailboxes import SymmetricBoxes
from engine.study.__main__ import main
from engine.topology.grid import Grid
from tests.helpers.ranks import backend_of, run_ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

ELEMENTS, RING, MESSAGES = 4 * 2**20, 3, 120
SLEEP = 2_000_000
"""Clock cycles, about a millisecond: longer than a message takes."""


def both_ways() -> None:
    """Messages cross each other while either side is the slower one in turn; each arrives whole and in order."""
    device = torch.device("cuda", torch.cuda.current_device())
    ctx = ParallelContext.create(Grid(pp=2), device)
    boxes = SymmetricBoxes(ctx.pp, RING, ELEMENTS, torch.bfloat16, device, 60.0)
    me, other = ctx.pp.rank, 1 - ctx.pp.rank
    base = torch.arange(ELEMENTS, device=device, dtype=torch.int32)
    wrong = torch.zeros((), dtype=torch.int64, device=device)

    def message(rank: int, number: int) -> torch.Tensor:
        return ((base + 7 * number + 3 * rank) % 251).bfloat16()

    out = torch.empty(ELEMENTS, dtype=torch.bfloat16, device=device)
    for number in range(MESSAGES):
        if (number // 20) % 2 == me:
            torch.cuda._sleep(SLEEP)
        boxes.fill(other, 0, number % RING, message(me, number), again=number >= RING)
        # Taken a message later, so that some are always under way.
        if number:
            boxes.empty(other, (number - 1) % RING, out)
            wrong += (out != message(other, number - 1)).sum()
    boxes.empty(other, (MESSAGES - 1) % RING, out)
    wrong += (out != message(other, MESSAGES - 1)).sum()
    boxes.finish()
    assert int(wrong) == 0, f"rank {dist.get_rank()}: {int(wrong)} wrong numbers"


def test_messages_arrive_whole_and_in_order() -> None:
    run_ranks(both_ways, 2, backend=backend_of("cuda", 2), timeout_s=120)


@pytest.mark.parametrize(
    "words",
    [
        ["--pp", "2", "parallel.pipeline_transport=copy_engine"],
        ["--tp", "2", "parallel.tp_overlap=symmetric"],
        ["--tp", "2", "parallel.tp_overlap=chunked"],
        # Large enough that matrices are cut.
        [
            "--zero",
            "3",
            "--tp",
            "1",
            "--context",
            "1",
            "--offload",
            "none",
            "zero.gather=copy_engine",
            "model.hidden_size=256",
        ],
    ],
    ids=["pipelines", "symmetric", "chunked", "zero3"],
)
def test_layouts_agree_with_one_process(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if "parallel.tp_overlap=chunked" in words and torch.cuda.device_count() < 2:
        pytest.skip("sends over NCCL, which needs two GPUs")
    out = tmp_path / "parity.json"
    code = main(
        [
            *(
                "parity",
                "model=gpt_tiny",
                "train.device=cuda",
                "--worlds",
                "2",
                "--share-gpus",
                "--cases",
                "3",
                "--json",
                str(out),
            ),
            *words,
        ]
    )
    assert code == 0, capsys.readouterr().out
    assert all(row["errors"]["gradient"] <= 1e-5 for row in json.loads(out.read_text())["cases"])
