import json
import math

import gymnasium as gym
import numpy as np
import pytest
import torch

from vlahub import evaluation
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
    results = Results([outcome(0, True, 4, 1.0), outcome(1, False, 20, task=3)], settings={"env": "e", "policy": "p"}, warnings=[])
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
    for count in (0, -1, 2.5, True):
        with pytest.raises(ValueError, match="episodes must be"):
            episodes_of(count, 0, 3, None)


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
