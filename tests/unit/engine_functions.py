"""Training functions that misbehave, as real engines run them for the tests of the engine pool."""

from __future__ import annotations

import os
import sys
import threading
from typing import Any

import torch

from eadt.training.session import TrainingSession


class Wreck:
    """Can be sent, but not read."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _break, ()


def _break() -> None:
    raise ModuleNotFoundError("no module of that name here")


def _raw(session: TrainingSession, message: Any) -> None:
    """Past what the channel refuses."""
    session._channel._connection.send(message)


def train(session: TrainingSession, do: str) -> None:
    """What the test asks for, and then what an engine does: wait for commands, until told to end."""
    getattr(sys.modules[__name__], do)(session)


def wait(session: TrainingSession) -> None:
    """Answer each ``say`` with what it says, until ``end``."""
    session._channel.send("waiting", pid=os.getpid())
    while True:
        command = session._channel.wait("say", "end")
        if command[0] == "end":
            os._exit(0)
        session._channel.send("said", what=command[1])


def send_wreck(session: TrainingSession) -> None:
    """An event that the agent cannot read."""
    session._channel.send("before")
    _raw(session, ("note", {"thing": Wreck()}))
    wait(session)


def send_no_event(session: TrainingSession) -> None:
    """Something that is no event at all."""
    _raw(session, 42)
    wait(session)


def send_tensor(session: TrainingSession) -> None:
    """An event with a tensor in it."""
    session._channel.send("validation", step=1, loss=torch.tensor(1.0))
    wait(session)


def fail_at_once(session: TrainingSession) -> None:
    """An error right at the beginning."""
    del session
    raise ValueError("of no use")


def say_much_and_die(session: TrainingSession) -> None:
    """Events that the line can hold, the last of them just before the end."""
    session._channel.send("first")
    for number in range(100):
        session._channel.send("number", number=number)
    os.kill(os.getpid(), 9)


def leave_the_line_to_a_child(session: TrainingSession) -> None:
    """Die, with the line still open in a process that goes on."""
    session._channel.send("before")
    if os.fork() == 0:
        threading.Event().wait(60)
        os._exit(0)
    os.kill(os.getpid(), 9)


def print_without_end(session: TrainingSession) -> None:
    """64 MiB, a line each 128 bytes, then the last line."""
    line = "x" * 127 + "\n"
    for number in range(64):
        sys.stdout.write(line * (1 << 13))
        sys.stdout.flush()
        session._channel.send("printed", mib=number)
        session._channel.wait("go_on")
    print("the last line", flush=True)
    wait(session)
