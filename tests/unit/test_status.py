"""Which run ``eadt status`` means, and how a run's answer becomes the typed value."""

import json
from typing import Any

import pytest

from eadt.errors import ConfigError, EnvironmentFailure
from eadt.status import choose_run, understand
from tests.unit.status_factory import make_status

ONE: dict[str, dict[str, Any] | None] = {"demo-1a2b3c": {"run": "demo"}}
TWO: dict[str, dict[str, Any] | None] = {**ONE, "big-model-4d5e6f": None}


def test_the_only_run_need_not_be_named() -> None:
    assert choose_run(ONE, None) == ("demo-1a2b3c", {"run": "demo"})


@pytest.mark.parametrize("run", ["demo", "demo-1a2b3c"])
def test_a_run_is_known_by_name_and_by_id(run: str) -> None:
    assert choose_run(TWO, run)[0] == "demo-1a2b3c"


def test_the_name_is_what_the_run_says_not_what_its_id_begins_with() -> None:
    answers: dict[str, dict[str, Any] | None] = {"demo-1a2b3c": {"run": "renamed"}}
    assert choose_run(answers, "renamed")[0] == "demo-1a2b3c"
    with pytest.raises(EnvironmentFailure):
        choose_run(answers, "demo")


def test_a_run_that_does_not_answer_is_known_by_its_ids_beginning() -> None:
    assert choose_run(TWO, "big-model") == ("big-model-4d5e6f", None)


def test_several_runs_and_none_named_are_listed() -> None:
    with pytest.raises(ConfigError, match=r"big-model \(big-model-4d5e6f\), demo \(demo-1a2b3c\)") as caught:
        choose_run(TWO, None)
    assert caught.value.code == "EADT-208"


def test_two_runs_of_one_name_are_told_apart_by_their_ids() -> None:
    with pytest.raises(ConfigError):
        choose_run({**ONE, "demo-777777": {"run": "demo"}}, "demo")


def test_no_run_is_said_and_the_others_are_named() -> None:
    with pytest.raises(EnvironmentFailure, match="no run is going on"):
        choose_run({}, None)
    with pytest.raises(EnvironmentFailure, match="no run other is going on") as caught:
        choose_run(ONE, "other")
    assert caught.value.code == "EADT-308"
    assert "demo" in caught.value.fix


def test_an_answer_comes_back_as_what_it_was_also_by_way_of_json() -> None:
    status = make_status(decisions=({"decision_id": "d1"},), energy_to_go_j=None)
    assert understand("demo-1a2b3c", json.loads(json.dumps(status.as_dict()))) == status


def test_a_newer_run_may_say_more_than_is_understood() -> None:
    status = make_status()
    assert understand("demo-1a2b3c", {**status.as_dict(), "mood": "good"}) == status


def test_an_answer_of_another_version_is_said_to_be_one() -> None:
    answer = make_status().as_dict()
    del answer["step"]
    with pytest.raises(EnvironmentFailure, match="step") as caught:
        understand("demo-1a2b3c", answer)
    assert caught.value.code == "EADT-309"
    assert "another version" in caught.value.means
