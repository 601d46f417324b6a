"""On a real card: one step of a tiny model with joined rows, fused kernels and the chunked loss against the plain one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tiny_llama import CONFIG, tiny_setup

torch = pytest.importorskip("torch")

from bench.attention import check_isolation  # noqa: E402
from bench.batching import micro_batch  # noqa: E402
from bench.build import build_model  # noqa: E402
from bench.data import Example  # noqa: E402
from bench.optim import build_optimizer  # noqa: E402
from bench.step import TrainStep  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.train,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

FAST = {"padding_free": True, "kernels": "fused", "loss": "chunked"}
NARROW = {"weights_dtype": "bfloat16", "adapter_dtype": "bfloat16"}
MODEL = {**CONFIG, "hidden_size": 256, "intermediate_size": 512}


def rows() -> list[list[Example]]:
    generator = np.random.default_rng(0)
    found = []
    for number, length in enumerate((5, 150, 12, 40)):
        ids = generator.integers(3, 256, length, dtype=np.int32)
        labels = np.where(np.arange(length) >= length // 2, ids, -100).astype(np.int32)
        found.append([Example(input_ids=ids, labels=labels, group=str(number))])
    return found


def one_step(device: str = "cuda", **changes: Any) -> list[Any]:
    """The gradients and, last, the loss, with adapters whose B isn't zero."""
    setup = tiny_setup(model=MODEL, seq_len=160, method="lora", **changes)
    model = build_model(setup, device=device)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            # the devices draw other numbers from one seed
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter)
    if setup.padding_free:
        check_isolation(model)
    step = TrainStep(setup, model, build_optimizer(setup, model))
    batch = micro_batch(setup, rows(), pad_id=0)
    loss = step.micro_step({name: t.to(device) for name, t in batch.items()}, 100)
    return [t.float().cpu() for t in (*(p.grad for p in model.parameters() if p.grad is not None), loss)]


def distance(found: list[Any], exact: list[Any]) -> float:
    """Of the gradients, over their own size; the losses are equal but for rounding."""
    assert float(found[-1]) == pytest.approx(float(exact[-1]), rel=0.02)
    squares = sum(float((a - b).pow(2).sum()) for a, b in zip(found[:-1], exact[:-1], strict=True))
    return (squares / sum(float(b.pow(2).sum()) for b in exact[:-1])) ** 0.5


def test_in_float32_the_fast_step_is_the_plain_one_of_the_cpu():
    exact = one_step("cpu")
    assert distance(one_step(), exact) < 1e-3
    assert distance(one_step(**FAST), exact) < 1e-3


@pytest.mark.parametrize(
    "changes", [{}, {"checkpointing": "full"}, {"weights_dtype": "float32", "autocast": "bfloat16"}]
)
def test_in_16_bits_it_is_no_farther_from_float32_than_twice_the_plain_one(changes):
    exact = one_step("cpu")
    plain = distance(one_step(**NARROW), exact)
    fast = {**FAST, **NARROW, **changes}
    if "autocast" in changes:
        fast |= {"kernels": "plain", "adapter_dtype": "float32"}
    assert distance(one_step(**fast), exact) < 2 * max(plain, 0.005)
