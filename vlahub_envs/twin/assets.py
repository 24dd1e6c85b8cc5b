"""Which assets the cell is built of: the two official releases if they are on this machine, else generated stand-ins."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from vlahub import assets as releases
from vlahub_envs.twin.objects import THINGS, TRAY, Thing

TABLE = "custom_assets/bridge_table_long.glb"
VISUALS = ("textured.obj", "textured.dae", "textured.glb")  # the first that exists


@dataclass(frozen=True)
class Files:
    collision: Path  # convex pieces
    visual: Path


@dataclass(frozen=True)
class AssetSet:
    name: str  # "official" or "stand-in"
    table: Path | None = None  # None: build the stand-in
    objects: Path | None = None  # the folder that holds `carrot`

    def files(self, thing: Thing) -> Files | None:
        """None: build the stand-in."""
        if self.objects is None:
            return None
        folder = self.objects / place(thing)
        return Files(folder / "collision.obj", next(folder / name for name in VISUALS if (folder / name).is_file()))

    def bottom(self, thing: Thing) -> float:
        """z of an object's lowest point in its own frame."""
        if self.objects is None:
            return thing.bottom
        records = json.loads((self.objects / place(thing)).parent.joinpath("model_db.json").read_text())
        return float(records[thing.key]["bbox"]["min"][2])


def place(thing: Thing) -> str:
    return f"carrot/{'more_plate' if thing is TRAY else 'more_carrot'}/{thing.key}"


def missing_table(folder: Path) -> list[str]:
    """What of the cell's own release `folder` lacks."""
    return [] if (folder / TABLE).is_file() else [TABLE]


def missing_objects(folder: Path) -> list[str]:
    """What of the objects' release `folder` lacks, of all that the cell needs."""
    gone = []
    for thing in (*THINGS, TRAY):
        records = f"{Path(place(thing)).parent}/model_db.json"
        if records not in gone and not (folder / records).is_file():
            gone.append(records)
        if not (folder / place(thing) / "collision.obj").is_file():
            gone.append(f"{place(thing)}/collision.obj")
        if not any((folder / place(thing) / name).is_file() for name in VISUALS):
            gone.append(f"{place(thing)}/{VISUALS[0]}")
    return gone


def find(assets: str | os.PathLike) -> AssetSet:
    """One set serves the whole cell: the two are never mixed.

    Args:
        assets: "auto" (the official releases if both are complete, else stand-ins), "official", "stand-in", or a folder that holds both releases.
    """
    if assets == "stand-in":
        return AssetSet("stand-in")
    if assets in ("auto", "official"):
        table, objects = releases.find("twin"), releases.find("twin-objects")
        if table and objects:
            return AssetSet("official", table / TABLE, objects)
        if assets == "auto":
            return AssetSet("stand-in")
        lacking = [name for name, found in (("twin", table), ("twin-objects", objects)) if not found]
        raise FileNotFoundError(
            f"the twin's official assets are not complete on this machine: {'; '.join(f'{name}: {releases.how_to_get(name)}' for name in lacking)}"
        )
    folder = Path(assets).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"assets={str(assets)!r} is no folder; it must be 'auto', 'official', 'stand-in' or a folder that holds both official releases")
    if gone := [*missing_table(folder), *missing_objects(folder)]:
        raise FileNotFoundError(f"{folder} {releases.complaint(gone)} of the twin's official assets; {releases.how_to_get('twin')}")
    return AssetSet("official", folder / TABLE, folder)
