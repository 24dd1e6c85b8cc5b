"""StarVLA QwenOFT and LingBot-VLA in the catalog: how their folders are recognised, and the checkpoints that are known. Light: imports no torch."""

from pathlib import Path

from vlahub.catalog import FamilyCard, PolicyCard, register_family, register_policy


def _files(folder: Path, name: str) -> list[Path]:
    """The files of that name in a folder, or up to two folders down, where a download may have nested them."""
    return [file for depth in ("", "*/", "*/*/") for file in folder.glob(depth + name)]


def _starvla(folder: Path) -> bool:
    return any("framework:" in file.read_text(errors="replace") for file in _files(folder, "config.yaml"))


def _lingbot(folder: Path) -> bool:
    # its config.json calls itself "pi0", so the yaml counts: beside the weights, or up to three folders above a training run's hf_ckpt
    name = "lingbotvla_cli.yaml"
    return bool(_files(folder, name)) or (folder.name in ("hf_ckpt", "ema_hf_ckpt") and any((place / name).exists() for place in folder.resolve().parents[:3]))


register_family(
    FamilyCard(
        name="starvla",
        policy="vlahub_policies.starvla:QwenOFTPolicy",
        summary="StarVLA QwenOFT: Qwen2.5-VL with one placeholder token per action and an MLP that regresses the chunk",
        recognises=_starvla,
        needs=("tokenizers", "yaml"),
    )
)
register_policy(
    PolicyCard(
        id="StarVLA/Qwen2.5-VL-OFT-LIBERO-4in1",
        family="starvla",
        summary="All four LIBERO suites, two cameras, chunk 8",
        envs=("vlahub/LIBERO-Spatial", "vlahub/LIBERO-Object", "vlahub/LIBERO-Goal", "vlahub/LIBERO-10"),
        options={"unnorm_key": "franka"},
        verified="network, prompt, pixels and actions equal to the original on small random weights; every tensor name and shape of the file; not run with its weights",
    )
)
register_family(
    FamilyCard(
        name="lingbot",
        policy="vlahub_policies.lingbot:LingBotPolicy",
        summary="LingBot-VLA: Qwen2.5-VL with a flow-matching action expert",
        recognises=_lingbot,
        needs=("tokenizers", "yaml"),
    )
)
for _id, _summary in (
    ("robbyant/lingbot-vla-4b", "the pre-trained base; needs post-training before it can do a task"),
    ("robbyant/lingbot-vla-4b-posttrain-robotwin", "post-trained on 50 RoboTwin tasks, absolute joint targets, chunk 50"),
):
    register_policy(
        PolicyCard(
            id=_id,
            family="lingbot",
            summary=_summary,
            verified="network, sampler, prompt, pixels and joint layouts equal to the original on small random weights; every tensor name and shape; not run with its weights",
        )
    )
