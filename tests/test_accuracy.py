"""Predicted against published memory: reading cases, errors, verdicts, intervals without what set them, the report."""

import json
import math
from pathlib import Path

import pytest
from click.testing import CliRunner

from planner.accuracy import compare, errors_of, group_errors, outcomes, read_cases, residuals
from planner.catalog import find_gpu, gpus, raw_gpu
from planner.cli_accuracy import accuracy_command
from planner.coverage import left_out
from planner.errors import DataError, ProfileError
from planner.estimate import estimate
from planner.kept_traces import keeping, kept_predictor, read_traces
from planner.residuals import published_runs, table_text
from planner.setup import TrainSetup
from planner.specs import Machine
from planner.units import GIB, gib

ROOT = Path(__file__).parents[1]
EVIDENCE = ROOT / "evidence" / "memory-runs.jsonl"
TABLE = ROOT / "profiles" / "calibration" / "memory-residuals.json"
TRACES = ROOT / "evidence" / "memory-runs-traced.jsonl"
MODEL = {
    "model_type": "llama",
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "vocab_size": 8192,
}

needs_evidence = pytest.mark.skipif(not EVIDENCE.is_file(), reason="needs the source tree")


def case(name="a", measured=None, **changes):
    setup = {
        "model": MODEL,
        "method": "lora",
        "micro_batch_size": 2,
        "seq_len": 512,
        **changes.pop("setup", {}),
    }
    found = {"peak_allocated_gib": 1.0} if measured is None else measured
    return {"id": name, "gpu": "RTX 4090", "setup": setup, "measured": found, "source": "o/r/x@1", **changes}


def lines(*cases):
    return [json.dumps(one).encode() for one in cases]


def run(path, *options):
    return CliRunner().invoke(accuracy_command, [str(path), *options], standalone_mode=False)


@pytest.fixture(scope="module")
def evidence():
    with EVIDENCE.open("rb") as file:
        return compare(read_cases(str(EVIDENCE), file))


@pytest.fixture(scope="module")
def traced():
    with TRACES.open("rb") as file:
        predict = kept_predictor(read_traces(str(TRACES), file))
    with EVIDENCE.open("rb") as file:
        return compare(read_cases(str(EVIDENCE), file), predict)


class TestReading:
    """Every broken line is named."""

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            (b"{", "not JSON"),
            (b"[1]", "an object"),
            (b"\xff\xfe{}", "not JSON"),
            (b'{"id": 3, "measured": {}}', "id: missing"),
            (b'{"id": "a"}', "measured: missing"),
            (b'{"id": "a", "measured": {"outcome": "maybe"}}', "measured.outcome"),
            (b'{"id": "a", "measured": {"peak_allocated_gib": -1}}', "measured.peak_allocated_gib"),
            (b'{"id": "a", "measured": {"device_used_gib": "12"}}', "measured.device_used_gib"),
            (b'{"id": "a", "measured": {"peak_allocated_gib": NaN}}', "NaN"),
            (b'{"id": "a", "measured": {}, "corrected": [1]}', "corrected"),
        ],
    )
    def test_a_broken_line_is_named(self, line, message):
        with pytest.raises(DataError, match=r"^cases.jsonl:3: ") as caught:
            read_cases("cases.jsonl", [*lines(case("first")), b"", line])
        assert message in str(caught.value)

    def test_an_id_must_not_come_twice(self):
        with pytest.raises(DataError, match="already in line 1"):
            read_cases("cases.jsonl", lines(case("a"), case("b"), case("a")))

    def test_a_file_without_cases_is_an_error(self):
        with pytest.raises(DataError, match="no cases"):
            read_cases("cases.jsonl", [b"", b"  \n"])

    def test_what_cannot_be_predicted_says_why_and_hides_nothing(self):
        cases = [
            case("card", gpu="A100 (not stated)"),
            case("field", setup={"rnak": 4}),
            {**case("none"), "setup": None},
            case("good"),
        ]
        found = compare(cases)
        assert [one.problem is None for one in found] == [False, False, False, True]
        assert "A100 (not stated)" in found[0].problem
        assert "rnak" in found[1].problem

    def test_finefits_own_broken_tables_are_no_case_s_problem(self):
        def broken(setup, machine):
            raise ProfileError("reinstall finefit")

        with pytest.raises(ProfileError):
            compare([case()], predict=broken)


class TestErrors:
    """Predicted over measured, minus one."""

    def test_by_hand(self):
        found = errors_of([0.1, -0.3, 0.05])
        assert found.mean == pytest.approx(0.15)
        assert found.median == pytest.approx(0.1)
        assert found.worst == pytest.approx(0.3)
        assert found.bias == pytest.approx(-0.05)
        assert found.deviation == pytest.approx(math.sqrt((0.15**2 + 0.25**2 + 0.1**2) / 3))

    def test_of_a_case(self):
        peak = estimate_of(case()).memory.peak_allocated_bytes
        found = compare([case(measured={"peak_allocated_gib": gib(peak) / 1.25})])[0]
        assert found.error == pytest.approx(0.25)
        assert found.runs.log_ratios == (round(-math.log(1.25), 4),)

    def test_a_peak_of_unknown_kind_is_taken_as_allocated(self):
        found = compare([case(measured={"peak_unknown_kind_gib": 2.0, "device_used_gib": 3.0})])[0]
        assert found.measured_gib == 2.0

    def test_groups_keep_sources_apart(self):
        found = group_errors(compare([case("a"), case("b", source="o/r/y@1"), case("c")]))
        assert [(g.group.source, g.labelled.num_cases) for g in found] == [("o/r/x", 2), ("o/r/y", 1)]

    def test_corrections_change_the_corrected_error_alone(self):
        plain, fixed = compare([case("a"), case("b", corrected={"rank": 64})])
        assert fixed.error == plain.error
        assert fixed.corrected_error > plain.corrected_error

    def test_another_predictor_can_be_given(self):
        asked = []

        def predict(setup, machine):
            asked.append(machine.gpu.name)
            return estimate(setup, machine)

        assert compare([case()], predict=predict)[0].error is not None
        assert asked == ["RTX 4090"]

    def test_rows_of_unknown_length_set_no_interval(self):
        assert residuals(compare([case(lengths="natural")])) == []

    def test_outcomes_by_hand(self):
        cases = compare(
            [case(str(i), {"outcome": o}) for i, o in enumerate(("oom", "oom", "fits", "measured", "oom"))]
        )
        found = outcomes(zip(cases, ("fits", "tight", "does-not-fit", "fits", None), strict=True))
        assert (found.num_fitted, found.num_oom) == (2, 2)
        assert (found.false_fits, found.false_refusals, found.tight) == (1, 1, 1)


def estimate_of(one):
    from planner.catalog import find_gpu
    from planner.setup import TrainSetup
    from planner.specs import Machine

    return estimate(TrainSetup.from_dict(one["setup"]), Machine(gpu=find_gpu(one["gpu"])))


@needs_evidence
class TestEvidence:
    """What is promised of the published runs."""

    def test_the_committed_table_is_what_the_code_says(self, evidence):
        assert TABLE.read_text() == table_text(residuals(evidence)), "run: make reports"

    def test_the_committed_report_is_what_the_code_says(self, monkeypatch):
        monkeypatch.chdir(ROOT)
        result = run("evidence/memory-runs.jsonl", "--markdown", "--worst", "20")
        assert result.output == (ROOT / "reports" / "accuracy.md").read_text(), "run: make reports"

    def test_the_committed_traced_report_is_what_the_kept_traces_say(self, monkeypatch):
        monkeypatch.chdir(ROOT)
        words = ("evidence/memory-runs.jsonl", "--traced", "evidence/memory-runs-traced.jsonl")
        result = run(*words, "--markdown", "--worst", "20")
        assert result.output == (ROOT / "reports" / "accuracy-traced.md").read_text(), "run: make reports"

    def test_traces_of_dense_runs_on_one_gpu_are_within_half_a_percent(self, traced):
        chosen = [
            abs(one.corrected_error)
            for one in traced
            if one.group.method in ("lora", "full")
            and (one.group.kernels, one.group.lengths) == ("plain", "exact")
            and "fms-acceleration" in one.group.source
            and one.corrected_error is not None
        ]
        assert len(chosen) >= 8
        assert sum(chosen) / len(chosen) <= 0.005
        assert max(chosen) <= 0.02

    def test_no_run_that_ran_out_of_memory_is_called_fits(self, evidence):
        found = outcomes((one, one.verdict) for one in evidence)
        assert found.false_fits == 0
        assert found.false_refusals <= 0.03 * found.num_fitted
        assert found.tight <= 0.10 * (found.num_fitted + found.num_oom)

    def test_intervals_cover_what_they_promise_without_the_row_s_shape(self, evidence):
        without_shape = next(one for one in left_out(evidence) if one.what == "its shape")
        assert 0.85 <= without_shape.total.share <= 0.95
        assert without_shape.outcomes.false_fits == 0

    def test_no_published_run_used_more_than_torch_was_seen_to_have(self, evidence):
        """device_used holds the context too, so it bounds what a card gives from below."""
        cards = gpus()
        for one in evidence:
            used = one.measured.get("device used")
            if used is not None and one.labelled is not None:
                name = one.labelled.gpu.partition(":")[0]
                highest = raw_gpu(name).get("torch_total_seen_gib", [0, cards[name].usable_bytes / GIB])[1]
                assert used <= highest

    def test_every_row_of_the_table_is_read(self, evidence):
        assert sum(len(runs.log_ratios) for runs in published_runs()) == sum(
            one.runs is not None for one in evidence
        )


class TestCommand:
    """What `finefit accuracy` prints."""

    def file(self, tmp_path, *cases):
        path = tmp_path / "cases.jsonl"
        path.write_bytes(b"\n".join(lines(*cases)))
        return path

    def test_json_holds_groups_outcomes_coverage_and_cases(self, tmp_path):
        path = self.file(tmp_path, case("a"), case("b", {"outcome": "oom"}), case("c", gpu="none such"))
        result = run(path, "--json")
        answer = json.loads(result.output)
        assert answer["schema_version"] == 1
        assert [one["id"] for one in answer["cases"]] == ["a", "b", "c"]
        assert answer["cases"][0]["low_gib"] < answer["cases"][0]["high_gib"]
        assert answer["cases"][2]["problem"]
        assert answer["outcomes"]["num_oom"] == 1
        assert {one["left_out"] for one in answer["left_out"]} >= {"its shape", "its source"}
        assert {one["kind"] for one in answer["peaks"]} == {"allocated"}

    @pytest.mark.parametrize("width", [60, 80, 120])
    def test_text_stays_inside_the_terminal(self, tmp_path, monkeypatch, width):
        monkeypatch.setenv("COLUMNS", str(width))
        cases = [case(f"case-{i}", source=f"an-organisation/a-repository/{i}.csv@1") for i in range(3)]
        result = run(self.file(tmp_path, *cases), "--worst", "2")
        assert result.exit_code == 0
        assert max(map(len, result.output.splitlines())) <= width
        assert "Verdict rule: fits if" in " ".join(result.output.split())

    def test_control_characters_of_a_file_never_reach_the_terminal(self, tmp_path):
        path = self.file(tmp_path, case("\x1b[2Ja", gpu="\x1b[31m"), case("b", source="\x1b[2Js"))
        result = run(path, "--worst", "2")
        assert "\x1b" not in result.output

    def test_a_table_without_rows_is_not_written(self, tmp_path):
        path = self.file(tmp_path, case("a", {"outcome": "oom"}))
        result = run(path, "--residuals", str(tmp_path / "table.json"))
        assert "no table to write" in str(result.exception)
        assert not (tmp_path / "table.json").exists()

    def test_a_broken_file_ends_with_code_1_and_one_line(self, tmp_path, capsys):
        from bench.cli import run as run_cli

        path = tmp_path / "cases.jsonl"
        path.write_text("{\n")
        assert run_cli(["accuracy", str(path)]) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert f"{path}:1: not JSON" in error

    def test_traced_cases_are_predicted_by_the_trace_and_the_others_named(self, tmp_path):
        from planner.cli_options import Session
        from planner.errors import NotModelledError

        def trace(setup, machine, *, label):
            if setup.method == "full":
                raise NotModelledError("num_gpus: only one GPU's step can be traced yet")
            if setup.rank == 3:
                raise ZeroDivisionError("inside\na library")
            return estimate(setup.with_(micro_batch_size=8), machine)

        full, odd = {"method": "full"}, {"rank": 3}
        path = self.file(
            tmp_path, case("a"), case("b", setup=full), case("c", setup=odd), case("d", setup=full)
        )
        result = CliRunner().invoke(
            accuracy_command,
            [str(path), "--trace", "--json"],
            obj=Session(trace=trace),
            standalone_mode=False,
        )
        found = {one["id"]: one for one in json.loads(result.stdout)["cases"]}
        plain = {one["id"]: one for one in json.loads(run(path, "--json").stdout)["cases"]}
        assert found["a"]["predicted_gib"] > plain["a"]["predicted_gib"]
        assert "inside a library" in found["c"]["problem"]
        text = (
            CliRunner()
            .invoke(
                accuracy_command,
                [str(path), "--trace", "--markdown"],
                obj=Session(trace=trace),
                standalone_mode=False,
            )
            .stdout
        )
        assert "(traced)" in text
        assert "not predicted, 2: num_gpus: only one GPU's step can be traced yet: b, d" in text

    def test_a_broken_line_of_kept_traces_is_named(self, tmp_path):
        kept = tmp_path / "kept.jsonl"
        kept.write_text(TRACES.read_text().splitlines()[0] + '\n{"key": "a", "phases": {}}\n')
        result = run(self.file(tmp_path, case("a")), "--traced", str(kept))
        assert isinstance(result.exception, DataError)
        assert f"{kept}:2" in str(result.exception)

    def test_a_kept_trace_is_not_made_again(self, tmp_path):
        calls = []

        def trace(setup, machine):
            calls.append(setup.method)
            return estimate(setup, machine)

        kept = tmp_path / "kept.jsonl"
        machine = Machine(gpu=find_gpu("rtx-4090"))
        setups = [TrainSetup(model=MODEL, method=method) for method in ("lora", "full", "lora")]
        first = [keeping(trace, kept)(setup, machine).memory for setup in setups]
        assert calls == ["lora", "full"]
        assert [keeping(trace, kept)(setup, machine).memory for setup in setups] == first
        assert calls == ["lora", "full"] and len(kept.read_text().splitlines()) == 2

    def test_keeping_needs_traces(self, tmp_path):
        result = run(self.file(tmp_path, case("a")), "--keep", str(tmp_path / "kept.jsonl"))
        assert "--trace" in str(result.exception)

    def test_tracing_needs_its_extra(self, tmp_path):
        result = run(self.file(tmp_path, case("a")), "--trace")
        assert "finefit[train]" in str(result.exception)
