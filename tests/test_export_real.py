"""The exported files in the hands of the libraries that they are for, at their installed versions."""

import json
import os
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import yaml

from planner.dataset_formats import FORMATS, detect
from planner.dataset_preferences import PREFERENCES
from planner.export import find_format
from planner.export._trl_trainers import TRAINERS
from planner.setup import TrainSetup
from test_export import SETUPS, can_export, constants
from tiny_llama import save_tiny_model, write_rows

pytestmark = pytest.mark.train


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def rows(tmp_path):
    return write_rows(tmp_path / "rows.jsonl")


@pytest.mark.parametrize("name", SETUPS)
def test_trl_takes_its_config_without_complaint(name, tmp_path):
    import trl

    setup = SETUPS[name]
    trainer = TRAINERS[setup.objective]
    config = yaml.safe_load(find_format("trl").export(setup, "gpu")[trainer.config_file])
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        # This machine may have no GPU, which must not change what the file means.
        args = getattr(trl, trainer.config)(**{**config, "output_dir": str(tmp_path), "use_cpu": True})
    assert args.gradient_checkpointing == (setup.checkpointing != "none")
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps * setup.num_gpus == (
        setup.global_batch_size
        if setup.sharding != "device_map"
        else setup.global_batch_size * setup.num_gpus
    )
    assert args.lr_scheduler_type == {"constant": "constant_with_warmup"}.get(setup.schedule, setup.schedule)
    assert args.get_warmup_steps(1000) == setup.warmup_steps


@pytest.mark.parametrize("name", [n for n, s in SETUPS.items() if s.uses_adapters])
def test_peft_and_bitsandbytes_take_their_arguments(name):
    import torch
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig

    setup = SETUPS[name]
    literals = constants(find_format("trl").export(setup, "gpu")["train.py"])
    adapter = LoraConfig(task_type="CAUSAL_LM", **literals["ADAPTER"])
    assert (adapter.r, adapter.lora_alpha, adapter.lora_dropout) == (setup.rank, setup.alpha, setup.dropout)
    if setup.quant:
        quantisation = BitsAndBytesConfig(**literals["QUANTISATION"])
        assert quantisation.load_in_8bit == (setup.quant == "int8")
        assert quantisation.load_in_4bit == (setup.quant != "int8")
        if setup.quant != "int8":
            assert quantisation.bnb_4bit_compute_dtype == getattr(torch, setup.weights_dtype)


@pytest.mark.parametrize("name", SETUPS)
def test_accelerate_launch_takes_its_config(name, tmp_path, monkeypatch):
    from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils import DistributedType

    setup = SETUPS[name]
    for file_name, text in find_format("accelerate").export(setup, "gpu").items():
        (tmp_path / file_name).write_text(text)
    monkeypatch.chdir(tmp_path)
    config = load_config_from_file("accelerate.yaml")
    assert isinstance(config, ClusterConfig)
    expected = {
        "zero": DistributedType.DEEPSPEED,
        "fsdp": DistributedType.FSDP,
        "ddp": DistributedType.MULTI_GPU,
    }
    kind = next(
        (k for prefix, k in expected.items() if setup.sharding.startswith(prefix)), DistributedType.NO
    )
    assert config.distributed_type == kind
    args = launch_command_parser().parse_args(["--config_file", "accelerate.yaml", "train.py"])
    args.nondefault = set()
    args, _, _ = _validate_launch_command(args)
    assert args.num_processes == (1 if kind == DistributedType.NO else setup.num_gpus)
    assert args.use_deepspeed == (kind == DistributedType.DEEPSPEED)
    assert args.mixed_precision == ("bf16" if setup.autocast and kind != DistributedType.DEEPSPEED else "no")


@pytest.mark.parametrize("name", [n for n, s in SETUPS.items() if s.sharding.startswith("fsdp")])
def test_fsdp_takes_the_options_that_accelerate_hands_it(name, monkeypatch):
    from accelerate.utils import FullyShardedDataParallelPlugin

    setup = SETUPS[name]
    section = yaml.safe_load(find_format("accelerate").export(setup, "gpu")["accelerate.yaml"])["fsdp_config"]
    for key, value in section.items():
        monkeypatch.setenv(key.upper(), str(value).lower() if isinstance(value, bool) else str(value))
    monkeypatch.delenv("FSDP_SYNC_MODULE_STATES", raising=False)  # it looks for a device at once
    monkeypatch.delenv("FSDP_CPU_RAM_EFFICIENT_LOADING", raising=False)
    plugin = FullyShardedDataParallelPlugin()
    is_offloaded = type(plugin.cpu_offload).__name__ == "CPUOffloadPolicy" or getattr(
        plugin.cpu_offload, "offload_params", False
    )
    assert plugin.fsdp_version == (1 if setup.sharding == "fsdp1" else 2)
    assert is_offloaded == (setup.offload != "none")


@pytest.mark.parametrize("name", [n for n, s in SETUPS.items() if can_export("deepspeed", s)])
def test_deepspeed_and_trainer_take_the_same_file(name, tmp_path, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime.config import DeepSpeedConfig
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig
    from trl import SFTConfig

    setup = SETUPS[name]
    text = find_format("deepspeed").export(setup, "gpu")["ds_config.json"]
    config = DeepSpeedConfig(json.loads(text))
    assert config.zero_optimization_stage == (int(setup.sharding[-1]) if setup.sharding[-1].isdigit() else 0)
    assert config.bfloat16_config.enabled == (setup.weights_dtype == "bfloat16")
    assert config.float16_config.enabled == (setup.weights_dtype == "float16")
    assert config.torch_autocast_enabled == bool(setup.autocast and setup.weights_dtype == "float32")
    assert config.gradient_clipping == (setup.max_grad_norm or 0)
    if not setup.sharding.startswith("zero"):
        return
    arguments = yaml.safe_load(find_format("trl").export(setup, "gpu")["sft_config.yaml"])
    args = SFTConfig(**{**arguments, "output_dir": str(tmp_path), "use_cpu": True, "fp16": False})
    args.fp16 = arguments["fp16"]  # Trainer refuses it on a CPU
    trainer_config = HfTrainerDeepSpeedConfig(json.loads(text))
    trainer_config.trainer_config_process(args)
    assert trainer_config.mismatches == []


RECORDS = (
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "system": "s"},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    {"instruction": "a", "input": "x", "output": "b", "history": [["c", "d"]], "system": "s"},
    {"instruction": "a", "input": "", "output": "b", "history": []},
    {"instruction": "a", "context": "x", "response": "b"},
    {"prompt": "a", "completion": "b", "context": "not read"},
    {"prompt": "a", "response": "b"},
    {"question": "a", "answer": "b", "context": "not read"},
)


USER, CHOSEN, REJECTED = (
    {"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b"), ("assistant", "c"))
)
PAIRS = (
    {"prompt": "a", "chosen": "b", "rejected": "c", "system": "s", "history": [["d", "e"]]},
    {"prompt": [USER], "chosen": [CHOSEN], "rejected": [REJECTED]},
    {"prompt": "a", "chosen": [USER, CHOSEN], "rejected": [USER, REJECTED]},
    {"instruction": "a", "input": "x", "chosen": "b", "rejected": "c"},
    {
        "conversations": [{"from": "human", "value": "a"}],
        "chosen": {"from": "gpt", "value": "b"},
        "rejected": {"from": "gpt", "value": "c"},
    },
    {"question": "a", "chosen": "b", "rejected": "c"},
    {"question": "a", "response_chosen": "b", "response_rejected": "c", "history": [["d", "e"]]},
    {"messages": [USER, CHOSEN], "rejected_response": "c", "system": "s"},
    {"chosen": [USER, CHOSEN], "rejected": [USER, REJECTED]},
)


@pytest.mark.parametrize("record", PAIRS, ids=lambda record: "+".join(record))
def test_the_script_reads_pairs_as_finefit_does(record):
    namespace: dict = {"__name__": "exported"}
    exec(compile(find_format("trl").export(SETUPS["dpo"], "cpu")["train.py"], "train.py", "exec"), namespace)
    pair = detect(record).parse(record)
    chosen, rejected = (
        [{"role": m.role, "content": m.content} for m in turns] for turns in (pair.chosen, pair.rejected)
    )
    found = namespace["to_example"](record)
    assert found["prompt"] == chosen[: pair.num_shared]
    assert found["prompt"] + found["chosen"] == chosen
    assert found["prompt"] + found["rejected"] == rejected


def test_the_pairs_cover_every_format_of_pairs():
    assert {detect(record).name for record in PAIRS} == {f.name for f in PREFERENCES}


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: "+".join(record))
def test_the_script_reads_rows_as_finefit_does(record):
    namespace: dict = {"__name__": "exported"}
    exec(compile(find_format("trl").export(SETUPS["lora"], "cpu")["train.py"], "train.py", "exec"), namespace)
    ours = [{"role": m.role, "content": m.content} for m in detect(record).parse(record)]
    assert namespace["to_turns"](record) == ours


def test_a_tokenizer_without_a_template_is_given_the_same_one():
    from bench import chat_template
    from planner.export import _trl_script

    assert chat_template.PLAIN_TEMPLATE == _trl_script.PLAIN_TEMPLATE
    literals = constants(find_format("trl").export(SETUPS["lora"], "cpu")["train.py"])
    assert literals["PLAIN_TEMPLATE"] == chat_template.PLAIN_TEMPLATE


def test_the_rows_cover_every_format_of_conversations():
    assert {detect(record).name for record in RECORDS} == {
        f.name for f in FORMATS if f not in PREFERENCES
    } - {"text"}


def setup_of(tiny_model: Path, rows: Path, **changes: object) -> TrainSetup:
    defaults = {"micro_batch_size": 2, "grad_accum_steps": 2, "seq_len": 64, "max_steps": 2, "rank": 2}
    return TrainSetup(model=str(tiny_model), data=str(rows), **{**defaults, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"adapter_dtype": "bfloat16"},
        {"weights_dtype": "float32", "adapter_dtype": "float32", "targets": ("q_proj", "v_proj")},
        {"method": "full"},
        {"method": "qlora"},
        {"method": "qlora", "kbit_upcast": True, "quant": "nf4"},
        {"method": "lora-fa"},
        {"method": "prompt", "num_virtual_tokens": 4},
    ],
)
def test_the_script_builds_the_model_that_finefit_trains(changes, tiny_model, rows):
    from bench.build import build_model, inner_model

    setup = setup_of(tiny_model, rows, checkpointing="none", **changes)
    namespace: dict = {"__name__": "exported"}
    exec(compile(find_format("trl").export(setup, "cpu")["train.py"], "train.py", "exec"), namespace)
    exported, ours = namespace["load_model"](), build_model(setup, weights=tiny_model)
    described = [
        {name: (tuple(p.shape), p.dtype, p.requires_grad) for name, p in model.named_parameters()}
        for model in (exported, ours)
    ]
    assert described[0] == described[1]
    configs = [inner_model(model).config for model in (exported, ours)]
    assert configs[0]._attn_implementation == configs[1]._attn_implementation


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"packing": True, "method": "full", "eval_fraction": 0.0, "checkpointing": "none"},
        {"method": "qlora", "optimizer": "adamw-fused", "schedule": "constant"},
        {"method": "prefix", "checkpointing": "none", "num_virtual_tokens": 4},
    ],
    ids=lambda changes: changes.get("method", "lora"),
)
def test_the_exported_script_trains(changes, tiny_model, rows, tmp_path):
    setup = setup_of(tiny_model, rows, **changes)
    folder = tmp_path / "exported"
    folder.mkdir()
    for name, text in find_format("trl").export(setup, "cpu").items():
        (folder / name).write_text(text)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(folder / "train.py")]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280)
    assert run.returncode == 0, run.stderr[-3000:]
    state = json.loads((tmp_path / "trl-output/checkpoint-2/trainer_state.json").read_text())
    assert state["global_step"] == 2
    weights = "adapter_model.safetensors" if setup.uses_adapters else "model.safetensors"
    assert (tmp_path / "trl-output" / weights).stat().st_size > 0


DEEPSPEED_STEPS = """
import json, sys
import torch
import deepspeed
deepspeed.init_distributed("gloo")
config = json.load(open("ds_config.json"))
dtype = torch.bfloat16 if "bf16" in config else torch.float32
model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 1)).to(dtype)
own = {} if "optimizer" in config else {"optimizer": torch.optim.SGD(model.parameters(), lr=0.01)}
engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config, **own)
for _ in range(2 * config["gradient_accumulation_steps"]):
    engine.backward(engine(torch.randn(2, 64, dtype=dtype)).float().pow(2).mean())
    engine.step()
masters = {p.dtype for group in engine.optimizer.param_groups for p in group["params"]}
print("result", engine.global_steps, *masters)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero1", "zero2-lion", "zero2-autocast", "zero3-full-pure"])
def test_deepspeed_trains_by_the_exported_file(name, tmp_path):
    setup = SETUPS[name]
    (tmp_path / "ds_config.json").write_text(find_format("deepspeed").export(setup, "cpu")["ds_config.json"])
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    ranks = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    environment = {**os.environ, **ranks, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", DEEPSPEED_STEPS]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280)
    assert run.returncode == 0, run.stderr[-3000:]
    (line,) = [line for line in run.stdout.splitlines() if line.startswith("result ")]
    _, steps, *masters = line.split()
    assert steps == "2"
    is_pure = setup.master_weights == "none" and setup.weights_dtype == "bfloat16"
    # ZeRO-3 keeps its copies outside the optimizer's groups between the steps.
    assert masters in ([], ["torch.bfloat16" if is_pure else "torch.float32"])
