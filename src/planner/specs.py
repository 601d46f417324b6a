"""Questions' nouns: what a model and a machine are, as facts in bytes, FLOP/s and element counts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True, slots=True)
class Matrix:
    """One weight matrix of a layer, as PEFT's `target_modules` and bitsandbytes see it.

    `module` is the module's own name ("q_proj"), `path` the same from the layer down ("self_attn.q_proj";
    experts without their number); `role` is what it does whatever it is called
    (q, k, v, qkv, o, gate, up, gate_up, down, router, cross_q … or "other").
    `copies` counts equal matrices in the layer (experts); each sees `token_share` of the tokens
    (experts_per_token / num_experts for a routed expert, else 1).
    `kind`: "linear" (nn.Linear; quantised by bitsandbytes), "conv1d" (GPT-2's transposed linear; quantised
    too), "kept" (a linear module that bitsandbytes leaves as it is: a subclass of nn.Linear, T5's wo),
    "parameter" (a bare parameter: a router's, or the 3-D one that holds all experts of transformers 5; never
    quantised, and matched by "all-linear" only where PEFT converts the family: `layers.target_matrices`).
    `wide`: from_pretrained leaves it in float32 where the weights are float16.
    """

    module: str
    role: str
    in_features: int
    out_features: int
    bias: bool = False
    copies: int = 1
    token_share: float = 1.0
    kind: str = "linear"
    wide: bool = False
    path: str = ""

    @property
    def num_weights(self) -> int:
        """Elements of all copies, without biases."""
        return self.in_features * self.out_features * self.copies

    @property
    def num_biases(self) -> int:
        """Elements of all copies' biases."""
        return self.out_features * self.copies if self.bias else 0


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerSpec:
    """One kind of layer and how often it occurs; all sizes are per layer.

    `norm_params` counts the elements that are neither a matrix nor a bias (norm weights, gates, sinks …).
    `mixer`: "softmax" (incl. multi-head latent attention, whose matrices say so), "linear" (a recurrent or
    state-space mixer) or "none". `qk_norm`: "none", "head" (one weight per element of a head) or "full" (over
    all heads). `scores`: "plain", "capped" by a tanh, or with "sinks" (a logit that no token owns, and a softmax in
    16 bits). `hands_over_groups`: grouped heads reach the attention kernel as they are; False where the model copies
    them out, or broadcasts a single one, itself. `always_masked`: torch's attention is given a mask even where its own
    causal one would do. `scales_updates`: what a part gives is multiplied before it is added to the residual stream;
    `holds_attention`: a variable keeps attention's output until the layer is done; `norms_ahead`: parallel parts' norms
    are both made before either part. `inner_dropout`: what the feed-forward
    part's last matrix reads is dropped; `position_bias`: a learned bias, made in the stack's first layer, is added to
    the scores (T5).
    `wiring`: where the norms on the residual stream are, `num_norms` of them: "pre" before attention and feed-forward
    part, "reordered" after each before it is added, "sandwich" both, "post" after each sum, "parallel" before both parts, which read the
    same stream. `norm`: "rmsnorm", "layernorm", either "-wide" (narrowed to 16 bits after the weight, not before)
    or "-plain" (without a weight). `activation`: its name in transformers.
    `routing`: whether experts are weighted in the tokens' dtype ("narrow"), in float32 ("scores"), and the router too
    ("wide"; "sigmoid": in the dtype of the router's product, which autocast narrows). `side` is "encoder" or "decoder". `window` is the sliding window in tokens, None for full attention.
    """

    count: int
    matrices: tuple[Matrix, ...]
    norm_params: int
    mixer: str = "softmax"
    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_head_dim: int
    window: int | None = None
    causal: bool = True
    qk_norm: str = "none"
    scores: str = "plain"
    rotary: str = "full"
    dropout: bool = False
    attention_dropout: bool = False
    inner_dropout: bool = False
    position_bias: bool = False
    hands_over_groups: bool = True
    always_masked: bool = False
    scales_updates: bool = False
    holds_attention: bool = False
    norms_ahead: bool = False
    norm: str = "rmsnorm"
    num_norms: int = 2
    wiring: str = "pre"
    mlp: str = "gated"
    activation: str = "silu"
    num_experts: int = 0
    experts_per_token: int = 0
    routing: str = "narrow"
    side: str = "decoder"

    @property
    def num_params(self) -> int:
        """Elements of one layer."""
        return sum(m.num_weights + m.num_biases for m in self.matrices) + self.norm_params


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSpec:
    """A transformer as a list of layers, embeddings and a head: all that memory and time depend on.

    `architecture`: "decoder", "encoder" or "encoder-decoder".
    `embedding_params` counts token, position and type embeddings (elements); `token_embedding_params` only
    the matrix that a tied head shares. `head` is None where the model has no head of its own;
    with `tied_head` the head's weight is the token embedding and counts once.
    `final_params`: final norms, poolers, head transforms (elements); those of them that are linear modules
    are named in `outside`. `note` says what the numbers leave out (a multi-modal model's other parts). `order` gives
    for each layer its kind, an index into `layers`; `num_rotary` counts the elements of the rotary tables per position, `buffer_bytes` what the
    model keeps besides parameters, whatever their dtype. `norms_embeddings`: a norm makes the first layer's input;
    `num_embedding_variables`: tensors that the model's forward holds beside it; `scales_logits`: the logits are multiplied;
    `returns_weights`: eager attention's weights live on until the next layer's are there. `makes_both_masks`: a mask for
    full attention and one for a sliding window are made whatever the layers need. `final_norm`: a norm after the last
    layer (of each stack); `scales_output`: its output is multiplied; of the embeddings, `scales_embeddings` the same, `adds_positions` those
    of positions; `shifts_logits`: a buffer is added to the logits (these four of encoder-decoders).
    `config` is the config.json that it came from.
    """

    name: str
    hub_id: str | None
    family: str
    architecture: str
    hidden_size: int
    vocab_size: int
    max_positions: int | None
    layers: tuple[LayerSpec, ...]
    embedding_params: int
    token_embedding_params: int
    head: Matrix | None
    tied_head: bool
    final_params: int
    outside: tuple[Matrix, ...] = ()
    order: tuple[int, ...] = ()
    num_rotary: int = 0
    buffer_bytes: int = 0
    norms_embeddings: bool = False
    num_embedding_variables: int = 0
    scales_logits: bool = False
    returns_weights: bool = False
    makes_both_masks: bool = False
    logit_softcap: bool = False
    final_norm: bool = True
    scales_output: bool = False
    scales_embeddings: bool = False
    adds_positions: bool = False
    shifts_logits: bool = False
    remote_code: bool = False
    license: str | None = None
    commercial: str | None = None
    source: str | None = None
    note: str | None = None
    config: Mapping[str, object] = field(default_factory=dict, repr=False, compare=False)
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Hash once: what is computed from a model is remembered by it."""
        shapes = (self.name, self.hub_id, self.layers, self.embedding_params, self.head, self.outside)
        object.__setattr__(self, "_hash", hash(shapes))

    def __hash__(self) -> int:
        """Equal models have equal hashes; `config` is in neither."""
        return self._hash

    @property
    def is_traced(self) -> bool:
        """Whether it stands for an architecture without formulas, whose memory only traces know: no layers."""
        return not self.layers

    @property
    def sequence(self) -> tuple[int, ...]:
        """For each layer its kind, an index into `layers`: `order`, or one kind after the other."""
        return self.order or tuple(i for i, layer in enumerate(self.layers) for _ in range(layer.count))

    @property
    def num_layers(self) -> int:
        """Layers of all kinds and sides."""
        return sum(layer.count for layer in self.layers)

    @property
    def num_params(self) -> int:
        """All elements; a tied head counts once."""
        head = 0 if self.head is None or self.tied_head else self.head.num_weights
        head += self.head.num_biases if self.head else 0
        body = sum(layer.count * layer.num_params for layer in self.layers)
        return self.embedding_params + body + self.final_params + head

    @property
    def num_active_params(self) -> int:
        """Elements that one token passes through (routed experts by their share), embeddings included."""
        idle = sum(
            layer.count * round(m.num_weights * (1 - m.token_share))
            for layer in self.layers
            for m in layer.matrices
        )
        return self.num_params - idle


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuProfile:
    """An accelerator's facts, from profiles/gpus; None means unknown, never zero.

    `usable_bytes` is the total that torch reports (the driver keeps the difference to `memory_bytes`).
    `flops` maps a dtype ("float32", "tf32", "float16", "bfloat16", "fp8", "int8") to the dense peak in FLOP/s.
    `link_bytes_per_s` (NVLink and the like; None also where cards talk over PCIe alone) and `pcie_bytes_per_s`
    count one direction. `backend`: "cuda", "rocm", "mps", "tpu", "hpu", "npu", "cpu". `modelled` is False where
    finefit has no memory rules for the back end. `sources` maps a field to where its value comes from
    ("flops.bfloat16" for a peak).
    """

    name: str
    aliases: tuple[str, ...] = ()
    vendor: str
    architecture: str
    backend: str
    modelled: bool
    compute_capability: tuple[int, int] | None = None
    memory_bytes: int
    usable_bytes: int | None = None
    bandwidth_bytes_per_s: float | None = None
    flops: Mapping[str, float] = field(default_factory=dict)
    tdp_w: float | None = None
    link_bytes_per_s: float | None = None
    pcie_bytes_per_s: float | None = None
    bf16: bool = True
    flash_attention: bool = True
    bitsandbytes: bool = True
    fp8: bool = False
    unified_memory: bool = False
    launch_price_usd: float | None = None
    launch_price_cny: float | None = None
    release_date: str | None = None
    note: str | None = None
    sources: Mapping[str, str] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """`num_gpus` equal accelerators in one box; `free_bytes` and `host_bytes` only where they were measured.

    `free_bytes` is the smallest free memory among the cards now; `host_bytes` the RAM that is available.
    """

    gpu: GpuProfile
    num_gpus: int = 1
    free_bytes: int | None = None
    host_bytes: int | None = None
    is_local: bool = False

    @property
    def label(self) -> str:
        """The machine as one writes it: NAME or NAME:COUNT."""
        return self.gpu.name if self.num_gpus == 1 else f"{self.gpu.name}:{self.num_gpus}"
