"""Fixtures of the runs without Ray: one warm fork server a session."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from eadt.testing.local_run import LocalResult, WarmEngines
from tests.integration.trial import Trial

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def warm_engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WarmEngines]:
    engines = WarmEngines(
        tmp_path_factory.mktemp("engines"),
        # So that engines find the tests' own training functions.
        {"EADT_PRELOAD_MODEL_TYPE": "gpt_neox", "PYTHONPATH": str(REPOSITORY)},
    )
    engines.start()
    yield engines
    engines.stop()


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 40 kB of text: more than the samples of one run, so that none comes twice."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"line {i}: {i * i % 997} apples and {i % 7} pears\n" for i in range(1500)))
    return path


@pytest.fixture(scope="session")
def calm_runs() -> dict[str, LocalResult]:
    return {}


@pytest.fixture
def trial(
    warm_engines: WarmEngines,
    text_file: Path,
    tmp_path: Path,
    calm_runs: dict[str, LocalResult],
    monkeypatch: pytest.MonkeyPatch,
) -> Trial:
    monkeypatch.setenv("XDG_CACHE_HOME", str(text_file.parent / "cache"))
    return Trial(warm_engines, text_file, tmp_path, calm_runs)
