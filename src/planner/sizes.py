"""Sizes as polynomials of batch and length, and the candidates for a peak that are made of them."""

from __future__ import annotations

from collections.abc import Iterable

Size = tuple[float, float, float, float]
ZERO: Size = (0.0, 0.0, 0.0, 0.0)

FULL_WIDTH = 4
"""Bytes per element of float32."""

ACTIVATIONS, LOGITS, WORKSPACE, GRADIENTS = range(4)
CATEGORIES = ("activations", "logits", "workspace", "gradients")


def per_token(num_bytes: float) -> Size:
    """A size that grows with the number of tokens in the micro-batch."""
    return (0.0, num_bytes, 0.0, 0.0)


def per_pair(num_bytes: float) -> Size:
    """A size that grows with the pairs of positions in each row: scores, masks."""
    return (0.0, 0.0, num_bytes, 0.0)


def per_square(num_bytes: float) -> Size:
    """The same for what all rows share."""
    return (0.0, 0.0, 0.0, num_bytes)


def constant(num_bytes: float) -> Size:
    """A size that doesn't depend on the batch."""
    return (num_bytes, 0.0, 0.0, 0.0)


def add(a: Size, b: Size) -> Size:
    """The sum of two sizes."""
    return (a[0] + b[0], a[1] + b[1], a[2] + b[2], a[3] + b[3])


def scale(a: Size, factor: float) -> Size:
    """A size times a number."""
    return (a[0] * factor, a[1] * factor, a[2] * factor, a[3] * factor)


def evaluate(size: Size, tokens: int, seq_len: int) -> float:
    """Bytes for a micro-batch of `tokens` tokens in rows of `seq_len`."""
    return size[0] + size[1] * tokens + (size[2] * tokens + size[3] * seq_len) * seq_len


Snapshot = tuple[Size, Size, Size, Size]
NOTHING: Snapshot = (ZERO, ZERO, ZERO, ZERO)


def with_at(snapshot: Snapshot, category: int, size: Size) -> Snapshot:
    """A candidate with `size` more of one category."""
    changed = [*snapshot]
    changed[category] = add(changed[category], size)
    return (changed[0], changed[1], changed[2], changed[3])


def sum_of(sizes: Iterable[Size]) -> Size:
    """All sizes together."""
    total = ZERO
    for size in sizes:
        total = add(total, size)
    return total


def plus_beside(snapshots: Iterable[Snapshot], extra: Snapshot) -> list[Snapshot]:
    """Each candidate with something that is alive beside it."""
    a, b, c, d = extra
    return [(add(s[0], a), add(s[1], b), add(s[2], c), add(s[3], d)) for s in snapshots]


def pruned(snapshots: Iterable[Snapshot]) -> tuple[Snapshot, ...]:
    """Drop the candidates that another one exceeds at every batch and length."""
    totals = [
        (
            a[1] + b[1] + c[1] + d[1],
            a[0] + b[0] + c[0] + d[0],
            a[2] + b[2] + c[2] + d[2],
            a[3] + b[3] + c[3] + d[3],
            (a, b, c, d),
        )
        for a, b, c, d in snapshots
    ]
    # In falling order a candidate can only be exceeded by one before it.
    totals.sort(reverse=True)
    front: list[tuple[float, float, float, Snapshot]] = []
    for _, x, y, z, snapshot in totals:
        for most_x, most_y, most_z, _ in front:
            if most_x >= x and most_y >= y and most_z >= z:
                break
        else:
            front.append((x, y, z, snapshot))
    return tuple(entry[3] for entry in front)
