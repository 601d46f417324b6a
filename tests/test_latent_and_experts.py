"""Latent attention and routed experts: which tensors the closed form makes, by hand."""

from dataclasses import replace

import pytest

from planner.blocks import Block
from planner.hf_config import model_spec
from planner.linears import Recipe
from planner.memory import MemoryModel
from planner.setup import TrainSetup
from planner.shapes import Shape
from planner.tape import Tape, evaluate, per_token

HEADS, NOPE, ROPE, VALUE, RANK, H = 4, 16, 8, 16, 32, 64
LATENT = {
    "model_type": "deepseek_v3",
    "hidden_size": H,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "vocab_size": 256,
    "q_lora_rank": 48,
    "kv_lora_rank": RANK,
    "qk_nope_head_dim": NOPE,
    "qk_rope_head_dim": ROPE,
    "v_head_dim": VALUE,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
}
WIDE = 2 * HEADS * (NOPE + ROPE)
"""Bytes per token of queries or keys in 16 bits."""
SLIM = Recipe(weight=2, norm=2, compute=2, stream=2, trains_base=True)


def bytes_of(snapshot):
    return sum(evaluate(size, 1, 1) - evaluate(size, 0, 1) for size in snapshot)


def saved_by_attention(recipe, **changes):
    layer = model_spec({**LATENT, **changes}).layers[0]
    block = Block(recipe)
    block.attention(block.tape.input(per_token(2 * H), 2), layer, H)
    return bytes_of(block.tape.play().saved)


def norm_bytes(num_elements):
    """A norm that trains keeps its float32 copy, the deviation and what it multiplies with its weight."""
    return 4 * num_elements + 4 + 2 * num_elements


class TestLatentAttention:
    NORMED = norm_bytes(48) + 2 * 48 + norm_bytes(RANK) + 2 * RANK
    """Both norms, and their outputs, which the wide matrices read."""

    def test_torchs_attention_keeps_the_matrix_that_values_are_a_view_of(self):
        context = 2 * HEADS * VALUE
        kept = self.NORMED + 2 * WIDE + 2 * HEADS * (NOPE + VALUE) + context + 4 * HEADS
        assert saved_by_attention(SLIM) == kept

    def test_flash_keeps_padded_values_and_a_padded_context_and_the_cut_one(self):
        kept = self.NORMED + 3 * WIDE + WIDE + 4 * HEADS + 2 * HEADS * VALUE
        assert saved_by_attention(replace(SLIM, attention="flash")) == kept

    @pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
    def test_rotations_save_nothing(self, family):
        changes = {"model_type": family}
        assert saved_by_attention(SLIM, **changes) == saved_by_attention(SLIM)


class TestSplitAndJoin:
    def test_the_parts_gradients_are_joined_once(self):
        tape = Tape()
        base = tape.run([tape.input(per_token(4), 2)], per_token(4), 2)
        parts = [tape.split(base, per_token(2)) for _ in range(2)]
        tape.join(parts, per_token(4), 2)
        # The joined gradient, which both parts see, beside the base's; then the base's beside the input's.
        assert tape.play().backward.at(1, 1)["activations"] == 8


class TestExperts:
    def routed(self, model, **recipe):
        layer = model_spec({**LATENT, "model_type": model}).layers[-1]
        block = Block(replace(SLIM, **recipe))
        block.feed_forward(block.tape.input(per_token(2 * H), 2), layer, H)
        return block.tape.operations

    def test_sigmoid_weights_are_narrow_under_autocast_softmax_weights_are_not(self):
        widest = {
            model: max(bytes_of([op.output.size]) for op in self.routed(model, autocast=True))
            for model in ("deepseek_v2", "deepseek_v3")
        }
        assert widest == {"deepseek_v2": 4 * 2 * H, "deepseek_v3": 4 * H}

    def test_shared_experts_come_after_routed_ones(self):
        """The routed experts' indices are made before the last gated product."""
        sizes = [bytes_of([op.output.size]) for op in self.routed("deepseek_v3")]
        assert sizes.index(8 * 2) < sizes.index(2 * 32)

    def test_an_adapted_router_in_float32_keeps_its_float32_input(self):
        layer = model_spec(LATENT).layers[-1]
        router = next(m for m in layer.matrices if m.role == "router")
        recipe = replace(SLIM, trains_base=False, adapter=4, adapted=((router.path, 8),))
        block = Block(recipe)
        block.linear(block.tape.input(per_token(2 * H), 2), router)
        narrow = bytes_of(block.tape.play().saved)
        block = Block(recipe)
        x = block.cast(block.tape.input(per_token(2 * H), 2), 4, H)
        block.linear(x, router)
        assert bytes_of(block.tape.play().saved) == narrow + 4 * H


QWEN = {
    "model_type": "qwen2_moe",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 256,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}


class TestIdleMask:
    def run_of(self, attention, **changes):
        model = {**QWEN, **changes}
        return MemoryModel(TrainSetup(model=model, attention=attention), model_spec(model)).run

    def test_a_mask_that_no_layer_reads_is_made_unless_flash_takes_none(self):
        idle = {kind: self.run_of(kind).idle_masks(Shape(8192, 4096)) for kind in ("sdpa", "eager", "flash")}
        assert idle == {"sdpa": 4096 * 4096, "eager": 2 * 8192 * 4096, "flash": 0}

    def test_families_that_ask_for_what_they_need_have_none(self):
        run = self.run_of("sdpa", model_type="qwen3_moe", shared_expert_intermediate_size=None)
        assert run.idle_masks(Shape(8192, 4096)) == 0
