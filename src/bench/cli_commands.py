"""bench's commands: each parses, calls and prints; heavy modules are imported inside."""

from __future__ import annotations

import click

COMMANDS: tuple[click.Command, ...] = ()
