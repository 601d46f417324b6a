"""What `finefit machine` measures and keeps, and what reads it."""

import json

import pytest

torch = pytest.importorskip("torch")

from bench import rates as measured  # noqa: E402
from bench import reference_steps  # noqa: E402
from bench.cli import run  # noqa: E402
from bench.host import read_cpu, read_memory  # noqa: E402
from bench.machine import cpu_machine  # noqa: E402
from planner import rates  # noqa: E402
from planner.catalog import find_gpu  # noqa: E402
from planner.errors import DataError  # noqa: E402

pytestmark = pytest.mark.train


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    rates.local_rates.cache_clear()
    yield tmp_path / "finefit"
    rates.local_rates.cache_clear()


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(measured, "WIDTHS", (64, 128))
    monkeypatch.setattr(measured, "LONG_TOKENS", 64)
    monkeypatch.setattr(measured, "LEAST_S", 0.0)
    monkeypatch.setattr(measured, "OPTIMIZER_ELEMENTS", 1 << 10)
    monkeypatch.setattr(measured, "PACKED_SHAPE", (128, 128))
    monkeypatch.setattr(measured, "POINTWISE_ELEMENTS", (1 << 10,))
    monkeypatch.setattr(measured, "ATTENTION_LENGTHS", (64,))
    monkeypatch.setattr(reference_steps, "_CASES", reference_steps._CASES[:1])
    monkeypatch.setattr(measured, "exchange_bytes_per_s", lambda device, num_bytes: (1e9, 0.01, 3))


def test_a_rate_is_an_amount_over_the_median_time(monkeypatch):
    clock = iter([0.0, 1.0, 10.0, 12.0, 20.0, 22.0, 30.0, 32.0, 40.0, 42.0, 50.0, 52.0, 60.0, 67.0])
    monkeypatch.setattr(measured.time, "perf_counter", lambda: next(clock))
    meter = measured._Meter(torch.device("cpu"))
    assert meter.rate("some", "bytes/s", 100.0, lambda: None) == 50.0
    assert meter.readings[0].num_calls == 7
    assert meter.readings[0].spread == 0.0


@pytest.mark.slow
def test_what_is_measured_is_what_plans_for_this_machine_read(folder, quick, capsys):
    assert run(["machine", "--device", "cpu", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    (path,) = folder.iterdir()
    assert path == rates.machine_file(cpu_machine(read_cpu(), read_memory()).gpu)
    kept = json.loads(path.read_text())
    assert kept["rates"] == content["rates"]
    found = rates.local_rates(path)
    assert json.loads(json.dumps(found.to_json())) == content["rates"]
    assert found.link_bytes_per_s == 1e9
    # A processor's operations cost their overhead one after the other.
    assert found.launch_s == 0.0
    assert found.kernel_s > 0
    assert all(r["num_calls"] >= 1 and r["rate"] > 0 for r in content["readings"])


@pytest.mark.slow
def test_a_dry_run_keeps_nothing(folder, quick, capsys):
    assert run(["machine", "--device", "cpu", "--dry-run", "--json"]) == 0
    assert not folder.exists()


def test_a_broken_file_is_named(folder):
    folder.mkdir(parents=True)
    path = rates.machine_file(find_gpu("rtx-4090"))
    path.write_text("{")
    with pytest.raises(DataError, match=path.name):
        rates.local_rates(path)


def test_each_device_has_its_own_file(folder):
    names = {rates.machine_file(find_gpu(name)) for name in ("rtx-4090", "rtx-4080")}
    names.add(rates.machine_file(cpu_machine(read_cpu(), read_memory()).gpu))
    assert len(names) == 3


def test_the_mix_of_a_step_is_found_again_from_steps_that_have_it():
    curve = {2: rates.flat(5e11), 4: rates.flat(1e11)}
    known = rates.Rates(
        matmul=curve,
        attention=curve,
        memory_bytes_per_s=2e10,
        optimizer_bytes_per_s=1e10,
        dequantise_bytes_per_s=1e10,
        launch_s=0.0,
        kernel_s=3e-6,
    )
    true = reference_steps._with(known, 7e9, "kernel_s", 2e-5)
    steps = [
        reference_steps.ReferenceStep(
            setup=setup, step_s=reference_steps._seconds(reference_steps._timer(setup, true), true, setup)
        )
        for setup in list(reference_steps.reference_setups())[:4]
    ]
    found, errors = reference_steps.fit(known, steps, "kernel_s")
    assert found.memory_bytes_per_s == pytest.approx(7e9, rel=0.1)
    assert found.kernel_s == pytest.approx(2e-5, rel=0.3)
    assert max(map(abs, errors)) < 0.03
