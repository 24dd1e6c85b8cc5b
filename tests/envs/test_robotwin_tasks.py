"""The tasks of RoboTwin, one by one: where things go, when it is solved, that the expert solves it. No pictures."""

import json
from collections.abc import Iterator

import numpy as np
import pytest
import sapien
from scipy.spatial.transform import Rotation

from benchmarks.robotwin_experts import episode
from vlahub_envs.robotwin import TASKS, assets, jointed
from vlahub_envs.robotwin.expert import Hands, ScriptedExpert, Unreachable, between, shortest_turn
from vlahub_envs.robotwin.instructions import instruction
from vlahub_envs.robotwin.kinematics import pose
from vlahub_envs.robotwin.simulation import RoboTwin
from vlahub_envs.robotwin.task import Draws

# name -> step limit, seen and unseen sentences of the benchmark
KNOWN = {
    "ClickBell": (400, 31, 7),
    "AdjustBottle": (400, 50, 10),
    "BeatBlockHammer": (400, 50, 10),
    "BlocksRankingRGB": (1200, 50, 10),
    "HandoverBlock": (800, 50, 10),
    "LiftPot": (400, 50, 10),
    "MoveCanPot": (400, 50, 10),
    "OpenMicrowave": (1500, 39, 8),
    "PickDualBottles": (400, 30, 10),
    "PlaceContainerPlate": (400, 16, 4),
    "PlaceEmptyCup": (500, 50, 10),
    "PlaceShoe": (500, 50, 10),
    "StackBlocksThree": (1200, 30, 10),
    "StackBlocksTwo": (800, 44, 10),
    "TurnSwitch": (400, 50, 10),
}


def simulate(task: str, **options) -> RoboTwin:
    return RoboTwin(task=task, assets="stand-in", cameras=("head",), camera_size=(16, 16), **options)


@pytest.fixture(scope="module", params=TASKS)
def simulation(request) -> Iterator[RoboTwin]:
    simulation = simulate(request.param)
    yield simulation
    simulation.close()


def test_every_task_has_the_benchmarks_step_limit_and_as_many_sentences(simulation):
    limit, seen, unseen = KNOWN[type(simulation.task).__name__]
    sentences = simulation.task.sentences
    assert simulation.max_steps == limit and (len(sentences.seen), len(sentences.unseen)) == (seen, unseen)
    everything = sentences.seen + sentences.unseen
    assert len(set(everything)) == len(everything) and all(sentence.endswith(".") and " ." not in sentence for sentence in everything)
    for seed in range(20):
        _, words = drawn(simulation, seed)
        for which in ("seen", "unseen"):
            sentence = instruction(sentences, which, words, seed)
            assert "{" not in sentence and "/base" not in sentence


def test_nothing_is_solved_at_the_start_and_everything_lies_still(simulation):
    for seed in range(10):
        assert simulation.reset(seed, {})["settled"]
        assert not simulation.task.solved(simulation.scene)
        before = [thing.pose for thing in simulation.scene.things.values()]
        for _ in range(50):
            simulation.scene.step()
        assert all(np.allclose(pose, thing.pose, atol=2e-3) for pose, thing in zip(before, simulation.scene.things.values(), strict=True))


def test_the_expert_solves_it_the_same_way_twice(simulation):
    expert = ScriptedExpert(simulation)
    outcomes = [episode(simulation, expert, seed) for seed in (2, 4, 2)]
    assert outcomes[0][0] and outcomes[1][0] and outcomes[0] == outcomes[2]


@pytest.mark.slow
def test_the_expert_solves_five_of_six_layouts(simulation):
    """A sample: `benchmarks/robotwin_experts.py` counts fifty."""
    expert = ScriptedExpert(simulation)
    solved = [episode(simulation, expert, seed)[0] for seed in range(10, 16)]
    assert sum(solved) >= 5


# ------------------------------------------------------------------------------------------------ layouts


def legacy(seed: int) -> np.random.RandomState:
    """The generator after the draws that come before every task's: table height, two cameras."""
    random = np.random.RandomState(seed)
    random.uniform(0, 0)
    for _ in range(2):
        random.randn(3), random.uniform(0, 0)
    return random


def cube(random: np.random.RandomState) -> tuple[np.ndarray, float]:
    x, y = random.uniform(-0.28, 0.28), random.uniform(-0.08, 0.05)
    while abs(x) < 0.15 and y > 0:
        y = random.uniform(-0.08, 0)
    random.uniform(0, 0)
    angles = [random.uniform(-limit, limit) for limit in (0, 0, 0.75)]
    return np.array([x, y]), angles[2]


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_cubes_follow_upstreams_draws(seed):
    simulation, random, placed = simulate("StackBlocksTwo"), legacy(seed), []
    while len(placed) < 2:
        where, yaw = cube(random)
        if abs(where[0]) >= 0.05 and np.hypot(*(where - (0, -0.1))) >= 0.15 and all(np.hypot(*(where - other)) >= 0.1 for other, _ in placed):
            placed.append((where, yaw))
    simulation.reset(seed, {})
    for thing, (where, yaw) in zip(simulation.task.cubes, placed, strict=True):
        assert np.allclose(thing.position, [*where, 0.765], atol=1e-3)  # fallen by a millimetre
        assert np.isclose(Rotation.from_matrix(thing.pose[:3, :3]).as_euler("xyz")[2], yaw, atol=2e-3)
    assert simulation.task.arms == ["left" if where[0] < 0 else "right" for where, _ in placed]
    simulation.close()


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_cup_and_coaster_follow_upstreams_draws(seed):
    simulation, random = simulate("PlaceEmptyCup"), legacy(seed)
    tag = random.randint(0, 2)
    cup = [random.uniform(*((0.15, 0.3), (-0.3, -0.15))[tag]), random.uniform(-0.2, 0.05)]
    random.uniform(0, 0)
    while True:
        coaster = [random.uniform(*((-0.05, 0.1), (-0.1, 0.05))[tag]), random.uniform(-0.2, 0.05)]
        random.uniform(0, 0)
        if np.hypot(*np.subtract(cup, coaster)) >= 0.1:
            break
    simulation.reset(seed, {})
    assert np.allclose(simulation.task.cup.position[:2], cup, atol=2e-3) and np.allclose(simulation.task.coaster.position[:2], coaster, atol=1e-6)
    assert simulation.task.arm == ("right", "left")[tag]
    simulation.close()


def drawn(simulation: RoboTwin, seed: int) -> tuple[np.random.RandomState, dict[str, str]]:
    """Objects where the seed puts them, before they come to rest. -> upstream's generator before the task's own draws; the words."""
    simulation.scene.clear()
    return legacy(seed), simulation.task.place(simulation.scene, Draws(seed))


def angles(random: np.random.RandomState, *limits: float) -> list[float]:
    """A height, which is fixed, and three angles."""
    random.uniform(0, 0)
    return [random.uniform(-limit, limit) for limit in limits]


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_bottles_and_shoes_and_their_models_follow_upstreams_draws(seed):
    simulation = simulate("AdjustBottle")
    random, words = drawn(simulation, seed)
    tag, model = random.randint(0, 2), random.choice([13, 16])
    x, y = random.uniform(*((-0.12, -0.08), (0.08, 0.12))[tag]), random.uniform(-0.13, -0.08)
    yaw = angles(random, 0, 0, 0.4)[2] + (0, np.pi)[tag]  # its top points to the middle
    bottle = simulation.task.bottle
    assert words == {"A": f"001_bottle/base{model}", "a": ("left", "right")[tag]}
    assert np.allclose(bottle.position, (x, y, 0.752)) and np.allclose(bottle.pose[:3, 1], (np.cos(yaw), np.sin(yaw), 0), atol=1e-6)
    simulation.close()
    simulation = simulate("PlaceShoe")
    random, words = drawn(simulation, seed)
    while True:
        x, y = random.uniform(-0.25, 0.25), random.uniform(-0.1, 0.05)
        while abs(x) < 0.15 and y > 0:
            y = random.uniform(-0.1, 0)
        yaw = angles(random, 0, 3.14, 0)[1]
        if np.hypot(x, y) >= 0.15:
            break
    shoe = simulation.task.shoe
    assert words == {"A": f"041_shoe/base{random.choice(range(10))}", "a": "left" if x < 0 else "right"}
    assert np.allclose(shoe.position, (x, y, 0.741)) and np.allclose(shoe.pose[:3, 0], (np.cos(yaw), np.sin(yaw), 0), atol=1e-6)
    simulation.close()


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_pots_and_cans_follow_upstreams_draws(seed):
    simulation = simulate("MoveCanPot")
    random, words = drawn(simulation, seed)
    model = random.randint(0, 7)
    assert random.uniform(0, 0) == random.uniform(0, 0) == 0  # the pot is always in the middle
    yaw = np.pi + angles(random, 0, 0, np.pi / 8)[2]
    while True:
        x, y = random.uniform(-0.3, 0.3), random.uniform(0.05, 0.15)
        turn = angles(random, 0, np.pi / 4, 0)[1]
        if abs(x) >= 0.2 and np.hypot(x, y) >= 0.3:
            break
    pot, can = simulation.task.pot, simulation.task.can
    side = "left" if x < 0 else "right"
    assert words == {"A": f"060_kitchenpot/base{model}", "B": f"105_sauce-can/base{random.choice([0, 2, 4, 5, 6])}", "a": side}
    assert np.allclose(pot.position, (0, 0, 0.741 - pot.model.center[2] + pot.model.size[2] / 2), atol=2e-4)  # its base is at the height of its middle
    assert np.allclose(pot.pose[:3, 0], (np.cos(yaw), np.sin(yaw), 0), atol=1e-6)
    assert np.allclose(can.position, (x, y, 0.741)) and np.allclose(can.pose[:3, 2], (np.cos(turn), np.sin(turn), 0), atol=1e-6)
    simulation.close()
    simulation = simulate("LiftPot")
    random, words = drawn(simulation, seed)
    model, x, y = random.randint(0, 2), random.uniform(-0.05, 0.05), random.uniform(-0.05, 0.05)
    yaw = 2 * np.arctan2(0.71006, 0.704141) + angles(random, 0, 0, np.pi / 8)[2]
    pot = simulation.task.pot
    assert words == {"A": f"060_kitchenpot/base{model}"} and np.allclose(pot.position[:2], (x, y))
    assert np.allclose(pot.pose[:3, 0], (np.cos(yaw), np.sin(yaw), 0), atol=1e-6)
    left, right = (pot.point("contact", i)[:3, 3] for i in range(2))
    assert left[0] < x - 0.08 and right[0] > x + 0.08  # the handles, one on each side
    simulation.close()


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_two_bottles_and_a_switch_follow_upstreams_draws(seed):
    simulation = simulate("PickDualBottles")
    random, words = drawn(simulation, seed)
    assert words == {"A": "001_bottle/base13", "B": "001_bottle/base16"}
    for side, x, q in (("left", (-0.25, -0.05), (0.66, 0.66, -0.25, -0.25)), ("right", (0.05, 0.25), (0.65, 0.65, 0.27, 0.27))):
        where = random.uniform(*x), random.uniform(0.03, 0.23), 0.741
        turn = Rotation.from_quat(np.roll(q, -1)) * Rotation.from_euler("y", angles(random, 0, 1, 0)[1])
        bottle = simulation.task.bottles[side]
        assert np.allclose(bottle.position, where) and np.allclose(bottle.pose[:3, :3], turn.as_matrix(), atol=1e-6)
        assert bottle.pose[2, 1] > 0.999  # it stands
    simulation.close()
    simulation = simulate("TurnSwitch")
    random, words = drawn(simulation, seed)
    model, where = random.randint(0, 8), [random.uniform(*limits) for limits in ((-0.25, 0.25), (0, 0.1), (0.81, 0.84))]
    yaw = 2 * np.arctan2(0.71006, 0.704141) + [random.uniform(-limit, limit) for limit in (0, 0, np.pi / 4)][2]
    switch = simulation.task.switch
    assert words == {"A": f"056_switch/base{model}", "a": "right" if -np.cos(yaw) > 0 else "left"}
    assert np.allclose(switch.position, where) and np.allclose(switch.pose[:3, 0], (np.cos(yaw), np.sin(yaw), 0), atol=1e-6)
    assert np.allclose(switch.link("contact")[:3, 2], -switch.pose[:3, 0], atol=1e-5)  # its face looks along -x of its base
    simulation.close()
    simulation = simulate("OpenMicrowave")
    random, words = drawn(simulation, seed)
    model, where = random.randint(0, 2), [random.uniform(-0.12, -0.02), random.uniform(0.15, 0.2), 0.8]
    microwave = simulation.task.microwave
    assert words == {"A": f"044_microwave/base{model}", "a": "left"}
    assert np.allclose(microwave.position, np.add(where, (0, 0, (0.0743, 0.0639)[model])), atol=1e-6)  # its base's origin is in its middle
    point, up = microwave.axis()
    assert np.allclose(up, (0, 0, -1), atol=1e-6) and point[0] < where[0] - 0.09 and point[1] < where[1] - 0.06  # hinged on the left, in front
    simulation.close()


def test_cubes_to_be_lined_up_share_a_size_that_differs_between_layouts():
    simulation, sizes = simulate("BlocksRankingRGB"), set()
    for seed in range(20):
        simulation.reset(seed, {})
        halves = {thing.body.collision_shapes[0].half_size[0] for thing in simulation.task.cubes}
        assert len(halves) == 1 and 0.015 <= min(halves) <= 0.025
        sizes |= halves
    assert len(sizes) == 20
    assert len([key for key in simulation.scene.stage._bodies if key[0] == "box"]) == 3  # past episodes' boxes are not kept
    simulation.close()


# ------------------------------------------------------------------------------------------------ success


def solved_with(simulation: RoboTwin, grippers=(1.0, 1.0), **poses) -> bool:
    """Is it solved with these objects there? Each pose is a position, or a position and a quaternion w, x, y, z."""
    for name, where in poses.items():
        thing = simulation.scene.things[name]
        thing.entity.set_pose(sapien.Pose(where[:3], where[3:] if len(where) > 3 else thing.entity.pose.q))
    simulation.scene.robot.grippers = np.array(grippers)
    return simulation.task.solved(simulation.scene)


def test_when_a_stack_counts():
    simulation = simulate("StackBlocksThree")
    simulation.reset(0, {})
    stack = {"red": (0.1, -0.1, 0.765), "green": (0.1, -0.1, 0.815), "blue": (0.1, -0.1, 0.865)}
    assert solved_with(simulation, **stack)
    assert not solved_with(simulation, grippers=(1.0, 0.8), **stack) and not solved_with(simulation, grippers=(0.8, 1.0), **stack)
    assert solved_with(simulation, **stack | {"blue": (0.124, -0.124, 0.876)})
    for off in ((0.026, 0, 0), (0, 0.026, 0), (0, 0, 0.0125)):
        assert not solved_with(simulation, **stack | {"blue": np.add(stack["blue"], off)})
        assert not solved_with(simulation, **stack | {"red": np.add(stack["red"], off)})
    assert not solved_with(simulation, **stack | {"red": stack["green"], "green": stack["red"]})
    simulation.close()


def test_when_a_row_counts():
    simulation = simulate("BlocksRankingRGB")
    simulation.reset(0, {})
    row = {"red": (-0.1, -0.1, 0.76), "green": (0.0, -0.1, 0.76), "blue": (0.1, -0.1, 0.76)}
    assert solved_with(simulation, **row) and not solved_with(simulation, grippers=(0.5, 1), **row)
    assert solved_with(simulation, **row | {"blue": (0.129, -0.071, 0.9)})  # height does not count
    assert not solved_with(simulation, **row | {"blue": (0.131, -0.1, 0.76)}) and not solved_with(simulation, **row | {"blue": (0.1, -0.069, 0.76)})
    assert not solved_with(simulation, **row | {"red": row["green"], "green": row["red"]})
    simulation.close()


def test_when_a_cup_is_on_its_coaster_and_a_container_on_its_plate():
    simulation = simulate("PlaceEmptyCup")
    simulation.reset(0, {})
    middle = simulation.task.coaster.point("functional")[:3, 3]
    assert solved_with(simulation, cup=np.add(middle, (0.034, 0, 0.014))) and not solved_with(simulation, cup=np.add(middle, (0.025, 0.025, 0)))
    assert not solved_with(simulation, cup=np.add(middle, (0, 0, 0.016))) and not solved_with(simulation, grippers=(1, 0.7), cup=middle)
    simulation.close()
    simulation = simulate("PlaceContainerPlate")
    simulation.reset(0, {})
    middle = simulation.task.plate.position
    assert solved_with(simulation, container=np.add(middle, (0.049, -0.049, 0.029)))
    for off in ((0.051, 0, 0), (0, 0.051, 0), (0, 0, 0.031)):
        assert not solved_with(simulation, container=middle + off)
    assert not solved_with(simulation, grippers=(0.7, 1), container=middle)
    simulation.close()


def test_when_the_hammer_has_struck(monkeypatch):
    simulation = simulate("BeatBlockHammer")
    simulation.reset(1, {})
    task, scene = simulation.task, simulation.scene
    face = task.hammer.point("functional")[:3, 3] - task.hammer.position
    top = task.block.point("functional", 1)[:3, 3]
    touches = np.zeros((1, 3))
    monkeypatch.setattr(scene, "touching", lambda bodies, thing: touches)
    assert solved_with(simulation, hammer=top - face + (0.019, -0.019, 0.1))
    assert not solved_with(simulation, hammer=top - face + (0.021, 0, 0)) and not solved_with(simulation, hammer=top - face + (0, 0.021, 0))
    touches = np.zeros((0, 3))
    assert not solved_with(simulation, hammer=top - face)
    simulation.close()


def test_when_the_block_stands_on_its_pad():
    simulation = simulate("HandoverBlock")
    simulation.reset(0, {})
    block, pad = simulation.task.block, simulation.task.pad
    assert np.allclose(block.point("functional", 0)[:3, 2], (0, 0, -1), atol=1e-3)
    there = pad.point("functional", 1)[:3, 3] + (0, 0, 0.1)
    assert solved_with(simulation, block=np.add(there, (0.029, -0.029, 0.009))) and solved_with(simulation, grippers=(0, 0.81), block=there)
    for off in ((0.031, 0, 0), (0, 0.031, 0), (0, 0, 0.011)):
        assert not solved_with(simulation, block=there + off)
    assert not solved_with(simulation, grippers=(1, 0.8), block=there)
    simulation.close()


def test_when_a_bottle_is_up_and_a_shoe_on_its_mat():
    simulation = simulate("AdjustBottle")
    simulation.reset(0, {})
    task = simulation.task
    assert task.arm == "left"
    middle = task.bottle.point("functional")[:3, 3] - task.bottle.position
    assert solved_with(simulation, (0, 0), bottle=(-0.151, 0, 0.901) - middle)  # grippers do not count
    for where in ((-0.149, 0, 0.901), (-0.151, 0, 0.899), (0.2, 0, 1)):
        assert not solved_with(simulation, bottle=where - middle)
    simulation.close()
    simulation = simulate("PlaceShoe")
    simulation.reset(0, {})
    straight = Rotation.from_quat([0.5, -0.5, -0.5, 0.5])
    assert np.allclose(straight.apply([0, 0, 1]), (-1, 0, 0))  # the toe points left

    def turned(where, degrees):
        return (*where, *np.roll((Rotation.from_euler("z", degrees, degrees=True) * straight).as_quat(), 1))

    there = (0.0, -0.08, 0.75)
    assert solved_with(simulation, shoe=turned(there, 15)) and solved_with(simulation, shoe=turned((-0.049, -0.061, 0.8), -15))
    assert solved_with(simulation, shoe=(*there, -0.5, -0.5, 0.5, 0.5))  # the same rotation, the quaternion's sign turned round
    for where, degrees in (((0.051, -0.08, 0.75), 0), ((0, -0.059, 0.75), 0), (there, 17), (there, -17), (there, 180)):
        assert not solved_with(simulation, shoe=turned(where, degrees))
    assert not solved_with(simulation, (0.8, 1), shoe=turned(there, 0)) and not solved_with(simulation, (1, 0.8), shoe=turned(there, 0))
    simulation.close()


def test_when_a_can_stands_beside_the_pot():
    simulation = simulate("MoveCanPot")
    simulation.reset(2, {})
    task = simulation.task
    assert task.arm == "left"
    middle = task.pot.position
    upright = Rotation.from_quat([0.5, 0.5, 0.5, 0.5])

    def can(x, y, z=0.741, turn=upright):
        return (*np.add(middle, (x, y, 0))[:2], z, *np.roll(turn.as_quat(), 1))

    assert solved_with(simulation, can=can(-0.18, 0)) and solved_with(simulation, can=can(-0.199, 0.034, turn=Rotation.from_euler("z", 2) * upright))
    assert solved_with(simulation, can=can(-0.01, 0, task.low - 1e-4)) and not solved_with(simulation, can=can(-0.01, 0, task.low + 1e-4))
    for x, y in ((-0.201, 0), (0.01, 0), (-0.18, 0.036), (-0.18, -0.036), (0.18, 0)):
        assert not solved_with(simulation, can=can(x, y))
    for axis in ("x", "y"):
        assert solved_with(simulation, can=can(-0.18, 0, turn=Rotation.from_euler(axis, 14, degrees=True) * upright))
        assert not solved_with(simulation, can=can(-0.18, 0, turn=Rotation.from_euler(axis, 16, degrees=True) * upright))
    assert not solved_with(simulation, (0.8, 1), can=can(-0.18, 0)) and not solved_with(simulation, (1, 0.8), can=can(-0.18, 0))
    simulation.close()


def test_when_a_pot_is_up(monkeypatch):
    simulation = simulate("LiftPot")
    simulation.reset(0, {})
    pot, robot = simulation.task.pot, simulation.scene.robot
    yaw = Rotation.from_matrix(pot.pose[:3, :3])
    away = {"left": np.zeros(3), "right": np.zeros(3)}
    monkeypatch.setattr(robot, "grasp_point", lambda side: pot.point("contact", ("left", "right").index(side))[:3, 3] + away[side])

    def solved(height, degrees=0.0):
        pot.articulation.set_root_pose(sapien.Pose(pose((0, 0, height), Rotation.from_euler("x", degrees, degrees=True) * yaw)))
        return simulation.task.solved(simulation.scene)

    assert solved(0.821) and not solved(0.819)
    assert solved(0.83, 36) and not solved(0.83, 37.5)
    for side in away:
        away[side] = np.array([0.02, 0.02, 0])
        assert solved(0.83)
        away[side] = np.array([0.02, 0.02, 0.02])
        assert not solved(0.83)
        away[side] = np.zeros(3)
    simulation.close()


def test_when_two_bottles_are_up():
    simulation = simulate("PickDualBottles")
    simulation.reset(0, {})
    task = simulation.task
    middle = {side: bottle.point("functional")[:3, 3] - bottle.position for side, bottle in task.bottles.items()}

    def solved(left, right):
        return solved_with(simulation, (0, 0), **{"left bottle": left - middle["left"], "right bottle": right - middle["right"]})

    left, right = np.array([-0.06, -0.105, 0.9]), np.array([0.06, -0.105, 0.9])
    assert solved(left, right) and solved(np.add(left, (0.099, -0.099, -0.009)), right)
    for off in ((0.101, 0, 0), (0, -0.101, 0), (0, 0, -0.011)):
        assert not solved(left + off, right) and not solved(left, right + off)
    simulation.close()


@pytest.mark.parametrize(("task", "name", "missing"), [("TurnSwitch", "switch", lambda way: 0.05), ("OpenMicrowave", "microwave", lambda way: 0.4 * way)])
def test_when_a_switch_is_flipped_and_a_door_open(task, name, missing):
    simulation = simulate(task)
    for seed in range(3):
        simulation.reset(seed, {})
        thing = simulation.scene.things[name]
        low, high = thing.limits()
        assert thing.joint() == 0 and low <= 0 < high
        others = thing.articulation.get_qpos()[1:]
        for angle, solved in ((high - missing(high) + 1e-3, True), (high - missing(high) - 1e-3, False)):
            thing.articulation.set_qpos([angle, *others])
            assert simulation.task.solved(simulation.scene) == solved
    simulation.close()


def test_an_object_with_joints_is_whole_before_the_first_step_and_keeps_its_base():
    simulation = simulate("OpenMicrowave")
    drawn(simulation, 0)
    microwave = simulation.task.microwave
    body = microwave.link("functional")[:3, 3]
    assert np.allclose(body, microwave.position, atol=1e-6)
    before = microwave.point("contact").copy(), microwave.position.copy()
    for _ in range(20):
        simulation.scene.step()
    assert np.allclose(microwave.point("contact"), before[0], atol=1e-5) and np.array_equal(microwave.position, before[1])
    assert all(np.isclose(link.mass, 0.01) for link in microwave.articulation.links)
    assert {entity.name for _, entity in microwave.parts} == {"link_0", "link_1", "link_2", "link_3"} - (
        set() if microwave.model.id == 0 else {"link_2", "link_3"}
    )
    simulation.close()


def test_upstreams_touch_without_a_force_is_an_option():
    for strict in (False, True):
        simulation = simulate("BeatBlockHammer", strict_upstream_quirks=strict)
        simulation.reset(0, {})
        scene, block = simulation.scene, simulation.task.block
        hover = np.add(block.position, (0, 0, 0.025 + 0.005))  # a stand-in cube of another object, 5 mm above: within the contact offsets
        other = scene.add("other", assets.box((0.01, 0.01, 0.01), (1, 1, 1)), sapien.Pose(np.add(hover, (0, 0, 0.01))))
        other.body.disable_gravity = True
        scene.step()
        assert (len(scene.touching([block.body], other)) > 0) == strict
        simulation.close()


# ------------------------------------------------------------------------------------------------ objects


@pytest.mark.parametrize("name", list(assets.STANDINS))
def test_stand_ins_have_the_measured_size(name):
    for model_id in map(int, assets._measurements()[name]):
        model = assets.StandIns().model(name, model_id)
        vertices = np.concatenate([solid.mesh()[0] for solid in model.solids])
        low, high = vertices.min(axis=0), vertices.max(axis=0)
        width = min(model.size[0], model.size[2])  # of round ones; two of the cups have a handle on top of that, which is left out
        assert np.allclose([low[1], high[1]], model.center[1] + model.size[1] / 2 * np.array([-1, 1]), atol=4e-3)
        assert np.allclose((high - low)[0], width if name not in ("020_hammer", "041_shoe") else model.size[0], rtol=0.04)


@pytest.mark.parametrize("name", list(jointed.STANDINS))
def test_stand_ins_with_joints_have_the_measured_size_and_points(name):
    for model_id, record in assets._measurements()[name].items():
        model = assets.StandIns().model(name, int(model_id))
        parts, origins = jointed.STANDINS[name](record), {joint["child"]: np.array(joint["origin"]) for joint in record["joints"]}
        corners = np.concatenate([brick.mesh()[0] + origins.get(link, np.zeros(3)) for link, bricks in parts.items() for brick in bricks])
        assert set(parts) == {record["body"], *origins}
        low, high = np.array(record["low"]), np.array(record["high"])
        base = jointed.BODY_IN_BASE[:3, :3]
        assert np.allclose(
            np.sort([model.center - model.size / 2, model.center + model.size / 2], axis=0), np.sort([base @ low, base @ high], axis=0), atol=1e-6
        )
        if name == "056_switch":  # its rocker leans out, with its lower half
            assert np.allclose(corners.min(axis=0)[:2], low[:2]) and np.allclose(corners.max(axis=0)[:2], high[:2])
        else:
            slack = 0.004 if name == "060_kitchenpot" else 1e-3
            assert np.allclose(corners.min(axis=0), low, atol=slack) and np.allclose(corners.max(axis=0), high, atol=slack)
        for kind in ("contact", "functional"):
            assert all(bearer in parts for bearer in model.bearers[kind]) and len(model.bearers[kind]) == len(model.points[kind])


def test_official_objects_with_joints_are_counted_by_number_and_scaled(tmp_path):
    def link(name, size):
        shape = f'<geometry><box size="{size} {size} {size}"/></geometry>'
        return f'<link name="{name}"><visual>{shape}</visual><collision>{shape}</collision></link>'

    for number, upper in ((900, 0.3), (1000, 0.6)):
        folder = tmp_path / "objects" / "056_switch" / str(number)
        folder.mkdir(parents=True)
        (folder / "mobility.urdf").write_text(
            f'<robot name="switch"><link name="base"/>{link("link_1", 1)}{link("link_0", 0.5)}'
            '<joint name="joint_1" type="fixed"><parent link="base"/><child link="link_1"/><origin rpy="1.5708 0 -1.5708"/></joint>'
            '<joint name="joint_0" type="revolute"><parent link="link_1"/><child link="link_0"/><origin xyz="0 0 1"/><axis xyz="1 0 0"/>'
            f'<limit lower="0" upper="{upper}"/></joint></robot>'
        )
        (folder / "bounding_box.json").write_text(json.dumps({"min": [-0.5, -0.5, -0.5], "max": [0.5, 0.5, 1.25]}))
        contact = {"base": "link_0", "matrix": pose((0, 0, 0.25)).tolist()}
        (folder / "model_data.json").write_text(json.dumps({"scale": 0.1, "transform_matrix": pose((0, 0, 0.02)).tolist(), "contact_points": [contact]}))
    (tmp_path / "objects" / "056_switch" / "visual").mkdir()
    simulation = simulate("TurnSwitch")
    models = [assets.Official(tmp_path).model("056_switch", i) for i in range(2)]
    things = [simulation.scene.add(f"official {i}", model, sapien.Pose([0.3, 0.2 * i, 1.0]), static=True) for i, model in enumerate(models)]
    assert [thing.limits()[1] for thing in things] == pytest.approx([0.3, 0.6])
    assert np.allclose(models[0].size, (0.175, 0.1, 0.1)) and np.allclose(things[0].position, (0.3, 0, 1.02))
    assert np.allclose(things[0].point("contact")[:3, 3], (0.3 - 0.125, 0, 1.02), atol=1e-5)  # the body's z is the base's -x
    things[1].articulation.set_qpos([0.5])
    assert np.allclose(things[1].point("contact")[:3, 3] - things[1].position, (-0.1 - 0.025 * np.cos(0.5), 0, -0.025 * np.sin(0.5)), atol=1e-5)
    simulation.scene.ready()  # it can be drawn, too
    with pytest.raises(FileNotFoundError, match="lack number 2 of 056_switch"):
        assets.Official(tmp_path).model("056_switch", 2)
    simulation.close()


def test_a_brick_is_closed_and_its_normals_point_out():
    brick = assets.Brick((0.1, 0.2, 0.3), pose((1, 2, 3), Rotation.from_euler("xyz", (0.3, 0.5, 0.7))), (1, 1, 1))
    vertices, normals, triangles = brick.mesh()
    a, b, c = (vertices[triangles[:, i]] for i in range(3))
    assert np.isclose(np.einsum("ij,ij->i", a, np.cross(b, c)).sum() / 6, 8 * 0.1 * 0.2 * 0.3)  # the volume that the triangles enclose
    assert np.allclose(np.cross(b - a, c - a) / np.linalg.norm(np.cross(b - a, c - a), axis=1)[:, None], normals[triangles[:, 0]])


def test_boxes_have_upstreams_points():
    cube = assets.box((0.01, 0.02, 0.03), (1, 0, 0))
    assert np.allclose(cube.points["functional"][:, :3, 3], [(0, 0, -0.03), (0, 0, 0.03)]) and np.allclose(cube.points["functional"][:, :3, 2], (0, 0, -1))
    assert np.allclose(cube.points["contact"][:, :3, 1], (0, 0, 1))  # the gripper is above
    column = assets.box((0.03, 0.03, 0.1), (1, 0, 0), long=True)
    assert np.allclose(column.points["contact"][:, 2, 3], [0.07] * 4 + [-0.07] * 4)
    assert np.allclose(column.points["contact"][:4, :3, 1], [(0, -1, 0), (1, 0, 0), (0, 1, 0), (-1, 0, 0)], atol=1e-12)
    assert np.allclose(column.points["contact"][:, :3, 0], (0, 0, 1))  # the camera is on top


# ------------------------------------------------------------------------------------------------ moves of scripts


def test_a_straight_move_is_straight_and_the_other_arm_may_go_home():
    simulation = simulate("StackBlocksTwo")
    simulation.reset(0, {})
    hands, robot = Hands(simulation), simulation.scene.robot
    simulation.apply(hands.go(left=pose((0.1, 0.05, 0.02)) @ robot.hand("left"), right=pose((0, 0.05, 0)) @ robot.hand("right")))
    start = robot.hand("left")[:3, 3]
    chunk = hands.go(home=["right"], straight=True, left=pose((0, 0.02, -0.1)) @ robot.hand("left"))
    points = np.array([robot.arms["left"].forward(row[:6].astype(float))[:3, 3] for row in chunk]) - start
    line = points[-1] / np.linalg.norm(points[-1])
    assert np.allclose(points[-1], (0, 0.02, -0.1), atol=2e-3) and np.abs(points - np.outer(points @ line, line)).max() < 1e-3
    assert np.allclose(chunk[-1, 7:13], 0, atol=1e-6) and np.abs(chunk[0, 7:13]).max() > 0.01
    with pytest.raises(Unreachable, match="left hand cannot reach"):
        hands.move("left", pose((0, 3, 1)))
    simulation.close()


def test_turns():
    for a, b in (((1, 0, 0), (0, 1, 0)), ((0, 0, 1), (0, 0, -1)), ((0, 0, 1), (0, 0, 1))):
        turn = shortest_turn(np.array(a, float), np.array(b, float))
        assert np.allclose(turn.apply(a), b) and np.isclose(turn.magnitude(), np.arccos(np.dot(a, b)))
    middle = between(np.eye(4), pose((2, 0, 0), Rotation.from_euler("z", 1.0)), 0.5)
    assert np.allclose(middle, pose((1, 0, 0), Rotation.from_euler("z", 0.5)))


def test_an_expert_says_why_it_stopped():
    simulation = simulate("StackBlocksTwo")
    simulation.reset(0, {})
    thing = simulation.task.cubes[0]
    thing.entity.set_pose(sapien.Pose([0, 2, 1]))
    expert = ScriptedExpert(simulation)
    expert.reset()
    stay = expert.act()
    assert expert.over and "cannot grasp" in expert.failure and np.allclose(stay, simulation.scene.robot.state, atol=1e-6)
    simulation.close()
