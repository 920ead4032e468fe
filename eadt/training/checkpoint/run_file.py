"""The file ``run.json`` in a run's folder: under which id its checkpoints lie, and where.

The id lives as long as this file: the same command finds it and goes on with the run. A folder can have
held several runs one after the other (``checkpoint.resume: never``); their places are remembered, so that
all that was begun in a folder can be removed with it, and nothing else.
"""

from __future__ import annotations

import json
import os
import secrets
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

from eadt.errors import ConfigError
from eadt.training.checkpoint.store import CheckpointStore, is_run_id


@dataclass(frozen=True)
class RunPlace:
    """Where the checkpoints of one run lie.

    Attributes:
        run_id: The run's id.
        storage_path: The storage; ``None`` for the run's folder, wherever that is moved.
    """

    run_id: str
    storage_path: str | None = None

    def store(self, folder: Path) -> CheckpointStore:
        """Its checkpoints.

        Args:
            folder: The run's folder.
        """
        return CheckpointStore(self.storage_path or str(folder), self.run_id)


@dataclass(frozen=True)
class RunFile:
    """Which run a folder holds.

    Attributes:
        name: The run's name.
        place: Its id and storage.
        earlier: What was begun in this folder before, and perhaps is still there; oldest first.
    """

    NAME: ClassVar[str] = "run.json"

    name: str
    place: RunPlace
    earlier: tuple[RunPlace, ...] = ()

    @property
    def run_id(self) -> str:
        """The run's id."""
        return self.place.run_id

    @staticmethod
    def begin(name: str, storage_path: str | None, earlier: tuple[RunPlace, ...] = ()) -> RunFile:
        """A new run, with an id unlike any other."""
        return RunFile(name, RunPlace(f"{name}-{secrets.token_hex(3)}", storage_path), earlier)

    @property
    def places(self) -> tuple[RunPlace, ...]:
        """All that was begun in this folder, this run last."""
        return (*self.earlier, self.place)

    def moved_to(self, storage_path: str | None) -> RunFile:
        """The same run with its checkpoints in this storage from now on."""
        if storage_path == self.place.storage_path:
            return self
        return RunFile(self.name, RunPlace(self.run_id, storage_path), self.places)

    @staticmethod
    def read(folder: Path) -> RunFile | None:
        """The run that a folder holds; ``None`` where it holds none.

        Raises:
            ConfigError: EADT-254, there is a file, and it does not say.
        """
        try:
            values = json.loads((folder / RunFile.NAME).read_text(encoding="utf-8"))
            run = RunFile(
                name=str(values["name"]),
                place=RunPlace(str(values["run_id"]), values.get("storage_path")),
                earlier=tuple(RunPlace(**place) for place in values.get("earlier", ())),
            )
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise _unreadable(folder, f"{type(error).__name__}: {error}") from error
        strange = [place.run_id for place in run.places if not is_run_id(place.run_id)]
        if strange:
            raise _unreadable(folder, f"{strange[0]!r} is no run's id")
        return run

    def write(self, folder: Path) -> None:
        """Put it into a folder, which is made; a reader sees all of it or what was there before."""
        folder.mkdir(parents=True, exist_ok=True)
        values = {
            "run_id": self.run_id,
            "name": self.name,
            "storage_path": self.place.storage_path,
            "earlier": [asdict(place) for place in self.earlier],
        }
        temporary = folder / f".{RunFile.NAME}.{secrets.token_hex(4)}.tmp"
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(folder / RunFile.NAME)


def _unreadable(folder: Path, why: str) -> ConfigError:
    return ConfigError(
        f"{folder / RunFile.NAME} does not say which run's checkpoints to go on from ({why})",
        code="EADT-254",
        means="nothing was started, and nothing was removed",
        fix='write {"run_id": "<folder in checkpoints/>", "name": "<run.name>"} into it, or start over '
        "with --fresh",
    )
