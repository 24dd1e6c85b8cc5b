"""Time per environment-chunk of the EVAC world model at full size with random weights, beside the plain way of running it, in one run on one GPU.

    python benchmarks/evac_speed.py                            # the table; a JSON copy in $OUT if that is set
    python benchmarks/evac_speed.py --quality FOLDER           # and what fewer steps cost, on a trained model
    python benchmarks/evac_speed.py --device cpu --tiny        # does the script work at all?

An environment-chunk is 8 frames of 256 x 256 of one world: 8 trajectory maps drawn and encoded, the denoising steps, 8 frames decoded and judged. "plain" is the published way:
the network eager, its context read again in every call, all 12 frames of the clip encoded and decoded one by one, in float32 or under bfloat16 autocast; it is made of the
parts' times, because its 50 calls at batch 32 would take minutes. All other rows are whole chunks of `Imagination.advance`, measured by the clock.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from vlahub_envs.evac.checkpoint import cast
from vlahub_envs.evac.conditioning import mujoco_camera
from vlahub_envs.evac.model import PICTURES, Conditions, WorldModel, WorldModelConfig, tiny_config
from vlahub_envs.evac.simulation import Imagination, draw_maps
from vlahub_envs.evac.start_states import StartState, StartStates

ROWS: list[dict] = []
STEPS = 50  # of the published environment
CAMERA = (0.6586, 0.0, 1.6104), (0.6380, 0.3048, 0.3048, 0.6380), 45.0  # LIBERO's tabletop agentview


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(function: Callable, device: str, repeats: int = 1, warm: bool = True) -> float:
    """Median, after one call that does not count."""
    if warm:
        function()
    times = []
    for _ in range(repeats):
        wait(device)
        start = time.perf_counter()
        function()
        wait(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def show(**row) -> None:
    ROWS.append(row)
    print("  ".join(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in row.items()), flush=True)


def matrix_rate(device: str) -> float:
    """Operations per second of bf16 matrix products, measured: what the floor is computed with."""
    size = 8192 if device == "cuda" else 256
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / seconds(lambda: a @ b, device, 5)


def operations(model: WorldModel, conditions: Conditions) -> float:
    """Of one network call for one world, counted by torch."""
    from torch.utils.flop_counter import FlopCounterMode

    m = model.config.memory
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.network(conditions, m)(torch.zeros_like(conditions.latent[:, :, m:]), 500)
    return float(counter.get_total_flops())


@torch.no_grad()
def plain(model: WorldModel, batch: int, device: str, autocast: bool) -> dict[str, float]:
    """Seconds per environment-chunk, and of the parts."""
    config, m = model.config, model.config.memory
    frames, latents, conditions = made_up(model, batch)
    unet = model.unet
    x = torch.cat([conditions.latent, conditions.channels()], dim=1)
    fps, domain, steps = (torch.full((batch,), value, device=device) for value in (config.fps, config.domain, 500))
    with torch.autocast(device, torch.bfloat16) if autocast else nullcontext():
        call = seconds(lambda: unet(x, steps, unet.read_context(conditions.tokens), fps, domain, config.chunk), device, 2 if batch < 32 or autocast else 1)
        encode = seconds(lambda: model.encode(frames[:1]), device, 3)
        decode = seconds(lambda: model.decode(latents[:1, :, :1]), device, 3)
        tokens = seconds(lambda: model.image_tokens(frames[:1]), device, 3)
    count = m + config.chunk
    return {"network": call / batch, "encode": encode, "decode": decode, "total": STEPS * call / batch + count * (encode + decode) + tokens}


def made_up(model: WorldModel, batch: int) -> tuple[torch.Tensor, torch.Tensor, Conditions]:
    """Frames [12, 3, H, W], latents [b, 4, T, h, w] and conditions of b worlds, random."""
    config, device = model.config, model.device
    m, c, channels = config.memory, config.chunk, config.autoencoder.latent_channels
    frames = torch.rand(m + c, 3, config.height, config.width, device=device) * 2 - 1
    latents = torch.randn(batch, channels, m + c, *config.latent_size, device=device)
    tokens = torch.randn(batch, config.image_resampler.num_queries + config.action_resampler.num_queries, config.unet.context_dim, device=device)
    rays = model.camera_rays()[None, :, None].expand(batch, -1, m + c, -1, -1)
    return frames, latents, Conditions(latents, torch.ones_like(latents[:, :1]), latents.clone(), rays, tokens)


def starts_for(config: WorldModelConfig) -> StartStates:
    rng = np.random.default_rng(0)
    pose = np.array([-0.1, 0.1, 1.05, 1, 0, 0, 0.02, -1], np.float32)
    return StartStates([StartState(rng.integers(0, 256, (config.height, config.width, 3), dtype=np.uint8), pose, "go", 0, trial) for trial in range(4)])


def advance(imagination: Imagination, batch: int, device: str) -> float:
    """Seconds per environment-chunk: the second chunk of an episode, since the first also encodes the start (and runs two steps only, to warm up)."""
    worlds = [imagination.world() for _ in range(batch)]
    for i, world in enumerate(worlds):
        world.reset(i, {})
    actions = np.random.default_rng(0).uniform(-0.1, 0.1, (batch, imagination.config.chunk, 7)).astype(np.float32)
    begin = time.perf_counter()
    imagination.threshold = 1.0  # random weights judge at random; nobody may leave the batch
    steps, imagination.steps = imagination.steps, imagination.model.schedule.steps(2, 0.0, True)
    imagination.advance(worlds, list(actions))  # warms up, captures, compiles
    imagination.steps = steps
    wait(device)
    first = time.perf_counter() - begin
    taken = seconds(lambda: imagination.advance(worlds, list(actions)), device, 1, warm=False) / batch
    ROWS.append({"note": "first chunk", "batch": batch, "seconds": first})
    return taken


def weaken(model: WorldModel) -> WorldModel:
    """Random weights with bounded activations: the network is timed, not its answers."""
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if tensor.ndim > 1:
                tensor.normal_(std=0.02)
            elif not name.endswith("weight"):
                tensor.zero_()
    return model


@torch.no_grad()
def quality(folder: str, device: str) -> None:
    """How far fewer steps are from many, from the same noise, on a trained model: one chunk after the start states beside it."""
    for solver, eta in (("ddim", 0.0), ("dpm", 0.0)):
        reference = None
        for steps in (1000 if device == "cuda" else 100, STEPS, 25, 20, 15, 10, 8, 5, 3):
            imagination = Imagination(folder, device=device, denoising_steps=steps, solver=solver, eta=eta, clean_end=True)
            imagination.threshold = 1.0
            worlds = [imagination.world() for _ in range(16)]
            for i, world in enumerate(worlds):
                world.reset(i, {})
            actions = np.random.default_rng(0).uniform(-1, 1, (16, imagination.config.chunk, 7)).astype(np.float32)
            begin = time.perf_counter()
            imagination.advance(worlds, list(actions))
            frames = np.stack([world.frames for world in worlds]).astype(np.float64)
            reference = frames if reference is None else reference
            error = ((frames - reference) ** 2).mean()
            show(quality=solver, steps=steps, psnr_to_most=float(10 * np.log10(255**2 / max(error, 1e-9))), seconds=time.perf_counter() - begin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a model of a few million weights, to try the script")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--fast", type=int, nargs="+", default=[10, 8], help="steps of the fast settings (DPM-Solver++)")
    parser.add_argument("--quality", default="", help="folder of a trained world model with start states")
    parser.add_argument("--seconds", type=float, default=170.0, help="begin nothing new after this time")
    args = parser.parse_args()
    begin, device = time.perf_counter(), args.device
    camera = mujoco_camera(*CAMERA, 256, 256)
    config = tiny_config(64, 64, 8, mujoco_camera(*CAMERA, 64, 64), denoising_steps=2) if args.tiny else WorldModelConfig(**camera)
    out = Path(os.environ["OUT"]) / "evac_speed.json" if "OUT" in os.environ else None

    def late() -> bool:
        if out:
            out.write_text(json.dumps(ROWS, indent=1) + "\n")
        return time.perf_counter() - begin > args.seconds

    try:
        if args.quality:
            quality(args.quality, device)
        torch.manual_seed(0)
        with torch.device(device):
            model = weaken(WorldModel(config)).eval().requires_grad_(False)
        rate = matrix_rate(device)
        work = STEPS * operations(model, made_up(model, 1)[2])
        show(
            floor=work / rate,
            tera_operations=work / 1e12,
            rate=rate / 1e12,
            device=torch.cuda.get_device_name() if device == "cuda" else "cpu",
            torch=torch.__version__,
        )
        poses = np.tile(starts_for(config)[0].pose, (8, 1))
        show(drawing_8_maps=seconds(lambda: draw_maps(np.tile(poses, (32, 1)), config, device), device, 5) / 32)
        for batch in args.batches:
            for autocast in (False, True):
                if batch in (args.batches[0], args.batches[-1]) and not late():
                    show(way="plain bf16 autocast" if autocast else "plain float32", batch=batch, steps=STEPS, **plain(model, batch, device, autocast))
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        cast(model, dtype)
        starts = starts_for(config)
        if device == "cuda":
            torch.cuda.empty_cache()

        def rows(way: str, acceleration: str, batches: list[int], fast: bool) -> None:
            imagination = None
            for batch in batches:
                for steps, solver in [(STEPS, "ddim")] + ([(count, "dpm") for count in args.fast] if fast else []):
                    if late():
                        return
                    if imagination is None:
                        imagination = Imagination(model, starts, denoising_steps=steps, solver=solver, eta=float(solver == "ddim"), acceleration=acceleration)
                    imagination.steps = model.schedule.steps(steps, float(solver == "ddim"), steps < 50, solver)
                    taken = advance(imagination, batch, device)
                    memory = torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else 0.0
                    show(way=way, batch=batch, steps=steps, solver=solver, total=taken, peak_gb=memory)

        rows("bf16, contexts kept, pictures batched", "off", [args.batches[-1], args.batches[0]], fast=False)
        if device == "cuda":
            rows("+ graph", "graph", args.batches[:-1], fast=True)
            rows("+ compiled, channels last, graph", "compile", [args.batches[-1], *args.batches[:-1]], fast=True)
        parts(model, args.batches[-1], device)
    finally:
        late()


@torch.no_grad()
def parts(model: WorldModel, batch: int, device: str) -> None:
    """Where the rest of a chunk goes, as `model` stands now."""
    frames, latents, conditions = made_up(model, batch)
    config = model.config
    some = latents[:4, :, : config.chunk]  # as many frames as the autoencoder takes at once
    network = model.network(conditions, config.memory)
    noise = latents[:, :, config.memory :].contiguous()
    show(
        part="seconds per environment-chunk",
        batch=batch,
        one_call=seconds(lambda: network(noise, 500), device, 3) / batch,
        decode=seconds(lambda: model.decode(some), device, 3) / len(some),
        encode=seconds(lambda: model.encode(frames[:8].repeat(PICTURES // 8, 1, 1, 1)), device, 3) / (PICTURES // 8),
        judge=seconds(lambda: model.reward_model(frames[:8]), device, 3),
    )


if __name__ == "__main__":
    main()
