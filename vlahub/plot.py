"""Curves of training runs as a PNG, from the TensorBoard files that every run writes.

vlahub plot runs/ppo-a runs/ppo-b --metrics eval/success_rate "train/actor/*"
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from vlahub import catalog

Curves = Mapping[str, list[tuple[int, float]]]  # metric -> (step, value)

# Drawn if no metric is named, in this order, as far as the runs have them
DEFAULT = (
    "eval/success_rate",
    "env/success_rate",
    "env/return",
    "env/episode_len",
    "train/sft_loss",
    "train/ppo_loss",
    "train/loss_ratio",
    "train/actor/policy_loss",
    "train/critic/value_loss",
    "train/actor/approx_kl",
    "train/actor/grad_norm",
    "rollout/groups_kept",
    "charts/SPS",
)
COLUMNS = 3


def read(run: str | Path) -> Curves:
    """All scalars of a run, by step. What a resumed run logged again stands there once, as logged last."""
    run = Path(run)
    if not run.is_dir() or not any(run.glob("events.out.tfevents.*")):
        inside = sorted({file.parent.name for file in run.glob("*/events.out.tfevents.*")}) if run.is_dir() else []
        raise FileNotFoundError(
            f"{run} is no folder of a run: it holds no TensorBoard file" + (f"; name the runs in it ({', '.join(inside[:5])})" if inside else "")
        )
    catalog.require(("tensorboard",), "train", "reading curves")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run), size_guidance={"scalars": 0})  # 0: all of them, not a sample
    events.Reload()
    return {name: sorted({event.step: event.value for event in events.Scalars(name)}.items()) for name in events.Tags()["scalars"]}


def choose(curves: Sequence[Curves], metrics: Sequence[str]) -> list[str]:
    """The metrics to draw: those that match, in the order of the patterns."""
    known = sorted({name for run in curves for name in run})
    chosen: list[str] = []
    for pattern in metrics or DEFAULT:
        found = fnmatch.filter(known, pattern)
        if not found and metrics:
            raise ValueError(f"no run has a metric {pattern!r}; {catalog.suggest(pattern, known)}")
        chosen += [name for name in found if name not in chosen]
    if not chosen:
        raise ValueError(f"the runs have none of the usual metrics; name some with --metrics. They have {', '.join(known) or 'none at all'}")
    return chosen


def labels(runs: Sequence[Path]) -> list[str]:
    """The runs' names, with the folder above where two are called alike."""
    names = [run.resolve().name for run in runs]
    return [f"{run.resolve().parent.name}/{name}" if names.count(name) > 1 else name for run, name in zip(runs, names, strict=True)]


def plot(runs: Sequence[str | Path], out: str | Path = "curves.png", metrics: Sequence[str] = ()) -> Path:
    """Draw curves of several runs over each other, one panel per metric. Returns the picture's path."""
    runs, out = [Path(run) for run in runs], Path(out)
    if not runs:
        raise ValueError("no run given: vlahub plot RUN [RUN ...]")
    if out.suffix.lower() != ".png":
        raise ValueError(f"--out must end in .png, not {out.name!r}")
    curves = [read(run) for run in runs]
    chosen = choose(curves, metrics)
    catalog.require(("matplotlib",), "train", "drawing curves")
    from matplotlib.figure import Figure  # without pyplot, which would look for a screen

    columns = min(COLUMNS, len(chosen))
    rows = math.ceil(len(chosen) / columns)
    names, width = labels(runs), 4.6 * columns
    abreast = max(1, min(len(runs), int(width / (0.5 + 0.08 * max(map(len, names))))))  # of the legend; inches of a line and of a letter
    figure = Figure(figsize=(width, 3.1 * rows + 0.3 + 0.2 * math.ceil(len(runs) / abreast)), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for panel, name in zip(panels, chosen, strict=False):
        for i, (run, label) in enumerate(zip(curves, names, strict=True)):
            if name in run:
                steps, values = zip(*run[name], strict=True)
                few = len(steps) <= 20  # single points of a short curve, and one alone, must be seen
                panel.plot(steps, values, label=label, color=f"C{i}", linewidth=1.4, marker="o" if few else None, markersize=3)
        panel.set_title(name, fontsize=10)
        panel.grid(alpha=0.3)
        panel.tick_params(labelsize=8)
        panel.ticklabel_format(axis="x", style="sci", scilimits=(0, 4))
        if name.endswith("success_rate"):
            panel.set_ylim(-0.03, 1.03)
    for panel in panels[len(chosen) :]:
        panel.set_visible(False)
    for panel in panels[max(0, len(chosen) - columns) : len(chosen)]:
        panel.set_xlabel("step (control steps; optimizer steps in SFT)", fontsize=8)
    drawn = {label: line for panel in panels for line, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    figure.legend(drawn.values(), drawn.keys(), loc="outside upper center", ncols=abreast, fontsize=9)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)
    return out
