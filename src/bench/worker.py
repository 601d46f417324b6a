"""The process that measures one setup: `python -m bench.worker FOLDER` reads the job there and reports events.

Builds the model, optimizer and batches that training builds, takes THE training step, evaluates and saves once.
A fresh process for each measurement, because allocators remember what ran before.
"""

from __future__ import annotations

import gc
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import timeline
from bench.host import peak_rss_bytes, reset_peak_rss, rss_bytes
from bench.host_memory import KeptMemory, keep_freed_memory, kept_bytes
from bench.jobs import EVENTS_FILE, EventWriter, Job
from bench.sample_rows import eval_examples, random_data, worst_batch
from bench.timeline import StepLog
from planner.errors import FinefitError

if TYPE_CHECKING:
    from bench.rundata import RunData

_OOM_WORDS = ("can't allocate memory", "out of memory")
"""What torch's CPU allocator, CUDA's libraries and bitsandbytes say in a plain RuntimeError."""


def main(arguments: Sequence[str]) -> int:
    """Run the job of a folder; 0 when it was measured, 1 when an error event says why not."""
    folder = Path(arguments[0])
    die_first()
    with (folder / EVENTS_FILE).open("w", encoding="utf-8") as file:
        emit = EventWriter(file)
        try:
            Worker(Job.read(folder), emit).run()
        except FinefitError as error:
            emit("error", is_oom=False, text=str(error))
            return 1
        except Exception as error:
            emit("error", is_oom=is_out_of_memory(error), text=_one_line(error))
            raise
    return 0


def die_first() -> None:
    """Ask Linux to end this process rather than another one when memory runs out; elsewhere nothing happens."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on the device or on the host."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _OOM_WORDS)


def state_bytes(state: Any, device: Any) -> int:
    """Bytes of an optimizer's tensors on the device; paged states lie in memory that the device only borrows."""
    if hasattr(state, "untyped_storage"):
        is_here = state.device.type == device.type and not getattr(state, "is_paged", False)
        return state.numel() * state.element_size() if is_here else 0
    children = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else ()
    return sum(state_bytes(child, device) for child in children)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:500]


class Worker:
    """One job from start to end; everything that is found out goes through `emit` at once."""

    def __init__(self, job: Job, emit: EventWriter) -> None:
        self.job, self.setup, self.emit = job, job.setup, emit
        self.host_bytes = 0
        self.gradient_bytes: int | None = None
        self.kept_memory = KeptMemory()

    def run(self) -> None:
        """All phases in order; the peaks so far are reported also when one of them fails."""
        self.phase("start")
        self.import_everything()
        self.phase("load")
        self.load()
        try:
            self.take_steps()
            self.phase("memory")
            self.measure_memory()
            self.evaluate_and_save()
        finally:
            self.report_peaks()
            self.read_host_peak()
        self.phase("done")

    def phase(self, name: str) -> None:
        """Say that a phase begins; stop if nobody is left to listen."""
        self.check_parent()
        self.emit("phase", name=name)

    def check_parent(self) -> None:
        """An orphaned worker must not go on taking the machine."""
        if self.job.parent_pid is not None and os.getppid() != self.job.parent_pid:
            sys.exit("the process that wanted this measurement is gone")

    def import_everything(self) -> None:
        """Import what training imports, so that what the process holds before the model is known."""
        import peft  # noqa: F401
        import torch

        from bench import checkpoint, evaluate, rundata  # noqa: F401
        from bench.build import check_runnable
        from bench.meters import CudaCounter, LiveTensors, describe_device
        from bench.rank_laws import check_one_process

        check_one_process(self.setup)
        # As a run does: it decides both the time of a step on the CPU and what stays resident.
        keep_freed_memory()
        self.device = torch.device(self.job.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        check_runnable(self.setup, self.device)
        self.live = None if self.device.type == "cuda" else LiveTensors()
        self.counter = self.live or CudaCounter(self.device)
        self.emit("device", **describe_device(self.device))
        self.emit("memory", baseline_host_bytes=self.read_host_peak())

    def load(self) -> None:
        """Model, optimizer, data and the step itself."""
        from bench.build import AUTO_CLASSES, build_model
        from bench.meters import PhaseMeter
        from bench.optim import build_optimizer, build_schedule
        from bench.remote_code import trust_code
        from bench.step import TrainStep

        if self.job.trust_remote_code:
            trust_code(self.setup, AUTO_CLASSES[self.setup.objective])

        weights = self.find_weights()
        self.meter = PhaseMeter(self.counter)
        with self.meter("load"):
            self.model = build_model(self.setup, weights=weights, device=self.device)
            self.count_all_tensors()
        if self.job.has_stand_ins:
            self.counter.forget()
            self.meter = PhaseMeter(self.counter)
        gc.collect()
        self.loaded_bytes = self.counter.now_bytes()
        self.optimizer = build_optimizer(self.setup, self.model)
        protocol = self.job.protocol
        # Two steps more than are timed at most: one with the longest rows, and on a GPU one more that is traced.
        schedule = build_schedule(self.setup, protocol.max_warmup + protocol.max_steps + 2)
        self.step = TrainStep(self.setup, self.model, self.optimizer, schedule=schedule)
        self.data = self.load_data()
        self.read_host_peak()

    def find_weights(self) -> Path | None:
        """The folder of the model's weights, None for random ones."""
        if self.setup.from_scratch or self.job.random_weights or not isinstance(self.setup.model, str):
            return None
        from bench.weights import local_model

        return local_model(self.setup.model, revision=self.setup.revision)

    def count_all_tensors(self) -> None:
        """On the CPU, take in what was made while nobody counted."""
        if self.live is not None:
            self.live.add(gc.get_objects())

    def load_data(self) -> RunData:
        """The setup's data; without any, random rows of the full length: the worst case."""
        from bench.reference import without_reference
        from bench.rundata import load_run_data
        from bench.weights import load_tokenizer

        if not self.setup.data:
            return random_data(self.setup, self.model)
        return without_reference(load_run_data(self.setup, load_tokenizer(self.setup)))

    def take_steps(self) -> None:
        """Warm-up, then the timed steps; on CUDA their peaks come along at no cost."""
        if self.live is None:
            self.step.phase = self.meter
        protocol = self.job.protocol
        self.phase("warmup")
        reset_peak_rss()
        warmup: list[float] = []
        while not protocol.is_warm(warmup):
            warmup.append(self.timed_step())
        gc.collect()
        self.phase("steps")
        measured: list[float] = []
        while not protocol.is_measured(measured):
            measured.append(self.timed_step())
        resident_bytes = self.read_host_peak()
        if self.live is not None:
            self.emit("memory", device_used_bytes=resident_bytes, freed_bytes=kept_bytes())

    def timed_step(self) -> float:
        """One optimizer step by the wall's and by the processors' clock, with nothing else inside; wall seconds."""
        batch = self.data.step_batch(self.step.num_steps_done, self.device)
        self.synchronize()
        wall, cpu = time.perf_counter(), time.process_time()
        result = self.step(batch.micro_batches, num_items=batch.num_items)
        self.synchronize()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        self.emit(
            "step",
            wall_s=wall,
            cpu_s=cpu,
            num_tokens=batch.num_tokens,
            num_trained_tokens=batch.num_trained_tokens,
            loss=float(result.loss),
        )
        resident_bytes, _ = rss_bytes(os.getpid())
        if resident_bytes is not None:
            self.kept_memory("step", {"rss_bytes": resident_bytes})
        self.check_parent()
        return wall

    def synchronize(self) -> None:
        """Wait for the device, so that a clock shows finished work."""
        if self.device.type == "cuda":
            import torch

            torch.cuda.synchronize(self.device)

    def measure_memory(self) -> None:
        """One untimed step with the longest rows: peaks by phase, bytes by term, memory along the step.

        Tensors that are counted one by one cost time, which is why no timed step does it.
        """
        if self.setup.compile:
            self.emit("note", text="compiled layers hide their tensors: no memory along the step")
            self.live = None
        log = StepLog()
        self.count_all_tensors()
        batch = worst_batch(self.data, self.device)
        if self.live is not None:
            self.step.phase = log.within(self.meter)
            self.live.log = log
        self.step.on_gradients = self.note_gradients
        with self.live or nullcontext():
            self.step(batch.micro_batches, num_items=batch.num_items)
        self.step.on_gradients = None
        self.report_terms()
        if self.device.type == "cuda" and not self.setup.compile:
            self.trace_on_card(log)
        self.emit("timeline", stretches=timeline.to_json(timeline.thin(log.stretches)))

    def trace_on_card(self, log: StepLog) -> None:
        """One more step, with the allocator asked after each operator.

        The measurement is done by now: a kernel that can't be watched so costs the picture, and the record says it.
        """
        from bench.meters import AllocatedAfterEach

        batch = worst_batch(self.data, self.device)
        self.step.phase = log.within(self.meter)
        try:
            with AllocatedAfterEach(self.device, log):
                self.step(batch.micro_batches, num_items=batch.num_items)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            log.stretches.clear()
            self.optimizer.zero_grad(set_to_none=True)
            self.emit("note", text=f"no memory along the step: {_one_line(error)}")

    def note_gradients(self, model: Any) -> None:
        """Count the gradients where they are all there, before they are clipped."""
        from bench.build import trained_parameters

        grads = [p.grad for p in trained_parameters(model).values() if p.grad is not None]
        self.gradient_bytes = sum(grad.numel() * grad.element_size() for grad in grads)

    def report_terms(self) -> None:
        """Bytes of what stays from step to step, and of the gradients."""
        from bench.build import trained_parameters

        trained = sum(p.numel() * p.element_size() for p in trained_parameters(self.model).values())
        adapters = trained if self.setup.uses_adapters else 0
        terms = {
            "weights": self.loaded_bytes - adapters,
            "adapters": adapters,
            "optimizer": state_bytes(self.optimizer.state_dict(), self.device),
        }
        if self.gradient_bytes is not None:
            terms["gradients"] = self.gradient_bytes
        self.emit("memory", terms=terms)

    def evaluate_and_save(self) -> None:
        """One batch of evaluation and one checkpoint, as they happen during training."""
        from bench.evaluate import evaluate
        from bench.step import no_phase

        self.step.phase = no_phase
        if self.live is not None:
            self.live.log = None
        self.phase("eval")
        self.synchronize()
        start = time.perf_counter()
        with self.live or nullcontext(), self.meter("eval"):
            evaluate(self.step, eval_examples(self.data), pad_id=self.data.pad_id)
        self.synchronize()
        self.emit("memory", eval_s=time.perf_counter() - start)
        self.phase("save")
        start = time.perf_counter()
        with self.live or nullcontext(), self.meter("save"):
            is_saved = self.save()
        if is_saved:
            self.emit("memory", save_s=time.perf_counter() - start)

    def save(self) -> bool:
        """Write one checkpoint to a temporary folder, if the disk has room for it; whether it was written."""
        from bench.build import trained_parameters
        from bench.checkpoint import check_disk, save_checkpoint, tensor_bytes

        weights = {name: p.detach() for name, p in trained_parameters(self.model).items()}
        state = {"optimizer": self.optimizer.state_dict()}
        with tempfile.TemporaryDirectory(prefix="finefit-bench-") as folder:
            try:
                check_disk(Path(folder), 2 * (tensor_bytes(weights) + tensor_bytes(state)))
            except FinefitError as error:
                self.emit("note", text=f"no checkpoint was written: {error}")
                return False
            save_checkpoint(Path(folder), 1, weights, state)
        return True

    def report_peaks(self) -> None:
        """What the device's memory showed so far; on the CPU only once a step was counted."""
        if self.live is not None and "backward" not in self.meter.phases:
            return
        peaks = {"peak_allocated_bytes": self.meter.peak_bytes, **self.counter.more_peaks()}
        self.emit("memory", **peaks, phases=self.meter.phases)
        for doubt in self.counter.doubts():
            self.emit("note", text=doubt)

    def read_host_peak(self) -> int:
        """The highest resident set since the last reset, in bytes."""
        resident_bytes = peak_rss_bytes() or 0
        self.host_bytes = max(self.host_bytes, resident_bytes)
        self.emit("memory", host_bytes=self.host_bytes)
        return resident_bytes


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
