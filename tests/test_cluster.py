"""Whole runs on clusters that are wrong, foreign, or lost on the way."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from helpers_ray import SMALL

from ttrl.cluster.join import check_cluster, find_address
from ttrl.config.schema import ClusterSection
from ttrl.errors import ConfigError

# A token of the tests' own: no other user of this machine can join, and nobody's token is sent anywhere
ENVIRONMENT = {
    **os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32),
}  # fmt: skip
RAY = ["cluster.backend=ray", "cluster.start_seconds=240", "checkpoint.every=1"]


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "ttrl.cli", *(str(argument) for argument in arguments)]


def ttrl(*arguments: object, timeout: float = 400, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), capture_output=True, text=True, timeout=timeout, env={**ENVIRONMENT, **environment}
    )


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["cluster.address=127.0.0.1:{port}"], "no Ray cluster answers there"),
        (["cluster.address=ray://127.0.0.1:{port}"], "is not HOST:PORT of a Ray head node"),
        (["cluster.address=local", "cluster.workers=3", "model.device=cuda"], "need 3 GPUs, this machine has 0"),
        (["cluster.address=local", "model.device=cuda:1"], "cannot be chosen with cluster.backend: ray"),
        (["cluster.transport=nccl", "model.device=cpu"], "transport: nccl needs GPUs, and there are none"),
    ],
)
def test_a_cluster_that_cannot_be_had_is_a_mistake_of_the_recipe(tmp_path, changes, message):
    found = [change.format(port=free_port()) for change in changes]
    result = ttrl("train", "quickstart", *SMALL, *RAY, *found, "--output", tmp_path / "run", timeout=30)
    assert result.returncode == 2, result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists()


def test_something_else_that_listens_is_not_taken_for_a_cluster(monkeypatch):
    monkeypatch.setattr("ttrl.cluster.join.HEAD_SECONDS", 4.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(ConfigError, match=r"does not answer as a Ray head within 4 s; start it with"):
            find_address(address)


def test_the_environment_names_the_cluster_that_auto_takes(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{free_port()}")
    with pytest.raises(ConfigError, match=r"\$RAY_ADDRESS 127\.0\.0\.1:\d+: no Ray cluster answers"):
        find_address("auto")
    assert find_address("local") is None
    monkeypatch.setenv("RAY_ADDRESS", "local")
    assert find_address("auto") is None


def test_ray_must_be_installed(monkeypatch):
    monkeypatch.setattr("ttrl.cluster.join.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"pip install 'ttrl\[cluster\]'"):
        check_cluster(ClusterSection(backend="ray"))
    check_cluster(ClusterSection())


@dataclass(frozen=True)
class Head:
    """A cluster as `ray start` makes it."""

    address: str
    process: subprocess.Popen[bytes]

    def kill(self) -> None:
        """The whole node at once, as when a machine is lost; only our own processes."""
        for process in [*psutil.Process(self.process.pid).children(recursive=True), self.process]:
            process.send_signal(signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    folder = Path("/tmp") / f"ttrl-head-{os.getpid()}"  # short: sockets live in it
    ray = [
        str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--port=0", "--num-cpus=2", "--num-gpus=0",
        "--include-dashboard=false", "--disable-usage-stats", f"--temp-dir={folder}", "--node-ip-address=127.0.0.1",
    ]  # fmt: skip
    with (tmp_path_factory.mktemp("head") / "log").open("wb") as log:
        process = subprocess.Popen(
            ray, stdout=log, stderr=log, env={**ENVIRONMENT, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
        )
    named = folder / "ray_current_cluster"
    deadline = time.monotonic() + 240
    while not named.exists():
        assert process.poll() is None and time.monotonic() < deadline, log.name
        time.sleep(0.1)
    started = Head(named.read_text().strip(), process)
    yield started
    if process.poll() is None:
        started.kill()
    subprocess.run(["rm", "-rf", str(folder)], check=True)


def test_a_foreign_cluster_is_used_and_its_loss_fails_the_run_which_can_be_resumed(head, tmp_path):
    # Files of the user that are called like our parts must not be imported by workers, which see this folder too
    for name in ("rewards", "rollout", "trainers"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('a file of the user shadows ours')")
    doctor = ttrl("doctor", RAY_ADDRESS=head.address)
    assert f"{head.address}: 1 nodes, 2 CPUs, 0 GPUs" in doctor.stdout
    many = ttrl("train", "quickstart", *SMALL, *RAY, f"cluster.address={head.address}", "cluster.workers=9",
                "--output", tmp_path / "many")  # fmt: skip
    assert many.returncode == 2, many.stderr
    assert "need 9 CPUs" in many.stderr and "has 2; lower" in many.stderr

    steps = [*SMALL, *RAY, "steps=400"]
    folder = tmp_path / "run"
    process = subprocess.Popen(
        command("train", "quickstart", *steps, "cluster.workers=2", "--output", folder), stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, cwd=tmp_path, env={**ENVIRONMENT, "RAY_ADDRESS": head.address},
    )  # fmt: skip
    deadline = time.monotonic() + 400
    while not (folder / "checkpoints" / "step-000002").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    running = json.loads((folder / "summary.json").read_text())
    assert running["status"] == "failed" and "still running" in running["reason"]
    head.kill()
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 1, errors
    assert json.loads((folder / "summary.json").read_text())["status"] == "failed"
    assert "head node" in errors or "GCS" in errors

    done = max(int(path.name.split("-")[1]) for path in (folder / "checkpoints").glob("step-*"))
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        recipe.read_text().replace("steps: 400", f"steps: {done + 1}")
    )  # a constant rate: nothing changes
    resumed = ttrl("train", recipe, "cluster.address=local", "cluster.workers=1", "--output", folder, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert f"resuming after step {done}" in resumed.stdout
    assert json.loads((folder / "summary.json").read_text())["status"] == "completed"
    assert (folder / "model" / "model.safetensors").exists()
