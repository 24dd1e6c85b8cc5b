import numpy as np
import pytest
import torch
from gymnasium import spaces

from tests.worlds import PointWorld
from vlahub.observation import (
    InstructionSpace,
    batch_size,
    batched,
    concatenate,
    is_batched,
    select,
    space_of,
    stack,
    to_torch,
    validate,
    views,
)


def single(wrists=2, extras=1, seed=0):
    world = PointWorld(size=8, wrists=wrists, extras=extras)
    world.reset(seed, {})
    return world.observe()


def batch(count=3, **views):
    return stack([single(seed=seed, **views) for seed in range(count)])


@pytest.mark.parametrize(("wrists", "extras"), [(0, 0), (1, 0), (2, 1), (1, 3)])
def test_the_space_holds_what_the_world_observes(wrists, extras):
    world = PointWorld(size=8, wrists=wrists, extras=extras)
    world.reset(0, {})
    observation, space = world.observe(), space_of(world.interface)
    validate(observation)
    assert space.contains(observation)
    assert space.contains(space.sample())
    assert ("wrist_images" in space.spaces) == (wrists > 0) and ("extra_view_images" in space.spaces) == (extras > 0)
    if wrists:
        assert space["wrist_images"].shape == ((8, 8, 3) if wrists == 1 else (wrists, 8, 8, 3))
    if extras:
        assert space["extra_view_images"].shape == (extras, 8, 8, 3)  # one extra view is stacked as well


def test_instructions_of_any_language_are_in_the_space():
    space = InstructionSpace()
    assert isinstance(space, spaces.Text)
    for text in ("", "pick up the red cup; put it (gently!) down\n", "按铃", "ça va?"):
        assert text in space
    assert "x" * 513 not in space and 3 not in space
    assert all(space.sample() in space for _ in range(20))


def test_validate_takes_numpy_and_torch_single_and_batched():
    for observation in (single(), batch(), single(0, 0)):
        validate(observation)
        validate(to_torch(observation))
    validate({**batch(), "task_descriptions": ("a", "b", "c")})


BROKEN = [
    ("main_images", None, "None|missing"),
    ("main_images", np.zeros((8, 8, 3), np.float32), "float32, expected uint8"),
    ("main_images", np.zeros((3, 8, 8), np.uint8), r"expected \['H', 'W', 3\]"),
    ("main_images", np.zeros((2, 8, 8, 3), np.uint8), r"expected \['H', 'W', 3\]"),
    ("main_images", np.uint8(3), r"expected \['H', 'W', 3\]"),
    ("main_images", [[1]], "must be a numpy array or a torch tensor, not list"),
    ("wrist_images", None, "is None; leave an absent key out"),
    ("wrist_images", np.zeros((2, 2, 8, 8, 3), np.uint8), "one more dimension for views"),
    ("states", np.zeros(2), "float64, expected float32"),
    ("states", np.zeros((1, 2), np.float32), r"expected \['D'\]"),
    ("task_descriptions", 3, "must be a str, or a list of str"),
    ("task_descriptions", ["go", 3], "must be a str, or a list of str"),
    ("image", np.zeros((8, 8, 3), np.uint8), "not part of the contract; known keys are main_images"),
]


@pytest.mark.parametrize(("key", "value", "words"), BROKEN)
def test_validate_names_the_key_that_is_wrong(key, value, words):
    with pytest.raises(ValueError, match=words) as raised:
        validate({**single(), key: value})
    assert repr(key) in str(raised.value)


@pytest.mark.parametrize("key", ["main_images", "states", "task_descriptions"])
def test_required_keys(key):
    observation = single()
    del observation[key]
    with pytest.raises(ValueError, match=f"'{key}'.* is missing"):
        validate(observation)


def test_a_batch_whose_parts_disagree_is_refused():
    with pytest.raises(ValueError, match="there are 2 task_descriptions"):
        validate({**batch(3), "task_descriptions": ["a", "b"]})


def test_stack_select_concatenate_undo_each_other():
    singles = [single(seed=seed) for seed in range(4)]
    whole = stack(singles)
    validate(whole)
    assert is_batched(whole) and not is_batched(singles[0]) and batch_size(whole) == 4
    for i, one in enumerate(singles):
        assert all(np.array_equal(select(whole, i)[key], one[key]) for key in one)
    for rows, chosen in ((slice(1, 3), [1, 2]), ([2, 0], [2, 0]), (np.array([True, False, False, True]), [0, 3])):
        part = select(whole, rows)
        assert batch_size(part) == len(chosen)
        assert part["task_descriptions"] == [whole["task_descriptions"][i] for i in chosen]
        assert np.array_equal(part["states"], whole["states"][chosen])
        assert torch.equal(select(to_torch(whole), rows)["states"], to_torch(whole)["states"][chosen])
    again = concatenate([select(whole, slice(0, 1)), select(whole, slice(1, 4))])
    assert all(np.array_equal(again[key], whole[key]) for key in whole)
    alone = batched(singles[0])
    assert batch_size(alone) == 1 and alone["main_images"].shape == (1, 8, 8, 3)
    assert batched(whole).keys() == whole.keys() and batch_size(batched(whole)) == 4


def test_what_cannot_be_stacked_or_counted_is_an_error():
    with pytest.raises(ValueError, match="different keys"):
        stack([single(), single(wrists=0)])
    with pytest.raises(ValueError, match="no batch size"):
        batch_size(single())


def test_to_torch_owns_its_memory():
    observation = batch()
    tensors = to_torch(observation)
    before = observation["states"].copy()
    tensors["states"] += 1
    assert np.array_equal(observation["states"], before)
    assert tensors["main_images"].dtype == torch.uint8 and tensors["task_descriptions"] == observation["task_descriptions"]
    observation["states"].flags.writeable = False  # as a vector environment's buffers may be
    assert torch.equal(to_torch(observation)["states"], torch.tensor(before))
    turned = {**observation, "main_images": observation["main_images"][:, ::-1, ::-1]}  # negative strides
    assert np.array_equal(to_torch(turned)["main_images"].numpy(), turned["main_images"])


def test_views_adds_the_dimension_that_a_single_view_lacks():
    assert views(batch(wrists=1), "wrist_images").shape == (3, 1, 8, 8, 3)
    assert views(batch(wrists=2), "wrist_images").shape == (3, 2, 8, 8, 3)
    assert views(to_torch(batch(wrists=1)), "main_images").shape == (3, 1, 8, 8, 3)
