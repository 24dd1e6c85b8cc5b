"""Several linear layers that read the same input, as one matrix product, without giving up their separate parameters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


class _Blocks(list):
    """Tensors that parameters are views of. A copy of the module gets none: its parameters lie elsewhere."""

    def __deepcopy__(self, memo: dict) -> _Blocks:
        return _Blocks()

    def __reduce__(self) -> tuple:
        return _Blocks, ()


def lay_out(layers: Sequence[nn.Linear], multiple: int = 1) -> None:
    """Put the layers' matrices behind one another in memory, once, for inference; each takes a multiple of `multiple` rows, the further ones being zero.

    The parameters stay what they are (same names, trainable, saved apart); they become views of one block, so that changing them in place changes the block.
    Whoever replaces them (a move to another device or dtype) has to call `unpack` first.
    """
    if any(type(layer) is not nn.Linear for layer in layers) or getattr(layers[0], "packed", None):
        return
    blocks = _Blocks()
    for kind in ("weight", "bias"):
        tensors = [getattr(layer, kind) for layer in layers]
        if tensors[0] is None:
            blocks.append(None)
            continue
        rows = [-(-len(tensor) // multiple) * multiple for tensor in tensors]
        block = torch.zeros(sum(rows), *tensors[0].shape[1:], dtype=tensors[0].dtype, device=tensors[0].device)
        for tensor, place in zip(tensors, block.split(rows), strict=True):
            view = place[: len(tensor)]
            view.copy_(tensor.data)
            tensor.data = view
        blocks.append(block)
    layers[0].packed = blocks


def joined(first: nn.Linear) -> list[torch.Tensor] | None:
    """(weight, bias) of several layers as one, if `lay_out` put them so and no gradient is wanted (it would not reach the parameters)."""
    return None if torch.is_grad_enabled() else getattr(first, "packed", None) or None


def widen(layer: nn.Linear, multiple: int) -> None:
    """Give a layer's matrix further zero columns, up to a multiple, as `layer.wide[0]`: for inputs that `lay_out` has widened. The parameter becomes a view of it."""
    if type(layer) is nn.Linear and layer.in_features % multiple and not getattr(layer, "wide", None):
        layer.wide = _Blocks([nn.functional.pad(layer.weight.data, (0, -layer.in_features % multiple))])
        layer.weight.data = layer.wide[0][:, : layer.in_features]


def unpack(module: nn.Module) -> None:
    """Forget the blocks. The parameters keep their values."""
    for part in module.modules():
        for name in ("packed", "wide"):
            if hasattr(part, name):
                delattr(part, name)
