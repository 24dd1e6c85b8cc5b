"""The small trained policies that ship with the package, in `checkpoints/`; docs/results.md says how each was trained and evaluated."""

from vlahub.catalog import PolicyCard, register_policy

for _name, _family, _envs, _summary, _where, _measured in (
    (
        "lingbot-tiny-clickbell",
        "lingbot",
        ("vlahub/RoboTwin-ClickBell",),
        "LingBot-VLA at 1.6 million parameters, trained on the scripted expert",
        "on a GPU and on a CPU",
        "47 of 56 held-out episodes within 200 control steps (95 % interval 72.2 to 91.3 %)",
    ),
    (
        "lingbot-tiny-robotwin",
        "lingbot",
        (
            "vlahub/RoboTwin-ClickBell",
            "vlahub/RoboTwin-AdjustBottle",
            "vlahub/RoboTwin-OpenMicrowave",
            "vlahub/RoboTwin-LiftPot",
            "vlahub/RoboTwin-BeatBlockHammer",
        ),
        "LingBot-VLA at 1.6 million parameters, one camera, five RoboTwin tasks, trained on the scripted expert",
        "on a CPU",
        "within 90 control steps 72 of 200 episodes of ClickBell (36.0 %), within 175 20 of 20 of AdjustBottle, 15 of OpenMicrowave, 7 of LiftPot, 4 of BeatBlockHammer",
    ),
    (
        "qwenoft-tiny-libero",
        "starvla",
        ("vlahub/LIBERO-Spatial",),
        "QwenOFT at 1.4 million parameters, trained on LIBERO-Spatial's scripted expert and stand-in assets",
        "on a GPU and on a CPU",
        "28 of 40 episodes within 130 control steps (95 % interval 54.6 to 81.9 %), camera_size=(128,128)",
    ),
    (
        "dexbotic-pi0-tiny-libero",
        "dexbotic",
        ("vlahub/LIBERO-Spatial",),
        "Dexbotic's policy in pi0's form at 1.7 million parameters, trained on LIBERO-Spatial's scripted expert and stand-in assets",
        "on a CPU",
        "19 of 34 episodes, of tasks 0 to 3 only, within 130 control steps (95 % interval 39.5 to 71.1 %); of all tasks 45 of 80 before its last 1100 training steps, camera_size=(128,128)",
    ),
    (
        "openvla-oft-tiny-libero",
        "openvla_oft",
        ("vlahub/LIBERO-Spatial", "vlahub/EVAC-LIBERO-Spatial"),
        "OpenVLA-OFT at 1.8 million parameters, tokens, trained on LIBERO-Spatial's scripted expert: a start for reinforcement learning",
        "on a GPU",
        "32 of 100 episodes of LIBERO-Spatial from starts that it was not trained on (95 % interval 23.7 to 41.7 %), camera_size=(128,128)",
    ),
):
    register_policy(
        PolicyCard(
            id=f"vlahub/{_name}",
            family=_family,
            summary=f"{_summary}; ships with the package",
            folder=f"vlahub_policies:checkpoints/{_name}",
            envs=_envs,
            verified=f"evaluated {_where}; a small model of this repository, not a published one",
            measured=f"{_measured}; docs/results.md",
        )
    )
