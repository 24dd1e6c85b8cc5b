"""LIBERO's suites on MuJoCo. This module holds the cards only; the simulation is imported when an environment is made."""

from vlahub.assets import AssetPack, register_assets
from vlahub.catalog import EnvCard, register_env

# suite -> what it is
SUITES = {
    "Spatial": "10 tasks: a black bowl in ten places, to be put on the plate.",
    "Object": "10 tasks: one of ten groceries on the floor, to be put in the basket.",
    "Goal": "10 tasks on one table: drawers, stove, bowl, plate, wine bottle.",
    "10": "10 long tasks of two steps each, in kitchen, living room and study (also called LIBERO-Long).",
    "90": "90 short tasks in 20 scenes of kitchen, living room and study.",
    "130": "All 130 tasks: Spatial, Object, Goal, 90, 10, in this order.",
}

EXPERT = ("Spatial", "Object", "Goal", "10")  # suites that the scripted expert knows; of 10, six tasks

for _suite, _summary in SUITES.items():
    register_env(
        EnvCard(
            id=f"vlahub/LIBERO-{_suite}",
            family="libero",
            simulation="vlahub_envs.libero.simulation:Libero",
            summary=_summary,
            kwargs={"suite": _suite},
            expert="vlahub_envs.libero.expert:ScriptedExpert" if _suite in EXPERT else "",
            # hf-libero is missed with a message of its own, because it is installed without its dependencies
            needs=("mujoco", "robosuite", "bddl", "OpenGL", "easydict"),
            extra="libero",
            protocols=("vlahub", "openvla", "openpi", "lerobot", "rlinf"),
            limits="Published checkpoints know the official assets; on stand-ins their success rates say nothing.",
        )
    )

register_assets(
    AssetPack(
        name="libero",
        summary="LIBERO's objects, fixtures, scenes and textures.",
        repository="lerobot/libero-assets",  # the tree of the GitHub repository
        missing="vlahub_envs.libero.assets:missing",
        licence="MIT, as LIBERO's repository; meshes by third parties (Google Scanned Objects, HOPE, TurboSquid) keep terms of their own",
        megabytes=230,
        elsewhere=("~/.cache/libero/assets",),  # where hf-libero keeps its own download
    )
)
