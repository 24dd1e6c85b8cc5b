"""A digital twin of a pick-and-place cell on ManiSkill 3, and a stand-in for the real cell. This module holds the cards only."""

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
        limits="stand-in assets unless the official release is present (env.assets says which); the release itself is untested",
        **_COMMON,
    )
)
register_env(
    EnvCard(
        id="vlahub/Twin-PickPlace-Real",
        summary="A stand-in for the real cell: the twin with other light, surfaces, friction, delays and noise, and a camera a degree off.",
        kwargs={"cell": "real"},
        limits="a simulation, too: its gap is one guess of what a gap is (vlahub_envs/twin/gap.py); for demonstrations and evaluation only, never to train in by RL",
        **_COMMON,
    )
)
