"""How much memory a batch of imagined worlds takes, known before it runs: the model's own code is traced with tensors that have shapes but no storage."""

from __future__ import annotations

import weakref
from dataclasses import replace
from functools import cache

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vlahub_envs.evac.checkpoint import empty_model
from vlahub_envs.evac.model import PICTURES, WorldModelConfig

MARGIN = 1.2  # what the allocator cannot use again, and the libraries' workspaces


class Peak(TorchDispatchMode):
    """Counts the bytes of tensors that are alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.alive: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.alive:
                    self.alive.add(storage._cdata)
                    self.now += storage.nbytes()
                    self.most = max(self.most, self.now)
                    weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        return result

    def begin(self) -> int:
        """The most so far; counting begins anew."""
        most, self.most = self.most, self.now
        return most

    def _gone(self, key: int, size: int) -> None:
        self.alive.discard(key)
        self.now -= size


@cache
def peaks(config: WorldModelConfig, dtype: torch.dtype, batch: int) -> tuple[int, ...]:
    """Bytes alive at most while a chunk of `batch` worlds is conditioned, denoised and decoded, beside the weights."""
    model = empty_model(replace(config, reward_widths=None), dtype).eval()  # the classifier takes less than the decoder, at another time
    m, c, (h, w) = config.memory, config.chunk, config.latent_size
    channels, tokens = config.autoencoder.latent_channels, config.image_resampler.num_queries
    found = []
    with torch.device("meta"), torch.no_grad(), Peak() as peak:
        memory = torch.empty(batch, channels, m, h, w)
        maps = torch.empty(batch, c, config.height, config.width, 3, dtype=torch.uint8)
        image_tokens, rows = torch.empty(batch, tokens, config.unet.context_dim, dtype=dtype), torch.empty(batch, c, 14)
        conditions = model.conditions(memory, maps, rows, image_tokens, torch.empty(6, h, w))
        found.append(peak.begin())
        x = torch.empty(batch, channels, c, h, w)
        model.network(conditions, m)(x, torch.full((batch,), 999))
        found.append(peak.begin())
        model.decode(x)
        found.append(peak.begin())
    return tuple(found)


def estimate(config: WorldModelConfig, dtype: torch.dtype) -> list[tuple[int, int]]:
    """For each part of the work the bytes of any batch, and of each world in it. Both traces fill the autoencoder's pieces, which larger batches do not enlarge."""
    some = PICTURES // config.chunk + 1
    lines = []
    for few, many in zip(peaks(config, dtype, some), peaks(config, dtype, 2 * some), strict=True):
        each = max((many - few) // some, 1)
        lines.append((int(MARGIN * max(few - some * each, 0)), int(MARGIN * each)))
    return lines


def free(device: torch.device) -> int | None:
    """Bytes that can still be used, or None where this system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        with open("/proc/meminfo") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # not Linux
        return None


def check(config: WorldModelConfig, dtype: torch.dtype, device: torch.device, batch: int) -> str:
    """What a batch will take, in words; a MemoryError with the largest batch that fits if that is more than there is."""
    lines, there = estimate(config, dtype), free(device)
    needed = max(always + batch * each for always, each in lines)
    words = f"imagining {batch} world{'s' if batch > 1 else ''} at once takes about {needed / 1e9:.1f} GB on the {device.type} beside the weights"
    if there is None:
        return words
    fits = min((there - always) // each for always, each in lines)
    words += f", {there / 1e9:.1f} GB are free"
    if fits < batch:
        advice = f"at most {fits} fit: give max_batch={fits}, which imagines them one part after another, or fewer envs" if fits > 0 else "not even one fits"
        raise MemoryError(f"{words}; {advice}" + ("" if dtype != torch.float32 else "; dtype=torch.bfloat16 halves it"))
    return words
