"""Whether a Ray cluster answers at an address and takes our token, without joining it.

Owns the question only. It is asked in a process of its own, because Ray's client may wait, log or end the
process as it likes: :func:`probe` starts ``python -m eadt.adapters.ray_probe`` and reads one JSON line.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

State = Literal["ok", "unreachable", "refused", "failed"]

_CURRENT_CLUSTER_FILE = Path("/tmp/ray/ray_current_cluster")
_DEFAULT_PORT = 6379


@dataclass(frozen=True)
class ClusterAnswer:
    """What a Ray cluster answered.

    Attributes:
        state: ``ok``; ``unreachable``: nothing listens there; ``refused``: the token is missing or wrong;
            ``failed``: something listens that does not answer as Ray does.
        detail: What was found, or the error.
        num_nodes: Nodes that are alive; ``None`` unless ok.
        resources: Total resources of the cluster; empty unless ok.
    """

    state: State
    detail: str
    num_nodes: int | None = None
    resources: dict[str, float] | None = None


def cluster_address(explicit: str | None) -> str | None:
    """The address that a run would use: the explicit one, ``RAY_ADDRESS``, else this machine's cluster.

    Args:
        explicit: From an option or the configuration; ``None``: not given.

    Returns:
        ``None`` where a run would start a local cluster.
    """
    address = explicit or os.environ.get("RAY_ADDRESS")
    if address == "local":
        return None
    if address in (None, "auto"):
        try:
            current = _CURRENT_CLUSTER_FILE.read_text().strip() or None
        except OSError:
            current = None
        # Only `auto` joins a cluster that happens to run here; without an address a local one is started.
        return current or "auto" if address == "auto" else None
    return address


def probe(address: str, *, timeout_s: float = 8.0) -> ClusterAnswer:
    """Ask the cluster. Reads only; blocks for at most ``timeout_s`` and a second.

    Args:
        address: ``host:port`` of the head node; ``ray://host:port`` is only checked for a listener.
        timeout_s: How long to wait for the answer.
    """
    if address == "auto":
        return ClusterAnswer("unreachable", "RAY_ADDRESS is auto, but no cluster was started on this machine")
    host, port = _host_and_port(address)
    try:
        socket.create_connection((host, port), timeout=min(2.0, timeout_s)).close()
    except (OSError, OverflowError, UnicodeError) as error:
        return ClusterAnswer("unreachable", f"nothing answers at {host}:{port} ({error})")
    if "://" in address:
        return ClusterAnswer("ok", f"{address} takes connections; the token was not tried")
    try:
        process = subprocess.run(
            [sys.executable, "-m", __name__, f"{host}:{port}"],
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
    except subprocess.TimeoutExpired:
        return ClusterAnswer(
            "failed", f"{host}:{port} takes connections, but gave no answer in {timeout_s:g} s"
        )
    lines = process.stdout.strip().splitlines()
    if process.returncode != 0 or not lines:
        last = (process.stderr.strip().splitlines() or ["no message"])[-1]
        return ClusterAnswer("failed", f"asking {host}:{port} failed: {last}")
    return ClusterAnswer(**json.loads(lines[-1]))


def use_token_at_hand() -> None:
    """Let Ray use the token that this user has, before ``ray.init`` with an address. Idempotent.

    ``ray.init(address=...)`` and ``RAY_ADDRESS`` do not turn token authentication on by themselves, even
    where ``~/.ray/auth_token`` or ``RAY_AUTH_TOKEN`` holds the right token: the cluster then refuses, and
    Ray tries for a minute. An ``RAY_AUTH_MODE`` that is set is respected.
    """
    from ray._private.authentication.authentication_token_setup import (
        maybe_enable_token_auth_if_token_available,
    )

    logger = logging.getLogger("ray._private.authentication.authentication_token_setup")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it would tell the user to consider opting out
    try:
        maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    finally:
        logger.setLevel(level)


def _host_and_port(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition("://")[2].rstrip("/").rpartition(":")
    if not host or not port.isdigit():
        return address.rpartition("://")[2], _DEFAULT_PORT
    return host.strip("[]"), int(port)


def _ask(address: str) -> dict[str, Any]:
    """In the process of its own: the fields of a :class:`ClusterAnswer`."""
    import ray._raylet

    raylet: Any = ray._raylet
    try:
        use_token_at_hand()
        nodes = raylet.GcsClient(address=address).get_all_node_info(timeout=4).values()
    except ray.exceptions.AuthenticationError as error:
        return {"state": "refused", "detail": error.message}
    except Exception as error:
        text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        is_token = "auth" in text.lower() or "token" in text.lower()
        return {"state": "refused" if is_token else "failed", "detail": text}
    alive = [node for node in nodes if node.state == 0]  # GcsNodeInfo.ALIVE
    resources: dict[str, float] = {}
    for node in alive:
        for name, amount in node.resources_total.items():
            if not name.startswith("node:"):
                resources[name] = resources.get(name, 0.0) + amount
    return {"state": "ok", "detail": "answers", "num_nodes": len(alive), "resources": resources}


if __name__ == "__main__":
    print(json.dumps(_ask(sys.argv[1])))
