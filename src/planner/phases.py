"""The phases of one optimizer step: what is alive at each one's highest moment, by term."""

from __future__ import annotations

from collections.abc import Mapping

from planner.inventory import trained_width
from planner.rank import LayerKind, Run
from planner.tape import CATEGORIES, BlockMemory, evaluate

INPUT_BYTES_PER_TOKEN = 32
"""Token ids, labels, positions and mask as int64."""


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
        width = run.recipe.adapter if setup.uses_adapters else run.recipe.weight
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
        return _highest([self._last_layer(memory), logits, *self._gathers(memory)])

    def _gathers(self, memory: BlockMemory) -> list[dict[str, float]]:
        """Moments at which the weights of the last layer, or of the model's end, have just arrived."""
        if not self.run.reduces_by_group:
            return []
        buffers = self.run.buffers
        at_layer, at_tail = {"workspace": buffers.layer_gather}, {"workspace": buffers.tail_gather}
        at_first = {"workspace": buffers.first_gather, "gradients": self.held_grads}
        return [
            self._plus(at_first, {"activations": float(self.stream)}),
            self._plus(self.stored, self._without_own(memory), at_layer),
            self._plus(self.stored, at_tail),
        ]

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
        at_layer = {"workspace": buffers.last_layer_backward - self._freed_copies()}
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
        return _highest([*candidates, *self._reductions()])

    def _reductions(self) -> list[dict[str, float]]:
        """Moments at which a group's whole gradients are about to become a rank's share."""
        run = self.run
        if not run.reduces_by_group:
            return []
        logits = run.recipe.compute * self.tokens * run.model.vocab_size if run.setup.loss == "full" else 0
        at_head = {"workspace": run.buffers.head_product, "logits": float(logits)}
        at_layer, ahead = (
            {"workspace": held, "activations": float(self.stream)}
            for held in (run.buffers.layer_reduce, run.buffers.prefetch)
        )
        at_embedding = {"workspace": run.buffers.embedding_reduce, "gradients": self._layers_grads()}
        candidates = [self._plus(self.stored, at_head), self._plus(at_embedding)]
        candidates.append(self._plus(self.stored, ahead, self._head_grads()))
        for block in self.blocks:
            own = self._without_own(block.memory)
            candidates.append(self._plus(self.stored, own, at_layer, self._head_grads()))
            candidates += [self._plus(moment, self._late_grads(block)) for moment in (at_layer, ahead)]
        return candidates

    def _without_own(self, memory: BlockMemory) -> dict[str, float]:
        """A peak of a layer that isn't recomputed counts what it saved itself; take it out of the stored."""
        if self.is_checkpointed:
            return {}
        sizes = zip(CATEGORIES, memory.saved, strict=True)
        return {name: -evaluate(size, self.tokens, self.seq_len) for name, size in sizes}

    def _only_first(self, block: LayerKind) -> dict[str, float]:
        """What is left of the stored when the first layer's backward begins."""
        if self.run.holds_inputs:
            return self._all_inputs()
        kept = self.is_checkpointed or block.memory.saves_input
        return {
            "activations": self.mask + self._escaped() + (self.stream if kept else 0.0),
            "workspace": self.run.buffers.first_layer_backward,
        }

    def _all_inputs(self) -> dict[str, float]:
        """All stored, and the gradients of the inputs of all layers but the first two, which the peak counts itself."""
        num_layers = sum(block.count for block in self.blocks)
        activations = self.stored["activations"] + max(0, num_layers - 2) * self.stream
        workspace = self.stored["workspace"] - self._freed_copies() + self.run.buffers.first_layer_backward
        return {"activations": activations, "workspace": workspace}

    def _shard_grads(self, peak: dict[str, float]) -> dict[str, float]:
        """Gradients made within a block: one at a time where each is used, or added to a held one, at once."""
        is_reused = self.run.setup.optimizer_in_backward or self.held_grads
        if not is_reused or self.run.reduces_by_group:
            return peak
        return {**peak, "gradients": min(peak["gradients"], self.run.inventory.largest_trained_bytes)}

    def _head_grads(self) -> dict[str, float]:
        """Gradients of head and final norm, made before the first layer's backward."""
        if self.held_grads or self.run.setup.optimizer_in_backward:
            return {}
        run = self.run
        is_late = run.reduces_by_group and run.model.tied_head
        if not run.recipe.trains_base or run.model.head is None or is_late:
            return {}
        ranks = 1 if run.strategy.reduces_root_last else run.gradient_ranks
        share = self._share(run.model.head.num_weights * run.recipe.weight)
        return {"gradients": share * run.gradient_ranks / ranks}

    def _share(self, whole_gradients: float) -> float:
        """What a rank keeps of gradients that a layer made."""
        run = self.run
        if not run.reduces_by_group:
            return whole_gradients / run.gradient_ranks
        made = run.recipe.adapter if run.setup.uses_adapters else run.recipe.weight
        return whole_gradients * trained_width(run.setup) / made / run.gradient_ranks

    def _late_grads(self, block: LayerKind) -> dict[str, float]:
        """All gradients but those that the first layer and the embedding are about to make."""
        if self.run.setup.optimizer_in_backward:
            return {}
        if self.held_grads:
            return {"gradients": self.held_grads}
        own = self._share(block.memory.weight_gradients[0])
        return {"gradients": max(0.0, self._layers_grads() - own)}

    def _layers_grads(self) -> float:
        """All gradients that a rank keeps before the embedding has made its own."""
        if self.held_grads:
            return self.held_grads
        if self.run.reduces_by_group:
            return self.all_grads - self._share(self._embedding_bytes())
        return self.all_grads - (0.0 if self.run.model.tied_head else self._embedding_bytes())

    def _embedding_bytes(self) -> float:
        run = self.run
        if not run.recipe.trains_base:
            return 0.0
        return run.model.token_embedding_params * run.recipe.weight

    def _embedding_backward(self) -> dict[str, float]:
        """The embedding's dense gradient beside all others; with a tied head it is added to the head's."""
        exchange = {"workspace": self.run.buffers.embedding_backward, "activations": float(self.stream)}
        second = self._embedding_bytes() if self.run.model.tied_head or self.held_grads else 0.0
        grads = (self.held_grads or self.all_grads or self._embedding_bytes()) + second
        if self.run.reduces_by_group:
            grads = self._layers_grads() + self._embedding_bytes()
        return self._plus({"gradients": grads}, exchange)

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
        cast = self._autocast_copies(with_head=setup.loss == "full")
        at_layer, at_loss = ({"workspace": cast + held} for held in (run.buffers.eval, run.buffers.eval_loss))
        held = {"activations": 2.0 * self.stream * tokens / self.tokens}
        head = run.head(tokens, evaluates=True).no_grad
        peaks = [self._plus(at_loss, head.at(tokens, self.seq_len))]
        if run.reduces_by_group:
            peaks.append(self._plus(held, {"workspace": run.buffers.eval_gather}))
        for block in self.blocks:
            peaks.append(self._plus(at_layer, held, block.memory.no_grad.at(tokens, self.seq_len)))
        return _highest(peaks)


def _highest(candidates: list[dict[str, float]]) -> dict[str, float]:
    """The candidate with the largest sum."""
    return max(candidates, key=lambda terms: sum(terms.values()))
