"""Train stable-baselines3's PPO on an environment of this hub, through one small wrapper.

python examples/sb3_ppo.py                                                    # a few minutes on two CPU cores
python examples/sb3_ppo.py --env-id vlahub/RoboTwin-ClickBell --steps 20000 --num-envs 4

stable-baselines3 knows neither text nor several pictures under one key. The wrapper drops the instruction (one task per run, then) and gives every view a key of
its own. What remains is an ordinary `Dict` of pictures and a state, which its MultiInputPolicy takes: a small convolutional network per picture, actions one by one.
"""

from pathlib import Path

import gymnasium as gym
import numpy as np
import tyro
from gymnasium import spaces

import vlahub  # noqa: F401  registers the ids

SMALLEST = 36  # pixels: the convolutional network of stable-baselines3 leaves nothing of a smaller picture


class ForStableBaselines(gym.ObservationWrapper):
    """Observation: `states` and one key per view ("main_images", "wrist_images_0", ...); no text."""

    def __init__(self, env: gym.Env):
        super().__init__(env)
        sample = {key: space for key, space in env.observation_space.spaces.items() if key != "task_descriptions"}
        self.observation_space = spaces.Dict(
            {
                name: spaces.Box(0, 255, view.shape, np.uint8) if key != "states" else space
                for key, space in sample.items()
                for name, view in self._views(key, np.zeros(space.shape, space.dtype)).items()
            }
        )
        for name, space in self.observation_space.spaces.items():
            if name != "states" and min(space.shape[:2]) < SMALLEST:
                raise ValueError(f"{name} is {space.shape[0]}x{space.shape[1]}; stable-baselines3's network needs pictures of at least {SMALLEST}x{SMALLEST}")

    def observation(self, observation: dict) -> dict[str, np.ndarray]:
        return {name: view for key, value in observation.items() if key != "task_descriptions" for name, view in self._views(key, value).items()}

    @staticmethod
    def _views(key: str, value: np.ndarray) -> dict[str, np.ndarray]:
        """[V, H, W, 3] -> V pictures; anything else stays."""
        return {f"{key}_{i}": view for i, view in enumerate(value)} if value.ndim == 4 else {key: value}


def main(
    env_id: str = "vlahub/RoboTwin-ClickBell",
    steps: int = 4096,
    num_envs: int = 2,
    n_steps: int = 128,
    max_steps: int | None = None,
    seed: int = 0,
    out: Path = Path("outputs/sb3_ppo.zip"),
) -> None:
    """Train and save.

    Args:
        env_id: `vlahub list` shows the ids; `module:id` imports the module that registers it first.
        steps: control steps in all.
        num_envs: environments, each in its own process.
        n_steps: control steps of each environment between updates.
        max_steps: control steps per episode; the environment's own limit by default.
        seed: of everything.
        out: where the trained model goes.
    """
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import SubprocVecEnv

    options = {} if max_steps is None else {"max_steps": max_steps}
    envs = make_vec_env(
        lambda: ForStableBaselines(gym.make(env_id, **options)), num_envs, seed=seed, vec_env_cls=SubprocVecEnv, vec_env_kwargs={"start_method": "spawn"}
    )
    model = PPO("MultiInputPolicy", envs, n_steps=n_steps, batch_size=min(64, n_steps * num_envs), seed=seed, verbose=1)
    model.learn(steps)
    out.parent.mkdir(parents=True, exist_ok=True)
    model.save(out)
    envs.close()
    print(f"trained for {model.num_timesteps} control steps; the model is {out}")


if __name__ == "__main__":
    tyro.cli(main)
