"""Batches that the configured worker counts cannot hold are found before anything starts."""

from __future__ import annotations

from typing import Any

import pytest

from eadt.config import config_from_dict
from eadt.control.batch_check import check_batch


def problems(
    num_workers: int | None = None, max_workers: int | None = None, **sections: Any
) -> dict[str, str]:
    training = {"model_name_or_path": "m", "dataset_name": "d", **sections.pop("training", {})}
    config = config_from_dict({"training": training, **sections})
    return {p.key: p.message for p in check_batch(config, num_workers, max_workers)}


def test_batch_from_the_initial_workers_always_fits_them() -> None:
    assert problems(elastic={"num_workers": 5, "max_workers": 7}) == {}


def test_nothing_can_be_known_before_the_devices() -> None:
    assert problems() == {}


def test_initial_count_that_cannot_hold_the_batch() -> None:
    found = problems(training={"train_batch_size": 8}, elastic={"num_workers": 3, "max_workers": 4})
    assert "those that can are 1, 2, 4" in found["elastic.num_workers"]


def test_count_found_out_later() -> None:
    training = {"train_batch_size": 8}
    assert problems(training=training) == {}
    assert set(problems(3, 6, training=training)) == {"elastic.num_workers"}


def test_no_allowed_count() -> None:
    found = problems(training={"train_batch_size": 7}, elastic={"min_workers": 2, "max_workers": 6})
    assert list(found) == ["training.train_batch_size"]
    assert "2 to 6" in found["training.train_batch_size"]


@pytest.mark.parametrize(("count", "fits"), [(2, True), (3, False)])
def test_schedule(count: int, fits: bool) -> None:
    found = problems(
        training={"train_batch_size": 8},
        policy={"type": "schedule", "schedule": [{"at_step": 4, "num_workers": count}]},
        elastic={"num_workers": 1},
    )
    assert ("policy.schedule[0].num_workers" not in found) == fits
