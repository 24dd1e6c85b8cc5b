"""The two transformers inside pi0: SigLIP, which turns pictures into tokens, and Gemma, which is both the language model and the action expert.

Module names are those of the published checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from vlahub_policies.parts.packing import joined, lay_out

# What "may not attend" adds to a score: finite, so that the row of a padded token becomes uniform instead of NaN.
MASKED = -2.3819763e38


@dataclass(frozen=True)
class GemmaConfig:
    width: int = 2048
    depth: int = 18
    mlp_dim: int = 16384
    num_heads: int = 8
    num_kv_heads: int = 1
    head_dim: int = 256


@dataclass(frozen=True)
class SiglipConfig:
    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_hidden_layers: int = 27
    num_attention_heads: int = 16
    image_size: int = 224
    patch_size: int = 14

    @property
    def tokens(self) -> int:
        return (self.image_size // self.patch_size) ** 2


def bias_of(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[B, S, T] bool -> what attention adds to its scores, [B, 1, S, T]. Rows start at multiples of 16, so that kernels read them in wide pieces."""
    keys = visible.shape[-1]
    rows = torch.zeros(*visible.shape[:-1], -(-keys // 16) * 16, dtype=dtype, device=visible.device)[..., :keys]
    return rows.masked_fill_(~visible, MASKED)[:, None]


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """q [B, S, heads, d], k and v [B, T, kv heads, d], bias [B, 1, S, T] -> [B, S, heads * d]. Every kv head serves heads / kv heads query heads."""
    batch, length, heads, size = q.shape
    groups = heads // k.shape[2]
    if groups > 1:  # a view where there is one kv head
        k, v = (x[:, :, :, None].expand(-1, -1, -1, groups, -1).reshape(batch, x.shape[1], heads, size) for x in (k, v))
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=bias)
    return out.transpose(1, 2).reshape(batch, length, heads * size)


def pack(module: nn.Module) -> None:
    """q/k/v and gate/up matrices of every attention and MLP as one block each, for inference."""
    for part in module.modules():
        groups = {Attention: ("q_proj", "k_proj", "v_proj"), GatedMLP: ("gate_proj", "up_proj")}.get(type(part))
        if groups:
            lay_out([getattr(part, name) for name in groups])


class Attention(nn.Module):
    """Projections of one stream; `out` names the last one as its origin does."""

    def __init__(self, width: int, heads: int, kv_heads: int, head_dim: int, bias: bool, out: str):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim, self.out = heads, kv_heads, head_dim, out
        self.q_proj = nn.Linear(width, heads * head_dim, bias)
        self.k_proj = nn.Linear(width, kv_heads * head_dim, bias)
        self.v_proj = nn.Linear(width, kv_heads * head_dim, bias)
        setattr(self, out, nn.Linear(heads * head_dim, width, bias))

    def project(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[B, S, width] -> q [B, S, heads, d], k and v [B, S, kv heads, d]"""
        packed = joined(self.q_proj)
        sizes = [self.heads * self.head_dim, self.kv_heads * self.head_dim, self.kv_heads * self.head_dim]
        parts = F.linear(x, *packed).split(sizes, -1) if packed else (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        return tuple(part.unflatten(-1, (-1, self.head_dim)) for part in parts)

    def close(self, x: torch.Tensor) -> torch.Tensor:
        return getattr(self, self.out)(x)


# ------------------------------------------------------------------------------------------------ SigLIP


class SiglipMLP(nn.Module):
    def __init__(self, config: SiglipConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class SiglipLayer(nn.Module):
    def __init__(self, config: SiglipConfig):
        super().__init__()
        width, heads = config.hidden_size, config.num_attention_heads
        self.layer_norm1 = nn.LayerNorm(width, eps=1e-6)
        self.self_attn = Attention(width, heads, heads, width // heads, bias=True, out="out_proj")
        self.layer_norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = SiglipMLP(config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.self_attn.close(attend(*self.self_attn.project(self.layer_norm1(x)), None))
        return x + self.mlp(self.layer_norm2(x))


class SiglipEmbeddings(nn.Module):
    def __init__(self, config: SiglipConfig):
        super().__init__()
        self.patch_embedding = nn.Conv2d(3, config.hidden_size, config.patch_size, config.patch_size)
        self.position_embedding = nn.Embedding(config.tokens, config.hidden_size)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        # the convolution's windows do not overlap, so it is one matrix product over patches
        size, weight = self.patch_embedding.kernel_size[0], self.patch_embedding.weight
        pixels = pixels[..., : pixels.shape[-2] // size * size, : pixels.shape[-1] // size * size]
        patches = pixels.unflatten(3, (-1, size)).unflatten(2, (-1, size)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # [N, tokens, 3 size size]
        return F.linear(patches.to(weight.dtype), weight.flatten(1), self.patch_embedding.bias) + self.position_embedding.weight


class Siglip(nn.Module):
    """[N, 3, size, size] in [-1, 1] -> [N, tokens, width]. No class token and no pooling."""

    def __init__(self, config: SiglipConfig):
        super().__init__()
        self.embeddings = SiglipEmbeddings(config)
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(SiglipLayer(config) for _ in range(config.num_hidden_layers))
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=1e-6)

    def forward(self, pixels: torch.Tensor, through=None) -> torch.Tensor:
        x = self.embeddings(pixels).to(self.post_layernorm.weight.dtype)
        for layer in self.encoder.layers:
            x = through(layer, x) if through else layer(x)
        return self.post_layernorm(x)


# ------------------------------------------------------------------------------------------------ Gemma


def rotation(positions: torch.Tensor, head_dim: int, theta: float = 10000.0) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, S] -> cos and sin [B, S, 1, head_dim / 2] float32."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    angle = positions[..., None].float() / theta**exponent
    return angle.cos()[:, :, None], angle.sin()[:, :, None]


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding, first half with second half, computed in float32."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


class GemmaNorm(nn.Module):
    """RMS norm times (1 + weight). The adaptive form (pi0.5's expert) takes scale, shift and gate from a condition instead of a weight."""

    def __init__(self, width: int, adaptive: bool = False):
        super().__init__()
        if adaptive:
            self.dense = nn.Linear(width, 3 * width)
            nn.init.zeros_(self.dense.weight)
            nn.init.zeros_(self.dense.bias)
        else:
            self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x: torch.Tensor, modulation: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """x [B, S, width], modulation [B or 1, 1, 3 width] -> (normed, gate or None)"""
        if modulation is None:
            return F.rms_norm(x.float(), x.shape[-1:], 1 + self.weight.float(), 1e-6).to(x.dtype), None
        scale, shift, gate = modulation.chunk(3, dim=-1)
        return torch.addcmul(shift, F.rms_norm(x.float(), x.shape[-1:], None, 1e-6), 1 + scale).to(x.dtype), gate.to(x.dtype)


class GatedMLP(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        packed = joined(self.gate_proj)
        gate, up = F.linear(x, *packed).chunk(2, -1) if packed else (self.gate_proj(x), self.up_proj(x))
        return self.down_proj(F.gelu(gate, approximate="tanh") * up)


KeysValues = tuple[torch.Tensor, torch.Tensor]  # each [B, T, kv heads, head_dim], keys already rotated


class GemmaLayer(nn.Module):
    def __init__(self, config: GemmaConfig, adaptive: bool = False):
        super().__init__()
        self.input_layernorm = GemmaNorm(config.width, adaptive)
        self.self_attn = Attention(config.width, config.num_heads, config.num_kv_heads, config.head_dim, bias=False, out="o_proj")
        self.post_attention_layernorm = GemmaNorm(config.width, adaptive)
        self.mlp = GatedMLP(config.width, config.mlp_dim)

    def forward(
        self,
        x: torch.Tensor,  # [B, S, width]
        cos: torch.Tensor,
        sin: torch.Tensor,
        bias: torch.Tensor | None,  # [B, 1, S, past + S]
        past: KeysValues | None = None,
        before: torch.Tensor | None = None,  # modulations of the two norms, if they are adaptive
        after: torch.Tensor | None = None,
        attention: Callable | None = None,  # (q, past, own, bias) -> what `attend` gives; a kernel's, for inference
    ) -> tuple[torch.Tensor, KeysValues]:
        normed, gate = self.input_layernorm(x, before)
        q, k, v = self.self_attn.project(normed)
        q, own = rotate(q, cos, sin), (rotate(k, cos, sin), v.contiguous())
        if attention is not None:
            seen = attention(q, past, own, bias)
        else:
            k, v = own if past is None else (torch.cat([old, new], dim=1) for old, new in zip(past, own, strict=True))
            seen = attend(q, k, v, bias)
        x = _residual(x, self.self_attn.close(seen), gate)
        normed, gate = self.post_attention_layernorm(x, after)
        return _residual(x, self.mlp(normed), gate), own

    def keys_values(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> KeysValues:
        """The keys and values alone, which are all that is needed of a last layer whose output nobody reads."""
        _, k, v = self.self_attn.project(self.input_layernorm(x)[0])
        return rotate(k, cos, sin), v.contiguous()


def _residual(x: torch.Tensor, update: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
    return x + (update if gate is None else gate * update)


class Gemma(nn.Module):
    """The layers and the final norm; whoever calls it embeds."""

    def __init__(self, config: GemmaConfig, adaptive: bool = False):
        super().__init__()
        self.layers = nn.ModuleList(GemmaLayer(config, adaptive) for _ in range(config.depth))
        self.norm = GemmaNorm(config.width, adaptive)

    def norms(self) -> list[GemmaNorm]:
        return [norm for layer in self.layers for norm in (layer.input_layernorm, layer.post_attention_layernorm)] + [self.norm]

    def modulations(self, condition: torch.Tensor) -> list[torch.Tensor]:
        """condition [N, width] -> for each adaptive norm [N, 1, 3 width]"""
        return [norm.dense(condition.to(norm.dense.weight.dtype))[:, None] for norm in self.norms()]

    def forward(
        self,
        x: torch.Tensor,
        turn: tuple[torch.Tensor, torch.Tensor],  # `rotation` at the tokens' positions
        bias: torch.Tensor | None,
        past: list[KeysValues] | None = None,
        modulations: list[torch.Tensor] | None = None,
        through=None,
        wanted: bool = True,
    ) -> tuple[torch.Tensor | None, list[KeysValues]]:
        """(output after the final norm [B, S, width], the layers' own keys and values); without the output if it is not wanted, which saves most of the last layer"""
        x = x.to(self.layers[0].mlp.down_proj.weight.dtype)
        kept = []
        for i, layer in enumerate(self.layers):
            if not wanted and i == len(self.layers) - 1:
                return None, [*kept, layer.keys_values(x, *turn)]
            before, after = (None, None) if modulations is None else modulations[2 * i : 2 * i + 2]
            inputs = (x, *turn, bias, None if past is None else past[i], before, after)
            x, own = through(layer, *inputs) if through else layer(*inputs)
            kept.append(own)
        return self.norm(x, None if modulations is None else modulations[-1])[0], kept
