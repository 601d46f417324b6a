"""Trace one setup: run its training step on fake tensors and say what was alive when."""

from __future__ import annotations

import gc
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import transformers
from torch import nn
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode

from bench.build import build_model, inner_model, load_config, one_line
from bench.optim import build_optimizer
from bench.quiet import quiet_libraries
from bench.ranks import rank_step
from bench.step import TrainStep
from bench.trace.batch import fake_batch
from bench.trace.cuda import WORKSPACES, cuda_rules
from bench.trace.depth import Depths, PhasePeak, choose_depths, layer_kinds, phase_peaks, shallow_config
from bench.trace.fakes import fill_with_fakes, hand_over_state, quantised_tensors
from bench.trace.ranks import RankTracker, fake_ranks, let_buckets_pass, unseen_propagation
from bench.trace.recording import CUDA_ROUNDING_BYTES, HOST, Recording, Storage
from bench.trace.resume import PHASE as RESUME
from bench.trace.resume import trace_resume
from bench.trace.scans import device_kernels
from bench.trace.stacks import apply_stack, stack_loss
from bench.trace.stitch import NotPeriodicError, stitch
from bench.trace.tracker import Tracker, layer_numbers
from planner.errors import FinefitError
from planner.lowering import LOSS_CHUNK_TOKENS
from planner.optimizers import find_optimizer
from planner.setup import TrainSetup
from planner.sharding import STRATEGIES

NUM_STEPS = 2
"""Optimizer states appear in the first step; the second one is the steady state."""
RESUME_STEP = NUM_STEPS + 1
MAX_MICRO_BATCHES = 2
"""From the second micro-batch on, gradients are there; more change nothing."""
NUM_LARGEST = 10
MAX_OPS_PER_LAYER = 10_000
"""Two steps of a layer with adapters and checkpointing take 1,000 to 3,000 operators; a loop over tokens takes more
time than anyone waits."""
MAX_OPS_PER_CHUNK = 500
"""Beside them: of a chunked loss in two steps of two micro-batches, forward and backward; it takes fewer than 100 a time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LiveTensor:
    """A storage that is alive at a peak, and what made it."""

    num_bytes: int
    shape: tuple[int, ...]
    dtype: str
    category: str
    op: str
    module: str


@dataclass(frozen=True, kw_only=True, slots=True)
class TraceResult:
    """What the traced step needs per GPU, in bytes of torch's allocator, without library workspaces.

    `phases` holds each phase's peak for the real number of layers. `timeline` has every allocation of all layers:
    as traced, or put together from the two shallow models that `depths` names. `peak_at` is its highest event in
    the last step, `largest` and `operator` are what was alive and what ran there.
    """

    phases: Mapping[str, PhasePeak]
    largest: tuple[LiveTensor, ...]
    operator: str
    module: str
    depths: Depths
    timeline: Recording
    peak_at: int

    @property
    def peak_phase(self) -> str:
        """The phase with the highest peak."""
        return max(self.phases, key=lambda name: self.phases[name].num_bytes)

    @property
    def peak_bytes(self) -> int:
        """The highest peak."""
        return self.phases[self.peak_phase].num_bytes

    @property
    def terms(self) -> Mapping[str, int]:
        """Bytes by category at the highest peak."""
        return self.phases[self.peak_phase].terms


Progress = Callable[[str, int, int], None]
"""Called with what is done next, and which of how many parts that is (from 0)."""


def trace(
    setup: TrainSetup, *, on_gpu: bool = True, all_layers: bool = False, progress: Progress | None = None
) -> TraceResult:
    """Trace two optimizer steps of `setup` on one rank.

    `on_gpu`: allocate as CUDA would; False: as this CPU's own kernels do. `all_layers` traces the whole depth;
    otherwise two shallow models stand for it.
    Raises what bench.build.build_model raises, and SetupError for an unknown optimizer.
    """
    find_optimizer(setup.optimizer)
    say = progress or _say_nothing
    with _quiet():
        say("the model's layers", 0, 3)
        config = load_config(setup, None)
        depths = _depths(setup, config)
        if all_layers:
            depths = Depths(depths.num_layers, None)
        recordings = _record_depths(setup, config, depths, on_gpu, say)
        try:
            steps = [recording.before(RESUME_STEP) for recording in recordings]
            timeline = stitch(steps, depths) if depths.shallow else steps[0]
        except NotPeriodicError:
            depths = Depths(depths.num_layers, None)
            recordings = _record_depths(setup, config, depths, on_gpu, say)
            timeline = recordings[0].before(RESUME_STEP)
    phases = phase_peaks(recordings, depths, NUM_STEPS)
    for phase, number in (("load", 0), (RESUME, RESUME_STEP)):
        phases |= {p: v for p, v in phase_peaks(recordings, depths, number).items() if p == phase}
    at = timeline.highest(NUM_STEPS)
    newest = timeline.storages[timeline.events[at]]
    return TraceResult(
        phases={name: phases[name] for name in REPORTED if name in phases},
        largest=tuple(_live_tensor(timeline, s) for s in timeline.live_at(at)[:NUM_LARGEST]),
        operator=newest.op,
        module=newest.module,
        depths=depths,
        timeline=timeline,
        peak_at=at,
    )


def _say_nothing(text: str, part: int, num_parts: int) -> None:
    pass


def _record_depths(
    setup: TrainSetup, config: Any, depths: Depths, on_gpu: bool, say: Progress
) -> tuple[Recording, ...]:
    recordings = []
    for part, layers in enumerate(depths.shallow or (depths.num_layers,), 1):
        say(f"the step with {layers} of {depths.num_layers} layers", part, 3)
        recordings.append(_record(_with_layers(setup, config, layers, depths), on_gpu))
    return tuple(recordings)


REPORTED = ("load", "forward", "loss", "backward", "optimizer", "save", "eval", RESUME)


def _live_tensor(recording: Recording, storage: Storage) -> LiveTensor:
    return LiveTensor(
        num_bytes=recording.size(storage),
        shape=storage.shape,
        dtype=storage.dtype,
        category=recording.category(storage),
        op=storage.op,
        module=storage.module,
    )


def _depths(setup: TrainSetup, config: Any) -> Depths:
    """The kinds of layers of the whole model decide; an encoder-decoder is traced whole."""
    plain = setup.with_(
        method="full",
        quant=None,
        checkpointing="none",
        optimizer_in_backward=False,
        padding_free=False,
        attention="eager",
    )
    model = build_model(plain, meta=True)
    numbers = layer_numbers(model, [name for name, _ in model.named_modules()])
    kinds = layer_kinds(model, numbers)
    if config.is_encoder_decoder or len(kinds) != _num_layers(config):
        return Depths(len(kinds), None)
    return choose_depths(kinds)


def _num_layers(config: Any) -> int:
    text = config.get_text_config()
    return int(getattr(text, "num_hidden_layers", 0))


def _with_layers(setup: TrainSetup, config: Any, num_layers: int, depths: Depths) -> TrainSetup:
    if num_layers == depths.num_layers:
        return setup
    text = config.get_text_config()
    key = text.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    values = shallow_config(config.to_dict(), num_layers, depths.num_layers, key)
    return setup.with_(model=values)


def _record(setup: TrainSetup, on_gpu: bool) -> Recording:
    try:
        return record(setup, on_gpu=on_gpu)
    except _STEP_ERRORS as error:
        if isinstance(error, DynamicOutputShapeException):
            error = RuntimeError(f"{error.func} gives a shape that depends on values")
        reason = one_line(error)
        raise FinefitError(f"{setup.model_label}: this model's step can't be traced: {reason}") from error


_STEP_ERRORS = (RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError)
"""What a model raises whose layers don't fit each other, or that asks a fake tensor for its values."""


def record(setup: TrainSetup, *, on_gpu: bool) -> Recording:
    """Run two optimizer steps, an evaluation of one batch and the moment of saving on fake tensors.

    With several ranks it is the first one's share.
    """
    answer = not (setup.packing and setup.attention != "flash")
    workspaces = WORKSPACES if on_gpu else {}
    tensors = FakeTensorMode(allow_non_fake_inputs=True)
    if setup.num_gpus == 1:
        return record_on(setup, Tracker(answer=answer, workspaces=workspaces), tensors, on_gpu=on_gpu)
    shared = RankTracker(answer=answer, workspaces=workspaces)
    with fake_ranks(setup.num_gpus), shared.resizes():
        return record_on(setup, shared, tensors, on_gpu=on_gpu)


def record_on(
    setup: TrainSetup,
    tracker: Tracker,
    tensors: AbstractContextManager[Any],
    *,
    on_gpu: bool,
    fill: Callable[[nn.Module], None] = fill_with_fakes,
) -> Recording:
    """The same on the tensors that are made inside `tensors`; several ranks need their process group.

    `fill` gives a model on the meta device its tensors.
    """
    model = build_model(setup, meta=True)
    apply_stack(setup, model)
    with _fake_step(setup, tracker, on_gpu), device_kernels(setup, model, on_gpu):
        with tensors, tracker:
            tracker.begin("load")
            fill(model)
            tracker.watch(model)
            _mark_weights(tracker, setup, model)
        step = _build_step(setup, model, tracker, tensors)
        if on_gpu:
            _choose_foreach(step.optimizer)
        num_layers = 1 + max(layer_numbers(model, [n for n, _ in model.named_modules()]).values(), default=-1)
        tracker.max_ops = _most_ops(setup, num_layers)
        with tensors, tracker:
            _run(step, tracker, setup)
            _mark_paged(tracker, setup, step.optimizer)
        # Nothing of finefit's resumes several ranks.
        if setup.num_gpus == 1 and not tracker.has_values:
            tracker.step = RESUME_STEP
            trace_resume(setup, step, tracker, tensors)
    config = inner_model(model).config.get_text_config()
    return tracker.recording(
        vocab_size=config.vocab_size,
        num_layers=num_layers,
        rounding_bytes=CUDA_ROUNDING_BYTES if on_gpu else 1,
    )


def _most_ops(setup: TrainSetup, num_layers: int) -> int:
    """More than any step takes that is worth waiting for."""
    num_chunks = 0 if setup.loss == "full" else setup.tokens_per_micro_batch // LOSS_CHUNK_TOKENS
    return MAX_OPS_PER_LAYER * max(1, num_layers) + MAX_OPS_PER_CHUNK * num_chunks


def _build_step(
    setup: TrainSetup, model: nn.Module, tracker: Tracker, tensors: AbstractContextManager[Any]
) -> TrainStep:
    loss = stack_loss(setup, model)
    if setup.num_gpus > 1:
        with tensors, tracker:
            if STRATEGIES[setup.sharding].shards_weights:
                # Whole weights stay on the host; the device gets a rank's share of them.
                _mark_all(tracker, model, HOST)
            tracker.begin("build")
            step = rank_step(setup, model, loss=loss, phase=tracker.phase)
            if not tracker.has_values:
                let_buckets_pass(step.model)
            tracker.begin("load")
            torch.empty(0)
            _mark_weights(tracker, setup, model)
    else:
        # An 8-bit optimizer computes its code books when it is built.
        with tracker:
            tracker.begin("build")
            optimizer = build_optimizer(setup, model)
        step = TrainStep(setup, model, optimizer, phase=tracker.phase)
        step.loss = loss or step.loss
    return step


def _run(step: TrainStep, tracker: Tracker, setup: TrainSetup) -> None:
    num_micro_batches = min(setup.grad_accum_steps, MAX_MICRO_BATCHES)
    num_trained = setup.tokens_per_micro_batch * num_micro_batches
    for tracker.step in range(1, NUM_STEPS + 1):
        tracker.begin("batch")
        batches = [fake_batch(setup, setup.micro_batch_size) for _ in range(num_micro_batches)]
        step(batches, num_items=num_trained)
        del batches
    tracker.begin("save")
    # Something must be allocated for a moment to be seen.
    torch.empty(0)
    tracker.begin("eval")
    step.phase = _no_phase
    step.model.eval()
    with torch.no_grad():
        rows = setup.eval_batch_size or setup.micro_batch_size
        # The first batch may leave gathered weights behind.
        for _ in range(2 if setup.num_gpus > 1 else 1):
            step.forward(fake_batch(setup, rows), rows * setup.seq_len)


def _no_phase(name: str) -> Any:
    return nullcontext()


def _mark_weights(tracker: Tracker, setup: TrainSetup, model: nn.Module) -> None:
    for name, module in reversed(list(model.named_modules())):
        for tensor in [*module.parameters(), *module.buffers(), *quantised_tensors(module)]:
            tracker.attribute(tensor, name)
    for tensor in [*model.buffers(), *quantised_tensors(model)]:
        tracker.mark(tensor, "weights")
    for parameter in model.parameters():
        trains_adapter = setup.uses_adapters and parameter.requires_grad
        tracker.mark(parameter, "adapters" if trains_adapter else "weights")
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(_grad_marker(tracker))


def _mark_all(tracker: Tracker, model: nn.Module, category: str) -> None:
    for parameter in model.parameters():
        tracker.mark(parameter, category)


def _grad_marker(tracker: Tracker) -> Any:
    def hook(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        tracker.mark(parameter.grad, "gradients")

    return hook


def _choose_foreach(optimizer: Any) -> None:
    """torch's optimizers take all tensors at once by default on CUDA, one by one on the CPU."""
    for group in optimizer.param_groups:
        if "foreach" in group and group["foreach"] is None and not group.get("fused"):
            group["foreach"] = True


def _mark_paged(tracker: Tracker, setup: TrainSetup, optimizer: Any) -> None:
    """States of large tensors are in managed memory, which the allocator doesn't see."""
    rule = find_optimizer(setup.optimizer)
    for inner in getattr(optimizer, "optimizers", [getattr(optimizer, "inner", optimizer)]):
        for parameter, state in inner.state.items():
            for name in ("state1", "state2"):
                if rule.is_on_host(parameter.numel()) and name in state:
                    tracker.mark(state[name], HOST)


@contextmanager
def _fake_step(setup: TrainSetup, tracker: Tracker, on_gpu: bool) -> Iterator[None]:
    """Everything that must be changed around a traced step, and is changed back."""
    with ExitStack() as stack:
        if on_gpu:
            stack.enter_context(cuda_rules(autocast=setup.autocast is not None))
        # transformers builds masks for fake tensors that it wouldn't build for real ones.
        stack.enter_context(mock.patch.object(transformers.masking_utils, "is_tracing", _never))
        if setup.num_gpus > 1:
            stack.enter_context(unseen_propagation(tracker))
        if setup.quant and not tracker.has_values:
            name = "bitsandbytes.nn.modules.fix_4bit_weight_quant_state_from_module"
            stack.enter_context(mock.patch(name, hand_over_state))
        # When the collector runs must not decide what is alive.
        gc.disable()
        stack.callback(gc.enable)
        yield


def _never(*_: Any) -> bool:
    return False


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers and PEFT warn about what a real run should heed, not a trace."""
    quiet_libraries()
    # An operator that fails on fake tensors is logged with its stack before it is raised.
    logging.getLogger(torch._subclasses.fake_tensor.__name__).setLevel(logging.CRITICAL)
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(verbosity)
