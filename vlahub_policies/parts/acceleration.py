"""Inference in the quickest form that works: packed weights, compiled layers, one CUDA graph."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable
from typing import Literal

import torch
from torch import nn

from vlahub.distributed import is_sharded
from vlahub_policies.parts.capture import Captured
from vlahub_policies.parts.packing import unpack

Mode = Literal["off", "graph", "compile"]
SLOWER: dict[str, Mode] = {"compile": "graph", "graph": "off"}


class Acceleration:
    """Calls `function(inputs)`, a dict of tensors -> a dict of tensors, of a policy that lies on a GPU; elsewhere, and where gradients are wanted, as it is.

    `pack` lays out the weights. `compiles` are layer classes whose forward is compiled in mode "compile"; the modules that run them look into their `compiled`.
    What fails on this machine is left out with a warning.
    """

    def __init__(self, policy: nn.Module, function: Callable[[dict], dict], pack: Callable[[nn.Module], None], compiles: Iterable[type]):
        self.policy, self.function, self.pack, self.compiles = policy, function, pack, tuple(compiles)
        self.release()

    def __call__(self, inputs: dict[str, torch.Tensor], mode: Mode) -> dict[str, torch.Tensor]:
        if next(self.policy.parameters()).device.type != "cuda" or torch.is_grad_enabled() or is_sharded(self.policy):  # sharded parameters come and go
            return self.function(inputs)
        if mode != self._wanted:
            self.release()
            self._wanted = self._mode = mode
        while self._mode != "off":
            if self._captured is None:
                self.pack(self.policy)
                self._compile({kind: torch.compile(kind.forward, dynamic=False) for kind in self.compiles} if self._mode == "compile" else {})
                self._captured = Captured(self.function)
            try:
                return self._captured(inputs)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                slower = SLOWER[self._mode]
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                warnings.warn(f"acceleration={self._mode!r} failed, continuing with {slower!r}: {reason}", RuntimeWarning, stacklevel=3)
                self._compile({})
                self._captured, self._mode = None, slower
        return self.function(inputs)

    def _compile(self, compiled: dict[type, Callable]) -> None:
        for part in self.policy.modules():
            if hasattr(part, "compiled"):
                part.compiled = compiled

    def __deepcopy__(self, memo: dict) -> Acceleration:
        """For a copy of the policy, which may be half made at this point; it captures anew."""
        copied = object.__new__(Acceleration)
        memo[id(self)] = copied
        copied.policy, copied.function = copy.deepcopy(self.policy, memo), copy.deepcopy(self.function, memo)
        copied.pack, copied.compiles = self.pack, self.compiles
        copied._captured, copied._wanted, copied._mode = None, "off", "off"
        return copied

    def release(self) -> None:
        """Forget what was laid out, captured or compiled for parameters at their present addresses."""
        unpack(self.policy)
        self._compile({})
        self._captured: Captured | None = None
        self._wanted: Mode = "off"
        self._mode: Mode = "off"
