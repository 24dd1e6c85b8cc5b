"""A robot environment of your own: implement Simulation, register a card, and all of vlahub works with it.

    python examples/add_your_own_env.py
    python examples/run_env.py --env-id add_your_own_env:my/Reach      # a module's name before the id: Gymnasium imports it first

Check yours with Gymnasium's checker, with a scripted expert that solves it, and with `vlahub doctor`.
"""

import numpy as np
from gymnasium.utils.env_checker import check_env

import vlahub
from vlahub.simulation import check_options

SIZE, REACHED = 64, 0.01  # pixels; metres


class Reach:
    """A fingertip on a table of 20 x 20 cm must come within 1 cm of a red disc. An action moves it by up to 2 cm per axis."""

    max_steps, tasks, trials, assets = 30, 1, None, "none"
    interface = vlahub.Interface(
        main=vlahub.Camera("top", SIZE, SIZE),
        state=(vlahub.Field("position", 2, "m", frame="world", low=-0.1, high=0.1),),
        action=(vlahub.Field("position", 2, "m", reference="delta", frame="world", low=-0.02, high=0.02),),
        control_hz=10,
    )

    def reset(self, seed, options):
        check_options(options, {"task": "0, the only one", "trial": "number of the layout, any whole number from 0"})
        if options.get("task", 0) != 0:
            raise ValueError(f"task {options['task']} is out of range; the only task is 0")
        rng = np.random.default_rng([seed, options.get("trial", 0)])  # the seed fixes everything random about the episode
        self.tip, self.disc = rng.uniform(-0.09, 0.09, (2, 2)).astype(np.float32)
        return {"task": 0, "trial": options.get("trial", 0)}

    def apply(self, actions, watch=None):  # actions [N, 2]: N control steps, none of which is drawn unless someone watches
        solved = []
        for action in actions:
            self.tip = np.clip(self.tip + action, -0.1, 0.1)
            solved.append(np.linalg.norm(self.tip - self.disc) < REACHED)
            if watch:
                watch()
            if solved[-1]:
                break
        return vlahub.Outcomes(reward=np.float32(solved), success=np.array(solved))

    def observe(self):
        return {"main_images": self.render(), "states": self.tip.copy(), "task_descriptions": "touch the red disc"}

    def render(self):
        grid = np.stack(np.meshgrid(*[np.linspace(-0.1, 0.1, SIZE)] * 2), axis=-1)  # [H, W, 2]
        picture = np.full((SIZE, SIZE, 3), 200, np.uint8)
        picture[np.linalg.norm(grid - self.disc, axis=-1) < 2 * REACHED] = (220, 30, 30)
        picture[np.linalg.norm(grid - self.tip, axis=-1) < REACHED] = (30, 30, 30)
        return picture

    def close(self):
        pass


class Straight:
    """The scripted expert: it sees the simulation itself, and shows that the task can be solved."""

    def __init__(self, simulation):
        self.simulation = simulation

    def reset(self):
        pass

    def act(self):  # the next chunk [n, 2]
        return np.clip(self.simulation.disc - self.simulation.tip, -0.02, 0.02)[None]


vlahub.register_env(
    vlahub.EnvCard(id="my/Reach", family="my", simulation="add_your_own_env:Reach", expert="add_your_own_env:Straight", summary="Touch a disc on a table.")
)


if __name__ == "__main__":
    import gymnasium as gym

    check_env(gym.make("my/Reach", render_mode="rgb_array"))
    for policy in ("expert", "random"):
        results = vlahub.evaluate("my/Reach", policy, episodes=20, num_envs=2, progress=False)
        print(f"{policy}: solved {results.success_rate:.0%} of 20 episodes")
