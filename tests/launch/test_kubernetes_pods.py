"""The manifest's pods, with this test as the kubelet: ranks in two process groups that are told to stop and go on."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from engine.config.load import load
from tests.helpers.command import clean_env, free_port, kill_group, start_command
from tests.helpers.repo import ROOT
from tests.launch.test_kubernetes import WORDS, documents, kubernetes, rendered, sibling

node = sibling("k8s/node.py")

STEPS = 60
TRAINING = [*WORDS, f"train.steps={STEPS}", "train.micro_batch=1", "data.seq_len=16", "train.eval_batches=0"]
TRAINING += [f"checkpoint.every={STEPS}", "logging.plot=false", "parallel.dp=2"]


def test_a_pod_without_an_index_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for index in (None, "2", "x"):
        monkeypatch.delenv("JOB_COMPLETION_INDEX", raising=False)
        if index is not None:
            monkeypatch.setenv("JOB_COMPLETION_INDEX", index)
        code = node.entry.run(lambda: node.main(["--nodes=2", "--ranks=1", "--master=127.0.0.1:1"]))
        assert code == 2
        assert f"[OCT561] JOB_COMPLETION_INDEX={index or '(not set)'}: " in capsys.readouterr().err


def test_another_config_than_the_submitted_one_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "0")
    words = ["--nodes=1", "--ranks=1", "--master=127.0.0.1:1", "--config-hash=feed", "--", *WORDS]
    assert node.entry.run(lambda: node.main(words)) == 2
    said = capsys.readouterr().err
    assert "[OCT560] --config-hash=feed: the image composes another config" in said
    assert kubernetes.config_hash(load(WORDS)) in said


def test_a_name_without_an_address_is_refused_after_a_while() -> None:
    with pytest.raises(node.LaunchError, match=r"\[OCT562\] --master=pod-0.invalid: no address .* after 0 s"):
        node.wait_for_name("pod-0.invalid", 0.0)


def test_a_pod_whose_first_has_no_machine_yet_may_try_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "0")
    monkeypatch.setattr(node, "DNS_TIMEOUT_S", 0.0)
    code = node.main(["--nodes=1", "--ranks=1", "--master=pod-0.invalid:1"])
    assert "[OCT562] --master=pod-0.invalid" in capsys.readouterr().err
    assert Kubelet(documents(rendered())["Job"], Path()).action(code) == "Count"


def test_a_node_gets_its_own_ranks() -> None:
    places = node.environments(1, 2, 2, "pod", "29500")
    assert [(place["RANK"], place["LOCAL_RANK"]) for place in places] == [("2", "0"), ("3", "1")]
    assert {(place["WORLD_SIZE"], place["LOCAL_WORLD_SIZE"]) for place in places} == {("4", "2")}


class Kubelet:
    """Runs the pods of an Indexed Job in `folder`: command, arguments and environment of the manifest."""

    def __init__(self, job: dict[str, Any], folder: Path) -> None:
        self.spec = job["spec"]
        (self.container,) = self.spec["template"]["spec"]["containers"]
        self.folder = folder

    def start(self) -> list[subprocess.Popen[str]]:
        """A pod for each index, all on this host: the pod's name becomes 127.0.0.1."""
        port, program = free_port(), {"python": sys.executable, "/opt/octant/node.py": str(ROOT / "launch/k8s/node.py")}
        words = [program.get(word, word) for word in self.container["command"]]
        for word in self.container["args"]:
            plain = word.replace("$$", "$")
            words.append(f"--master=127.0.0.1:{port}" if plain.startswith("--master=") else plain)
        env = {entry["name"]: entry["value"] for entry in self.container["env"] if "value" in entry}
        pods = []
        for index in range(self.spec["completions"]):
            # /tmp is a volume of each pod.
            own = {name: value.replace("/tmp", str(self.tmp(index))) for name, value in env.items()}
            own["JOB_COMPLETION_INDEX"] = str(index)
            pods.append(start_command(words, self.folder, env=clean_env(own)))
        return pods

    def tmp(self, index: int) -> Path:
        """The volume at /tmp of a pod."""
        folder = self.folder / f"tmp{index}"
        folder.mkdir(exist_ok=True)
        return folder

    def is_ready(self, index: int) -> bool:
        """Ask a pod's probe."""
        command = self.container["readinessProbe"]["exec"]["command"]
        words = [word.replace("/tmp", str(self.tmp(index))) for word in command]
        return subprocess.run(words).returncode == 0

    def action(self, code: int) -> str:
        """What the Job does about a container that ended with `code`: the first rule that holds."""
        for rule in self.spec["podFailurePolicy"]["rules"]:
            codes = rule.get("onExitCodes")
            if codes and (code in codes["values"]) == (codes["operator"] == "In"):
                return str(rule["action"])
        raise AssertionError(f"no rule for {code}")


def test_every_exit_code_has_its_action() -> None:
    kubelet = Kubelet(documents(rendered())["Job"], Path())
    assert {code: kubelet.action(code) for code in (1, 2, 75, 130, 137, 143)} == {
        1: "Count",
        2: "FailJob",
        75: "Ignore",
        130: "Count",
        137: "Count",
        143: "Ignore",
    }


def steps_of(folder: Path) -> list[int]:
    rows = [json.loads(line) for line in (folder / "runs/demo/metrics.jsonl").read_text().splitlines()]
    return [row["step"] for row in rows if "loss" in row]


@pytest.mark.ranks
@pytest.mark.slow
def test_pods_that_are_told_to_stop_save_and_the_next_ones_finish(tmp_path: Path) -> None:
    manifest = rendered("launch.gpus_per_node=0", "launch.ranks_per_node=1", "parallel.dp=2", words=TRAINING)
    kubelet = Kubelet(documents(manifest)["Job"], tmp_path)
    pods = kubelet.start()
    try:
        assert [kubelet.is_ready(index) for index in range(2)] == [False, False]
        assert pods[0].stdout is not None
        assert any(line.startswith("step 1/") for line in pods[0].stdout), pods[0].communicate()
        assert [kubelet.is_ready(index) for index in range(2)] == [True, True]
        # One node is drained: only the main process of its pod hears of it.
        pods[1].send_signal(signal.SIGTERM)
        said = [pod.communicate(timeout=120) for pod in pods]
        assert [pod.returncode for pod in pods] == [75, 75], said
        assert {kubelet.action(pod.returncode) for pod in pods} == {"Ignore"}
        assert "state saved after step" in said[0][0]
        done = len(steps_of(tmp_path))
        assert 0 < done < STEPS
        pods = kubelet.start()
        said = [pod.communicate(timeout=240) for pod in pods]
        assert [pod.returncode for pod in pods] == [0, 0], said
        assert steps_of(tmp_path) == list(range(1, STEPS + 1)), "a step was lost or done twice"
    finally:
        for pod in pods:
            kill_group(pod)
