"""`finefit trace`: one code path with `estimate --trace`, what it prints, what it draws."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from bench.cli import run
from bench.trace.plot import Picture, describe, draw
from bench.trace.recording import CATEGORIES, Mark, Recording, Storage
from planner.errors import FinefitError, UsageError
from planner.results import ALLOCATED_TERMS
from planner.units import MIB

SVG = "{http://www.w3.org/2000/svg}"
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 600,
    "tie_word_embeddings": False,
}
OPTIONS = ["--gpu", "rtx-4090", "--seq-len", "64", "--method", "full"]


@pytest.fixture
def model(tmp_path: Path) -> str:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return str(tmp_path)


@pytest.mark.train
def test_trace_says_what_estimate_says_and_more(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plot = tmp_path / "out" / "memory.svg"
    assert run(["trace", model, *OPTIONS, "--json", "--plot", str(plot)]) == 0
    traced = json.loads(capsys.readouterr().out)
    assert run(["estimate", model, *OPTIONS, "--trace", "--json"]) == 0
    found = traced.pop("trace")
    assert traced == json.loads(capsys.readouterr().out)
    memory = traced["memory"]
    assert found["peak"]["phase"] == memory["peak_phase"]
    assert (found["num_layers"], found["traced_layers"]) == (5, [3, 4])
    sizes = [tensor["num_bytes"] for tensor in found["largest"]]
    assert sizes == sorted(sizes, reverse=True)
    assert len(sizes) == 10
    assert {t["module"] for t in found["largest"]} & {"model.embed_tokens", "lm_head"}
    assert {t["category"] for t in found["largest"]} <= set(CATEGORIES)
    replays = found["replay"]
    assert replays["default"]["peak_reserved_bytes"] == memory["peak_reserved_bytes"]
    reserved = replays["default"]["peak_reserved_bytes"]
    assert replays["default"]["on_this_gpu"] == {
        "is_served": True,
        "peak_reserved_bytes": reserved,
        "num_retries": 0,
        "failed_at": None,
    }
    # the card gives pages; neither holds less than what is allocated
    allocated = sum(memory["terms"][name] for name in ALLOCATED_TERMS)
    assert all(r["peak_reserved_bytes"] >= allocated for r in replays.values())
    assert ElementTree.parse(plot).getroot().find(f"{SVG}desc") is not None


@pytest.mark.train
@pytest.mark.slow
def test_cases_are_traced_line_by_line(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    setup = {"model": CONFIG, "method": "lora", "seq_len": 64}
    lines = [
        {"id": "good", "gpu": "rtx-4090", "setup": setup},
        {"id": "bad", "gpu": "rtx-4090", "setup": {**setup, "rnak": 3}},
    ]
    path = tmp_path / "cases.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines))
    assert run(["trace", "--cases", str(path)]) == 0
    good, bad = capsys.readouterr().out.splitlines()
    assert good.startswith("good  ")
    assert "reserved" in good
    assert bad.startswith("bad  error: ")


@pytest.mark.train
def test_a_card_that_is_too_small_says_where_it_fails(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["trace", "llama-3.1-8b", "--gpu", "rtx-4090", "--method", "full", "--seq-len", "64"]
    assert run([*words, "--optimizer", "sgd"]) == 0
    text = capsys.readouterr().out
    assert "on this GPU it fails at" in text
    assert "The largest tensors alive then" in text


@pytest.mark.train
def test_experts_of_an_old_stack_are_refused_before_anything_is_traced(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["trace", "mixtral-8x7b-v0.1", "--gpu", "a100-80gb-sxm", "--method", "qlora"]
    assert run([*words, "--stack", "transformers 4.48.1"]) == 1
    assert "stack: before transformers 5" in capsys.readouterr().err


@pytest.mark.train
def test_reserved_memory_is_that_of_a_run_on_this_card() -> None:
    from bench.trace.estimate import trace_on
    from planner.catalog import find_gpu
    from planner.setup import TrainSetup
    from planner.specs import Machine

    setup = TrainSetup(model=CONFIG, method="full", seq_len=1024, micro_batch_size=8, checkpointing="none")
    gpu = find_gpu("rtx-4090")
    roomy = trace_on(setup, Machine(gpu=gpu, num_gpus=1)).estimate.memory
    short = roomy.terms["fragmentation"] // 2
    tight = trace_on(setup, Machine(gpu=gpu, num_gpus=1, free_bytes=roomy.device_used_bytes - short))
    assert short > 0
    limited = tight.replayed(capacity_bytes=tight.usable_bytes)
    assert limited.num_retries > 0
    expected = roomy.peak_reserved_bytes if limited.failed_key is not None else limited.peak_reserved_bytes
    assert tight.estimate.memory.peak_reserved_bytes == expected
    assert tight.estimate.memory.peak_allocated_bytes == roomy.peak_allocated_bytes


# --- the picture, from a run by hand


def recording() -> Recording:
    sizes = {"weights": 8 * MIB, "gradients": 4 * MIB, "activations": 2 * MIB, "logits": MIB}
    storages, events, marks = [], [], []
    spans = [
        ("load", 0, "weights"),
        ("forward", 1, "activations"),
        ("loss", 1, "logits"),
        ("backward", 1, "gradients"),
    ]
    for number, (phase, step, category) in enumerate(spans):
        marks.append(Mark(len(events), step, phase))
        storages.append(
            Storage(
                number=number,
                num_bytes=sizes[category],
                shape=(1,),
                dtype="float32",
                op="mm",
                module="<lm_head>",
                layer=None,
                phase=phase,
                step=step,
                allocated_at=len(events),
                category=category,
            )
        )
        events.append(number)
    storages[2].freed_at = len(events)
    events.append(~2)
    return Recording(
        storages=storages,
        events=events,
        marks=marks,
        recompute_ends=(),
        vocab_size=9,
        num_layers=1,
        num_ops=4,
    )


PICTURE = Picture(
    timeline=recording(),
    title="a <model> & its run",
    peak_at=3,
    reserved=[(0, 20 * MIB)],
    usable_bytes=16 * MIB,
)


@pytest.mark.train
def test_the_picture_names_its_parts_and_says_them_in_words(tmp_path: Path) -> None:
    path = tmp_path / "run.svg"
    draw(PICTURE, path)
    root = ElementTree.parse(path).getroot()
    assert [e.text for e in root.findall(f"{SVG}title")] == [PICTURE.title]
    (description,) = (e.text for e in root.findall(f"{SVG}desc"))
    assert description == describe(PICTURE)
    assert "15 MiB (weights 8 MiB, gradients 4 MiB, activations 2 MiB, logits 1 MiB)" in str(description)
    words = {str(e.text).strip() for e in root.iter(f"{SVG}text")}
    assert {"weights", "gradients", "activations", "logits", "reserved", "the card can give"} <= words
    assert {"load", "forward", "loss", "backward", "step 1"} <= words
    assert not {"optimizer", "adapters", "temporary"} & words
    draw(PICTURE, tmp_path / "again.svg")
    assert path.read_bytes() == (tmp_path / "again.svg").read_bytes()


@pytest.mark.train
def test_a_png_is_drawn_and_other_names_are_refused(tmp_path: Path) -> None:
    draw(PICTURE, tmp_path / "run.png")
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UsageError, match=r"\.svg or \.png"):
        draw(PICTURE, tmp_path / "run.pdf")
    (tmp_path / "file").write_text("")
    with pytest.raises(FinefitError):
        draw(PICTURE, tmp_path / "file" / "run.png")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "run.png"]
