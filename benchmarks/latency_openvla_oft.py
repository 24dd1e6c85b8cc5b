"""Latency of OpenVLA-OFT at full size with random weights, beside what its origin runs and beside the floor, in one run on one GPU.

    python benchmarks/latency_openvla_oft.py                      # the table; a JSON copy in $OUT if that is set
    python benchmarks/latency_openvla_oft.py --quick              # batch 1 and 64, without compiled layers
    python benchmarks/latency_openvla_oft.py --profile            # also which GPU kernels take the time
    python benchmarks/latency_openvla_oft.py --device cpu --tiny  # does the script work at all?

"end to end" is wall time from camera pictures (uint8, in numpy) to action chunks (float32, in numpy), median. The peer does what the original evaluation does:
per picture JPEG, Lanczos resize and crop through Pillow on the CPU, then the same vision towers run eagerly (their operations are timm's), transformers' Llama
run eagerly with a 4-D mask that lifts causality, logits of all positions in float32, decoding in numpy. It holds the very same weights.
"network" is the median over CUDA events from prepared inputs to hidden states. The floor of a phase is the larger of its bytes over the measured copy
bandwidth and its operations over the measured bf16 matrix rate.
"""

import argparse
import gc
import io
import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from benchmarks.policy_latency import ceilings, measure
from vlahub_policies import openvla_oft as oft
from vlahub_policies.openvla_oft import OpenVLAOFT, OpenVLAOFTConfig
from vlahub_policies.parts.capture import Captured

ROWS: list[dict] = []
TASK = "pick up the black bowl between the plate and the ramekin and place it on the plate"
PROMPT_TOKENS = 37  # of TASK in Llama's tokenizer, prompt included


def wall(function: Callable, seconds: float = 2.0, least: int = 5, most: int = 60) -> float:
    """Median milliseconds of a function that ends with a copy to the CPU."""
    function()
    times, begun = [], time.perf_counter()
    while len(times) < least or (time.perf_counter() - begun < seconds and len(times) < most):
        start = time.perf_counter()
        function()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def report(**row: object) -> None:
    ROWS.append(row)
    extra = f"  floor {row['floor_ms']:>8.2f}  x{row['ms'] / row['floor_ms']:.2f}" if row.get("floor_ms") else ""
    print(f"{row['model']:<14} {row['what']:<34} batch {row['batch']:>3} {row['ms']:>10.2f} ms{extra}  {row.get('note', '')}", flush=True)


def floor(policy: OpenVLAOFT, batch: int, prompt: int, rate: float, bandwidth: float) -> float:
    """Milliseconds."""
    config = policy.config

    def size(module: torch.nn.Module) -> tuple[int, int]:
        return sum(p.numel() for p in module.parameters()), sum(p.nbytes for p in module.parameters())

    patches = (config.image_size // config.patch) ** 2 * policy.views
    length = patches + config.proprio + prompt + policy.slots + config.end_token
    total = 0.0
    for module, vit in ((policy.vision_backbone.featurizer, config.dino), (policy.vision_backbone.fused_featurizer, config.siglip)):
        count, nbytes = size(module)
        tokens = patches + vit.prefix_tokens * policy.views
        attention = 4 * (vit.depth - 1) * vit.dim * tokens * (tokens // policy.views)
        total += max(nbytes / bandwidth, batch * (2 * count * tokens + attention) / rate)
    count, nbytes = size(policy.projector)
    total += max(nbytes / bandwidth, batch * 2 * count * patches / rate)
    count, nbytes = size(policy.language_model.model.layers)
    attention = 4 * config.llama.num_hidden_layers * config.llama.hidden_size * length * length
    total += max(nbytes / bandwidth, batch * (2 * count * length + attention) / rate)
    if policy.action_head is not None:
        count, nbytes = size(policy.action_head)
        total += max(nbytes / bandwidth, batch * 2 * count * policy.horizon / rate)
    return 1e3 * total


def build(recipe: str, device: str, tiny: bool, **options: object) -> OpenVLAOFT:
    entries = dict(oft.RECIPES[recipe][1])
    numbers = {"q01": [-1.0] * 7, "q99": [1.0] * 7}
    wide = {"q01": [-3.0] * 8, "q99": [3.0] * 8}
    sizes = {name: value for name, value in oft.TINY.items() if name in ("dino", "siglip", "llama", "vocab_size", "image_size", "patch")} if tiny else {}
    config = OpenVLAOFTConfig(**{**entries, "statistics": {"action": numbers, "proprio": wide}, **sizes, **options})
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            policy = OpenVLAOFT(config)
    finally:
        torch.set_default_dtype(dtype)
    policy.to(device).cast(torch.bfloat16)
    # Llama's own tokenizer is not ours to ship; what counts is how many tokens there are
    generator = torch.Generator().manual_seed(0)
    policy._prompts[TASK] = [oft.BOS, *torch.randint(3, 380, (PROMPT_TOKENS - 1,), generator=generator).tolist()]
    policy.tokenizer = object()
    return policy.eval()


def observation(policy: OpenVLAOFT, batch: int) -> dict:
    rng = np.random.default_rng(0)
    smooth = np.asarray(Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).resize((256, 256), Image.BICUBIC))
    pictures = np.stack([np.roll(smooth, 7 * i, axis=1) for i in range(batch)])
    wrists = {"wrist_images": pictures[:, ::-1].copy()} if policy.interface.wrists else {}
    return {"main_images": pictures, **wrists, "states": rng.normal(size=(batch, 8)).astype(np.float32), "task_descriptions": [TASK] * batch}


# ------------------------------------------------------------------------------------------------ the peer


class Peer:
    """The original's way of computing a decision, on the same weights."""

    def __init__(self, policy: OpenVLAOFT):
        from transformers import LlamaConfig, LlamaForCausalLM

        llama = policy.config.llama
        config = LlamaConfig(
            vocab_size=llama.vocab_size, hidden_size=llama.hidden_size, intermediate_size=llama.intermediate_size, num_hidden_layers=llama.num_hidden_layers,
            num_attention_heads=llama.num_attention_heads, num_key_value_heads=llama.num_attention_heads, rms_norm_eps=llama.rms_norm_eps, attn_implementation="sdpa",
        )  # fmt: skip
        self.policy = policy
        device = policy.device
        with torch.device("meta"):
            self.llama = LlamaForCausalLM(config).to(torch.bfloat16)
        self.llama.load_state_dict(policy.language_model.state_dict(), assign=True)
        self.llama.model.rotary_emb = type(self.llama.model.rotary_emb)(config).to(device)  # its buffers are in no checkpoint
        self.llama.eval()

    def pictures(self, observation: dict) -> torch.Tensor:
        """Pictures -> [B, 6 V, size, size] float32 on the CPU, one at a time."""
        size, how = self.policy.config.image_size, self.policy.config.images
        views = [observation["main_images"], *([observation["wrist_images"]] if "wrist_images" in observation else [])]
        rows = []
        for row in zip(*views, strict=True):
            channels = []
            for picture in row:
                image = Image.fromarray(picture)
                if how == "moojink":
                    data = io.BytesIO()
                    image.save(data, "JPEG", quality=95, subsampling="4:2:0")
                    image = Image.open(data).resize((size, size), Image.LANCZOS)
                    margin = size * (1 - 0.9**0.5) / 2
                    image = image.resize((size, size), Image.BILINEAR, box=(margin, margin, size - margin, size - margin))
                else:
                    image = image.resize((size, size), Image.BICUBIC)
                x = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
                mean, std = (torch.tensor(entry).view(3, 1, 1) for entry in (oft.DINO_MEAN, oft.DINO_STD))
                channels += [(x - mean) / std, (x - 0.5) / 0.5]
            rows.append(torch.cat(channels))
        return torch.stack(rows)

    @torch.no_grad()
    def act(self, observation: dict) -> np.ndarray:
        policy = self.policy
        config, device = policy.config, policy.device
        pixels = self.pictures(observation).to(device, torch.bfloat16)
        ids = policy.tokenise(observation["task_descriptions"])
        ids = torch.cat([ids[:, :1], ids[:, -(PROMPT_TOKENS - 1) :]], dim=1)
        words = self.llama.model.embed_tokens(ids)
        x = [words[:, :1], policy.projector(policy.vision_backbone(pixels))]
        if config.proprio:
            state = policy.normalised(torch.from_numpy(observation["states"]), "proprio").to(device, torch.bfloat16)
            x.append(policy.proprio_projector(state)[:, None])
        end = self.llama.model.embed_tokens(ids.new_full((len(ids), 1), oft.EOS)) if config.end_token else words[:, :0]
        x = torch.cat([*x, words[:, 1:], words.new_zeros(len(ids), policy.slots, words.shape[-1]), end], dim=1)
        everyone = torch.zeros(len(ids), 1, x.shape[1], x.shape[1], device=device, dtype=torch.bfloat16)
        out = self.llama(inputs_embeds=x, attention_mask=everyone, use_cache=False, output_hidden_states=True)
        first = x.shape[1] - end.shape[1] - policy.slots - 1
        if policy.action_head is not None:
            return policy.to_env(policy.action_head(out.hidden_states[-1][:, first : first + policy.slots]).float().cpu()).numpy()
        rows = slice(config.vocab_size - oft.BINS, config.vocab_size)
        bins = out.logits.float()[:, first : first + policy.slots, rows].argmax(-1).cpu()
        return policy.to_env(oft.bins_to_actions(bins.view(len(ids), policy.horizon, -1))).numpy()


# ------------------------------------------------------------------------------------------------ what is measured


def memory(what: str, policy: OpenVLAOFT) -> None:
    if torch.cuda.is_available():
        weights = sum(p.nbytes for p in policy.parameters()) / 2**30
        peak = torch.cuda.max_memory_allocated() / 2**30
        ROWS.append({"memory": what, "weights_gib": weights, "peak_gib": peak})
        print(f"{'':14} memory after {what}: weights {weights:.1f} GiB, peak {peak:.1f} GiB", flush=True)
        torch.cuda.reset_peak_memory_stats()


@torch.no_grad()
def ours(policy: OpenVLAOFT, name: str, batch: int, variant: str, rate: float, bandwidth: float) -> np.ndarray:
    policy.config = replace(policy.config, acceleration=variant)
    policy._graphs = None
    seen = observation(policy, batch)
    start = time.perf_counter()
    actions = policy.act(seen)
    first = f"first call {time.perf_counter() - start:.1f} s"
    least = floor(policy, batch, PROMPT_TOKENS, rate, bandwidth)
    report(model=name, what=f"act, end to end, {variant}", batch=batch, ms=wall(lambda: policy.act(seen)), floor_ms=least, note=first)
    inputs = policy.prepare(seen)
    report(model=name, what=f"  network, {variant}", batch=batch, ms=measure(lambda: policy.hidden(inputs), policy.device.type), floor_ms=least)
    report(model=name, what=f"  images and text, {variant}", batch=batch, ms=measure(lambda: policy.prepare(seen), policy.device.type))
    if policy.action_head is None:
        seeds = torch.stack([torch.arange(batch), torch.zeros(batch, dtype=torch.int64)], dim=1)
        report(model=name, what=f"sample, end to end, {variant}", batch=batch, ms=wall(lambda: policy.sample(seen, seeds).actions.cpu()), floor_ms=least)
    return actions


@torch.no_grad()
def towers(policy: OpenVLAOFT, batch: int) -> None:
    """The two vision towers in one CUDA graph: one after the other, and as the policy runs them (side by side where pictures are few)."""
    config = policy.config
    pixels = torch.randn(batch * policy.views, 6, config.image_size, config.image_size, device=policy.device, dtype=torch.bfloat16)
    backbone = policy.vision_backbone

    def in_turn(given: dict) -> dict:
        return {"x": torch.cat([backbone.featurizer(given["x"][:, :3]), backbone.fused_featurizer(given["x"][:, 3:])], dim=-1)}

    for what, function in (("in turn", in_turn), ("as it runs", lambda given: {"x": backbone(given["x"])})):
        captured = Captured(function)
        report(model="vision towers", what=what, batch=batch, ms=measure(lambda captured=captured: captured({"x": pixels}), "cuda"))


@torch.no_grad()
def fused_products(device: str, tokens: int) -> None:
    """Would one product for q, k and v, or for gate and up, pay?"""
    x = torch.randn(tokens, 4096, device=device, dtype=torch.bfloat16)
    for what, count, width in (("q, k, v", 3, 4096), ("gate, up", 2, 11008)):
        apart = [torch.randn(width, 4096, device=device, dtype=torch.bfloat16) for _ in range(count)]
        fused = torch.cat(apart)
        forms = {
            "apart": lambda given, apart=apart: {"x": [F.linear(given["x"], w) for w in apart][-1]},
            "fused": lambda given, fused=fused: {"x": F.linear(given["x"], fused)},
        }
        for form, function in forms.items():
            captured = Captured(lambda given, function=function: [function(given) for _ in range(10)][-1])
            report(
                model="products",
                what=f"{what} {form}, {tokens} tokens",
                batch=tokens // 344,
                ms=measure(lambda captured=captured: captured({"x": x}), "cuda", 0.3) / 10,
            )


def agree(what: str, a: np.ndarray, b: np.ndarray) -> None:
    share = float((np.abs(a - b) < 1e-6).mean())
    print(f"{'':14} {what}: {100 * share:.1f} % of the numbers equal, largest difference {np.abs(a - b).max():.3f}", flush=True)
    ROWS.append({"agreement": what, "equal": share, "largest": float(np.abs(a - b).max())})


@torch.no_grad()
def exactness(policy: OpenVLAOFT) -> None:
    """Are prepared pictures the same on this GPU as on the CPU, where they are compared with the original?"""
    pictures = torch.from_numpy(observation(policy, 4)["main_images"])
    pictures = torch.cat([pictures, torch.randint(0, 256, (4, 256, 256, 3), dtype=torch.uint8)])
    for how in ("moojink", "rlinf", "robotwin"):
        there = oft.prepare_images(pictures.to(policy.device), how, 224).cpu().int()
        off = (there - oft.prepare_images(pictures, how, 224).int()).abs()
        print(f"{'':14} pictures, {how}: {int((off > 0).sum())} of {off.numel()} numbers differ from the CPU, by at most {int(off.max())}", flush=True)
        ROWS.append({"pictures": how, "different": int((off > 0).sum()), "of": off.numel(), "largest": int(off.max())})


@torch.no_grad()
def kernels(policy: OpenVLAOFT, batch: int) -> None:
    """Where the GPU's time goes in one eager decision."""
    from torch.profiler import ProfilerActivity, profile

    policy.config = replace(policy.config, acceleration="off")
    seen = observation(policy, batch)
    policy.act(seen)
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as recorded:
        policy.act(seen)
    print(recorded.key_averages().table(sort_by="self_cuda_time_total", row_limit=25, max_name_column_width=80), flush=True)


def guarded(function: Callable, *args: object, **kwargs: object) -> object:
    """One failing part must not cost the others their numbers; its error is printed and kept."""
    try:
        return function(*args, **kwargs)
    except Exception as error:
        traceback.print_exc()
        ROWS.append({"failed": getattr(function, "__name__", str(function)), "error": str(error)[:300]})
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to try the script")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to try the script")
    parser.add_argument("--quick", action="store_true", help="batch 1 and 64, without compiled layers")
    parser.add_argument("--no-peer", action="store_true", help="leave transformers' Llama out")
    parser.add_argument("--profile", action="store_true", help="print the GPU kernels of one decision at batch 1 and at 64")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("latency_openvla_oft: no CUDA device; try --device cpu --tiny")
    begun = time.perf_counter()
    name = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    rate, bandwidth = ceilings(options.device)
    print(f"{name}, torch {torch.__version__}: {rate / 1e12:.0f} TFLOP/s bf16, {bandwidth / 1e12:.2f} TB/s copy", flush=True)
    batches = (1, 2) if options.tiny else (1, 64) if options.quick else (1, 8, 64)
    variants = ("off", "graph") if options.quick or options.tiny else ("off", "graph", "compile")
    for recipe, extra in (("libero_rlinf", {"value_head": True}), ("libero_l1", {})):
        start = time.perf_counter()
        policy = build(recipe, options.device, options.tiny, **extra)
        print(f"{recipe}: {sum(p.numel() for p in policy.parameters()) / 1e9:.2f} B parameters made in {time.perf_counter() - start:.1f} s", flush=True)
        memory("load", policy)
        guarded(exactness, policy)
        peer = None if options.no_peer else guarded(Peer, policy)
        for batch in batches:
            results = {}
            for variant in variants:
                if variant == "compile" and (recipe == "libero_l1" or batch == 8):
                    continue  # compiling takes a minute each time; one recipe at two sizes tells
                results[variant] = guarded(ours, policy, recipe, batch, variant, rate, bandwidth)
                if variant != "off" and results[variant] is not None and results["off"] is not None:
                    agree(f"off and {variant}", results["off"], results[variant])
            memory(f"inference at batch {batch}", policy)
            if peer is not None:
                seen = observation(policy, batch)
                other = guarded(peer.act, seen)
                if other is not None:
                    report(model=recipe, what="peer: eager, Pillow, end to end", batch=batch, ms=wall(partial(peer.act, seen), least=3))
                    report(model=recipe, what="  peer's images alone", batch=batch, ms=wall(partial(peer.pictures, seen), 1.0, 3))
                    agree("ours and the peer", results["off"], other)
        if recipe == "libero_rlinf" and options.device == "cuda":
            policy.config = replace(policy.config, acceleration="graph")
            for batch in (1, 4, 8, 64):
                guarded(towers, policy, batch)
                if options.profile and batch in (1, 64):
                    guarded(kernels, policy, batch)
        del policy, peer
        gc.collect()  # captured graphs and the policy refer to each other
        if options.device == "cuda":
            torch.cuda.empty_cache()
    if options.device == "cuda":
        for batch in (1, 64):
            guarded(fused_products, options.device, 344 * batch)
    print(f"whole run {time.perf_counter() - begun:.0f} s", flush=True)
    if os.environ.get("OUT"):
        record = {"gpu": name, "torch": torch.__version__, "tflops": rate / 1e12, "tb_per_s": bandwidth / 1e12, "rows": ROWS}
        (Path(os.environ["OUT"]) / "latency_openvla_oft.json").write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
