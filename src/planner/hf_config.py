"""Any Hugging Face config.json -> ModelSpec, without transformers and without the weights.

What config.json leaves unsaid (module names, biases, norms, how experts are stored, which layers slide) is
in profiles/models/families.toml; the code here only reads, checks and multiplies. That the result is the
model which transformers builds is tested module by module against its real classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from planner.errors import ConfigError, NotModelledError
from planner.families import Family, block, evaluate, family
from planner.specs import LayerSpec, Matrix, ModelSpec

MAX_DIMENSION = 100_000_000
"""No dimension of a real model comes near (the largest vocabulary is below 10**6)."""
MAX_LAYERS = 10_000


def model_spec(
    config: Mapping[str, Any],
    *,
    name: str | None = None,
    hub_id: str | None = None,
    where: str = "config.json",
    experts_as_linears: bool = False,
) -> ModelSpec:
    """The shapes of the model that `config` describes.

    `experts_as_linears`: experts as separate nn.Linear (transformers 4) and not as one 3-D parameter (5).
    `where` names the file in errors. Raises ConfigError for a missing or absurd field and NotModelledError
    for a model_type without a family.
    """
    model_type = _model_type(config, where)
    fam = family(model_type)
    dims = _Dims(config, fam, where)
    layers = tuple(_layers(fam, dims, experts_as_linears))
    return ModelSpec(
        name=name or _text(config, "_name_or_path") or model_type,
        hub_id=hub_id,
        family=model_type,
        architecture=fam["architecture"],
        hidden_size=dims["hidden"],
        vocab_size=dims["vocab"],
        max_positions=dims["positions"] or None,
        layers=layers,
        embedding_params=dims.evaluate(fam["embeddings"]),
        token_embedding_params=dims.evaluate(fam["token_embeddings"]),
        head=_head(fam, dims),
        tied_head=bool(dims["tied"]),
        final_params=dims.evaluate(fam["final"]),
        logit_softcap=bool(config.get("final_logit_softcapping")),
        remote_code=bool(fam.get("remote_code")),
        config=config,
    )


def _model_type(config: Mapping[str, Any], where: str) -> str:
    if not isinstance(config, Mapping):
        raise ConfigError(f"{where}: not a JSON object")
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        raise ConfigError(f"{where}: field 'model_type' is missing or not a text")
    return model_type


def _text(config: Mapping[str, Any], key: str) -> str | None:
    value = config.get(key)
    return value if isinstance(value, str) and value else None


class _Dims(dict[str, int]):
    """The dimensions of one model, read and checked when first asked for."""

    def __init__(self, config: Mapping[str, Any], fam: Family, where: str) -> None:
        super().__init__()
        self.config, self.where = config, where
        self._keys, self._values, self._nulls = fam["keys"], fam["values"], fam["nulls"]

    def __missing__(self, name: str) -> int:
        self[name] = value = self._read(name)
        return value

    def evaluate(self, expression: str | int) -> int:
        """The value of an expression of families.toml; ConfigError where a division is not exact."""
        try:
            return evaluate(expression, self)
        except ArithmeticError as error:
            divisor = self._field(str(error))
            raise ConfigError(
                f"{self.where}: {divisor} = {self[str(error)]} doesn't divide {expression.split('/')[0]}"  # type: ignore[union-attr]
            ) from None

    def _field(self, name: str) -> str:
        return next(iter(self._keys.get(name, ())), name)

    def _read(self, name: str) -> int:
        default = self._values.get(name)
        for key in self._keys.get(name, ()):
            if key not in self.config:
                continue
            value = self.config[key]
            if value is None:
                default = self._nulls.get(name, default)
                break
            return self._checked(key, value, default)
        if default is None:
            raise ConfigError(f"{self.where}: field {self._field(name)!r} is missing")
        return self.evaluate(default)

    def _checked(self, key: str, value: Any, default: Any) -> int:
        if isinstance(default, bool):
            if not isinstance(value, bool):
                raise ConfigError(f"{self.where}: field {key!r} must be true or false, not {value!r:.40}")
            return int(value)
        lowest = 0 if default == 0 else 1
        if not isinstance(value, int) or isinstance(value, bool) or not lowest <= value <= MAX_DIMENSION:
            raise ConfigError(
                f"{self.where}: field {key!r} must be a whole number from {lowest} to {MAX_DIMENSION}, "
                f"not {value!r:.40}"
            )
        return value


_MIXERS = {
    "full_attention": "full",
    "attention": "full",
    "sliding_attention": "sliding",
    "chunked_attention": "sliding",
    "linear_attention": "linear",
}


def _layers(fam: Family, dims: _Dims, experts_as_linears: bool) -> Iterator[LayerSpec]:
    count = dims["layers"]
    if count > MAX_LAYERS:
        raise ConfigError(f"{dims.where}: {count} layers are more than {MAX_LAYERS}")
    kinds: dict[tuple[str, bool], int] = {}
    for kind in zip(_mixer_kinds(fam, dims, count), _moe_layers(fam, dims, count), strict=True):
        kinds[kind] = kinds.get(kind, 0) + 1
    for (mixer, is_moe), times in kinds.items():
        yield _layer(fam, dims, times, mixer, is_moe, experts_as_linears)


def _mixer_kinds(fam: Family, dims: _Dims, count: int) -> list[str]:
    listed = dims.config.get("layer_types")
    if listed is not None and "full" in fam["blocks"]:
        return _listed_kinds(listed, dims, count)
    other = fam["other"]
    if other == "full" or (other == "sliding" and dims["window"] == 0):
        return ["full"] * count
    below, every = dims["full_below"], dims["full_every"]
    return ["full" if i < below or (every and (i + 1) % every == 0) else other for i in range(count)]


def _listed_kinds(listed: Any, dims: _Dims, count: int) -> list[str]:
    if not isinstance(listed, list) or len(listed) < count:
        raise ConfigError(f"{dims.where}: field 'layer_types' must list the kind of each of {count} layers")
    unknown = [kind for kind in listed[:count] if not isinstance(kind, str) or kind not in _MIXERS]
    if unknown:
        raise NotModelledError(f"{dims.where}: layers of kind {unknown[0]!r:.40} are not modelled")
    return [_MIXERS[kind] for kind in listed[:count]]


def _moe_layers(fam: Family, dims: _Dims, count: int) -> list[bool]:
    if "moe" not in fam["blocks"] or dims["experts"] == 0:
        return [False] * count
    below, every = dims["dense_below"], dims["moe_every"]
    dense = dims.config.get(fam.get("dense_list_key", ""), None) or ()
    if not isinstance(dense, list | tuple):
        raise ConfigError(f"{dims.where}: field {fam['dense_list_key']!r} must be a list of layers")
    return [i >= below and (i + 1) % every == 0 and i not in dense for i in range(count)]


def _layer(
    fam: Family, dims: _Dims, count: int, mixer: str, is_moe: bool, experts_as_linears: bool
) -> LayerSpec:
    blocks = fam["blocks"]
    feed = "dense"
    if is_moe:
        feed = "moe_linears" if experts_as_linears and "moe_linears" in blocks else "moe"
    mixing = block(blocks.get(mixer) or blocks["full"])
    feeding = block(blocks[feed])
    own = {**fam, **mixing}
    return LayerSpec(
        count=count,
        matrices=tuple(_matrices(mixing, dims)) + tuple(_matrices(feeding, dims)),
        norm_params=sum(
            dims.evaluate(part)
            for part in (fam["norms"], mixing.get("vectors", 0), feeding.get("vectors", 0))
        ),
        mixer="linear" if mixer == "linear" else "softmax",
        num_heads=dims.evaluate(own.get("heads", "heads")),
        num_kv_heads=dims.evaluate(own.get("kv_heads", "kv_heads")),
        head_dim=dims.evaluate(own.get("head_dim", "head_dim")),
        value_head_dim=dims.evaluate(own.get("v_head_dim", "v_head_dim")),
        window=(dims["window"] or None) if mixer == "sliding" else None,
        causal=fam["architecture"] != "encoder",
        qk_norm=fam["qk_norm"],
        norm=fam["norm"],
        num_norms=fam["num_norms"],
        mlp=fam["mlp"],
        activation=_text(dims.config, fam["activation_key"]) or fam["activation"],
        num_experts=dims["experts"] if is_moe else 0,
        experts_per_token=dims["top_k"] if is_moe else 0,
        side="encoder" if fam["architecture"] == "encoder" else "decoder",
    )


def _matrices(part: Mapping[str, Any], dims: _Dims) -> Iterator[Matrix]:
    for entry in part["matrices"]:
        if "only" in entry and not dims.evaluate(entry["only"]):
            continue
        routed = entry.get("routed", False)
        path = entry["at"]
        rows, columns = entry["shape"]
        yield Matrix(
            module=path.rpartition(".")[2],
            path=path,
            role=entry["role"],
            in_features=dims.evaluate(rows),
            out_features=dims.evaluate(columns),
            bias=bool(dims.evaluate(entry.get("bias", 0))),
            copies=dims["experts"] if routed else 1,
            token_share=dims["top_k"] / dims["experts"] if routed else 1.0,
            kind=entry.get("kind", "parameter" if routed else "linear"),
        )


def _head(fam: Family, dims: _Dims) -> Matrix | None:
    entry = fam.get("head")
    if not entry:
        return None
    path = entry["at"]
    return Matrix(
        module=path.rpartition(".")[2],
        path=path,
        role="head",
        in_features=dims["hidden"],
        out_features=dims["vocab"],
        bias=bool(dims.evaluate(entry["bias"])),
    )
