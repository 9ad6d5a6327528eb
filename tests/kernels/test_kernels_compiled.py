"""What the compiler makes of attention for Hopper, without one: no loop may lose an operand that it reads again."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.helpers.machine_code import overwritten_operands
from tests.helpers.repo import ROOT

LOOP = """
        /*0100*/                   LDSM.16.M88.4 R88, [R6+UR40] ;
        /*0110*/                   WARPGROUP.ARRIVE ;
        /*0120*/                   HGMMA.64x64x16.F32.BF16 R24, R88, gdesc[UR8], RZ, !UPT, gsb0 ;
        /*0130*/                   {between} ;
        /*0140*/                   HGMMA.64x64x16.F32.BF16 R56, R96, gdesc[UR8].tnspB, R56, gsb0 ;
        /*0150*/              @!P0 BRA {target} ;
"""


@pytest.mark.parametrize(
    ("between", "target", "wrong"),
    [
        ("F2FP.BF16.F32.PACK_AB R89, R49, R88", "0x110", 1),
        ("F2FP.BF16.F32.PACK_AB R97, R49, R88", "0x110", 0),
        ("F2FP.BF16.F32.PACK_AB R89, R49, R88", "0x100", 0),
        ("STS.64 [R89], R90", "0x110", 0),
    ],
    ids=["overwritten", "other registers", "loaded again", "a store"],
)
def test_overwritten_operands_are_found(between: str, target: str, wrong: int) -> None:
    assert len(overwritten_operands(LOOP.format(between=between, target=target))) == wrong


@pytest.mark.slow
@pytest.mark.parametrize("width", [64])
def test_no_kernel_of_attention_loses_an_operand(width: int) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.helpers.machine_code", str(width)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 15 and all("right" in line and " 0 products" not in line for line in lines)
