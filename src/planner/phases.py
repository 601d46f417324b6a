"""The phases of one optimizer step: what is alive at each one's highest moment, by term."""

from __future__ import annotations

from typing import Any

from planner.inventory import trained_width
from planner.layering import Group, Spot, by_category
from planner.rank import Run
from planner.shapes import Shape, Terms
from planner.sharding import Copy
from planner.sizes import ZERO, add

INDEX_BYTES = 8
"""Token ids, labels and positions are int64."""


class Step:
    """The phases of one optimizer step for one batch shape, or for many that differ in nothing but sizes."""

    def __init__(self, run: Run, shape: Shape) -> None:
        self.run, self.shape = run, shape
        setup, tokens = run.setup, shape.tokens
        self.is_checkpointed = setup.checkpointing == "full"
        stages = setup.num_gpus if run.strategy.splits_layers else 1
        self.layer_share = 1 / stages
        self.embedded = 1.0 * tokens * run.recipe.stream * run.model.hidden_size
        self.all_grads = 0.0 if setup.optimizer_in_backward else run.gradients_per_rank()
        self.held_grads = (
            run.accumulated_gradients() if self.all_grads and setup.grad_accum_steps > 1 else 0.0
        )
        self.base = run.static()
        self.layering = run.layering(shape)
        self.width = self.layering.output_width
        self.stream = 1.0 * tokens * self.width * run.model.hidden_size
        self.inputs = self._input_bytes(tokens) * setup.grad_accum_steps
        self.mask = run.masks(shape)
        self.stored = self._stored(self.layering.whole)

    def phases(self) -> dict[str, Terms]:
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

    def _input_bytes(self, tokens: Any) -> Any:
        """A micro-batch: ids and labels, and positions where finefit's own step gives them."""
        return INDEX_BYTES * (2 if self.run.setup.stack else 3) * tokens

    def _before_states(self) -> Terms:
        """Loading: everything that is there before the optimizer's first step has made its states."""
        return {
            "optimizer": self.run.copied_bytes - self.base["optimizer"],
            "workspace": -self.run.buffers.kept,
        }

    def _plus(self, *parts: Terms) -> Terms:
        total = dict(self.base)
        for part in parts:
            for name, value in part.items():
                total[name] += value
        return total

    def _stored(self, group: Group) -> Terms:
        """What those layers keep between their forward and their backward, beside what the whole step holds."""
        kept = {"activations": 0.0, "logits": 0.0, "workspace": 0.0, "gradients": self.held_grads}
        for name, value in by_category(group.saved, self.shape).items():
            kept[name] += value * self.layer_share
        kept["activations"] += self.shape.at(group.inputs) * self.layer_share + self._held_through()
        kept["activations"] += self.shape.at(group.handed_on) if self.is_checkpointed else 0.0
        return kept

    def _held_through(self) -> Any:
        """What lives from the forward until the last backward: tables, checkpoints' arguments, what escapes them."""
        held = self.inputs + self.run.rotary(self.shape)
        held += self.mask if self.is_checkpointed else 0.0
        return held + (self.embedded if self.run.keeps_embeddings else 0.0)

    def _escaped(self, group: Group) -> Terms:
        """What operations of those layers keep, behind a checkpoint's back too, until the whole backward is done."""
        return {"activations": self.layer_share * self.shape.at(group.kept)}

    def _cached(self, group: Group) -> Any:
        """Autocast's copies of trained matrices that those layers have made, kept until its context ends."""
        return self.layer_share * self.shape.at(group.cached)

    def _stored_copies(self) -> Terms:
        """Those that the layers' saved tensors don't count."""
        return {"workspace": self._cached(self.layering.whole) if self.is_checkpointed else 0.0}

    def _forward(self) -> Terms:
        """A layer at work, or the head making its logits."""
        exchange = {"workspace": self.run.buffers.loss}
        escaped = self._escaped(self.layering.whole)
        logits = self._plus(self.stored, escaped, self._stored_copies(), exchange)
        if self.run.setup.loss == "full":
            head = self.run.head(self.shape, self.width, ends_at_logits=True)
            own = self.shape.peak(head.forward)
            cached = {"activations": self.run.cached(self.shape, len(self.layering.order), evaluates=False)}
            logits = self._plus(self.stored, escaped, self._stored_copies(), exchange, cached, own)
        layers = (self._layer_forward(spot) for spot in self.layering.spots)
        return self.shape.highest([logits, *layers, *self._gathers()])

    def _gathers(self) -> list[Terms]:
        """Moments at which the weights of the first or last layer, or of the model's end, have just arrived."""
        buffers, last = self.run.buffers, self.layering.order[-1]
        at_first = {"workspace": buffers.first_gather, "gradients": self.held_grads}
        first = self._plus(at_first, {"activations": self.stream})
        if not self.run.reduces_by_group:
            return [first] if buffers.first_gather else []
        at_layer, at_tail = {"workspace": buffers.layer_gather}, {"workspace": buffers.tail_gather}
        return [
            first,
            self._plus(self.stored, self._without_own(last), at_layer),
            self._plus(self.stored, at_tail),
        ]

    def _without_own(self, number: int) -> Terms:
        """A peak of a layer that isn't recomputed counts what it saved itself; take it out of the stored."""
        if self.is_checkpointed:
            return {}
        saved = by_category(self.layering.memories[number].saved, self.shape)
        return {name: -value for name, value in saved.items()}

    def _layer_forward(self, spot: Spot) -> Terms:
        memory = self.layering.memories[spot.number]
        exchange = {"workspace": self.run.buffers.forward}
        escaped = self._escaped(spot.before)
        if self._is_recomputed(spot):
            copies = {"workspace": self._cached(spot.before) + self._returned(spot)}
            own = self.shape.peak(memory.no_grad)
            outside = self._held_outside(spot, self.shape) - self.shape.at(spot.own.handed_on)
            held = {"activations": outside + self._embedding_variables(self.shape)}
            return self._plus(self._stored(spot.until), escaped, copies, exchange, held, own)
        own = self.shape.peak(memory.forward)
        cached = {"activations": self.run.cached(self.shape, spot.before.num_layers, evaluates=False)}
        return self._plus(
            self._stored(spot.before), escaped, self._forward_variables(spot), exchange, cached, own
        )

    def _saves_input(self, spot: Spot) -> bool:
        return self.layering.memories[spot.number].saves_input

    def _held_outside(self, spot: Spot, shape: Shape, *, evaluates: bool = False) -> Any:
        """What an encoder-decoder's stacks hold during their forward, beside a layer's input and what is saved."""
        if spot.number in self.layering.plain or not self.layering.plain:
            return 0.0
        is_decoder = spot.before.num_plain > 1
        held = self.run.stack_variables(is_decoder, drops=not evaluates)
        if is_decoder and (evaluates or not self.layering.keeps_source):
            held = add(held, self.run.source(self.width))
        is_stored = self.is_checkpointed and not evaluates
        makes_it_itself = spot.own.handed_on != ZERO
        if not makes_it_itself and not is_stored:
            held = add(held, self.run.handed_on(is_decoder))
        return shape.at(held)

    def _left_by_decoder(self, spot: Spot) -> Any:
        """What the decoder's first layer has left once the later ones are done, and its gradient, which that layer counts."""
        if not self.layering.plain:
            return 0.0
        leaf = self.shape.at(self.run.leaf_bias())
        is_encoder = spot.before.num_plain < 2
        return 2 * leaf if is_encoder else leaf if spot.own.handed_on != ZERO else 0.0

    def _is_recomputed(self, spot: Spot) -> bool:
        return self.is_checkpointed and spot.number not in self.layering.plain

    def _forward_variables(self, spot: Spot) -> Terms:
        """The model's forward holds the embeddings' output, a layer its own input, and both the masks."""
        if self.layering.plain:
            mask = self.mask if spot.before.num_plain > 1 else 0.0
            own = 0.0 if spot.before.num_plain == 0 or self._saves_input(spot) else self.stream
            return {"activations": mask + own + self._held_outside(spot, self.shape)}
        streams = 1
        if spot.before.num_layers and not self.run.model.num_embedding_variables:
            streams += not self.layering.memories[self.layering.order[0]].saves_input
        mask = self.mask + self.run.idle_masks(self.shape)
        return {"activations": mask + streams * self.stream + self._embedding_variables(self.shape)}

    def _embedding_variables(self, shape: Shape) -> Any:
        """What the model's forward holds beside the first layer's input, which those are summed or normed to."""
        run = self.run
        return (
            1.0 * run.model.num_embedding_variables * shape.tokens * run.recipe.weight * run.model.hidden_size
        )

    def _returned(self, spot: Spot) -> Any:
        return self.run.returned(self.shape) if spot.before.num_layers else 0.0

    def _loss(self) -> Terms:
        head = self.shape.peak(self.run.head(self.shape, self.width).forward)
        exchange = {"workspace": self.run.buffers.loss}
        escaped = self._escaped(self.layering.whole)
        return self._plus(self.stored, escaped, self._stored_copies(), exchange, head)

    def _backward(self) -> Terms:
        """The largest of the loss' own backward, layers', and the embeddings'."""
        head = self.shape.peak(self.run.head(self.shape, self.width).backward)
        exchange, escaped = {"workspace": self.run.buffers.head_backward}, self._escaped(self.layering.whole)
        candidates = [self._plus(self.stored, escaped, exchange, head)]
        candidates += [self._layer_backward(spot) for spot in self.layering.spots]
        candidates += [self._copying(copy) for copy in self.run.buffers.copies if "layer" in copy.moment]
        if not self.layering.plain:
            candidates.append(self._embedding_backward())
        return self.shape.highest([*candidates, *self._reductions()])

    def _reductions(self) -> list[Terms]:
        """Moments at which a group's whole gradients are about to become a rank's share."""
        run = self.run
        if not run.reduces_by_group:
            return []
        vocab_size = run.model.vocab_size if run.setup.loss == "full" else 0
        logits = 1.0 * run.recipe.compute * self.shape.tokens * vocab_size
        at_head = {"workspace": run.buffers.head_product, "logits": logits}
        at_layer, ahead = (
            {"workspace": held, "activations": self.stream}
            for held in (run.buffers.layer_reduce, run.buffers.prefetch)
        )
        at_embedding = {"workspace": run.buffers.embedding_reduce, "gradients": self._layers_grads()}
        late = {"gradients": 0.0 if self.held_grads else self._head_grads()}
        candidates = [self._plus(self.stored, at_head), self._plus(at_embedding)]
        candidates.append(self._plus(self.stored, ahead, late))
        for spot in self.layering.spots:
            own = self._without_own(spot.number)
            candidates.append(self._plus(self.stored, own, at_layer, late))
            candidates += [self._plus(moment, self._first_grads(spot)) for moment in (at_layer, ahead)]
        return candidates

    def _first_grads(self, spot: Spot) -> Terms:
        """All gradients but those that the first layer and the embedding are about to make."""
        if self.held_grads:
            return {"gradients": self.held_grads}
        own = self._share(self.layering.memories[spot.number].weight_gradients[0])
        return {"gradients": max(0.0, self._layers_grads() - own)}

    def _layers_grads(self) -> float:
        """All gradients that a rank keeps before the embedding has made its own."""
        return self.held_grads or self.all_grads - self._share(self._embedding_bytes())

    def _share(self, whole_gradients: float) -> float:
        """What a rank keeps of gradients that a layer made."""
        run = self.run
        if run.strategy.reduces_last:
            return whole_gradients
        if not run.reduces_by_group:
            return whole_gradients / run.gradient_ranks
        made = run.recipe.adapter if run.setup.uses_adapters else run.recipe.weight
        return whole_gradients * trained_width(run.setup) / made / run.gradient_ranks

    def _layer_backward(self, spot: Spot) -> Terms:
        memory = self.layering.memories[spot.number]
        peaks = memory.recompute if self._is_recomputed(spot) else memory.backward
        buffers = self.run.buffers
        held = buffers.first_layer_backward if spot.after.num_layers else buffers.last_layer_backward
        exchange = {"workspace": held}
        own = {"activations": self.shape.at(spot.own.inputs) + self._left_by_decoder(spot)}
        if self.run.holds_inputs:
            own["activations"] += self._inputs_behind(spot)
        return self._plus(
            self._stored(spot.before),
            self._escaped(self.layering.whole),
            exchange,
            own,
            self._unmoved(self.shape.peak(peaks)),
            self._late_grads(spot),
        )

    def _copying(self, copy: Copy) -> Terms:
        """Within a layer's backward, counted as the last layer's: gradients are copied to be reduced."""
        spot = max(self.layering.spots, key=lambda s: s.before.num_layers)
        memory = self.layering.memories[spot.number]
        made = memory.weight_gradients[0] * copy.made
        snapshot = next(live for size, live in memory.made if size[0] > made * (1 - 1e-9))
        own = by_category(snapshot, self.shape)
        return self._plus(
            self._stored(spot.before),
            self._escaped(self.layering.whole),
            {"workspace": copy.held, "activations": self.shape.at(spot.own.inputs)},
            self._unmoved(own),
            self._late_grads(spot),
        )

    def _unmoved(self, peak: Terms) -> Terms:
        """A layer's peak without the gradients that have moved into the exchange's buffers: all but the newest."""
        if not self.run.moves_gradients:
            return peak
        return peak | {"gradients": self.shape.least(peak["gradients"], float(self.run.newest_gradient))}

    def _inputs_behind(self, spot: Spot) -> Any:
        """Inputs of the layers behind this one, and their gradients but for the next one's, which its peak counts."""
        num_behind = spot.after.num_layers
        return num_behind * self.stream + max(0, num_behind - 1) * self.stream

    def _late_grads(self, spot: Spot) -> Terms:
        """Gradients of head, final norm and the layers behind this one."""
        run = self.run
        if self.held_grads or run.setup.optimizer_in_backward:
            # A tied head's gradient waits for the embedding's, wherever the others go.
            return {"gradients": self._embedding_bytes() if run.model.tied_head else 0.0}
        if run.moves_gradients:
            return {"gradients": self.all_grads}
        after = self.layer_share * self.shape.at(spot.after.weight_gradients)
        return {"gradients": self._share(after) + self._head_grads()}

    def _head_grads(self) -> float:
        """What a rank keeps of the gradients of head and final norm."""
        run = self.run
        is_late = run.reduces_by_group and run.model.tied_head
        if not run.recipe.trains_base or run.model.head is None or is_late:
            return 0.0
        elements = run.model.head.num_weights + run.model.head.num_biases + run.model.final_params
        ranks = 1 if run.strategy.reduces_root_last else run.gradient_ranks
        return self._share(elements * run.recipe.weight) * run.gradient_ranks / ranks

    def _embedding_bytes(self) -> float:
        run = self.run
        if not run.recipe.trains_base:
            return 0.0
        return run.model.token_embedding_params * run.recipe.weight

    def _embedding_backward(self) -> Terms:
        """The embedding's dense gradient beside all others.

        With a tied head it is added to the head's, which is a view of a product: out of place.
        """
        second = self._embedding_bytes() * (2 if self.run.model.tied_head else 1 if self.held_grads else 0)
        made = self.run.backward_gradients() if self.all_grads else 0.0
        grads = self.held_grads or made or self._embedding_bytes()
        if self.run.setup.optimizer_in_backward:
            second += (self.run.recipe.step_factor or 0.0) * self._embedding_bytes()
        if self.run.reduces_by_group:
            grads, second = self._layers_grads(), self._embedding_bytes()
        exchange = {"workspace": self.run.buffers.embedding_backward}
        own = {"gradients": grads + second, "activations": self.stream + self._held_through()}
        return self._plus(own, exchange, self._escaped(self.layering.whole))

    def _optimizer(self) -> Terms:
        """The optimizer's step; nothing is left of it where the backward has stepped."""
        setup, inventory = self.run.setup, self.run.inventory
        share = setup.num_gpus if self.run.strategy.shards_optimizer else 1
        steps = setup.offload == "none" and not setup.optimizer_in_backward
        step = inventory.step_bytes / share if steps else 0.0
        own = {"gradients": self.all_grads, "activations": self.inputs}
        return self._plus(own, {"workspace": self.run.buffers.optimizer + step})

    def _eval(self) -> Terms:
        """The head, or a layer beside its input and the embeddings' output, which the model's forward holds."""
        setup, run = self.run.setup, self.run
        shape = self.shape if setup.eval_sequences is None else self.shape.with_rows(setup.eval_sequences)
        inputs, stream = self._input_bytes(shape.tokens), self.stream * shape.tokens / self.shape.tokens
        copies = {"workspace": self._cached(self.layering.whole) + run.buffers.eval_loss}
        head = shape.peak(run.head(shape, self.width, evaluates=True).no_grad)
        peaks = [self._plus(copies, {"activations": inputs}, head)]
        if run.buffers.eval_gather:
            peaks.append(self._plus({"activations": 2 * stream}, {"workspace": run.buffers.eval_gather}))
        mask = run.masks(shape) + run.idle_masks(shape)
        held = inputs + mask + run.rotary(shape)
        layering = run.layering(shape, evaluates=True)
        for spot in layering.spots:
            is_held = not self.layering.plain and not run.model.num_embedding_variables
            streams = 2 if spot.before.num_layers and is_held else 1
            outside = self._held_outside(spot, shape, evaluates=True) + self._embedding_variables(shape)
            outside += run.cached(shape, spot.before.num_layers, evaluates=True)
            own = {"activations": held + streams * stream + outside}
            returned = run.returned(shape) if spot.before.num_layers else 0.0
            copies = {"workspace": self._cached(spot.before) + run.buffers.eval + returned}
            peak = shape.peak(layering.memories[spot.number].no_grad)
            peaks.append(self._plus(own, copies, peak))
        return shape.highest(peaks)
