"""The modules of a model in the order in which a step calls them, with their parameters: what ZeRO's bookkeeping sees.

Modules without parameters count too, since each call gathers ahead: the model's and a layer's own, those that hold
projections, activations, an adapter's dropout. Norms and biases are small enough for ZeRO to keep them whole.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate

from planner.layers import adapter_rank, target_matrices
from planner.specs import LayerSpec, Matrix, ModelSpec
from planner.zero_replay import Call, Gradient, Passes


@dataclass(frozen=True, kw_only=True, slots=True)
class CallRules:
    """What of a setup decides the calls. Widths in bytes per element; `quant_bits` 16 where nothing is packed;
    `targets` None without adapters; parameters of at most `persistent` elements are never split."""

    is_checkpointed: bool
    trains_base: bool
    targets: str | tuple[str, ...] | None
    rank: int
    weight_width: int
    adapter_width: int
    persistent: int


@dataclass(slots=True)
class _Module:
    """A module with its own parameters, and what it calls in order."""

    parameters: tuple[int, ...] = ()
    elements: int = 0
    gradients: tuple[int, ...] = ()
    children: list[_Module] = field(default_factory=list)

    def forward(self, moment: str) -> Iterator[Call]:
        yield Call(moment, self.parameters, self.elements)
        for child in self.children:
            yield from child.forward(moment)

    def backward(self, moment: str) -> Iterator[Call]:
        yield Call(moment, self.parameters, self.elements)
        for child in reversed(self.children):
            yield from child.backward(moment)

    def made(self) -> Iterator[int]:
        """Elements of the gradients in the order in which the backward makes them."""
        for child in reversed(self.children):
            yield from child.made()
        yield from reversed(self.gradients)


@functools.lru_cache(maxsize=256)
def module_calls(model: ModelSpec, rules: CallRules) -> Passes:
    """The calls of a step of `model`. Raises SetupError for targets that match nothing."""
    return _Builder(model, rules).passes()


class _Builder:
    def __init__(self, model: ModelSpec, rules: CallRules) -> None:
        self.model, self.rules = model, rules
        self.sizes: list[tuple[int, int]] = []
        targets = rules.targets
        adapted = () if targets is None else target_matrices(model, targets)
        self.adapted = {matrix.path for _, matrix in adapted}

    def passes(self) -> Passes:
        model = self.model
        embedding = self._leaf([model.token_embedding_params])
        layers = [self._layer(model.layers[kind]) for kind in model.sequence]
        norm = self._leaf([model.final_params])
        head = self._head(embedding)
        return Passes(
            sizes=tuple(self.sizes),
            training=(
                *self._forward("first_gather", "forward", "loss", embedding, layers, [norm, *head]),
                *self._backward(embedding, layers, [norm, *head]),
            ),
            evaluation=tuple(
                self._forward("eval_gather", "eval", "eval_loss", embedding, layers, [norm, *head])
            ),
            gradients=tuple(self._gradients(embedding, layers, [norm, *head])),
        )

    def _head(self, embedding: _Module) -> list[_Module]:
        if self.model.head is None:
            return []
        if self.model.tied_head:
            return [_Module(embedding.parameters, embedding.elements)]
        return [self._leaf([self.model.head.num_weights])]

    def _parameter(self, elements: int, width: float) -> tuple[int, ...]:
        if elements <= self.rules.persistent:
            return ()
        self.sizes.append((elements, round(elements * width)))
        return (len(self.sizes) - 1,)

    def _leaf(self, tensors: list[int], *, adapts: bool = False) -> _Module:
        rules = self.rules
        width = rules.adapter_width if adapts else rules.weight_width
        numbers = [n for elements in tensors for n in self._parameter(elements, width)]
        trains = adapts or rules.trains_base
        return _Module(tuple(numbers), sum(tensors), tuple(tensors) if trains else ())

    def _layer(self, layer: LayerSpec) -> _Module:
        holders: dict[str, _Module] = {}
        norms = self._leaf([layer.norm_params])
        out = _Module(children=[norms])
        for matrix in layer.matrices:
            holder = matrix.path.rpartition(".")[0]
            if holder not in holders:
                holders[holder] = _Module()
                out.children.append(holders[holder])
            for _ in range(1 if matrix.kind == "parameter" else matrix.copies):
                holders[holder].children.append(self._matrix(matrix))
        return out

    def _matrix(self, matrix: Matrix) -> _Module:
        elements = matrix.num_weights // (1 if matrix.kind == "parameter" else matrix.copies)
        base = self._leaf([elements])
        if matrix.path not in self.adapted:
            return base
        rank = adapter_rank(matrix, self.rules.rank)
        copies = matrix.copies if matrix.kind == "parameter" else 1
        down, up = (
            self._leaf([copies * rank * size], adapts=True)
            for size in (matrix.in_features, matrix.out_features)
        )
        return _Module(children=[base, _Module(), down, up])

    def _forward(
        self,
        at_first: str,
        moment: str,
        at_end: str,
        embedding: _Module,
        layers: list[_Module],
        tail: list[_Module],
    ) -> Iterator[Call]:
        # The loss, the model with its head, the model without.
        yield from (Call(at_first),) * 3
        yield from embedding.forward(at_first)
        yield Call(moment)
        for layer in layers:
            yield from layer.forward(moment)
        *norms, head = tail
        for module in norms:
            yield from module.forward(moment)
        yield from head.forward(at_end)

    def _backward(self, embedding: _Module, layers: list[_Module], tail: list[_Module]) -> Iterator[Call]:
        yield from (Call("head_backward"),) * 2
        for module in reversed(tail):
            yield from module.backward("head_backward")
        for number, layer in reversed(list(enumerate(layers))):
            moment = _layer_moment(number, len(layers))
            if self.rules.is_checkpointed:
                yield Call(moment)
                yield from layer.forward(moment)
            yield from layer.backward(moment)
        if self.rules.trains_base:
            yield from embedding.backward("embedding_backward")

    def _gradients(
        self, embedding: _Module, layers: list[_Module], tail: list[_Module]
    ) -> Iterator[Gradient]:
        for module in reversed(tail):
            yield from (Gradient("head_backward", n) for n in module.made())
        for number, layer in reversed(list(enumerate(layers))):
            sizes = list(layer.made())
            for elements, made in zip(sizes, accumulate(sizes), strict=True):
                yield Gradient(_layer_moment(number, len(layers)), elements, made / sum(sizes))
        yield from (Gradient("embedding_backward", n) for n in embedding.made())


def _layer_moment(number: int, num_layers: int) -> str:
    return "last_layer_backward" if number == num_layers - 1 else "first_layer_backward"
