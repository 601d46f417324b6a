"""Memory of a training run per GPU: phases and terms, from what is kept and what each phase adds.

`MemoryModel(setup, model)` does everything that doesn't depend on the batch once; `at(batch, length)` is a
few multiplications. What a block saves comes from planner.blocks, what is always there from
planner.inventory, how ranks share it from planner.sharding.

Left out, and known: integer inputs (32 bytes per token are counted), dropout masks, buffers of NCCL inside
the context, the allocator's exact behaviour (see FRAGMENTATION_SHARE).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from planner.blocks import LossBytes, Recipe, head_memory, layer_memory
from planner.inventory import take_inventory, unquantised_width
from planner.layers import target_matrices
from planner.methods import find_method
from planner.results import ALLOCATED_TERMS, PHASES, Memory
from planner.setup import TrainSetup
from planner.sharding import STRATEGIES
from planner.specs import ModelSpec
from planner.stack import Stack, parse_stack
from planner.tape import CATEGORIES, BlockMemory, evaluate
from planner.units import DTYPE_BYTES, MIB

CUBLAS_WORKSPACE_BYTES = 8_519_680
"""cuBLAS' default workspace `:4096:2:16:8` (pytorch aten/src/ATen/cuda/CublasHandlePool.cpp), through the
caching allocator; the forward's and autograd's thread have a handle each. Measured: the steady memory of
two published runs exceeds the exact sum of their tensors by 2 x 8,519,680 bytes."""
CUBLAS_WORKSPACE_HOPPER_BYTES = 32 * MIB
"""The same file, for compute capability 9.x, 10.x and 12.x."""
CUBLAS_HANDLES = 2
CONTEXT_BYTES = 426 * MIB
"""CUDA context and loaded kernels: 426 MiB measured on an RTX 6000 Ada with torch 2.10+cu130 (unsloth-zoo
pull 1053); 287 MB lazy and 667 MB eager loading in pytorch pull 86509. `finefit verify` measures it."""
CPU_CONTEXT_BYTES = 410 * MIB
"""Resident set of Python 3.11 with torch 2.13 (CPU build), transformers 5.23 and peft 0.21 imported and a first
step of a tiny model run: 410 MiB; `finefit bench` reports this machine's."""
NCCL_BYTES = 544_000_000
"""One communicator after an all-reduce, 2 ranks on A100 with NVLink (NVIDIA/nccl#964); 688 MB with more."""
NCCL_MANY_RANKS_BYTES = 688_000_000
FRAGMENTATION_SHARE = 0.18
"""Reserved minus allocated, as a share of what a step adds to the steady memory: freed blocks of one phase
that the next can't reuse, because a large block is only split, never moved (CUDACachingAllocator.cpp).
Replaying the traces of three published steps by the allocator's rules gave 16, 19 and 20 %."""
CPU_RETAINED_SHARE = 0.4
"""The same on the CPU, for the resident set: blocks below mmap's threshold, which glibc raises to 32 MiB, stay with
the process when they are freed (mallopt(3), M_MMAP_THRESHOLD). 40 % on a LoRA step of 135 M parameters; with the
threshold pinned at 1 MiB most of it goes."""
INPUT_BYTES_PER_TOKEN = 32
"""Token ids, labels, positions and mask as int64."""
SAFETENSORS_COPIES_KEPT = 2
"""Checkpoints kept on disk."""


@dataclass(frozen=True, slots=True)
class _Block:
    """A kind of layer: how often, its memory, and the gradients of one such layer."""

    count: int
    memory: BlockMemory


class MemoryModel:
    """One setup and model; answers any batch and length."""

    def __init__(
        self,
        setup: TrainSetup,
        model: ModelSpec,
        *,
        on_gpu: bool = True,
        capability: tuple[int, int] | None = None,
    ) -> None:
        """Raises SetupError for targets that match nothing, UnknownNameError for an unknown method."""
        self.setup, self.model, self.on_gpu = setup, model, on_gpu
        self.strategy = STRATEGIES[setup.sharding]
        self.inventory = take_inventory(setup, model)
        self._stack = parse_stack(setup.stack)
        self.recipe = _recipe(setup, model, self._stack, on_gpu)
        self.blocks = [_Block(x.count, layer_memory(x, model.hidden_size, self.recipe)) for x in model.layers]
        self._heads: dict[LossBytes, BlockMemory] = {}
        self._ranks = setup.num_gpus if setup.num_gpus > 1 else 1
        handles = CUBLAS_HANDLES if on_gpu else 0
        is_hopper = capability is not None and capability[0] in (9, 10, 12)
        self._workspace = handles * (CUBLAS_WORKSPACE_HOPPER_BYTES if is_hopper else CUBLAS_WORKSPACE_BYTES)

    def at(self, micro_batch_size: int, seq_len: int) -> Memory:
        """Phases and terms for micro-batches of `micro_batch_size` rows of `seq_len` tokens."""
        step = _Step(self, micro_batch_size * seq_len, seq_len)
        phases = step.phases()
        totals = {name: round(sum(terms.values())) for name, terms in phases.items()}
        peak_phase = max(PHASES, key=lambda name: totals[name])
        terms = {name: round(value) for name, value in phases[peak_phase].items()}
        steady = sum(phases["save"].values())
        kept_share = FRAGMENTATION_SHARE if self.on_gpu else CPU_RETAINED_SHARE
        terms["fragmentation"] = round(kept_share * (totals[peak_phase] - steady))
        terms["context"] = self._context_bytes() if self.on_gpu else CPU_CONTEXT_BYTES
        return Memory(
            phases=totals,
            terms=terms,
            peak_phase=peak_phase,
            host_bytes=self._host_bytes(),
            disk_bytes=self._disk_bytes(),
        )

    def head(self, tokens: int, *, ends_at_logits: bool = False, evaluates: bool = False) -> BlockMemory:
        """Final norm, head and loss; how many tokens a chunked loss takes at once depends on the batch."""
        kind = _loss_bytes(self.setup, self.model, self._stack, tokens, evaluates)
        if ends_at_logits:
            kind = replace(kind, ends_at_logits=True)
        if kind not in self._heads:
            self._heads[kind] = head_memory(self.model, self.model.layers[-1].norm, self.recipe, kind)
        return self._heads[kind]

    def _context_bytes(self) -> int:
        if not self.strategy.uses_nccl or self._ranks == 1:
            return CONTEXT_BYTES
        return CONTEXT_BYTES + (NCCL_BYTES if self._ranks == 2 else NCCL_MANY_RANKS_BYTES)

    def _host_bytes(self) -> int:
        """Loading needs one copy of the weights per rank; offloaded and paged states stay."""
        inv = self.inventory
        load = inv.weights_bytes if self.setup.quant is None else self.model.num_params * 2
        states = inv.host_states_bytes
        if self.setup.offload != "none":
            states += inv.states_bytes + inv.master_bytes + inv.gradients_bytes
        if self.setup.offload == "params+optimizer":
            states += inv.weights_bytes
        return round(load + states)

    def _disk_bytes(self) -> int:
        """Checkpoints (trained weights and optimizer states) and the final save."""
        inv = self.inventory
        trained = inv.gradients_bytes
        checkpoint = trained + inv.states_bytes + inv.host_states_bytes + inv.master_bytes
        return round(SAFETENSORS_COPIES_KEPT * checkpoint + trained)

    def static(self) -> dict[str, float]:
        """What every phase of a running step holds, per rank: weights, adapters, optimizer states, workspace."""
        inv, how, ranks = self.inventory, self.strategy, self._ranks
        base = inv.weights_bytes / (ranks if how.shards_weights or how.splits_layers else 1)
        adapters = inv.adapters_bytes / (ranks if how.shards_weights or how.splits_layers else 1)
        states = (inv.states_bytes + inv.master_bytes) / (
            ranks if how.shards_optimizer or how.splits_layers else 1
        )
        if self.setup.offload == "params+optimizer":
            base = adapters = 0.0
        if self.setup.offload != "none":
            states = 0.0
        terms = dict.fromkeys(ALLOCATED_TERMS, 0.0)
        terms |= {"weights": base, "adapters": adapters, "optimizer": states}
        terms["workspace"] = self._workspace
        return terms

    def communication_bytes(self) -> float:
        """Gathered weights and buckets that exist through forward and backward, not in the optimizer's step."""
        inv, how = self.inventory, self.strategy
        if self._ranks == 1:
            return 0.0
        gathered = how.gathered_groups * inv.largest_layer_bytes
        gathered += inv.root_bytes if how.gathered_groups else 0
        bucket = min(how.bucket_elements, inv.trained_params) * DTYPE_BYTES[self.setup.weights_dtype]
        return gathered + bucket + how.gradient_copies * inv.gradients_bytes

    def gradients_per_rank(self) -> float:
        """All gradients that one rank holds after a backward."""
        how = self.strategy
        share = self._ranks if how.shards_gradients or how.splits_layers else 1
        return self.inventory.gradients_bytes / share


class _Step:
    """The phases of one optimizer step for one batch shape."""

    def __init__(self, owner: MemoryModel, tokens: int, seq_len: int) -> None:
        self.owner, self.tokens, self.seq_len = owner, tokens, seq_len
        setup = owner.setup
        self.is_checkpointed = setup.checkpointing == "full"
        stages = setup.num_gpus if owner.strategy.splits_layers else 1
        self.layer_share = 1 / stages
        self.stream = tokens * owner.recipe.stream * owner.model.hidden_size
        self.all_grads = 0.0 if setup.optimizer_in_backward else owner.gradients_per_rank()
        self.held_grads = self.all_grads if setup.grad_accum_steps > 1 else 0.0
        self.base = owner.static()
        self.base["activations"] += INPUT_BYTES_PER_TOKEN * tokens
        self.stored = self._stored()

    def phases(self) -> dict[str, dict[str, float]]:
        """Bytes by term for each phase."""
        return {
            "load": self._plus(self.owner_static_only()),
            "forward": self._forward(),
            "loss": self._loss(),
            "backward": self._backward(),
            "optimizer": self._optimizer(),
            "eval": self._eval(),
            "save": self._plus({}),
            "resume": self._plus({"gradients": self.all_grads}),
        }

    def owner_static_only(self) -> dict[str, float]:
        """Loading: everything that is there before the optimizer's first step has made its states."""
        return {"optimizer": -self.base["optimizer"]}

    def _plus(self, *parts: Mapping[str, float]) -> dict[str, float]:
        total = dict(self.base)
        for part in parts:
            for name, value in part.items():
                total[name] += value
        return total

    def _stored(self) -> dict[str, float]:
        """What all layers keep between their forward and their backward."""
        kept = {"activations": 0.0, "logits": 0.0, "workspace": 0.0, "gradients": self.held_grads}
        for block in self.owner.blocks:
            count = block.count * self.layer_share
            if self.is_checkpointed or block.memory.saves_input:
                kept["activations"] += count * self.stream
            if not self.is_checkpointed:
                for name, size in zip(CATEGORIES, block.memory.saved, strict=True):
                    kept[name] += count * evaluate(size, self.tokens, self.seq_len)
        kept["activations"] += self._escaped() if self.is_checkpointed else 0.0
        kept["workspace"] += self._stored_copies() + self.owner.communication_bytes()
        return kept

    def _escaped(self) -> float:
        """What operations of all layers keep behind a checkpoint's back until the whole backward is done."""
        sizes = ((b.count, size) for b in self.owner.blocks for size in b.memory.kept)
        return self.layer_share * sum(n * evaluate(s, self.tokens, self.seq_len) for n, s in sizes)

    def _autocast_copies(self, *, with_head: bool = False) -> float:
        """Autocast keeps a 16-bit copy of each trained float32 matrix until its context ends; the layers' copies."""
        setup, owner = self.owner.setup, self.owner
        width = DTYPE_BYTES[setup.adapter_dtype if setup.uses_adapters else setup.weights_dtype]
        if setup.autocast is None or width != 4:
            return 0.0
        if setup.uses_adapters:
            return 2.0 * owner.inventory.trained_params
        head = owner.model.head.num_weights if with_head and owner.model.head else 0
        return 2.0 * (head + sum(x.count * m.num_weights for x in owner.model.layers for m in x.matrices))

    def _stored_copies(self) -> float:
        """Autocast's copies while the forward runs, where the blocks don't count them as saved themselves."""
        is_counted = not self.is_checkpointed and not self.owner.setup.uses_adapters
        return 0.0 if is_counted else self._autocast_copies()

    def _freed_copies(self) -> float:
        """Those of them that no backward needs: checkpointed layers make them again."""
        return self._stored_copies() if self.is_checkpointed else 0.0

    def _forward(self) -> dict[str, float]:
        """The last layer at work, or the head making its logits."""
        memory = self.owner.blocks[-1].memory
        logits = self._plus(self.stored)
        if self.owner.setup.loss == "full":
            head = self.owner.head(self.tokens, ends_at_logits=True)
            logits = self._plus(self.stored, head.forward.at(self.tokens, self.seq_len))
        return max(self._last_layer(memory), logits, key=lambda terms: sum(terms.values()))

    def _last_layer(self, memory: BlockMemory) -> dict[str, float]:
        if self.is_checkpointed:
            return self._plus(self.stored, memory.no_grad.at(self.tokens, self.seq_len))
        saved = {
            n: -evaluate(s, self.tokens, self.seq_len) for n, s in zip(CATEGORIES, memory.saved, strict=True)
        }
        return self._plus(self.stored, saved, memory.forward.at(self.tokens, self.seq_len))

    def _loss(self) -> dict[str, float]:
        return self._plus(self.stored, self.owner.head(self.tokens).forward.at(self.tokens, self.seq_len))

    def _backward(self) -> dict[str, float]:
        """The largest of: the loss' own backward, and each kind of layer as the last and as the first one.

        In between, stored activations shrink and gradients grow linearly, so the maximum is at an end.
        """
        copies = {"workspace": -self._freed_copies()}
        head = self._shard_grads(self.owner.head(self.tokens).backward.at(self.tokens, self.seq_len))
        candidates = [self._plus(self.stored, copies, head)]
        for block in self.owner.blocks:
            peaks = block.memory.recompute if self.is_checkpointed else block.memory.backward
            peak = self._shard_grads(peaks.at(self.tokens, self.seq_len))
            candidates.append(
                self._plus(self.stored, copies, self._without_own(block), peak, self._head_grads())
            )
            candidates.append(self._plus(self._only_first(block), peak, self._late_grads(block)))
        candidates.append(self._embedding_backward())
        return max(candidates, key=lambda terms: sum(terms.values()))

    def _without_own(self, block: _Block) -> dict[str, float]:
        """A peak of a layer that isn't recomputed counts what it saved itself; take it out of the stored."""
        if self.is_checkpointed:
            return {}
        return {
            n: -evaluate(s, self.tokens, self.seq_len)
            for n, s in zip(CATEGORIES, block.memory.saved, strict=True)
        }

    def _only_first(self, block: _Block) -> dict[str, float]:
        kept = self.is_checkpointed or block.memory.saves_input
        return {
            "activations": self._escaped() + (self.stream if kept else 0.0),
            "workspace": self.owner.communication_bytes(),
        }

    def _shard_grads(self, peak: dict[str, float]) -> dict[str, float]:
        """Gradients that were made within a block: freed at once under an optimizer in the backward."""
        if self.owner.setup.optimizer_in_backward:
            largest = self.owner.inventory.largest_trained_bytes
            return {**peak, "gradients": min(peak["gradients"], largest)}
        if self.held_grads:
            return {**peak, "gradients": min(peak["gradients"], self.owner.inventory.largest_trained_bytes)}
        return peak

    def _head_grads(self) -> dict[str, float]:
        """Gradients of head and final norm, made before the first layer's backward."""
        if self.held_grads or self.owner.setup.optimizer_in_backward:
            return {}
        owner = self.owner
        if not owner.recipe.trains_base or owner.model.head is None:
            return {}
        share = owner.setup.num_gpus if owner.strategy.shards_gradients else 1
        return {"gradients": owner.model.head.num_weights * owner.recipe.weight / share}

    def _late_grads(self, block: _Block) -> dict[str, float]:
        """All gradients but those that the first layer and the embedding are about to make."""
        if self.owner.setup.optimizer_in_backward:
            return {}
        if self.held_grads:
            return {"gradients": self.held_grads}
        embedding = 0 if self.owner.model.tied_head else self._embedding_bytes()
        share = self.owner.setup.num_gpus if self.owner.strategy.shards_gradients else 1
        own = block.memory.weight_gradients[0] / share
        return {"gradients": max(0.0, self.all_grads - own - embedding)}

    def _embedding_bytes(self) -> float:
        owner = self.owner
        if not owner.recipe.trains_base:
            return 0.0
        return owner.model.token_embedding_params * owner.recipe.weight

    def _embedding_backward(self) -> dict[str, float]:
        """The embedding's dense gradient beside all others; with a tied head it is added to the head's."""
        second = self._embedding_bytes() if self.owner.model.tied_head or self.held_grads else 0.0
        grads = self.all_grads or self._embedding_bytes()
        return self._plus({"gradients": grads + second, "activations": float(self.stream)})

    def _optimizer(self) -> dict[str, float]:
        inventory = self.owner.inventory
        share = self.owner.setup.num_gpus if self.owner.strategy.shards_optimizer else 1
        step = 0.0 if self.owner.setup.offload != "none" else inventory.step_bytes / share
        grads = self.all_grads or inventory.largest_trained_bytes
        return self._plus({"gradients": grads, "optimizer": step, "activations": -self.base["activations"]})

    def _eval(self) -> dict[str, float]:
        """The head, or a layer beside its input and the embeddings' output, which the model's forward holds."""
        setup, owner = self.owner.setup, self.owner
        rows = setup.eval_batch_size or setup.micro_batch_size
        tokens = round(self.tokens * rows / setup.micro_batch_size)
        copies = {"workspace": self._autocast_copies(with_head=True)}
        held = {"activations": 2.0 * self.stream * rows / setup.micro_batch_size}
        head = owner.head(tokens, evaluates=True).no_grad
        peaks = [self._plus(copies, head.at(tokens, self.seq_len))]
        for block in owner.blocks:
            peaks.append(self._plus(copies, held, block.memory.no_grad.at(tokens, self.seq_len)))
        return max(peaks, key=lambda terms: sum(terms.values()))


def _recipe(setup: TrainSetup, model: ModelSpec, stack: Stack, on_gpu: bool) -> Recipe:
    """The widths and modules that decide what a block saves."""
    weight = unquantised_width(setup)
    compute = DTYPE_BYTES[setup.autocast or setup.weights_dtype]
    adapted: frozenset[str] = frozenset()
    if setup.uses_adapters:
        adapted = frozenset(matrix.path for _, matrix in target_matrices(model, setup.targets))
    return Recipe(
        weight=weight,
        norm=weight,
        compute=compute,
        stream=weight,
        adapter=DTYPE_BYTES[setup.adapter_dtype],
        rank=setup.rank,
        adapted=adapted,
        trains_base=find_method(setup.method).trains_base,
        autocast=setup.autocast is not None,
        quantised_bits=_QUANTISED_BITS[setup.quant],
        dropout=setup.dropout > 0,
        attention=setup.attention,
        fused=setup.kernels != "plain" or setup.compile,
        on_gpu=on_gpu,
        reentrant=stack.is_before("transformers", 5),
    )


_QUANTISED_BITS = {None: 0, "nf4": 4, "nf4-double": 4, "fp4": 4, "int8": 8}

_OWN_LOSS_FAMILIES = ("granite", "granitemoe")


LOSS_CHUNK_TOKENS = 512
"""bench.loss takes this many tokens at once."""


def _loss_bytes(setup: TrainSetup, model: ModelSpec, stack: Stack, tokens: int, evaluates: bool) -> LossBytes:
    """How the loss of the setup's stack treats the logits.

    transformers before 4.50 slices and copies the float32 logits instead of padding the labels, inside the
    model's forward; Granite's own loss there drops the 16-bit logits first.
    """
    compute = DTYPE_BYTES[setup.autocast or setup.weights_dtype]
    if setup.loss == "chunked":
        return _chunked_bytes(setup, tokens, evaluates)
    if setup.loss == "fused":
        chunk = liger_chunk_tokens(model, tokens)
        return LossBytes(chunk_tokens=chunk, softmax_width=compute, gradient_width=compute)
    is_old = stack.is_before("transformers", 4, 50)
    has_own_loss = model.family in _OWN_LOSS_FAMILIES
    return LossBytes(
        upcast=setup.kernels == "plain",
        shift_copy=is_old,
        keeps_16bit=not (is_old and has_own_loss),
        keeps_input=is_old,
        in_place_grad=setup.kernels == "fused",
        scaled=has_own_loss,
    )


def _chunked_bytes(setup: TrainSetup, tokens: int, evaluates: bool) -> LossBytes:
    """bench.loss.ChunkedCrossEntropy, step by step.

    Of one chunk: the logits, their float32 copy (float16 is widened inside the kernel: SoftMax.cpp), the float32
    log-probabilities, which the gradient overwrites, and the gradient in the dtype of the hidden states. Log-probabilities and
    gradient of a chunk live until the next one has its own.
    """
    dtype = setup.autocast or setup.weights_dtype
    compute, rows = DTYPE_BYTES[dtype], unquantised_width(setup)
    copy = 4 if dtype == "bfloat16" else 0
    gradient = 4 + (rows if rows != 4 else 0)
    before = (4 if evaluates else gradient) if tokens > LOSS_CHUNK_TOKENS else 0
    return LossBytes(
        evaluates=evaluates,
        chunk_tokens=min(LOSS_CHUNK_TOKENS, tokens),
        softmax_width=before + compute + copy + 4,
        gradient_width=gradient + (compute if rows != compute else 0),
    )


def liger_chunk_tokens(model: ModelSpec, tokens: int) -> int:
    """Tokens per chunk of Liger's fused linear cross-entropy.

    Its chunk keeps chunk x vocabulary near tokens x hidden: next power of two of tokens / ceil(V / H)
    (liger_kernel/ops/fused_linear_cross_entropy.py).
    """
    parts = -(-model.vocab_size // model.hidden_size)
    per_chunk = -(-tokens // parts)
    return min(tokens, 1 << (per_chunk - 1).bit_length())


def estimate_memory(
    setup: TrainSetup, model: ModelSpec, *, on_gpu: bool = True, capability: tuple[int, int] | None = None
) -> Memory:
    """Memory per GPU of one setup; see MemoryModel."""
    owner = MemoryModel(setup, model, on_gpu=on_gpu, capability=capability)
    return owner.at(setup.micro_batch_size, setup.seq_len)
