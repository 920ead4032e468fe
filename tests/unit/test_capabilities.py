"""What ``eadt doctor`` learns about a machine: found, worked around, or missing with its fix."""

from __future__ import annotations

import socket

import pytest

from eadt.adapters.nvml import Nvml
from eadt.config import RunConfig
from eadt.node import capabilities
from eadt.node.capabilities import Capability, survey
from eadt.node.sensors import Host
from eadt.testing.clock import FakeClock
from eadt.testing.fake_nvml import FakeGpu, FakeNvml


@pytest.fixture
def host(tmp_path) -> Host:
    (tmp_path / "stat").write_text("cpu  100 0 0 900 0 0 0 0 0 0\n")
    return Host(
        powercap_root=tmp_path / "powercap",
        proc_stat=tmp_path / "stat",
        device_root=tmp_path,
        kfd_root=tmp_path / "kfd",
    )


def surveyed(host: Host, library: FakeNvml, config: RunConfig | None = None) -> dict[str, Capability]:
    found = survey(config, clock=FakeClock(), nvml=Nvml(library), host=host)
    return {capability.name: capability for capability in found}


def config_with(**sections) -> RunConfig:
    training = {"model_name_or_path": "some/model", "dataset_name": "some-data"}
    return RunConfig.model_validate({"training": training, **sections})


def test_a_machine_without_gpu_trains_on_an_estimate(host):
    found = surveyed(host, FakeNvml(driver_loaded=False))
    assert found["nvml"].state == "missing"
    assert found["power_source"].state == "degraded"
    assert "estimated" in found["power_source"].detail
    assert found["mps"].state == "missing"


def test_gpus_that_nothing_can_measure_are_found_with_the_reason_and_the_fix(host, tmp_path):
    assert "unmeasured" not in surveyed(host, FakeNvml(driver_loaded=False))
    node = tmp_path / "kfd" / "1"
    node.mkdir(parents=True)
    (node / "gpu_id").write_text("51110\n")
    (node / "properties").write_text("simd_count 440\nunique_id 98765\n")
    (tmp_path / "nvidia0").touch()
    found = surveyed(host, FakeNvml(driver_loaded=False))["unmeasured"]
    assert found.state == "missing"
    assert "nvidia0" in found.detail
    assert "AMD" in found.detail
    assert "Load the NVIDIA driver" in found.fix
    assert "rocm-smi" in found.fix


def test_a_driver_that_hangs_is_what_is_found(host, monkeypatch):
    monkeypatch.setattr(capabilities, "NVML_DEADLINE_S", 0.05)
    monkeypatch.setattr("eadt.node.sensors.detect.NVML_DEADLINE_S", 0.05)
    library = FakeNvml()
    hang = library.hang("nvmlInit")
    found = surveyed(host, library)
    assert hang.reached.is_set()
    hang.release()
    assert found["nvml"].state == "missing"
    assert "not answered" in found["nvml"].detail
    assert "reboot" in found["nvml"].fix


def test_everything_that_is_not_ok_names_its_fix(host):
    libraries = (
        FakeNvml(driver_loaded=False),
        FakeNvml([]),
        FakeNvml([FakeGpu(has_energy_counter=False), FakeGpu(has_power_limit=False)]),
        FakeNvml([FakeGpu(has_energy_counter=False, has_power=False, has_power_limit=False)]),
    )
    for library in libraries:
        for capability in surveyed(host, library).values():
            assert capability.detail
            assert capability.state == "ok" or capability.fix, capability


def test_a_gpu_node_and_nothing_is_changed(host, monkeypatch):
    monkeypatch.setattr(capabilities, "_is_privileged", lambda: False)
    library = FakeNvml([FakeGpu(), FakeGpu(has_energy_counter=False, mig_enabled=True)])
    found = surveyed(host, library)
    assert found["nvml"].state == "ok"
    assert "MIG on" in found["nvml"].detail
    assert found["energy_counter"].state == "degraded"
    assert found["power_limit"].state == "degraded"
    assert "200 to 700 W" in found["power_limit"].detail
    assert library.calls["nvmlDeviceSetPowerManagementLimit"] == 0
    assert library.num_inits == 0


def test_privilege_to_set_a_power_limit(host, monkeypatch):
    monkeypatch.setattr(capabilities, "_is_privileged", lambda: True)
    assert surveyed(host, FakeNvml())["power_limit"].state == "ok"


def test_a_demanded_source_that_is_missing_is_reported_not_raised(host):
    found = surveyed(host, FakeNvml(driver_loaded=False), config_with(power={"source": "nvml"}))
    assert found["power_source"].state == "missing"
    assert "power.source is nvml" in found["power_source"].detail


def test_mps_daemon_is_told_from_a_stale_socket(host, tmp_path):
    config = config_with(mps={"pipe_directory": str(tmp_path)})
    assert surveyed(host, FakeNvml(), config)["mps_daemon"].state == "missing"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "control"))
        listener.listen()
        assert surveyed(host, FakeNvml(), config)["mps_daemon"].state == "ok"
    assert surveyed(host, FakeNvml(), config)["mps_daemon"].state == "degraded"


def test_shared_memory_folder_that_is_not_there(host, tmp_path):
    config = config_with(elastic={"shared_memory_dir": str(tmp_path / "nothing")})
    assert surveyed(host, FakeNvml(), config)["shared_memory"].state == "missing"
