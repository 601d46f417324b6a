"""The NVML layer on drivers in every state that drivers are known to be in."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import nvml_fakes
from bench.nvml import THROTTLE_REASONS, CardProcess, NvmlQueryError, read_cards, throttle_reasons
from bench.nvml_driver import Pynvml
from planner.units import GIB, MIB

QUERIES = (
    "device",
    "name",
    "uuid",
    "compute_capability",
    "memory",
    "is_ecc_on",
    "mig_handles",
    "processes",
    "load",
    "num_devices",
    "driver_version",
    "cuda_version",
)
REASONS = ("GpuIsLost", "Unknown", "NotSupported", "NoPermission", "FunctionNotFound", "Timeout")


def test_reads_every_card_of_a_server():
    cards = read_cards(nvml_fakes.several_equal_cards(4))
    assert cards.missing is None and cards.problems == ()
    assert [card.index for card in cards.cards] == [0, 1, 2, 3]
    assert len({card.uuid for card in cards.cards}) == 4
    assert cards.driver_version == "580.95.05" and cards.cuda_version == (13, 0)
    free = [card.memory.free_bytes for card in cards.cards]
    assert free[0] - free[3] == 10 * GIB


def test_usable_memory_of_an_a100_is_what_torch_reports():
    (card,) = read_cards(nvml_fakes.FakeNvml([nvml_fakes.A100])).cards
    usable = card.memory.total_bytes - card.memory.reserved_bytes
    assert 79.2 * GIB < usable < 79.35 * GIB
    assert card.is_ecc_on is True


def test_busy_card_names_who_holds_how_much():
    (card,) = read_cards(nvml_fakes.busy_card()).cards
    assert card.processes == (CardProcess(pid=4_194_000, used_bytes=20 * GIB),)
    assert card.load.throttling == ("power cap",)


def test_mig_instances_have_their_own_memory():
    (card,) = read_cards(nvml_fakes.mig_card()).cards
    assert [i.name.rsplit(" ")[-1] for i in card.mig] == ["3g.40gb", "2g.20gb"]
    assert all(i.memory.total_bytes < card.memory.total_bytes for i in card.mig)


def test_card_without_mig_mode_has_no_instances_rather_than_an_empty_list():
    (card,) = read_cards(nvml_fakes.busy_card()).cards
    assert card.mig is None


@pytest.mark.parametrize(
    ("nvml", "words"),
    [
        (nvml_fakes.missing_driver(), "no NVIDIA driver"),
        (nvml_fakes.mismatched_driver(), "restart the machine"),
        (nvml_fakes.FakeNvml(open_reason="ModuleMissing"), "finefit[train]"),
        (nvml_fakes.FakeNvml(open_reason="NoPermission"), "does not answer: NoPermission"),
    ],
)
def test_driver_that_cannot_be_opened_is_one_line(nvml, words):
    cards = read_cards(nvml)
    assert cards.cards == () and words in cards.missing and "\n" not in cards.missing


@pytest.mark.parametrize("reason", ["GpuIsLost", "Unknown"])
def test_dying_card_leaves_the_other_whole(reason):
    first, second = read_cards(nvml_fakes.dying_card(reason)).cards
    assert first.memory is not None and not first.is_lost
    assert second.memory is None and second.name is not None
    assert second.is_lost == (reason == "GpuIsLost")


def test_lost_card_is_asked_no_more_and_complained_of_once():
    nvml = nvml_fakes.dying_card("GpuIsLost")
    nvml.failures = {**nvml.failures, ("processes", 1): "GpuIsLost", ("load", 1): "GpuIsLost"}
    assert len(read_cards(nvml).problems) == 1


def test_unified_memory_is_unknown_and_no_problem():
    cards = read_cards(nvml_fakes.unified_memory())
    assert cards.cards[0].memory is None and cards.problems == ()


@given(
    failures=st.dictionaries(
        st.tuples(st.sampled_from(QUERIES), st.sampled_from([None, 0, 1])), st.sampled_from(REASONS)
    )
)
def test_no_failure_of_any_query_raises_or_leaves_nvml_open(failures):
    nvml = nvml_fakes.FakeNvml([nvml_fakes.A100, nvml_fakes.RTX_3060], failures=failures)
    cards = read_cards(nvml)
    assert nvml.num_open == 0
    assert all("\n" not in line for line in cards.problems)
    assert cards.missing or len(cards.cards) == 2
    if set(failures.values()) <= {"NotSupported"}:
        assert cards.problems == ()


@given(st.integers(0, 2**64 - 1))
def test_throttle_words_follow_the_bits(bits):
    assert len(throttle_reasons(bits)) == sum(1 for bit in THROTTLE_REASONS if bits & bit)


class FakePynvmlError(Exception):
    pass


def error(name: str) -> Exception:
    return type(f"NVMLError_{name}", (FakePynvmlError,), {})(name)


def raising(name: str):
    def function(*_):
        raise error(name)

    return function


def fake_module(**functions):
    base = {
        "NVMLError": FakePynvmlError,
        "NVMLLibraryMismatchError": type("NVMLLibraryMismatchError", (Exception,), {}),
        "nvmlMemory_v2": 2,
        "NVML_TEMPERATURE_GPU": 0,
        "NVML_CLOCK_SM": 1,
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
    }
    return SimpleNamespace(**{**base, **functions})


def pynvml_of(**functions) -> Pynvml:
    layer = Pynvml(fake_module(**functions))
    layer.open()
    return layer


def test_old_driver_without_the_new_memory_query_still_answers():
    def memory(handle, version=None):
        if version:
            raise error("FunctionNotFound")
        return SimpleNamespace(total=8 * GIB, free=7 * GIB, used=GIB)

    answer = pynvml_of(nvmlDeviceGetMemoryInfo=memory).memory("card")
    assert (answer.total_bytes, answer.free_bytes, answer.reserved_bytes) == (8 * GIB, 7 * GIB, None)


def test_lost_card_is_not_asked_again_by_an_older_query():
    layer = pynvml_of(nvmlDeviceGetMemoryInfo=raising("GpuIsLost"))
    with pytest.raises(NvmlQueryError) as caught:
        layer.memory("card")
    assert caught.value.reason == "GpuIsLost"


def test_process_that_computes_and_draws_is_listed_once():
    processes = [SimpleNamespace(pid=7, usedGpuMemory=None), SimpleNamespace(pid=3, usedGpuMemory=5 * MIB)]
    layer = pynvml_of(
        nvmlDeviceGetComputeRunningProcesses_v3=raising("FunctionNotFound"),
        nvmlDeviceGetComputeRunningProcesses_v2=lambda handle: processes,
        nvmlDeviceGetGraphicsRunningProcesses_v3=lambda handle: [SimpleNamespace(pid=3, usedGpuMemory=MIB)],
    )
    assert layer.processes("card") == (
        CardProcess(pid=3, used_bytes=5 * MIB),
        CardProcess(pid=7, used_bytes=None),
    )


def test_empty_mig_slots_are_skipped():
    def by_index(handle, index):
        if index != 2:
            raise error("NotFound")
        return "instance"

    layer = pynvml_of(
        nvmlDeviceGetMigMode=lambda handle: [1, 1],
        nvmlDeviceGetMaxMigDeviceCount=lambda handle: 7,
        nvmlDeviceGetMigDeviceHandleByIndex=by_index,
    )
    assert layer.mig_handles("card") == ("instance",)


def test_load_is_partial_where_a_sensor_is_missing_but_a_lost_card_shows():
    sensors = {
        "nvmlDeviceGetTemperature": lambda handle, sensor: 70,
        "nvmlDeviceGetPowerUsage": raising("NotSupported"),
        "nvmlDeviceGetCurrentClocksEventReasons": raising("FunctionNotFound"),
        "nvmlDeviceGetCurrentClocksThrottleReasons": lambda handle: 0x40,
    }
    load = pynvml_of(**sensors).load("card")
    assert load.temperature_c == 70 and load.power_w is None and load.clock_hz is None
    assert load.throttling == ("hardware thermal slowdown",)
    with pytest.raises(NvmlQueryError):
        pynvml_of(**{**sensors, "nvmlDeviceGetTemperature": raising("GpuIsLost")}).load("card")


def test_names_may_be_bytes_and_versions_are_split():
    layer = pynvml_of(
        nvmlDeviceGetName=lambda handle: b"NVIDIA A10",
        nvmlSystemGetCudaDriverVersion_v2=lambda: 12_080,
    )
    assert layer.name("card") == "NVIDIA A10" and layer.cuda_version() == (12, 8)


def test_the_real_package_without_a_driver_answers_cleanly():
    pynvml = pytest.importorskip("pynvml")
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        assert read_cards(Pynvml()).missing is not None
    else:
        pynvml.nvmlShutdown()
        assert read_cards(Pynvml()).missing is None
