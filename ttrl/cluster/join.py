"""Finding a Ray cluster, or starting one that no other machine can reach."""

from __future__ import annotations

import logging
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ttrl.cluster.cluster import Cluster
from ttrl.cluster.placement import Bundle, Placement, check_capacity, place
from ttrl.config.schema import ClusterSection
from ttrl.errors import ClusterError, ConfigError
from ttrl.protocols import StopCheck

log = logging.getLogger(__name__)

PORT_SECONDS, HEAD_SECONDS = 5.0, 20.0
"""How long an address may take to accept a connection, and then to answer as the head of a cluster."""

_PROBE = """
import sys
from ray._private.services import find_node_ids
from ray._raylet import GcsClient
GcsClient(address=sys.argv[1])
sys.exit(None if find_node_ids() else "no node of a Ray cluster runs on this machine, and Ray needs one here")
"""
LOOPBACK = ("localhost", "127.0.0.1", "::1")


def check_cluster(section: ClusterSection) -> None:
    """Raises ConfigError for what can be known without a cluster. Imports no ray."""
    if section.backend == "ray":
        if find_spec("ray") is None:
            raise ConfigError("cluster.backend: ray needs the package ray: pip install 'ttrl[cluster]'")
        if section.address not in ("auto", "local"):
            parse_address(section.address)


def connect(
    section: ClusterSection, check_stop: StopCheck, *, ranks: int, gpus_per_worker: int = 1, device: str = "auto"
) -> Cluster:
    """A cluster with room for everything the section asks for, reserved. Raises ConfigError (address, capacity), ClusterError.

    `ranks` is 0 when the trainer lives in this process. `device` is the recipe's model.device: `auto` takes GPUs if there are
    any. Nothing of Ray is printed, and no usage statistics are sent.
    """
    if device.startswith("cuda:"):
        raise ConfigError(f"model.device: {device} cannot be chosen with cluster.backend: ray; use auto, cuda or cpu")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")  # of several workers that raise, one is heard
    address = find_address(section.address)

    def placed(gpus: float) -> Placement:
        on_gpus = device == "cuda" or (device == "auto" and gpus > 0)
        return place(section, ranks=ranks, gpus_per_worker=gpus_per_worker, on_gpus=on_gpus)

    if address is None:
        gpus = _gpus_here()
        placement = placed(gpus)
        check_capacity(placement, section, [Bundle(0, gpus)], "this machine", cpus=False)
        folder = _start(placement, gpus, dashboard=section.dashboard)
        cluster = Cluster(section, placement, check_stop, private=folder)
    else:
        _attach(address)
        nodes = _nodes()
        placement = placed(sum(node.gpus for node in nodes))
        cluster = Cluster(section, placement, check_stop, private=None)
        try:
            check_capacity(placement, section, nodes, f"the cluster at {address}")
        except ConfigError:
            cluster.close()
            raise
    try:
        cluster.reserve()
    except BaseException:
        cluster.close()
        raise
    return cluster


def survey() -> str:
    """What is behind $RAY_ADDRESS, in words. Raises ConfigError when it cannot be reached or joined."""
    address = _reachable(os.environ["RAY_ADDRESS"], "$RAY_ADDRESS")
    _attach(address)
    import ray

    nodes = _nodes()
    ray.shutdown()
    return f"{address}: {len(nodes)} nodes, {sum(n.cpus for n in nodes):g} CPUs, {sum(n.gpus for n in nodes):g} GPUs"


def find_address(wanted: str) -> str | None:
    """HOST:PORT of the cluster to join, None for one of our own. Raises ConfigError when a named one cannot be reached."""
    if wanted == "local":
        return None
    if wanted != "auto":
        return _reachable(wanted, "cluster.address")
    named = os.environ.get("RAY_ADDRESS", "")
    if named and named not in ("auto", "local"):
        return _reachable(named, "$RAY_ADDRESS")
    if named == "local":
        return None
    from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
    from ray._private.utils import read_ray_address

    started: str | None = read_ray_address()  # left behind by `ray start`, and also by one that has ended since
    if started is None:
        return None
    # As Ray does: this machine's token goes to this machine's cluster without asking, to a named address only by RAY_AUTH_MODE
    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    try:
        return _reachable(started, "ray start")
    except ConfigError:
        log.warning("the cluster that ray start left at %s does not answer; starting one of our own", started)
        return None


def parse_address(text: str) -> tuple[str, int]:
    """(host, port). Raises ConfigError."""
    host, _, port = text.rpartition(":")
    if "://" in text or not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ConfigError(
            f"cluster.address {text!r} is not HOST:PORT of a Ray head node (usually port 6379), `auto` or `local`; ray:// "
            "addresses are not supported: start ttrl on a node of the cluster, or with `ray job submit`"
        )
    return host.strip("[]"), int(port)


def _reachable(address: str, origin: str) -> str:
    """The address Ray will use, once something that speaks as a Ray head answered there."""
    remedy = "start it with `ray start --head`, correct the address, or use cluster.address: local"
    host, port = parse_address(address)
    names = _names(host)
    refused = [_refusal(name, port) for name in names]
    if all(refused):
        raise ConfigError(f"{origin} {address}: no Ray cluster answers there ({refused[-1]}); {remedy}")
    address = f"{names[refused.index('')]}:{port}"
    # In a process of its own: a wrong partner makes Ray's client block for minutes or end the whole process
    try:
        probe = subprocess.run(
            [sys.executable, "-c", _PROBE, address], capture_output=True, text=True, timeout=HEAD_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise ConfigError(
            f"{origin} {address}: something listens there but does not answer as a Ray head within {HEAD_SECONDS:g} s; {remedy}"
        ) from None
    if probe.returncode:
        said = (probe.stderr.strip().splitlines() or ["no message"])[-1]
        raise ConfigError(
            f"{origin} {address}: the cluster refused us: {said}; if it asks for a token, set RAY_AUTH_MODE=token"
        )
    return address


def _names(host: str) -> list[str]:
    """Where a head may listen. Ray gives a machine's network address to what is called 127.0.0.1, unless told otherwise."""
    if host not in LOOPBACK:
        return [f"[{host}]" if ":" in host else host]
    import ray

    return [str(ray.util.get_node_ip_address()), "127.0.0.1"]  # type: ignore[no-untyped-call]


def _refusal(host: str, port: int) -> str:
    """Why nothing can be reached there; empty when something can."""
    try:
        socket.create_connection((host.strip("[]"), port), timeout=PORT_SECONDS).close()
    except OSError as error:
        return str(error)
    return ""


def _attach(address: str) -> None:
    import ray

    try:
        with _quietly(), _on_loopback() if parse_address(address)[0] == "127.0.0.1" else nullcontext():
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:  # another version of Ray or Python, no node here, ...
        first = str(error).strip().split("\n")[0]
        raise ConfigError(
            f"cluster {address}: cannot join it: {first}; this process must run on a node of the cluster with the same "
            "versions of Python and Ray"
        ) from error


def _start(placement: Placement, gpus: int, *, dashboard: bool) -> Path:
    """A cluster on this machine that listens on the loopback interface only; returns its temporary folder."""
    import ray

    # Unix sockets have paths of at most 107 characters, so $TMPDIR may be too long
    folder = Path(tempfile.mkdtemp(prefix="ttrl-", dir="/tmp" if os.access("/tmp", os.W_OK) else None))
    try:
        with _quietly(), _on_loopback():
            ray.init(
                address="local", num_cpus=max(os.cpu_count() or 1, math.ceil(placement.cpus)), num_gpus=gpus,
                include_dashboard=dashboard, dashboard_host="127.0.0.1", _node_ip_address="127.0.0.1", _temp_dir=str(folder),
                log_to_driver=False, logging_level=logging.ERROR, _system_config={"free_objects_batch_size": 1},
            )  # fmt: skip
    except (ConnectionError, RuntimeError, TimeoutError) as error:
        raise ClusterError(f"Ray could not start on this machine: {error}; its logs are in {folder}") from error
    return folder


def _nodes() -> list[Bundle]:
    import ray

    found: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    alive = [node["Resources"] for node in found if node["Alive"]]
    return [Bundle(float(has.get("CPU", 0)), float(has.get("GPU", 0))) for has in alive]


def _gpus_here() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


@contextmanager
def _on_loopback() -> Iterator[None]:
    """Ray uses 127.0.0.1 where it would take the network address: its switch for systems whose firewalls would ask the user."""
    from ray._private import ray_constants

    before, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
    told = os.environ.get(ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR)
    os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"  # for the processes it starts
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before
        if told is None:
            del os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR]
        else:
            os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = told


@contextmanager
def _quietly() -> Iterator[None]:
    """Ray takes SIGTERM for itself, which would end a run without its checkpoint, and writes between the lines of the run."""
    from ray._private import worker

    # What the raylet says of a dead worker, in a thread and on stdout; `Lost` says it shorter and in its place
    worker.print_to_stdstream = lambda *_, **__: None
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)
