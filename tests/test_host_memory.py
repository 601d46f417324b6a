"""What a process keeps of freed memory."""

from __future__ import annotations

from bench import host_memory
from bench.host_memory import FIRST_STEPS, GROWTH, KeptMemory


def test_memory_is_given_back_once_steps_leave_much_more_than_the_first(monkeypatch):
    given_back = []
    monkeypatch.setattr(host_memory, "give_back_freed_memory", lambda: given_back.append(True))
    kept = KeptMemory()
    for rss_bytes in (100, 900, 1000)[:FIRST_STEPS]:
        kept("step", {"rss_bytes": rss_bytes})
    kept("eval", {"rss_bytes": 10_000})
    kept("step", {})
    kept("step", {"rss_bytes": int(1000 * GROWTH)})
    assert not given_back
    kept("step", {"rss_bytes": int(1000 * GROWTH) + 1})
    assert given_back == [True]
    kept.close()
