"""Which assets the cell is built of: the official release if it is on this machine, else generated stand-ins. One set serves the whole cell."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from vlahub_envs.twin.objects import THINGS, TRAY, Thing

REPOSITORIES = ("RLinf/RLCo-maniskill-assets", "RLinf/maniskill_assets")  # datasets on the Hugging Face hub: the cell's own assets, and those below them
TABLE = "custom_assets/bridge_table_long.glb"
VISUALS = ("textured.obj", "textured.dae", "textured.glb")  # the first that exists
HOW_TO_GET = (
    "get them with "
    + " and ".join(f"`hf download {repository} --repo-type dataset --local-dir DIR/twin`" for repository in REPOSITORIES)
    + " and set VLAHUB_ASSETS=DIR (or pass assets='DIR/twin')"
)


@dataclass(frozen=True)
class Files:
    collision: Path  # convex pieces
    visual: Path


@dataclass(frozen=True)
class AssetSet:
    name: str  # "official" or "stand-in"
    folder: Path | None = None

    @property
    def table(self) -> Path | None:
        return None if self.folder is None else self.folder / TABLE

    def files(self, thing: Thing) -> Files | None:
        """None: build the stand-in."""
        if self.folder is None:
            return None
        folder = self.folder / place(thing)
        return Files(folder / "collision.obj", next(folder / name for name in VISUALS if (folder / name).is_file()))

    def bottom(self, thing: Thing) -> float:
        """z of an object's lowest point in its own frame."""
        if self.folder is None:
            return thing.bottom
        records = json.loads((self.folder / place(thing)).parent.joinpath("model_db.json").read_text())
        return float(records[thing.key]["bbox"]["min"][2])


def place(thing: Thing) -> str:
    return f"carrot/{'more_plate' if thing is TRAY else 'more_carrot'}/{thing.key}"


def missing(folder: Path) -> list[str]:
    """What of the release `folder` lacks, of all that the cell needs."""
    gone = [] if (folder / TABLE).is_file() else [TABLE]
    for thing in (*THINGS, TRAY):
        records = f"{Path(place(thing)).parent}/model_db.json"
        if records not in gone and not (folder / records).is_file():
            gone.append(records)
        if not (folder / place(thing) / "collision.obj").is_file():
            gone.append(f"{place(thing)}/collision.obj")
        if not any((folder / place(thing) / name).is_file() for name in VISUALS):
            gone.append(f"{place(thing)}/{VISUALS[0]}")
    return gone


def default_folder() -> Path:
    """Where the official release is looked for: `twin` in $VLAHUB_ASSETS, or in ~/.cache/vlahub/assets."""
    return Path(os.environ.get("VLAHUB_ASSETS") or Path.home() / ".cache" / "vlahub" / "assets").expanduser() / "twin"


def find(assets: str | os.PathLike) -> AssetSet:
    """One set serves the whole cell: the two are never mixed.

    Args:
        assets: "auto" (the official release if it is complete, else stand-ins), "official", "stand-in", or the folder of the official release.
    """
    if assets == "stand-in":
        return AssetSet("stand-in")
    folder = default_folder() if assets in ("auto", "official") else Path(assets).expanduser()
    gone = missing(folder)
    if not gone:
        return AssetSet("official", folder)
    if assets == "auto":
        return AssetSet("stand-in")
    if assets != "official" and not folder.is_dir():
        raise FileNotFoundError(
            f"assets={str(assets)!r} is no folder; it must be 'auto', 'official', 'stand-in' or the folder of the official release: {HOW_TO_GET}"
        )
    raise FileNotFoundError(
        f"the twin's official assets are not (all) in {folder}: {', '.join(gone[:4])}{' ...' if len(gone) > 4 else ''} missing; {HOW_TO_GET}"
    )
