"""What surrounds a run on this machine, for ``eadt doctor``: software, Ray cluster, Prometheus, folder size.

Owns looking only; changes nothing. What the hardware can measure and control is surveyed by
:mod:`eadt.node.capabilities`.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from eadt import clock
from eadt.adapters.ray_probe import cluster_address, probe
from eadt.node.capabilities import Capability
from eadt.units import format_bytes

_PYTHONS = ((3, 11), (3, 13))
_RAY_VERSION = "2.60.0"
_WORKING_DIR_LIMIT_BYTES = 100 << 20
"""What Ray uploads at most as a ``working_dir`` (``RAY_RUNTIME_ENV_..._MAX_SIZE``, 100 MiB by default)."""
_WORKING_DIR_EXCLUDES = {".git", ".venv", "venv", "__pycache__"}
"""What Ray leaves out by itself (``RAY_RUNTIME_ENV_DEFAULT_EXCLUDES``)."""
_WALK_LIMIT_S = 2.0
_PROMETHEUS_TIMEOUT_S = 0.7
_PROMETHEUS_TARGETS = "/tmp/ray/prom_metrics_service_discovery.json"

NEEDED = frozenset({"python", "packages", "ray_cluster"})
"""Names without which no run can start: ``eadt doctor`` ends with status 3 where one is missing."""


def environment_survey(address: str | None, *, has_gpu: bool) -> list[Capability]:
    """Look at the software and what is around it. Blocks for a few seconds at most.

    Args:
        address: Ray address that the run would be given; ``None``: ``RAY_ADDRESS`` or none.
        has_gpu: Whether NVML sees a GPU; only then CUDA is tried, in a process of its own.
    """
    cluster = cluster_address(address)
    found = [python_version(), packages(), ray_cluster(cluster), ray_token()]
    if has_gpu:
        found.append(cuda_visibility())
    return [*found, working_dir(Path.cwd()), prometheus()]


def python_version() -> Capability:
    """Whether this Python is one that EADT is made for."""
    version = ".".join(map(str, sys.version_info[:3]))
    if _PYTHONS[0] <= sys.version_info[:2] <= _PYTHONS[1]:
        return Capability("python", "ok", f"Python {version}")
    return Capability("python", "missing", f"Python {version}", "Use Python 3.11, 3.12 or 3.13.")


def packages() -> Capability:
    """Versions of the libraries, without importing them."""
    versions: dict[str, str | None] = {}
    for name in ("eadt", "ray", "torch", "deepspeed", "transformers"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    text = ", ".join(f"{name} {version or 'missing'}" for name, version in versions.items())
    missing = [name for name, version in versions.items() if version is None and name != "eadt"]
    install = "`pip install -c constraints.txt -e .` in EADT's folder"
    if missing:
        return Capability("packages", "missing", text, f"Install {', '.join(missing)}: {install}.")
    if versions["ray"] != _RAY_VERSION:
        detail = f"{text}; EADT uses private names of Ray Train {_RAY_VERSION}"
        return Capability("packages", "degraded", detail, f"Install the pinned version: {install}.")
    return Capability("packages", "ok", text)


def ray_cluster(address: str | None) -> Capability:
    """Whether the cluster that a run would use answers and takes the token."""
    if address is None:
        return Capability("ray_cluster", "ok", "no address is set: a run starts a local cluster of its own")
    answer = probe(address)
    if answer.state == "ok":
        nodes = (
            ""
            if answer.num_nodes is None
            else f": {answer.num_nodes} node(s), {_resources(answer.resources)}"
        )
        return Capability("ray_cluster", "ok", f"the cluster at {address} answers{nodes}")
    if answer.state == "refused":
        return Capability(
            "ray_cluster",
            "missing",
            f"the cluster at {address} refuses the token: {answer.detail}",
            "Copy the cluster's ~/.ray/auth_token here (mode 600), or set RAY_AUTH_TOKEN or "
            "RAY_AUTH_TOKEN_PATH; on the head node `ray get-auth-token` prints it.",
        )
    fix = "Check address and port (the head node's GCS, 6379 by default), or unset it to train locally."
    return Capability("ray_cluster", "missing", f"{address}: {answer.detail}", fix)


def _resources(resources: dict[str, float] | None) -> str:
    resources = resources or {}
    parts = [f"{resources.get('CPU', 0):g} CPUs", f"{resources.get('GPU', 0):g} GPUs"]
    if "memory" in resources:
        parts.append(format_bytes(resources["memory"]))
    return ", ".join(parts)


def ray_token() -> Capability:
    """Where Ray would take its token from; the token itself is neither shown nor judged."""
    mode = os.environ.get("RAY_AUTH_MODE")
    if mode is not None and mode.lower() != "token":
        return Capability(
            "ray_token",
            "degraded",
            f"RAY_AUTH_MODE is {mode}: whoever reaches a cluster started so can run code on it",
            "Unset RAY_AUTH_MODE unless the network is yours alone.",
        )
    if os.environ.get("RAY_AUTH_TOKEN"):
        return Capability("ray_token", "ok", "taken from RAY_AUTH_TOKEN")
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if not path.is_file():
        detail = f"there is no token in {path}; Ray makes one with the first local cluster"
        return Capability("ray_token", "ok", f"{detail}, and a remote cluster asks for its own")
    if not os.access(path, os.R_OK):
        return Capability("ray_token", "missing", f"{path} cannot be read", "Make it yours, with mode 600.")
    if path.stat().st_mode & 0o077:
        return Capability("ray_token", "degraded", f"others can read {path}", f"`chmod 600 {path}`")
    return Capability("ray_token", "ok", f"taken from {path}")


def cuda_visibility(*, timeout_s: float = 60.0) -> Capability:
    """Whether torch sees the GPUs that NVML sees: under MPS in a container it often does not.

    Starts a process that opens CUDA, since a failed attempt cannot be repeated within one process.
    """
    code = "import torch; torch.cuda.init(); print(torch.cuda.device_count())"
    try:
        process = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=timeout_s
        )
    except subprocess.TimeoutExpired:
        return Capability(
            "cuda", "degraded", f"torch gave no answer in {timeout_s:g} s", "Look at `nvidia-smi`."
        )
    if process.returncode == 0:
        return Capability("cuda", "ok", f"torch sees {process.stdout.strip()} GPU(s)")
    last = (process.stderr.strip().splitlines() or ["no message"])[-1]
    return Capability("cuda", "missing", f"NVML sees a GPU, but torch does not: {last}", _cuda_fix(last))


def _cuda_fix(message: str) -> str:
    if "805" in message or "MPS client failed" in message:
        return (
            "An MPS folder is set or left over, but its daemon does not answer: start "
            "`nvidia-cuda-mps-control -d` on the node and share CUDA_MPS_PIPE_DIRECTORY and the host's IPC "
            "with the pod (`hostIPC: true`), or unset CUDA_MPS_PIPE_DIRECTORY."
        )
    if "205" in message or "map" in message.lower():
        return (
            "Under MPS a pod needs the daemon's shared memory: `hostIPC: true`, the same /dev/shm, and the "
            "same user as the daemon."
        )
    return "Check CUDA_VISIBLE_DEVICES, the driver's version and that torch is a CUDA build."


def working_dir(folder: Path) -> Capability:
    """Whether this folder is small enough for ``ray job submit --working-dir .``."""
    deadline_s = clock.monotonic_s() + _WALK_LIMIT_S
    total_bytes, largest, is_whole = 0, (0, ""), True
    for path in _uploaded_files(folder):
        try:
            size = path.stat().st_size
        except OSError:
            continue
        total_bytes += size
        largest = max(largest, (size, str(path.relative_to(folder))))
        if clock.monotonic_s() > deadline_s:
            is_whole = False
            break
    if total_bytes > _WORKING_DIR_LIMIT_BYTES:
        size_text = f"{'' if is_whole else 'at least '}{format_bytes(total_bytes)}"
        return Capability(
            "working_dir",
            "degraded",
            f"this folder holds {size_text} (the largest file: {largest[1]}, {format_bytes(largest[0])}): "
            "over 100 MiB, `ray job submit --working-dir .` refuses it",
            "List data, checkpoints and runs/ in .gitignore or .rayignore, or submit from a smaller folder.",
        )
    if not is_whole:
        return Capability(
            "working_dir",
            "degraded",
            "this folder has too many files to look at quickly; `ray job submit --working-dir .` uploads all",
            "Submit from a folder that holds the code and the configuration only.",
        )
    return Capability(
        "working_dir", "ok", f"`ray job submit --working-dir .` would upload {format_bytes(total_bytes)}"
    )


def _uploaded_files(folder: Path) -> Iterator[Path]:
    """About what Ray uploads: git's list where there is one (Ray reads .gitignore too), else all files."""
    try:
        process = subprocess.run(
            ["git", "-C", str(folder), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            capture_output=True,
            timeout=_WALK_LIMIT_S,
        )
    except (OSError, subprocess.TimeoutExpired):
        process = None
    if process is not None and process.returncode == 0:
        yield from (folder / os.fsdecode(name) for name in process.stdout.split(b"\0") if name)
        return
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name not in _WORKING_DIR_EXCLUDES]
        yield from (Path(root) / name for name in files)


def prometheus() -> Capability:
    """Whether a Prometheus scrapes Ray; without it the dashboard's and Grafana's plots stay empty."""
    host = os.environ.get("RAY_PROMETHEUS_HOST", "http://localhost:9090").rstrip("/")
    scrape = f"a scrape job with `file_sd_configs: [{{files: [{_PROMETHEUS_TARGETS}]}}]` on the head node"
    try:
        with urllib.request.urlopen(
            f"{host}/api/v1/targets?state=active", timeout=_PROMETHEUS_TIMEOUT_S
        ) as answer:
            targets = json.load(answer)["data"]["activeTargets"]
    except (OSError, ValueError, KeyError, TypeError):
        return Capability(
            "prometheus",
            "missing",
            f"no Prometheus answers at {host}: Ray's dashboard and Grafana show `No data`; training and "
            "the report need none",
            f"If you want plots there: run Prometheus with {scrape}, and set RAY_PROMETHEUS_HOST.",
        )
    jobs = {str(target.get("labels", {}).get("job", "")) for target in targets}
    if any("ray" in job.lower() for job in jobs):
        return Capability("prometheus", "ok", f"{host} scrapes {', '.join(sorted(jobs))}")
    detail = f"{host} answers, but scrapes no job named like Ray: Grafana shows `No data`"
    return Capability("prometheus", "degraded", detail, f"Add {scrape}.")
