"""The EVAC world model: a video diffusion model that imagines what a robot's cameras would see, as a batched environment. This module holds the cards only."""

from dataclasses import dataclass

from vlahub.catalog import EnvCard, WeightsCard, register_env, register_weights


@dataclass(frozen=True)
class Suite:
    """A LIBERO suite that can be imagined."""

    simulator: str  # the id whose initial states are the imagination's
    weights: str = ""  # the bundled world model; empty: the user gives one


BUNDLED = WeightsCard(
    id="vlahub/evac-tiny-libero-spatial",
    summary="EVAC at 3.9 million parameters, 128 x 128 pixels, trained on LIBERO-Spatial with stand-in assets; one start per task; ships with the package",
    folder="vlahub_envs.evac:checkpoints/evac-tiny-libero-spatial",
    measured="a held-out chunk of 8 frames: 22.3 dB, SSIM 0.861 (its autoencoder alone 27.7 and 0.926, the last frame repeated 23.7 and 0.896). It "
    "takes 79 of 100 episodes of vlahub/openvla-oft-tiny-libero for solved where the simulator has 31; docs/results.md",
)
register_weights(BUNDLED)

SHIPPED = {"Spatial": BUNDLED.id}
SUITES = {f"libero_{name.lower()}": Suite(f"vlahub/LIBERO-{name}", SHIPPED.get(name, "")) for name in ("Spatial", "Object", "Goal", "10")}
OWN_WEIGHTS = "model=...: a world model of this suite (baselines/world_model.py trains one), a folder or a hub repository"

for _name, _suite in SUITES.items():
    register_env(
        EnvCard(
            id=_suite.simulator.replace("LIBERO", "EVAC-LIBERO"),
            family="evac",
            simulation="vlahub_envs.evac.simulation:alone",
            vector="vlahub_envs.evac.environment:EvacVectorEnv",
            summary=f"{_suite.simulator} as a video world model imagines it: a policy acts, the model draws, a classifier rewards. No simulator runs.",
            kwargs={"suite": _name},
            asks="" if _suite.weights else OWN_WEIGHTS,
            limits="What is solved here is what the classifier takes for solved: evaluate policies in the simulator as well.",
        )
    )
