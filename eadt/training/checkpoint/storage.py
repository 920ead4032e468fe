"""Files in whatever Ray's ``storage_path`` takes, with the few operations that checkpoints need.

Local folders go through the operating system, since only there can a file be brought to the disk
and renamed into place; all else goes through pyarrow's file systems, or fsspec's where pyarrow does
not know the scheme, and a file appears there by one PUT. No rename is asked of an object store.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, cast

from eadt.errors import ConfigError, EnvironmentFailure

_LOG = logging.getLogger(__name__)
READ_BUFFER_BYTES = 1 << 20
_WRITE_FIX = "make the storage writable, with room for a few checkpoints, or set storage.path to another one"


class Storage:
    """A folder of files somewhere. Thread-safe; can be pickled; opens nothing until it is used.

    Args:
        path: A local folder, or a URI that pyarrow's or fsspec's file systems know.
    """

    def __init__(self, path: str) -> None:
        local = "://" not in path
        self.path = os.path.abspath(os.path.expanduser(path)) if local else path.rstrip("/")

    def __reduce__(self) -> tuple[Any, ...]:
        return Storage, (self.path,)

    @cached_property
    def _resolved(self) -> tuple[Any, str]:
        return _resolve(self.path)

    @property
    def _fs(self) -> Any:
        return self._resolved[0]

    @property
    def local_root(self) -> Path | None:
        """The folder on this machine's own file systems; ``None`` elsewhere."""
        return Path(self._resolved[1]) if self._fs.type_name == "local" else None

    def display(self, name: str) -> str:
        """How a user would name a file of this storage."""
        return f"{self.path}/{name}"

    def _at(self, name: str) -> str:
        return f"{self._resolved[1].rstrip('/')}/{name}"

    def files(self, folder: str) -> dict[str, int]:
        """All files under ``folder`` at any depth: path relative to it, and size in bytes.

        Raises:
            EnvironmentFailure: EADT-352, the storage cannot be read.
        """
        from pyarrow.fs import FileSelector, FileType

        base = self._at(folder)
        with _reading(self.display(folder)):
            found = self._fs.get_file_info(FileSelector(base, allow_not_found=True, recursive=True))
        # Some file systems answer with a leading slash more or less than they were asked with.
        skip = len(base.strip("/")) + 1
        return {item.path.strip("/")[skip:]: item.size for item in found if item.type == FileType.File}

    def read(self, name: str) -> bytes:
        """A small file's content.

        Raises:
            FileNotFoundError: It is not there.
            EnvironmentFailure: EADT-352, it cannot be read.
        """
        with self.open(name) as stream:
            return stream.read()

    @contextmanager
    def open(self, name: str) -> Iterator[BinaryIO]:
        """A file to read from its beginning; has ``read`` and ``readinto``.

        Raises:
            FileNotFoundError: It is not there.
            EnvironmentFailure: EADT-352, it cannot be read.
        """
        with (
            _reading(self.display(name)),
            self._fs.open_input_stream(
                self._at(name), compression=None, buffer_size=READ_BUFFER_BYTES
            ) as stream,
        ):
            yield cast(BinaryIO, stream)

    @contextmanager
    def create(self, name: str) -> Iterator[BinaryIO]:
        """A new file to write; on the disk when the block ends. One that was there is replaced.

        The file may be visible while it is written. If the block fails it is deleted, as far as
        that is possible.

        Raises:
            EnvironmentFailure: EADT-351, it cannot be written.
        """
        target = self._at(name)
        with _writing(self.display(name)):
            try:
                if self.local_root is None:
                    self._fs.create_dir(os.path.dirname(target), recursive=True)
                    with self._fs.open_output_stream(target, compression=None) as stream:
                        yield stream
                else:
                    os.makedirs(os.path.dirname(target), exist_ok=True)
                    with open(target, "wb") as file:
                        yield file
                        file.flush()
                        os.fsync(file.fileno())
                    _sync_folder(os.path.dirname(target))
            except BaseException:
                self.delete(name)
                raise

    def publish(self, name: str, content: bytes) -> None:
        """Write a small file so that a reader sees all of it or none.

        Raises:
            EnvironmentFailure: EADT-351, it cannot be written.
        """
        if self.local_root is None:
            with self.create(name) as stream:
                stream.write(content)
            return
        temporary = f"{name}.{uuid.uuid4().hex[:8]}.tmp"
        with self.create(temporary) as stream:
            stream.write(content)
        target = self._at(name)
        with _writing(self.display(name)):
            os.replace(self._at(temporary), target)
            _sync_folder(os.path.dirname(target))
            _sync_folder(os.path.dirname(os.path.dirname(target)))

    def delete(self, name: str) -> None:
        """Delete a file if it is there; what cannot be deleted stays."""
        with suppress(OSError):
            self._fs.delete_file(self._at(name))

    def delete_folder(self, name: str) -> None:
        """Delete a folder with all files in it; what cannot be deleted stays, and is said."""
        try:
            self._fs.delete_dir(self._at(name))
        except FileNotFoundError:
            # An object store has no folders, only what lies in them.
            return
        except OSError as error:
            _LOG.warning("EADT-351: %s could not be deleted (%s)", self.display(name), _reason(error))

    def check_writable(self) -> None:
        """Write, read back and delete a tiny file. Blocks on the disk or the network.

        Raises:
            ConfigError: EADT-250, nobody knows this kind of storage.
            EnvironmentFailure: EADT-350, the storage cannot be used.
        """
        name, content = f".eadt-write-test-{uuid.uuid4().hex[:8]}", b"eadt"
        try:
            with self.create(name) as stream:
                stream.write(content)
            came_back = self.read(name) == content
        except (EnvironmentFailure, FileNotFoundError) as error:
            cause = error.__cause__ or error
            raise EnvironmentFailure(
                f"the storage {self.path} cannot be written: {_reason(cause)}",
                code="EADT-350",
                means="no checkpoint could be saved; nothing was started",
                fix=_WRITE_FIX,
            ) from error
        self.delete(name)
        if not came_back:
            raise EnvironmentFailure(
                f"the storage {self.path} gave back something else than was written",
                code="EADT-350",
                means="no checkpoint could be trusted; nothing was started",
                fix="set storage.path to another storage",
            )

    def upload_folder(self, local: str | Path, name: str) -> str:
        """Bring a local folder into the storage, replacing one of that name. Blocks.

        Nothing is done where the folder lies there already.

        Args:
            local: The folder.
            name: Its name in the storage, without ``..``.

        Returns:
            How a user would name the copy.

        Raises:
            EnvironmentFailure: EADT-351, it cannot be written.
        """
        assert name, "the storage itself is not to be replaced"
        assert ".." not in name.split("/"), name
        source = Path(local)
        root = self.local_root
        if root is not None and (root / name).resolve() == source.resolve():
            return self.display(name)
        sent = {path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()}
        for file in sorted(sent):
            with open(source / file, "rb") as reader, self.create(f"{name}/{file}") as writer:
                shutil.copyfileobj(reader, writer, READ_BUFFER_BYTES)
        # What an earlier upload left would mix with this one: a model in three files over one in five.
        for file in self.files(name).keys() - sent:
            self.delete(f"{name}/{file}")
        return self.display(name)


def _resolve(path: str) -> tuple[Any, str]:
    """The pyarrow file system of a path, and the path in it."""
    import pyarrow
    import pyarrow.fs

    if "://" not in path:
        # Not as a URI: a local name may hold characters that a URI may not.
        return pyarrow.fs.LocalFileSystem(), path
    try:
        try:
            return cast("tuple[Any, str]", pyarrow.fs.FileSystem.from_uri(path))
        except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError):
            import fsspec  # type: ignore[import-untyped]

            filesystem, inner = fsspec.core.url_to_fs(path)
            return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(filesystem)), inner
    except (ValueError, ImportError) as error:
        raise ConfigError(
            f"storage.path: {path!r} is not a storage that can be used: {_reason(error)}",
            code="EADT-250",
            fix="give a local folder, or a URI such as s3://bucket/folder, gs://, hdfs:// or abfs:// "
            "(with its fsspec package installed)",
        ) from error
    except OSError as error:
        raise EnvironmentFailure(
            f"the storage {path} cannot be opened: {_reason(error)}", code="EADT-350", fix=_WRITE_FIX
        ) from error


def _sync_folder(path: str) -> None:
    """Bring the names in a local folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot, and promise no more than the file's own fsync.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _reason(error: BaseException) -> str:
    """The first line of an error: some libraries add a page to it."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return str(text).splitlines()[0]


@contextmanager
def _writing(path: str) -> Iterator[None]:
    from pyarrow import ArrowException

    try:
        yield
    except (OSError, ArrowException) as error:
        raise EnvironmentFailure(
            f"{path} cannot be written: {_reason(error)}",
            code="EADT-351",
            means="this checkpoint or file is lost; earlier ones are untouched",
            fix=_WRITE_FIX,
        ) from error


@contextmanager
def _reading(path: str) -> Iterator[None]:
    from pyarrow import ArrowException

    try:
        yield
    except FileNotFoundError:
        raise
    except (OSError, ArrowException) as error:
        raise EnvironmentFailure(
            f"{path} cannot be read: {_reason(error)}",
            code="EADT-352",
            means="what is in the storage is unknown; nothing in it was changed",
            fix="see to it that every node can reach and read the storage, and run the command again",
        ) from error
