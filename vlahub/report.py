"""results.json and the recorded episodes as one HTML page that needs nothing beside it: styles, pictures and short videos are inside."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

# Larger videos are linked: a page of tens of megabytes is slow to open and to send.
LARGEST_INLINE_VIDEO = 2_000_000
LARGEST_INLINE_TOTAL = 20_000_000
MOST_LISTED = 2000  # episodes in the page's table; results.json has all


@dataclass
class Clip:
    """One recorded episode."""

    episode: int  # its index
    success: bool
    words: str  # what stands under it
    name: str  # the file's path relative to the report
    data: bytes  # the mp4
    poster: np.ndarray  # its last picture [H, W, 3]


def render(results: Mapping[str, Any], clips: Sequence[Clip] = ()) -> str:
    """The page, from what results.json holds."""
    parts = [_headline(results), _warnings(results), _figures(results), _tasks(results), _clips(clips), _episodes(results), _settings(results)]
    title = f"{results['settings']['policy']} on {results['settings']['env']}"
    return PAGE.replace("{{title}}", html.escape(title)).replace("{{style}}", STYLE).replace("{{body}}", "\n".join(part for part in parts if part))


def percent(rate: float | None) -> str:
    """A rate with the digits that a few hundred episodes can carry."""
    return "no rate" if rate is None else f"{100 * rate:.1f} %"


def bar(rate: float | None, interval: Sequence[float]) -> str:
    """A bar from 0 to 1 with its confidence interval as a band and a tick at the rate."""
    if rate is None:
        return '<span class="bar"></span>'
    low, high = (100 * bound for bound in interval)
    return (
        f'<span class="bar" role="img" aria-label="{percent(rate)}, between {low:.1f} and {high:.1f} %"><i class="fill" style="width:{100 * rate:.2f}%"></i>'
        f'<i class="band" style="left:{low:.2f}%;width:{high - low:.2f}%"></i></span>'
    )


def _headline(results: Mapping[str, Any]) -> str:
    low, high = (100 * bound for bound in results["interval"])
    state = "" if results["finished"] else '<span class="badge bad">unfinished</span>'
    return (
        f'<header><p class="over">vlahub evaluation {state}</p><h1>{html.escape(results["settings"]["policy"])}</h1>'
        f'<p class="on">on <b>{html.escape(results["settings"]["env"])}</b>, assets: {html.escape(results["settings"]["assets"])}</p>'
        f'<div class="hero"><div class="rate">{percent(results["success_rate"])}</div><div class="grow">{bar(results["success_rate"], results["interval"])}'
        f"<p>{results['successes']} of {results['counted']} episodes solved; 95 % interval {low:.1f} to {high:.1f} % (Wilson)</p></div></div></header>"
    )


def _warnings(results: Mapping[str, Any]) -> str:
    if not results["warnings"]:
        return ""
    return '<section class="warnings">' + "".join(f"<p>{html.escape(warning)}</p>" for warning in results["warnings"]) + "</section>"


def _number(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def _figures(results: Mapping[str, Any]) -> str:
    time = results["time"]
    figures = [
        (f"{results['counted']}", "episodes counted"),
        (f"{results['aborted']}", "aborted, not counted"),
        (_number(results["mean_length"]), "control steps per episode"),
        (_number(results["mean_return"], 2), "return per episode"),
        (f"{time['simulate_seconds']:,.1f} s", "waiting for the simulation"),
        (f"{time['infer_seconds']:,.1f} s", "in the policy"),
    ]
    cards = "".join(f'<div class="card"><b>{html.escape(value)}</b><span>{what}</span></div>' for value, what in figures)
    return f'<section class="cards">{cards}</section>'


def _tasks(results: Mapping[str, Any]) -> str:
    rows = "".join(
        f'<tr><td class="num">{task["task"]}</td><td>{html.escape(task["instruction"])}</td><td class="num">{task["successes"]} / {task["counted"]}</td>'
        f'<td class="num">{percent(task["success_rate"])}</td><td class="wide">{bar(task["success_rate"], task["interval"])}</td>'
        f'<td class="num">{_number(task["mean_length"])}</td><td class="num">{_number(task["mean_return"], 2)}</td><td class="num">{task["aborted"]}</td></tr>'
        for task in results["tasks"]
    )
    return (
        '<section><h2>Tasks</h2><div class="scroll"><table><thead><tr><th>task</th><th>instruction</th><th>solved</th><th>rate</th>'
        f"<th>95 % interval</th><th>steps</th><th>return</th><th>aborted</th></tr></thead><tbody>{rows}</tbody></table></div></section>"
    )


def _clips(clips: Sequence[Clip]) -> str:
    if not clips:
        return ""
    cells, inlined = [], 0
    for clip in clips:
        poster = f"data:image/jpeg;base64,{_jpeg(clip.poster)}"
        badge = '<span class="badge good">solved</span>' if clip.success else '<span class="badge bad">not solved</span>'
        if len(clip.data) <= LARGEST_INLINE_VIDEO and inlined + len(clip.data) <= LARGEST_INLINE_TOTAL:
            inlined += len(clip.data)
            source = f"data:video/mp4;base64,{base64.b64encode(clip.data).decode()}"
            shown = f'<video controls muted loop playsinline preload="metadata" poster="{poster}" src="{source}"></video>'
        else:
            shown = f'<a href="{html.escape(clip.name)}"><img alt="last picture of episode {clip.episode}" src="{poster}"></a>'
        cells.append(
            f"<figure>{shown}<figcaption>{badge} <b>episode {clip.episode}</b> {html.escape(clip.words)} "
            f'<a href="{html.escape(clip.name)}" title="{html.escape(clip.name)}">mp4</a></figcaption></figure>'
        )
    return f'<section><h2>Recorded episodes</h2><div class="clips">{"".join(cells)}</div></section>'


def _jpeg(picture: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=80)
    return base64.b64encode(buffer.getvalue()).decode()


def _episodes(results: Mapping[str, Any]) -> str:
    def outcome(episode: Mapping[str, Any]) -> str:
        if episode["aborted"]:
            return '<span class="badge">aborted</span>'
        return '<span class="badge good">solved</span>' if episode["success"] else '<span class="badge bad">not solved</span>'

    rows = "".join(
        f'<tr><td class="num">{episode["index"]}</td><td class="num">{episode["task"]}</td><td class="num">{episode["trial"]}</td><td class="num">{episode["seed"]}</td>'
        f'<td>{outcome(episode)}</td><td class="num">{episode["length"]}</td><td class="num">{episode["return"]:.2f}</td><td>{html.escape(episode["instruction"])}<small>{html.escape(episode["aborted"])}</small></td></tr>'
        for episode in results["episodes"][:MOST_LISTED]
    )
    more = len(results["episodes"]) - MOST_LISTED
    return (
        f'<section><details><summary><h2>All {len(results["episodes"])} episodes</h2></summary><div class="scroll"><table><thead><tr><th>episode</th><th>task</th>'
        "<th>trial</th><th>seed</th><th>outcome</th><th>steps</th><th>return</th><th>instruction</th></tr></thead>"
        f"<tbody>{rows}</tbody></table></div>{f'<p>and {more} more in results.json</p>' if more > 0 else ''}</details></section>"
    )


def _settings(results: Mapping[str, Any]) -> str:
    def rows(record: Mapping[str, Any]) -> str:
        return "".join(
            f"<tr><th>{html.escape(str(name).replace('_', ' '))}</th><td>{html.escape(value if isinstance(value, str) else json.dumps(value))}</td></tr>"
            for name, value in record.items()
            if value not in ("", None, {})
        )

    return (
        f'<section><h2>How to repeat it</h2><pre>{html.escape(results["command"])}</pre><div class="pair"><div><h3>Settings</h3><table class="plain">{rows(results["settings"])}</table></div>'
        f'<div><h3>Versions</h3><table class="plain">{rows(results["versions"])}</table></div></div>'
        f'<p class="over">written {html.escape(results["date"])}; the same figures, for machines, are in results.json</p></section>'
    )


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{title}}</title>
<style>{{style}}</style>
</head>
<body><main>
{{body}}
</main></body>
</html>
"""

STYLE = """
:root { color-scheme: light dark; --ink: #1c2127; --soft: #66707c; --paper: #f6f7f9; --card: #fff; --line: #e1e5ea; --good: #1f8a4c; --bad: #c0392b; --accent: #2f6fde; --warn: #fff4d6; }
@media (prefers-color-scheme: dark) { :root { --ink: #e7eaee; --soft: #98a2ae; --paper: #14171b; --card: #1d2126; --line: #30363d; --good: #53c985; --bad: #f0796b; --accent: #6ea1ff; --warn: #40360f; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1060px; margin: 0 auto; padding: 32px 20px 60px; }
h1 { margin: 0; font-size: 30px; line-height: 1.2; overflow-wrap: anywhere; }
h2 { margin: 0 0 12px; font-size: 18px; }
h3 { margin: 0 0 6px; font-size: 14px; color: var(--soft); }
.over { margin: 0 0 4px; color: var(--soft); font-size: 13px; }
.on { margin: 2px 0 18px; color: var(--soft); font-size: 17px; }
section, .hero { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 18px 20px; margin: 0 0 16px; }
.hero { display: flex; gap: 26px; align-items: center; flex-wrap: wrap; }
.hero p { margin: 8px 0 0; color: var(--soft); }
.rate { font-size: 46px; font-weight: 700; letter-spacing: -1px; font-variant-numeric: tabular-nums; }
.grow { flex: 1; min-width: 260px; }
.bar { position: relative; display: block; height: 12px; min-width: 120px; border-radius: 6px; background: var(--line); overflow: hidden; }
.bar .fill { position: absolute; inset: 0 auto 0 0; background: var(--accent); }
.bar .band { position: absolute; top: 3px; bottom: 3px; background: var(--ink); opacity: .45; border-radius: 3px; }
.warnings { background: var(--warn); }
.warnings p { margin: 0; }
.warnings p + p { margin-top: 6px; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(140px, 1fr)); gap: 12px; padding: 0; background: none; border: 0; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 12px 14px; }
.card b { display: block; font-size: 20px; font-variant-numeric: tabular-nums; }
.card span { color: var(--soft); font-size: 13px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th { text-align: left; color: var(--soft); font-weight: 500; }
th, td { padding: 6px 10px; border-bottom: 1px solid var(--line); vertical-align: middle; }
tbody tr:last-child td, tbody tr:last-child th { border-bottom: 0; }
.num { font-variant-numeric: tabular-nums; white-space: nowrap; }
td small { display: block; color: var(--soft); }
.wide { width: 24%; min-width: 140px; }
.plain th { white-space: nowrap; vertical-align: top; }
.plain td { overflow-wrap: anywhere; }
.clips { display: grid; grid-template-columns: repeat(auto-fill, minmax(230px, 1fr)); gap: 16px; }
figure { margin: 0; }
figure video, figure img { width: 100%; border-radius: 8px; background: #000; display: block; }
figcaption { margin-top: 6px; font-size: 13px; color: var(--soft); }
.badge { display: inline-block; padding: 0 8px; border-radius: 9px; font-size: 12px; line-height: 18px; background: var(--line); color: var(--ink); }
.badge.good { background: var(--good); color: var(--card); }
.badge.bad { background: var(--bad); color: var(--card); }
a { color: var(--accent); }
details summary { cursor: pointer; }
details summary h2 { display: inline; }
details[open] summary { margin-bottom: 12px; }
pre { margin: 0 0 16px; padding: 12px 14px; overflow-x: auto; background: var(--paper); border: 1px solid var(--line); border-radius: 8px; font-size: 13px; white-space: pre-wrap; overflow-wrap: anywhere; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(320px, 1fr)); gap: 24px; }
"""
