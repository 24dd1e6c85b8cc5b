"""A digital twin of a pick-and-place cell on ManiSkill 3, and a stand-in for the real cell. This module holds the cards only."""

from vlahub.assets import AssetPack, register_assets
from vlahub.catalog import EnvCard, register_env

_COMMON = dict(
    family="twin",
    simulation="vlahub_envs.twin.simulation:Twin",
    expert="vlahub_envs.twin.expert:PickAndPlace",
    needs=("sapien", "mani_skill", "scipy"),
    extra="sapien",
)
register_env(
    EnvCard(
        id="vlahub/Twin-PickPlace",
        summary="A Panda puts one of 25 objects into a white tray: the digital twin that RL-Co trains in.",
        kwargs={"cell": "twin"},
        limits="stand-in assets unless the official releases are present (env.assets says which); the releases themselves are untested, and so is physics on a GPU",
        measured="the expert solves 99 of 100 layouts (seeds 0 to 99, stand-ins), in 31 control steps on average",
        **_COMMON,
    )
)
register_env(
    EnvCard(
        id="vlahub/Twin-PickPlace-Real",
        summary="A stand-in for the real cell: the twin with other light, surfaces, friction, delays and noise, and a camera a degree off.",
        kwargs={"cell": "real"},
        limits="a simulation, too: its gap is one guess of what a gap is (vlahub_envs/twin/gap.py); for demonstrations and evaluation only, never to train in by RL",
        measured="the expert solves 100 of 100 layouts (seeds 0 to 99, stand-ins), in 40 control steps on average",
        **_COMMON,
    )
)

# As the systems that use them name them; neither was reachable when this was written, so sizes are upper guesses
register_assets(
    AssetPack(
        name="twin",
        summary="The table of the cell that the twin imitates.",
        repository="RLinf/RLCo-maniskill-assets",
        missing="vlahub_envs.twin.assets:missing_table",
        licence="see the dataset's card",
        megabytes=500,  # the release states no size: a generous guess
        files=("custom_assets/*",),
    )
)
register_assets(
    AssetPack(
        name="twin-objects",
        summary="The twin's 25 objects and its tray.",
        repository="RLinf/maniskill_assets",
        missing="vlahub_envs.twin.assets:missing_objects",
        licence="see the dataset's card",
        megabytes=2_000,  # likewise
        files=("carrot/*",),
    )
)
