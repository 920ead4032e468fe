"""The private names of Ray that ``eadt.adapters.ray_train`` uses are there, and mean what we take them for.

Real: the installed Ray. Ray is pinned exactly; this file says what breaks when the pin moves.
"""

from __future__ import annotations

import inspect

import ray
from ray._private.state import state
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.execution.controller import controller
from ray.train.v2._internal.execution.controller import state as controller_state
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ResizeDecision, ScalingPolicy
from ray.train.v2._internal.execution.worker_group import worker_group
from ray.train.v2.api import data_parallel_trainer

from eadt.adapters.ray_train import HostBackendConfig, HostGroupTrainer, SupervisedScalingPolicy


def test_the_pinned_version_is_installed() -> None:
    assert ray.__version__ == "2.60.0"


def test_the_trainer_hands_its_scaling_policy_through_one_method() -> None:
    source = inspect.getsource(data_parallel_trainer.DataParallelTrainer.fit)
    assert "self._initialize_and_run_controller(" in source
    assert "scaling_policy=create_scaling_policy(" in source
    assert "_initialize_and_run_controller" in vars(HostGroupTrainer)


def test_the_trainer_registers_its_sigint_handler_through_one_method() -> None:
    source = inspect.getsource(data_parallel_trainer.DataParallelTrainer._initialize_and_run_controller)
    assert "self._register_sigint_handler(controller)" in source


def test_a_policy_decides_by_these_methods_and_decisions() -> None:
    abstract = ScalingPolicy.__abstractmethods__
    assert abstract == {
        "make_decision_for_non_running_worker_group",
        "make_decision_for_running_worker_group",
        "_get_num_workers_for_resource_request",
    }
    assert not SupervisedScalingPolicy.__abstractmethods__
    assert hasattr(ScalingPolicy, "_maybe_send_resource_request")
    assert hasattr(ScalingPolicy, "after_controller_state_update")
    assert list(inspect.signature(ResizeDecision).parameters) == ["num_workers", "resources_per_worker"]
    assert not inspect.signature(NoopDecision).parameters


def test_states_have_the_names_that_the_policy_looks_for() -> None:
    for name in (
        "RunningState",
        "RestartingState",
        "ResizingState",
        "ReschedulingState",
        "InitializingState",
    ):
        assert hasattr(controller_state, name)


def test_only_the_lost_worker_is_replaced_while_the_size_stays() -> None:
    assert Backend.has_replica_groups is False
    assert HostBackendConfig().backend_cls.has_replica_groups is True
    assert isinstance(HostBackendConfig(), BackendConfig)
    source = inspect.getsource(controller.TrainController._execute_resize_decision)
    assert "decision.num_workers == current_num_workers" in source
    assert "self._replace_bad_workers(" in source
    assert hasattr(worker_group.WorkerGroup, "replace_replica_group")


def test_the_cluster_says_what_is_free_and_what_is_drained() -> None:
    assert callable(state.available_resources_per_node)
    assert callable(state.get_draining_nodes)


def test_scaling_config_knows_the_resources_of_one_worker() -> None:
    config = ray.train.ScalingConfig(num_workers=3, resources_per_worker={"CPU": 0.33})
    assert config._resources_per_worker_not_none == {"CPU": 0.33}
