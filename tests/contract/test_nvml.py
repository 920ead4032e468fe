"""One suite for the NVML adapter: on the fake always, on the real library where there is a GPU.

The suite only reads, except for the fake-only tests at the end: it never changes a real card.
"""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable, Iterator

import pynvml
import pytest

from eadt.adapters.nvml import Nvml
from eadt.clock import SYSTEM_CLOCK
from eadt.errors import DevicePermissionError, DeviceUnsupportedError, EadtError, TransientDeviceError
from eadt.testing.clock import FakeClock
from eadt.testing.fake_nvml import FakeGpu, FakeNvml


@pytest.fixture(params=["fake", pytest.param("real", marks=pytest.mark.gpu)])
def nvml_and_wait(request: pytest.FixtureRequest) -> Iterator[tuple[Nvml, Callable[[float], None]]]:
    clock = FakeClock() if request.param == "fake" else SYSTEM_CLOCK
    nvml = Nvml(FakeNvml([FakeGpu(), FakeGpu(uuid="GPU-1")], clock)) if request.param == "fake" else Nvml()
    try:
        nvml.open()
    except EadtError as error:
        pytest.skip(f"no NVML on this machine: {error.what}")
    if nvml.num_gpus() == 0:
        pytest.skip("NVML is here but sees no GPU")
    yield nvml, clock.sleep
    nvml.close()


class TestEveryImplementation:
    def test_identity(self, nvml_and_wait):
        nvml, _ = nvml_and_wait
        gpus = nvml.gpus()
        assert [gpu.index for gpu in gpus] == list(range(nvml.num_gpus()))
        assert all(gpu.uuid().startswith("GPU-") and gpu.name() for gpu in gpus)
        assert len({gpu.uuid() for gpu in gpus}) == len(gpus)
        assert nvml.driver_version()

    def test_energy_counter_rises_and_agrees_with_power(self, nvml_and_wait):
        nvml, wait = nvml_and_wait
        gpu = nvml.gpu(0)
        if not (gpu.supports_energy_counter() and gpu.supports_power()):
            pytest.skip("this GPU has no energy counter")
        before_j, power_w = gpu.energy_j(), gpu.power_w()
        wait(2.0)
        mean_w = (gpu.energy_j() - before_j) / 2.0
        # Factor 2: the counter steps every 100 ms and the load of a shared card moves.
        assert 0.5 * power_w < mean_w < 2.0 * power_w

    def test_units_are_watts_and_joules(self, nvml_and_wait):
        nvml, _ = nvml_and_wait
        gpu = nvml.gpu(0)
        if gpu.supports_power():
            assert 1.0 < gpu.power_w() < 2000.0
        if gpu.supports_power_limit():
            least_w, greatest_w = gpu.power_limit_range_w()
            assert 1.0 < least_w <= gpu.power_limit_w() <= greatest_w < 2000.0
            assert least_w <= gpu.default_power_limit_w() <= greatest_w

    def test_state_questions(self, nvml_and_wait):
        nvml, _ = nvml_and_wait
        gpu = nvml.gpu(0)
        assert gpu.compute_mode() in {"default", "exclusive_process", "prohibited", "exclusive_thread"}
        assert gpu.virtualisation() in {"none", "passthrough", "vgpu", "host_vgpu", "host_vsga"}
        memory = gpu.memory()
        assert 0 <= memory.used_bytes <= memory.total_bytes
        if not gpu.mig_enabled():
            assert 0.0 <= gpu.utilisation_fraction() <= 1.0

    def test_unknown_gpu_is_unsupported(self, nvml_and_wait):
        nvml, _ = nvml_and_wait
        with pytest.raises(DeviceUnsupportedError):
            nvml.gpu(nvml.num_gpus())

    def test_opening_and_closing_twice_is_harmless(self, nvml_and_wait):
        nvml, _ = nvml_and_wait
        nvml.open()
        assert nvml.num_gpus() >= 1
        nvml.close()
        nvml.close()


def opened(library: FakeNvml) -> Nvml:
    nvml = Nvml(library)
    nvml.open()
    return nvml


class TestFaults:
    @pytest.mark.parametrize(
        ("code", "expected"),
        [
            (pynvml.NVML_ERROR_NO_PERMISSION, DevicePermissionError),
            (pynvml.NVML_ERROR_NOT_SUPPORTED, DeviceUnsupportedError),
            (pynvml.NVML_ERROR_FUNCTION_NOT_FOUND, DeviceUnsupportedError),
            (pynvml.NVML_ERROR_TIMEOUT, TransientDeviceError),
            (pynvml.NVML_ERROR_GPU_IS_LOST, TransientDeviceError),
            (pynvml.NVML_ERROR_UNKNOWN, TransientDeviceError),
        ],
    )
    def test_codes_become_what_the_caller_does(self, code, expected):
        library = FakeNvml()
        gpu = opened(library).gpu(0)
        library.fail("nvmlDeviceGetPowerUsage", code)
        with pytest.raises(expected, match="GPU 0: nvmlDeviceGetPowerUsage") as caught:
            gpu.power_w()
        assert library.fired == [("nvmlDeviceGetPowerUsage", code)]
        assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)

    def test_support_is_a_question(self):
        gpu = opened(FakeNvml([FakeGpu(has_energy_counter=False, has_power=False)])).gpu(0)
        assert not gpu.supports_energy_counter()
        assert not gpu.supports_power()
        assert gpu.supports_power_limit()

    def test_a_passing_failure_does_not_deny_support(self):
        library = FakeNvml()
        library.fail("nvmlDeviceGetTotalEnergyConsumption", pynvml.NVML_ERROR_TIMEOUT, times=1)
        assert opened(library).gpu(0).supports_energy_counter()
        assert library.fired

    def test_no_driver_says_the_fix(self):
        with pytest.raises(DeviceUnsupportedError, match="Driver Not Loaded") as caught:
            Nvml(FakeNvml(driver_loaded=False)).open()
        assert caught.value.code == "EADT-340"
        assert "driver" in caught.value.fix

    def test_a_binding_without_the_function_is_unsupported(self):
        with pytest.raises(DeviceUnsupportedError, match="not in the installed"):
            opened(FakeNvml()).call("nvmlDeviceGetNothing", of="GPU 0")

    def test_close_gives_the_reference_back(self):
        library = FakeNvml()
        nvml = opened(library)
        nvml.close()
        assert library.num_inits == 0
        with pytest.raises(TransientDeviceError, match="Uninitialized"):
            nvml.num_gpus()


class TestPowerLimitOnTheFake:
    def test_set_reads_first_and_is_idempotent(self):
        library = FakeNvml()
        gpu = opened(library).gpu(0)
        gpu.set_power_limit_w(300.0)
        gpu.set_power_limit_w(300.0)
        assert gpu.power_limit_w() == 300.0
        assert library.calls["nvmlDeviceSetPowerManagementLimit"] == 1

    def test_outside_the_range_is_refused_with_the_range(self):
        library = FakeNvml()
        with pytest.raises(DeviceUnsupportedError, match="from 200 to 700 W, not 800 W"):
            opened(library).gpu(0).set_power_limit_w(800.0)
        assert library.calls["nvmlDeviceSetPowerManagementLimit"] == 0

    def test_without_privilege(self):
        with pytest.raises(DevicePermissionError):
            opened(FakeNvml(privileged=False)).gpu(0).set_power_limit_w(300.0)


class TestDriverRestart:
    def two_cards(self) -> tuple[FakeNvml, Nvml]:
        library = FakeNvml([FakeGpu(uuid="GPU-a", power_w=10.0), FakeGpu(uuid="GPU-b", power_w=20.0)])
        return library, opened(library)

    def test_until_reopened_every_call_fails_as_gone(self):
        library, nvml = self.two_cards()
        gpu = nvml.gpu(0)
        library.unload_driver()
        with pytest.raises(EadtError) as caught:
            gpu.power_w()
        assert nvml.seems_gone(caught.value)
        library.load_driver()
        with pytest.raises(EadtError) as caught:
            gpu.power_w()
        assert nvml.seems_gone(caught.value)
        nvml.reopen()
        assert gpu.power_w() == 10.0
        assert gpu.energy_j() == 0.0

    def test_cards_are_found_again_by_uuid_whatever_their_order(self):
        library, nvml = self.two_cards()
        gpus = nvml.gpus()
        assert [gpu.uuid() for gpu in gpus] == ["GPU-a", "GPU-b"]
        library.unload_driver()
        library.gpus.reverse()
        library.load_driver()
        nvml.reopen()
        assert [gpu.power_w() for gpu in gpus] == [10.0, 20.0]
        assert library.calls["nvmlDeviceGetHandleByUUID"] == 2

    def test_references_of_others_in_the_process_are_kept(self):
        library, nvml = self.two_cards()
        other = opened(library)
        gpu = nvml.gpu(0)
        library.unload_driver()
        for _ in range(2):
            with pytest.raises(DeviceUnsupportedError, match="Driver Not Loaded"):
                nvml.reopen()
        library.load_driver()
        nvml.reopen()
        assert gpu.power_w() == 10.0
        assert library.num_inits == 2
        other.close()
        nvml.close()
        assert library.num_inits == 0

    def test_other_failures_are_no_reason(self):
        library, nvml = self.two_cards()
        library.fail("nvmlDeviceGetPowerUsage", pynvml.NVML_ERROR_TIMEOUT)
        with pytest.raises(TransientDeviceError) as caught:
            nvml.gpu(0).power_w()
        assert not nvml.seems_gone(caught.value)

    def test_a_hang_ends_when_released(self):
        library, nvml = self.two_cards()
        hang = library.hang("nvmlDeviceGetPowerUsage", index=1)
        gpu, seen = nvml.gpu(1), []
        assert nvml.gpu(0).power_w() == 10.0
        thread = threading.Thread(target=lambda: seen.append(gpu.power_w()), daemon=True)
        thread.start()
        assert hang.reached.wait(10.0)
        assert thread.is_alive()
        hang.release()
        thread.join(10.0)
        assert seen == [20.0]
