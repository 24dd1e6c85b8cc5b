import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.mlp import MlpPolicy
from tests.test_cli import call
from tests.worlds import POINT, SPEED, PointWorld
from vlahub.dataset import Dataset
from vlahub.evaluation import SettingsDiffer, episodes_of
from vlahub.record import PURPOSE, record
from vlahub.rollout import SeedStream

ROOT = Path(__file__).resolve().parent.parent
MANY_VIEWS = dataclasses.replace(POINT, kwargs={"size": 12, "wrists": 2, "extras": 1})


class SlowToTheLeft:
    """Three steps at a time, from what is seen."""

    def __call__(self, observation):
        pull = np.stack([-0.5 - 0.1 * observation["states"][:, 0], 0.3 * observation["states"][:, 1]], -1)
        return np.repeat(pull[:, None], 3, axis=1).astype(np.float32)


def steps_of(dataset: Dataset, entry) -> list[dict]:
    return [dataset[frame] for frame in range(entry.start, entry.start + entry.length)]


RUNS = [("expert", True), (SlowToTheLeft(), False), ("random", False), (MlpPolicy.tiny(PointWorld().interface, horizon=3), False)]


@pytest.mark.parametrize(("policy", "only"), RUNS, ids=["expert", "a function", "random", "a policy"])
def test_each_row_is_an_observation_and_the_action_after_it(tmp_path, policy, only):
    """Run the recorded actions again, one at a time: every picture, state and reward is the recorded one."""
    result = record(MANY_VIEWS, policy, 5, tmp_path, num_envs=2, seed=3, only_successes=only, max_steps=14, progress=False)
    dataset = Dataset(tmp_path)
    assert result.written == len(dataset.episodes) and (only or result.written == 5)
    world = PointWorld(**MANY_VIEWS.kwargs)
    lines = [line for line in result.lines if line.episode is not None]
    for line, entry in zip(lines, dataset.episodes, strict=True):
        world.reset(line.seed, {"task": line.task})  # a world without numbered trials: the seed makes them
        table = pq.read_table(entry.file)
        for i, row in enumerate(steps_of(dataset, entry)):
            seen = world.observe()
            assert all(np.array_equal(row[key], value) for key, value in seen.items())
            outcome = world.apply(row["actions"])
            assert table["next.reward"][i].as_py() == outcome.reward[0] and table["next.success"][i].as_py() == outcome.success[0]
        assert line.success == bool(outcome.success[0]) and line.instruction == seen["task_descriptions"] and entry.length == line.length
    assert json.loads((tmp_path / "meta/stats.json").read_text())["action"] == dataset.statistics["actions"]


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_rows_between_looks_repeat_and_are_not_drawn(tmp_path, version):
    """Chunks of three steps, looked at after the second and the last: nothing else differs from a recording of every step."""
    settings = {"num_envs": 2, "seed": 3, "only_successes": False, "max_steps": 8, "version": version, "progress": False}
    record(MANY_VIEWS, SlowToTheLeft(), 3, tmp_path / "all", **settings)
    record(MANY_VIEWS, SlowToTheLeft(), 3, tmp_path / "some", look_every=2, **settings)
    whole, some = (Dataset(tmp_path / name, horizon=4) for name in ("all", "some"))
    assert np.array_equal(whole.actions, some.actions) and [entry.length for entry in whole.episodes] == [entry.length for entry in some.episodes] == [8] * 3
    assert some.frames.tolist() == [start + step for start in (0, 8, 16) for step in (0, 2, 3, 5, 6)] and len(some) == 15 and len(whole) == 24
    for i, frame in enumerate(some.frames):
        one, other = some[i], whole[int(frame)]
        assert all(np.array_equal(one[key], other[key]) for key in other)
    assert np.array_equal(some.states[1], some.states[0]) and not np.array_equal(whole.states[1], whole.states[0])
    with pytest.raises(ValueError, match="look_every must be at least 1"):
        record(POINT, "random", 1, tmp_path / "none", look_every=0)


def test_the_episodes_are_those_of_an_evaluation_with_seeds_of_their_own(tmp_path):
    result = record(POINT, "random", 4, tmp_path, seed=7, max_steps=2, only_successes=False, progress=False)
    wanted = episodes_of(4, 7, 3, 3, PURPOSE)
    assert [(line.task, line.trial, line.seed) for line in result.lines] == [(episode.task, episode.trial, episode.seed) for episode in wanted]
    other = {episode.seed for episode in episodes_of(9, 7, 3, 3)} | {SeedStream(7, [env]).next(0) for env in range(9)}
    assert not {line.seed for line in result.lines} & other
    later = record(POINT, "random", 3, tmp_path / "later", first_trial=2, max_steps=2, only_successes=False, progress=False)
    assert [(line.task, line.trial) for line in later.lines] == [(0, 2), (1, 2), (2, 2)]


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("policy", ["expert", "random"])
def test_the_dataset_does_not_depend_on_the_number_of_environments(tmp_path, policy):
    for envs in (1, 3):
        record(POINT, policy, 7, tmp_path / str(envs), num_envs=envs, only_successes=False, max_steps=9, progress=False)
    assert files_of(tmp_path / "1") == files_of(tmp_path / "3")


def test_failures_are_listed_and_left_out_unless_asked_for(tmp_path, capsys):
    small = ["record", "--env", "test/Point", "--policy", "random", "--episodes", "3", "--max-steps", "3", "--seed", "1", "--images", "jpeg"]
    assert call(*small, "--out", str(tmp_path / "a")) == 1
    shown = capsys.readouterr().out
    assert shown.count("not solved") >= 3 and f"0 of 3 episodes are in {tmp_path / 'a'} (0 solved)" in shown
    assert call(*small, "--out", str(tmp_path / "b"), "--no-only-successes") == 0
    assert len(Dataset(tmp_path / "b").episodes) == 3 and "3 of 3 episodes" in capsys.readouterr().out


def test_episodes_go_on_after_success_if_asked_to(tmp_path):
    """The rows up to the success are those of a plain recording; what follows is labelled step by step."""
    record(POINT, "expert", 3, tmp_path / "plain", progress=False)
    record(POINT, SlowToTheLeft(), 3, tmp_path / "fails", after=4, max_steps=5, only_successes=False, progress=False)
    result = record(POINT, "expert", 3, tmp_path / "long", after=4, progress=False)
    plain, long = Dataset(tmp_path / "plain"), Dataset(tmp_path / "long")
    assert all(line.success for line in result.lines)
    for a, b in zip(plain.episodes, long.episodes, strict=True):
        assert b.length == a.length + 4
        assert np.array_equal(plain.states[a.start : a.start + a.length], long.states[b.start : b.start + a.length])
        solved = pq.read_table(b.file)["next.success"].to_pylist()
        assert solved == [False] * (a.length - 1) + [True] * 5
    assert {entry.length for entry in Dataset(tmp_path / "fails").episodes} == {5}


def test_noise_belongs_to_the_episode_and_is_recorded(tmp_path):
    for name, envs in (("one", 1), ("three", 3)):
        record(POINT, SlowToTheLeft(), 4, tmp_path / name, num_envs=envs, noise=0.3, max_steps=12, only_successes=False, progress=False)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "three")
    dataset = Dataset(tmp_path / "one")
    first = dataset.episodes[0]
    states, actions = (values[first.start : first.start + 12] for values in (dataset.states, dataset.actions))
    np.testing.assert_allclose(np.clip(states[:-1] + SPEED * actions[:-1], -1, 1), states[1:], atol=1e-6)  # the noisy action is what moved the point
    wanted = SlowToTheLeft()({"states": states[:1]})[0, 0]
    noise = actions[:3] - wanted
    assert (np.abs(noise) > 1e-3).all() and np.allclose(noise, noise[0], atol=1e-6)  # one draw holds for ten steps
    with pytest.raises(ValueError, match="noise and after must be at least 0"):
        record(POINT, "expert", 1, tmp_path / "bad", noise=-1.0)


def test_intended_actions_are_what_the_policy_wanted_where_noise_led_it(tmp_path):
    record(POINT, SlowToTheLeft(), 1, tmp_path, noise=(0.3, 0.0), labels="intended", max_steps=6, only_successes=False, progress=False)
    dataset = Dataset(tmp_path)
    wanted = np.concatenate([SlowToTheLeft()({"states": dataset.states[i : i + 1]})[0] for i in (0, 3)])
    np.testing.assert_allclose(dataset.actions, wanted, atol=1e-6)
    moved = np.diff(dataset.states, axis=0) / SPEED - dataset.actions[:-1]
    assert (np.abs(moved[:, 0]) > 1e-3).all() and np.allclose(moved[:, 1], 0, atol=1e-5)  # noise on the first number alone
    assert json.loads((tmp_path / "meta/recording.json").read_text())["labels"] == "intended"
    with pytest.raises(ValueError, match="noise has 3 numbers"):
        record(POINT, "expert", 1, tmp_path / "bad", noise=(0.1, 0.1, 0.1))
    with pytest.raises(ValueError, match="labels must be"):
        record(POINT, "expert", 1, tmp_path / "bad", labels="wanted")


def test_a_longer_recording_extends_a_shorter_one(tmp_path):
    first = record(POINT, "expert", 3, tmp_path, progress=False)
    more = record(POINT, "expert", 6, tmp_path, num_envs=2, progress=False)
    assert more.lines[:3] == first.lines and more.written == 6 == len(Dataset(tmp_path).episodes)
    assert record(POINT, "expert", 6, tmp_path, progress=False).lines == more.lines
    with pytest.raises(SettingsDiffer, match="3 of them beyond the 3 asked for"):
        record(POINT, "expert", 3, tmp_path, progress=False)
    with pytest.raises(SettingsDiffer, match="seed is 0 there, 1 here"):
        record(POINT, "expert", 6, tmp_path, seed=1, progress=False)


@pytest.mark.parametrize("cut", ["line", "episode"])
def test_what_was_half_written_is_written_again(tmp_path, cut):
    """Killed while the journal's line was written, or between that line and the episode: the dataset ends up as if nothing had happened."""
    record(POINT, "expert", 5, tmp_path / "whole", progress=False)
    record(POINT, "expert", 5, tmp_path / "cut", progress=False)
    for name in ("recording.jsonl", "episodes.jsonl", "episodes_stats.jsonl"):
        file = tmp_path / "cut/meta" / name
        *lines, last = file.read_bytes().splitlines(keepends=True)
        if name == "recording.jsonl":
            lines.append(last[:20] if cut == "line" else last)
        file.write_bytes(b"".join(lines))
    record(POINT, "expert", 5, tmp_path / "cut", progress=False)
    assert files_of(tmp_path / "whole") == files_of(tmp_path / "cut")


def test_the_same_command_goes_on_after_kill_9(tmp_path):
    code = """
import tests.conftest
from tests.worlds import POINT
from vlahub.record import record
import dataclasses, sys
if __name__ == "__main__":
    record(dataclasses.replace(POINT, kwargs={"cost": 0.02}), "expert", 12, sys.argv[1], num_envs=2, progress=False)
"""
    script = tmp_path / "script.py"
    script.write_text(code)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    out = tmp_path / "out"
    process = subprocess.Popen([sys.executable, str(script), str(out)], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    lines = out / "meta/episodes.jsonl"
    while time.monotonic() < deadline and process.poll() is None and not (lines.exists() and lines.read_bytes().count(b"\n") >= 2):
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    before = lines.read_bytes().count(b"\n")
    assert before >= 2
    subprocess.run([sys.executable, str(script), str(out)], env=env, check=True, timeout=200)
    record(POINT, "expert", 12, tmp_path / "whole", progress=False)
    a, b = Dataset(out), Dataset(tmp_path / "whole")
    assert len(a.episodes) == 12 and np.array_equal(a.actions, b.actions) and np.array_equal(a.states, b.states) and a.texts == b.texts


def test_v3_is_made_at_the_end(tmp_path, capsys):
    command = ["record", "--env", "test/Point", "--policy", "expert", "--episodes", "3", "--format", "v3.0", "--images", "video", "--out", str(tmp_path / "d")]
    assert call(*command) == 0
    dataset = Dataset(tmp_path / "d")
    assert dataset.info["codebase_version"] == "v3.0" and len(dataset.episodes) == 3 and dataset[0]["main_images"].shape == (24, 24, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["d"], "the draft is gone"
    before = files_of(tmp_path / "d")
    assert call(*command) == 0 and files_of(tmp_path / "d") == before
    command[command.index("3")] = "4"
    capsys.readouterr()
    assert call(*command) == 2 and "only v2.1 can be extended" in capsys.readouterr().err


def test_a_lost_episode_runs_again_and_is_listed_if_it_is_lost_twice(tmp_path):
    card = dataclasses.replace(POINT, simulation="tests.test_record:Cursed")
    result = record(card, "expert", 6, tmp_path, num_envs=2, progress=False)
    lost = [line for line in result.lines if line.aborted]
    assert [(line.task, line.trial) for line in lost] == [(1, 0)] and "the world fell apart" in lost[0].aborted
    assert result.written == 5 and lost[0].episode is None and "1 lost to a failing simulation" in str(result)


class Cursed(PointWorld):
    """Fails in the first trial of task 1, every time."""

    def reset(self, seed, options):
        info = super().reset(seed, options)
        if seed == episodes_of(6, 0, 3, None, PURPOSE)[2].seed:
            self.trouble_at, self.trouble = 1, "raise"
        return info


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--episodes", "0"], "episodes and num_envs must be at least 1"),
        (["--format", "v2.0"], "v2.1"),
        (["--out", "/proc/nowhere"], "cannot write to the output folder /proc/nowhere"),
        (["--env", "test/Piont"], "did you mean 'test/Point'"),
    ],
)
def test_a_mistake_is_one_message_and_status_2(arguments, words, tmp_path, capsys):
    given = {"--env": "test/Point", "--policy": "expert", "--episodes": "2", "--out": str(tmp_path / "out")}
    given |= dict(zip(arguments[::2], arguments[1::2], strict=True))
    assert call("record", *(word for pair in given.items() for word in pair)) == 2
    error = "".join(capsys.readouterr())
    assert words in error and "Traceback" not in error


def test_somebody_elses_dataset_is_left_alone(tmp_path):
    record(POINT, "expert", 1, tmp_path, progress=False)
    (tmp_path / "meta/recording.json").unlink()
    (tmp_path / "meta/recording.jsonl").unlink()
    before = files_of(tmp_path)
    with pytest.raises(SettingsDiffer, match="did not make"):
        record(POINT, "expert", 1, tmp_path, progress=False)
    assert files_of(tmp_path) == before
