"""The engine process: takes the state, builds the engine for this generation, trains until told.

Runs in a child of the fork server and ends with its generation. Touches the device; knows nothing
of Ray.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

from eadt.errors import ConfigError, EadtError
from eadt.training.channel import AgentGoneError, EngineChannel
from eadt.training.engine_spec import EngineSpec
from eadt.training.session import TrainingSession

TrainFunction = Callable[..., Any]

_PEER_LOST = ("Connection closed", "Connection reset", "gloo", "NCCL", "Broken pipe")
"""What collectives say when another rank has died: the cause is elsewhere."""


def run_engine(spec: EngineSpec, connection: Connection) -> int:
    """Run one engine to the end of its generation.

    Returns:
        Exit status: 0, or 1 after an error that was reported to the agent.
    """
    channel = EngineChannel(connection)
    channel.start()
    try:
        _take_place(spec)
        train = load_train_function(spec.job.training.train_function)
        session = TrainingSession(spec, channel)
        train(session, **spec.job.training.train_function_args)
        session.finish()
    except AgentGoneError:
        return 1
    except BaseException as error:
        traceback.print_exc()
        channel.send("error", cause=_cause(error), text=_describe(error))
        return 1
    channel.send("ended")
    if dist.is_initialized() and spec.world_size == 1:
        dist.destroy_process_group()
    return 0


def load_train_function(name: str | None) -> TrainFunction:
    """The user's ``module:function``, or EADT's own.

    Raises:
        ConfigError: EADT-230, it cannot be imported.
    """
    if name is None:
        from eadt.training.causal_lm import train

        return train
    module_name, _, function_name = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        function: TrainFunction = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"training.train_function {name!r} cannot be loaded: {error}",
            code="EADT-230",
            fix="give it as module:function, with the module in the folder that the run starts from",
        ) from error
    return function


def _take_place(spec: EngineSpec) -> None:
    """Tell libraries which rank this is, and take this engine's share of the cores."""
    # Each engine sees its own device only, hence the local rank.
    os.environ.update(RANK=str(spec.rank), WORLD_SIZE=str(spec.world_size), LOCAL_RANK="0")
    if spec.share.cores:
        os.sched_setaffinity(0, spec.share.cores)
    if spec.share.num_threads:
        torch.set_num_threads(spec.share.num_threads)


def _cause(error: BaseException) -> str:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return "out_of_memory"
    if isinstance(error, EadtError):
        return "user" if isinstance(error, ConfigError) else "environment"
    if isinstance(error, RuntimeError | dist.DistError) and any(sign in str(error) for sign in _PEER_LOST):
        return "peer_lost"
    return "error"


def _describe(error: BaseException) -> str:
    return str(error) if isinstance(error, EadtError) else f"{type(error).__name__}: {error}"
