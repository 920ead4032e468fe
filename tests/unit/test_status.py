"""Which run ``eadt status`` means."""

from typing import Any

import pytest

from eadt.errors import ConfigError, EnvironmentFailure
from eadt.status import choose_run

ONE: dict[str, dict[str, Any] | None] = {"demo-1a2b3c": {"name": "demo"}}
TWO: dict[str, dict[str, Any] | None] = {**ONE, "big-model-4d5e6f": None}


def test_the_only_run_need_not_be_named() -> None:
    assert choose_run(ONE, None) == ("demo-1a2b3c", {"name": "demo"})


@pytest.mark.parametrize("run", ["demo", "demo-1a2b3c"])
def test_a_run_is_known_by_name_and_by_id(run: str) -> None:
    assert choose_run(TWO, run)[0] == "demo-1a2b3c"


def test_a_run_whose_supervisor_does_not_answer_is_known_by_its_ids_beginning() -> None:
    assert choose_run(TWO, "big-model") == ("big-model-4d5e6f", None)


def test_several_runs_and_none_named_are_listed() -> None:
    with pytest.raises(ConfigError, match=r"big-model \(big-model-4d5e6f\), demo \(demo-1a2b3c\)") as caught:
        choose_run(TWO, None)
    assert caught.value.code == "EADT-208"


def test_two_runs_of_one_name_are_told_apart_by_their_ids() -> None:
    with pytest.raises(ConfigError):
        choose_run({**ONE, "demo-777777": {"name": "demo"}}, "demo")


def test_no_run_is_said_and_the_others_are_named() -> None:
    with pytest.raises(EnvironmentFailure, match="no run is going on"):
        choose_run({}, None)
    with pytest.raises(EnvironmentFailure, match="no run other is going on") as caught:
        choose_run(ONE, "other")
    assert caught.value.code == "EADT-308"
    assert "demo" in caught.value.fix
