"""Registration of pi0, pi0.5 and Dexbotic's pi0. Recognisers read small files and headers only, and import no torch."""

import json
import struct
import zipfile
from pathlib import Path

from vlahub.catalog import FamilyCard, PolicyCard, register_family, register_policy

MARK = "paligemma_with_expert."  # begins the name of nearly every tensor of openpi's, RLinf's and lerobot's files


def _config(folder: Path) -> dict:
    try:
        record = json.loads((folder / "config.json").read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError):
        return {}  # no config.json of any known layout
    return record if isinstance(record, dict) else {}


def _names(folder: Path) -> str:
    """The text in which a checkpoint's tensor names stand: an index, the header of a safetensors file, or the pickle inside a torch file (searched, never run)."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        return index.read_text(errors="replace")
    if single.is_file():
        with single.open("rb") as file:
            size = file.read(8)
            return file.read(min(struct.unpack("<Q", size)[0], 2**24)).decode(errors="replace") if len(size) == 8 else ""
    for name in ("actor/model_state_dict/full_weights.pt", "model_state_dict/full_weights.pt"):
        if (folder / name).is_file() and zipfile.is_zipfile(folder / name):
            with zipfile.ZipFile(folder / name) as archive:
                return "".join(archive.read(entry).decode("latin-1") for entry in archive.namelist() if entry.endswith("data.pkl"))
    return ""


def is_pi0(folder: Path) -> bool:
    config = _config(folder)
    kind = config.get("type")
    return not str(config.get("model_type", "")).startswith("dexbotic") and kind in (None, "pi0", "pi05") and MARK in _names(folder)


def is_dexbotic(folder: Path) -> bool:
    return _config(folder).get("model_type") in ("dexbotic_pi0", "dexbotic_pi05")


register_family(
    FamilyCard(
        name="pi0",
        policy="vlahub_policies.pi0:Pi0Policy",
        summary="pi0 and pi0.5: PaliGemma with a flow-matching action expert (openpi, RLinf and lerobot folders)",
        recognises=is_pi0,
        needs=("sentencepiece",),
    )
)
register_family(
    FamilyCard(
        name="dexbotic",
        policy="vlahub_policies.dexbotic:DexboticPolicy",
        summary="Dexbotic's pi0: the network of pi0 with other image, state and action preparation",
        recognises=is_dexbotic,
        needs=("sentencepiece",),
    )
)

_LIBERO = ("vlahub/LIBERO-Spatial", "vlahub/LIBERO-Object", "vlahub/LIBERO-Goal", "vlahub/LIBERO-10")
_VERIFIED = "network, sampler, log-probabilities, text, pixels and actions equal to the original on small random weights; every tensor name and shape of the file; not run with its weights"
for _id, _family, _summary, _envs, _options in (
    ("lerobot/pi0_base", "pi0", "the pre-trained pi0; needs fine-tuning, ships no statistics", (), {}),
    ("lerobot/pi05_base", "pi0", "the pre-trained pi0.5; needs fine-tuning, ships no statistics", (), {}),
    (
        "RLinf/RLinf-Pi05-RLCo-PandaPutOnPlateInScene25DigitalTwin-V1-SFT",
        "pi0",
        "pi0.5 for the Franka pick-and-place twin, one camera, chunk 8",
        ("vlahub/Twin-PickPlace", "vlahub/Twin-PickPlace-Real"),
        {"robot": "twin"},
    ),
    ("Dexmal/libero-db-pi0", "dexbotic", "Dexbotic's pi0, all four LIBERO suites, two cameras, chunk 50", _LIBERO, {"robot": "libero"}),
):
    register_policy(PolicyCard(id=_id, family=_family, summary=_summary, envs=_envs, options=_options, verified=_VERIFIED))
