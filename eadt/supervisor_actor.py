"""The Ray side of the energy supervisor: its actor, and its lines to coordinator and node agents."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Sequence
from functools import partial
from typing import Any

import ray

from eadt.actors import NAMESPACE, agent_prefix, coordinator_name
from eadt.config import RunConfig
from eadt.control.factory import make_control_loop
from eadt.control.setpoint import Setpoint
from eadt.coordination.nodes import NodeReading
from eadt.errors import EnvironmentFailure
from eadt.record.rows import AnyRow
from eadt.supervisor import EnergySupervisor, SupervisorSettings

logger = logging.getLogger(__name__)

SUPERVISOR_PREFIX = "supervisor-"

_COORDINATOR_TIMEOUT_S = 10.0
_AGENT_TIMEOUT_S = 5.0
_CHANGE_MARGIN_S = 120.0
"""What a change may take beyond the wait for resources: building engines, a checkpoint."""

_RESTART_PAUSE_S = 15.0
_IN_PLACE_PAUSE_S = 1.0


def supervisor_name(run_id: str) -> str:
    """Name of a run's supervisor in the namespace ``eadt``."""
    return SUPERVISOR_PREFIX + run_id


class RayRunView:
    """See :class:`eadt.supervisor.RunView`. Finds the actors by name, and again when one was lost."""

    def __init__(self, run_id: str) -> None:
        self._run_id = run_id
        self._handles: dict[str, Any] = {}

    async def snapshot(self) -> dict[str, Any]:
        """See ``RunView``."""
        snapshot: dict[str, Any] = await self._ask("snapshot")
        return snapshot

    async def throughput(self, window_s: float, since_s: float) -> tuple[float | None, int]:
        """See ``RunView``."""
        answer: tuple[float | None, int] = await self._ask("throughput", window_s, since_s)
        return answer

    async def readings(self, node_ids: Sequence[str], window_s: float) -> dict[str, NodeReading | None]:
        """See ``RunView``."""

        async def ask(node_id: str) -> NodeReading | None:
            with contextlib.suppress(ray.exceptions.RayError, ValueError, TimeoutError):
                name = agent_prefix(self._run_id) + node_id
                reading: NodeReading = await self._call(name, "reading", (window_s,), _AGENT_TIMEOUT_S)
                return reading
            return None

        return dict(zip(node_ids, await asyncio.gather(*map(ask, node_ids)), strict=True))

    async def apply(self, setpoint: Setpoint, reason: str, decision_id: str | None) -> dict[str, Any]:
        """See ``RunView``."""
        answer: dict[str, Any] = await self._ask("apply", setpoint, reason, decision_id)
        return answer

    async def change_state(self, decision_id: str) -> dict[str, Any]:
        """See ``RunView``."""
        answer: dict[str, Any] = await self._ask("change_state", decision_id)
        return answer

    async def book(self, row: AnyRow) -> None:
        """See ``RunView``."""
        await self._ask("book", row)

    async def keep_state(self, state: dict[str, Any]) -> None:
        """See ``RunView``."""
        await self._ask("keep_state", "supervisor", state)

    async def kept_state(self) -> dict[str, Any] | None:
        """See ``RunView``; asked once in the life of this process, which says who it is by the way."""
        await self._ask("announce", ray.get_runtime_context().get_node_id(), os.getpid())
        state: dict[str, Any] | None = await self._ask("kept_state", "supervisor")
        return state

    async def _ask(self, method: str, *arguments: Any) -> Any:
        name = coordinator_name(self._run_id)
        try:
            return await self._call(name, method, arguments, _COORDINATOR_TIMEOUT_S)
        except (ray.exceptions.RayError, ValueError, TimeoutError) as error:
            raise EnvironmentFailure(
                f"the run's coordinator does not answer ({type(error).__name__} in {method})", code="EADT-371"
            ) from error

    async def _call(self, name: str, method: str, arguments: tuple[Any, ...], timeout_s: float) -> Any:
        try:
            async with asyncio.timeout(timeout_s):
                if name not in self._handles:
                    # Asks Ray's head, and would hold up everything else here meanwhile.
                    self._handles[name] = await asyncio.to_thread(ray.get_actor, name, namespace=NAMESPACE)
                return await getattr(self._handles[name], method).remote(*arguments)
        except (ray.exceptions.RayError, TimeoutError):
            self._handles.pop(name, None)
            raise


class EnergySupervisorActor:
    """Actor around :class:`~eadt.supervisor.EnergySupervisor`.

    To be created with ``name=supervisor_name(run_id), namespace="eadt", max_restarts=-1, num_cpus=0``,
    then started by :meth:`start`. After a crash Ray makes it again and it goes on by itself.

    Args:
        config: The run.
        run_id: Its id.
        setpoint: The setpoint of the run's first generation.
        train_batch_size: Samples per optimizer step, whole job.
        num_devices: GPUs of the job, or CPU nodes where there is no GPU.
    """

    def __init__(
        self, config: RunConfig, run_id: str, setpoint: Setpoint, train_batch_size: int, num_devices: int
    ) -> None:
        pause_s = _RESTART_PAUSE_S if config.elastic.mode == "restart" else _IN_PLACE_PAUSE_S
        make_loop = partial(make_control_loop, config, setpoint, num_devices, initial_pause_s=pause_s)
        self._supervisor = EnergySupervisor(
            RayRunView(run_id),
            lambda state: make_loop(state=state),
            SupervisorSettings(
                collection_interval_s=config.training.energy_monitoring_interval,
                change_deadline_s=config.elastic.wait_for_resources_s + _CHANGE_MARGIN_S,
                train_batch_size=train_batch_size,
                policy=config.policy.type if config.supervisor.enabled else "off (measures only)",
            ),
        )
        self._task: asyncio.Task[None] | None = None
        # Ray calls the constructor only, within the actor's event loop: nobody calls start() again.
        if ray.get_runtime_context().was_current_actor_reconstructed:
            self._task = asyncio.get_running_loop().create_task(self._supervise())

    async def start(self) -> None:
        """Begin to supervise. Idempotent."""
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._supervise())

    async def stop(self) -> None:
        """Stop supervising, and bring the log up to date. Idempotent."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self._supervisor.finish()

    async def _supervise(self) -> None:
        is_failing = False
        while not self._supervisor.is_over:
            try:
                await self._supervisor.tick()
                is_failing = False
            except Exception:  # whatever is wrong in here, training goes on
                if not is_failing:
                    logger.exception("EADT-373: the energy supervisor failed; it tries again")
                is_failing = True
            await asyncio.sleep(self._supervisor.next_tick_s)
