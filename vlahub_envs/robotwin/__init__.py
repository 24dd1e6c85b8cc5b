"""RoboTwin 2.0 tasks on SAPIEN. This module holds the cards only; the simulation is imported when an environment is made."""

from vlahub.catalog import EnvCard, register_env

# name -> what it is, and what was measured. The class of the same name is in `tasks/`.
TASKS = {
    "ClickBell": (
        "Press the top of a desk bell with a closed gripper.",
        "the expert solves 100 of 100 layouts (seeds 0 to 99, stand-ins), in 80 control steps on average",
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
            limits="stand-in assets unless the official release is present (env.assets says which); official assets are tested on their layout only; one embodiment",
            measured=_measured,
        )
    )
