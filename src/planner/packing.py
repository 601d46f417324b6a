"""Which documents share a sequence."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence


def pack(lengths: Sequence[int], seq_len: int) -> list[list[int]]:
    """Indices of `lengths` in rows of at most `seq_len` tokens, by best-fit decreasing.

    Each document, the longest first, goes to the fullest row that still holds it. Raises ValueError for a longer one.
    """
    rows: list[list[int]] = []
    rows_with_room: dict[int, list[int]] = {}
    rooms: list[int] = []
    for number in sorted(range(len(lengths)), key=lambda n: (-lengths[n], n)):
        length = lengths[number]
        if length > seq_len:
            raise ValueError(f"document {number} has {length} tokens, more than seq_len {seq_len}")
        at = bisect_left(rooms, length)
        if at == len(rooms):
            rows.append([])
            row, room = len(rows) - 1, seq_len
        else:
            room = rooms[at]
            row = rows_with_room[room].pop()
            if not rows_with_room[room]:
                del rows_with_room[room], rooms[at]
        rows[row].append(number)
        left = room - length
        if left not in rows_with_room:
            insort(rooms, left)
        rows_with_room.setdefault(left, []).append(row)
    return rows
