"""The scripted expert of LIBERO and how it finds grasps."""

from types import SimpleNamespace

import mujoco
import numpy as np
import pytest

from vlahub import catalog
from vlahub_envs.libero import grasps, standins
from vlahub_envs.libero.expert import START, ScriptedExpert
from vlahub_envs.libero.simulation import Libero

BOWL_FROM_CENTRE, BOWL_IN_DRAWER, MILK, OPEN_AND_PUT, KNOB, PUSH_PLATE, PUT_AND_CLOSE = 2, 4, 7, 3, 7, 5, 3


def play(simulation: Libero, expert: ScriptedExpert, steps: int | None = None) -> tuple[bool, np.ndarray]:
    """-> solved, the actions [n, 7]. Nothing is drawn."""
    actions, solved = [], False
    while not solved and len(actions) < (steps or simulation.max_steps):
        actions.append(expert.act()[0])
        solved = bool(simulation.apply(actions[-1][None]).success[-1])
    return solved, np.array(actions)


@pytest.fixture(scope="module")
def spatial():
    simulation = Libero("Spatial", assets="stand-in", models=1)
    yield simulation, ScriptedExpert(simulation)
    simulation.close()


def test_it_brings_the_bowl_to_the_plate(spatial):
    simulation, expert = spatial
    simulation.reset(0, {"task": BOWL_FROM_CENTRE, "trial": 0})
    expert.reset()
    solved, actions = play(simulation, expert)
    assert solved and not expert.failure and 40 < len(actions) < 130
    assert np.abs(actions).max() <= 1 and set(actions[:, 6]) == {-1, 1}
    assert (np.diff(actions[:, 6]) > 0).sum() == 1  # it takes the bowl at the first attempt
    resting = (np.abs(actions[:, :6]).max(axis=1) < 0.05) & (actions[:, 6] < 0)
    assert resting.sum() <= 3, "a policy that imitates pauses does not get out of them"
    # a function of the state: the same once more
    simulation.reset(0, {"task": BOWL_FROM_CENTRE, "trial": 0})
    expert.reset()
    assert np.array_equal(play(simulation, expert)[1], actions)


def test_it_follows_what_is_pushed_away(spatial):
    simulation, expert = spatial
    simulation.reset(1, {"task": BOWL_FROM_CENTRE, "trial": 1})
    expert.reset()
    play(simulation, expert, 15)  # on its way to the bowl
    scene = simulation.scene
    address = scene.model.joint(scene.env.get_object("akita_black_bowl_1").joints[-1]).qposadr[0]
    scene.data.qpos[address : address + 2] += (-0.02, 0.03)
    assert play(simulation, expert)[0]


def test_it_says_what_is_out_of_reach_and_holds_still(spatial):
    simulation, expert = spatial
    simulation.reset(0, {"task": BOWL_FROM_CENTRE, "trial": 0})
    scene = simulation.scene
    address = scene.model.joint(scene.env.get_object("akita_black_bowl_1").joints[-1]).qposadr[0]
    scene.data.qpos[address : address + 2] = (0.45, 0.5)
    mujoco.mj_forward(scene.model, scene.data)
    expert.reset()
    assert np.abs(expert.act()[0, :6]).max() < 0.01 and "akita_black_bowl_1" in expert.failure
    expert.act()


@pytest.mark.parametrize(
    ("suite", "task", "trial"),
    [("Object", MILK, 2), ("Goal", KNOB, 2), ("Spatial", BOWL_IN_DRAWER, 2), ("10", PUT_AND_CLOSE, 3)],
)
def test_it_solves_others(suite, task, trial):
    """The bowl in the drawer needs a hand that leans."""
    simulation = Libero(suite, assets="stand-in", models=1)
    simulation.reset(trial, {"task": task, "trial": trial})
    expert = catalog.make_expert(f"vlahub/LIBERO-{suite}", simulation)
    expert.reset()
    assert play(simulation, expert)[0], expert.failure
    simulation.close()


def test_after_a_slip_it_grasps_elsewhere(spatial):
    simulation, expert = spatial
    simulation.reset(0, {"task": BOWL_FROM_CENTRE, "trial": 0})
    expert.reset()
    name = "akita_black_bowl_1"
    first = expert._grasp(name, lambda: expert._place("plate_1"), [])
    second = expert._grasp(name, lambda: expert._place("plate_1"), [first.position])
    assert np.linalg.norm(second.position - first.position) >= grasps.ELSEWHERE and second.cost > first.cost


def test_it_opens_a_drawer_without_catching_its_fingers_at_the_front():
    simulation = Libero("Goal", assets="stand-in", models=1)
    expert = ScriptedExpert(simulation)
    simulation.reset(2, {"task": OPEN_AND_PUT, "trial": 2})
    expert.reset()
    play(simulation, expert, 80)
    assert simulation.scene.env._eval_predicate(["open", "wooden_cabinet_1_top_region"])
    simulation.close()


def test_it_slides_a_plate_that_it_cannot_take():
    simulation = Libero("Goal", assets="stand-in", models=1)
    expert = ScriptedExpert(simulation)
    expert._grasp = lambda *_: None
    simulation.reset(1, {"task": PUSH_PLATE, "trial": 1})
    expert.reset()
    assert play(simulation, expert)[0]
    simulation.close()


def test_it_knows_what_it_does_not_know():
    for suite in ("90", "130"):
        assert not catalog.env_card(f"vlahub/LIBERO-{suite}").expert
    simulation = Libero("10", assets="stand-in", models=1)
    with pytest.raises(RuntimeError, match=r"call the simulation's reset\(\)"):
        ScriptedExpert(simulation).reset()
    simulation.scene = SimpleNamespace(task=simulation.all_tasks[5])
    with pytest.raises(ValueError, match="does not know task 'STUDY_SCENE1_.*solves are, of LIBERO-Spatial: 0, 1.*LIBERO-10: 0, 1, 3, 4, 6, 7"):
        ScriptedExpert(simulation).reset()
    simulation.scene = None  # this one was not compiled
    simulation.close()


def test_it_gives_up_where_it_has_no_skill():
    simulation = Libero("10", task=9, assets="stand-in", models=1)  # a microwave to be closed
    simulation.reset(0, {})
    expert = ScriptedExpert(simulation, untried=True)
    expert.reset()
    expert._put = lambda *_: iter(())
    assert np.abs(expert.act()[0, :6]).max() < 0.01 and "no skill closes microwave_1" in expert.failure
    simulation.close()


# ------------------------------------------------------------------------------------------------ grasps


def candidates(name: str, yaw: float = 0.0) -> list[grasps.Grasp]:
    """Grasps of a stand-in that stands at the origin, by a hand from above."""
    model = mujoco.MjModel.from_xml_string(standins.thing_xml(name))
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    matter = grasps.Matter(SimpleNamespace(model=model, data=data), np.arange(model.nbody))
    turned = np.array([[np.cos(yaw), -np.sin(yaw), 0], [np.sin(yaw), np.cos(yaw), 0], [0, 0, 1]]) @ START.as_matrix()
    found = list(grasps.candidates(matter, np.array(standins.THINGS[name].centre), turned, 0.0))
    return sorted(found, key=lambda grasp: grasp.cost)


def test_a_bowl_is_taken_by_its_rim():
    radius = standins.THINGS["akita_black_bowl"].half[0]
    for grasp in candidates("akita_black_bowl")[:4]:
        assert 0.52 * radius < np.linalg.norm(grasp.position[:2]) < radius  # where the wall stands, beside the foot
        direction = grasp.position[:2] / np.linalg.norm(grasp.position[:2])
        assert abs(direction @ grasp.rotation[:2, 0]) > 0.95  # the fingers close through the wall, not along it


def test_a_packet_is_taken_across_its_narrow_sides():
    thing = standins.THINGS["butter"]  # 7.6 cm x 4 cm
    across = candidates("butter")[0]
    assert abs(across.rotation[1, 0]) > 0.99 and np.abs(across.position[:2] - thing.centre[:2]).max() < 0.005
    assert not candidates("butter", yaw=np.pi / 2), "7.6 cm leave the open fingers no room"
    assert not candidates("butter", yaw=np.pi / 8), "its sides would slip between slanting fingers"


def test_matter_on_a_line():
    model = mujoco.MjModel.from_xml_string(
        "<mujoco><worldbody><body><geom type='box' size='.01 .02 .03' pos='.1 0 0'/><geom type='box' size='.01 .02 .03' pos='.2 0 0' euler='0 0 90'/>"
        "<geom type='box' size='.01 .02 .03' pos='.3 0 0' contype='0' conaffinity='0'/></body></worldbody></mujoco>"
    )
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    matter = grasps.Matter(SimpleNamespace(model=model, data=data), np.arange(2))
    assert np.allclose(matter.along(np.zeros(3), np.array([1.0, 0, 0])), [(0.09, 0.11), (0.18, 0.22)])
    assert matter.along(np.array([0, 0.015, 0]), np.array([1.0, 0, 0])) == [(pytest.approx(0.09), pytest.approx(0.11))]
    assert matter.between(np.zeros(3), np.array([1.0, 0, 0]), 0.1, 0.15) and not matter.between(np.zeros(3), np.array([1.0, 0, 0]), 0.12, 0.17)
    assert matter.extent(np.array([1.0, 0, 0])) == (pytest.approx(0.09), pytest.approx(0.22))
