import time
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.mlp import MlpPolicy
from tests.worlds import POINT
from vlahub.env import ChunkResult
from vlahub.interface import InterfaceError
from vlahub.rollout import Collector, Film, SeedStream, joined, reduce_log_prob
from vlahub.vector import VectorEnv


@pytest.fixture(scope="module", params=[(1, 2), (2, 2), (2, 0)], ids=["one slot", "two slots", "in process"])
def env(request):
    slots, workers = request.param
    env = VectorEnv(POINT, num_envs=4, workers=workers, slots=slots, max_steps=9, timeout=60)
    yield env
    env.close()


def policy(env, head="gaussian", **options) -> MlpPolicy:
    torch.manual_seed(0)
    return MlpPolicy.tiny(env.interface, head=head, **options).eval()


def collector(env, model, seed=0, first=0) -> Collector:
    return Collector(env, model, SeedStream(seed, range(first, first + env.num_envs)))


def test_steady_rollouts_are_dense_and_consistent(env):
    model = policy(env)
    rollout = collector(env, model).steady(12)
    assert rollout.row.shape == (12, 4) and sorted(rollout.row.flatten().tolist()) == list(range(48))
    ended = (rollout.terminated | rollout.truncated).any(2)
    assert int(ended.sum()) == len(rollout.episodes) > 3, "9 steps in chunks of 2 end an episode every 5 decisions"
    evaluated = model.evaluate(rollout.trace)
    assert torch.allclose(evaluated.log_prob, rollout.log_prob, atol=1e-6), "the ratio is 1 on unchanged weights"
    assert torch.allclose(rollout.grid(evaluated.value), rollout.value, atol=1e-6)
    assert torch.equal(rollout.flat(rollout.grid(rollout.log_prob)), rollout.log_prob)
    for k, b in np.argwhere(ended.numpy()):
        cut = bool(rollout.truncated[k, b].any())
        assert (rollout.cut_value[k, b] != 0) == cut, "a time limit bootstraps, a termination does not"
        assert rollout.valid[k, b].tolist() == [True, not cut], "the ninth step is the first of its chunk" if cut else ""


def test_an_episode_goes_on_in_the_next_rollout(env):
    model = policy(env)
    whole = collector(env, model).steady(8)
    halves = collector(env, model)
    first, second = halves.steady(4), halves.steady(4)
    assert torch.equal(torch.cat([first.reward, second.reward]), whole.reward)
    assert torch.equal(first.grid(first.log_prob), whole.grid(whole.log_prob)[:4])
    assert torch.allclose(first.next_value, whole.value[4, :, 0], atol=1e-6), "the value after the fourth chunk is the fifth's"


def test_rollouts_do_not_depend_on_slots_or_on_how_envs_are_divided(env):
    """Two ranks with two environments each see what one rank with four sees."""
    model = policy(env, "flow")
    whole = collector(env, model).steady(6)
    for first in (0, 2):
        with closing(VectorEnv(POINT, num_envs=2, workers=1, max_steps=9)) as half:
            part = collector(half, model, first=first).steady(6)
        assert torch.equal(part.reward, whole.reward[:, first : first + 2])
        assert torch.allclose(part.grid(part.log_prob), whole.grid(whole.log_prob)[:, first : first + 2], atol=1e-5)


def test_bootstrap_values_draw_their_noise_as_decisions_do(env):
    """Where a critic looks at noise, values must not depend on torch's global generator, whose state differs between ranks."""
    model, given = policy(env, "flow"), []
    whole = collector(env, model)
    plain = model.value
    model.value = lambda observation, seeds=None: given.append(seeds) or plain(observation, seeds)
    whole.steady(6)
    slots = len(whole.slots)
    assert torch.cat(given[-slots:]).tolist() == np.stack([whole.noise, whole.steps], 1).tolist(), "those of the next decisions"
    assert given[:-slots] and all((seeds[:, 1] == 9).all() for seeds in given[:-slots]), "an episode is cut after nine steps"


def test_a_rollout_splits_by_environments_and_joins_again(env):
    model = policy(env)
    whole = collector(env, model).steady(7)
    parts = [whole.of(range(0, 1)), whole.of(range(1, 4))]
    assert [part.row.shape for part in parts] == [(7, 1), (7, 3)] and [len(part.log_prob) for part in parts] == [7, 21]
    again = joined(parts)
    for name in ("reward", "valid", "terminated", "truncated", "value", "cut_value", "next_value"):
        assert torch.equal(getattr(again, name), getattr(whole, name)), name
    assert torch.equal(again.grid(again.log_prob), whole.grid(whole.log_prob))
    assert torch.equal(again.grid(again.trace["states"]), whole.grid(whole.trace["states"]))
    assert sorted(again.episodes, key=str) == sorted(whole.episodes, key=str)


def test_parts_of_different_lengths_join_and_a_lost_part_keeps_a_row(env):
    model = policy(env)
    whole = collector(env, model).episodes([1, 2, 3, 4])
    lost = whole.of(range(0, 2))
    lost.row[:] = -1
    lost = lost.of(range(2))
    assert len(lost.log_prob) == 1 and (lost.row == -1).all()
    short = whole.of(range(2, 4))
    short = replace(short, **{name: grid[:2] for name, grid in short._grids().items() if name != "next_value"}, row=short.row[:2])
    both = joined([lost, short])
    assert both.row.shape == (len(lost.row), 4) and (both.row[2:] == -1).all() and not both.valid[2:, 2:].any()
    assert torch.equal(both.grid(both.log_prob)[:2, 2:], whole.grid(whole.log_prob)[:2, 2:])


def test_whole_episodes_share_starts_and_stop_costing_when_done(env):
    model = policy(env)
    rollout = collector(env, model).episodes([5, 5, 9, 9], {"task": [0, 0, 2, 2]})
    assert len(rollout.episodes) == 4 and sorted(record.seed for record in rollout.episodes) == [5, 5, 9, 9]
    assert {(record.seed, record.task) for record in rollout.episodes} == {(5, 0), (9, 2)}
    states, noise = rollout.grid(rollout.trace["states"]), rollout.grid(rollout.trace["taken"])
    assert torch.equal(states[0, 0], states[0, 1]) and not torch.equal(states[0, 0], states[0, 2]), "equal seeds give equal starts"
    assert not torch.equal(noise[0, 0], noise[0, 1]), "and exploration still differs"
    lengths = {record.env: record.length for record in rollout.episodes}
    assert rollout.valid.sum((0, 2)).tolist() == [lengths[b] for b in range(4)]
    assert len(rollout.log_prob) == sum(-(-length // 2) for length in lengths.values()), "no decision after an episode's end"
    assert rollout.next_value is None


def test_a_film_shows_the_first_environment_and_stays_short(env, monkeypatch):
    model = policy(env)
    plain, filmed = collector(env, model), collector(env, model)
    filmed.film = film = Film()
    rollout = filmed.steady(10)
    assert torch.equal(rollout.reward, plain.steady(10).reward), "looking changes nothing"
    assert film.every == 1 and len(film.frames) == int(rollout.valid[:, 0].sum()) > 10, "one picture per control step that ran"
    monkeypatch.setattr("vlahub.rollout.FRAMES", 6)
    filmed.film = film = Film()
    filmed.steady(10)
    assert film.every == 2 and len(film.frames) == 6


def test_pictures_of_a_film_have_one_size_whatever_the_instructions():
    film = Film()
    for instruction in ("go", "a long instruction " * 8):
        info = {"frames": [[np.full((24, 24, 3), 255, np.uint8)]], "success": [True]}
        film.add(ChunkResult({}, np.ones((1, 1)), np.ones((1, 1), bool), np.zeros((1, 1), bool), np.ones(1, int), info), instruction, 0, 0.0, 20)
    first, second = film.pictures()
    assert film.frames[0].shape < film.frames[1].shape and first.shape == second.shape
    assert (first[-300:] == film.frames[0][-300:]).all()


def test_an_aborted_episode_is_in_no_row():
    with closing(VectorEnv(POINT, num_envs=2, workers=2, max_steps=9)) as env, pytest.warns(RuntimeWarning, match="aborted"):
        rollout = collector(env, policy(env)).episodes([1, 2], {"trouble": [None, 3]})
    assert rollout.aborted == 1 and [record.env for record in rollout.episodes] == [0]
    assert (rollout.row[:, 1] == -1).all() and not rollout.valid[:, 1].any() and not rollout.truncated[:, 1].any()
    assert len(rollout.used()) == int((rollout.row[:, 0] >= 0).sum())


def test_log_probabilities_reduce_over_what_ran():
    log_prob = torch.arange(1.0, 13).view(1, 3, 4)  # T = 3, D = 4; N = 2 executed
    valid = torch.tensor([[True, False]])
    token, mask = reduce_log_prob(log_prob, valid, "token")
    assert token.shape == mask.shape == (1, 2, 4) and mask.sum() == 4
    action, mask = reduce_log_prob(log_prob, valid, "action")
    assert action.tolist() == [[10.0, 26.0]] and mask.tolist() == [[True, False]]
    chunk, mask = reduce_log_prob(log_prob, valid, "chunk")
    assert chunk.tolist() == [10.0] and mask.tolist() == [True], "actions that did not run do not count"
    with pytest.raises(ValueError, match="use the level 'chunk'"):
        reduce_log_prob(torch.zeros(1), valid, "action")
    with pytest.raises(ValueError, match="'action' or 'chunk'"):
        reduce_log_prob(torch.zeros(1, 3), valid, "token")


def test_mismatches_are_refused(env):
    with pytest.raises(ValueError, match="from 1 to the policy's horizon 2"):
        Collector(env, policy(env), SeedStream(0, range(4)), execute=3)
    with closing(VectorEnv(POINT, num_envs=1, wrists=1)) as other:
        model = MlpPolicy.tiny(other.interface)
    object.__setattr__(model, "interface", other.interface)
    with pytest.raises(InterfaceError, match="wrist"):
        collector(env, model)


def test_seed_streams_depend_on_place_and_count_only():
    a, b = SeedStream(1, [4, 5]), SeedStream(1, [5])
    assert a.next(1) == b.next(0) and a.next(1) == b.next(0) and a.count == [0, 2]
    assert len({SeedStream(seed, [env]).next(0) for seed in range(20) for env in range(20)}) == 400


def test_waiting_for_resets_counts_as_simulation(env, monkeypatch):
    def slow(**options):
        time.sleep(0.2)
        return reset(**options)

    reset = env.reset
    monkeypatch.setattr(env, "reset", slow)
    runner = collector(env, policy(env))
    assert runner.episodes([1, 2, 3, 4]).seconds["simulate"] >= 0.2
    runner.restart()
    assert runner.steady(1).seconds["simulate"] >= 0.2
