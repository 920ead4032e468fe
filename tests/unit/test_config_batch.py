"""Batches that the configured worker counts cannot hold are found before anything starts."""

from __future__ import annotations

from typing import Any

import pytest

from eadt.config import config_from_dict
from eadt.control.batch_check import batch_notes, check_batch


def notes(**sections: Any) -> list[str]:
    training = {"model_name_or_path": "m", "dataset_name": "d", **sections.pop("training", {})}
    return batch_notes(config_from_dict({"training": training, **sections}))


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


@pytest.mark.parametrize(
    ("batch", "mps", "elastic", "fits"),
    [
        (8, {"shared_resources": 2}, {}, True),
        (9, {"shared_resources": 2}, {}, False),
        (9, {"shared_resources": 3}, {}, True),
        (9, {"enabled": False}, {}, True),
        (9, {}, {"num_workers": 3}, True),
        (9, {"preset": "balanced"}, {"max_workers": 3}, True),  # on two devices and more, three workers
        (9, {"preset": "balanced"}, {"max_workers": 4}, False),
        (9, {"preset": "max_parallel"}, {"min_workers": 9}, True),  # on one device or two
        (10, {"preset": "max_parallel"}, {}, False),
    ],
)
def test_workers_a_device_that_no_number_of_devices_makes_fit(
    batch: int, mps: dict[str, Any], elastic: dict[str, Any], fits: bool
) -> None:
    found = problems(training={"train_batch_size": batch}, mps=mps, elastic=elastic)
    assert (found == {}) is fits
    if not fits:
        assert "those that can are" in found["training.train_batch_size"]
        assert "mps.shared_resources" in found["training.train_batch_size"]


def test_bounds_and_devices_that_the_batch_does_not_allow_are_noted() -> None:
    assert notes() == []
    assert notes(training={"train_batch_size": 12}, elastic={"min_workers": 5, "max_workers": 8}) == [
        "elastic.min_workers: 5 workers cannot hold a global batch of 12; at least 6 are used.",
        "elastic.max_workers: 8 workers cannot hold a global batch of 12; at most 6 are used.",
        "With 2 workers a device, a global batch of 12 can start on 3 devices.",
    ]
    assert notes(training={"train_batch_size": 12}, elastic={"max_workers": 6}) == [
        "With 2 workers a device, a global batch of 12 can start on 1, 2, 3 devices or more."
    ]
    assert notes(training={"train_batch_size": 12}, elastic={"num_workers": 3, "max_workers": 6}) == []
