"""Architectures without formulas: coefficients from a few traces, cached, or an error; never a guess."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.cli import run
from planner.catalog import find_gpu
from planner.coefficients import CATEGORIES, FORMAT, Region, decisive_fields, file_of, load, traced_model
from planner.errors import ConfigError, NotModelledError
from planner.estimate import estimate
from planner.fits import fits, table_models
from planner.resolve import resolve_model
from planner.search import plan
from planner.setup import TrainSetup
from planner.specs import Machine

MACHINE = Machine(gpu=find_gpu("rtx-4090"))
UNKNOWN = {
    "model_type": "arcee",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 1024,
}
SLIDING = {
    **UNKNOWN,
    "model_type": "cwm",
    "head_dim": 16,
    "sliding_window": 300,
    "layer_types": ["full_attention", "sliding_attention"],
}
SETUP = TrainSetup(model=UNKNOWN, seq_len=256)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FINEFIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def polynomial(scale=1.0):
    """Bytes at the six points of 1 and 512 rows, 128, 576 and 1024 tokens: 100 + 2 rows tokens + rows tokens ** 2."""
    return [scale * (100 + 2 * b * n + b * n * n) for b in (1, 512) for n in (128, 576, 1024)]


def written(setup=SETUP, **changes):
    """A file of coefficients as a trace would leave it."""
    terms = {name: [0.0] * 6 for name in CATEGORIES}
    low = {**terms, "weights": [1e6] * 6}
    high = {**terms, "activations": polynomial()}
    phases = ("load", "forward", "loss", "backward", "optimizer", "save", "eval")
    content = {
        "format": FORMAT,
        "setup": decisive_fields(setup, on_gpu=True),
        "model": {
            "name": "arcee",
            "model_type": "arcee",
            "architecture": "decoder",
            "hidden_size": 64,
            "vocab_size": 512,
            "max_positions": 1024,
            "num_params": 1000,
        },
        "trained_bytes": 4000,
        "host_states_bytes": 0,
        "versions": {},
        "checked": "checked by hand",
        "regions": [
            {"sizes": [1, 512], "lengths": [128, 576, 1024], "phases": {p: [low, high] for p in phases}}
        ],
        **changes,
    }
    path = file_of(setup.model, setup, on_gpu=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


@given(st.integers(1, 512), st.integers(128, 1024))
def test_between_the_traced_points_the_polynomial_is_exact(rows, length):
    terms = dict.fromkeys(CATEGORIES, (0.0,) * 6)
    region = Region(
        sizes=(1, 512),
        lengths=(128, 576, 1024),
        phases={"loss": ({**terms, "logits": tuple(polynomial())},)},
    )
    expected = 100 + 2 * rows * length + rows * length**2
    assert region.at(rows, length)["loss"]["logits"] == pytest.approx(expected, rel=1e-9)


def test_a_single_traced_row_or_length_answers_for_itself():
    region = Region(
        sizes=(1, 1), lengths=(64, 64, 65), phases={"loss": ({"logits": (5.0, 5.0, 7.0, 5.0, 5.0, 7.0)},)}
    )
    assert region.at(1, 64)["loss"]["logits"] == 5
    assert region.at(1, 65)["loss"]["logits"] == 7


def test_the_higher_candidate_counts_at_each_shape():
    written()
    small, large = (
        estimate(SETUP.with_(micro_batch_size=b, seq_len=n), MACHINE) for b, n in ((1, 128), (64, 1024))
    )
    assert small.memory.terms["weights"] == 1_000_000
    assert large.memory.terms["weights"] == 0
    assert large.memory.terms["activations"] == 100 + 2 * 64 * 1024 + 64 * 1024**2


def test_an_estimate_says_that_it_comes_from_a_trace_and_that_time_is_unknown():
    written()
    found = estimate(SETUP, MACHINE)
    assert found.source == "trace"
    assert found.time is None
    assert any("coefficients from a trace of this config" in words for words in found.assumptions)


def test_without_coefficients_the_error_says_how_to_make_them():
    with pytest.raises(NotModelledError, match="estimate … --trace"):
        estimate(SETUP, MACHINE)
    written()
    with pytest.raises(NotModelledError, match=r"traced was checkpointing full.*--trace"):
        estimate(SETUP.with_(checkpointing="none"), MACHINE)


@pytest.mark.parametrize(("rows", "length"), [(1, 127), (1, 1025), (513, 256)])
def test_nothing_is_said_beyond_what_was_traced(rows, length):
    written()
    with pytest.raises(NotModelledError, match=f"{rows} x {length} tokens is outside"):
        estimate(SETUP.with_(micro_batch_size=rows, seq_len=length), MACHINE)


def test_fields_that_no_tensor_depends_on_share_coefficients():
    written()
    same = SETUP.with_(learning_rate=1e-3, epochs=3.0, alpha=8.0, micro_batch_size=2, seq_len=512)
    assert estimate(same, MACHINE).memory.peak_allocated_bytes > 0
    model = traced_model(UNKNOWN)
    assert model is not None
    with pytest.raises(NotModelledError):
        load(model, SETUP.with_(rank=8), on_gpu=True)
    with pytest.raises(NotModelledError):
        load(model, SETUP, on_gpu=False)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"format": 99}', '{"format": 2, "setup": {}}', "\xff" * 10, "[" * 100_000]
)
def test_a_broken_file_is_named_and_never_a_crash(text, capsys):
    path = written()
    path.write_text(text, encoding="latin-1")
    with pytest.raises(NotModelledError, match=path.name):
        estimate(SETUP, MACHINE)


def test_points_that_are_not_six_are_broken():
    path = written(
        regions=[
            {
                "sizes": [1, 2],
                "lengths": [1, 2, 3],
                "phases": {"load": [{name: [1.0] for name in CATEGORIES}]},
            }
        ]
    )
    with pytest.raises(NotModelledError, match=path.name):
        estimate(SETUP, MACHINE)


def test_a_trace_by_other_versions_is_not_used():
    written(versions={"click": "0.0.1"})
    with pytest.raises(NotModelledError, match=r"click 0\.0\.1, installed is"):
        estimate(SETUP, MACHINE)
    written(versions={"no-such-library": "1.0"})
    assert estimate(SETUP, MACHINE).memory.peak_allocated_bytes > 0


def test_plan_takes_what_was_traced_and_rejects_the_rest_by_name():
    wishes = {"model": UNKNOWN, "seq_len": 256, "optimizer": "adamw-fused"}
    with pytest.raises(NotModelledError, match="--trace"):
        plan(wishes, MACHINE)
    written(SETUP.with_(optimizer="adamw-fused"))
    found = plan(wishes, MACHINE)
    assert found.estimate.setup.checkpointing == "full"
    assert any("not traced with this setup" in rejected.reason for rejected in found.rejected)


def test_a_table_of_fits_has_a_row_for_what_was_traced(tmp_path):
    config = tmp_path / "config.json"
    config.write_text(json.dumps(UNKNOWN), encoding="utf-8")
    setup = SETUP.with_(optimizer="adamw-fused")
    written(setup)
    table = fits(MACHINE, models=table_models([str(config)]), methods=["lora", "full"])
    assert [row.estimate is not None for row in table.rows] == [False, True] or [
        row.method for row in table.rows if row.estimate is not None
    ] == ["lora"]
    assert table.rows[0].model.num_params == 1000


def traced_bytes(setup):
    from bench.trace.run import trace

    return {name: peak.num_bytes for name, peak in trace(setup).phases.items()}


def assert_as_traced(setup, rows, length):
    model = resolve_model(setup.model)
    found = load(model, setup, on_gpu=True).at(rows, length)
    traced = traced_bytes(setup.with_(micro_batch_size=rows, seq_len=length))
    for phase, num_bytes in traced.items():
        assert sum(found[phase].values()) == pytest.approx(num_bytes, rel=0.005), phase


@pytest.mark.train
@pytest.mark.slow
def test_a_traced_architecture_is_predicted_at_other_batches_and_lengths(cache, capsys):
    config = cache.parent / "config.json"
    config.write_text(json.dumps(UNKNOWN), encoding="utf-8")
    arguments = ["estimate", str(config), "--gpu", "rtx-4090", "--json", "--seq-len", "256"]
    assert run(arguments) == 1
    assert "--trace" in capsys.readouterr().err
    assert run([*arguments, "--trace"]) == 0
    traced = json.loads(capsys.readouterr().out)
    assert run(arguments) == 0
    closed = json.loads(capsys.readouterr().out)
    key = "peak_allocated_bytes"
    assert closed["memory"][key] == pytest.approx(traced["memory"][key], rel=0.005)
    for rows, length in ((1, 999), (5, 130), (33, 777)):
        assert_as_traced(SETUP, rows, length)


@pytest.mark.train
@pytest.mark.slow
def test_a_sliding_window_divides_what_was_traced():
    from bench.trace.coefficients import learn

    setup = TrainSetup(model=SLIDING, seq_len=256, method="full", checkpointing="none")
    learn(setup, on_gpu=True)
    regions = load(resolve_model(SLIDING), setup, on_gpu=True).regions
    assert {region.lengths[0] for region in regions} == {128, 300}
    for rows, length in ((1, 299), (1, 300), (3, 301), (7, 991)):
        assert_as_traced(setup, rows, length)


@pytest.mark.train
@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "of-nobody", "auto_map": {"AutoModelForCausalLM": "x.Y"}}, "auto_map"),
        ({"model_type": "of-nobody"}, "transformers can't read the config"),
        ({**UNKNOWN, "hidden_size": "wide"}, "arcee"),
    ],
)
def test_what_transformers_cannot_build_is_one_line_and_leaves_nothing(config, message, cache):
    from bench.trace.estimate import trace_estimate

    with pytest.raises(ConfigError, match=message):
        trace_estimate(TrainSetup(model=config, seq_len=64), MACHINE)
    assert not list(cache.rglob("*"))


@pytest.mark.train
def test_coefficients_that_are_off_are_refused(cache, monkeypatch):
    import numpy as np

    from bench.trace import coefficients

    def crooked(self, shape):
        rows, length = shape
        table = np.zeros((1, len(CATEGORIES)))
        table[0, 0] = rows * length**3
        return coefficients._Trace(0, {"backward": table})

    monkeypatch.setattr(coefficients._Traces, "_trace", crooked)
    with pytest.raises(NotModelledError, match="off by"):
        coefficients.learn(SETUP, on_gpu=True)
    assert not list(cache.rglob("*"))
