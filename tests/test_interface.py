import dataclasses
import json

import gymnasium as gym
import numpy as np
import pytest

import vlahub
from vlahub import interface as interfaces
from vlahub.interface import Adapter, Camera, Field, Interface, InterfaceError, check, register_adapter

ARM = Interface(
    main=Camera("head", 24, 32),
    wrists=(Camera("left_wrist", 24, 32), Camera("right_wrist", 24, 32)),
    state=(Field("joints", 6, "rad", low=(-1.0, -2.0, -np.inf, -3.0, -3.0, -3.0), high=3.0), Field("gripper", 1, "1", low=0, high=1, open=1.0, closed=0.0)),
    action=(
        Field("position", 3, "m", reference="delta", frame="robot_base", low=-0.1, high=0.1),
        Field("rotation", 3, "rad", reference="delta", rotation="axis_angle", frame="robot_base"),
        Field("gripper", 1, "1", low=-1, high=1, open=-1.0, closed=1.0),
    ),
    control_hz=20,
)


def changed(interface=ARM, **entries):
    return dataclasses.replace(interface, **entries)


def with_action(name, **entries):
    return changed(action=tuple(dataclasses.replace(field, **entries) if field.name == name else field for field in ARM.action))


def test_round_trip_through_json():
    record = json.loads(json.dumps(ARM.to_dict(), allow_nan=False))
    assert Interface.from_dict(record) == ARM
    assert np.array_equal(Interface.from_dict(record).state_space().low, ARM.state_space().low)
    with pytest.raises(ValueError, match="unknown entries.*'colour'"):
        Interface.from_dict({**record, "colour": "red"})


def test_spaces_follow_the_fields():
    space = ARM.action_space()
    assert space.shape == (7,) and space.dtype == np.float32 and ARM.action_dim == 7 and ARM.state_dim == 7
    assert space.low[:3].tolist() == pytest.approx([-0.1] * 3) and np.isinf(space.low[3:6]).all() and space.high[6] == 1
    assert list(ARM.cameras) == ["head", "left_wrist", "right_wrist"]


def test_equal_interfaces_fit_directly():
    fit = check(ARM, ARM)
    assert str(fit) == "direct"
    actions, observation = np.zeros((2, 7)), {"states": np.zeros((1, 7))}
    assert fit.actions(actions) is actions and fit.observation(observation) is observation


def test_environments_and_policies_are_asked_for_their_interface():
    env = gym.make("test/Point")
    assert str(vlahub.check(env, env)) == "direct"
    assert str(vlahub.check(gym.wrappers.OrderEnforcing(env), env.interface)) == "direct"
    with pytest.raises(InterfaceError, match="the policy declares no vlahub Interface"):
        check(env, object())
    with pytest.raises(InterfaceError, match="the environment declares no vlahub Interface"):
        check(gym.make("CartPole-v1"), env)


# what differs, and the words that must stand in the message: the field, and both sides
DIFFERENT = [
    (changed(main=Camera("agentview", turned=180)), ["cameras.main", "'head'", "turned by 0", "180", "'agentview'"]),
    (changed(extras=(Camera("side"),)), ["cameras.extras", "side missing", "offers 0"]),
    (changed(wrists=(*ARM.wrists, Camera("third"))), ["cameras.wrists", "needs 3", "third missing", "offers 2"]),
    (with_action("gripper", open=1.0, closed=-1.0), ["action.gripper.open", "1.0 in the policy", "-1.0 in the environment", "action.gripper.closed"]),
    (with_action("rotation", rotation="euler_xyz"), ["action.rotation.rotation", "'euler_xyz' in the policy", "'axis_angle' in the environment"]),
    (with_action("position", reference="absolute"), ["action.position.reference", "'absolute' in the policy", "'delta' in the environment"]),
    (with_action("position", frame="world"), ["action.position.frame", "'world'", "'robot_base'"]),
    (with_action("position", unit="cm"), ["action.position.unit", "'cm'", "'m'"]),
    (changed(action=ARM.action[:2]), ["action", "the policy has position[3], rotation[3]", "gripper[1]", "register_adapter"]),
    (changed(state=(Field("joints", 7, "rad"),)), ["state", "joints[6], gripper[1]", "joints[7]"]),
    (changed(control_hz=50), ["control_hz", "20 Hz", "50 Hz"]),
    (changed(language="zh"), ["language", "'en'", "'zh'"]),
]


@pytest.mark.parametrize(("wants", "words"), DIFFERENT, ids=[words[0] for _, words in DIFFERENT])
def test_every_difference_is_named_on_both_sides(wants, words):
    with pytest.raises(InterfaceError) as raised:
        check(ARM, wants)
    for word in words:
        assert word in str(raised.value)


def test_all_differences_come_in_one_message():
    with pytest.raises(InterfaceError) as raised:
        check(ARM, changed(with_action("gripper", open=1.0), control_hz=50, language="zh"))
    assert str(raised.value).count("\n  - ") == 3


def test_what_a_policy_does_not_use_does_not_matter():
    check(ARM, changed(state=()))  # no state
    check(ARM, changed(wrists=()))  # fewer cameras
    check(ARM, changed(control_hz=None))
    check(ARM, changed(main=Camera("other_name", 224, 224)))  # names and sizes are the policy's own business: it resizes
    check(ARM, changed(extras=(Camera("side"),), optional_cameras=("side",)))
    check(changed(control_hz=None), changed(control_hz=50))


def test_the_two_fingers_of_libero_become_one_number():
    pose = (Field("position", 3, "m"), Field("rotation", 3, "rad", rotation="axis_angle"))
    env, policy = changed(state=(*pose, Field("fingers", 2, "m"))), changed(state=(*pose, Field("gripper", 1, "m")))
    fit = check(env, policy)
    assert str(fit) == "adapters: mean_of_two_fingers"
    state = np.array([[1, 2, 3, 4, 5, 6, 0.04, -0.03]], np.float32)
    adapted = fit.observation({"states": state, "task_descriptions": ["go"]})
    assert adapted["states"].dtype == np.float32 and adapted["task_descriptions"] == ["go"]
    assert adapted["states"].shape == (1, 7) and adapted["states"][0, :6].tolist() == [1, 2, 3, 4, 5, 6]
    with pytest.raises(InterfaceError, match="no adapter joins"):
        check(policy, env)  # there is no way back


def test_an_action_adapter_of_ones_own(monkeypatch):
    monkeypatch.setattr(interfaces, "ADAPTERS", dict(interfaces.ADAPTERS))
    short = changed(action=(Field("position", 3, "m", reference="delta"),))
    adapter = Adapter(
        name="still_hand",
        what="position only -> no rotation, open gripper",
        of="action",
        source=(("position", 3),),
        target=(("position", 3), ("rotation", 3), ("gripper", 1)),
        convert=lambda action: np.concatenate([action, np.zeros((*action.shape[:-1], 3)), -np.ones((*action.shape[:-1], 1))], axis=-1),
    )
    register_adapter(adapter)
    with pytest.raises(ValueError, match="still_hand"):
        register_adapter(adapter)
    actions = check(ARM, short).actions(np.ones((4, 2, 3)))  # [B, T, 3]
    assert actions.shape == (4, 2, 7) and actions.dtype == np.float32 and actions[0, 0].tolist() == [1, 1, 1, 0, 0, 0, -1]
