"""RoboTwin 2.0 tasks on SAPIEN. This module holds the cards only; the simulation is imported when an environment is made."""

from vlahub.assets import AssetPack, register_assets
from vlahub.catalog import EnvCard, register_env

# name -> what it is, and what was measured. The class of the same name is in `tasks/`.
TASKS = {
    "ClickBell": (
        "Press the top of a desk bell with a closed gripper.",
        "the expert solves 100 of 100 layouts (seeds 0 to 99, stand-ins), in 80 control steps on average",
    ),
    "AdjustBottle": (
        "Pick up a bottle that lies on the table, stand it up in the air and hold it on its own side.",
        "the expert solves 50 of 50 layouts (seeds 0 to 49, stand-ins)",
    ),
    "BeatBlockHammer": (
        "Take a hammer and touch a fixed cube with its head.",
        "the expert solves 50 of 50 layouts (seeds 0 to 49, stand-ins)",
    ),
    "BlocksRankingRGB": (
        "Line up three cubes from left to right: red, green, blue.",
        "the expert solves 49 of 50 layouts (seeds 0 to 49, stand-ins)",
    ),
    "HandoverBlock": (
        "Pass a tall block from the left hand to the right, which stands it on a pad.",
        "the expert solves 50 of 50 layouts (seeds 0 to 49, stand-ins)",
    ),
    "LiftPot": (
        "Lift a pot by its two handles.",
        "the expert solves 50 of 50 layouts (seeds 0 to 49, stand-ins)",
    ),
    "MoveCanPot": (
        "Put a can down beside a pot, on the can's own side.",
        "the expert solves 50 of 50 layouts (seeds 0 to 49, stand-ins)",
    ),
    "OpenMicrowave": (
        "Pull the door of a microwave open.",
        "the expert solves 50 of 50 layouts (seeds 0 to 49, stand-ins)",
    ),
    "PickDualBottles": (
        "Pick up two bottles, one with each hand, and bring them to the middle.",
        "the expert solves 50 of 50 layouts (seeds 0 to 49, stand-ins)",
    ),
    "PlaceContainerPlate": (
        "Put a bowl or a cup on a plate.",
        "the expert solves 46 of 50 layouts (seeds 0 to 49, stand-ins)",
    ),
    "PlaceEmptyCup": (
        "Put a cup on a coaster.",
        "the expert solves 50 of 50 layouts (seeds 0 to 49, stand-ins)",
    ),
    "PlaceShoe": (
        "Put a shoe on a blue mat, its toe to the left.",
        "the expert solves 50 of 50 layouts (seeds 0 to 49, stand-ins)",
    ),
    "StackBlocksThree": (
        "Stack three cubes: red below, green, blue on top.",
        "the expert solves 48 of 50 layouts (seeds 0 to 49, stand-ins)",
    ),
    "StackBlocksTwo": (
        "Stack the green cube on the red one.",
        "the expert solves 50 of 50 layouts (seeds 0 to 49, stand-ins)",
    ),
    "TurnSwitch": (
        "Flip a rocker switch with a closed gripper.",
        "the expert solves 50 of 50 layouts (seeds 0 to 49, stand-ins)",
    ),
}

for _name, (_summary, _measured) in TASKS.items():
    register_env(
        EnvCard(
            id=f"vlahub/RoboTwin-{_name}",
            family="robotwin",
            simulation="vlahub_envs.robotwin.simulation:RoboTwin",
            summary=_summary,
            kwargs={"task": _name},
            expert="vlahub_envs.robotwin.expert:ScriptedExpert",
            needs=("sapien", "scipy", "toppra"),
            extra="robotwin",
            limits="stand-in assets unless the official release is present (env.assets says which); official assets are tested on their layout only",
            measured=_measured,
        )
    )

LICENCE = "MIT, as the dataset's card; laptops, pots, switches, microwaves and cabinets come from PartNet-Mobility and keep its terms"
register_assets(
    AssetPack(
        name="robotwin",
        summary="RoboTwin 2.0's objects and robots.",
        repository="TianxingChen/RoboTwin2.0",
        missing="vlahub_envs.robotwin.assets:missing",
        licence=LICENCE,
        megabytes=11_200,  # 5,600 unpacked, and at most as much again in the archives
        files=("objects.zip", "embodiments.zip"),
        archives=("objects.zip", "embodiments.zip"),
    )
)
register_assets(
    AssetPack(
        name="robotwin-backgrounds",
        summary='RoboTwin 2.0\'s pictures for wall and table, for official assets with randomization="randomized".',
        repository="TianxingChen/RoboTwin2.0",
        missing="vlahub_envs.robotwin.assets:missing_backgrounds",
        licence="MIT, as the dataset's card",
        megabytes=22_000,  # 11,000 unpacked
        files=("background_texture.zip",),
        archives=("background_texture.zip",),
    )
)
