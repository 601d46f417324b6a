"""This machine as finefit sees it: cards by NVML, processor and RAM by the system, limits of containers."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from bench import host, nvml_fakes
from bench.cards import visible_cards
from bench.hardware import hardware_report, probe_torch, runs_on
from bench.hardware_text import format_report
from bench.machine import HOST_RESERVE_BYTES, cpu_machine, local_machine
from bench.nvml import CardMemory, read_cards
from bench.nvml_fakes import FakeCard, FakeNvml
from planner.errors import FinefitError, MissingExtraError
from planner.units import GIB, MIB

MEMINFO = "MemTotal:       16777216 kB\nMemFree:         1000000 kB\nMemAvailable:    8388608 kB\n"
CPUINFO = """processor\t: 0
vendor_id\t: GenuineIntel
model name\t: Intel(R) Xeon(R) Platinum 8480+
flags\t\t: fpu sse2 avx2 avx512f avx512_bf16 amx_bf16 amx_tile amx_int8

processor\t: 1
model name\t: another
"""
NO_CARDS: dict[str, str] = {}


def system(tmp_path: Path, **files: str) -> Path:
    """A root folder with /proc (and whatever else is given, `__` standing for a slash)."""
    contents = {"proc__meminfo": MEMINFO, "proc__cpuinfo": CPUINFO, **files}
    for name, text in contents.items():
        path = tmp_path.joinpath(*name.split("__"))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def machine_with(nvml, tmp_path: Path, **environ: str):
    return local_machine(nvml, root=system(tmp_path), environ=environ)


def test_equal_cards_are_one_machine_with_the_least_free_memory(tmp_path):
    machine = machine_with(nvml_fakes.several_equal_cards(4), tmp_path)
    assert machine.num_gpus == 4 and machine.is_local
    assert machine.gpu.backend == "cuda" and "A100" in machine.gpu.name
    assert machine.gpu.usable_bytes == (81_920 - 765) * MIB
    assert machine.free_bytes == 81_150 * MIB - 10 * GIB
    assert machine.host_bytes == 8 * GIB


def test_unequal_cards_are_the_smallest_one_and_it_says_so(tmp_path):
    machine = machine_with(nvml_fakes.unequal_cards(), tmp_path)
    assert machine.num_gpus == 1 and "3060" in machine.gpu.name
    assert "unequal" in machine.gpu.note and "4090" in machine.gpu.note


@pytest.mark.parametrize(
    ("variable", "expected"),
    [("0", "4090"), ("1", "3060"), ("GPU-3060", "3060"), ("0,7,1", "4090"), ("0, 99", "4090")],
)
def test_cuda_visible_devices_chooses(variable, expected, tmp_path):
    machine = machine_with(nvml_fakes.unequal_cards(), tmp_path, CUDA_VISIBLE_DEVICES=variable)
    assert machine.num_gpus == 1 and expected in machine.gpu.name
    assert "unequal" not in (machine.gpu.note or "")


@pytest.mark.parametrize("variable", ["", "-1", "7", "none", "GPU-"])
def test_no_visible_card_is_the_cpu(variable, tmp_path):
    machine = machine_with(nvml_fakes.unequal_cards(), tmp_path, CUDA_VISIBLE_DEVICES=variable)
    assert machine.gpu.backend == "cpu"


def test_mig_machine_is_one_slice_of_unknown_speed(tmp_path):
    machine = machine_with(nvml_fakes.mig_card(), tmp_path)
    assert machine.num_gpus == 1 and "2g.20gb" in machine.gpu.name
    assert machine.gpu.memory_bytes == 19_968 * MIB and machine.free_bytes == (19_968 - 37) * MIB
    assert not machine.gpu.flops and machine.gpu.bandwidth_bytes_per_s is None
    chosen = machine_with(nvml_fakes.mig_card(), tmp_path, CUDA_VISIBLE_DEVICES="MIG-3g.40gb")
    assert chosen.gpu.memory_bytes == 40_192 * MIB


def test_mig_mode_without_an_instance_is_no_card_to_plan_for(tmp_path):
    nvml = FakeNvml([replace(nvml_fakes.A100, instances=())])
    with pytest.raises(FinefitError, match="MIG"):
        machine_with(nvml, tmp_path)


@pytest.mark.parametrize("environ", [{}, {"CUDA_VISIBLE_DEVICES": "1"}])
def test_a_lost_card_is_left_out_and_alone_it_is_an_error(environ, tmp_path):
    nvml = nvml_fakes.dying_card("GpuIsLost")
    if environ:
        with pytest.raises(FinefitError, match="GPU 1"):
            machine_with(nvml, tmp_path, **environ)
    else:
        assert machine_with(nvml, tmp_path).num_gpus == 1


def test_a_broken_driver_never_becomes_a_cpu_machine(tmp_path):
    with pytest.raises(FinefitError, match=r"restart the machine.*--gpu"):
        machine_with(nvml_fakes.mismatched_driver(), tmp_path)
    assert machine_with(nvml_fakes.missing_driver(), tmp_path).gpu.backend == "cpu"


def test_the_missing_package_matters_only_where_there_is_a_card(tmp_path):
    nvml = FakeNvml(open_reason="ModuleMissing")
    assert machine_with(nvml, tmp_path / "a").gpu.backend == "cpu"
    root = system(tmp_path / "b", proc__driver__nvidia__version="NVRM")
    with pytest.raises(MissingExtraError, match="nvidia-ml-py"):
        local_machine(nvml, root=root, environ={})


def test_unified_memory_is_what_the_system_has_available(tmp_path):
    machine = machine_with(nvml_fakes.unified_memory(), tmp_path)
    assert machine.gpu.unified_memory and machine.gpu.backend == "cuda"
    assert machine.gpu.usable_bytes == machine.free_bytes == 8 * GIB - HOST_RESERVE_BYTES


def test_a_card_that_no_profile_knows_keeps_what_the_driver_says(tmp_path):
    memory = CardMemory(total_bytes=10 * GIB, free_bytes=9 * GIB, reserved_bytes=GIB // 4)
    card = FakeCard(name="NVIDIA Zeta 9000", compute_capability=(7, 5), memory=memory)
    machine = machine_with(FakeNvml([card]), tmp_path)
    assert machine.gpu.usable_bytes == 10 * GIB - GIB // 4
    assert machine.gpu.bf16 is False and machine.gpu.flops == {}
    assert "not in finefit's catalogue" in machine.gpu.note
    with pytest.raises(FinefitError, match="reports no memory"):
        machine_with(FakeNvml([replace(card, memory=None)]), tmp_path)


def test_memory_tells_variants_of_one_name_apart(tmp_path):
    def of(gib: int):
        memory = CardMemory(total_bytes=gib * GIB, free_bytes=gib * GIB, reserved_bytes=0)
        card = FakeCard(name="NVIDIA GeForce RTX 3060", compute_capability=(8, 6), memory=memory)
        return machine_with(FakeNvml([card]), tmp_path).gpu.memory_bytes

    assert of(12) == 12 * GIB and of(8) == 8 * GIB


def test_cpu_machine_leaves_the_reserve_and_knows_bf16(tmp_path):
    root = system(tmp_path)
    machine = cpu_machine(host.read_cpu(root), host.read_memory(root))
    assert machine.gpu.usable_bytes == 8 * GIB - HOST_RESERVE_BYTES
    assert machine.gpu.memory_bytes == 16 * GIB
    assert machine.gpu.bf16 and not machine.gpu.flash_attention
    plain = system(tmp_path / "plain", proc__cpuinfo="flags : avx2\n")
    assert not cpu_machine(host.read_cpu(plain), host.read_memory(root)).gpu.bf16


def test_cpu_facts(tmp_path):
    cpu = host.read_cpu(system(tmp_path))
    assert cpu.model == "Intel(R) Xeon(R) Platinum 8480+" and cpu.vendor == "intel"
    assert cpu.features == ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_int8")


CGROUP_2 = {
    "proc__self__cgroup": "0::/pod/job\n",
    "sys__fs__cgroup__pod__job__memory.max": "max\n",
    "sys__fs__cgroup__pod__job__memory.current": "0\n",
    "sys__fs__cgroup__pod__memory.max": f"{4 * GIB}\n",
    "sys__fs__cgroup__pod__memory.current": f"{3 * GIB}\n",
    "sys__fs__cgroup__pod__memory.stat": f"anon 5\ninactive_file {GIB}\n",
    "sys__fs__cgroup__pod__cpu.max": "150000 100000\n",
}
CGROUP_1 = {
    "proc__self__cgroup": "4:memory:/docker/abc\n2:cpu,cpuacct:/docker/abc\n",
    "sys__fs__cgroup__memory__memory.limit_in_bytes": f"{4 * GIB}\n",
    "sys__fs__cgroup__memory__memory.usage_in_bytes": f"{3 * GIB}\n",
    "sys__fs__cgroup__memory__memory.stat": f"inactive_file 0\ntotal_inactive_file {GIB}\n",
    "sys__fs__cgroup__cpu__cpu.cfs_quota_us": "150000\n",
    "sys__fs__cgroup__cpu__cpu.cfs_period_us": "100000\n",
}


@pytest.mark.parametrize("files", [CGROUP_2, CGROUP_1], ids=["version 2", "version 1"])
def test_a_containers_limits_count(files, tmp_path, monkeypatch):
    monkeypatch.setattr(host.os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)
    root = system(tmp_path, **files)
    memory = host.read_memory(root)
    assert memory.limit_bytes == memory.usable_total_bytes == 4 * GIB
    assert memory.available_bytes == 2 * GIB
    assert host.count_cpus(root) == 2


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"proc__self__cgroup": "garbage\n::\n"},
        {**CGROUP_2, "sys__fs__cgroup__pod__memory.max": "max\n", "sys__fs__cgroup__pod__cpu.max": "max 1\n"},
        {
            **CGROUP_1,
            "sys__fs__cgroup__memory__memory.limit_in_bytes": "9223372036854771712\n",
            "sys__fs__cgroup__cpu__cpu.cfs_quota_us": "-1\n",
        },
    ],
)
def test_without_limits_the_whole_machine_counts(files, tmp_path, monkeypatch):
    monkeypatch.setattr(host.os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)
    root = system(tmp_path, **files)
    memory = host.read_memory(root)
    assert memory.limit_bytes is None and memory.available_bytes == 8 * GIB
    assert host.count_cpus(root) == 16


TOUCH = """
from bench import host
before = host.peak_rss_bytes()
block = bytearray(64 * 2**20)
block[:: 4 * 1024] = b"x" * len(block[:: 4 * 1024])
print(host.peak_rss_bytes() - before)
"""


def test_resident_set_of_a_process_grows_with_what_it_touches():
    run = subprocess.run([sys.executable, "-c", TOUCH], capture_output=True, text=True, check=True)
    assert int(run.stdout) > 50 * MIB
    assert host.peak_rss_bytes(2**22 + 1) is None


TORCH_13 = {
    "cuda": "13.0",
    "hip": None,
    "arch_list": ["sm_75", "sm_80", "sm_90", "sm_120"],
    "sees_gpu": True,
    "num_threads": 8,
}


def report_of(nvml, tmp_path, torch=TORCH_13):
    return hardware_report(nvml, root=system(tmp_path), probe=lambda: torch)


MACHINES = (
    "several_equal_cards",
    "unequal_cards",
    "busy_card",
    "mig_card",
    "missing_driver",
    "mismatched_driver",
    "dying_card",
    "unified_memory",
)


@pytest.mark.parametrize("name", MACHINES)
@pytest.mark.parametrize("torch", [TORCH_13, {"error": "not installed"}])
def test_every_machine_has_a_report_that_is_json_and_text(name, torch, tmp_path):
    report = report_of(getattr(nvml_fakes, name)(), tmp_path, torch)
    assert json.loads(json.dumps(report, allow_nan=False)) == json.loads(json.dumps(report))
    text = format_report(report)
    assert "GPU" in text and "CPU" in text and "torch" in text


def test_report_names_nobody(tmp_path, monkeypatch):
    report = report_of(nvml_fakes.several_equal_cards(), tmp_path)
    text = format_report(report) + json.dumps(report)
    for private in (str(Path.home()), str(Path.cwd()), "GPU-a100", str(tmp_path)):
        assert private not in text


def test_a_dying_card_is_one_line_in_the_report(tmp_path):
    text = format_report(report_of(nvml_fakes.dying_card(), tmp_path))
    assert "does not answer" in text and "GpuIsLost" in text


def test_warnings_name_what_will_go_wrong(tmp_path):
    old_torch = {**TORCH_13, "cuda": "12.4", "arch_list": ["sm_80", "sm_86", "sm_90a"]}
    warnings = report_of(nvml_fakes.unified_memory(), tmp_path, old_torch)["warnings"]
    assert any("sm_121" in w for w in warnings)
    cpu_torch = {**TORCH_13, "cuda": None, "arch_list": []}
    assert any("CPU build" in w for w in report_of(nvml_fakes.busy_card(), tmp_path, cpu_torch)["warnings"])
    assert not any("CPU build" in w for w in report_of(nvml_fakes.missing_driver(), tmp_path)["warnings"])
    busy = report_of(nvml_fakes.busy_card(), tmp_path)["warnings"]
    assert any("in use" in w for w in busy) and any("power cap" in w for w in busy)


@pytest.mark.parametrize(
    ("arch_list", "capability", "expected"),
    [
        (["sm_80"], (8, 6), True),
        (["sm_86"], (8, 0), False),
        (["sm_90a"], (9, 0), True),
        (["sm_100a"], (10, 3), False),
        (["sm_100f"], (10, 3), True),
        (["compute_80"], (12, 0), True),
        (["compute_90a"], (12, 0), False),
        (["sm_80", "nonsense"], (12, 0), False),
        ([], (8, 0), False),
    ],
)
def test_cuda_code_runs_where_cuda_says(arch_list, capability, expected):
    assert runs_on(arch_list, capability) is expected


def test_progress_is_told_before_torch_is_asked(tmp_path):
    lines: list[str] = []

    def probe():
        assert lines
        return TORCH_13

    hardware_report(nvml_fakes.missing_driver(), root=system(tmp_path), probe=probe, progress=lines.append)


def test_a_torch_that_cannot_be_imported_is_a_line(monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.setattr("bench.hardware._PROBE", "raise SystemExit('libcudart.so.13: cannot open')")
    assert "libcudart" in probe_torch()["error"]
    monkeypatch.setattr("bench.hardware._PROBE", "import time; time.sleep(60)")
    assert "longer than" in probe_torch(timeout_s=0.5)["error"]


@pytest.mark.train
@pytest.mark.slow
def test_the_real_torch_tells_its_build():
    answer = probe_torch()
    assert set(answer) == {"cuda", "hip", "arch_list", "sees_gpu", "num_threads"}


def test_visible_cards_keep_the_order_of_the_variable():
    cards = read_cards(nvml_fakes.several_equal_cards(3)).cards
    assert [card.index for card in visible_cards(cards, "2,0")] == [2, 0]
    assert [card.index for card in visible_cards(cards, None)] == [0, 1, 2]
