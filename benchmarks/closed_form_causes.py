"""Why the closed form and the trace differ where they are known to: first match wins."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Matches = Callable[[str, Mapping[str, Any]], bool]

CAUSES: tuple[tuple[Matches, str], ...] = ()
