"""The report of `engine.data.report.inspect` for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from engine.data.command_line import WIDTH
from engine.data.report.sample_view import printable, wrapped


def report_lines(report: dict[str, Any]) -> list[str]:
    """The report for a terminal."""
    found = report["vocabulary"]
    special = ", ".join(f"{name} {found[name]}" for name in ("end", "cls", "sep", "mask", "fim"))
    lines = [
        f"split        {report['split']} for {report['model']}, seq_len {report['seq_len']}: "
        f"{report['samples_per_epoch']:,} samples in an epoch",
        f"vocabulary   {found['size']:,} entries, {found['text']:,} of text; the model has {found['model']:,}",
        f"             {special}",
    ]
    for row in report["sources"]:
        counts = f"{row['documents']:,} documents, {row['tokens']:,} tokens, {row['share']:.2%} of the samples"
        lines.append(f"source       {row['source']}: {counts}")
    if report["sources"]:
        lines += _token_lines(report)
    batch = report["batch"]
    lines.append(
        f"positions    of {batch['samples']} samples of {batch['positions']}: {batch['predicted']:.2%} predicted, "
        f"{batch['context']:.2%} only read, {batch['padding']:.2%} padding"
    )
    return lines + [wrapped(f"note         {note}", WIDTH)[0] for note in report["notes"]]


def _token_lines(report: dict[str, Any]) -> list[str]:
    size, use, unknown = report["document_tokens"], report["token_use"], report["unknown"]
    per_token = report["bytes_per_token"]
    rate = "none, all text can be spelled" if unknown is None else f"{unknown['share']:.4%} {unknown['token']}"
    lines = [
        f"bytes/token  {per_token['value']:.3f} (in {per_token['documents']} documents, decoded)",
        f"unknown      {rate}",
        f"lengths      min {size['min']:,}, p50 {size['p50']:,}, mean {size['mean']:,.1f}, p90 {size['p90']:,}, "
        f"p99 {size['p99']:,}, max {size['max']:,} tokens; {size['longer']:.2%} longer than seq_len",
        f"entries      {use['used']:,} used by {use['counted']:,} tokens",
    ]
    cells = [f"{printable(row['text'])!r} {row['share']:.2%}" for row in use["frequent"]]
    return lines + [f"{'frequent' if not n else '':13}{line}" for n, line in enumerate(_filled(cells, WIDTH - 13))]


def _filled(cells: Sequence[str], width: int) -> list[str]:
    lines = [""]
    for cell in cells:
        joined = f"{lines[-1]}, {cell}" if lines[-1] else cell
        if len(joined) > width:
            lines.append(cell)
        else:
            lines[-1] = joined
    return lines
