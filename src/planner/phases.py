"""The phases of one optimizer step: what is alive at each one's highest moment, by term."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace

from planner.blocks import Recipe, layer_memory
from planner.heads import LossBytes, head_memory
from planner.inventory import take_inventory
from planner.layers import target_matrices
from planner.lowering import block_recipe, keeps_embeddings, loss_bytes
from planner.results import ALLOCATED_TERMS
from planner.setup import TrainSetup
from planner.sharding import STRATEGIES, Buffers, Exchanged
from planner.specs import LayerSpec, ModelSpec
from planner.stack import parse_stack
from planner.tape import CATEGORIES, BlockMemory, evaluate
from planner.units import DTYPE_BYTES

INPUT_BYTES_PER_TOKEN = 32
"""Token ids, labels, positions and mask as int64."""


@dataclass(frozen=True, slots=True)
class _LayerKind:
    """A kind of layer: how often it occurs, and its memory."""

    count: int
    memory: BlockMemory


_layer_memory = functools.lru_cache(maxsize=4096)(layer_memory)


@functools.lru_cache(maxsize=8192)
def _layer_kinds(model: ModelSpec, recipe: Recipe, masked: tuple[bool, ...]) -> tuple[_LayerKind, ...]:
    """Kinds of layers that differ only in number and window are built once."""
    kinds = []
    for layer, is_masked in zip(model.layers, masked, strict=True):
        alike = replace(layer, count=1, window=None)
        memory = _layer_memory(alike, model.hidden_size, replace(recipe, is_masked=is_masked))
        kinds.append(_LayerKind(layer.count, memory))
    return tuple(kinds)


@functools.lru_cache(maxsize=1024)
def _up_to_logits(kind: LossBytes) -> LossBytes:
    return replace(kind, ends_at_logits=True)


@functools.lru_cache(maxsize=1024)
def _without_layers(recipe: Recipe) -> Recipe:
    """The model's end has neither adapters nor attention: setups that differ in those share it."""
    return replace(recipe, adapted=(), adapter=0, dropout=False, attention="sdpa", has_flash=True)


class Run:
    """What of a setup and model doesn't depend on the batch, per rank.

    `workspace_bytes`: what libraries take through the allocator.
    """

    def __init__(
        self, setup: TrainSetup, model: ModelSpec, *, on_gpu: bool, has_flash: bool, workspace_bytes: int
    ) -> None:
        """Raises SetupError for targets that match nothing, UnknownNameError for an unknown method."""
        self.setup, self.model = setup, model
        self.strategy = STRATEGIES[setup.sharding]
        self.inventory = take_inventory(setup, model)
        self._stack = parse_stack(setup.stack)
        self.keeps_embeddings = keeps_embeddings(setup, model, self._stack)
        self.recipe = block_recipe(setup, model, self._stack, on_gpu=on_gpu, has_flash=has_flash)
        self._heads: dict[tuple[int, bool, bool], BlockMemory] = {}
        self._head_recipe = _without_layers(self.recipe)
        self._ranks = setup.num_gpus
        self._workspace = workspace_bytes
        self.buffers = self._exchange()

    def blocks(self, seq_len: int) -> tuple[_LayerKind, ...]:
        """The layers' memory in rows of `seq_len` tokens: beyond a sliding window torch's attention needs a mask."""
        masked = tuple(self._is_masked(layer, seq_len) for layer in self.model.layers)
        return _layer_kinds(self.model, self.recipe, masked)

    def _is_masked(self, layer: LayerSpec, seq_len: int) -> bool:
        if self.setup.attention != "sdpa":
            return False
        is_beyond = layer.window is not None and seq_len >= layer.window
        return is_beyond or self.setup.packing or self.setup.padding_free

    def num_cast_params(self) -> int:
        """Adapters' elements that autocast casts: all but those that peft folds into experts without it."""
        cast = (t for t in target_matrices(self.model, self.setup.targets) if t[1].kind != "parameter")
        return sum(
            layer.count * matrix.copies * self.setup.rank * (matrix.in_features + matrix.out_features)
            for layer, matrix in cast
        )

    def mask_width(self, seq_len: int) -> int:
        """Bytes per pair of positions of the mask that the layers share: additive for eager, else boolean."""
        if self.setup.attention == "eager":
            return self.recipe.compute
        return int(any(self._is_masked(layer, seq_len) for layer in self.model.layers))

    def head(self, tokens: int, *, ends_at_logits: bool = False, evaluates: bool = False) -> BlockMemory:
        """Final norm, head and loss; how many tokens a chunked loss takes at once depends on the batch."""
        asked = (tokens, ends_at_logits, evaluates)
        if asked not in self._heads:
            kind = loss_bytes(self.setup, self.model, self._stack, tokens, evaluates)
            kind = _up_to_logits(kind) if ends_at_logits else kind
            norm = self.model.layers[-1].norm
            self._heads[asked] = head_memory(self.model, norm, self._head_recipe, kind)
        return self._heads[asked]

    def static(self) -> dict[str, float]:
        """What every phase of a running step holds, per rank: weights, adapters, optimizer states, workspace."""
        inv, how, ranks = self.inventory, self.strategy, self._ranks
        is_split = how.shards_weights or how.splits_layers
        whole = 0 if how.splits_layers else inv.constants_bytes
        base = (inv.weights_bytes - whole) / (ranks if is_split else 1) + whole
        adapters = inv.adapters_bytes / (ranks if is_split else 1)
        states = (inv.states_bytes + inv.master_bytes) / (
            ranks if how.shards_optimizer or how.splits_layers else 1
        )
        if self.setup.offload == "params+optimizer":
            base = adapters = 0.0
        if self.setup.offload != "none":
            states = 0.0
        terms = dict.fromkeys(ALLOCATED_TERMS, 0.0)
        terms |= {"weights": base, "adapters": adapters, "optimizer": states}
        terms["workspace"] = self._workspace + self.buffers.always
        return terms

    def _exchange(self) -> Buffers:
        inv = self.inventory
        if self._ranks == 1:
            return Buffers()
        return self.strategy.buffers(
            Exchanged(
                ranks=self._ranks,
                layer_bytes=inv.largest_layer_bytes,
                root_bytes=inv.root_bytes,
                trained_root_bytes=inv.root_bytes if self.recipe.trains_base else 0,
                gradients_bytes=inv.gradients_bytes,
                trained_params=inv.trained_params,
                weight_width=DTYPE_BYTES[self.setup.weights_dtype],
                is_reentrant=self.recipe.reentrant and self.setup.checkpointing == "full",
            )
        )

    def gradients_per_rank(self) -> float:
        """All gradients that one rank holds after a backward."""
        share = self._ranks if self.strategy.splits_layers else self.gradient_ranks
        return self.inventory.gradients_bytes / share

    def accumulated_gradients(self) -> float:
        """All gradients that one rank holds between micro-batches; whole where ranks exchange after the last one only."""
        setup, inv = self.setup, self.inventory
        if self._ranks == 1 or not self.strategy.accumulates_whole:
            return self.gradients_per_rank()
        if not self.strategy.casts_gathered or setup.autocast is None:
            return float(inv.gradients_bytes)
        return float(inv.trained_params * DTYPE_BYTES[setup.autocast])

    @property
    def holds_inputs(self) -> bool:
        """Whether every checkpoint's input and its gradient outlive the layer's backward."""
        is_frozen = not self.recipe.trains_base and self.setup.checkpointing == "full"
        return self._ranks > 1 and self.strategy.holds_frozen_inputs and is_frozen and self.recipe.reentrant

    @property
    def gradient_ranks(self) -> int:
        """Ranks among which one gradient is split."""
        return self._ranks if self.strategy.shards_gradients else 1


class Step:
    """The phases of one optimizer step for one batch shape."""

    def __init__(self, run: Run, tokens: int, seq_len: int) -> None:
        self.run, self.tokens, self.seq_len = run, tokens, seq_len
        setup = run.setup
        self.is_checkpointed = setup.checkpointing == "full"
        stages = setup.num_gpus if run.strategy.splits_layers else 1
        self.layer_share = 1 / stages
        self.stream = tokens * run.recipe.stream * run.model.hidden_size
        self.embedded = tokens * run.recipe.weight * run.model.hidden_size
        self.all_grads = 0.0 if setup.optimizer_in_backward else run.gradients_per_rank()
        self.held_grads = (
            run.accumulated_gradients() if self.all_grads and setup.grad_accum_steps > 1 else 0.0
        )
        self.base = run.static()
        self.base["activations"] += INPUT_BYTES_PER_TOKEN * tokens
        self.blocks = run.blocks(seq_len)
        mask_width = run.mask_width(seq_len) if self.is_checkpointed else 0
        self.mask = float(mask_width * tokens * seq_len)
        self.stored = self._stored()

    def phases(self) -> dict[str, dict[str, float]]:
        """Bytes by term for each phase."""
        return {
            "load": self._plus(self._before_states()),
            "forward": self._forward(),
            "loss": self._loss(),
            "backward": self._backward(),
            "optimizer": self._optimizer(),
            "eval": self._eval(),
            "save": self._plus({}),
            "resume": self._plus({"gradients": self.all_grads}),
        }

    def _before_states(self) -> dict[str, float]:
        """Loading: everything that is there before the optimizer's first step has made its states."""
        return {"optimizer": -self.base["optimizer"]}

    def _plus(self, *parts: Mapping[str, float]) -> dict[str, float]:
        total = dict(self.base)
        for part in parts:
            for name, value in part.items():
                total[name] += value
        return total

    def _stored(self) -> dict[str, float]:
        """What all layers keep between their forward and their backward; a checkpoint keeps the mask too."""
        kept = {"activations": self.mask, "logits": 0.0, "workspace": 0.0, "gradients": self.held_grads}
        for block in self.blocks:
            count = block.count * self.layer_share
            if self.is_checkpointed or block.memory.saves_input:
                kept["activations"] += count * self.stream
            if not self.is_checkpointed:
                for name, size in zip(CATEGORIES, block.memory.saved, strict=True):
                    kept[name] += count * evaluate(size, self.tokens, self.seq_len)
        kept["activations"] += self.embedded if self.run.keeps_embeddings else 0.0
        if self.is_checkpointed or self.blocks[0].memory.saves_input:
            kept["activations"] += self.embedded - self.stream
        kept["activations"] += self._escaped() if self.is_checkpointed else 0.0
        kept["workspace"] += self._stored_copies()
        return kept

    def _escaped(self) -> float:
        """What operations of all layers keep behind a checkpoint's back until the whole backward is done."""
        sizes = ((b.count, size) for b in self.blocks for size in b.memory.kept)
        return self.layer_share * sum(n * evaluate(s, self.tokens, self.seq_len) for n, s in sizes)

    def _autocast_copies(self, *, with_head: bool = False) -> float:
        """Autocast keeps a 16-bit copy of each trained float32 matrix until its context ends; the layers' copies."""
        setup, run = self.run.setup, self.run
        width = DTYPE_BYTES[setup.adapter_dtype if setup.uses_adapters else setup.weights_dtype]
        if setup.autocast is None or width != 4 or (run.strategy.casts_gathered and setup.num_gpus > 1):
            return 0.0
        if setup.uses_adapters:
            return 2.0 * run.num_cast_params()
        head = run.model.head.num_weights if with_head and run.model.head else 0
        return 2.0 * (head + sum(x.count * m.num_weights for x in run.model.layers for m in x.matrices))

    def _stored_copies(self) -> float:
        """Autocast's copies while the forward runs, where the blocks don't count them as saved themselves."""
        is_counted = not self.is_checkpointed and not self.run.setup.uses_adapters
        return 0.0 if is_counted else self._autocast_copies()

    def _freed_copies(self) -> float:
        """Those of them that no backward needs: checkpointed layers make them again."""
        return self._stored_copies() if self.is_checkpointed else 0.0

    def _forward(self) -> dict[str, float]:
        """The last layer at work, or the head making its logits."""
        memory = self.blocks[-1].memory
        exchange = {"workspace": self.run.buffers.loss}
        logits = self._plus(self.stored, exchange)
        if self.run.setup.loss == "full":
            head = self.run.head(self.tokens, ends_at_logits=True)
            logits = self._plus(self.stored, exchange, head.forward.at(self.tokens, self.seq_len))
        return _highest([self._last_layer(memory), logits])

    def _last_layer(self, memory: BlockMemory) -> dict[str, float]:
        exchange = {"workspace": self.run.buffers.forward}
        if self.is_checkpointed:
            return self._plus(self.stored, exchange, memory.no_grad.at(self.tokens, self.seq_len))
        own = memory.forward.at(self.tokens, self.seq_len)
        return self._plus(self.stored, exchange, self._without_own(memory), own)

    def _loss(self) -> dict[str, float]:
        head = self.run.head(self.tokens).forward.at(self.tokens, self.seq_len)
        return self._plus(self.stored, {"workspace": self.run.buffers.loss}, head)

    def _backward(self) -> dict[str, float]:
        """The largest of: the loss' own backward, and each kind of layer as the last and as the first one.

        In between, stored activations shrink and gradients grow linearly, so the maximum is at an end.
        """
        buffers = self.run.buffers
        at_head = {"workspace": buffers.head_backward - self._freed_copies()}
        at_layer = {"workspace": buffers.layer_backward - self._freed_copies()}
        head = self._shard_grads(self.run.head(self.tokens).backward.at(self.tokens, self.seq_len))
        candidates = [self._plus(self.stored, at_head, head)]
        for block in self.blocks:
            peaks = block.memory.recompute if self.is_checkpointed else block.memory.backward
            peak = self._shard_grads(peaks.at(self.tokens, self.seq_len))
            candidates.append(
                self._plus(self.stored, at_layer, self._without_own(block.memory), peak, self._head_grads())
            )
            candidates.append(self._plus(self._only_first(block), peak, self._late_grads(block)))
        candidates.append(self._embedding_backward())
        return _highest(candidates)

    def _without_own(self, memory: BlockMemory) -> dict[str, float]:
        """A peak of a layer that isn't recomputed counts what it saved itself; take it out of the stored."""
        if self.is_checkpointed:
            return {}
        sizes = zip(CATEGORIES, memory.saved, strict=True)
        return {name: -evaluate(size, self.tokens, self.seq_len) for name, size in sizes}

    def _only_first(self, block: _LayerKind) -> dict[str, float]:
        """What is left of the stored when the first layer's backward begins."""
        if self.run.holds_inputs:
            return self._all_inputs()
        kept = self.is_checkpointed or block.memory.saves_input
        return {
            "activations": self.mask + self._escaped() + (self.stream if kept else 0.0),
            "workspace": self.run.buffers.layer_backward,
        }

    def _all_inputs(self) -> dict[str, float]:
        """All stored, and the gradients of the inputs of all layers but the first two, which the peak counts itself."""
        num_layers = sum(block.count for block in self.blocks)
        activations = self.stored["activations"] + max(0, num_layers - 2) * self.stream
        workspace = self.stored["workspace"] - self._freed_copies() + self.run.buffers.layer_backward
        return {"activations": activations, "workspace": workspace}

    def _shard_grads(self, peak: dict[str, float]) -> dict[str, float]:
        """Gradients made within a block: one at a time where each is used, or added to a held one, at once."""
        if not (self.run.setup.optimizer_in_backward or self.held_grads):
            return peak
        return {**peak, "gradients": min(peak["gradients"], self.run.inventory.largest_trained_bytes)}

    def _head_grads(self) -> dict[str, float]:
        """Gradients of head and final norm, made before the first layer's backward."""
        if self.held_grads or self.run.setup.optimizer_in_backward:
            return {}
        run = self.run
        if not run.recipe.trains_base or run.model.head is None:
            return {}
        ranks = 1 if run.strategy.reduces_root_last else run.gradient_ranks
        return {"gradients": run.model.head.num_weights * run.recipe.weight / ranks}

    def _late_grads(self, block: _LayerKind) -> dict[str, float]:
        """All gradients but those that the first layer and the embedding are about to make."""
        if self.run.setup.optimizer_in_backward:
            return {}
        if self.held_grads:
            return {"gradients": self.held_grads}
        embedding = 0 if self.run.model.tied_head else self._embedding_bytes()
        own = block.memory.weight_gradients[0] / self.run.gradient_ranks
        return {"gradients": max(0.0, self.all_grads - own - embedding)}

    def _embedding_bytes(self) -> float:
        run = self.run
        if not run.recipe.trains_base:
            return 0.0
        return run.model.token_embedding_params * run.recipe.weight

    def _embedding_backward(self) -> dict[str, float]:
        """The embedding's dense gradient beside all others; with a tied head it is added to the head's."""
        second = self._embedding_bytes() if self.run.model.tied_head or self.held_grads else 0.0
        grads = self.held_grads or self.all_grads or self._embedding_bytes()
        exchange = {"workspace": self.run.buffers.embedding_backward}
        return self._plus({"gradients": grads + second, "activations": float(self.stream)}, exchange)

    def _optimizer(self) -> dict[str, float]:
        inventory = self.run.inventory
        share = self.run.setup.num_gpus if self.run.strategy.shards_optimizer else 1
        step = 0.0 if self.run.setup.offload != "none" else inventory.step_bytes / share
        grads = self.all_grads or inventory.largest_trained_bytes
        exchange = {"workspace": self.run.buffers.optimizer}
        own = {"gradients": grads, "optimizer": step, "activations": -self.base["activations"]}
        return self._plus(own, exchange)

    def _eval(self) -> dict[str, float]:
        """The head, or a layer beside its input and the embeddings' output, which the model's forward holds."""
        setup, run = self.run.setup, self.run
        tokens = self.tokens if setup.eval_batch_size is None else setup.eval_batch_size * self.seq_len
        copies = {"workspace": self._autocast_copies(with_head=setup.loss == "full") + run.buffers.eval}
        held = {"activations": 2.0 * self.stream * tokens / self.tokens}
        head = run.head(tokens, evaluates=True).no_grad
        peaks = [self._plus(copies, head.at(tokens, self.seq_len))]
        for block in self.blocks:
            peaks.append(self._plus(copies, held, block.memory.no_grad.at(tokens, self.seq_len)))
        return _highest(peaks)


def _highest(candidates: list[dict[str, float]]) -> dict[str, float]:
    """The candidate with the largest sum."""
    return max(candidates, key=lambda terms: sum(terms.values()))
