"""Which weight matrices of a model get adapters and which are quantised: PEFT's and bitsandbytes' rules on a ModelSpec."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from planner.errors import SetupError
from planner.families import family
from planner.methods import Method, PeftCall, check_method
from planner.setup import TrainSetup
from planner.specs import LayerSpec, Matrix, ModelSpec

ALL_LINEAR = "all-linear"

Target = tuple[LayerSpec, Matrix]
"""A matrix and the layer it is in; it occurs layer.count * matrix.copies times."""

_FUSED_NAMES: Mapping[str, Mapping[str, str]] = {
    "mixtral": {"gate": "gate.weight", "w1": "gate_up_proj", "w3": "gate_up_proj", "w2": "down_proj"},
    "qwen2_moe": {
        "gate": "gate.weight",
        "gate_proj": "gate_up_proj",
        "up_proj": "gate_up_proj",
        "down_proj": "down_proj",
    },
}
"""PEFT 0.21's table from the names of transformers 4 to the expert parameters of transformers 5
(peft/utils/transformers_weight_conversion.py); the families that it serves say so by `peft_experts`."""


def all_matrices(model: ModelSpec) -> Iterator[Target]:
    """Every matrix of the layers, then those outside them, then the head (the latter in layers of side "head")."""
    for layer in model.layers:
        for matrix in layer.matrices:
            yield layer, matrix
    for matrix in (*model.outside, *([model.head] if model.head else [])):
        yield _outside_layer(model, matrix), matrix


def target_matrices(model: ModelSpec, targets: str | Sequence[str]) -> tuple[Target, ...]:
    """The matrices that PEFT 0.21 gives a LoRA adapter for `targets`.

    `all-linear` is every nn.Linear and Conv1D but the head. For the mixture-of-experts families that PEFT
    converts, it and the experts' old names (gate_proj, up_proj, down_proj; w1, w2, w3) also mean the expert
    parameters and the router, and no longer the dense layers' or shared experts' modules of these names.
    Raises SetupError("targets") naming the model's modules when a name matches nothing.
    """
    return _target_matrices(model, targets if isinstance(targets, str) else tuple(targets))


@functools.lru_cache(maxsize=1024)
def _target_matrices(model: ModelSpec, targets: str | tuple[str, ...]) -> tuple[Target, ...]:
    everything = list(all_matrices(model))
    fused = _FUSED_NAMES.get(_conversion(model), {})
    if targets == ALL_LINEAR:
        chosen = [m for _, m in everything if _is_module(m) and m is not model.head]
        names = {m.module for m in chosen} | set(fused)
        return tuple(t for t in everything if t[1] is not model.head and _is_target(t[1], names, fused))
    wanted = [targets] if isinstance(targets, str) else list(targets)
    for name in wanted:
        if not any(_is_target(matrix, [name], fused) for _, matrix in everything):
            raise SetupError(
                "targets", f"{name!r} matches no module of {model.name}; it has {_modules(model)}"
            )
    _check_fused_pairs(wanted, fused)
    return tuple(target for target in everything if _is_target(target[1], wanted, fused))


def adapted_matrices(model: ModelSpec, method: Method, targets: str | Sequence[str]) -> tuple[Target, ...]:
    """The matrices that a method adds something to.

    Raises SetupError("targets") as target_matrices does, and for what the method can't adapt.
    """
    if method.adapt is None:
        return ()
    found = [target for target in target_matrices(model, targets) if method.takes(target[1])]
    if not found:
        raise SetupError(
            "targets", f"{method.name} takes {method.takes_what}, and {model.name} has none of them there"
        )
    folded = [matrix.module for _, matrix in found if matrix.kind == "parameter"]
    if folded and not method.folds:
        names = ", ".join(dict.fromkeys(m.module for _, m in found if m.kind != "parameter"))
        raise SetupError(
            "targets",
            f"{method.name} can't adapt {folded[0]} of {model.name}, one parameter for all experts; name modules: {names}",
        )
    return tuple(found)


def peft_call(setup: TrainSetup, open_model: Callable[[], ModelSpec]) -> PeftCall | None:
    """What PEFT is told of a setup, None where it has no part; the model is opened where that depends on it.

    Raises SetupError for a setup that the method can't run, and for targets that match nothing.
    """
    method = check_method(setup)

    def find() -> list[Matrix]:
        return [matrix for _, matrix in adapted_matrices(open_model(), method, setup.targets)]

    return method.peft_config(setup, find)


def adapter_rank(matrix: Matrix, rank: int) -> int:
    """The rank that PEFT gives `matrix`: fused gate and up experts get both ranks, so twice `rank`."""
    return 2 * rank if matrix.kind == "parameter" and matrix.role == "gate_up" else rank


def adapter_params(model: ModelSpec, targets: str | Sequence[str], rank: int) -> int:
    """Trainable LoRA elements: rank * (in + out) for each matrix and copy."""
    return sum(
        layer.count * matrix.copies * adapter_rank(matrix, rank) * (matrix.in_features + matrix.out_features)
        for layer, matrix in target_matrices(model, targets)
    )


def quantised_matrices(model: ModelSpec) -> list[Target]:
    """The matrices that transformers hands to bitsandbytes: nn.Linear and Conv1D but the head.

    Left as they are: expert parameters, subclasses of nn.Linear, the model's last module, and what a model
    insists to keep (T5's wo, which stays in float32). Source: transformers/integrations/bitsandbytes.py.
    """
    return [
        (layer, matrix)
        for layer, matrix in all_matrices(model)
        if matrix.kind in ("linear", "conv1d") and matrix is not model.head
    ]


def module_names(model: ModelSpec) -> list[str]:
    """The names that `targets` may use, each once, in the model's order."""
    return list(
        dict.fromkeys(m.module for _, m in all_matrices(model) if _is_module(m) and m is not model.head)
    )


def _is_module(matrix: Matrix) -> bool:
    return matrix.kind != "parameter"


def _conversion(model: ModelSpec) -> str:
    has_parameters = any(m.kind == "parameter" for layer in model.layers for m in layer.matrices)
    return str(family(model.family).get("peft_experts", "")) if has_parameters else ""


def _is_target(matrix: Matrix, names: Iterable[str], fused: Mapping[str, str]) -> bool:
    parameters = {fused[n.rpartition(".")[2]] for n in names if n.rpartition(".")[2] in fused}
    if not _is_module(matrix):
        path = f"{matrix.path}.weight" if matrix.role == "router" else matrix.path
        return any(_ends_with(path, name) for name in parameters)
    return any(_ends_with(matrix.path, name) for name in names if name.rpartition(".")[2] not in fused)


def _ends_with(path: str, name: str) -> bool:
    return path == name or path.endswith(f".{name}")


def _check_fused_pairs(names: Iterable[str], fused: Mapping[str, str]) -> None:
    halves = [old for old, new in fused.items() if new == "gate_up_proj"]
    given = {n.rpartition(".")[2] for n in names}
    if 0 < len(given & set(halves)) < len(halves):
        raise SetupError("targets", f"{' and '.join(halves)} are one parameter here: name both or neither")


def _modules(model: ModelSpec) -> str:
    return ", ".join(module_names(model)) or "no linear modules"


def _outside_layer(model: ModelSpec, matrix: Matrix) -> LayerSpec:
    first = model.layers[0]
    return LayerSpec(
        count=1,
        matrices=(matrix,),
        norm_params=0,
        mixer="none",
        num_heads=first.num_heads,
        num_kv_heads=first.num_kv_heads,
        head_dim=first.head_dim,
        value_head_dim=first.value_head_dim,
        num_norms=0,
        mlp="none",
        side="head",
    )
