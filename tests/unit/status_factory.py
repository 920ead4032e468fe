"""A made-up :class:`~eadt.record.status.RunStatus` for tests of what shows one."""

from __future__ import annotations

from typing import Any

from eadt.record.status import RunStatus
from eadt.units import Quantity

TWO = {"num_workers": 2, "workers_per_gpu": 2, "mps_active_thread_percentage": 50}


def make_status(**changes: Any) -> RunStatus:
    values: dict[str, Any] = {
        "source": "supervisor",
        "run": "demo",
        "run_id": "demo-1a2b3c",
        "status": "running",
        "heard_unix_s": 1_700_000_000.0,
        "age_s": 0.5,
        "session": 1,
        "num_sessions": 1,
        "setpoint": TWO,
        "desired": TWO,
        "waiting_for": "",
        "policy": "threshold",
        "phase": None,
        "step": 120,
        "max_steps": 600,
        "loss": 2.41306,
        "learning_rate": 1e-3,
        "world_size": 2,
        "generation": 1,
        "at_s": 95.0,
        "samples_per_second": 18.24,
        "power_w": Quantity(31.26, 6.0, qualities=("estimated",)),
        "energy_j": Quantity(3410.0, 700.0, qualities=("estimated",)),
        "joules_per_sample": Quantity(1.713, 0.3, qualities=("estimated",)),
        "seconds_to_go": 84.0,
        "energy_to_go_j": Quantity(2300.0, None, qualities=("estimated",)),
        "energy_by_use": {"startup": Quantity(300.0, 60.0), "useful": Quantity(3110.0, 600.0)},
        **changes,
    }
    return RunStatus(**values)
