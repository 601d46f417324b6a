"""Code that a model brings along: refused unless a command's flag trusts it, and nothing of it has run by then."""

import json

import pytest

from bench.cli import run
from planner.errors import SetupError
from planner.resolve import read_config
from planner.setup import TrainSetup

CONFIG = {
    "model_type": "twin",
    "auto_map": {
        "AutoConfig": "configuration_twin.TwinConfig",
        "AutoModelForCausalLM": "modeling_twin.TwinForCausalLM",
    },
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 64,
}
MARK = "from pathlib import Path\n\nPath({marker!r}).open('a').write({name!r})\n"
CONFIGURATION = """
from transformers import LlamaConfig

class TwinConfig(LlamaConfig):
    model_type = "twin"
"""
MODELING = """
from transformers import LlamaForCausalLM
from .configuration_twin import TwinConfig

class TwinForCausalLM(LlamaForCausalLM):
    config_class = TwinConfig
"""


@pytest.fixture
def marker(tmp_path):
    return tmp_path / "has-run"


@pytest.fixture
def model(tmp_path, marker, monkeypatch):
    """A folder with a model whose classes are its own: a Llama by another name."""
    monkeypatch.setenv("FINEFIT_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "twin"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    for name, text in (("configuration_twin", CONFIGURATION), ("modeling_twin", MODELING)):
        (folder / f"{name}.py").write_text(MARK.format(marker=str(marker), name=name) + text)
    return folder


OPTIONS = ["--gpu", "rtx-4090", "--seq-len", "64"]


@pytest.mark.train
@pytest.mark.parametrize("command", [["trace"], ["estimate", "--trace"]])
def test_a_model_s_own_code_is_not_run_unasked(command, model, marker, capsys):
    assert run([command[0], str(model), *OPTIONS, *command[1:]]) == 1
    assert "--trust-remote-code" in capsys.readouterr().err
    assert not marker.exists()


@pytest.mark.train
@pytest.mark.slow
def test_trusted_code_is_traced_as_what_it_is(model, marker, capsys):
    assert run(["trace", str(model), *OPTIONS, "--trust-remote-code", "--json"]) == 0
    own = json.loads(capsys.readouterr().out)["memory"]
    assert {"configuration_twin", "modeling_twin"} <= {
        name for name in ("configuration_twin", "modeling_twin") if name in marker.read_text()
    }
    known = {k: v for k, v in CONFIG.items() if k != "auto_map"} | {"model_type": "llama"}
    (model / "config.json").write_text(json.dumps(known))
    assert run(["trace", str(model), *OPTIONS, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["memory"]["phases"] == own["phases"]


@pytest.mark.train
def test_code_that_fails_is_one_line(model, capsys):
    (model / "modeling_twin.py").write_text("raise RuntimeError('broken on purpose')\n")
    assert run(["trace", str(model), *OPTIONS, "--trust-remote-code"]) == 1
    assert "broken on purpose" in capsys.readouterr().err


@pytest.mark.train
def test_an_inline_config_brings_no_code(marker):
    from bench.build import AUTO_CLASSES
    from bench.remote_code import trust_code
    from planner.errors import ConfigError

    with pytest.raises(ConfigError, match="folder"):
        trust_code(TrainSetup(model=CONFIG), AUTO_CLASSES["sft"])


def test_formulas_run_no_code(model, marker, capsys):
    assert run(["estimate", str(model), *OPTIONS, "--trust-remote-code"]) == 2
    assert "--trace" in capsys.readouterr().err
    assert run(["estimate", str(model), *OPTIONS]) != 0
    assert not marker.exists()


def test_no_plan_file_can_trust_code(model, tmp_path):
    with pytest.raises(SetupError, match="trust_remote_code"):
        TrainSetup.from_dict({"model": str(model), "trust_remote_code": True})


def test_another_version_of_the_code_is_another_model(model):
    before = read_config(str(model))
    (model / "modeling_twin.py").write_text("# changed")
    assert read_config(str(model)) != before
