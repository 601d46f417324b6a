"""One process per GPU for a run that asks for several: started, told to stop and waited for from here.

torchrun would do, but for two things that a run promises: it answers every failure with exit code 1, where an
interrupted run's is 33, and it ends ranks that are still saving. Its environment variables are used, so that a rank
can't tell who started it.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

from bench.signals import StopFlag, StopRequestedError
from bench.trace.processes import free_port
from planner.errors import FinefitError

GRACE_S = 20.0
"""How long the other ranks get to end by themselves when one has failed: some will wait for it for ever."""
INTERRUPTED_EXIT = 130
"""A second SIGINT (128 + its number)."""


class LostPeerError(FinefitError):
    """Another rank is gone: a consequence, never the cause."""


class RankError(FinefitError):
    """A rank that ended without an error of finefit's own, with its exit code."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class _Failure(NamedTuple):
    """What stopped a rank. Of several, the smallest is the cause: `weight` tells causes from consequences."""

    weight: int
    at_s: float
    error: Exception


_OWN, _DEATH, _UNEXPECTED, _CONSEQUENCE = range(4)


def is_rank() -> bool:
    """Whether this process was started as one of several ranks, by torchrun or from here."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


class PassedOnStop(StopFlag):
    """A stop of a process that waits for its ranks. All signals go on as SIGTERM: a terminal's SIGINT reaches the ranks
    by itself, and a second one would cut them short.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ranks: list[BaseProcess] = []

    def _handle(self, number: int, frame: Any) -> None:
        self.received = self.received or signal.Signals(number)
        for rank in self.ranks:
            if rank.is_alive():
                rank.terminate()


def run_ranks(
    stop: PassedOnStop, num_ranks: int, target: Callable[..., None], *args: Any, **options: Any
) -> None:
    """Run `target(*args, **options)` in `num_ranks` processes of this machine; both must be importable and plain.

    They end with this process however it ends. Raises the error of the rank that failed first, the others' being
    consequences: its FinefitError as it was, else RankError, or StopRequestedError where it was told to stop before it
    could listen.
    """
    context = multiprocessing.get_context("spawn")
    port = free_port()
    ranks: dict[Connection, BaseProcess] = {}
    for rank in range(num_ranks):
        receiver, sender = context.Pipe(duplex=False)
        environment = _environment(rank, num_ranks, port)
        process = context.Process(
            target=_run, name=f"rank {rank}", args=(environment, sender, target, args, options)
        )
        ranks[receiver] = process
        # Known before it lives, so that a signal that comes in between finds it.
        stop.ranks.append(process)
        process.start()
        sender.close()
        if stop():
            process.terminate()
    failures = _gather(ranks, stop)
    if failures:
        raise min(failures, key=lambda failure: failure[:2]).error


def _environment(rank: int, num_ranks: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


# --- in a rank


def _run(
    environment: Mapping[str, str],
    sender: Connection,
    target: Callable[..., None],
    args: tuple[Any, ...],
    options: Mapping[str, Any],
) -> None:
    """One rank: send None, or the _Failure that stopped it.

    It ends at once then: Python's own end would wait for the process group's threads, which may wait for a peer.
    """
    os.environ |= environment
    threading.Thread(target=_end_with_parent, daemon=True).start()
    failure = _failure_of(target, args, options)
    sender.send(failure)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0 if failure is None else 1)


def _end_with_parent() -> None:
    """A rank that outlives the process that locked the run's folder could write into the next session's."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))


def _failure_of(
    target: Callable[..., None], args: tuple[Any, ...], options: Mapping[str, Any]
) -> _Failure | None:
    try:
        target(*args, **options)
    except LostPeerError as error:
        return _Failure(_CONSEQUENCE, time.monotonic(), error)
    except FinefitError as error:
        return _Failure(_OWN, time.monotonic(), error)
    except KeyboardInterrupt:
        return _Failure(_OWN, time.monotonic(), RankError("interrupted", INTERRUPTED_EXIT))
    except Exception as error:
        return _Failure(_UNEXPECTED, time.monotonic(), _described(error))
    return None


def _described(error: Exception) -> RankError:
    detail = f"{type(error).__name__}: {error}".partition("\n")[0]
    name = multiprocessing.current_process().name
    described = RankError(
        f"{name}: unexpected error ({detail:.200}); the same command with --debug shows where"
    )
    described.add_note(traceback.format_exc())
    return described


# --- in the process that started them


def _gather(ranks: Mapping[Connection, BaseProcess], stop: StopFlag) -> list[_Failure]:
    """Every rank's failure; after the first, ranks that don't end within GRACE_S are killed."""
    left = dict(ranks)
    failures: list[_Failure] = []
    deadline: float | None = None
    while left:
        ready = wait(list(left), timeout=deadline and max(0.0, deadline - time.monotonic()))
        if not ready:
            _kill(left.values())
            break
        for connection in ready:
            assert isinstance(connection, Connection)
            failure = _answer(connection, left.pop(connection), stop)
            if failure is not None:
                failures.append(failure)
                deadline = deadline or time.monotonic() + GRACE_S
    return failures


def _kill(processes: Any) -> None:
    for process in processes:
        process.kill()
        process.join()


def _answer(connection: Connection, process: BaseProcess, stop: StopFlag) -> _Failure | None:
    try:
        failure: _Failure | None = connection.recv()
    except EOFError:
        process.join()
        return _Failure(_DEATH, time.monotonic(), _death(process, stop))
    process.join()
    return failure


def _death(process: BaseProcess, stop: StopFlag) -> Exception:
    code = process.exitcode or 0
    if stop() and code == -signal.SIGTERM:
        return StopRequestedError()
    known = -code in set(signal.Signals)
    how = f"ended by {signal.Signals(-code).name}" if known else f"ended with exit code {code}"
    hint = " (the system does that when memory runs out)" if code == -9 else ""
    return RankError(f"{process.name} was {how}{hint}; the same command resumes from the last checkpoint")
