"""Latency of pi0 and pi0.5 at full size with random weights, beside transformers' own pi0 (or openpi's) and beside the floor, in one run on one GPU.

    python benchmarks/policy_latency.py                      # the table; a JSON copy in $OUT if that is set
    python benchmarks/policy_latency.py --models pi0 --batches 1 64 --variants compile --no-grid --no-attention --no-peer   # the shortest
    python benchmarks/policy_latency.py --peer-path openpi   # beside openpi's PyTorch model, from a checkout of it, in its environment
    python benchmarks/policy_latency.py --device cpu --tiny  # does the script work at all?

Every number is the median over CUDA events of one decision: images already resized and text already tokenised (all tokens real) -> the whole chunk of normalised actions.
The floor of a phase is the larger of its bytes over the measured copy bandwidth and its operations over the measured bf16 matrix rate.
"""

import argparse
import functools
import gc
import json
import os
import statistics
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from vlahub_policies.parts import capture, flow, gemma, images, qwen_vl, text
from vlahub_policies.parts.robots import LIBERO
from vlahub_policies.pi0 import ACCELERATIONS, Pi0Config, Pi0Policy

ROWS: list[dict] = []


def measure(function, device: str, seconds: float = 1.5, least: int = 5, most: int = 30) -> float:
    """Median milliseconds."""
    if device == "cpu":
        start = time.perf_counter()
        function()
        return 1e3 * (time.perf_counter() - start)
    function()
    torch.cuda.synchronize()
    times, start = [], time.perf_counter()
    while len(times) < least or (time.perf_counter() - start < seconds and len(times) < most):
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        before.record()
        function()
        after.record()
        after.synchronize()
        times.append(before.elapsed_time(after))
    return statistics.median(times)


def ceilings(device: str) -> tuple[float, float]:
    """(operations per second of bf16 matrix products, bytes per second of a copy), both measured."""
    if device == "cpu":
        return 1e11, 1e10
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    rate = 2 * 8192**3 / (measure(lambda: a @ b, device) / 1e3)
    block = torch.empty(2**32, device=device, dtype=torch.uint8)
    target = torch.empty_like(block)
    return rate, 2 * 2**32 / (measure(lambda: target.copy_(block), device) / 1e3)


def floor(policy: Pi0Policy, batch: int, cameras: int, tokens: int, steps: int, rate: float, bandwidth: float) -> float:
    """Milliseconds."""
    config = policy.config

    def weights(*modules) -> tuple[int, int]:
        parameters = [p for module in modules for p in module.parameters()]
        return sum(p.numel() for p in parameters), sum(p.nbytes for p in parameters)

    patches = cameras * config.vision.tokens
    prefix = patches + tokens
    suffix = config.horizon + (0 if config.pi05 else 1)
    attention = 4 * config.vlm.depth * config.vlm.num_heads * config.vlm.head_dim
    vision = 4 * config.vision.num_hidden_layers * config.vision.hidden_size * config.vision.tokens
    total = 0.0
    tower, language = (
        policy.paligemma.model.vision_tower,
        [*policy.language_model.layers[:-1], policy.language_model.layers[-1].self_attn.k_proj, policy.language_model.layers[-1].self_attn.v_proj],
    )
    for (count, size), length, extra, times in (
        (weights(tower), patches, vision * patches, 1),
        (weights(*language), prefix, attention * prefix * prefix, 1),
        (weights(policy.expert), suffix, attention * suffix * (prefix + suffix), steps),
    ):
        total += times * max(size / bandwidth, batch * (2 * count * length + extra) / rate)
    return 1e3 * total


def inputs_for(policy: Pi0Policy, batch: int, cameras: int, tokens: int) -> dict[str, torch.Tensor]:
    config, device = policy.config, policy.device
    size = config.vision.image_size
    return {
        "images": torch.randint(0, 256, (batch, cameras, 3, size, size), dtype=torch.uint8, device=device),
        "tokens": torch.randint(0, config.vocab_size, (batch, tokens), device=device),
        "token_mask": torch.ones(batch, tokens, dtype=torch.bool, device=device),
        "state": torch.randn(batch, config.action_dim, device=device),
    }


def report(**row) -> None:
    ROWS.append(row)
    floor_ms = row.get("floor_ms")
    print(
        f"{row['model']:<6} {row['variant']:<22} batch {row['batch']:>3}  cameras {row['cameras']}  tokens {row['tokens']:>3}  steps {row['steps']:>2} "
        f" {row['ms']:>9.2f} ms"
        + (f"  floor {floor_ms:>7.2f}  x{row['ms'] / floor_ms:.2f}" if floor_ms else "")
        + (f"  {row['note']}" if row.get("note") else ""),
        flush=True,
    )


@torch.no_grad()
def decide(policy: Pi0Policy, inputs: dict, noise: torch.Tensor, steps: int) -> torch.Tensor:
    return policy._run(inputs, noise, flow.euler(steps), None)[0].chain[:, -1]


def run(policy: Pi0Policy, model: str, variant: str, batch: int, cameras: int, tokens: int, steps: int, rate: float, bandwidth: float) -> torch.Tensor | None:
    device = policy.device.type
    policy.config = replace(policy.config, acceleration=variant) if policy.config.acceleration != variant else policy.config
    torch.manual_seed(0)
    given = inputs_for(policy, batch, cameras, tokens)
    noise = torch.randn(batch, policy.horizon, policy.config.action_dim, device=device)
    try:
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        first = decide(policy, given, noise, steps).cpu()
        started = time.perf_counter() - start
        ms = measure(lambda: decide(policy, given, noise, steps), device)
    except RuntimeError:  # out of memory, or a kernel that this machine lacks: say so and measure the rest
        traceback.print_exc()
        return None
    peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0.0
    report(model=model, variant=variant, batch=batch, cameras=cameras, tokens=tokens, steps=steps, ms=ms, start_s=started, peak_gib=peak,
           floor_ms=floor(policy, batch, cameras, tokens, steps, rate, bandwidth), note=f"first call {started:.1f} s, at most {peak:.1f} GiB")  # fmt: skip
    return first


@torch.no_grad()
def phases(policy: Pi0Policy, model: str, batch: int, cameras: int, tokens: int) -> None:
    """Where the time goes: each phase in its own CUDA graph."""
    device = policy.device.type
    given = inputs_for(policy, batch, cameras, tokens)
    x = torch.randn(batch, policy.horizon, policy.config.action_dim, device=device)
    prefix, timing = policy._encode(given), policy.timing(torch.full((1,), 0.5, device=device))
    layout = policy.suffix_layout(prefix)
    tower = policy.paligemma.model.vision_tower.vision_model
    parts = {
        "vision": lambda inputs: {"out": tower(images.to_pixels(inputs["images"]).flatten(0, 1), policy._through)},
        "prefix (with vision)": lambda inputs: {"out": policy._encode(inputs).kept[-1][0]},
        "one step": lambda inputs: {"out": policy.velocity(policy.expert_features(prefix, inputs["state"], x, timing, layout))},
    }
    for name, part in parts.items():
        captured = capture.Captured(part) if device == "cuda" else part
        ms = measure(lambda captured=captured: captured(given), device)
        report(model=model, variant=f"{policy.config.acceleration}: {name}", batch=batch, cameras=cameras, tokens=tokens, steps=0, ms=ms)


@torch.no_grad()
def profile(policy: Pi0Policy, what: str, batch: int, cameras: int, tokens: int) -> None:
    """The kernels of one decision, or of one prefix, by their total time."""
    given = inputs_for(policy, batch, cameras, tokens)
    noise = torch.randn(batch, policy.horizon, policy.config.action_dim, device=policy.device)
    captured = capture.Captured(lambda inputs: {"out": policy._encode(inputs).kept[-1][0]})
    function = (lambda: captured(given)) if what == "prefix" else (lambda: decide(policy, given, noise, 10))
    function()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as record:
        function()
        torch.cuda.synchronize()
    print(f"--- kernels of one {what}, batch {batch}, acceleration {policy.config.acceleration}")
    for entry in sorted(record.key_averages(), key=lambda entry: -entry.device_time_total)[:25]:
        print(f"{entry.device_time_total / 1e3:>9.3f} ms  {entry.count:>6} x {entry.device_time_total / entry.count:>8.1f} us  {entry.key[:110]}", flush=True)


@torch.no_grad()
def attention(device: str, batch: int, queries: int, keys: int, heads: int = 8, groups: int = 1, size: int = 256) -> None:
    """One layer's attention in several forms, to choose by."""
    q = torch.randn(batch, queries, heads, size, device=device, dtype=torch.bfloat16)
    k, v = (torch.randn(batch, keys, groups, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    bias = gemma.bias_of(torch.ones(batch, queries, keys, dtype=torch.bool, device=device), torch.bfloat16)
    repeated = bias.repeat(1, 1, heads // groups, 1)
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def fused(backend):
        def function(inputs):
            with sdpa_kernel(backend):
                return {"out": qwen_vl.joint_attention(inputs["q"].transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), repeated)}

        return function

    def triton(*tile):
        from vlahub_policies.parts import kernels

        return lambda inputs: {"out": kernels.attend(inputs["q"], None, (k, v), bias, tile)}

    tiles = ((16, 4, 4), (32, 4, 1), (32, 8, 1), (64, 4, 1), (128, 8, 1))
    forms = {f"triton {'/'.join(map(str, tile))}": triton(*tile) for tile in (tiles[1:] if batch > 1 else tiles)}
    forms |= {"efficient": fused(SDPBackend.EFFICIENT_ATTENTION), "cudnn": fused(SDPBackend.CUDNN_ATTENTION)}
    for name, form in forms.items():
        try:
            captured = capture.Captured(lambda inputs, form=form: [form(inputs) for _ in range(20)][-1])
            ms = measure(lambda captured=captured: captured({"q": q}), device, 0.3) / 20
            print(f"attention  {name:<15} batch {batch:>3}  queries {queries:>4}  keys {keys:>4}  head {size}  {1e3 * ms:>8.1f} us", flush=True)
            ROWS.append({"attention": name, "head": size, "batch": batch, "queries": queries, "keys": keys, "us": 1e3 * ms})
        except Exception as error:  # a kernel that this machine or library lacks: say so and measure the rest
            print(f"attention  {name:<15} batch {batch:>3}  queries {queries:>4}  keys {keys:>4}  not available: {str(error).splitlines()[0][:90]}", flush=True)


def peer(device: str, tiny: bool):
    """transformers' pi0 with random bf16 weights."""
    from transformers import PI0Config, PI0ForConditionalGeneration

    sizes = {}
    if tiny:
        sizes = dict(
            vlm_config=dict(model_type="paligemma", projection_dim=32, image_token_id=384,
                text_config=dict(model_type="gemma", hidden_size=32, num_hidden_layers=2, intermediate_size=48, num_attention_heads=2, num_key_value_heads=1, head_dim=16, vocab_size=384),
                vision_config=dict(model_type="siglip_vision_model", hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=128, patch_size=16, vision_use_head=False)),
            dit_config=dict(model_type="gemma", hidden_size=32, num_hidden_layers=2, intermediate_size=48, num_attention_heads=2, num_key_value_heads=1, head_dim=16),
            chunk_size=10,
        )  # fmt: skip
    config = PI0Config(**sizes)
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = PI0ForConditionalGeneration(config).eval()
    finally:
        torch.set_default_dtype(dtype)
    return model


@torch.no_grad()
def run_peer(model, batch: int, cameras: int, tokens: int, steps: int, size: int, per_image: int, variant: str) -> None:
    device = next(model.parameters()).device.type
    image_token = model.config.vlm_config.image_token_id
    ids = torch.cat([torch.full((batch, cameras * per_image), image_token, device=device), torch.randint(3, 300, (batch, tokens), device=device)], 1)
    given = dict(
        state=torch.randn(batch, 32, device=device, dtype=torch.bfloat16),
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=torch.randn(batch, cameras, 3, size, size, device=device, dtype=torch.bfloat16),
        pixel_attention_mask=torch.ones(batch, cameras, dtype=torch.bool, device=device),
        num_steps=steps,
    )
    try:
        start = time.perf_counter()
        model.sample_actions(**given).cpu()
        started = time.perf_counter() - start
        ms = measure(lambda: model.sample_actions(**given), device)
    except Exception:  # someone else's code: whatever it raises is reported, and our own rows stand
        traceback.print_exc()
        return
    report(model="pi0", variant=variant, batch=batch, cameras=cameras, tokens=tokens, steps=steps, ms=ms, start_s=started, note=f"first call {started:.1f} s")


def openpi(path: Path, pi05: bool, device: str):
    """openpi's PyTorch model with random bf16 weights, from a checkout; in openpi's own environment, whose transformers it patches (our pi0 needs none)."""
    sys.path.insert(0, str(path / "src"))
    try:
        from openpi.models_pytorch.pi0_pytorch import PI0Pytorch
    except ImportError as error:
        raise SystemExit(
            f"policy_latency: {path} is no openpi checkout that can be imported here ({error}); run this script with the Python of openpi's environment"
        ) from error
    config = SimpleNamespace(pi05=pi05, paligemma_variant="gemma_2b", action_expert_variant="gemma_300m", dtype="bfloat16", action_horizon=50, action_dim=32)
    with torch.device(device):
        model = PI0Pytorch(config).eval()
    # its preparation wants pictures of three cameras; what follows takes as many as there are
    model._preprocess_observation = lambda given, train: (given.images, given.masks, given.tokens, given.token_mask, given.state)
    return model.to(device)


@torch.no_grad()
def run_openpi(model, name: str, batch: int, cameras: int, tokens: int, steps: int, tuned: bool) -> None:
    """`tuned`: compiled with max-autotune, as its policy server runs it; else eager."""
    device = next(model.parameters()).device.type
    given = SimpleNamespace(
        images=[torch.randn(batch, 3, 224, 224, device=device) for _ in range(cameras)],
        masks=[torch.ones(batch, dtype=torch.bool, device=device)] * cameras,
        tokens=torch.randint(0, 257152, (batch, tokens), device=device),
        token_mask=torch.ones(batch, tokens, dtype=torch.bool, device=device),
        state=torch.randn(batch, 32, device=device),
    )
    noise = torch.randn(batch, 50, 32, device=device)
    sample = model.sample_actions if tuned else functools.partial(type(model).sample_actions, model)
    start = time.perf_counter()
    sample(device, given, noise, steps).cpu()
    started = time.perf_counter() - start
    ms = measure(lambda: sample(device, given, noise, steps), device)
    variant = "openpi max-autotune" if tuned else "openpi eager"
    report(model=name, variant=variant, batch=batch, cameras=cameras, tokens=tokens, steps=steps, ms=ms, start_s=started, note=f"first call {started:.1f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to try the script")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to try the script")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 64])
    parser.add_argument(
        "--variants", nargs="+", default=list(ACCELERATIONS), choices=ACCELERATIONS, help="forms of inference; others are compared with the first"
    )
    parser.add_argument(
        "--no-grid", dest="grid", action="store_false", help="two cameras and 10 steps only; else the last variant with 1 to 3 cameras and 4 steps too"
    )
    parser.add_argument("--no-attention", dest="attention", action="store_false", help="leave out the comparison of attention kernels")
    parser.add_argument("--profile", action="store_true", help="print the kernels of a decision at batch 1 and of a prefix at batch 64")
    parser.add_argument("--no-peer", action="store_true", help="leave transformers' pi0 out")
    parser.add_argument("--peer-path", type=Path, help="a checkout of openpi, run instead of transformers' pi0; needs openpi's environment")
    parser.add_argument("--models", nargs="+", default=["pi0", "pi05"], choices=["pi0", "pi05"], help="which of our models")
    options = parser.parse_args()
    if options.peer_path and not (options.peer_path / "src/openpi/models_pytorch").is_dir():
        parser.error(f"--peer-path {options.peer_path} is no checkout of openpi: it has no src/openpi/models_pytorch")
    device = options.device
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("policy_latency: no CUDA device; try --device cpu --tiny")
    torch.set_float32_matmul_precision("high")  # TF32 for the few float32 layers, as all peers run
    begun = time.perf_counter()
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    rate, bandwidth = ceilings(device)
    print(f"{name}, torch {torch.__version__}: {rate / 1e12:.0f} TFLOP/s bf16, {bandwidth / 1e12:.2f} TB/s copy", flush=True)
    if device == "cuda" and options.attention:
        for batch in (1, 64):
            attention(device, batch, 560, 560)
            attention(device, batch, 51, 611)
        attention(device, 64, 216, 216, 16, 2, 128)  # LingBot's prefix and suffix
        attention(device, 64, 51, 267, 16, 2, 128)
    batches = (1, 2) if options.tiny else options.batches
    for model in options.models:
        pi05 = model == "pi05"
        tokens = 200 if pi05 else 48
        config = Pi0Config(pi05=pi05, max_token_len=tokens, interface=LIBERO, acceleration="graph")
        if options.tiny:
            config = Pi0Config.tiny(LIBERO, pi05=pi05, max_token_len=tokens, action_dim=32)
        start = time.perf_counter()
        with torch.device(device):
            policy = Pi0Policy(config, text.bundled()).eval()
        for norm in policy.expert.norms() if pi05 else []:
            torch.nn.init.normal_(norm.dense.weight, std=0.02)  # they start at zero, with every gate closed: nothing would be compared
        policy.to(device).cast(torch.bfloat16)
        print(f"{model}: {sum(p.numel() for p in policy.parameters()) / 1e9:.2f} B parameters built in {time.perf_counter() - start:.1f} s", flush=True)
        if device == "cuda":
            torch.cuda.empty_cache()
            print(f"       {torch.cuda.memory_allocated() / 2**30:.1f} GiB of weights", flush=True)
        args = dict(rate=rate, bandwidth=bandwidth)
        for batch in batches:
            reference = None
            for variant in options.variants:
                out = run(policy, model, variant, batch, 2, tokens, 10, **args)
                if reference is None:
                    reference = out
                elif out is not None:
                    print(
                        f"       {options.variants[0]} and {variant} differ by {float((reference - out).norm() / reference.norm()):.1e} of the norm", flush=True
                    )
                if out is not None and batch in (1, 64) and variant in ("kernels", "compile"):
                    phases(policy, model, batch, 2, tokens)
            if options.profile and device == "cuda" and batch in (1, 64):
                profile(policy, "decision", batch, 2, tokens)
                if batch == 64:
                    profile(policy, "prefix", batch, 2, tokens)
        if options.grid:
            for batch in batches:
                for cameras, steps in ((1, 10), (3, 10), (1, 4), (2, 4), (3, 4)):
                    run(policy, model, options.variants[-1], batch, cameras, tokens, steps, **args)
            run(policy, model, options.variants[-1], 1, 2, 16, 10, **args)
        del policy
        gc.collect()  # a policy and what accelerates it point at each other
        if device == "cuda":
            torch.cuda.empty_cache()
    if options.peer_path:
        for model in options.models:
            peer_model = openpi(options.peer_path, model == "pi05", device)
            for batch in batches:
                run_openpi(peer_model, model, batch, 2, 200 if model == "pi05" else 48, 10, tuned=False)
            run_openpi(peer_model, model, batches[0], 2, 200 if model == "pi05" else 48, 10, tuned=True)
            del peer_model
            gc.collect()
    elif not options.no_peer:
        try:
            other = peer(device, options.tiny)
        except Exception:  # the peer's absence must not cost our rows
            traceback.print_exc()
        else:
            size, per_image = (128, 64) if options.tiny else (224, 256)
            for batch in batches:
                run_peer(other, batch, 2, 48, 10, size, per_image, "transformers eager")
    print(f"whole run {time.perf_counter() - begun:.0f} s", flush=True)
    if os.environ.get("OUT"):
        record = {"gpu": name, "torch": torch.__version__, "tflops": rate / 1e12, "tb_per_s": bandwidth / 1e12, "rows": ROWS}
        (Path(os.environ["OUT"]) / "policy_latency.json").write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
