"""Programs of the speed benchmarks, each in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def turns(names: Sequence[str], repetitions: int) -> list[str]:
    """Forwards, then backwards, so that a machine that slows down slows down all."""
    return [name for n in range(repetitions) for name in (names if n % 2 == 0 else names[::-1])]


def run_child(
    script: str,
    case: str,
    name: str,
    options: Sequence[str],
    *,
    about: Mapping[str, Any],
    environment: Mapping[str, str],
    say: Callable[[dict[str, Any]], str],
    timeout_s: float | None = None,
) -> dict[str, Any]:
    """`script --child CASE NAME` with more options: the last line that it prints, as JSON, with `about`; what it says of
    a failure where it fails. `say` makes of its figures what is shown meanwhile.
    """
    started = time.time()
    everything = {**os.environ, "HF_HUB_OFFLINE": "1", "SPEED_STARTED": str(started), **environment}
    command = [sys.executable, script, "--child", case, name, *options]
    found = _figures(command, everything, timeout_s)
    print(f"{case} {name}: {found.get('failure') or say(found)}", file=sys.stderr, flush=True)
    return {**about, **found, "child_s": time.time() - started}


def _figures(command: list[str], environment: dict[str, str], timeout_s: float | None) -> dict[str, Any]:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env=environment, timeout=timeout_s
        )
    except subprocess.TimeoutExpired:
        return {"failure": f"not done after {timeout_s:.0f} s"}
    if done.returncode:
        lines = done.stderr.strip().splitlines()[-TAIL:]
        return {"failure": lines[-1] if lines else "killed", "stderr": lines}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


TAIL = 30
"""Lines of a failure that are kept."""
