"""The door to the Hugging Face hub and its cache: quiet, never hanging, with errors to act upon.

Owns how models, tokenizers and data sets are fetched by name or folder. Must not know what is done
with them. Imports transformers, datasets and huggingface_hub on use only: they are slow.
"""

from __future__ import annotations

import errno
import importlib
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from eadt.errors import ConfigError, EadtError, EnvironmentFailure

T = TypeVar("T")

_WITHOUT_OWNER = {"wikitext": "Salesforce/wikitext"}
"""Data sets known by a name without owner that are found in the cache without asking the hub."""

_PROBE_TIMEOUT_S = 5.0
_NOT_FOUND = {"RepositoryNotFoundError", "DatasetNotFoundError", "RevisionNotFoundError", "HFValidationError"}
_REFUSED = {"GatedRepoError", "DatasetAccessError"}
_UNREACHABLE = {"LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectError", "ConnectTimeout"}


def quiet_transformers() -> None:
    """Keep transformers and the hub from writing progress bars and advice into a run's output."""
    logging = _module("transformers.utils.logging")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    _quiet_hub()


def quiet_datasets() -> None:
    """Keep datasets and the hub from writing progress bars and advice into a run's output."""
    datasets = _module("datasets")
    datasets.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    _quiet_hub()


def _quiet_hub() -> None:
    utils = _module("huggingface_hub.utils")
    utils.logging.set_verbosity_error()
    utils.disable_progress_bars()


def _module(name: str) -> Any:
    """A library's module, imported on use, whose names the type checker does not know."""
    return importlib.import_module(name)


def hub_reachable() -> bool:
    """Whether the hub answers within 5 s. Blocks; false at once where offline mode is set.

    The hub's own client takes 23 to 46 s to give up on a machine without network.
    """
    hub = _module("huggingface_hub")
    if hub.constants.is_offline_mode():
        return False
    try:
        hub.utils.get_session().head(hub.constants.ENDPOINT, timeout=_PROBE_TIMEOUT_S)
    except Exception:  # any transport's error: httpx here, requests in older hub clients
        return False
    return True


@contextmanager
def hub_offline() -> Iterator[None]:
    """Within it, the hub's client and ``datasets`` use their cache only, without retries.

    ``load_dataset`` has no argument that keeps it off the network, so the two libraries' settings
    are changed and put back. Not thread-safe.
    """
    places = (_module("huggingface_hub.constants"), _module("datasets.config"))
    before = [place.HF_HUB_OFFLINE for place in places]
    for place in places:
        place.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.HF_HUB_OFFLINE = value


def load_by_name(load: Callable[[bool], T], *, what: str, name: str, key: str) -> T:
    """Load a model, configuration or tokenizer from a folder, the hub's cache or the hub, in this order.

    What is in the cache is taken as it is, so that all processes of a run, and a run that is
    resumed, get the same revision.

    Args:
        load: Loads it; the argument says whether only local files may be used.
        what: What it is, for messages: ``model``, ``tokenizer``.
        name: Folder or name on the hub.
        key: The configuration key that names it.

    Raises:
        ConfigError: There is no such thing, or it cannot be used.
        EnvironmentFailure: It is not in the cache and the hub cannot be reached or refuses.
    """
    if Path(name).exists():
        return _translated(lambda: load(True), what, name, key)
    try:
        return load(True)
    except EadtError:
        raise
    except Exception as error:
        # Only "not in the cache" may be cured by the hub; what is cached but unusable is refused here.
        if not _causes(error) & (_UNREACHABLE | {"OSError", "EntryNotFoundError", "FileNotFoundError"}):
            raise _translate(error, what, name, key) from error
    if not hub_reachable():
        raise unreachable(what, name, key)
    return _translated(lambda: load(False), what, name, key)


def load_dataset(name: str, config_name: str | None, *, key: str) -> Any:
    """``datasets.load_dataset`` from the hub, or from its cache where the hub cannot be reached.

    Raises:
        ConfigError: There is no such data set, or it has several configurations and none was named.
        EnvironmentFailure: It is not in the cache and the hub cannot be reached or refuses.
    """
    datasets = _module("datasets")
    quiet_datasets()
    if hub_reachable():
        full_name = _translated(lambda: full_dataset_name(name), "data set", name, key)
        return _translated(lambda: datasets.load_dataset(full_name, config_name), "data set", name, key)
    with hub_offline():
        for candidate in dict.fromkeys((_WITHOUT_OWNER.get(name, name), name)):
            try:
                return datasets.load_dataset(candidate, config_name)
            except Exception as error:  # whatever it is, this name is not in the cache
                reason = error
    raise unreachable("data set", name, "training.dataset_path") from reason


def full_dataset_name(name: str) -> str:
    """``owner/name`` of a data set that is known by its name alone, as the hub redirects it. Asks the hub.

    ``load_dataset`` itself cannot: from ``HfUri`` on (huggingface_hub 1.x), it fails on names without
    owner (huggingface/optimum#2446).
    """
    if "/" in name:
        return name
    if name in _WITHOUT_OWNER:
        return _WITHOUT_OWNER[name]
    return str(_module("huggingface_hub").HfApi().dataset_info(name, timeout=4 * _PROBE_TIMEOUT_S).id)


def unreachable(what: str, name: str, key: str) -> EnvironmentFailure:
    """The error for something that is not in the cache while the hub does not answer."""
    return EnvironmentFailure(
        f"The {what} {name} is not in the local cache, and the Hugging Face hub cannot be reached.",
        code="EADT-360",
        means="Nothing was started.",
        fix=f"connect this machine (HF_ENDPOINT and HTTPS_PROXY are honoured), copy a cache to HF_HOME, or "
        f"set {key} to a local folder.",
    )


def _translated(load: Callable[[], T], what: str, name: str, key: str) -> T:
    try:
        return load()
    except EadtError:
        raise
    except Exception as error:
        raise _translate(error, what, name, key) from error


def _translate(error: BaseException, what: str, name: str, key: str) -> EadtError:
    causes = _causes(error)
    reason = re.sub(r"\s+", " ", str(error)).strip()[:400] or type(error).__name__
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        return EnvironmentFailure(
            f"The {what} {name} cannot be stored: {os.strerror(error.errno)}.",
            code="EADT-362",
            fix="free space, or set HF_HOME to a folder on a disk with room.",
        )
    if causes & _REFUSED:
        return EnvironmentFailure(
            f"The hub refuses access to the {what} {name}.",
            code="EADT-361",
            fix="accept its terms on huggingface.co and log in with `hf auth login`, or set HF_TOKEN.",
        )
    if causes & _NOT_FOUND:
        return ConfigError(
            f"There is no {what} {name} on the Hugging Face hub, or it is private.",
            code="EADT-223",
            fix=f"correct {key}; for a private one set HF_TOKEN.",
        )
    if causes & _UNREACHABLE and not Path(name).exists():
        return unreachable(what, name, key)
    return ConfigError(
        f"The {what} {name} cannot be used: {reason}",
        code="EADT-223",
        fix=f"correct {key}.",
    )


def _causes(error: BaseException | None) -> set[str]:
    """Names of the classes of an error and of all that led to it, base classes included."""
    names: set[str] = set()
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        names.update(cls.__name__ for cls in type(error).__mro__)
        error = error.__cause__ or error.__context__
    return names
