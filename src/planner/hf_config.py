"""Any Hugging Face config.json -> ModelSpec, without transformers and without the weights.

What config.json leaves unsaid (module names, biases, norms, how experts are stored, which layers slide) is
in profiles/models/families.toml; the code here only reads, checks and multiplies. That the result is the
model which transformers builds is tested module by module against its real classes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import repeat
from typing import Any, NamedTuple

from planner.dimensions import Dimensions
from planner.errors import ConfigError, NotModelledError
from planner.families import Family, block, family, merge
from planner.specs import LayerSpec, Matrix, ModelSpec

MAX_LAYERS = 10_000
TEXT_PART_NOTE = "text part only: the model's other parts (vision, audio) are not counted"


def model_spec(
    config: Mapping[str, Any],
    *,
    name: str | None = None,
    hub_id: str | None = None,
    where: str = "config.json",
    experts_as_linears: bool = False,
    objective: str | None = None,
) -> ModelSpec:
    """The shapes of the model that `config` describes.

    `experts_as_linears`: the model as transformers 4 builds it: experts as separate nn.Linear and not as one
    3-D parameter, and subclasses of nn.Linear quantised too. `objective` "seq-cls" gives it a classifier in
    place of the language-model head; any other the head that the family's language model has. `where` names
    the file in errors. Raises ConfigError for a missing or absurd field and NotModelledError for a model_type
    that has no family or that is out of scope.
    """
    text, model_type, fam = _family_of(config, where)
    if objective == "seq-cls":
        fam = merge(fam, fam["seq_cls"])
    if experts_as_linears:
        fam = merge(fam, {"linear_kind": "linear"})
    dims = Dimensions(text, fam, where)
    dims.check_modelled()
    hidden = dims["hidden"]
    outside = tuple(_matrices(fam["outside"], dims))
    layers, order = _layers(fam, dims, experts_as_linears)
    return ModelSpec(
        name=name or _text(config, "_name_or_path") or model_type,
        hub_id=hub_id,
        family=model_type,
        architecture=fam["architecture"],
        hidden_size=hidden,
        vocab_size=dims["vocab"],
        max_positions=dims["positions"] or None,
        layers=layers,
        order=order,
        num_rotary=dims.evaluate(fam["rotary"]),
        buffer_bytes=dims.evaluate(fam["buffers"]),
        norms_embeddings=fam["norms_embeddings"],
        num_embedding_variables=fam["num_embedding_variables"],
        scales_logits=fam["scales_logits"],
        returns_weights=fam["returns_weights"],
        makes_both_masks=fam["makes_both_masks"],
        final_norm=fam["final_norm"],
        scales_output=bool(dims.evaluate(fam["scales_output_if"])),
        scales_embeddings=fam["scales_embeddings"],
        adds_positions=fam["adds_positions"],
        shifts_logits=fam["shifts_logits"] and objective != "seq-cls",
        embedding_params=dims.evaluate(fam["embeddings"]),
        token_embedding_params=dims.evaluate(fam["token_embeddings"]),
        head=_head(fam["head"], dims),
        tied_head=bool(dims["tied"]),
        final_params=dims.evaluate(fam["final"]) + sum(m.num_weights + m.num_biases for m in outside),
        outside=outside,
        logit_softcap=bool(_given(fam, text, "final_logit_softcapping")),
        remote_code=fam.get("remote_code", False),
        note=TEXT_PART_NOTE if text is not config else None,
        config=config,
    )


def _family_of(config: Mapping[str, Any], where: str) -> tuple[Mapping[str, Any], str, Family]:
    """The part of `config` that describes the text model, its model_type and its family."""
    model_type = _model_type(config, where)
    fam = family(model_type)
    if "text" in fam:
        text = config.get("text_config")
        if not isinstance(text, Mapping):
            raise ConfigError(f"{where}: a {model_type} config needs its text_config")
        inherited = {"tie_word_embeddings": config["tie_word_embeddings"]} if _has_tie(config, text) else {}
        text = {"model_type": fam["text"], **inherited, **text}
        return text, *_family_of(text, f"{where}: text_config")[1:]
    for key, other in fam.get("when", {}).items():
        if key in config:
            return config, other, family(other)
    return config, model_type, fam


def _has_tie(config: Mapping[str, Any], text: Mapping[str, Any]) -> bool:
    return "tie_word_embeddings" in config and "tie_word_embeddings" not in text


def _model_type(config: Mapping[str, Any], where: str) -> str:
    if not isinstance(config, Mapping):
        raise ConfigError(f"{where}: not a JSON object")
    model_type = config.get("model_type")
    if isinstance(model_type, str) and model_type:
        return model_type
    if "_class_name" in config or "_diffusers_version" in config:
        raise NotModelledError(f"{where}: diffusion models are out of scope")
    raise ConfigError(f"{where}: field 'model_type' is missing or not a text")


def _text(config: Mapping[str, Any], *keys: str) -> str | None:
    for key in keys:
        value = config.get(key)
        if isinstance(value, str) and value:
            return value
    return None


class _Kind(NamedTuple):
    """What decides a layer's shape: its mixer (full, sliding, linear), dense or moe, and whether it is late."""

    mixer: str
    feed: str
    is_late: bool


_MIXERS = {
    "full_attention": "full",
    "attention": "full",
    "sliding_attention": "sliding",
    "chunked_attention": "sliding",
    "linear_attention": "linear",
    "mamba": "linear",
}


def _layers(
    fam: Family, dims: Dimensions, experts_as_linears: bool
) -> tuple[tuple[LayerSpec, ...], tuple[int, ...]]:
    """The kinds of layers, and which of them each layer is."""
    kinds: list[LayerSpec] = []
    order: list[int] = []
    for side in fam.get("stacks", ("encoder" if fam["architecture"] == "encoder" else "decoder",)):
        stack = {**fam, **fam.get(side, {})}
        count = dims.require(stack["stack_layers"])
        if count > MAX_LAYERS:
            raise dims.error(f"{count} layers are more than {MAX_LAYERS}")
        sequence = _sequence(stack, dims, count)
        numbers = {kind: len(kinds) + i for i, kind in enumerate(dict.fromkeys(sequence))}
        times = Counter(sequence)
        kinds += [_layer(stack, dims, kind, times[kind], side, experts_as_linears) for kind in numbers]
        order += [numbers[kind] for kind in sequence]
    return tuple(kinds), tuple(order)


def _sequence(fam: Family, dims: Dimensions, count: int) -> list[_Kind]:
    """The kind of each layer."""
    late_from = dims.evaluate(fam["late_from"]) if fam["late_from"] != "layers" else count
    has_experts = "moe" in fam["blocks"] and dims["experts"] > 0
    if fam["other"] == "full" and not has_experts and late_from >= count:
        return [_Kind("full", "dense", False)] * count
    feeds = _feeds(fam, dims, count) if has_experts else repeat("dense", count)
    return [
        _Kind(mixer, feed, i >= late_from)
        for i, (mixer, feed) in enumerate(zip(_mixers(fam, dims, count), feeds, strict=True))
    ]


def _mixers(fam: Family, dims: Dimensions, count: int) -> Iterable[str]:
    other = fam["other"]
    if other == "full" or (other == "sliding" and dims["window"] == 0):
        return repeat("full", count)
    for key in fam["layer_types_keys"]:
        if dims.config.get(key) is not None:
            return _listed_mixers(key, dims, count)
    below, above, every = dims["full_below"], dims["full_above"], dims["full_every"]
    return [
        "full" if i < below or i >= above or (every and (i + 1) % every == 0) else other for i in range(count)
    ]


def _listed_mixers(key: str, dims: Dimensions, count: int) -> list[str]:
    listed = dims.config[key]
    if not isinstance(listed, list) or len(listed) != count:
        raise dims.error(f"field {key!r} must list the kind of each of {count} layers")
    unknown = [kind for kind in listed if not isinstance(kind, str) or kind not in _MIXERS]
    if unknown:
        raise NotModelledError(f"{dims.where}: layers of kind {unknown[0]!r:.40} are not modelled")
    return [_MIXERS[kind] for kind in listed]


def _feeds(fam: Family, dims: Dimensions, count: int) -> list[str]:
    """Dense or moe, layer by layer."""
    chosen = _listed_layers(fam.get("moe_list_key"), dims)
    if chosen:
        return ["moe" if i in chosen else "dense" for i in range(count)]
    dense = _listed_layers(fam.get("dense_list_key"), dims)
    below, every = dims["dense_below"], dims["moe_every"]
    return [
        "moe" if i >= below and (i + 1) % every == 0 and i not in dense else "dense" for i in range(count)
    ]


def _listed_layers(key: str | None, dims: Dimensions) -> list[int]:
    listed = dims.config.get(key) if key else None
    if listed is None:
        return []
    if not isinstance(listed, list) or not all(isinstance(i, int) for i in listed):
        raise dims.error(f"field {key!r} must be a list of layer numbers")
    return listed


def _layer(
    fam: Family, dims: Dimensions, kind: _Kind, count: int, side: str, experts_as_linears: bool
) -> LayerSpec:
    mixing = _blocks(fam, kind, kind.mixer if kind.mixer in fam["blocks"] else "full")
    has_linears = experts_as_linears and kind.feed == "moe" and "moe_linears" in fam["blocks"]
    feeding = _blocks(fam, kind, "moe_linears" if has_linears else kind.feed)
    if kind.feed == "moe" and not 1 <= dims["top_k"] <= dims["experts"]:
        raise dims.error(f"{dims.field('top_k')} = {dims['top_k']} of {dims['experts']} experts")
    own = {**fam, **mixing[0]}
    heads, kv_heads = (dims.require(own.get(key, key)) for key in ("heads", "kv_heads"))
    if kind.mixer != "linear" and heads % kv_heads:
        raise dims.error(f"{dims.field('kv_heads')} = {kv_heads} doesn't divide {heads} attention heads")
    matrices = tuple(m for part in (*mixing, *feeding) for m in _matrices(part["matrices"], dims))
    vectors = [part["vectors"] for part in (*mixing, *feeding) if "vectors" in part]
    return LayerSpec(
        count=count,
        matrices=matrices,
        norm_params=sum(dims.evaluate(part) for part in (fam["norms"], *vectors)),
        mixer="linear" if kind.mixer == "linear" else "softmax",
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=dims.require(own.get("head_dim", "head_dim")),
        value_head_dim=dims.require(own.get("v_head_dim", "v_head_dim")),
        window=(dims["window"] or None) if kind.mixer == "sliding" else None,
        causal=side == "decoder",
        qk_norm=fam["qk_norm"] if kind.mixer != "linear" and dims.evaluate(fam["qk_norm_if"]) else "none",
        scores="capped" if _given(fam, dims.config, "attn_logit_softcapping") else fam["scores"],
        rotary=_rotary_kind(fam, dims, kind),
        dropout=any(_given(fam, dims.config, key) for key in fam["dropout_keys"]),
        attention_dropout=any(_given(fam, dims.config, key) for key in fam["attention_dropout_keys"]),
        inner_dropout=any(_given(fam, dims.config, key) for key in fam["inner_dropout_keys"]),
        position_bias=fam["position_bias"],
        hands_over_groups=fam["hands_over_groups"],
        always_masked=fam["always_masked"],
        scales_updates=fam["scales_updates"],
        holds_attention=fam["holds_attention"],
        norms_ahead=fam["norms_ahead"],
        norm=fam["norm"],
        num_norms=dims.evaluate(fam["num_norms"]),
        wiring="parallel" if dims.evaluate(fam["parallel_if"]) else fam["wiring"],
        mlp="gated" if any("gate" in m.role.split("_") for m in matrices) else "plain",
        activation=_activation(fam, dims),
        num_experts=dims["experts"] if kind.feed == "moe" else 0,
        experts_per_token=dims["top_k"] if kind.feed == "moe" else 0,
        routing=fam["routing"],
        side=side,
    )


def _rotary_kind(fam: Family, dims: Dimensions, kind: _Kind) -> str:
    is_full = kind.mixer == "full" and dims["window"] > 0
    named: str = fam["full_rotary_kind"] if is_full and "full_rotary_kind" in fam else fam["rotary_kind"]
    return named


def _given(fam: Family, config: Mapping[str, Any], key: str) -> Any:
    """The config's value, or what transformers takes where it is silent."""
    return config.get(key, fam["defaults"].get(key))


def _activation(fam: Family, dims: Dimensions) -> str:
    name = _text(dims.config, *fam["activation_keys"]) or str(fam["activation"])
    return _ACTIVATIONS.get(name, name.removeprefix("gated-"))


_ACTIVATIONS = {"gated-gelu": "gelu_new"}
"""What T5's config calls an activation, where it isn't what transformers takes (models/t5/configuration_t5.py)."""


def _blocks(fam: Family, kind: _Kind, part: str) -> list[Mapping[str, Any]]:
    blocks = fam["blocks"]
    late = f"late_{part}"
    return [block(name) for name in blocks[late if kind.is_late and late in blocks else part]]


def _matrices(entries: Iterable[Mapping[str, Any]], dims: Dimensions) -> Iterator[Matrix]:
    for entry in entries:
        if "only" in entry and not dims.evaluate(entry["only"]):
            continue
        routed = entry.get("routed", False)
        path = entry["at"]
        rows, columns = entry["shape"]
        yield Matrix(
            module=path.rpartition(".")[2],
            path=path,
            role=entry["role"],
            in_features=dims.require(rows),
            out_features=dims.require(columns),
            bias="bias" in entry and bool(dims.evaluate(entry["bias"])),
            copies=dims["experts"] if routed else dims.require(entry.get("copies", 1)),
            token_share=dims["top_k"] / dims["experts"] if routed else 1.0,
            wide=entry.get("wide", False),
            kind=entry.get("kind", "parameter" if routed else dims.family["linear_kind"]),
        )


def _head(entry: Mapping[str, Any], dims: Dimensions) -> Matrix:
    path = entry["at"]
    return Matrix(
        module=path.rpartition(".")[2],
        path=path,
        role="head",
        in_features=dims[entry.get("in", "hidden")],
        out_features=dims[entry.get("out", "vocab")],
        bias=bool(dims.evaluate(entry["bias"])),
    )
