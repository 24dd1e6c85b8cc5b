"""Inference in the quickest form that works: packed weights, quicker forms of the layers, one CUDA graph per shape."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from vlahub.distributed import is_sharded
from vlahub_policies.parts.capture import Captured
from vlahub_policies.parts.packing import unpack

MODES = ("off", "graph", "compile")  # plain; one CUDA graph per shape; of compiled layers


class Quick(dict):
    """For a class of layers, what is called instead as quick[type(layer)](layer, *inputs). A copy of a module gets none: it has weights of its own."""

    def __deepcopy__(self, memo: dict) -> Quick:
        return Quick()

    def __reduce__(self) -> tuple:
        return Quick, ()


def through(quick: Quick, recompute: bool, layer: nn.Module, *inputs: Any) -> Any:
    """Run a layer: with gradients keeping, or recomputing, what the backward pass needs; without in its quick form if it has one."""
    if torch.is_grad_enabled():
        return checkpoint(layer, *inputs, use_reentrant=False) if recompute else layer(*inputs)
    form = quick.get(type(layer))
    return form(layer, *inputs) if form else layer(*inputs)


def compiled(kind: type[nn.Module], **options: Any) -> Callable:
    """A layer class's forward, compiled once for every set of shapes. `options` are arguments of the forward that stay the same."""
    function = torch.compile(kind.forward, dynamic=False)

    def run(layer: nn.Module, *inputs: Any) -> Any:
        with torch._dynamo.config.patch(recompile_limit=64):  # batch sizes, numbers of cameras, prompt lengths
            return function(layer, *inputs, **options)

    return run


class Acceleration:
    """Calls `function(inputs)`, a dict of tensors -> a dict of tensors, of a policy that lies on a GPU; elsewhere, and where gradients are wanted, as it is.

    `modes` are the values of `policy.config.acceleration`, "off" first, each falling back to the one before it with a warning where it fails on this machine. But for
    "off", each is a CUDA graph per shape with packed weights (`pack`), of the layers in the forms that `quick(policy, mode)` gives. The modules that run layers hold
    them as their `quick`.
    """

    def __init__(
        self,
        policy: nn.Module,
        function: Callable[[dict], dict],
        pack: Callable[[nn.Module], None],
        quick: Callable[[nn.Module, str], Mapping[type, Callable]],
        modes: tuple[str, ...] = MODES,
    ):
        self.policy, self.function, self.pack, self.quick, self.modes = policy, function, pack, quick, modes
        self.release()

    def __call__(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if next(self.policy.parameters()).device.type != "cuda" or torch.is_grad_enabled() or is_sharded(self.policy):  # sharded parameters come and go
            return self.function(inputs)
        if self._config is not self.policy.config:
            self.release()
            self._config, self._mode = self.policy.config, self.policy.config.acceleration
        while self._mode != "off":
            try:
                if self._captured is None:
                    self.pack(self.policy)
                    self._equip(self.quick(self.policy, self._mode))
                    self._captured = Captured(self.function)
                return self._captured(inputs)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # whatever a compiler or driver objects to: the next form is slower, not wrong
                slower = self.modes[self.modes.index(self._mode) - 1]
                reason = (str(error) or type(error).__name__).splitlines()[0]
                warnings.warn(f"acceleration={self._mode!r} failed, continuing with {slower!r}: {reason}", RuntimeWarning, stacklevel=3)
                self._equip({})
                self._captured, self._mode = None, slower
        return self.function(inputs)

    def _equip(self, forms: Mapping[type, Callable]) -> None:
        for part in self.policy.modules():
            if hasattr(part, "quick"):
                part.quick = Quick(forms)

    def release(self) -> None:
        """Forget what was laid out, captured or compiled for parameters at their present addresses."""
        unpack(self.policy)
        self._equip({})
        self._captured: Captured | None = None
        self._config: Any = None
        self._mode = "off"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_captured": None, "_config": None, "_mode": "off"}  # a graph belongs to the parameters that it was captured with


class Accelerated(nn.Module):
    """A policy whose `fast` is an Acceleration, which has to start over when parameters move or are replaced."""

    fast: Acceleration

    def _apply(self, fn: Callable, recurse: bool = True) -> Self:
        self.fast.release()
        return super()._apply(fn, recurse)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        self.fast.release()  # `assign` replaces parameters
        return super().load_state_dict(*args, **kwargs)
