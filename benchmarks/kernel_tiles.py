"""Which tiles are quickest for the Triton kernels of pi0's action expert on this GPU: the choices in vlahub_policies/parts/kernels.py, one product at a time.

    python benchmarks/kernel_tiles.py            # prints a row per choice, then the best; a JSON copy in $OUT if that is set
    python benchmarks/kernel_tiles.py --adaptive # pi0.5's layers

A row is the time of the expert's 18 layers at batch 1 in one CUDA graph, every layer with weights of its own, so that they come from memory as they do in use.
"""

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.policy_latency import measure
from vlahub_policies.parts import capture, gemma, kernels
from vlahub_policies.parts.kernels import Tile

CHOICES = {
    "gate_up": [
        Tile(32, 128, 4, 4),
        Tile(32, 128, 4, 3),
        Tile(32, 128, 8, 4),
        Tile(32, 64, 4, 6),
        Tile(64, 64, 4, 5),
        Tile(64, 128, 8, 3),
        Tile(16, 128, 4, 5),
    ],
    "qkv": [Tile(16, 128, 4, 4), Tile(16, 64, 4, 6), Tile(16, 256, 4, 3), Tile(32, 128, 4, 4), Tile(32, 64, 4, 6)],
    "down": [Tile(32, 128, 4, 4, 4), Tile(64, 64, 4, 5, 2), Tile(64, 64, 4, 6, 4), Tile(32, 128, 4, 5, 2), Tile(32, 128, 4, 4, 8), Tile(16, 128, 4, 5, 2)],
    "out": [Tile(32, 128, 4, 4, 4), Tile(16, 128, 4, 5, 2), Tile(32, 128, 4, 4, 2), Tile(32, 128, 4, 4, 8)],
    "attention": [(16, 4, 5), (16, 4, 4), (16, 4, 3), (16, 8, 3)],
}


class Step:
    """The layers of one denoising step."""

    def __init__(self, adaptive: bool, past: int, length: int, config: gemma.GemmaConfig):
        self.gemma = gemma.Gemma(config, adaptive).cuda()
        for layer in self.gemma.layers:
            for module in (layer.self_attn, layer.mlp):
                module.to(torch.bfloat16)
        gemma.pack(self.gemma)
        self.depth = config.depth
        self.bias = gemma.bias_of(torch.ones(1, length, past + length, dtype=torch.bool, device="cuda"), torch.bfloat16)
        self.turn = gemma.rotation(torch.arange(past, past + length, device="cuda")[None], config.head_dim)
        self.past = [tuple(torch.randn(1, past, 1, config.head_dim, device="cuda", dtype=torch.bfloat16) for _ in range(2)) for _ in range(config.depth)]
        self.modulations = [0.1 * torch.randn(1, 1, 3 * config.width, device="cuda") for _ in self.gemma.norms()] if adaptive else None
        self.x = torch.randn(1, length, config.width, device="cuda")

    @torch.no_grad()
    def time(self, run: Callable) -> tuple[float, torch.Tensor]:
        """(microseconds per layer, output)"""
        captured = capture.Captured(lambda inputs: {"x": run(self.gemma, inputs["x"], self.turn, self.bias, self.past, self.modulations)[0]})
        out = captured({"x": self.x})["x"].clone()
        return 1e3 * measure(lambda: captured({"x": self.x}), "cuda", 0.15, least=20, most=60) / self.depth, out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adaptive", action="store_true", help="pi0.5's layers, whose norms are adaptive")
    parser.add_argument("--seconds", type=float, default=150.0, help="no further choice is tried after this time")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("kernel_tiles: no CUDA device")
    begun, rows = time.perf_counter(), []
    step = Step(options.adaptive, 560, 50 if options.adaptive else 51, gemma.GemmaConfig(width=1024, mlp_dim=4096))
    us, plain = step.time(gemma.Gemma.forward)
    print(f"plain layers in a graph {us:>7.2f} us per layer", flush=True)

    def attempt(what: str, choice: object) -> float:
        try:
            us, out = step.time(kernels.stack)
        except Exception as error:  # a choice that does not fit this GPU: say so and try the others
            traceback.print_exc(limit=1)
            print(f"{what:<10} {choice!s:<75} failed: {(str(error) or type(error).__name__).splitlines()[0][:90]}", flush=True)
            return float("inf")
        error = float((out - plain).norm() / plain.norm())
        print(f"{what:<10} {choice!s:<75} {us:>7.2f} us per layer, differs from plain by {error:.1e}", flush=True)
        rows.append({"what": what, "choice": str(choice), "us": us, "difference": error})
        return us

    overlaps = kernels._overlaps
    for what, choices in CHOICES.items():
        found = []
        for choice in choices:
            if time.perf_counter() - begun > options.seconds:
                break
            put(what, choice)
            found.append((attempt(what, choice), choice))
        put(what, min(found, key=lambda pair: pair[0])[1] if found else choices[0])
    kernels._overlaps = lambda device: False
    attempt("best", "one kernel after the other")
    kernels._overlaps = overlaps
    attempt("best", "overlapping")
    chosen = {name: asdict(tile) for name, tile in kernels.TILES.items()} | {"attention": kernels.ATTENTION}
    print(f"best: {chosen}\nwhole run {time.perf_counter() - begun:.0f} s", flush=True)
    if os.environ.get("OUT"):
        (Path(os.environ["OUT"]) / "kernel_tiles.json").write_text(json.dumps({"rows": rows, "best": chosen}, indent=1))


def put(what: str, choice: object) -> None:
    if what == "attention":
        kernels.ATTENTION = choice
    else:
        kernels.TILES[what] = choice


if __name__ == "__main__":
    main()
