import contextlib
import errno
import html
import json
import math
import os
import subprocess
import sys
import time
import types

import gymnasium as gym
import numpy as np
import pytest
import torch

import vlahub
import vlahub.vector
from tests.fragile import Seeker, stand_still
from tests.mlp import CategoricalMlp, FlowMlp
from tests.worlds import PointWorld
from vlahub import evaluation, video
from vlahub.evaluation import Folder, Outcome, Results, Summary, episode_seed, episodes_of, fingerprint, player_of, random_actions, wilson

# ------------------------------------------------------------------------------------------------ figures


@pytest.mark.parametrize(
    ("successes", "count", "low", "high"),
    [  # computed by hand from (p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n), z = 1.96
        (8, 10, 0.4902, 0.9433),
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (50, 100, 0.4038, 0.5962),
        (1, 1, 0.2065, 1.0),
        (0, 0, 0.0, 1.0),
    ],
)
def test_wilson_interval(successes, count, low, high):
    assert wilson(successes, count) == pytest.approx((low, high), abs=5e-5)


def outcome(index, success, length=10, total=0.0, aborted="", task=0, **more):
    return Outcome(index, task, index, 100 + index, "go", success, length, total, aborted=aborted, **more)


def test_aborted_episodes_are_in_no_figure_but_their_own():
    part = Summary([outcome(0, True, 4, 1.0), outcome(1, False, 20), outcome(2, True, 6, 1.0), outcome(3, False, 7, 0.5, aborted="killed")])
    assert (part.counted, part.aborted, part.successes, part.success_rate) == (3, 1, 2, 2 / 3)
    assert part.mean_length == 10 and part.mean_return == pytest.approx(2 / 3) and part.interval == wilson(2, 3)
    nothing = Summary([outcome(0, False, aborted="killed")])
    assert nothing.success_rate is nothing.mean_length is nothing.mean_return is None and nothing.interval == (0, 1)


def test_results_become_json_and_metrics():
    results = Results([outcome(0, True, 4, 1.0), outcome(1, False, 20, task=3)], settings={"env": "e", "policy": "p", "assets": "stand-in"}, warnings=[])
    record = json.loads(json.dumps(results.to_dict()))
    assert [task["task"] for task in record["tasks"]] == [0, 3] and record["success_rate"] == 0.5
    assert Outcome.from_dict(record["episodes"][0]) == results.episodes[0] and record["episodes"][0]["return"] == 1.0
    assert results.metrics() == {"eval/success_rate": 0.5, "eval/episode_len": 12.0, "eval/return": 0.5, "eval/aborted": 0.0}
    assert "50.0 % solved" in str(results) and "1 of 2" in str(results)


# ------------------------------------------------------------------------------------------------ which episodes


def test_every_task_gets_its_share_and_each_pair_comes_once():
    for tasks, trials, count in ((3, None, 7), (3, 4, 12), (10, 50, 20), (1, None, 5), (10, 50, 3)):
        chosen = episodes_of(count, 0, tasks, trials)
        pairs = [(episode.task, episode.trial) for episode in chosen]
        assert len(set(pairs)) == count and pairs == sorted(pairs) and [episode.index for episode in chosen] == list(range(count))
        per_task = np.bincount([task for task, _ in pairs], minlength=tasks)
        assert per_task.max() - per_task.min() <= 1
        assert trials is None or max(trial for _, trial in pairs) < trials


def test_a_longer_evaluation_contains_the_shorter_one_and_seeds_differ():
    short, long = ({(e.task, e.trial, e.seed) for e in episodes_of(count, 5, 3, None)} for count in (7, 60))
    assert short < long and len({seed for *_, seed in long}) == 60
    assert episode_seed(0, 1, 2) != episode_seed(1, 1, 2) and 0 <= episode_seed(2**31 - 1, 9, 9) < 2**31


def test_more_episodes_than_there_are_is_an_error():
    with pytest.raises(ValueError, match="3 tasks x 4 trials = 12"):
        episodes_of(13, 0, 3, 4)
    with pytest.raises(ValueError, match="before trial 3 are left out.*at most 3"):
        episodes_of(4, 0, 3, 4, first_trial=3)
    for count in (0, -1, 2.5, True):
        with pytest.raises(ValueError, match="episodes must be"):
            vlahub.evaluate("test/Point", "expert", count)


class Judged(PointWorld):
    """Two layouts for each task, and two published ways to run them."""

    trials = 2

    def __init__(self, protocol: str = "patient"):
        super().__init__()
        self.max_steps = {"patient": 20, "hasty": 1}[protocol]


JUDGED = vlahub.EnvCard("test/Judged", "test", f"{__name__}:Judged", "A judged walk.", expert="tests.worlds:PointExpert", protocols=("patient", "hasty"))


def test_a_protocol_runs_every_trial_of_every_task_its_way(tmp_path):
    results = vlahub.evaluate(JUDGED, "expert", protocol="hasty", out=tmp_path, videos=0, progress=False)
    assert [(one.task, one.trial) for one in results.episodes] == [(task, trial) for task in range(3) for trial in range(2)]
    assert results.settings["env_options"] == {"protocol": "hasty"} and results.settings["max_steps"] == 1
    fewer = vlahub.evaluate(JUDGED, "expert", 3, protocol="patient", videos=0, progress=False)
    assert fewer.success_rate == 1 and len(fewer.episodes) == 3 and fewer.settings["max_steps"] == 20


def test_protocols_that_do_not_fit_are_refused():
    for env, protocol, options, words in (
        ("test/Point", "hasty", {}, "test/Point has no protocols; leave out protocol='hasty'"),
        (JUDGED, "hsaty", {}, "no protocol 'hsaty'; did you mean 'hasty'"),
        (JUDGED, "hasty", {"protocol": "patient"}, "options say 'patient'"),
        (object(), "hasty", {}, "this one exists already"),
    ):
        with pytest.raises(ValueError, match=words):
            vlahub.evaluate(env, "expert", protocol=protocol, env_options=options)


# ------------------------------------------------------------------------------------------------ policies


def test_random_actions_depend_on_the_episode_and_step_only():
    space = gym.spaces.Box(np.float32([-1, 0, -np.inf]), np.float32([1, 5, np.inf]))
    together = random_actions(space, [(3, 0), (4, 8)], 6)
    assert together.shape == (2, 6, 3) and together.dtype == np.float32
    assert np.array_equal(together[1:], random_actions(space, [(4, 8)], 6))
    assert np.array_equal(together[0, 4:], random_actions(space, [(3, 4)], 2)[0])  # nor on how many are drawn at once
    many = random_actions(space, [(0, 0)], 2000)[0]
    assert many[:, 0].min() < -0.95 and many[:, 0].max() > 0.95 and many[:, 1].min() >= 0 and many[:, 1].max() > 4.8
    assert 0.9 < many[:, 2].std() < 1.1 and len(np.unique(many[:, 2])) == 2000


def test_fingerprint_sees_any_training_step():
    torch.manual_seed(0)
    first = torch.nn.Sequential(torch.nn.Linear(40, 30), torch.nn.Linear(30, 2)).to(torch.bfloat16)
    same = fingerprint(first)
    assert len(same) == 12 and fingerprint(first) == same
    with torch.no_grad():
        first[1].bias += 0.5
    assert fingerprint(first) != same


def test_what_is_no_policy_is_refused():
    space = gym.spaces.Box(-1, 1, (2,))
    with pytest.raises(TypeError, match=r"from_pretrained\('some/policy'\)"):
        player_of("some/policy", space, None)
    with pytest.raises(TypeError, match="not int"):
        player_of(3, space, None)
    with pytest.raises(ValueError, match="execute must be at least 1"):
        player_of("random", space, 0)


# ------------------------------------------------------------------------------------------------ the folder


def test_a_line_cut_off_by_a_kill_is_dropped(tmp_path):
    folder = Folder(tmp_path)
    folder.add(outcome(0, True))
    folder.close()
    with open(tmp_path / "episodes.jsonl", "ab") as file:
        file.write(b'{"index": 1, "task"')
    folder = Folder(tmp_path)
    assert folder.finished() == [outcome(0, True)]
    folder.add(outcome(1, False))
    assert folder.finished() == [outcome(0, True), outcome(1, False)]
    folder.close()
    (tmp_path / "episodes.jsonl").write_text("not json\n")
    with pytest.raises(ValueError, match=r"episodes.jsonl is damaged"):
        Folder(tmp_path).finished()


def test_other_settings_are_refused_by_name(tmp_path):
    folder = Folder(tmp_path)
    folder.agree({"seed": 0, "env_options": {"size": (3, 4)}})
    folder.agree({"seed": 0, "env_options": {"size": (3, 4)}})
    with pytest.raises(evaluation.SettingsDiffer, match="seed is 0 there, 1 here"):
        folder.agree({"seed": 1, "env_options": {"size": (3, 4)}})


def test_two_evaluations_in_one_folder_are_refused(tmp_path):
    folder = Folder(tmp_path)
    with pytest.raises(RuntimeError, match="another evaluation is writing"):
        Folder(tmp_path)
    folder.close()
    Folder(tmp_path).close()


def test_an_unusable_folder_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot write to the output folder"):
        Folder(tmp_path / "file" / "below")


def test_wilson_is_within_bounds_everywhere():
    for count in (1, 7, 500):
        for successes in range(count + 1):
            low, high = wilson(successes, count)
            assert 0 <= low <= successes / count <= high <= 1 and math.isfinite(high - low)


# ------------------------------------------------------------------------------------------------ runs


def essence(results):
    """What must not depend on how an evaluation was run."""
    return [(o.index, o.task, o.trial, o.seed, o.instruction, o.success, o.length, o.total_reward, o.clipped) for o in results.episodes]


def run(env="test/Point", policy="expert", episodes=7, **options):
    return vlahub.evaluate(env, policy, episodes, **{"progress": False, "videos": 0, **options})


def test_the_result_does_not_depend_on_the_number_of_envs():
    one, eight = Seeker(), Seeker()
    alone, together = run(policy=one, episodes=20, seed=3), run(policy=eight, episodes=20, seed=3, num_envs=8)
    assert essence(alone) == essence(together)
    assert 0 < alone.successes < 20  # a policy that always or never succeeds would prove little
    assert sorted(one.asked) == sorted(eight.asked) and len(set(one.asked)) == len(one.asked)
    assert set(one.batches) == {1} and max(eight.batches) == 4 and {step % 3 for _, step in one.asked} == {0}
    assert essence(run(policy=Seeker(), episodes=20, seed=4)) != essence(alone)


@pytest.mark.parametrize("head", [FlowMlp, CategoricalMlp])
def test_real_policies_run_with_the_seeds_of_each_episode(head, tmp_path):
    torch.manual_seed(0)
    policy = head.tiny(PointWorld().interface)
    alone, together = run(policy=policy, episodes=8, out=tmp_path / "one"), run(policy=policy, episodes=8, num_envs=4, out=tmp_path / "four")
    assert essence(alone) == essence(together)
    for one in alone.episodes:
        executed = [np.load(Folder.actions_file(types.SimpleNamespace(path=tmp_path / name), one))["actions"] for name in ("one", "four")]
        assert np.abs(executed[0] - executed[1]).max() < 1e-5  # the rounding of a matrix product depends on the batch
    assert alone.settings["weights"] == fingerprint(policy) and alone.settings["execute"] == policy.execute


def test_a_free_env_gets_the_next_episode_at_once():
    policy = Seeker(noise=0.3)
    results = run(policy=policy, episodes=24, num_envs=2)
    # lock-step waves would ask for two rows a wave; dynamic ones keep both envs busy until the queue is empty
    chunks = sum(-(-o.length // 3) for o in results.episodes)
    assert len(policy.asked) == chunks


@pytest.mark.parametrize("policy", ["random", "expert", stand_still])
def test_policies_that_are_no_vla(policy):
    alone, together = run(policy=policy), run(policy=policy, num_envs=3)
    assert essence(alone) == essence(together)
    assert alone.success_rate == (1 if policy == "expert" else pytest.approx(0, abs=0.3))
    assert alone.settings["policy"] == (policy if isinstance(policy, str) else "tests.fragile:stand_still")


def test_an_env_that_exists_already_is_used_and_left_open():
    with contextlib.closing(vlahub.VectorEnv("test/Point", 3)) as venv:
        venv.reset(seed=0)
        assert essence(run(venv)) == essence(run())
        venv.reset(seed=1)  # and goes on
        with pytest.raises(ValueError, match="exists already"):
            run(venv, env_options={"size": 30})


def test_execute_decides_how_often_a_policy_is_asked():
    policy = Seeker()
    run(policy=policy, episodes=3, execute=6)
    assert {step % 6 for _, step in policy.asked} == {0}
    with pytest.raises(ValueError, match="execute=7, but the policy predicts 6"):
        run(policy=policy, execute=7)
    with pytest.raises(ValueError, match="returned 5 actions, but execute=6"):
        run(policy=stand_still, execute=6)
    with pytest.raises(ValueError, match=r"shape \(1, 2\), expected \[B, T, D\]"):
        run(policy=lambda observation: np.zeros((1, 2)))


def test_a_policy_that_does_not_fit_is_refused_before_anything_runs():
    policy = Seeker()
    policy.interface = PointWorld(wrists=1).interface
    with pytest.raises(vlahub.InterfaceError, match="wrists"):
        run(policy=policy)
    assert not policy.asked


def test_a_policy_in_training_is_evaluated_without_dropout_and_goes_on_training():
    policy = FlowMlp.tiny(PointWorld().interface)
    modes = []
    policy.actor.register_forward_hook(lambda module, *_: modes.append(module.training))
    policy.train()
    policy.value_head.eval()  # frozen parts stay as they are
    run(policy=policy, episodes=2)
    assert set(modes) == {False} and policy.training and policy.actor[0].training and not policy.value_head[0].training


def test_a_policy_may_reuse_its_array(tmp_path):
    actions = np.zeros((1, 4, 2), np.float32)

    def wander(observation):
        actions[:] += 0.1
        return actions

    run(policy=wander, episodes=1, max_steps=12, out=tmp_path)
    (kept,) = (tmp_path / "actions").iterdir()
    assert np.load(kept)["actions"][::4, 0].tolist() == pytest.approx([0.1, 0.2, 0.3])


def test_clipped_actions_are_told():
    results = run(policy=lambda observation: np.full((len(observation["states"]), 4, 2), 3.0))
    assert all(o.clipped > 0 for o in results.episodes) and "out of bounds were clipped in 7 episodes" in results.warnings[0]


# ------------------------------------------------------------------------------------------------ lost episodes


def test_an_episode_lost_by_bad_luck_runs_again(tmp_path, capfd):
    results = run("test/Fragile", episodes=12, num_envs=2, env_options={"once": str(tmp_path / "crashed")}, progress=True)
    assert (tmp_path / "crashed").exists() and results.aborted == 0 and results.counted == 12 and results.success_rate == 1
    assert [o.attempts for o in results.episodes] == [1] * 6 + [2] + [1] * 5
    assert "episode 6 is lost and runs again: " in capfd.readouterr().out
    assert [(o.task, o.trial) for o in results.episodes] == [(task, trial) for task in range(3) for trial in range(4)]


@pytest.mark.parametrize("trouble", ["crash", "raise"])
def test_an_episode_that_is_always_lost_is_counted_as_aborted_only(tmp_path, trouble):
    results = run("test/Fragile", episodes=12, num_envs=2, env_options={"trouble": trouble}, out=tmp_path)
    assert (results.aborted, results.counted, results.successes, results.success_rate) == (1, 11, 11, 1.0)
    lost = results.episodes[6]
    assert lost.aborted and lost.attempts == 2 and not lost.success and {"crash": "SIGKILL", "raise": "fell apart"}[trouble] in lost.aborted
    assert "1 of 12 episodes were aborted 2 times by a failing simulation" in results.warnings[0] and results.tasks[1].aborted == 1
    assert results.warnings[0] in html.unescape((tmp_path / "report.html").read_text())


def test_an_environment_that_always_fails_stops_the_evaluation_and_each_attempt_gets_further(tmp_path, capsys):
    options = {"episodes": 9, "env_options": {"trouble": "raise", "bad": -1}, "out": tmp_path, "progress": True}  # task 1 fails in all of its three trials
    with pytest.raises(vlahub.vector.WorkerError, match=r"failed 3 times in a row.*fell apart"):
        run("test/Fragile", **options)
    assert "stopped after 4 of 9 episodes; the same command continues" in capsys.readouterr().out
    assert not json.loads((tmp_path / "results.json").read_text())["finished"]
    with pytest.raises(vlahub.vector.WorkerError):
        run("test/Fragile", **options)
    results = run("test/Fragile", **options)
    assert (results.counted, results.successes, results.aborted, results.tasks[1].success_rate) == (6, 6, 3, None) and results.finished


def test_finite_trials_are_not_run_twice():
    with pytest.raises(ValueError, match="3 tasks x 4 trials = 12"):
        run("test/Fragile", episodes=13)


# ------------------------------------------------------------------------------------------------ files


def test_what_is_written(tmp_path):
    results = run(policy=Seeker(), episodes=9, num_envs=2, videos=1, out=tmp_path, env_options={"size": 31}, command="vlahub eval ...", policy_name="me/seeker")
    record = json.loads((tmp_path / "results.json").read_text())
    assert record["success_rate"] == results.success_rate and len(record["episodes"]) == 9 and record["finished"]
    assert record["settings"]["env_options"] == {"size": 31} and record["settings"]["assets"] == "none" and record["settings"]["policy"] == "me/seeker"
    assert record["time"]["simulate_seconds"] > 0 and record["time"]["infer_seconds"] > 0 and record["versions"]["vlahub"]
    lines = [json.loads(line) for line in (tmp_path / "episodes.jsonl").read_text().splitlines()]
    assert sorted(line["index"] for line in lines) == list(range(9))
    page = (tmp_path / "report.html").read_text()
    assert "me/seeker" in page and page.count("<video") == 2 and "vlahub eval ..." in page

    assert len(record["videos"]) == 2 and "unsolved" in "".join(record["videos"])
    for name in record["videos"]:
        shown = next(o for o in results.episodes if f"task{o.task:03d}_trial{o.trial:04d}" in name)
        assert shown.success == ("unsolved" not in name)
        frames = video.decode(tmp_path / name)
        assert len(frames) == shown.length + 1  # the start, and one picture per control step
        assert frames.shape[2] == 342 and frames.shape[1] > 342  # 31 pixels eleven times are 341, made even; the strip stands above
        # the point moves: the picture itself, below the strip, is not the same throughout
        assert np.abs(frames[0, -340:].astype(int) - frames[-1, -340:]).max() > 100


def test_chosen_episodes_are_recorded(tmp_path):
    results = run(episodes=6, videos=[4, 1], out=tmp_path)
    assert results.videos == ["videos/task000_trial0001_solved.mp4", "videos/task002_trial0000_solved.mp4"]
    with pytest.raises(ValueError, match="episodes are numbered 0 to 5"):
        run(episodes=6, videos=[6], out=tmp_path)


def test_without_av_there_are_no_videos_and_all_else(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(vlahub.video, "available", lambda: False)
    results = run(episodes=2, videos=1, out=tmp_path, progress=True)
    assert results.counted == 2 and not results.videos and (tmp_path / "report.html").exists()
    assert "no videos, because the package av is not installed: pip install av" in capsys.readouterr().out
    assert "no videos" in results.warnings[0]


def test_a_full_disk_costs_the_video_and_not_the_evaluation(tmp_path, monkeypatch, capsys):
    save = video.save

    def full(path, data):
        if path.suffix == ".mp4":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return save(path, data)

    monkeypatch.setattr(video, "save", full)
    results = run(episodes=3, videos=1, out=tmp_path, progress=True)
    assert results.success_rate == 1 and not results.videos and "No space left on device" in results.warnings[0]
    assert "episode 0 has no video" in capsys.readouterr().out
    assert "No space left on device" in json.loads((tmp_path / "results.json").read_text())["warnings"][0]
    assert "No space left on device" in (tmp_path / "report.html").read_text()


def test_a_replay_that_goes_elsewhere_is_told_and_not_shown(tmp_path):
    results = run(episodes=3, out=tmp_path)
    folder = Folder(tmp_path)
    folder.keep_actions(results.episodes[0], [np.zeros((4, 2), np.float32)])
    folder.close()
    recorded = run(episodes=3, out=tmp_path, videos=[0, 1])
    assert recorded.videos == ["videos/task001_trial0000_solved.mp4"]
    assert "episode 0 has no video" in recorded.warnings[0] and "no success after 4 steps" in recorded.warnings[0]


def test_an_evaluation_goes_on_where_it_stopped(tmp_path):
    whole = run(policy=Seeker(), episodes=9, seed=3)
    run(policy=Seeker(), episodes=4, seed=3, out=tmp_path)
    again = Seeker()
    extended = run(policy=again, episodes=9, seed=3, out=tmp_path, num_envs=2)
    assert essence(extended) == essence(whole)
    assert {seed for seed, _ in again.asked} == {o.seed for o in whole.episodes} - {e.seed for e in episodes_of(4, 3, 3, None)}
    with pytest.raises(evaluation.SettingsDiffer, match="holds 9 finished episodes, 5 of them beyond the 4"):
        run(policy=Seeker(), episodes=4, seed=3, out=tmp_path)
    with pytest.raises(evaluation.SettingsDiffer, match="execute is 3 there, 2 here"):
        run(policy=Seeker(), episodes=9, seed=3, out=tmp_path, execute=2)


def test_ctrl_c_keeps_what_is_finished(tmp_path):
    class Impatient(Seeker):
        def act(self, observation, seeds):
            if len(self.asked) > 20:
                raise KeyboardInterrupt
            return super().act(observation, seeds)

    with pytest.raises(KeyboardInterrupt):
        run(policy=Impatient(), policy_name="p", episodes=12, out=tmp_path)
    record = json.loads((tmp_path / "results.json").read_text())
    assert not record["finished"] and 0 < len(record["episodes"]) < 12 and "unfinished" in (tmp_path / "report.html").read_text()
    assert essence(run(policy=Seeker(), policy_name="p", episodes=12, out=tmp_path)) == essence(run(policy=Seeker(), episodes=12))


def test_a_killed_evaluation_goes_on(tmp_path):
    arguments = ["eval", "--env", "tests.fragile:test/Fragile", "--policy", "expert", "--episodes", "12", "--num-envs", "2", "--out", str(tmp_path / "out")]
    command = [sys.executable, "-m", "vlahub", *arguments, "--env-options", "cost=0.03", "bad=9", "--videos", "0"]
    lines = tmp_path / "out" / "episodes.jsonl"
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while not (lines.exists() and lines.read_bytes().count(b"\n") >= 3):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.wait()
    finished = lines.read_bytes().count(b"\n")
    assert 3 <= finished < 12

    ended = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert ended.returncode == 0, ended.stderr
    assert f"{finished} of 12 episodes were finished before" in ended.stdout
    records = [json.loads(line) for line in lines.read_text().splitlines()]
    assert sorted((record["task"], record["trial"]) for record in records) == [(task, trial) for task in range(3) for trial in range(4)]
    assert all(record["success"] for record in records)
