"""On a real card: joined documents by flash attention against each document alone."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from bench import attention  # noqa: E402
from bench.documents import locate  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.train,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

LENGTHS = (5, 300, 1, 129, 64)
ROUNDING = 0.02
"""Of the largest value: bfloat16 has 8 bits, and sums are in another order."""


def heads(num: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """[1, H, L, D] as a model's projections lay them out."""
    flat = torch.randn(1, sum(LENGTHS), num, width, device="cuda", dtype=dtype)
    return flat.transpose(1, 2).requires_grad_()


def attend(inputs, documents):
    answer, _ = attention.attend(torch.nn.Module(), *inputs, None, documents=documents)
    return answer


def with_gradients(inputs, answer, given):
    answer.backward(given)
    found = [answer.detach().clone(), *(t.grad.clone() for t in inputs)]
    for t in inputs:
        t.grad = None
    return found


@pytest.mark.parametrize(("num_heads", "num_key_heads"), [(8, 8), (8, 2), (8, 1)])
@pytest.mark.parametrize("width", [64, 80, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_outputs_and_gradients_are_those_of_each_document_alone(num_heads, num_key_heads, width, dtype):
    torch.manual_seed(0)
    inputs = [heads(n, width, dtype) for n in (num_heads, num_key_heads, num_key_heads)]
    assert attention.fits_flash(inputs[0], inputs[2])
    given = torch.randn(1, sum(LENGTHS), num_heads, width, device="cuda", dtype=dtype)
    documents = locate(LENGTHS).to(torch.device("cuda"))
    joined = with_gradients(inputs, attend(inputs, documents), given)
    wide = [t.detach().float().requires_grad_() for t in inputs]
    parts = zip(*(t.split(LENGTHS, dim=2) for t in wide), strict=True)
    alone = torch.cat([attend(part, None) for part in parts], dim=1)
    for found, exact in zip(joined, with_gradients(wide, alone, given.float()), strict=True):
        assert (found.float() - exact).abs().max() < ROUNDING * max(1.0, float(exact.abs().max()))


@pytest.mark.parametrize(("width", "dtype"), [(64, torch.float32), (20, torch.bfloat16)])
def test_other_heads_are_gathered_by_length(width, dtype):
    torch.manual_seed(0)
    inputs = [heads(n, width, dtype) for n in (4, 2, 2)]
    assert not attention.fits_flash(inputs[0], inputs[2])
    joined = attend(inputs, locate(LENGTHS).to(torch.device("cuda")))
    parts = zip(*(t.split(LENGTHS, dim=2) for t in inputs), strict=True)
    alone = torch.cat([attend(part, None) for part in parts], dim=1)
    assert (joined - alone).abs().max() < ROUNDING
