"""Every command of README.md is run, shortened where it would take long, and its promised output is looked for."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers.command import Done, clean_env, free_port, run_command
from tests.helpers.repo import ROOT, files, name

pytestmark = [pytest.mark.ranks, pytest.mark.slow]

README = (ROOT / "README.md").read_text(encoding="utf-8")
SMALL = "train.eval_batches=1 data.max_bytes=300000 data.valid_fraction=0.3 data.vocab_size=400"
TINY = f"train.steps=3 {SMALL}"
DATA = "max_bytes=300000 valid_fraction=0.3 vocab_size=400"
FOUR_RANKS = ("Octant N: gpt_tiny, N parameters on N ranks = pp N x dp N x tp N, CPU", "step N: validation loss N")
RUN_FILES = ("metrics.jsonl", "loss.png", "summary.json", "weights", "config.yaml", "environment.json", "kernels.json")


CHECKPOINTS = "checkpoints"


@dataclass(frozen=True, slots=True)
class Plan:
    """How a command is run here and what it must leave behind."""

    extra: str = ""
    """Words added at the end. Later overrides win, so they shorten the run."""
    before: tuple[str, str] = ("", "")
    """A word of the command, and what follows it here."""
    says: tuple[str, ...] = ()
    """Lines of stdout, numbers as N (see `plain`)."""
    run: str = ""
    """Name of the run whose results must be complete."""
    steps: int = 3
    """Its steps; with more than the usual ones it leaves checkpoints too."""
    code: int = 0
    """Exit code."""


PARITY = (
    "--worlds 1,2 --pp 1 --tp 1 --context 1 --sequence off --zero 1 --accum 1 --offload none --flavours gpt2 "
    "--packed off --recompute none --tied tied --dropout 0.0 --length fixed --loss plain train.steps=4 data.seq_len=16"
)
PARITY_SAYS = ("parity: N cases, N references computed", "parity holds in all N cases")
COMMANDS = {
    # A corpus of its own, so that building it is shown too.
    "make train": Plan(f"{TINY} data.max_bytes=310000", run="first_light"),
    "pip install -e .": Plan(),
    "python -m engine.train parallel=pp2 parallel.dp=2 train.device=cpu data.seq_len=64": Plan(
        TINY, says=FOUR_RANKS, run="gpt_tiny"
    ),
    "deepspeed --num_gpus 4 --module engine.train parallel=pp2 train.device=cpu data.seq_len=64 "
    "run.name=with_deepspeed": Plan(
        TINY, before=("deepspeed", "--master_port {port}"), says=FOUR_RANKS, run="with_deepspeed"
    ),
    "torchrun --nproc-per-node 4 -m engine.train parallel=pp2 train.device=cpu data.seq_len=64 "
    "run.name=with_torchrun": Plan(
        TINY, before=("torchrun", "--master-port {port}"), says=FOUR_RANKS, run="with_torchrun"
    ),
    "python -m engine.train experiment=gpt2_124m_1gpu": Plan(
        f"{TINY} train.device=cpu train.micro_batch=1 train.accum_steps=2 model.num_layers=1 data.seq_len=16 "
        "model.vocab_size=1000 optim.warmup_steps=1 logging.every=1",
        says=(
            "Octant N: gpt2_124m, N parameters on N ranks = pp N x dp N x tp N, CPU",
            "global batch N = micro N x accum N x dp N samples of N tokens = N tokens; ZeRO-N, bfN, adamw",
        ),
        run="gpt2_124m_1gpu",
    ),
    "python -m engine.train --help": Plan(
        says=("zero zN, zN, z1_offload, zN, z2_offload, zN, z3_infinity, z3_offload", "model: A transformer.")
    ),
    "python -m engine.train --cfg job experiment=first_light": Plan(says=("name: first_light", "pp: N")),
    "python -m engine.data build data=text source=texts": Plan(
        DATA, says=("train N documents N tokens", "valid N documents N tokens")
    ),
    "python -m engine.data inspect data=text source=texts --png page.png": Plan(DATA, says=("wrote page.png",)),
    "python -m engine.data verify data=text source=texts": Plan(DATA, says=("N files, N MB in N s: all ok",)),
    "python -m engine.data split data=text source=texts": Plan(
        DATA, says=("exact copies (same tokens) among N documents",)
    ),
    "python -m engine.train data=text data.source=texts data.seq_len=64 run.name=mine train.steps=60 "
    "checkpoint.every=20": Plan(
        f"{SMALL} train.device=cpu",
        says=("step N: validation loss N", "step N: checkpoint in runs/mine/checkpoints/step-N/"),
        run="mine",
        steps=60,
    ),
    "python -m engine.train data=text data.source=texts data.seq_len=64 run.name=mine train.steps=80 "
    "checkpoint.every=20 run.resume=true parallel=pp2 train.device=cpu": Plan(
        SMALL,
        says=("going on from runs/mine/checkpoints/step-N: step N, sample N, N tensors", "results in runs/mine/"),
        run="mine",
        steps=80,
    ),
    "python -m engine.train data=text data.source=texts data.seq_len=64 parallel=tp2 train.device=cpu "
    "checkpoint.initial_weights=runs/mine run.name=more": Plan(
        TINY, says=("Octant N: gpt_tiny, N parameters on N ranks = pp N x dp N x tp N, CPU",), run="more"
    ),
    "python -m engine.checkpoint inspect runs/mine": Plan(says=("N tensors, N bytes in N files",)),
    "python -m engine.checkpoint verify runs/mine": Plan(
        says=("runs/mine/weights: N bytes are as they were written, N s",)
    ),
    "python -m engine.checkpoint diff runs/mine/checkpoints/step-00000060 "
    "runs/mine/checkpoints/step-00000080 --limit 5": Plan(says=("N tensors are equal, N differ",), code=1),
    "python -m engine.checkpoint export runs/mine mine_hf --dtype bf16": Plan(says=("model.safetensors: N tensors",)),
    "python -m engine.checkpoint inspect mine_hf": Plan(says=("N tensors, N bytes",)),
    "python -m engine.study network --device cpu --ranks 2": Plan("--sizes 4096"),
    "python -m engine.train -m optim.lr=1e-4,1e-3 parallel=single,tp2 run.name=sweep train.device=cpu "
    "data.seq_len=64": Plan(TINY, says=("run N (grid): done, N, N s",)),
    "python -m engine.tune report runs/sweep-grid": Plan(
        says=("page in runs/sweep-grid/report.html; to train with the best values:",)
    ),
    "python -m engine.plan --world 8 experiment=first_light": Plan(
        says=("global batch: N samples = N tokens; ZeRO-N", "one_f_one_b with N micro-batches: bubble N%")
    ),
    "python -m engine.plan hardware=h200 model=llama_8b precision=bf16 data.seq_len=4096 --world 4 "
    "train.micro_batch=auto": Plan(
        says=(
            "global batch: N samples = N tokens; ZeRO-N",
            "fits: N GiB of N GiB, N GiB of room beside a margin of N GiB",
            "recompute: none N GiB, selective N GiB, full N GiB, of N GiB: train.recompute=none is the least that fits",
        )
    ),
    "python -m engine.study rank --world 8 zero=z3 parallel.tp=2 train.device=cpu data.seq_len=64": Plan(
        "train.steps=4", says=("one rank of N: N ms a step, median of N (N to N ms); N tok/s of each rank",)
    ),
    "python -m engine.study timeline parallel=interleaved train.accum_steps=8 train.steps=4 train.device=cpu "
    "run.name=lanes": Plan("data=random data.seq_len=16"),
    "python -m engine.study parity --quick": Plan(PARITY, says=PARITY_SAYS),
    "python -m engine.study parity": Plan(PARITY, says=PARITY_SAYS),
    "make check": Plan(),
    "make test": Plan(),
}


def fenced(language: str) -> list[str]:
    """The lines of all fences of `language`, in order."""
    blocks = re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


def plain(line: str) -> str:
    """`line` with every number as N, every time left as T, and runs of spaces as one."""
    line = re.sub(r"(?:\d+[dhms] ?)+ left", "T left", line)
    line = re.sub(
        r"(?<![A-Za-z_])\d[\d.,]*\d(?:e[-+]\d+)?[kMG]?(?![A-Za-z_])|\d+(?:\.\d+)?[kMG]?(?![\dA-Za-z_])", "N", line
    )
    return " ".join(line.split())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all commands run, in the order of the page: a later one may use what an earlier one made."""
    root = tmp_path_factory.mktemp("readme")
    (root / "texts").mkdir()
    for path in sorted((ROOT / "engine").rglob("*.py")):
        (root / "texts" / name(path).replace("/", "_")).write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    return root


def run(words: str, folder: Path, code: int = 0) -> Done:
    done = run_command(words, folder, 400, env=clean_env({"XDG_CACHE_HOME": str(folder / "cache")}))
    assert done.exit_code == code, f"{words}\n{done}"
    return done


def require_results(folder: Path, run_name: str, count: int = 3) -> None:
    """Everything that the page says about a run folder is in it."""
    found = folder / "runs" / run_name
    assert [entry for entry in RUN_FILES if not (found / entry).exists()] == []
    rows = [json.loads(line) for line in (found / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, count + 1))
    assert (found / CHECKPOINTS).exists() == (count > 3)
    assert {"loss", "grad_norm", "lr", "tokens_per_s"} <= set(steps[0])
    assert any("val_loss" in row for row in rows)
    assert {"final_loss", "first_val_loss", "final_val_loss"} <= set(json.loads((found / "summary.json").read_text()))


def test_every_command_has_a_plan_and_every_plan_a_command() -> None:
    assert sorted(fenced("bash")) == sorted(COMMANDS)


def test_no_command_hides_in_another_fence() -> None:
    assert set(re.findall(r"^```(\w*)$", README, re.MULTILINE)) == {"bash", "text", ""}
    assert README.count("\n```bash\n") + README.count("\n```text\n") == README.count("\n```\n")


def test_results_are_described_completely() -> None:
    section = README.split("## Where the results are")[1].split("\n## ")[0]
    described = re.findall(r"`([a-z]+(?:\.\w+)?/?)`", "".join(re.findall(r"^\| (.*?) \|", section, re.MULTILINE)))
    assert sorted(entry.rstrip("/") for entry in described) == sorted((*RUN_FILES, CHECKPOINTS))


def test_files_to_read_first_exist() -> None:
    table = README.split("## Read first")[1].split("```")[0]
    for path in re.findall(r"`(engine/[\w/]+\.py)`", table):
        assert (ROOT / path).is_file(), path
    lines = len((ROOT / "engine/train/loop.py").read_text().splitlines())
    assert f"`engine/train/loop.py` | the loop, {lines} lines" in table


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith(("python", "deepspeed", "torchrun"))])
def test_command(command: str, folder: Path) -> None:
    plan = COMMANDS[command]
    words = f"{command} {plan.extra}"
    if plan.before[0]:
        words = words.replace(plan.before[0], f"{plan.before[0]} {plan.before[1].format(port=free_port())}", 1)
    said = [plain(line) for line in run(words, folder, plan.code).stdout.splitlines()]
    assert [line for line in plan.says if line not in said] == [], "\n".join(said)
    if plan.run:
        require_results(folder, plan.run, plan.steps)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("make")])
def test_make_target_exists(command: str) -> None:
    done = run_command(f"make -n {command.removeprefix('make ')}", ROOT, 20)
    assert done.exit_code == 0, done


def test_make_train_shows_what_the_page_shows(folder: Path) -> None:
    recipe = run_command("make -n train", ROOT, 20).stdout.splitlines()
    [command] = [line for line in recipe if "-m engine.train" in line]
    program, rest = command.split(maxsplit=1)
    assert program == ".venv/bin/python"
    done = run(f"{sys.executable} {rest} {COMMANDS['make train'].extra}", folder)
    announced = [shlex.split(line)[1] for line in recipe if line.startswith('echo "train:')]
    said = {plain(line) for line in [*announced, *done.stdout.splitlines()]}
    shown = fenced("text")
    assert len(shown) > 8
    assert [line for line in shown if line != "..." and plain(line) not in said] == [], done
    require_results(folder, "first_light")


def test_pip_install_makes_both_packages_importable(tmp_path: Path) -> None:
    """Installed from a copy into a folder of its own, without the dependencies, which are here already."""
    pytest.importorskip("hatchling", reason="the build backend of pyproject.toml is not installed here")
    copy = tmp_path / "copy"
    for path in files():
        (copy / name(path)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy / name(path))
    offline = f"--no-deps --no-build-isolation --no-index --ignore-installed --prefix {tmp_path / 'prefix'}"
    done = run_command(f"{sys.executable} -m {shlex.join(['pip', 'install', '-e', '.'])} {offline}", copy, 100)
    assert done.exit_code == 0, done
    [site] = (tmp_path / "prefix").rglob("site-packages")
    # -S leaves out the environment's own packages, of which Octant may be one.
    code = (
        f"import site; site.addsitedir({str(site)!r}); from importlib.util import find_spec; "
        "print(find_spec('engine').origin, find_spec('engine_kernels').origin)"
    )
    found = run_command([sys.executable, "-I", "-S", "-c", code], tmp_path, 60)
    packages = (copy / "engine", copy / "kernels" / "engine_kernels")
    assert found.stdout.split() == [str(package / "__init__.py") for package in packages], found
