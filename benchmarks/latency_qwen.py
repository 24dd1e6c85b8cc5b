"""Latency of StarVLA QwenOFT and LingBot-VLA at full size with random bf16 weights, beside transformers' own modules and beside the floor, on one GPU.

    python benchmarks/latency_qwen.py                              # the table; a JSON copy in $OUT if that is set
    python benchmarks/latency_qwen.py --families starvla           # one of the two
    python benchmarks/latency_qwen.py --device cpu --tiny          # does the script work at all?

Every number is the median over CUDA events. Stages: "act" is camera frames (256 x 256 or 240 x 320, numpy) -> actions in env units (numpy), with everything in
between; "sample" the same with exploration and log-probabilities; "network" starts from prepared inputs.
The peers do what the originals do: Pillow resizes each frame on the CPU, Qwen's image processor makes patches, the text is tokenised, and transformers' eager
modules (SDPA attention) of the same sizes run. LingBot's expert is stood in for by a Qwen2 of its size on the same cache, which leaves its time norms out.
The floor of a phase is the larger of its bytes over the measured copy bandwidth and its operations over the measured bf16 matrix rate.
"""

import argparse
import gc
import json
import os
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from benchmarks.policy_latency import ceilings, measure
from vlahub_policies import lingbot, starvla
from vlahub_policies.lingbot import LAYOUTS, Joints, LingBotPolicy
from vlahub_policies.parts import qwen_text, robots
from vlahub_policies.parts.normalize import Statistics
from vlahub_policies.parts.qwen_vl import TextConfig, VisionConfig
from vlahub_policies.starvla import ActionCodec, QwenOFTPolicy

ROWS: list[dict] = []
INSTRUCTION = "pick up the black bowl between the plate and the small cup and place it on the plate"
TEMPLATE = "Your task is {instruction}. Name the objects that matter for your task and give their boxes as [x1,y1,x2,y2] in the first picture."


def report(**row) -> None:
    ROWS.append(row)
    extra = f"  floor {row['floor_ms']:>7.2f} ms  x{row['ms'] / row['floor_ms']:.2f}" if row.get("floor_ms") else ""
    print(f"{row['family']:<8} {row['who']:<22} {row['stage']:<8} batch {row['batch']:>3}  {row['ms']:>9.2f} ms{extra}", flush=True)
    save()


def save() -> None:
    if os.environ.get("OUT"):
        (Path(os.environ["OUT"]) / "latency_qwen.json").write_text(json.dumps(ROWS, indent=1))


def built(make, device: str):
    """A module with random bf16 weights, made on the device."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            module = make()
    finally:
        torch.set_default_dtype(before)
    return module.to(device).eval()


def frames(batch: int, views: int, size: tuple[int, int]) -> dict:
    rng = np.random.default_rng(0)
    wrists = (batch, *size, 3) if views == 2 else (batch, 2, *size, 3)
    return {
        "main_images": rng.integers(0, 256, (batch, *size, 3), np.uint8),
        "wrist_images": rng.integers(0, 256, wrists, np.uint8),
        "states": rng.normal(size=(batch, 14 if views == 3 else 8)).astype(np.float32),
        "task_descriptions": [INSTRUCTION] * batch,
    }


def tokenizer():
    """Learnt from the prompt itself, so that every word is one token: about as many tokens as Qwen's own makes."""
    texts = [starvla.conversation(starvla.prompt(INSTRUCTION, 8, TEMPLATE), 1), lingbot.prompt(INSTRUCTION)]
    return qwen_text.tiny_tokenizer(texts * 4, [starvla.ACTION_TOKEN], size=2048)


def numbers(*modules) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


def phase(parameters: int, tokens: int, attended: int, batch: int, rate: float, bandwidth: float, times: int = 1) -> float:
    """Milliseconds. `attended`: multiply-adds of one row's attention."""
    return 1e3 * times * max(2 * parameters / bandwidth, batch * (2 * parameters * tokens + 4 * attended) / rate)


def attended(layers: int, width: int, queries: int, keys: float) -> int:
    return int(layers * width * queries * keys)


def vision_floor(policy, visual, batch: int, views: int, rate: float, bandwidth: float) -> float:
    config, (h, w) = policy.config.vision, policy.grid
    window = min(h * w, (config.window // config.patch) ** 2)
    full = len(config.full_attention)
    each = attended(full, config.hidden, h * w, h * w) + attended(config.depth - full, config.hidden, h * w, window)
    merger = numbers(visual.merger)
    blocks = phase(numbers(visual) - merger, views * h * w, views * each, batch, rate, bandwidth)
    return blocks + phase(merger, views * h * w // config.merge**2, 0, batch, rate, bandwidth)


# ------------------------------------------------------------------------------------------------ peers


def processor(patch: int):
    """Qwen's image processor: the torchvision form that the originals use, or the Pillow form where torchvision is not installed."""
    import transformers

    for name in ("Qwen2VLImageProcessor", "Qwen2VLImageProcessorPil"):
        try:
            made = getattr(transformers, name)(patch_size=patch, min_pixels=3136, max_pixels=12845056)
            made(images=[np.zeros((56, 56, 3), np.uint8)], return_tensors="pt")
        except (ImportError, AttributeError) as error:
            print(f"         {name} is not available here: {str(error).splitlines()[0][:100]}", flush=True)
        else:
            return made
    raise RuntimeError("transformers has no Qwen2-VL image processor that works here")


def resized_patches(images: list[np.ndarray], size: tuple[int, int], resample: int, process) -> tuple[torch.Tensor, torch.Tensor]:
    from PIL import Image

    small = [Image.fromarray(image).resize(size[::-1], resample) for image in images]
    made = process(images=small, return_tensors="pt")
    return made["pixel_values"], made["image_grid_thw"]


def peer_config(vision: VisionConfig, text: TextConfig, image_token: int, starts: tuple[int, int]):
    from transformers import Qwen2_5_VLConfig

    config = Qwen2_5_VLConfig(
        vision_config=dict(
            depth=vision.depth, hidden_size=vision.hidden, intermediate_size=vision.mlp, num_heads=vision.heads, patch_size=vision.patch,
            spatial_merge_size=vision.merge, window_size=vision.window, fullatt_block_indexes=list(vision.full_attention), out_hidden_size=vision.out,
        ),
        text_config=dict(
            vocab_size=text.vocab, hidden_size=text.hidden, intermediate_size=text.mlp, num_hidden_layers=text.layers, num_attention_heads=text.heads,
            num_key_value_heads=text.kv_heads, rms_norm_eps=text.eps, tie_word_embeddings=False, use_cache=False,
            rope_parameters={"rope_type": "default", "rope_theta": text.rope_base, "mrope_section": list(text.rope_sections)},
        ),
        image_token_id=image_token, vision_start_token_id=starts[0], vision_end_token_id=starts[1],
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    return config


class StarVLAPeer:
    """What StarVLA's server does for one request, on transformers' model."""

    def __init__(self, policy: QwenOFTPolicy, device: str):
        from transformers import Qwen2_5_VLModel

        config = policy.config
        self.policy, self.device, self.process = policy, device, processor(config.vision.patch)
        self.ids = {text: qwen_text.token(policy.tokenizer, text) for text in (qwen_text.IMAGE, qwen_text.VISION_START, qwen_text.VISION_END)}
        made = peer_config(config.vision, config.text, self.ids[qwen_text.IMAGE], (self.ids[qwen_text.VISION_START], self.ids[qwen_text.VISION_END]))
        self.model = built(lambda: Qwen2_5_VLModel(made), device)

    def prepare(self, observation: dict) -> dict:
        from PIL import Image

        images = [image for pair in zip(observation["main_images"], observation["wrist_images"], strict=True) for image in pair]
        pixels, grid = resized_patches(images, self.policy.config.image_size, Image.BICUBIC, self.process)
        chunk, template = self.policy.horizon, self.policy.config.template
        texts = [starvla.conversation(starvla.prompt(task, chunk, template), 2, int(grid[0, 1] * grid[0, 2]) // 4) for task in observation["task_descriptions"]]
        ids = torch.tensor([encoded.ids for encoded in self.policy.tokenizer.encode_batch(texts)])
        made = {"input_ids": ids, "pixel_values": pixels, "image_grid_thw": grid, "mm_token_type_ids": (ids == self.ids[qwen_text.IMAGE]).int()}
        return {name: tensor.to(self.device) for name, tensor in made.items()} | {"attention_mask": torch.ones_like(ids, device=self.device)}

    @torch.no_grad()
    def network(self, inputs: dict) -> torch.Tensor:
        hidden = self.model(**inputs, use_cache=False).last_hidden_state
        return self.policy.action_model(self.policy.queries(inputs["input_ids"], hidden)).float()

    def act(self, observation: dict) -> np.ndarray:
        return self.policy.config.codec.decode(self.network(self.prepare(observation))).cpu().numpy()


class LingBotPeer:
    """What LingBot's server does for one request, on transformers' models: Qwen's own prefix pass, then the Euler steps of a Qwen2 of the expert's size."""

    def __init__(self, policy: LingBotPolicy, device: str):
        from transformers import Qwen2_5_VLModel, Qwen2Config, Qwen2Model

        config = policy.config
        text, expert = config.text, config.expert
        self.policy, self.device, self.process = policy, device, processor(config.vision.patch)
        made = peer_config(config.vision, text, 1, (2, 3))
        made.text_config.use_cache = True
        self.model = built(lambda: Qwen2_5_VLModel(made), device)
        small = Qwen2Config(
            vocab_size=8, hidden_size=expert.hidden, intermediate_size=expert.mlp, num_hidden_layers=text.layers, num_attention_heads=text.heads,
            num_key_value_heads=text.kv_heads, head_dim=text.head, use_cache=True,
        )  # fmt: skip
        small._attn_implementation = "sdpa"
        self.expert = built(lambda: Qwen2Model(small), device)

    def prepare(self, observation: dict) -> dict:
        from PIL import Image

        views = np.concatenate([observation["main_images"][:, None], observation["wrist_images"]], 1)
        pixels, grid = resized_patches(list(views.reshape(-1, *views.shape[2:])), self.policy.config.image_size, Image.BILINEAR, self.process)
        rows = [
            lingbot.encode_text(self.policy.tokenizer, lingbot.prompt(text), self.policy.config.max_text, 0)[0] for text in observation["task_descriptions"]
        ]
        state = self.policy.config.joints.state_in(torch.from_numpy(observation["states"]))
        made = {"pixels": pixels, "grid": grid, "tokens": torch.tensor(rows), "state": state}
        return {name: tensor.to(self.device) for name, tensor in made.items()}

    @torch.no_grad()
    def network(self, inputs: dict) -> torch.Tensor:
        net, horizon = self.policy.model, self.policy.horizon
        seen = self.model.visual(inputs["pixels"].to(torch.bfloat16), inputs["grid"]).pooler_output
        batch = len(inputs["tokens"])
        x = torch.cat([seen.reshape(batch, -1, seen.shape[-1]), self.model.language_model.embed_tokens(inputs["tokens"])], 1)
        positions = torch.arange(x.shape[1], device=x.device).expand(3, batch, -1)
        cache = self.model.language_model(inputs_embeds=x, position_ids=positions, use_cache=True).past_key_values
        noisy = torch.randn(batch, horizon, net.width, device=x.device)
        steps = self.policy.config.denoising_steps
        for step in range(steps):
            embedding = lingbot.time_embedding(torch.full((batch,), 1 - step / steps, device=x.device), self.expert.config.hidden_size).bfloat16()
            actions = net.action_in_proj(noisy.bfloat16())
            actions = net.action_time_mlp_out(torch.nn.functional.silu(net.action_time_mlp_in(torch.cat([actions, embedding[:, None].expand_as(actions)], -1))))
            suffix = torch.cat([net.state_proj(inputs["state"].bfloat16())[:, None], actions], 1)
            out = self.expert(inputs_embeds=suffix, past_key_values=cache, use_cache=True).last_hidden_state
            cache.crop(-suffix.shape[1])
            noisy = noisy - net.velocity(out[:, 1:]) / steps
        return noisy

    def act(self, observation: dict) -> np.ndarray:
        return self.policy.config.joints.actions_out(self.network(self.prepare(observation))).cpu().numpy()


# ------------------------------------------------------------------------------------------------ runs


def starvla_floor(policy: QwenOFTPolicy, inputs: dict, rate: float, bandwidth: float) -> float:
    batch, text = len(inputs["tokens"]), policy.config.text
    tokens = int((inputs["tokens"] != policy.pad_id).sum(1).max())
    decoder = phase(numbers(policy.language_model.layers), tokens, attended(text.layers, text.heads * text.head, tokens, tokens / 2), batch, rate, bandwidth)
    head = phase(numbers(policy.action_model), policy.horizon, 0, batch, rate, bandwidth)
    return vision_floor(policy, policy.visual, batch, 2, rate, bandwidth) + decoder + head


def lingbot_floor(policy: LingBotPolicy, inputs: dict, steps: int, rate: float, bandwidth: float) -> float:
    batch, text, net = len(inputs["tokens"]), policy.config.text, policy.model
    prefix = 3 * policy.grid[0] * policy.grid[1] // policy.config.vision.merge**2 + int(inputs["text_mask"].sum(1).max())
    suffix, width = 1 + policy.horizon, text.heads * text.head
    decoder = phase(numbers(net.language_model.layers[:-1]), prefix, attended(text.layers - 1, width, prefix, prefix), batch, rate, bandwidth)
    modulating = sum(p.numel() for layer in net.expert.modulating() for p in layer.parameters())
    step = phase(numbers(net.expert) - modulating, suffix, attended(text.layers, width, suffix, prefix + suffix), batch, rate, bandwidth, steps)
    return vision_floor(policy, net.visual, batch, 3, rate, bandwidth) + decoder + step + phase(modulating, steps, 0, 1, rate, bandwidth)


def attempt(what: str, function):
    try:
        return function()
    except Exception:  # one row that cannot run here (memory, a missing kernel, another library's change) must not cost the others
        print(f"         {what} failed:", flush=True)
        traceback.print_exc()
        return None


@torch.no_grad()
def profile(policy, batch: int) -> None:
    """The kernels of one decision by their total time."""
    views, size = (2, (256, 256)) if policy.family == "starvla" else (3, (240, 320))
    inputs, seeds = policy.prepare(frames(batch, views, size)), torch.zeros(batch, 2, dtype=torch.int64)
    policy.predict(inputs, seeds)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as record:
        policy.predict(inputs, seeds)
        torch.cuda.synchronize()
    print(f"--- kernels of one decision of {policy.family}, batch {batch}, acceleration {policy.config.acceleration}")
    for entry in sorted(record.key_averages(), key=lambda entry: -entry.device_time_total)[:25]:
        print(f"{entry.device_time_total / 1e3:>9.3f} ms  {entry.count:>6} x {entry.device_time_total / entry.count:>8.1f} us  {entry.key[:110]}", flush=True)


def run_family(family: str, device: str, tiny: bool, batches: list[int], modes: list[str], peers: bool, rate: float, bandwidth: float) -> dict:
    views, size = (2, (256, 256)) if family == "starvla" else (3, (240, 320))
    words = tokenizer()
    start = time.perf_counter()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    if family == "starvla":
        robot = replace(robots.LIBERO, state=(), optional_cameras=())
        codec = ActionCodec((-1.0,) * 7, (1.0,) * 7, (True,) * 6 + (False,), (None,) * 6 + (-1.0,), (None,) * 6 + (1.0,))
        policy = (
            QwenOFTPolicy.tiny(robot, codec=codec).bfloat16()
            if tiny
            else built(lambda: QwenOFTPolicy(starvla.Config(robot, codec, template=TEMPLATE), words), device)
        )
    else:
        joints = Joints(Statistics.identity(14, 14), LAYOUTS["unified"], LAYOUTS["unified"])
        config = lingbot.Config(robots.ROBOTWIN, joints, max_text=24)
        policy = LingBotPolicy.tiny(robots.ROBOTWIN).bfloat16() if tiny else built(lambda: LingBotPolicy(config, words), device)
    print(f"{family}: {numbers(policy) / 1e9:.2f} B parameters built in {time.perf_counter() - start:.1f} s", flush=True)
    if device == "cuda":
        print(f"         {torch.cuda.memory_allocated() / 2**30:.1f} GiB of weights", flush=True)

    def rows(mode: str, batch: int) -> None:
        policy.config = replace(policy.config, acceleration=mode)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        observation = frames(batch, views, size)
        inputs = policy.prepare(observation)
        if family == "starvla":
            least = starvla_floor(policy, inputs, rate, bandwidth)
        else:
            least = lingbot_floor(policy, inputs, policy.config.denoising_steps, rate, bandwidth)
        seeds = torch.zeros(batch, 2, dtype=torch.int64)
        floors = {"network": least, "act": least, "sample": least}
        calls = {"network": lambda: policy.predict(inputs, seeds), "act": lambda: policy.act(observation), "sample": lambda: policy.sample(observation, seeds)}
        if mode == "off":
            calls = {"network": calls["network"], "act": calls["act"]}
        for stage, call in calls.items():
            report(family=family, who=f"vlahub {mode}", stage=stage, batch=batch, ms=measure(call, device, 1.0), floor_ms=floors[stage])
        if device == "cuda":
            print(f"         {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB at most", flush=True)

    for batch in batches:
        for mode in modes:
            attempt(f"vlahub {mode}, batch {batch}", lambda mode=mode, batch=batch: rows(mode, batch))
    if peers:
        policy.fast.release()
        peer = attempt("building the peer", lambda: (StarVLAPeer if family == "starvla" else LingBotPeer)(policy, device))
        if peer is not None:
            for batch in batches:
                observation = frames(batch, views, size)

                def peer_rows(batch=batch, observation=observation) -> None:
                    inputs = peer.prepare(observation)
                    for stage, call in (("network", lambda: peer.network(inputs)), ("act", lambda: peer.act(observation))):
                        report(family=family, who="transformers eager", stage=stage, batch=batch, ms=measure(call, device, 1.0))

                attempt(f"peer, batch {batch}", peer_rows)
            if family == "starvla":
                attempt("comparison with the peer", lambda: compare(policy, peer, frames(2, views, size)))
            del peer
    if device == "cuda":
        torch.cuda.empty_cache()
    return {"policy": policy, "rows": rows}


@torch.no_grad()
def compare(policy: QwenOFTPolicy, peer: StarVLAPeer, observation: dict) -> None:
    """Do both compute the same from the same weights?"""
    theirs = peer.model.state_dict()
    for name, tensor in policy.state_dict().items():
        if name in theirs:
            tensor.copy_(theirs[name])
    expected = peer.network(peer.prepare(observation))
    for mode in ("off", "graph"):
        policy.config = replace(policy.config, acceleration=mode)
        got = policy(policy.prepare(observation))[0]
        error = float((got - expected).norm() / expected.norm())
        ROWS.append({"family": "starvla", "who": f"vlahub {mode}", "stage": "difference from transformers, same weights", "relative": error})
        print(f"         vlahub {mode} and transformers differ by {error:.1e} of the norm on the same bf16 weights", flush=True)


def summary() -> None:
    """Speed-ups at each batch size, the quickest of our modes against the peer."""
    for family in ("starvla", "lingbot"):
        for stage in ("act", "network"):
            for batch in sorted({row["batch"] for row in ROWS if row["family"] == family and "batch" in row}):
                here = [row for row in ROWS if row["family"] == family and row["stage"] == stage and row.get("batch") == batch]
                ours = [row["ms"] for row in here if row["who"].startswith("vlahub")]
                theirs = [row["ms"] for row in here if row["who"].startswith("transformers")]
                if ours and theirs:
                    print(f"{family:<8} {stage:<8} batch {batch:>3}: {min(theirs) / min(ours):.2f} times as fast as transformers eager", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to try the script")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to try the script")
    parser.add_argument("--families", nargs="+", default=["starvla", "lingbot"], choices=["starvla", "lingbot"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 64])
    parser.add_argument("--modes", nargs="*", default=["off", "graph"], choices=["off", "graph"], help="forms of inference besides the compiled one")
    parser.add_argument("--profile", action="store_true", help="print the kernels of a decision at the largest batch")
    parser.add_argument("--no-peers", action="store_true", help="leave transformers out")
    parser.add_argument("--compile-batches", nargs="*", type=int, default=[1, 64], help="batch sizes at which the compiled form is measured too")
    parser.add_argument("--seconds", type=float, default=230.0, help="no new compiled row is begun after this time")
    options = parser.parse_args()
    device = options.device
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("latency_qwen: no CUDA device; try --device cpu --tiny")
    begun = time.perf_counter()
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    rate, bandwidth = ceilings(device)
    print(f"{name}, torch {torch.__version__}: {rate / 1e12:.0f} TFLOP/s bf16, {bandwidth / 1e12:.2f} TB/s copy", flush=True)
    ROWS.append({"family": "", "who": name, "stage": "ceilings", "tflops": rate / 1e12, "tb_per_s": bandwidth / 1e12, "torch": torch.__version__})
    for index, family in enumerate(options.families):
        # each family gets its share of the time, compiled rows last
        done = run_family(family, device, options.tiny, options.batches, options.modes, not options.no_peers, rate, bandwidth)
        until = begun + options.seconds * (index + 1) / len(options.families)
        for batch in options.compile_batches if device == "cuda" else []:
            if time.perf_counter() > until - 15:
                print(f"         compiled, batch {batch}: left out, the time is up", flush=True)
                continue
            attempt(f"vlahub compile, batch {batch}", lambda batch=batch, done=done: done["rows"]("compile", batch))
        if options.profile and device == "cuda":
            attempt("the profile", lambda done=done: profile(done["policy"], options.batches[-1]))
        done.clear()
        gc.collect()  # a policy and what accelerates it point at each other
        if device == "cuda":
            torch.cuda.empty_cache()
    summary()
    print(f"whole run {time.perf_counter() - begun:.0f} s", flush=True)
    save()


if __name__ == "__main__":
    main()
