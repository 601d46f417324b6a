import ast
import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

import planner.export
from planner.errors import SetupError, UnknownNameError
from planner.export import find_format, formats
from planner.export._trl_trainers import TRAINERS
from planner.layers import peft_call
from planner.methods import methods, nothing_whole
from planner.optimizers import OPTIMIZERS, find_optimizer
from planner.resolve import resolve_model
from planner.setup import CHOICES, TrainSetup

BASE = TrainSetup(
    model="org/model",
    data="rows.jsonl",
    objective="sft",
    learning_rate=1e-4,
    loss="chunked",
    eval_batch_size=1,
    warmup_steps=10,
)
ZERO3 = BASE.with_(sharding="zero3", num_gpus=4, adapter_dtype="bfloat16")
QLORA = BASE.with_(method="qlora", adapter_dtype="bfloat16")
FSDP = BASE.with_(sharding="fsdp", num_gpus=4)
DPO = BASE.with_(objective="dpo", dpo_beta=0.2)
LAYER_SPLIT = BASE.with_(sharding="device_map", num_gpus=4)
SETUPS = {
    "lora": BASE,
    "qlora": QLORA,
    "qlora-int8-upcast": QLORA.with_(kbit_upcast=True, quant="int8"),
    "full": BASE.with_(method="full"),
    "pretrain": BASE.with_(objective="pretrain", eval_fraction=0.0, packing=True),
    "scratch": BASE.with_(from_scratch=True, method="full", weights_dtype="float32", autocast="bfloat16"),
    "no-checkpointing": BASE.with_(checkpointing="none", max_grad_norm=None, schedule="constant"),
    "ddp": BASE.with_(sharding="ddp", num_gpus=2),
    "two-nodes": BASE.with_(sharding="ddp", num_gpus=4, num_nodes=2),
    "fsdp": FSDP,
    "fsdp-qlora": QLORA.with_(sharding="fsdp", num_gpus=2, offload="params+optimizer"),
    "fsdp1": FSDP.with_(sharding="fsdp1", weights_dtype="float32", autocast="bfloat16"),
    "zero1": ZERO3.with_(sharding="zero1", master_weights="float32", micro_batch_size=2, grad_accum_steps=3),
    "zero2-offload": ZERO3.with_(sharding="zero2", offload="optimizer"),
    "zero3-offload": ZERO3.with_(offload="params+optimizer", master_weights="float32"),
    "zero3-full-pure": ZERO3.with_(method="full"),
    "zero2-lion": ZERO3.with_(sharding="zero2", optimizer="lion"),
    "zero2-fp16": ZERO3.with_(sharding="zero2", weights_dtype="float16", offload="optimizer"),
    "zero2-autocast": ZERO3.with_(sharding="zero2", weights_dtype="float32", autocast="bfloat16"),
    "layer-split": LAYER_SPLIT,
    "dpo": DPO,
    "dpo-full-ddp": DPO.with_(method="full", sharding="ddp", num_gpus=2),
}
FORMAT_NAMES = [form.name for form in formats()]


def export(name: str, setup: TrainSetup) -> dict[str, str]:
    return find_format(name).export(setup, "rtx-4090")


def can_export(name: str, setup: TrainSetup) -> bool:
    return name != "deepspeed" or setup.sharding in ("none", "ddp", "zero1", "zero2", "zero3")


def train_script(setup: TrainSetup) -> str:
    return export("trl", setup)["train.py"]


def constants(script: str) -> dict[str, object]:
    """The literals that a script assigns at module level."""
    found = {}
    for node in ast.parse(script).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found[node.targets[0].id] = ast.literal_eval(node.value)
    return found


def sft_arguments(setup: TrainSetup) -> dict[str, object]:
    return yaml.safe_load(export("trl", setup)[TRAINERS[setup.objective].config_file])


def test_the_folder_is_the_registry():
    files = {p.stem for p in Path(planner.export.__file__).parent.glob("[a-z]*.py")}
    assert set(FORMAT_NAMES) == files
    assert all(form.summary for form in formats())


def test_unknown_format_names_the_nearest():
    with pytest.raises(UnknownNameError, match="accelerate"):
        find_format("acelerate")
    assert find_format("TRL").name == "trl"


@pytest.mark.parametrize("name", SETUPS)
def test_the_script_is_whole_and_has_no_unused_name(name, tmp_path):
    path = tmp_path / "train.py"
    path.write_text(train_script(SETUPS[name]))
    pytest.importorskip("ruff", reason="ruff is not installed")
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select=E9,F", path]
    lint = subprocess.run(command, capture_output=True, text=True)
    assert lint.returncode == 0, lint.stdout


# ------------------------------------------------------------- every field is written or named as left out

MUTATIONS = {
    "model": (BASE, "org/other"),
    "objective": (BASE, "pretrain"),
    "dpo_beta": (DPO, 0.3),
    "revision": (BASE, "v2"),
    "tokenizer": (BASE, "org/tokenizer"),
    "from_scratch": (BASE, True),
    "data": (BASE, "other.jsonl"),
    "eval_fraction": (BASE, 0.2),
    "eval_batch_size": (BASE, 7),
    "method": (BASE, "full"),
    "rank": (BASE, 8),
    "alpha": (BASE, 17.5),
    "dropout": (BASE, 0.1),
    "targets": (BASE, ("q_proj",)),
    "num_virtual_tokens": (BASE.with_(method="prompt"), 7),
    "init_adapter": (BASE, "runs/first"),
    "adapter_dtype": (BASE, "bfloat16"),
    "quant": (QLORA, "fp4"),
    "kbit_upcast": (QLORA.with_(kbit_upcast=False), True),
    "weights_dtype": (BASE, "float32"),
    "autocast": (BASE.with_(weights_dtype="float32"), "bfloat16"),
    "master_weights": (BASE, "float32"),
    "optimizer": (BASE, "sgd"),
    "micro_batch_size": (BASE, 2),
    "grad_accum_steps": (BASE, 2),
    "seq_len": (BASE, 512),
    "packing": (BASE, True),
    "padding_free": (BASE, True),
    "checkpointing": (BASE, "none"),
    "optimizer_in_backward": (BASE, True),
    "attention": (BASE, "flash"),
    "loss": (BASE, "full"),
    "kernels": (BASE, "liger"),
    "compile": (BASE, True),
    "stack": (BASE, "torch 2.4.1"),
    "num_gpus": (BASE.with_(sharding="ddp", num_gpus=2), 4),
    "num_nodes": (BASE.with_(sharding="ddp", num_gpus=2), 2),
    "sharding": (ZERO3, "zero2"),
    "offload": (ZERO3, "optimizer"),
    "learning_rate": (BASE, 3e-5),
    "schedule": (BASE, "linear"),
    "warmup_steps": (BASE, 20),
    "epochs": (BASE, 2.5),
    "max_steps": (BASE, 100),
    "weight_decay": (BASE, 0.1),
    "max_grad_norm": (BASE, None),
    "seed": (BASE, 7),
}


def test_every_field_is_mutated():
    assert set(MUTATIONS) == {f.name for f in fields(TrainSetup)}


@pytest.mark.parametrize("format_name", FORMAT_NAMES)
@pytest.mark.parametrize("field", MUTATIONS)
def test_a_changed_field_changes_the_files_or_is_named(format_name, field):
    before, value = MUTATIONS[field]
    after = before.with_(**{field: value})
    form = find_format(format_name)
    named = field in form.left_out(before) or field in form.left_out(after)
    assert named or export(format_name, before) != export(format_name, after)


@pytest.mark.parametrize("format_name", FORMAT_NAMES)
@pytest.mark.parametrize("field", CHOICES)
def test_each_value_of_a_choice_is_told_apart_or_named(format_name, field):
    """Two values that give the same files are a lie unless at least one of them is named."""
    form = find_format(format_name)
    base = next((s for s in (BASE, QLORA) if getattr(s, field) is not None), BASE)
    seen: dict[str, str] = {}
    for value in CHOICES[field]:
        try:
            setup = base.with_(**{field: value}, **({"num_gpus": 2} if field == "sharding" else {}))
            files = json.dumps(form.export(setup, "gpu"))
        except SetupError:
            continue
        if field not in form.left_out(setup):
            assert seen.setdefault(files, value) == value


@pytest.mark.parametrize("format_name", FORMAT_NAMES)
@pytest.mark.parametrize("name", SETUPS)
def test_left_out_names_real_fields_once_each(format_name, name):
    form = find_format(format_name)
    setup = SETUPS[name]
    if not can_export(format_name, setup):
        return
    left_out = form.left_out(setup)
    assert set(left_out) <= {f.name for f in fields(TrainSetup)}
    lines = form.warnings(setup)
    assert sum(line.partition(":")[0].count(",") + 1 for line in lines) == len(left_out)


def test_what_trl_does_otherwise_stands_in_the_script():
    script = train_script(BASE.with_(loss="full", optimizer_in_backward=True))
    comments = "\n".join(line for line in script.splitlines() if line.startswith("#"))
    assert "loss" in comments and "optimizer_in_backward" in comments


# ------------------------------------------------------------- one setup, the same in every text


@pytest.mark.parametrize("name", SETUPS)
def test_trl_says_what_the_setup_says(name):
    setup = SETUPS[name]
    args, literals = sft_arguments(setup), constants(train_script(setup))
    assert args["per_device_train_batch_size"] == setup.micro_batch_size
    assert args["gradient_accumulation_steps"] == setup.grad_accum_steps
    assert args["max_length"] == setup.seq_len
    assert args.get("packing", False) == setup.packing
    assert args.get("beta", setup.dpo_beta) == setup.dpo_beta
    assert args["seed"] == setup.seed
    assert args["learning_rate"] == setup.learning_rate
    assert args["max_grad_norm"] == (setup.max_grad_norm or 0)
    assert args["activation_checkpointing"] == (setup.checkpointing == "full")
    assert args["optim"] == find_optimizer(setup.optimizer).hf_name
    assert args["report_to"] == "none"
    assert literals["MODEL_OPTIONS"]["dtype"] == setup.weights_dtype
    assert literals["MODEL"] == setup.model
    assert ("ADAPTER" in literals) == setup.uses_adapters
    assert ("QUANTISATION" in literals) == (setup.method == "qlora")


@pytest.mark.parametrize("method", methods())
def test_trl_passes_peft_what_the_method_says(method):
    named = {} if methods()[method].whole is not nothing_whole else {"targets": ("q_proj", "v_proj")}
    setup = BASE.with_(model="qwen2.5-0.5b", method=method, rank=4, alpha=9.0, checkpointing="none", **named)
    call = peft_call(setup, lambda: resolve_model(str(setup.model)))
    script = train_script(setup)
    if call is None:
        assert "peft" not in script
    else:
        assert f"{call[0]}(" in script
        assert constants(script)["ADAPTER"] == call[1]
    assert all(repr(part) in script for part in methods()[method].frozen)


@pytest.mark.parametrize("name", [n for n, s in SETUPS.items() if can_export("deepspeed", s)])
def test_deepspeed_says_what_the_setup_says(name):
    setup = SETUPS[name]
    config = json.loads(export("deepspeed", setup)["ds_config.json"])
    zero = config["zero_optimization"]
    assert (
        zero["stage"] == int(setup.sharding[-1]) if setup.sharding.startswith("zero") else zero["stage"] == 0
    )
    assert ("offload_optimizer" in zero) == (setup.offload != "none")
    assert ("offload_param" in zero) == (setup.offload == "params+optimizer")
    assert config["train_micro_batch_size_per_gpu"] == setup.micro_batch_size
    assert config["gradient_accumulation_steps"] == setup.grad_accum_steps
    assert ("bf16" in config) == (setup.weights_dtype == "bfloat16")
    pure = config.get("bf16", {}).get("bf16_master_weights_and_grads", False)
    if setup.weights_dtype == "bfloat16" and "master_weights" not in find_format("deepspeed").left_out(setup):
        assert pure == (setup.master_weights == "none")


@pytest.mark.parametrize("name", SETUPS)
def test_accelerate_starts_as_many_processes_as_the_setup_says(name):
    setup = SETUPS[name]
    config = yaml.safe_load(export("accelerate", setup)["accelerate.yaml"])
    is_layer_split = setup.sharding == "device_map"
    assert config["num_processes"] == (1 if is_layer_split else setup.num_gpus)
    assert config["num_machines"] == setup.num_nodes
    assert ("fsdp_config" in config) == setup.sharding.startswith("fsdp")
    assert ("deepspeed_config" in config) == setup.sharding.startswith("zero")


def test_the_trl_export_brings_its_launcher_along():
    assert set(export("trl", BASE)) == {"train.py", "sft_config.yaml"}
    files = export("trl", ZERO3)
    assert files["ds_config.json"] == export("deepspeed", ZERO3)["ds_config.json"]
    assert files["accelerate.yaml"] == export("accelerate", ZERO3)["accelerate.yaml"]
    assert "accelerate launch --config_file accelerate.yaml train.py" in files["train.py"]


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"objective": "seq2seq"}, "objective"),
        ({"data": None}, "data"),
        ({"model": {"model_type": "llama"}}, "model"),
        ({"from_scratch": True, "method": "qlora"}, "from_scratch"),
    ],
)
def test_trl_refuses_what_it_could_only_pretend_to_do(changes, field):
    with pytest.raises(SetupError) as caught:
        export("trl", BASE.with_(**changes))
    assert caught.value.field == field


def test_deepspeed_refuses_a_sharding_that_is_not_its_own():
    with pytest.raises(SetupError, match="fsdp"):
        export("deepspeed", FSDP)


def test_a_name_of_a_profile_becomes_its_hub_id():
    script = train_script(BASE.with_(model="smollm2-135m-instruct"))
    assert constants(script)["MODEL"] == "HuggingFaceTB/SmolLM2-135M-Instruct"


# ------------------------------------------------------------- hostile names stay data

HOSTILE = (
    "'",
    '"',
    "'''",
    '"""',
    "\\",
    "\n",
    "\r",
    "#",
    "{x}",
    "${x}",
    "%s",
    "!!python/object:os.system",
    "\u2028",
    ": ",
)
hostile_text = st.lists(st.sampled_from(HOSTILE) | st.text(max_size=5), max_size=5).map("".join)


def shape(script: str) -> str:
    """The script's program without the values of its literals."""
    tree = ast.parse(script)
    for node in tree.body:
        if isinstance(node, ast.Assign):
            node.value = ast.Constant(None)
    return ast.dump(tree)


@given(text=hostile_text)
def test_no_string_of_a_setup_becomes_program_text(text):
    text = text.replace("\0", "")
    setup = BASE.with_(
        model=f"org/{text}",
        revision=text,
        tokenizer=text,
        data=f"{text}.jsonl",
        targets=(f"{text}q",),
        stack=text,
    )
    files = export("trl", setup)
    literals = constants(files["train.py"])
    plain = train_script(BASE.with_(tokenizer="t", revision="r", targets=("q",), stack="s"))
    assert shape(files["train.py"]) == shape(plain)
    assert literals["MODEL"] == f"org/{text}"
    assert literals["DATA"] == f"{text}.jsonl"
    assert literals["REVISION"] == text
    assert literals["ADAPTER"]["target_modules"] == [f"{text}q"]
    assert yaml.safe_load(files["sft_config.yaml"]) == sft_arguments(BASE)


@given(gpu=hostile_text)
def test_the_gpu_s_name_does_not_reach_a_file(gpu):
    for form in formats():
        assert form.export(ZERO3, gpu) == form.export(ZERO3, "a")


def test_every_optimizer_is_exported_or_named():
    for optimizer in OPTIMIZERS:
        setup = BASE.with_(optimizer=optimizer)
        named = "optimizer" in find_format("trl").left_out(setup)
        assert named == (OPTIMIZERS[optimizer].hf_name is None)
        assert sft_arguments(setup)["optim"]
