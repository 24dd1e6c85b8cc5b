"""Catalog entries of OpenVLA-OFT: how its folders are recognised, and the checkpoints that are known. Light: no torch."""

import json
from pathlib import Path

from vlahub.catalog import FamilyCard, PolicyCard, register_family, register_policy

ROBOTWIN_TASKS = ("beat_block_hammer", "handover_block", "lift_pot", "move_can_pot", "pick_dual_bottles", "place_container_plate", "place_empty_cup")
VERIFIED = (
    "network, pixels, codec and key list equal to the original implementation on tiny configurations; the published weights themselves could not be run here"
)


def recognises(folder: Path) -> bool:
    """A whole model (config.json says openvla), or an adapter on one."""
    config, adapter = folder / "config.json", folder / "adapter_config.json"
    try:
        if config.exists():
            return json.loads(config.read_text()).get("model_type") == "openvla"
        return adapter.exists() and "openvla" in str(json.loads(adapter.read_text()).get("base_model_name_or_path")).lower()
    except (ValueError, AttributeError):  # not JSON, or no object: someone else's
        return False


register_family(
    FamilyCard(
        name="openvla_oft",
        policy="vlahub_policies.openvla_oft:OpenVLAOFT",
        summary="OpenVLA-OFT 7B: parallel decoding of action chunks, discrete tokens or an L1 head",
        recognises=recognises,
        needs=("tokenizers",),
    )
)


def _register(name: str, summary: str, *envs: str, **options: str) -> None:
    register_policy(PolicyCard(id=name, family="openvla_oft", summary=summary, envs=envs, options=options, verified=VERIFIED))


for suite, env in (("spatial", "Spatial"), ("object", "Object"), ("goal", "Goal"), ("10", "10")):
    _register(
        f"moojink/openvla-7b-oft-finetuned-libero-{suite}",
        f"supervised on LIBERO-{env}, L1 head, two cameras and state",
        f"vlahub/LIBERO-{env}",
        recipe="libero_l1",
        unnorm_key=f"libero_{suite}_no_noops",
    )
    for amount, what in (("traj1", "one demonstration per task"), ("trajall", "all demonstrations")):
        # the names carry a hyphen before a word, none before a number
        dash = "" if suite == "10" else "-"
        _register(
            f"Haozhan72/Openvla-oft-SFT-libero{dash}{suite}-{amount}",
            f"supervised on LIBERO-{env} ({what}), discrete tokens: a start for reinforcement learning",
            f"vlahub/LIBERO-{env}",
            recipe="libero_rlinf",
        )
    _register(
        f"RLinf/RLinf-OpenVLAOFT-GRPO-LIBERO-{'long' if suite == '10' else suite}",
        f"GRPO on LIBERO-{env}, discrete tokens",
        f"vlahub/LIBERO-{env}",
        recipe="libero_rlinf",
    )
_register(
    "moojink/openvla-7b-oft-finetuned-libero-spatial-object-goal-10",
    "supervised on four LIBERO suites at once, L1 head; give unnorm_key='libero_<suite>_no_noops'",
    "vlahub/LIBERO-Spatial", "vlahub/LIBERO-Object", "vlahub/LIBERO-Goal", "vlahub/LIBERO-10",
    recipe="libero_l1",
)  # fmt: skip
for tasks in ("90", "130"):
    for name, summary in (
        (f"LIBERO-{tasks}-Base-Lora", "supervised, discrete tokens: a start for reinforcement learning (a whole model, despite its name)"),
        (f"GRPO-LIBERO-{tasks}" if tasks == "90" else f"LIBERO-{tasks}", "GRPO, discrete tokens"),
    ):
        _register(f"RLinf/RLinf-OpenVLAOFT-{name}", f"{summary}; {tasks} LIBERO tasks", recipe="libero_rlinf", unnorm_key=f"libero_{tasks}_no_noops_trajall")
for task in ROBOTWIN_TASKS:
    for stage, summary in (("SFT", "supervised"), ("RL", "GRPO")):
        _register(
            f"RLinf/RLinf-OpenVLAOFT-RoboTwin-{stage}-{task}",
            f"{summary} on RoboTwin's {task}, discrete tokens, two Piper arms",
            recipe="robotwin_rlinf",
            unnorm_key=f"{task}_1k",
        )
_register(
    "RLinf/RLinf-OpenVLAOFT-ManiSkill-Base-Lora",
    "adapter for the Bridge table in ManiSkill; its base is loaded with it",
    recipe="bridge_rlinf",
    unnorm_key="bridge_orig",
)
