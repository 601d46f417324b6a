"""The shapes of the model that transformers really builds, in the form of a ModelSpec's: for tests only."""

import re
from collections import Counter
from dataclasses import dataclass

_AUTO_CLASSES = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForMaskedLM")
_IN_LAYERS = re.compile(r"(.*?\.)(\d+)\.(.+)")


@dataclass(frozen=True)
class RealShapes:
    num_params: int
    linears: Counter  # (path in the layer, in, out, bias) of each nn.Linear and Conv1D in the layers
    outside: Counter  # the same for those in no layer, by full name
    parameters: dict  # path in the layer of every parameter -> elements, for one layer of each kind
    layer_params: Counter  # elements of a layer, embeddings inside it left out -> number of such layers


def build_real(config, auto_class=None):
    """The real model on the meta device; encoder-decoders and encoders with their language-model heads."""
    import torch
    import transformers

    config = dict(config)
    real_config = transformers.AutoConfig.for_model(config.pop("model_type"), **config)
    for name in [auto_class] if auto_class else _ordered(real_config):
        auto = getattr(transformers, name)
        if type(real_config) in auto._model_mapping:
            with torch.device("meta"):
                return auto.from_config(real_config)
    raise LookupError(type(real_config).__name__)


def _ordered(config):
    if config.is_encoder_decoder:
        return ["AutoModelForSeq2SeqLM"]
    if config.model_type in ("bert", "roberta", "xlm-roberta"):
        return ["AutoModelForMaskedLM"]
    return _AUTO_CLASSES


def path_in_layer(name):
    """A module's name from its layer down; outside the layers its full name without a list's number."""
    inside = _IN_LAYERS.fullmatch(name)
    return inside[3] if inside else re.sub(r"\.\d+$", "", name)


def real_shapes(model):
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    linears, outside, embeddings = Counter(), Counter(), set()
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            embeddings.add(name)
        if not isinstance(module, nn.Linear | Conv1D):
            continue
        in_features, out_features = module.weight.shape[:: 1 if isinstance(module, Conv1D) else -1]
        entry = (path_in_layer(name), in_features, out_features, module.bias is not None)
        (linears if _IN_LAYERS.fullmatch(name) else outside)[entry] += 1
    parameters, sizes = {}, Counter()
    for name, parameter in model.named_parameters():
        inside = _IN_LAYERS.fullmatch(name)
        if inside and name.rpartition(".")[0] not in embeddings and inside[3] not in ("weight", "bias"):
            sizes[inside[1], inside[2]] += parameter.numel()
            parameters[inside[3]] = tuple(parameter.shape)
    return RealShapes(
        num_params=sum(p.numel() for p in model.parameters()),
        linears=linears,
        outside=outside,
        parameters=parameters,
        layer_params=Counter(sizes.values()),
    )


def spec_shapes(spec):
    linears, outside, layer_params, parameters = Counter(), Counter(), Counter(), {}
    for layer in spec.layers:
        layer_params[layer.num_params] += layer.count
        for m in layer.matrices:
            if m.kind == "parameter":
                parameters[m.path] = m
            else:
                linears[m.path, m.in_features, m.out_features, m.bias] += layer.count * m.copies
    for m in (*spec.outside, *([spec.head] if spec.head else [])):
        outside[m.path, m.in_features, m.out_features, m.bias] += m.copies
    return RealShapes(spec.num_params, linears, outside, parameters, layer_params)


def differences(real, spec):
    """What differs, as a list of lines; empty when the two are the same model."""
    lines = []
    if real.num_params != spec.num_params:
        lines.append(f"parameters: real {real.num_params:,}, ours {spec.num_params:,}")
    for name in ("linears", "outside", "layer_params"):
        one, other = getattr(real, name), getattr(spec, name)
        if one != other:
            lines.append(f"{name}: only real {dict(one - other)}, only ours {dict(other - one)}")
    for path, matrix in spec.parameters.items():
        lines += _parameter_differences(path, matrix, real.parameters)
    return lines


def _parameter_differences(path, matrix, real):
    weight = real.get(path, real.get(f"{path}.weight"))
    bias = real.get(f"{path}_bias", real.get(f"{path}.bias"))
    expected = {matrix.in_features, matrix.out_features} | ({matrix.copies} if matrix.copies > 1 else set())
    if weight is None or set(weight) != expected or (bias is not None) != matrix.bias:
        return [f"{path}: real {weight}, bias {bias}; ours {matrix}"]
    return []
