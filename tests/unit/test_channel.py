"""An engine's line to its node agent, on a real socket pair: what may be said on it, and what breaks it."""

from __future__ import annotations

import pickle
import socket
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import pytest
import torch

from eadt.errors import ConfigError
from eadt.training.channel import AgentGoneError, EngineChannel
from eadt.training.engine_spec import Action
from eadt.training.session import TrainingSession
from eadt.training.state import StateLayout

DEADLINE_S = 20.0
LAYOUT = StateLayout(("weight",), ((2, 3),), ("fp32",))


@pytest.fixture
def line() -> Iterator[tuple[EngineChannel, Connection]]:
    """A channel that receives, and the agent's end of its line."""
    ours, theirs = (Connection(end.detach()) for end in socket.socketpair())
    channel = EngineChannel(ours)
    channel.start()
    yield channel, theirs
    theirs.close()
    with pytest.raises((AgentGoneError, RuntimeError)):
        channel.wait("never")  # its thread has seen the end
    ours.close()


def heard(agent: Connection) -> Any:
    assert agent.poll(DEADLINE_S), "nothing was sent"
    return agent.recv()


class Wreck:
    """Can be sent, but not read."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _break, ()


def _break() -> None:
    raise ModuleNotFoundError("no module of that name here")


def test_plain_data_arrives_as_it_is(line: tuple[EngineChannel, Connection]) -> None:
    channel, agent = line
    values = {
        "step": 3, "loss": 1.5, "none": None, "text": "a", "action": Action.SAVE, "layout": LAYOUT,
        "nested": [{"a": (1, {2})}, b"x"], "float": np.float64(0.5),
    }  # fmt: skip
    channel.send("saved", **values)
    assert heard(agent) == ("saved", values)


@pytest.mark.parametrize(
    ("values", "place", "named"),
    [
        ({"loss": torch.tensor(1.0)}, "validation['loss']", "torch.Tensor"),
        ({"meta": {"user": {"seen": [1, np.int64(3)]}}}, "['meta']['user']['seen'][1]", "numpy.int64"),
        ({"mean": np.zeros(2)}, "validation['mean']", "numpy.ndarray"),
        ({"thing": Wreck()}, "validation['thing']", "Wreck"),
    ],
)
def test_what_is_no_plain_data_is_refused_where_it_is_sent(
    line: tuple[EngineChannel, Connection], values: dict[str, Any], place: str, named: str
) -> None:
    channel, agent = line
    with pytest.raises(ConfigError) as caught:
        channel.send("validation", **values)
    assert caught.value.code == "EADT-231"
    assert place in caught.value.what
    assert named in caught.value.what
    assert ".item()" in caught.value.fix
    channel.send("next")
    assert heard(agent) == ("next", {})  # nothing of it went out, and the line is whole


@pytest.mark.parametrize("loss", [1.25, torch.tensor(1.25), np.float32(1.25), np.float64(1.25), 1])
def test_a_validation_loss_may_be_a_tensor_or_a_number_of_numpy(
    line: tuple[EngineChannel, Connection], loss: Any
) -> None:
    channel, agent = line
    session = TrainingSession.__new__(TrainingSession)  # of all that it needs, only the line matters here
    session.rank, session.step, session._computed_s, session._channel = 0, 4, None, channel
    session.record_validation(loss)
    kind, values = heard(agent)
    assert (kind, values) == ("validation", {"step": 4, "loss": float(loss)})
    assert type(values["loss"]) is float


@pytest.mark.parametrize("taking", ["wait", "poll"])
def test_a_command_that_cannot_be_read_fails_the_engine_and_is_not_passed_over(
    line: tuple[EngineChannel, Connection], taking: str
) -> None:
    channel, agent = line
    agent.send(("free", 1))
    agent.send(("go", Wreck()))
    with pytest.raises(RuntimeError, match="cannot be read") as caught:
        channel.wait("go")
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)
    with pytest.raises(RuntimeError, match="cannot be read"):
        getattr(channel, taking)("free")
    channel.send("error", text="it can still be told")
    assert heard(agent) == ("error", {"text": "it can still be told"})


def test_a_command_whose_reading_raises_what_a_broken_line_raises_is_no_end_of_the_line(
    line: tuple[EngineChannel, Connection],
) -> None:
    channel, agent = line
    agent.send_bytes(pickle.dumps(("go", 1))[:-3])  # pickle: "ran out of input", an EOFError or its like
    with pytest.raises(RuntimeError, match="cannot be read"):
        channel.wait("go")
    assert channel.is_open
