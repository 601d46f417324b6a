"""What of a setup and model doesn't depend on the batch, per rank: the layers' and the head's memory, what is always there."""

from __future__ import annotations

import functools
from collections.abc import Hashable
from dataclasses import replace
from typing import Any

from planner.blocks import layer_memory
from planner.exchange import exchanged, largest_layer_gradient
from planner.heads import LossBytes, head_memory, head_work
from planner.inventory import take_inventory
from planner.layering import Layering, lay
from planner.linears import Recipe
from planner.lowering import block_recipe, keeps_embeddings, loss_bytes
from planner.methods import find_method
from planner.own_kernels import FLASH_BLOCK
from planner.results import ALLOCATED_TERMS
from planner.setup import TrainSetup
from planner.shapes import Shape
from planner.sharding import STRATEGIES, Buffers
from planner.specs import LayerSpec, ModelSpec
from planner.stack import parse_stack
from planner.tape import FULL_WIDTH, BlockMemory, Size, per_token
from planner.two_stacks import handed_on, leaf_bias, stack_variables, two_stack_layering
from planner.units import DTYPE_BYTES
from planner.work import Passes

_layer_memory = functools.lru_cache(maxsize=4096)(layer_memory)


@functools.lru_cache(maxsize=8192)
def _layering(model: ModelSpec, recipe: Recipe, masked: tuple[bool, ...]) -> Layering:
    """Kinds of layers that differ only in number and window are built once, and the first layer by itself.

    A layer's output may be wider than its input: under autocast LayerNorm gives float32, which packed linears keep.
    """
    numbers: dict[tuple[int, bool, int], int] = {}
    memories: list[BlockMemory] = []
    order: list[int] = []
    for position, kind in enumerate(model.sequence):
        is_first = position == 0 and not (recipe.trains_base or recipe.has_first_grad)
        width = memories[order[-1]].output_width if order else recipe.stream
        asked = kind, is_first, width
        if asked not in numbers:
            alike = replace(model.layers[kind], count=1, window=None)
            own = replace(recipe, is_masked=masked[kind])
            memory = _layer_memory(alike, model.hidden_size, own, width=width, is_first=is_first)
            if memory not in memories:
                memories.append(memory)
            numbers[asked] = memories.index(memory)
        order.append(numbers[asked])
    return lay(memories, order, stores_inputs=recipe.checkpointed)


@functools.lru_cache(maxsize=1024)
def _up_to_logits(kind: LossBytes) -> LossBytes:
    return replace(kind, ends_at_logits=True)


@functools.lru_cache(maxsize=1024)
def _without_layers(recipe: Recipe) -> Recipe:
    """The model's end has neither adapters nor attention: setups that differ in those share it."""
    return replace(recipe, adapted=(), adapt=None, adapter=0, dropout=False, attention="sdpa", has_flash=True)


class Run:
    """What of a setup and model doesn't depend on the batch, per rank.

    `workspace_bytes`: what libraries take through the allocator. `added_tokens` make each row longer for the model,
    `prefix_tokens` each layer's keys and values.
    """

    def __init__(
        self, setup: TrainSetup, model: ModelSpec, *, on_gpu: bool, has_flash: bool, workspace_bytes: int
    ) -> None:
        """Raises SetupError for targets that match nothing, UnknownNameError for an unknown method."""
        self.setup, self.model = setup, model
        self.strategy = STRATEGIES[setup.sharding]
        self.inventory = take_inventory(setup, model)
        method, tokens = find_method(setup.method), setup.num_virtual_tokens
        self.added_tokens = tokens if method.lengthens else 0
        self.prefix_tokens = tokens if method.prefixes else 0
        self._stack = parse_stack(setup.stack)
        self.keeps_embeddings = keeps_embeddings(setup, model, self._stack)
        self.recipe = block_recipe(setup, model, self._stack, on_gpu=on_gpu, has_flash=has_flash)
        self._heads: dict[LossBytes, BlockMemory] = {}
        self._head_recipe = _without_layers(self.recipe)
        self._recipes: dict[tuple[bool, bool, float, float], Recipe] = {}
        self._ranks = setup.num_gpus
        self._workspace = workspace_bytes
        self.buffers = Buffers()
        self.newest_gradient = 0
        if setup.num_gpus > 1:
            groups = exchanged(setup, model, self.inventory, is_reentrant=self.recipe.reentrant)
            self.buffers = self.strategy.buffers(groups)
            self.newest_gradient = largest_layer_gradient(setup, model)

    def kind(self, tokens: int, seq_len: int) -> Hashable:
        """What is equal for two batch shapes whose memory differs in nothing but sizes: a planner.shapes.Shapes."""
        setup = self.setup
        masked = self.masked(seq_len)
        eval_tokens = tokens if setup.eval_sequences is None else setup.eval_sequences * seq_len
        chunks = (self._loss_bytes(tokens, False), self._loss_bytes(eval_tokens, True))
        return masked, tokens <= seq_len, chunks, self._reach(seq_len), self._held_rows(seq_len)

    def layering(self, shape: Shape, *, evaluates: bool = False) -> Layering:
        """The layers' memory in rows of `seq_len` tokens: beyond a sliding window torch's attention needs a mask."""
        recipe = self.recipe_for(*shape.one, evaluates=evaluates)
        build = two_stack_layering if self.model.architecture == "encoder-decoder" else _layering
        return build(self.model, recipe, self.masked(shape.one[1]))

    def masked(self, seq_len: int) -> tuple[bool, ...]:
        """For each kind of layer whether torch's attention is given a mask."""
        return tuple(self._is_masked(layer, seq_len) for layer in self.model.layers)

    def recipe_for(self, tokens: int, seq_len: int, *, evaluates: bool = False) -> Recipe:
        """The layers' recipe for a micro-batch of `tokens` in rows of `seq_len`."""
        is_other = evaluates and self._differs
        return self._recipe(is_other, tokens <= seq_len, self._reach(seq_len), self._held_rows(seq_len))

    def _reach(self, seq_len: int) -> float:
        """Keys and values of a row over its tokens."""
        return 1.0 + self.prefix_tokens / seq_len

    def _held_rows(self, seq_len: int) -> float:
        """Rows that flash's backward holds over a row's tokens, where each row is a document."""
        return 1.0 + FLASH_BLOCK / seq_len if self.recipe.spreads and self.recipe.on_gpu else 1.0

    def cached(self, shape: Shape, num_done: int, *, evaluates: bool) -> Any:
        """Bytes of keys and values that a cache with learned ones holds beside a layer's, until the model's forward is done.

        Of `num_done` layers it holds all, of the later ones the learned ones. In training, what the attention saves is counted
        there: all, unless it was given copies of grouped heads.
        """
        if not self.prefix_tokens:
            return 0.0
        reach, widths, last = self._reach(shape.one[1]), 0.0, len(self.model.sequence)
        for position, kind in enumerate(self.model.sequence):
            layer = self.model.layers[kind]
            copied = self.setup.attention == "sdpa" and 1 < layer.num_kv_heads < layer.num_heads
            own = reach if evaluates or copied else 0.0
            share = own if position < num_done else reach - 1 if num_done < position < last else 0.0
            widths += share * layer.num_kv_heads * (layer.head_dim + layer.value_head_dim)
        return 1.0 * self.recipe.stream * widths * shape.tokens

    def _recipe(self, evaluates: bool, is_single: bool, reach: float, held_rows: float) -> Recipe:
        asked = evaluates, is_single, reach, held_rows
        if asked not in self._recipes:
            joins = self.setup.joins_rows
            is_packed = joins or (self.setup.packing and not self.setup.stack)
            is_single = is_single or joins
            self._recipes[asked] = replace(
                self.recipe,
                training=not evaluates,
                is_single=is_single,
                flattens=is_single and is_packed,
                reach=reach,
                held_rows=held_rows,
            )
        return self._recipes[asked]

    @property
    def _differs(self) -> bool:
        """Whether training differs from evaluation by a dropout, or by what 8-bit linears keep."""
        in_model = any(layer.dropout or layer.attention_dropout for layer in self.model.layers)
        return in_model or self.recipe.dropout or self.recipe.quantised_bits == 8

    def _is_masked(self, layer: LayerSpec, seq_len: int) -> bool:
        if self.setup.attention != "sdpa":
            return False
        is_beyond = layer.window is not None and seq_len >= layer.window
        if self.setup.joins_rows:
            return is_beyond
        is_offset = self.setup.packing or self.setup.padding_free or self.prefix_tokens > 0
        return is_beyond or layer.always_masked or is_offset

    def masks(self, shape: Shape) -> Any:
        """Bytes of the masks that layers share: additive for eager attention, else boolean, which rows have in common
        unless documents make each row's its own.

        One for each window and one for full attention; where none is needed, torch's attention gets none.
        """
        windows = {layer.window for layer in self.model.layers}
        if self.setup.attention == "eager":
            return self._mask_bytes(len(windows), shape)
        masked = {layer.window for layer in self.model.layers if self._is_masked(layer, shape.one[1])}
        return self._mask_bytes(len(masked), shape)

    def idle_masks(self, shape: Shape) -> Any:
        """Bytes of the mask for a window that no layer has: the model's forward alone holds it."""
        is_made = self.model.makes_both_masks and self.setup.attention != "flash" and not self.recipe.spreads
        is_idle = is_made and len({layer.window for layer in self.model.layers}) == 1
        return self._mask_bytes(int(is_idle), shape)

    def _mask_bytes(self, num_masks: int, shape: Shape) -> Any:
        if self.setup.attention == "eager":
            return 1.0 * self.recipe.mask * num_masks * shape.tokens * shape.seq_len
        rows = shape.tokens if self.setup.packing else shape.seq_len
        return 1.0 * num_masks * rows * (shape.seq_len + self.prefix_tokens)

    def returned(self, shape: Shape) -> Any:
        """Bytes of the weights that the layer before has returned."""
        if self.setup.attention != "eager" or not self.model.returns_weights:
            return 0.0
        recipe = self.recipe
        follows_norm = recipe.quantised_bits or self.model.layers[0].scores == "falcon"
        narrow = recipe.compute if recipe.autocast else max(recipe.stream, recipe.norm)
        width = FULL_WIDTH if recipe.autocast and follows_norm else narrow
        return 1.0 * width * self.model.layers[0].num_heads * shape.tokens * shape.seq_len

    def rotary(self, shape: Shape) -> Any:
        """Bytes of the rotary tables: for each position of each row, where rows bring their positions (PEFT drops them
        where tokens are added).
        """
        positions = shape.seq_len if self.setup.stack or self.added_tokens else shape.tokens
        return 1.0 * self.recipe.stream * self.model.num_rotary * positions

    def stack_variables(self, is_decoder: bool, *, drops: bool) -> Size:
        """What the forward of one of two stacks holds of its embeddings."""
        return stack_variables(self.model, self.recipe, is_decoder=is_decoder, drops=drops)

    def handed_on(self, is_decoder: bool) -> Size:
        """What that forward hands from layer to layer beside the stream."""
        return handed_on(self.model, self.recipe, is_decoder=is_decoder)

    def leaf_bias(self) -> Size:
        """What the decoder leaves for as long as the graph lives."""
        return leaf_bias(self.model, self.recipe)

    def source(self, width: int) -> Size:
        """The encoder's output."""
        return per_token(width * self.model.hidden_size)

    def head(
        self, shape: Shape, width: int, *, ends_at_logits: bool = False, evaluates: bool = False
    ) -> BlockMemory:
        """Final norm, head and loss behind layers that give `width` bytes per element.

        How many tokens a chunked loss takes at once depends on the batch.
        """
        kind = self._loss_bytes(shape.one[0], evaluates)
        kind = _up_to_logits(kind) if ends_at_logits else kind
        if kind not in self._heads:
            norm = self.model.layers[-1].norm
            self._heads[kind] = head_memory(self.model, norm, self._head_recipe, kind, width)
        return self._heads[kind]

    def _loss_bytes(self, tokens: int, evaluates: bool) -> LossBytes:
        return loss_bytes(self.setup, self.model, self._stack, tokens, evaluates)

    def head_work(self, tokens: int, width: int) -> Passes:
        """What the model's end computes and moves behind layers that give `width` bytes per element."""
        kind = self._loss_bytes(tokens, False)
        return head_work(self.model, self.model.layers[-1].norm, self._head_recipe, kind, width)

    def static(self) -> dict[str, float]:
        """What every phase of a running step holds, per rank: weights, adapters, optimizer states, workspace."""
        inv, how, ranks = self.inventory, self.strategy, self._ranks
        is_split = how.shards_weights or how.splits_layers
        whole = 0 if how.splits_layers else inv.constants_bytes
        base = (inv.weights_bytes - whole) / (ranks if is_split else 1) + whole
        base += self.unsplit_bytes
        adapters = inv.adapters_bytes / (ranks if is_split else 1)
        states = (inv.states_bytes + inv.master_bytes) / (
            ranks if how.shards_optimizer or how.splits_layers else 1
        )
        if self.setup.master_weights == "none":
            states += self.copied_bytes
        if self.setup.offload == "params+optimizer":
            base = adapters = 0.0
        if self.setup.offload != "none":
            states = 0.0
        terms = dict.fromkeys(ALLOCATED_TERMS, 0.0)
        terms |= {"weights": base, "adapters": adapters, "optimizer": states}
        if self.keeps_gradients:
            terms["gradients"] = inv.gradients_bytes / ranks
        terms["workspace"] = self._workspace + self.buffers.always + self.buffers.kept
        return terms

    @property
    def unsplit_bytes(self) -> int:
        """What the blocks of a card's allocator keep beyond a rank's weights; shards are of other sizes and count none."""
        is_whole = not (self.strategy.shards_weights or self.strategy.splits_layers)
        return self.inventory.unsplit_bytes if self.recipe.on_gpu and is_whole else 0

    @property
    def copied_bytes(self) -> float:
        """The share that the optimizer steps on, where it is a copy that is made with the wrapper."""
        if self._ranks == 1 or not self.strategy.copies_share or self.setup.offload != "none":
            return 0.0
        return (self.inventory.master_bytes or self.inventory.gradients_bytes) / self._ranks

    @property
    def keeps_gradients(self) -> bool:
        """Whether a rank's share of the gradients is there in every phase."""
        return self.strategy.keeps_gradients and self._ranks > 1 and self.setup.offload == "none"

    @property
    def reduces_by_group(self) -> bool:
        """Whether gradients are whole until their group's backward is done, and split then."""
        return self.strategy.reduces_by_group and self._ranks > 1

    def gradients_per_rank(self) -> float:
        """All gradients that one rank holds after a backward."""
        if self.keeps_gradients:
            return 0.0
        share = self._ranks if self.strategy.splits_layers else self.gradient_ranks
        return self.inventory.gradients_bytes / share

    def backward_gradients(self) -> float:
        """All gradients that one rank holds at the end of a backward, before the last exchange."""
        whole = self._ranks > 1 and self.strategy.reduces_last
        return self.inventory.gradients_bytes if whole else self.gradients_per_rank()

    @property
    def moves_gradients(self) -> bool:
        """Whether each gradient moves into the exchange's buffers as soon as it is made."""
        return self.strategy.moves_gradients and self._ranks > 1

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
