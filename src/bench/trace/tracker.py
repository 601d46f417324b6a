"""Records every storage that an operator makes, until the last tensor lets go of it."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from bench.trace.recording import HOST, Mark, Recording, Storage
from planner.errors import NotModelledError

aten = torch.ops.aten
_DEVICE = torch.ops.prim.device.default

Workspace = Callable[..., list[torch.Tensor]]
"""Called with an operator's arguments: the buffers that its CUDA kernel holds while it runs."""


class Tracker(TorchDispatchMode):  # type: ignore[misc]
    """Inside `with tracker:`, every operator's new storages are recorded; their end is noted when they die.

    Fake tensors have no values. Where code asks for one (`.item()`, `if tensor:`), it gets 1 for a number (a step
    counter must not be 0), `answer` for a truth value, and 0 for a loss scaler's overflow flag.
    """

    has_values = False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled in here, and the guard around each operator costs as much as recording it."""
        return False

    def __init__(self, *, answer: bool = True, workspaces: dict[str, Workspace] | None = None) -> None:
        super().__init__()
        self.answer, self.workspaces = answer, workspaces or {}
        self.storages: list[Storage] = []
        self.events: list[int] = []
        self.marks: list[Mark] = []
        self.recompute_ends: list[int] = []
        self.num_ops = 0
        self.max_ops: int | None = None
        self.step = 0
        self.current_phase = ""
        self.is_paused = False
        self._live: dict[int, Storage] = {}
        self._flags: set[int] = set()
        self._modules: list[str] = []
        self._layers: dict[str, int] = {}
        self._recompute: int | None = None

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """The training step's phase callback. A phase lasts until the next one begins."""
        self.begin(name)
        yield

    def begin(self, name: str) -> None:
        """From here on the run is in phase `name` of the current `step`."""
        self._end_recompute()
        self.current_phase = name
        self.marks.append(Mark(len(self.events), self.step, name))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operator and register what it made."""
        kwargs = kwargs or {}
        if self.is_paused:
            return func(*args, **kwargs)
        if func is _DEVICE:
            return args[0].fake_device
        if not self.has_values and func is aten._local_scalar_dense.default:
            return self._value(args[0])
        if not self.has_values and func is aten.equal.default:
            return True
        self._note_recompute()
        if func is aten.add.Tensor and len(args) == 2 and _is_spare_gradient(args[0], sys._getframe(1)):
            func = aten.add_.Tensor
        held = self._hold_workspace(func, args, kwargs)
        out = func(*args, **kwargs)
        self._count_op()
        name = func._schema.name.partition("::")[2]
        made = [tensor for tensor in tree_flatten(out)[0] if isinstance(tensor, torch.Tensor)]
        for position, tensor in enumerate(made):
            self._register(tensor, name, _source(args, position, len(made)))
        del held
        if func is aten._amp_foreach_non_finite_check_and_unscale_.default:
            self._flags.add(args[1].untyped_storage()._cdata)
        return out

    def _count_op(self) -> None:
        self.num_ops += 1
        if self.max_ops is not None and self.num_ops > self.max_ops:
            raise NotModelledError(
                f"trace: {self._module() or 'the model'} runs operators without end, as a loop over tokens does; "
                "a shorter seq_len can be traced"
            )

    def _value(self, tensor: torch.Tensor) -> bool | float | int:
        if tensor.dtype == torch.bool:
            return self.answer
        number = 0 if tensor.untyped_storage()._cdata in self._flags else 1
        return float(number) if tensor.dtype.is_floating_point else number

    def _hold_workspace(self, func: Any, args: Any, kwargs: Any) -> list[torch.Tensor]:
        workspace = self.workspaces.get(func._schema.name)
        if workspace is None:
            return []
        buffers = workspace(*args, **kwargs)
        for buffer in buffers:
            self._register(buffer, func._schema.name.partition("::")[2])
        return buffers

    def _register(self, tensor: torch.Tensor, op: str, source: Any = None) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._live:
            dtype = str(tensor.dtype).removeprefix("torch.")
            self.register_storage(storage, op, tuple(tensor.shape), dtype, source)
            # The step's own tensors are all on the CPU: another device stands for the host.
            if tensor.device.type != "cpu":
                self.mark(tensor, HOST)

    def register_storage(
        self,
        storage: torch.UntypedStorage,
        op: str,
        shape: tuple[int, ...] = (),
        dtype: str = "uint8",
        source: Any = None,
    ) -> None:
        """Record a storage that `op` has made, or filled again."""
        key = storage._cdata
        module = self._module()
        layer = self._layer_of(module)
        record = Storage(
            number=len(self.storages),
            num_bytes=storage.nbytes(),
            shape=shape,
            dtype=dtype,
            op=op,
            module=module,
            layer=layer,
            phase=self.current_phase,
            step=self.step,
            allocated_at=len(self.events),
            recompute=self._recompute,
            owner=layer if module else self._owner_of(source),
        )
        # torch.tensor(number) lies in host memory unless it is sent to the device.
        if op == "lift_fresh":
            record.category = HOST
        self.storages.append(record)
        self._live[key] = record
        self.events.append(record.number)
        weakref.finalize(storage, self._free, key, record).atexit = False

    def forget(self, storage: torch.UntypedStorage) -> None:
        """A storage has been emptied, though tensors still refer to it."""
        record = self._live.get(storage._cdata)
        if record is not None:
            self._free(storage._cdata, record)

    def _free(self, key: int, record: Storage) -> None:
        if record.freed_at is not None:
            return
        if self._live.get(key) is record:
            del self._live[key]
        record.freed_at = len(self.events)
        self.events.append(~record.number)

    def mark(self, tensor: torch.Tensor, category: str) -> None:
        """Say what a tensor's storage is for."""
        record = self._live.get(tensor.untyped_storage()._cdata)
        if record is not None:
            record.category = category

    def attribute(self, tensor: torch.Tensor, module: str) -> None:
        """Say whose a tensor's storage is: a parameter is made before its module is called."""
        record = self._live.get(tensor.untyped_storage()._cdata)
        if record is not None and not record.module:
            record.module, record.owner = module, self._layer_of(module)

    def _owner_of(self, source: Any) -> int | None:
        """Outside any module (in an optimizer), what is made from a layer's tensor is that layer's."""
        if not isinstance(source, torch.Tensor):
            return None
        record = self._live.get(source.untyped_storage()._cdata)
        return None if record is None else record.owner

    def recording(self, *, vocab_size: int, num_layers: int, rounding_bytes: int) -> Recording:
        """What was recorded so far."""
        self._end_recompute()
        return Recording(
            storages=tuple(self.storages),
            events=tuple(self.events),
            marks=tuple(self.marks),
            recompute_ends=tuple(self.recompute_ends),
            vocab_size=vocab_size,
            num_layers=num_layers,
            num_ops=self.num_ops,
            rounding_bytes=rounding_bytes,
        )

    # Recomputation runs inside the backward, but with gradients enabled; a kernel's own autograd function
    # disables them again, so a module that is being called counts too.

    def _note_recompute(self) -> None:
        is_recomputing = self.current_phase == "backward" and (torch.is_grad_enabled() or bool(self._modules))
        if not is_recomputing:
            self._end_recompute()
        elif self._recompute is None:
            self._recompute = len(self.recompute_ends)
            self.recompute_ends.append(len(self.events))

    def _end_recompute(self) -> None:
        if self._recompute is not None:
            self.recompute_ends[self._recompute] = len(self.events)
            self._recompute = None

    # Which module made it: in a forward the innermost one that is being called; in a backward the one whose
    # forward made the autograd node, told by a label on the node.

    def watch(self, model: nn.Module) -> None:
        """Attribute what is made in `model`'s forward and backward to its modules."""
        names = [name for name, _ in model.named_modules()]
        self._layers = layer_numbers(model, names)
        for name, module in model.named_modules():
            module.register_forward_pre_hook(self._enter(name), with_kwargs=True)
            # Checkpointing leaves modules by an exception once everything it needs is recomputed.
            module.register_forward_hook(self._leave(name), always_call=True)
            if hasattr(module, "_gradient_checkpointing_func"):
                checkpoint = self._checkpoint(name, module._gradient_checkpointing_func)
                module._gradient_checkpointing_func = checkpoint

    def _checkpoint(self, name: str, checkpoint: Callable[..., Any]) -> Callable[..., Any]:
        """Recomputation calls a layer's forward without the layer's hooks (transformers/modeling_layers.py)."""

        def inside(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            self._modules.append(name)
            try:
                output = function(*args, **kwargs)
                label_graph(output, name)
                return output
            finally:
                self._modules.pop()

        return lambda function, *args, **kwargs: checkpoint(partial(inside, function), *args, **kwargs)

    def _enter(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            # What led to the inputs was made by the caller.
            label_graph((args, kwargs), self._modules[-1] if self._modules else "")
            self._modules.append(name)

        return hook

    def _leave(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            label_graph(output, name)
            self._modules.pop()

        return hook

    def _module(self) -> str:
        if self._modules:
            return self._modules[-1]
        node = torch._C._current_autograd_node()
        return node.metadata.get("module", "") if node is not None else ""

    def _layer_of(self, module: str) -> int | None:
        return self._layers.get(module)


def _source(args: Any, position: int, num_made: int) -> Any:
    """The argument that output number `position` was made from: of a list operator its own one."""
    first = args[0] if args else None
    if isinstance(first, (list, tuple)):
        return first[position] if len(first) == num_made else None
    return first


def _is_spare_gradient(gradient: Any, caller: Any) -> bool:
    """Whether autograd, adding a second gradient of the same tensor, would write over this first one.

    It does where it holds the last reference to the tensor and its storage (torch/csrc/autograd/input_buffer.cpp,
    can_accumulate_inplace), but never under a dispatch mode, as here. `caller` called the operator: the engine.
    """
    if caller.f_code is not _ENGINE or torch.is_grad_enabled():
        return False
    storage = gradient.untyped_storage()._cdata
    counts = (sys.getrefcount(gradient), gradient._use_count(), torch._C._storage_Use_Count(storage))
    return all(count <= last for count, last in zip(counts, _LAST_REFERENCES, strict=True))


_ENGINE = torch.autograd.graph._engine_run_backward.__code__
_LAST_REFERENCES = (4, 4, 2)
"""What the counts of a gradient come to that only the engine holds, with those of the dispatch itself (torch 2.13)."""


def label_graph(output: Any, name: str) -> None:
    """Label the autograd nodes behind `output` that no inner module has labelled."""
    tensors = (t for t in tree_flatten(output)[0] if isinstance(t, torch.Tensor))
    todo = [t.grad_fn for t in tensors if t.grad_fn is not None]
    while todo:
        node = todo.pop()
        if node is None or "module" in node.metadata:
            continue
        node.metadata["module"] = name
        todo += [following for following, _ in node.next_functions]


def layer_numbers(model: nn.Module, names: list[str]) -> dict[str, int]:
    """For each module inside a stack of layers, the layer's number.

    A stack is a ModuleList in no other ModuleList; those of an encoder and a decoder count on.
    """
    numbers: dict[str, int] = {}
    start, inside = 0, ""
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or (inside and name.startswith(inside)):
            continue
        inside = f"{name}."
        for number, _ in enumerate(module):
            layer = f"{name}.{number}"
            numbers |= {n: start + number for n in names if n == layer or n.startswith(f"{layer}.")}
        start += len(module)
    return numbers
