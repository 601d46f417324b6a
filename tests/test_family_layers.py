"""What layers of single families keep and hold, by hand: masks, sinks, biases of experts, joint projections."""

from dataclasses import replace

import pytest

from planner import kernels
from planner.blocks import Block, layer_memory
from planner.hf_config import model_spec
from planner.memory import MemoryModel
from planner.pointwise import activation
from planner.setup import TrainSetup
from planner.shapes import Shape
from planner.tape import Tape
from planner.tape import per_token as per_token_size

H, HEADS = 256, 4
SIZES = {"hidden_size": H, "num_hidden_layers": 2, "num_attention_heads": HEADS, "vocab_size": 512}
FALCON = {"model_type": "falcon", **SIZES}
BERT = {"model_type": "bert", **SIZES, "intermediate_size": 512, "hidden_dropout_prob": 0.0}
GPT2 = {"model_type": "gpt2", **SIZES}
PHI3 = {"model_type": "phi3", **SIZES, "intermediate_size": 512, "pad_token_id": 0}
GPT_OSS = {
    "model_type": "gpt_oss",
    **SIZES,
    "intermediate_size": 1024,
    "num_local_experts": 4,
    "head_dim": 64,
}


def model(config, **fields):
    setup = TrainSetup(model=config, method="full", **fields)
    return MemoryModel(setup, model_spec(config))


def parts(config, **fields):
    memory = model(config, **fields)
    return memory.run.model.layers[0], memory.run.recipe


def test_falcon_gives_torchs_attention_a_mask_always():
    """A boolean one for all layers, and in each layer an additive one that the kernel keeps."""
    run = model(FALCON, attention="sdpa").run
    assert run.masks(Shape(4096, 1024)) == 1024 * 1024
    assert model(FALCON, attention="flash").run.masks(Shape(4096, 1024)) == 0
    assert model(PHI3, attention="sdpa").run.masks(Shape(4096, 1024)) == 0


def test_falcons_single_value_head_is_a_copy():
    """So the joint projection isn't kept for it."""
    layer, recipe = parts(FALCON, attention="flash")
    head = H // HEADS
    copied = layer_memory(layer, H, recipe).saved
    kept = layer_memory(replace(layer, hands_over_groups=True), H, recipe).saved
    difference = sum(b[1] - a[1] for a, b in zip(copied, kept, strict=True))
    assert difference == 2 * (H + 2 * head) - 2 * head


def test_bert_takes_the_softmax_in_the_scores_dtype():
    layer, recipe = parts(BERT, attention="eager")
    assert layer.scores == "unnarrowed"
    squares = sum(size[2] for size in layer_memory(layer, H, recipe).saved)
    plain = replace(layer, scores="plain")
    assert sum(size[2] for size in layer_memory(plain, H, recipe).saved) == squares + 2 * HEADS


def test_the_two_halves_of_a_joint_projection_have_gradients_of_their_own():
    """Neither is as wide as both."""
    layer, recipe = parts(PHI3)
    block = Block(recipe)
    roles = {m.role: m for m in layer.matrices}
    block._mlp(block.tape.input(per_token_size(2.0 * H), 2), roles, layer, 1.0)
    halves = [op.output.gradient for op in block.tape.operations if op.output.base is not None]
    assert halves == [per_token_size(2.0 * 512)] * 2


class TestExpertsOfGptOss:
    def test_the_other_half_is_kept_with_one_added(self):
        layer, recipe = parts(GPT_OSS, attention="flash")
        block = Block(recipe)
        half = block.tape.input(per_token_size(2.0 * 1024), 2)
        raised = block._raised(half, 1024, layer)
        assert raised is not half
        assert raised.size == per_token_size(2.0 * 1024)
        assert block._raised(half, 1024, replace(layer, activation="silu")) is half

    def test_gathered_biases_wait_for_the_next_ones(self):
        layer, recipe = parts(GPT_OSS, attention="flash")
        without = replace(
            layer, matrices=tuple(replace(m, bias=0) if m.kind == "parameter" else m for m in layer.matrices)
        )
        with_them, bare = (layer_memory(x, H, recipe).no_grad.at(4096, 1024) for x in (layer, without))
        assert sum(with_them.values()) > sum(bare.values())

    @pytest.mark.parametrize(("compute", "kept"), [(0, 2), (2, 4 + 2)])
    def test_sinks(self, compute, kept):
        """Under autocast a float32 mask leaves a float32 softmax and 16-bit weights."""
        layer, _ = parts(GPT_OSS, attention="eager")
        tape = Tape()
        width = per_token_size(2.0 * HEADS * 64)
        inputs = [tape.input(width, 2) for _ in range(3)]
        how = kernels.Precision(compute=compute, mask=4 if compute else 2)
        kernels.EAGER["sinks"](tape, *inputs, replace(layer, num_kv_heads=HEADS), how)
        assert sum(size[2] for size in tape.play().saved) == kept * HEADS


@pytest.mark.parametrize("is_recomputed", [True, False])
def test_a_composed_gelu_halves_its_input_first(is_recomputed):
    """The half waits while the cube is made and scaled: three tensors beside the input."""
    tape = Tape()
    x = tape.input(per_token_size(4.0), 4)
    activation(tape, x, 1.0, "gelu_new", autocast=False, is_recomputed=is_recomputed)
    assert sum(tape.play().no_grad.at(1, 1).values()) == 3 * 4


def test_a_composed_gelus_gradient_is_narrowed_late_under_autocast():
    def peak(is_recomputed):
        tape = Tape()
        x = tape.input(per_token_size(2.0), 2)
        activation(tape, x, 1.0, "gelu_new", autocast=True, is_recomputed=is_recomputed)
        return sum(tape.play().backward.at(1, 1).values())

    assert peak(False) - peak(True) == 2


@pytest.mark.parametrize(("rows", "copies"), [(2, 3), (1, 0)])
def test_bloom_copies_the_heads_of_several_rows_in_their_own_width(rows, copies):
    layer, _ = parts(
        {"model_type": "bloom", "hidden_size": H, "n_layer": 2, "n_head": HEADS, "vocab_size": 512}
    )
    tape = Tape()
    joint = tape.run([tape.input(per_token_size(1.0), 4)], per_token_size(4.0 * 3 * H), 4)
    inputs = [tape.part(joint, per_token_size(4.0 * H)) for _ in range(3)]
    before = len(tape.operations)
    how = kernels.Precision(compute=2, mask=2, is_single=rows == 1)
    kernels.EAGER["alibi"](tape, *inputs, layer, how)
    sizes = [op.output.size for op in tape.operations[before : before + 3]]
    assert sizes.count(per_token_size(4.0 * H)) == copies


@pytest.mark.parametrize(
    ("config", "quant", "widths"), [(GPT2, "nf4", (2, 4)), (GPT2, None, (2, 2)), (PHI3, "nf4", (2, 2))]
)
def test_packed_linears_keep_the_float32_of_autocasts_layer_norm(config, quant, widths):
    """So the second layer's input is wider than the first one's."""
    method = "qlora" if quant else "lora"
    setup = TrainSetup(model=config, method=method, quant=quant, autocast="bfloat16", checkpointing="full")
    layers = MemoryModel(setup, model_spec(config)).run.layering(Shape(4096, 1024))
    inputs = [layers.memories[number].input for number in layers.order]
    assert inputs == [per_token_size(H * width) for width in widths]
    assert layers.whole.inputs == per_token_size(H * sum(widths))


def test_a_single_key_head_is_a_view_for_the_masked_kernel():
    """transformers' repeat_kv expands it; several heads are copied out."""
    config = {**PHI3, "model_type": "gemma", "head_dim": 64}
    one, two = (
        sum(size[1] for size in saved)
        for heads in (1, 2)
        for layer, recipe in [parts({**config, "num_key_value_heads": heads}, attention="sdpa", packing=True)]
        for saved in [layer_memory(layer, H, replace(recipe, is_masked=True)).saved]
    )
    assert two - one == 2 * 2 * 64 * (HEADS - 1)


def test_granites_recomputation_has_the_multiples_gradient_beside_the_streams():
    config = {**PHI3, "model_type": "granite", "num_key_value_heads": 2}
    layer, recipe = parts(config, attention="sdpa", weights_dtype="float32", checkpointing="full")
    plain = replace(layer, scales_updates=False)
    scaled, bare = (layer_memory(x, H, recipe).recompute.at(4096, 1024) for x in (layer, plain))
    assert sum(scaled.values()) - sum(bare.values()) == 4096 * 4 * H


def test_gpt2_holds_attentions_output_while_the_feed_forward_part_works():
    layer, recipe = parts(GPT2, attention="flash", checkpointing="full")
    held, freed = (
        sum(layer_memory(x, H, recipe).no_grad.at(4096, 1024).values())
        for x in (layer, replace(layer, holds_attention=False))
    )
    assert held - freed == 4096 * 2 * H


def test_8_bit_linears_keep_their_inputs_in_training_alone():
    setup = TrainSetup(model=PHI3, method="qlora", quant="int8", checkpointing="full")
    run = MemoryModel(setup, model_spec(PHI3)).run
    training, evaluation = (run.layering(Shape(4096, 1024), evaluates=e).whole.kept for e in (False, True))
    assert sum(training) > 0 == sum(evaluation)


def test_full_layers_beside_sliding_ones_may_have_no_rotary_embedding():
    config = {
        **PHI3,
        "model_type": "cohere2",
        "sliding_window": 512,
        "layer_types": ["sliding_attention", "full_attention"],
    }
    assert [layer.rotary for layer in model_spec(config).layers] == ["full", "none"]
