"""Which assets LIBERO's scenes are built of: the official release if it is on this machine, else generated stand-ins. See `standins.py`."""

from __future__ import annotations

import hashlib
import os
import tempfile
from functools import cache
from pathlib import Path
from xml.etree import ElementTree

from vlahub import assets as releases
from vlahub_envs.libero import standins

STYLES = [name for name in standins.TEXTURES if not name.startswith("table_")]


def missing(folder: Path) -> list[str]:
    """What of the release `folder` lacks, of all that the suites need: the XML files, and the meshes and textures that these name."""
    gone = []
    for path in standins.files():
        if not path.endswith(".xml"):
            continue
        try:
            named = ElementTree.parse(folder / path).getroot().iterfind("./asset/*[@file]")
        except (OSError, ElementTree.ParseError):  # not there, or cut off
            gone.append(path)
            continue
        files = {Path(path).parent / element.get("file", "") for element in named}
        if path.startswith("scenes/"):  # a task may change the style of walls and floor, by another name in the same folder
            files |= {file.parent / f"{style}.png" for file in files if file.stem in STYLES for style in STYLES}
        gone += sorted(os.path.normpath(file) for file in files if not (folder / file).is_file())
    return list(dict.fromkeys(gone))


def find(assets: str | os.PathLike) -> tuple[str, Path]:
    """("official" | "stand-in", folder). One set serves the whole scene: the two are never mixed.

    Args:
        assets: "auto" (the official release if it is complete, else stand-ins), "official", "stand-in", or the folder of the official release.
    """
    if assets == "stand-in":
        return "stand-in", write_standins()
    chosen = releases.folders("libero") if assets in ("auto", "official") else [Path(assets).expanduser()]
    for folder in chosen:
        if folder.is_dir() and not missing(folder):
            return "official", folder.resolve()
    if assets == "auto":
        return "stand-in", write_standins()
    if assets != "official" and not chosen[0].is_dir():
        raise FileNotFoundError(
            f"assets={str(assets)!r} is no folder; it must be 'auto', 'official', 'stand-in' or the folder of the official release: {releases.how_to_get('libero')}"
        )
    where = {str(folder): missing(folder) for folder in chosen if folder.is_dir()}
    found = "; ".join(f"{folder} {releases.complaint(gone)}" for folder, gone in where.items())
    raise FileNotFoundError(
        f"LIBERO's official assets are not complete on this machine ({found or f'{chosen[0]} does not exist'}); {releases.how_to_get('libero')}"
    )


@cache
def write_standins() -> Path:
    """The stand-ins as files, because `libero` opens them by path. Their folder is named after their content, in the system's folder for temporary files:
    it needs no home, workers share it, and it is never stale."""
    pack = standins.files()
    digest = hashlib.sha256()
    for path, content in sorted(pack.items()):
        digest.update(path.encode() + b"\0" + content)
    folder = Path(tempfile.gettempdir()) / f"vlahub-libero-{os.getuid()}-{digest.hexdigest()[:16]}"
    if not _holds(folder, pack):
        # write beside it and rename: another process may be doing the same
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=folder.name) as work:
            for path, content in pack.items():
                file = Path(work, "pack", path)
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(content)
            try:
                Path(work, "pack").rename(folder)
            except OSError:
                if not _holds(folder, pack):
                    raise FileExistsError(f"{folder} exists, but does not hold LIBERO's stand-ins as generated; delete it") from None
    return folder


def _holds(folder: Path, pack: dict[str, bytes]) -> bool:
    """Is the pack in `folder`, unchanged? What lies in a shared temporary folder is not taken on trust."""
    return folder.is_dir() and all((folder / path).is_file() and (folder / path).read_bytes() == content for path, content in pack.items())
