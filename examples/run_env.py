"""Run one episode of an environment with its scripted expert, and save a video.

python examples/run_env.py
python examples/run_env.py --env-id vlahub/RoboTwin-ClickBell --seed 7 --video-path bell.mp4
"""

from pathlib import Path

import gymnasium as gym
import tyro

import vlahub  # noqa: F401  registers the ids
from vlahub import catalog, video


def main(env_id: str = "vlahub/RoboTwin-ClickBell", seed: int = 0, video_path: Path = Path("outputs/episode.mp4")) -> None:
    """Run one episode.

    Args:
        env_id: `vlahub list` shows the ids.
        seed: decides everything random about the episode.
        video_path: where the video goes.
    """
    env = gym.make(env_id, render_mode="rgb_array")
    observation, _ = env.reset(seed=seed)
    print(f"instruction: {observation['task_descriptions']}")
    for key in observation.keys() - {"task_descriptions"}:
        print(f"{key}: {observation[key].dtype} {observation[key].shape}")

    expert = catalog.make_expert(env.env_id, env.simulation)
    expert.reset()
    frames, total, done = [env.render()], 0.0, False
    while not done:
        # A whole chunk at once: the cameras are drawn after its last action only. `watch` is called after every step, here to film it.
        result = env.step_chunk(expert.act(), watch=lambda: frames.append(env.render()))
        total, done = total + result.reward.sum(), bool(result.done)
    env.close()

    print(f"{'solved' if result.info['success'] else 'not solved'} after {result.info['steps']} control steps, return {total:g}, assets: {env.assets}")
    video_path.parent.mkdir(parents=True, exist_ok=True)
    print(f"video: {video.save(video_path, video.encode(frames, env.metadata['render_fps']))}")


if __name__ == "__main__":
    tyro.cli(main)
