"""Low-rank adapters (LoRA): y = W x + (alpha / rank) up(down x), with W frozen.

An adapted layer is still an `nn.Linear` under the same name, so a checkpoint's keys stay and `<layer>.lora_down`, `<layer>.lora_up` come beside them.
"""

import torch
from torch import nn
from torch.nn import functional as F


class LoraLinear(nn.Linear):
    """Made from a linear layer, whose parameters it takes over."""

    def __init__(self, layer: nn.Linear, rank: int, alpha: float):
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        self.weight, self.bias = layer.weight, layer.bias
        self.weight.requires_grad_(False)
        self.scale = alpha / rank
        # float32 whatever the layer's dtype: bf16 would round away most of an optimizer's small steps
        self.lora_down = nn.Parameter(torch.randn(rank, layer.in_features) / layer.in_features**0.5)
        self.lora_up = nn.Parameter(torch.zeros(layer.out_features, rank))  # zero: the adapted layer starts as the original

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        low = F.linear(F.linear(x, self.lora_down.to(x.dtype)), self.lora_up.to(x.dtype))
        return super().forward(x) + self.scale * low


def add(module: nn.Module, rank: int, alpha: float) -> None:
    """Adapt every linear layer inside `module`, in place."""
    if rank < 1:
        raise ValueError(f"lora_rank must be at least 1, not {rank}")
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, LoraLinear(child, rank, alpha))


@torch.no_grad()
def merge(module: nn.Module) -> None:
    """Fold every adapter into its layer, in place: a plain model again, with the same outputs."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, LoraLinear):
                plain = nn.Linear(child.in_features, child.out_features, child.bias is not None, device="meta")
                update = child.scale * (child.lora_up @ child.lora_down)
                plain.weight, plain.bias = nn.Parameter((child.weight.float() + update).to(child.weight.dtype)), child.bias
                setattr(parent, name, plain)
