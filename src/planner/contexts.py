"""What a process takes of a card before its first tensor: the CUDA context with the kernels that it loaded.

It grows with the card: a stack for every thread that can run at once, and code for its compute capability.
"""

from __future__ import annotations

from planner.units import MIB

CONTEXTS: dict[tuple[int, int], tuple[int, str]] = {
    (6, 0): (303 * MIB, "P100: 15.82 - 15.36 - 0.16 GiB, andimarafioti/florence2-finetuning#17"),
    (7, 5): (99 * MIB, "T4: 14.67 - 14.55 - 0.02 GiB, hpcaitech/Open-Sora#697"),
    (8, 0): (501 * MIB, "A100: 14.25 - 12.87 - 0.89 GiB, TianheWu/CoSeR#10"),
    (8, 9): (
        426 * MIB,
        "RTX 6000 Ada, torch 2.10+cu130: measured, unsloth-zoo pull 1053; RTX 4090: 416 MiB from "
        "23.28 - 22.74 - 0.13 GiB, eosphoros-ai/DB-GPT-Hub#248",
    ),
    (9, 0): (
        758 * MIB,
        "H100 SXM5, driver 580.159, torch 2.11+cu130: measured, evidence/h100-runs.jsonl; 742 MiB in 3 of 43 runs",
    ),
}
"""Bytes by compute capability, and where they are from.

An out-of-memory message names what the process has in use, what torch has allocated and what it has reserved beside;
the rest is the context. Messages round to 0.01 GiB, so a figure is good to 15 MiB."""
OTHER_CONTEXT_BYTES = 426 * MIB
"""For capabilities without a published figure: the one that was measured and not derived. Before lazy loading
(CUDA 11.7) 667 MB, with it 287 MB on one card (pytorch pull 86509). `finefit verify` measures this machine's."""


def context_bytes(capability: tuple[int, int] | None) -> int:
    """The context of a card of this compute capability.

    >>> context_bytes((8, 0)) // MIB, context_bytes(None) // MIB
    (501, 426)
    """
    found = CONTEXTS.get(capability) if capability is not None else None
    return OTHER_CONTEXT_BYTES if found is None else found[0]
