"""Several linear layers that read the same input, as one matrix product, without giving up their separate parameters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


def lay_out(layers: Sequence[nn.Linear]) -> None:
    """Put the layers' matrices behind one another in memory, once, for inference.

    The parameters stay what they are (same names, trainable, saved apart); they become views of one block, so that changing them in place changes the block.
    Whoever replaces them (a move to another device or dtype) has to call `unpack` first.
    """
    if any(type(layer) is not nn.Linear for layer in layers) or hasattr(layers[0], "packed"):
        return
    blocks = []
    for kind in ("weight", "bias"):
        tensors = [getattr(layer, kind) for layer in layers]
        if tensors[0] is None:
            blocks.append(None)
            continue
        block = torch.cat([tensor.data for tensor in tensors])
        for tensor, view in zip(tensors, block.split([len(tensor) for tensor in tensors]), strict=True):
            tensor.data = view
        blocks.append(block)
    layers[0].packed = blocks


def joined(first: nn.Linear) -> list[torch.Tensor] | None:
    """(weight, bias) of several layers as one, if `lay_out` put them so and no gradient is wanted (it would not reach the parameters)."""
    return None if torch.is_grad_enabled() else getattr(first, "packed", None)


def unpack(module: nn.Module) -> None:
    for part in module.modules():
        if hasattr(part, "packed"):
            del part.packed
