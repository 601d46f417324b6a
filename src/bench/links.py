"""How fast devices of this machine exchange gradients: an all-reduce between real processes."""

from __future__ import annotations

import multiprocessing
import os
import statistics
import time
from typing import Any

import torch

from bench.trace.processes import free_port

NUM_CALLS = 15
TIMEOUT_S = 120.0


def exchange_bytes_per_s(device: torch.device, num_bytes: int) -> tuple[float, float, int] | None:
    """Bytes per second that each of two ranks sends in an all-reduce, the spread (IQR over median), and the calls.

    None where this machine has one device only. Two processors' ranks share this machine's cores, as a run's do.
    Raises queue.Empty where a rank hangs or fails.
    """
    count = torch.cuda.device_count() if device.type == "cuda" else os.cpu_count() or 1
    if count < 2:
        return None
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    port = free_port()
    ranks = [
        context.Process(target=_rank, args=(rank, port, device.type, num_bytes, queue)) for rank in (0, 1)
    ]
    for rank in ranks:
        rank.start()
    try:
        answers = [queue.get(timeout=TIMEOUT_S) for _ in ranks]
    finally:
        for rank in ranks:
            rank.join(timeout=10)
            rank.kill()
    times = max(answers, key=statistics.median)
    low, _, high = statistics.quantiles(times, n=4)
    median = statistics.median(times)
    # A ring of two sends half of it and receives the other's sum of that half, then again.
    return num_bytes / median, (high - low) / median, len(times)


def _rank(rank: int, port: int, kind: str, num_bytes: int, queue: Any) -> None:
    import torch.distributed as dist

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    buffer = torch.ones(num_bytes // 4, device=device)
    times = []
    for _ in range(NUM_CALLS + 2):
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(buffer)
        if kind == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    dist.destroy_process_group()
    queue.put(times[2:])
