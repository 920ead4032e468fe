"""What runs on a Ray cluster are doing, asked of the runs from outside. Changes nothing.

Each run's coordinator is a named actor; its ``status()`` gives a :class:`~eadt.record.status.RunStatus` as
plain values.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import msgspec

from eadt.adapters.ray_probe import cluster_address, probe, use_token_at_hand
from eadt.errors import ConfigError, EnvironmentFailure
from eadt.record.status import RunStatus

_ANSWER_TIMEOUT_S = 10.0


def fetch_status(run: str | None, address: str | None) -> RunStatus:
    """What a run says of itself. Blocks for some seconds.

    Args:
        run: Name or id of the run; ``None`` for the only one that is going on.
        address: Ray cluster to ask; ``None``: ``RAY_ADDRESS``, else every cluster on this machine, since
            each run that was given no cluster has started one of its own.

    Raises:
        EnvironmentFailure: EADT-301, no cluster answers; EADT-307, it refuses the token; EADT-308, no run
            (of that name) is going on; EADT-309, it does not answer, or not in words of this version.
        ConfigError: EADT-208, several runs are meant.
    """
    run_id, answer = choose_run(_ask_clusters(address), run)
    if answer is None:
        raise EnvironmentFailure(
            f"the run {run_id} does not answer",
            code="EADT-309",
            means="it is there, and may only just be starting or ending",
            fix="ask again in a moment",
        )
    return understand(run_id, answer)


def understand(run_id: str, answer: Mapping[str, Any]) -> RunStatus:
    """An answer as the typed value.

    Raises:
        EnvironmentFailure: EADT-309, it is of another version of EADT.
    """
    try:
        return msgspec.convert(dict(answer), RunStatus)
    except msgspec.ValidationError as error:
        raise EnvironmentFailure(
            f"the answer of {run_id} is not understood: {error}",
            code="EADT-309",
            means="the run is of another version of EADT than this command; it goes on",
            fix="ask with the version that the run was started with",
        ) from None


def choose_run(
    answers: Mapping[str, dict[str, Any] | None], run: str | None
) -> tuple[str, dict[str, Any] | None]:
    """The run that is meant, with its answer.

    Args:
        answers: What runs answered, by run id; ``None`` where one did not.
        run: Name or id; ``None`` for the only one.

    Raises:
        EnvironmentFailure: EADT-308, there is none.
        ConfigError: EADT-208, there are several.
    """
    names = {run_id: _name(run_id, answer) for run_id, answer in answers.items()}
    if run is not None and run in answers:
        meant = [run]
    else:
        meant = [run_id for run_id, name in names.items() if run is None or run == name]
    if len(meant) == 1:
        return meant[0], answers[meant[0]]
    if meant:
        listed = ", ".join(f"{names[run_id]} ({run_id})" for run_id in sorted(meant))
        raise ConfigError(
            f"several runs are going on: {listed}",
            code="EADT-208",
            means="it is not clear which one is meant",
            fix=f"name one by its id, such as: eadt status {min(meant)}",
        )
    others = ", ".join(sorted(set(names.values())))
    raise EnvironmentFailure(
        "no run is going on" if run is None else f"no run {run} is going on",
        code="EADT-308",
        means="there is none to ask",
        fix=f"going on: {others}" if others else "for a run that has ended: eadt report RUN",
    )


def _name(run_id: str, answer: dict[str, Any] | None) -> str:
    """The run's name; of one that does not answer only the id is known, which begins with it."""
    return str((answer or {}).get("run") or run_id.rpartition("-")[0] or run_id)


def _ask_clusters(address: str | None) -> dict[str, dict[str, Any] | None]:
    """What all runs answer, by run id; a cluster that does not is passed over if others do."""
    import ray

    if ray.is_initialized():  # a connection that was there before is used, and left open
        return _ask_runs()
    answers: dict[str, dict[str, Any] | None] = {}
    failures: list[EnvironmentFailure] = []
    addresses = _addresses(address)
    for found in addresses:
        try:
            with _connected(found):
                answers |= _ask_runs()
        except EnvironmentFailure as failure:
            failures.append(failure)
    if len(failures) == len(addresses):
        raise failures[0]
    return answers


def _addresses(address: str | None) -> list[str]:
    """The clusters to ask."""
    if (address or os.environ.get("RAY_ADDRESS") or "auto") not in ("auto", "local"):
        return [str(cluster_address(address))]
    from ray._private.services import find_gcs_addresses

    found = {*find_gcs_addresses(), cluster_address("auto")} - {None, "auto"}
    return sorted(found) or ["auto"]


def _ask_runs() -> dict[str, dict[str, Any] | None]:
    """What every run of the cluster answers, by run id."""
    import ray

    from eadt.actors import NAMESPACE, coordinator_name

    prefix = coordinator_name("")
    asked: dict[str, Any] = {}
    for actor in ray.util.list_named_actors(all_namespaces=True):
        if actor["namespace"] == NAMESPACE and actor["name"].startswith(prefix):
            run_id = actor["name"].removeprefix(prefix)
            try:
                asked[run_id] = ray.get_actor(actor["name"], namespace=NAMESPACE).status.remote()
            except ValueError:
                continue  # it ended since it was listed
    if asked:
        ray.wait(list(asked.values()), num_returns=len(asked), timeout=_ANSWER_TIMEOUT_S)
    answers: dict[str, dict[str, Any] | None] = {}
    for run_id, reference in asked.items():
        try:
            answers[run_id] = ray.get(reference, timeout=0.1)
        except ray.exceptions.RayError:
            answers[run_id] = None
    return answers


@contextmanager
def _connected(address: str) -> Iterator[None]:
    """Within the cluster."""
    import ray

    _check_answers(address)
    use_token_at_hand()
    try:
        ray.init(address=address, log_to_driver=False, logging_level="error")
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise EnvironmentFailure(
            f"the Ray cluster at {address} cannot be joined from here: {lines[0]}",
            code="EADT-301",
            means="its runs cannot be asked; they go on",
            fix="ask from one of its nodes, for example with `ray job submit -- eadt status`, or through "
            "Ray's client: --address ray://HEAD:10001",
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _check_answers(address: str) -> None:
    """Ask first whether the cluster answers: Ray's own attempt waits long and explains little."""
    answer = probe(address)
    if answer.state == "ok":
        return
    if answer.state == "refused":
        raise EnvironmentFailure(
            f"the Ray cluster at {address} refuses the token: {answer.detail}",
            code="EADT-307",
            means="its runs cannot be asked; they go on",
            fix="copy the cluster's ~/.ray/auth_token here (mode 600), or set RAY_AUTH_TOKEN or "
            "RAY_AUTH_TOKEN_PATH; on the head node `ray get-auth-token` prints it",
        )
    if address == "auto":
        raise EnvironmentFailure(
            "no Ray cluster runs on this machine",
            code="EADT-301",
            means="there is no run to ask",
            fix="start one with `eadt run FILE`, or name a cluster with --address or RAY_ADDRESS",
        )
    raise EnvironmentFailure(
        f"the Ray cluster at {address} does not answer: {answer.detail}",
        code="EADT-301",
        means="its runs cannot be asked",
        fix="check address and port (the head node's GCS, 6379 by default) and that the cluster is up",
    )
