"""Accelerate: the file for `accelerate launch --config_file` (checked against accelerate 1.15).

It says how many processes start and how they share the work; what they train is the script's business.
The keys are those of accelerate.commands.config.config_args.ClusterConfig and, inside fsdp_config and
deepspeed_config, the options of `accelerate launch`.
"""

from __future__ import annotations

from typing import Any

from planner.export import deepspeed
from planner.setup import TrainSetup

SUMMARY = "accelerate launch's configuration: one GPU, DDP, FSDP or DeepSpeed"

FILE_NAME = "accelerate.yaml"

_MIXED_PRECISION = {None: "no", "bfloat16": "bf16", "float16": "fp16"}

_WRITTEN = {"num_gpus", "num_nodes", "sharding", "offload", "autocast"}
SCRIPT = "the training script sets this; accelerate's file only says how to launch"


def export(setup: TrainSetup, gpu: str) -> dict[str, str]:
    """accelerate.yaml, and the ds_config.json that it points to where DeepSpeed shards."""
    import yaml

    text = _header(setup) + yaml.safe_dump(config(setup), sort_keys=False)
    files = {FILE_NAME: text}
    return files | (deepspeed.export(setup, gpu) if uses_deepspeed(setup) else {})


def uses_deepspeed(setup: TrainSetup) -> bool:
    """Whether DeepSpeed shards the run."""
    return setup.sharding.startswith("zero")


def _header(setup: TrainSetup) -> str:
    lines = ["# Made by finefit: accelerate launch --config_file accelerate.yaml train.py"]
    if setup.num_nodes > 1:
        lines.append(
            "# On each node set machine_rank (0, 1, …) and main_process_ip (the address of the first node)."
        )
    if uses_deepspeed(setup):
        lines.append("# Start it from the folder that holds ds_config.json.")
    return "\n".join(lines) + "\n"


def config(setup: TrainSetup) -> dict[str, Any]:
    """The file's content."""
    is_layer_split = setup.sharding == "device_map"
    num_processes = 1 if is_layer_split else setup.num_gpus
    kind, section = _strategy(setup, num_processes)
    content: dict[str, Any] = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": kind,
        "num_processes": num_processes,
        "num_machines": 1 if is_layer_split else setup.num_nodes,
        "machine_rank": 0,
        "main_training_function": "main",
        "rdzv_backend": "static",
        "same_network": True,
        "use_cpu": False,
    }
    if setup.num_nodes > 1 and not is_layer_split:
        content |= {"main_process_ip": None, "main_process_port": 29500}
    if not uses_deepspeed(setup):
        content["mixed_precision"] = _MIXED_PRECISION[setup.autocast]
    return content | section


def _strategy(setup: TrainSetup, num_processes: int) -> tuple[str, dict[str, Any]]:
    if uses_deepspeed(setup):
        return "DEEPSPEED", {"deepspeed_config": _deepspeed_section(setup)}
    if setup.sharding in ("fsdp", "fsdp1"):
        return "FSDP", {"fsdp_config": _fsdp_section(setup)}
    return ("NO" if num_processes == 1 else "MULTI_GPU"), {}


def _deepspeed_section(setup: TrainSetup) -> dict[str, Any]:
    section: dict[str, Any] = {
        "deepspeed_config_file": deepspeed.FILE_NAME,
        "zero3_init_flag": setup.sharding == "zero3",
    }
    if setup.num_nodes > 1:
        section["deepspeed_multinode_launcher"] = "standard"
    return section


def _fsdp_section(setup: TrainSetup) -> dict[str, Any]:
    section: dict[str, Any] = {
        "fsdp_version": 2,
        "fsdp_reshard_after_forward": True,
        "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "fsdp_state_dict_type": "SHARDED_STATE_DICT",
        "fsdp_cpu_ram_efficient_loading": True,
        "fsdp_offload_params": setup.offload != "none",
        # The trainer's own switch does it; both at once are an error in transformers.
        "fsdp_activation_checkpointing": False,
    }
    if setup.sharding == "fsdp1":
        section |= {
            "fsdp_version": 1,
            "fsdp_reshard_after_forward": "FULL_SHARD",
            # Frozen and trained parameters share a flat buffer only when the original ones are kept.
            "fsdp_use_orig_params": True,
            "fsdp_sync_module_states": True,
        }
    return section


def left_out(setup: TrainSetup) -> dict[str, str]:
    """The fields that the training script sets, and those that accelerate treats otherwise."""
    if uses_deepspeed(setup):
        out = dict(deepspeed.left_out(setup))
        return {name: why for name, why in out.items() if name not in ("num_gpus", "num_nodes")}
    out = {name: SCRIPT for name in setup.to_dict() if name not in _WRITTEN}
    if setup.sharding == "device_map":
        why = "one process holds all layers; the script's device_map spreads them over the GPUs that it sees"
        out |= dict.fromkeys(("sharding", "num_gpus", "num_nodes"), why)
    if setup.sharding in ("fsdp", "fsdp1") and setup.offload == "optimizer":
        out["offload"] = "FSDP offloads parameters and optimizer together or not at all; both are offloaded"
    if setup.sharding in ("fsdp", "fsdp1") and setup.autocast and setup.weights_dtype != "float32":
        out["weights_dtype"] = "under mixed precision accelerate keeps FSDP's trained shards in float32"
    return out
