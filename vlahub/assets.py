"""Official asset releases of the environment families: where they are looked for, and how one downloads them.

A family registers its release with `register_assets`; `vlahub assets` lists, checks and downloads them. Nothing is downloaded without being asked for:
environments fall back to generated stand-ins. Nothing here imports a simulator, and the hub's library is imported for a download only.
"""

from __future__ import annotations

import os
import shutil
import stat
import zipfile
from dataclasses import dataclass
from pathlib import Path

from vlahub import catalog


@dataclass(frozen=True)
class AssetPack:
    """One release, as a dataset on the Hugging Face hub."""

    name: str  # "libero": what `vlahub assets` calls it, and its folder in $VLAHUB_ASSETS
    summary: str  # one line
    repository: str  # "lerobot/libero-assets"
    missing: str  # "module:function"; called with a folder, it lists what of the release is not there, and nothing if it is complete
    licence: str
    megabytes: int  # what it takes on the disk at most, with archives and what is in them
    files: tuple[str, ...] = ("*",)  # patterns of the paths that are downloaded
    archives: tuple[str, ...] = ()  # zip files among them, unpacked in the pack's folder and then deleted
    elsewhere: tuple[str, ...] = ()  # folders in which other programs keep the same tree; looked at last


PACKS: dict[str, AssetPack] = {}


def register_assets(pack: AssetPack) -> None:
    if PACKS.setdefault(pack.name, pack) != pack:
        raise ValueError(f"the assets {pack.name!r} are registered already, with another card")


def pack_of(name: str) -> AssetPack:
    if name not in PACKS:
        raise catalog.UnknownId(f"no assets are called {name!r}; {catalog.suggest(name, PACKS)}")
    return PACKS[name]


# ------------------------------------------------------------------------------------------------ where they are


def default_folder(name: str) -> Path:
    """Where a download goes, and the first place to look: NAME in $VLAHUB_ASSETS, or in ~/.cache/vlahub/assets."""
    return Path(os.environ.get("VLAHUB_ASSETS") or Path.home() / ".cache" / "vlahub" / "assets").expanduser() / name


def folders(name: str) -> list[Path]:
    """Where a release is looked for, in this order: our own folder, the hub's cache, other programs' folders."""
    pack = pack_of(name)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    hub = Path(os.environ.get("HF_HUB_CACHE") or Path(os.environ.get("HF_HOME") or cache / "huggingface") / "hub").expanduser()
    snapshots = sorted(hub.glob(f"datasets--{pack.repository.replace('/', '--')}/snapshots/*"))
    return [default_folder(name), *snapshots, *(Path(place).expanduser() for place in pack.elsewhere)]


def missing(name: str, folder: Path) -> list[str]:
    """What of the release `folder` lacks."""
    return list(catalog.load(pack_of(name).missing)(folder))


def find(name: str) -> Path | None:
    """The first folder that holds the whole release."""
    return next((folder for folder in folders(name) if folder.is_dir() and not missing(name, folder)), None)


def how_to_get(name: str) -> str:
    """For error messages."""
    return (
        f"get them with `vlahub assets {name} --download`; without a network, run it elsewhere with `--dir DIR/{name}`, copy DIR here, "
        f"and set VLAHUB_ASSETS=DIR (or pass assets='DIR/{name}')"
    )


def complaint(gone: list[str]) -> str:
    return f"lacks {', '.join(gone[:4])}{f' and {len(gone) - 4} more' if len(gone) > 4 else ''}"


# ------------------------------------------------------------------------------------------------ download


def download(name: str, folder: Path | None = None) -> Path:
    """Download a release into `folder` (by default our own), unpack it, and check that nothing is missing. Finished files are not loaded again."""
    pack, folder = pack_of(name), folder or default_folder(name)
    if folder.is_dir() and not missing(name, folder):
        return folder

    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HTTPError  # the base of all that its network library raises; that library's name depends on the version

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(error.errno, f"cannot write to {folder}: {error.strerror}; choose another folder with --dir or VLAHUB_ASSETS") from error
    free = shutil.disk_usage(folder).free // 10**6
    if free < pack.megabytes:
        raise OSError(f"{name} needs up to {pack.megabytes} MB, and {folder} has {free} MB free; choose another folder with --dir or VLAHUB_ASSETS")
    advice = f"Without a network here, run `vlahub assets {name} --download --dir DIR/{name}` where there is one, copy DIR here, and set VLAHUB_ASSETS=DIR"
    try:
        snapshot_download(pack.repository, repo_type="dataset", local_dir=folder, allow_patterns=list(pack.files))
    except (OSError, HTTPError) as error:
        raise OSError(f"{pack.repository} could not be downloaded from the hub ({type(error).__name__}: {str(error).strip()}). {advice}") from error
    for archive in pack.archives:
        if (folder / archive).is_file():
            unpack(folder / archive, folder)
            (folder / archive).unlink()
    if gone := missing(name, folder):
        # the hub's library returns a folder that is not empty as it is, with a warning, if the hub cannot be reached
        raise FileNotFoundError(f"{pack.repository} was downloaded, but {folder} {complaint(gone)}; the same command tries again. {advice}")
    return folder


def unpack(archive: Path, folder: Path) -> None:
    """Every file of a zip below `folder`. Names that lead out of it, and links, are refused."""
    try:
        with zipfile.ZipFile(archive) as content:
            for entry in content.infolist():
                if not (folder / entry.filename).resolve().is_relative_to(folder.resolve()) or stat.S_ISLNK(entry.external_attr >> 16):
                    raise ValueError(f"{archive} holds {entry.filename!r}, which would be written outside of {folder}; it is not unpacked")
            content.extractall(folder)
    except zipfile.BadZipFile as error:
        raise OSError(f"{archive} is damaged ({error}); delete it and run the same command again") from error
