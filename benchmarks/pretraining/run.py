"""Octant at PP2 x TP2 x DP2 next to plain transformers: same data, weights, rates and AdamW, loss by loss.

python -m benchmarks.pretraining.run [--steps 300] [--family gpt|bert|both] [--out FOLDER] [--commit HASH]
    [overrides of engine.train]

Writes rows.jsonl and a picture for each family. Exit code 1: at some step the losses are further apart than LIMIT.
transformers is also trained in fp64: how far each of the two is from a curve without rounding tells drift from error.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.pretraining import plain
from benchmarks.pretraining.picture import draw
from benchmarks.pretraining.plain import Curves
from benchmarks.rows import append, row
from engine.config.enums import Activation, DType, Family, Norm, OptimizerName, Positions, ScheduleName, SentenceHead
from engine.config.load import config_hash, load
from engine.config.schema import Config
from engine.data import prepare
from engine.observe.environment import environment

LIMIT = 1e-3
"""Largest difference between losses of one step, nats."""
EXPERIMENTS = {"gpt": "gpt_tiny_lm", "bert": "bert_tiny_mlm"}


def main(argv: list[str]) -> int:
    """Compare each family; 0 when every loss is within the limit."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--family", choices=[*EXPERIMENTS, "both"], default="both")
    parser.add_argument("--out", type=Path, default=Path("runs/pretraining"))
    parser.add_argument("--commit", default=(environment()["git"] or {}).get("commit", "unknown"))
    options, overrides = parser.parse_known_args(argv)
    failed = 0
    for family in EXPERIMENTS if options.family == "both" else [options.family]:
        words = [f"experiment={EXPERIMENTS[family]}", *overrides, f"train.steps={options.steps}"]
        failed += not compare(family, words, options.out, options.commit)
    return min(failed, 1)


def compare(family: str, words: list[str], out: Path, commit: str) -> bool:
    """Train with both systems from equal weights and write what came out. True: within the limit."""
    cfg = load(words)
    if wrong := beyond_transformers(cfg):
        raise SystemExit("\n".join(wrong))
    prepare(cfg.data, print)
    model = plain.build(cfg)
    model.save_pretrained(out / f"{family}-initial")
    exact = plain.train(copy.deepcopy(model).double(), cfg)
    theirs = plain.train(model, cfg)
    ours = octant(words, out, family)
    require_equal_rates(ours, theirs)
    pairs = {
        "octant vs transformers": (ours, theirs),
        "octant vs transformers in fp64": (ours, exact),
        "transformers vs itself in fp64": (theirs, exact),
    }
    rows = [_row(name, one, other, cfg, words, commit) for name, (one, other) in pairs.items()]
    append(out / "rows.jsonl", rows)
    curves = {"octant": ours.losses, "transformers": theirs.losses, "transformers in fp64": exact.losses}
    (out / f"{family}-curves.json").write_text(json.dumps(curves))
    draw(out / f"{family}.png", cfg.model.name, curves, LIMIT)
    for entry in rows:
        print(
            f"{entry['case']} | {entry['system']}: losses {entry['first']:.1e} apart at step 1, at most "
            f"{entry['worst']:.1e} nats at step {entry['worst_step']} (limit {LIMIT:.0e}), gradient norms "
            f"{entry['worst_norm']:.1e} of their size; loss {entry['losses'][0]:.4f} to {entry['losses'][-1]:.4f}",
            flush=True,
        )
    return bool(rows[0]["worst"] <= LIMIT)


def beyond_transformers(cfg: Config) -> list[str]:
    """One line for each option that the plain loop has no equal of."""
    model, bert = cfg.model, cfg.model.family is Family.bert
    wanted: dict[str, tuple[object, object]] = {
        "model.dropout": (model.dropout, 0.0),
        "model.attention_dropout": (model.attention_dropout, 0.0),
        "model.positions": (model.positions, Positions.learned),
        "model.norm": (model.norm, Norm.layernorm),
        "model.activation is gelu or gelu_tanh": (model.activation in (Activation.gelu, Activation.gelu_tanh), True),
        "model.bias": (model.bias, True),
        "model.tied_head": (model.tied_head, True),
        "model.num_kv_heads": (model.num_kv_heads or model.num_heads, model.num_heads),
        "model.head_dim": (model.head_dim, None),
        "model.mup_base_width": (model.mup_base_width, None),
        "model.token_types": (model.token_types, 2 if bert else 0),
        "model.sentence_head": (model.sentence_head, SentenceHead.next_sentence if bert else SentenceHead.none),
        "data.seq_len < model.max_positions": (bert or cfg.data.seq_len < model.max_positions, True),
        "optim.name": (cfg.optim.name, OptimizerName.adamw),
        "optim.schedule": (cfg.optim.schedule, ScheduleName.cosine),
        "precision.dtype": (cfg.precision.dtype, DType.fp32),
        "train.label_smoothing": (cfg.train.label_smoothing, 0.0),
        "train.z_loss": (cfg.train.z_loss, 0.0),
    }
    return [
        f"{name}: {value}, and the comparison needs {need}" for name, (value, need) in wanted.items() if value != need
    ]


def octant(words: list[str], out: Path, family: str) -> Curves:
    """Run `engine.train` as a user does, from the weights that transformers drew."""
    initial = f"checkpoint.initial_weights={out / f'{family}-initial'}"
    lines = train([*words, initial, "train.eval_batches=0"], out, family)
    return Curves(*([float(line[name]) for line in lines] for name in ("loss", "grad_norm", "lr")))


def train(words: list[str], out: Path, name: str) -> list[dict[str, Any]]:
    """Run `engine.train` with `words` as `out/runs/name`, which keeps no weights; the lines of its metrics.jsonl."""
    arguments = [
        *words,
        f"run.dir={out / 'runs'}",
        f"run.name={name}",
        "run.overwrite=true",
        "checkpoint.save_final=false",
        "logging.every=1",
        "logging.plot=false",
    ]
    out.mkdir(parents=True, exist_ok=True)
    log = out / f"{name}.log"
    with log.open("w") as file:
        done = subprocess.run(
            [sys.executable, "-m", "engine.train", *arguments], stdout=file, stderr=subprocess.STDOUT, check=False
        )
    if done.returncode:
        raise SystemExit(f"engine.train {' '.join(arguments)} failed:\n{log.read_text()[-6000:]}")
    return [json.loads(line) for line in (out / "runs" / name / "metrics.jsonl").read_text().splitlines()]


def require_equal_rates(ours: Curves, theirs: Curves) -> None:
    """Stop when the two systems did not train at the same learning rates."""
    pairs = enumerate(zip(ours.rates, theirs.rates, strict=True), start=1)
    apart = [f"step {step}: {a} and {b}" for step, (a, b) in pairs if abs(a - b) > 1e-9 * b]
    if apart:
        raise SystemExit(f"learning rates differ, {apart[0]}")


def differences(ours: list[float], theirs: list[float]) -> list[float]:
    """Absolute difference at each step; both have equally many."""
    return [abs(a - b) for a, b in zip(ours, theirs, strict=True)]


def _row(system: str, one: Curves, other: Curves, cfg: Config, words: list[str], commit: str) -> dict[str, Any]:
    apart = differences(one.losses, other.losses)
    norms = [d / n for d, n in zip(differences(one.norms, other.norms), other.norms, strict=True)]
    parallel = cfg.parallel
    return row(
        case=f"{cfg.model.name} seq {cfg.data.seq_len} global batch {plain.global_batch(cfg)} steps {cfg.train.steps}",
        system=system,
        metric="difference between losses of a step",
        unit="nats",
        values=apart,
        hardware="CPU",
        commit=commit,
        layout=f"pp {parallel.pp} x dp {parallel.dp or 1} x context {parallel.context} x tp {parallel.tp}",
        worst=max(apart),
        worst_step=apart.index(max(apart)) + 1,
        first=apart[0],
        worst_norm=max(norms),
        limit=LIMIT,
        losses=[one.losses[0], one.losses[-1]],
        config_hash=config_hash(cfg),
        command=f"python -m benchmarks.pretraining.run {' '.join(words)}",
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
