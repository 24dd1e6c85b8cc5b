"""Random access to LeRobot datasets: samples per second of the loader for PNG, JPEG and mp4 pictures, and what a training step needs.

    python -m benchmarks.dataset_speed
    python -m benchmarks.dataset_speed --size 480 640 --frames 400 --threads 8

Every format holds the same frames: a textured picture in which things move, with camera noise, so that no format has it easy. Nothing is cached, batches are 16
frames at random places, and each format is read in turn in every round.
"""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal

import numpy as np
import tyro

from vlahub.dataset import Dataset, DatasetWriter, Loader
from vlahub.interface import Camera, Field, Interface


@dataclass
class Args:
    """What to measure."""

    size: tuple[int, int] = (224, 224)
    """height and width of the pictures"""
    frames: int = 320
    """frames per format, in episodes of 40"""
    batch: int = 16
    """frames per batch"""
    batches: int = 10
    """batches per round"""
    rounds: int = 3
    """the figures are medians over rounds"""
    threads: int = 2
    """threads that decode"""
    formats: tuple[Literal["png", "jpeg", "video"], ...] = ("png", "jpeg", "video")
    """pictures' formats; video needs PyAV"""
    out: Path | None = None
    """write the figures here as JSON"""


def film(size: tuple[int, int], length: int, rng: np.random.Generator) -> np.ndarray:
    """[L, H, W, 3]: a smooth background, a moving bright patch, noise."""
    height, width = size
    y, x = np.mgrid[:height, :width]
    still = 110 + 60 * np.sin(x / 17)[..., None] * np.cos(y[..., None] / 23 + np.arange(3))
    frames = np.repeat(still[None], length, 0) + rng.normal(0, 2, (length, height, width, 3))
    for i in range(length):
        top, left = int((height - 20) * i / length), int((width - 20) * (1 - i / length))
        frames[i, top : top + 20, left : left + 20] = 230
    return np.clip(frames, 0, 255).astype(np.uint8)


def main(args: Args) -> None:
    interface = Interface(main=Camera("front", *args.size), state=(Field("state", 7, "1"),), action=(Field("action", 7, "1"),), control_hz=5)
    rng = np.random.default_rng(0)
    results: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        loaders = {}
        for images in args.formats:
            writer = DatasetWriter(Path(folder, images), interface, fps=5, images=images)
            for _ in range(args.frames // 40):
                pictures = film(args.size, 40, rng)
                observations = [{"main_images": picture, "states": np.zeros(7, np.float32), "task_descriptions": "go"} for picture in pictures]
                writer.add_episode(observations, np.zeros((40, 7), np.float32))
            size = sum(file.stat().st_size for file in Path(folder, images).rglob("*") if file.is_file())
            results[images] = {"bytes_per_frame": size / args.frames}
            loaders[images] = Loader([Dataset(Path(folder, images), horizon=8, cache_gb=0)], args.batch, workers=args.threads)
        rates: dict[str, list[float]] = {images: [] for images in loaders}
        for number in range(args.rounds + 1):
            for images, loader in loaders.items():
                begin = time.perf_counter()
                for _ in range(args.batches):
                    next(loader)
                if number:
                    rates[images].append(args.batches * args.batch / (time.perf_counter() - begin))
    print(f"pictures of {args.size[0]} x {args.size[1]}, {args.threads} threads, batches of {args.batch} at random places, nothing cached:")
    for images, values in rates.items():
        results[images]["samples_per_second"] = median(values)
        print(f"  {images:5s} {median(values):7.0f} samples/s, {results[images]['bytes_per_frame'] / 1000:6.1f} kB per frame")
    if args.out:
        args.out.write_text(json.dumps({"size": args.size, "threads": args.threads, "formats": results}, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
