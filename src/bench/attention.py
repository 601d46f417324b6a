"""Attention of each document by itself, and a causal attention whose backward is fast on CPUs.

transformers is given it under two names: one for rows that are joined, whose documents need no mask, and one for rows as
they are, with torch's own (sdpa) where a mask says what to leave out. Joined documents are one call of torch's flash
attention over variable lengths where it takes them; elsewhere they are gathered by length, a call for each group.
H: query heads, K: key heads, D: width of a head, L: length, N: tokens of the batch.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch.nn import functional
from torch.nn.attention import varlen
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from bench.documents import Documents, locate
from planner.errors import SetupError
from planner.own_kernels import takes_documents
from planner.setup import TrainSetup

DOCUMENTS, ROWS = "finefit_documents", "finefit_rows"
"""The attention's names in transformers' registry."""

_QUERY_BLOCK = 128
"""Queries of the backward at a time: keys behind a block are left out."""
_SCORES_AT_ONCE = 2**18
"""Scores of the backward at a time, where rows are short: half a MiB in bfloat16, which stays in a core's cache."""


def register(config: Any, setup: TrainSetup) -> str:
    """Make the attention known to transformers; its name for the setup.

    Raises SetupError where rows shall be joined and a layer doesn't see all tokens before each of a row of `seq_len`.
    """
    name, mask = (DOCUMENTS, _padding_mask) if setup.joins_rows else (ROWS, sdpa_mask)
    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, mask)
    if setup.joins_rows:
        _check_layers(config, setup)
    return name


def _check_layers(config: Any, setup: TrainSetup) -> None:
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ())
    if config.is_encoder_decoder or kinds - {"full_attention", "sliding_attention"}:
        others = ", ".join(sorted(kinds)) or "two stacks"
        raise SetupError("padding_free", f"{setup.model_label}: not for its kinds of layers ({others})")
    window = getattr(text, "sliding_window", None)
    if window and window < setup.seq_len:
        raise SetupError("padding_free", f"{setup.model_label}: its window of {window} is less than seq_len")


def check_isolation(model: torch.nn.Module) -> None:
    """Raise SetupError unless documents that are joined in one row give the logits that each gives alone."""
    embeddings: Any = model.get_input_embeddings()
    # words: logits of a row of special tokens are noise in 16 bits
    ids = torch.linspace(len(embeddings.weight) // 3, len(embeddings.weight) - 1, sum(_PROBED)).long()
    parts = ids.to(embeddings.weight.device).split(list(_PROBED))
    was_training = model.training
    model.eval()
    with torch.no_grad():
        alone = [model(input_ids=part[None], use_cache=False).logits[0] for part in parts]
        joined = model(
            input_ids=torch.cat(parts)[None],
            position_ids=torch.cat([torch.arange(len(part), device=part.device) for part in parts])[None],
            documents=locate(_PROBED).to(parts[0].device),
            use_cache=False,
        ).logits[0]
    model.train(was_training)
    if not _are_close(joined, torch.cat(alone)):
        raise SetupError("padding_free", "joined documents see each other in this model; set it to false")


_PROBED = (12, 20)
"""Tokens of the two documents."""
_ROUNDING = {2: 0.25, 4: 0.01}
"""By bytes per element, what may be sums in another order: SmolLM2-135M in bfloat16 differs by 0.04 then, and by 1.4 where
documents leak; in float32 models differ by less than 0.001."""


def _are_close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether the root mean square of the difference is small beside the spread of each token's logits."""
    error = (found.float() - expected.float()).square().mean()
    spread = expected.float().var(-1).mean()
    return bool(error.sqrt() <= _ROUNDING[expected.element_size()] * spread.sqrt())


def _padding_mask(*, attention_mask: torch.Tensor | None = None, **options: Any) -> torch.Tensor | None:
    """A mask for rows with padding only: documents and causality need none."""
    return None if attention_mask is None else sdpa_mask(attention_mask=attention_mask, **options)


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    documents: Documents | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: `query` [B, H, L, D], `key` and `value` [B, K, L, D] -> [B, L, H, D]."""
    # a token that is generated sees all that are cached
    is_square = query.shape[2] == key.shape[2]
    if attention_mask is not None or not is_square or not getattr(module, "is_causal", True):
        return sdpa_attention_forward(  # type: ignore[no-any-return]
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
    query, key, value = _narrowed(query, key, value)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if documents is not None and not dropout and fits_flash(query, value):
        return by_flash(query, key, value, documents, scale), None
    causal = functools.partial(_causal, scale=scale, dropout=dropout)
    if documents is None:
        return causal(query, key, value).transpose(1, 2).contiguous(), None
    rows, _, length, _ = query.shape
    places, num_places = documents.places, documents.num_places
    gathered = (_Spread.apply(_flat(t), places, num_places) for t in (query, key, value))
    parts = zip(*(_groups(t, documents.groups) for t in gathered), strict=True)
    answers = [_flat(causal(*part)) for part in parts]
    answer = _Collect.apply(torch.cat(answers) if len(answers) > 1 else answers[0], places)
    return answer.view(rows, length, *answer.shape[1:]), None


def _narrowed(*heads: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """As autocast hands them to torch's own attention: rotary embeddings leave float32 queries and keys."""
    kind = heads[0].device.type
    if not torch.is_autocast_enabled(kind):
        return heads
    return tuple(t.to(torch.get_autocast_dtype(kind)) for t in heads)


def fits_flash(query: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether torch's flash attention over variable lengths takes such heads on their device."""
    is_narrow = query.dtype in (torch.bfloat16, torch.float16)
    return is_narrow and takes_documents(query.shape[-1], value.shape[-1]) and has_flash(query.device)


def has_flash(device: torch.device) -> bool:
    """Whether torch's flash attention runs there: on CUDA, from compute capability 8.0."""
    return bool(
        device.type == "cuda"
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def by_flash(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, documents: Documents, scale: float
) -> torch.Tensor:
    """One kernel for all documents, without copies of them: [B, L, H, D]."""
    rows, _, length, _ = query.shape
    starts, longest = documents.starts, documents.longest
    heads = (_flat(t) for t in (query, key, value))
    answer: torch.Tensor = varlen.varlen_attn(
        *heads, starts, starts, longest, longest, scale=scale, window_size=_CAUSAL, **_GROUPED
    )
    return answer.view(rows, length, *answer.shape[1:])


_CAUSAL = (-1, 0)
"""All keys before a query, none behind it."""
_GROUPED = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen.varlen_attn).parameters else {}
"""torch 2.11 takes heads that share a key without being told."""


def _flat(heads: torch.Tensor) -> torch.Tensor:
    """[B, H, L, D] -> [B * L, H, D]."""
    return heads.transpose(1, 2).flatten(0, 1)


def _groups(flat: torch.Tensor, groups: tuple[tuple[int, int], ...]) -> list[torch.Tensor]:
    """[S, H, D] -> [documents, H, L, D] of each group."""
    parts = flat.split([number * length for number, length in groups]) if len(groups) > 1 else [flat]
    return [
        part.view(number, length, *part.shape[1:]).transpose(1, 2)
        for part, (number, length) in zip(parts, groups, strict=True)
    ]


class _Spread(torch.autograd.Function):  # type: ignore[misc]
    """Tokens at their places, with zeros between them. autograd's own index operations would add, not copy."""

    @staticmethod
    def forward(ctx: Any, flat: torch.Tensor, places: torch.Tensor, num_places: int) -> torch.Tensor:
        """`flat` [N, ...] -> [S, ...]."""
        ctx.save_for_backward(places)
        return _spread(flat, places, num_places)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Any, ...]:
        """Padding has no gradient."""
        return grad_outputs[0].index_select(0, *ctx.saved_tensors), None, None


class _Collect(torch.autograd.Function):  # type: ignore[misc]
    """The inverse of _Spread."""

    @staticmethod
    def forward(ctx: Any, spread: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """`spread` [S, ...] -> [N, ...]."""
        ctx.save_for_backward(places)
        ctx.num_places = len(spread)
        return spread.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Any, ...]:
        """Zeros at the padding: what its queries see must not reach the keys."""
        (places,) = ctx.saved_tensors
        return _spread(grad_outputs[0], places, ctx.num_places), None


def _spread(flat: torch.Tensor, places: torch.Tensor, num_places: int) -> torch.Tensor:
    return flat.new_zeros((num_places, *flat.shape[1:])).index_copy_(0, places, flat)


def _causal(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, scale: float, dropout: float
) -> torch.Tensor:
    """[B, H, L, D]: each position sees those up to itself."""
    if not dropout and has_slow_backward(query) and torch.is_grad_enabled():
        answer: torch.Tensor = _CpuCausal.apply(query, key, value, scale)
        return answer
    return functional.scaled_dot_product_attention(
        query,
        key,
        value,
        dropout_p=dropout,
        is_causal=True,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def has_slow_backward(query: torch.Tensor) -> bool:
    """Whether matrix products give the gradients sooner than torch's own attention does."""
    return bool(query.device.type == "cpu")


class _CpuCausal(torch.autograd.Function):  # type: ignore[misc]
    """torch's causal attention with a backward of matrix products.

    torch's own backward on CPUs takes 9 to 16 times its forward for rows of 50 to 200 tokens (bfloat16, torch 2.13).
    Probabilities are made again for `_QUERY_BLOCK` queries at a time, so no more is saved than the inputs.
    """

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """`query` [B, H, L, D], `key` and `value` [B, K, L, D] -> [B, H, L, D]."""
        ctx.save_for_backward(query, key, value)
        ctx.scale = scale
        return functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
        )

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Any, ...]:
        """The gradients of query, key and value."""
        query, key, value = ctx.saved_tensors
        grads = [torch.empty_like(t) for t in (query, key, value)]
        _, heads, length, _ = query.shape
        at_once = max(1, _SCORES_AT_ONCE // (heads * min(length, _QUERY_BLOCK) * length))
        for start in range(0, len(query), at_once):
            span = slice(start, start + at_once)
            parts = tuple(t[span] for t in (query, key, value, grad_outputs[0]))
            _causal_backward(parts, ctx.scale, [grad[span] for grad in grads])
        return (*grads, None)


def _causal_backward(parts: tuple[torch.Tensor, ...], scale: float, grads: list[torch.Tensor]) -> None:
    """`parts`: query, key, value and the gradient of what they give. Writes theirs into `grads`, a block of queries
    after the other.

    The query heads that share a key head are rows of one matrix, so that their gradients of it are summed by the product.
    """
    query, key, value, grad = parts
    num, heads, length, width = query.shape
    shared = heads // key.shape[1]
    keys, values = (t.reshape(-1, length, width) for t in (key, value))
    grad_keys, grad_values = torch.zeros_like(keys), torch.zeros_like(values)
    mask = query.new_full((_QUERY_BLOCK, _QUERY_BLOCK), -torch.inf).triu_(1)
    for start in range(0, length, _QUERY_BLOCK):
        stop = min(length, start + _QUERY_BLOCK)
        rows, grad_rows = (_rows(t[:, :, start:stop], shared) for t in (query, grad))
        seen, seen_values = keys[:, :stop], values[:, :stop]
        scores = torch.bmm(rows, seen.mT).mul_(scale)
        block = scores.view(-1, shared, stop - start, stop)
        block[..., start:].add_(mask[: stop - start, : stop - start])
        chances = torch.softmax(scores, -1)
        torch.bmm(grad_rows, seen_values.mT, out=scores)
        grad_values[:, :stop] += torch.bmm(chances.mT, grad_rows)
        torch._softmax_backward_data(scores, chances, -1, scores.dtype, grad_input=scores)
        scores.mul_(scale)
        grad_query = torch.bmm(scores, seen).view(num, -1, shared, stop - start, width)
        grads[0][:, :, start:stop] = grad_query.flatten(1, 2)
        grad_keys[:, :stop] += torch.bmm(scores.mT, rows)
    grads[1].copy_(grad_keys.view_as(key))
    grads[2].copy_(grad_values.view_as(value))


def _rows(heads: torch.Tensor, shared: int) -> torch.Tensor:
    """[B, H, L, D] -> [B * K, H / K * L, D]."""
    num, _, length, width = heads.shape
    return heads.reshape(num, -1, shared, length, width).reshape(-1, shared * length, width)
