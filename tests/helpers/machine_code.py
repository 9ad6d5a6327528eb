"""Kernels of attention compiled for Hopper on any machine, and what their loops do to the operands of products.

`python -m tests.helpers.machine_code [WIDTH ...]` prints a line for each variant; TRITON_INTERPRET must not be set.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);")
# Without a condition: the way back from a wait that the assembler put at the end of the code.
_BRANCH = re.compile(r"^@\S+\s+BRA (0x[0-9a-f]+)")
_PRODUCT = re.compile(r"HGMMA\S+ R\d+, R(\d+), gdesc")
_WRITE = re.compile(r"^(?:@!?U?P\d+\s+)?([A-Z0-9_.]+)\s+(?:(?:U?P\d+|PT),\s*)*R(\d+)\b")
_NO_WRITE = ("ST", "HGMMA", "SYNCS", "ISETP", "FSETP", "BAR", "RED", "ATOM")


def _written(text: str) -> set[int]:
    """Registers that an instruction writes."""
    found = _WRITE.match(text)
    if found is None or found[1].startswith(_NO_WRITE):
        return set()
    parts = found[1].split(".")
    wide = {"CS2R": 1 if "32" in parts else 2, "LDSM": int(parts[-1]) if parts[-1].isdigit() else 1}
    count = wide.get(parts[0], 4 if "128" in parts else 2 if {"64", "WIDE"} & set(parts) else 1)
    return set(range(int(found[2]), int(found[2]) + count))


def overwritten_operands(machine_code: str) -> list[str]:
    """Products of loops whose operand in registers was loaded before the loop and is overwritten inside it.

    The second time round they multiply something else: ptxas of Triton 3.6 does this to some shapes.
    """
    code = [(int(found[1], 16), found[2].strip()) for found in _INSTRUCTION.finditer(machine_code)]
    index = {address: number for number, (address, _) in enumerate(code)}
    wrong = []
    for end, (address, text) in enumerate(code):
        branch = _BRANCH.search(text)
        target = int(branch[1], 16) if branch else address
        if target >= address or target not in index:
            continue
        body = [words for _, words in code[index[target] : end]]
        for number, words in enumerate(body):
            product = _PRODUCT.search(words)
            if product is None:
                continue
            needed = set(range(int(product[1]), int(product[1]) + 4))
            fresh = set().union(*map(_written, body[:number]))
            if (needed - fresh) & set().union(*map(_written, body[number + 1 :])):
                wrong.append(words)
    return wrong


def variants(widths: list[int]) -> Iterator[tuple[str, Any, dict[str, Any], Any]]:
    """Name, kernel, flags and blocks of what attention launches in bf16 with descriptors."""
    from engine_kernels.triton import attention
    from engine_kernels.triton.attention_backward import keys_kernel, queries_kernel
    from engine_kernels.triton.attention_forward import forward_kernel

    tables = {
        "forward": (forward_kernel, attention.FORWARD),
        "keys": (keys_kernel, attention.KEYS),
        "queries": (queries_kernel, attention.QUERIES),
    }
    masks = {
        "causal": {"CAUSAL": True},
        "full": {},
        "causal documents": {"CAUSAL": True, "BOUNDS": True},
        "padded, dropped": {"BOUNDS": True, "DROPOUT": True},
        "window": {"CAUSAL": True, "WINDOW": True},
    }
    for width in widths:
        for name, (kernel, table) in tables.items():
            for mask, flags in masks.items():
                yield f"{name} {width} {mask}", kernel, {"WIDTH": width, **flags}, table[width]


def machine_code_of(kernel: Any, flags: dict[str, Any], blocks: Any) -> str:
    """SASS for compute capability 9.0, by the assembler that Triton brings."""
    import triton
    import triton.backends.nvidia
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants: dict[Any, Any] = {"CAUSAL": False, "WINDOW": False, "BOUNDS": False, "DROPOUT": False, **flags}
    constants |= {"M": blocks.M, "K": blocks.K, "TMA": True, "PRECISION": "tf32"}
    signature: dict[str, Any] = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("strides"):
            signature[name] = ("i32", "i32", "i32", "constexpr")
            constants[(kernel.arg_names.index(name), 3)] = 1
        elif name == "sizes":
            signature[name] = ("i32",) * 4
        elif name == "drop":
            signature[name] = ("i32", "i32", "fp32")
        elif name in ("scale", "factor", "window"):
            signature[name] = "i32" if name == "window" else "fp32"
        elif name in ("q", "do", "k", "v") and not (name in "kv" and "dk" in kernel.arg_names):
            rows = blocks.M if name in ("q", "do") else blocks.K
            signature[name] = f"tensordesc<bf16[1, {rows}, 1, {flags['WIDTH']}]>"
        else:
            kinds = {"lse": "*fp32", "delta": "*fp32", "begin": "*i32", "end": "*i32", "row_keys": "*i32"}
            signature[name] = kinds.get(name, "*bf16")
    options = {"num_warps": blocks.warps, "num_stages": blocks.stages}
    source = ASTSource(kernel, signature, constants)
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
        done = subprocess.run([tool, "-sass", file.name], capture_output=True, text=True, check=True)
    return done.stdout


def main(words: list[str]) -> None:
    """Compile and judge; exit code 1 if a product is wrong."""
    failed = False
    for name, kernel, flags, blocks in variants([int(word) for word in words] or [32, 64, 128, 256]):
        code = machine_code_of(kernel, flags, blocks)
        wrong = overwritten_operands(code)
        failed |= bool(wrong)
        print(f"{name} {tuple(blocks)}: {code.count('HGMMA')} products, {wrong or 'right'}", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main(sys.argv[1:])
