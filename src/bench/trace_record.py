"""A setup's trace as a record keeps it beside the measurement: its estimate and the memory along its step."""

from __future__ import annotations

from typing import Any

from bench import timeline
from planner.setup import TrainSetup
from planner.specs import Machine


def traced_record(setup: TrainSetup, machine: Machine, *, trust_remote_code: bool = False) -> dict[str, Any]:
    """`traced` (the estimate's JSON with `timeline`) and `trace_error`, one of them None.

    Whatever goes wrong in a trace is a finding, not the end of the measurement.
    """
    from bench.cli_trace import trace_with_bar

    try:
        found = trace_with_bar(setup, machine, trust_remote_code=trust_remote_code)
    except Exception as error:
        return {
            "traced": None,
            "trace_error": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}",
        }
    stretches = timeline.of_recording(found.result.timeline, found.workspace_bytes)
    return {
        "traced": {**found.estimate.to_json(), "timeline": timeline.to_json(stretches)},
        "trace_error": None,
    }
