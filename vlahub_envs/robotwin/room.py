"""The room: ground, wall and table, as boxes. Metres; x right, y away from the robot, z up."""

from dataclasses import dataclass

TABLE_TOP = 0.74
GROUND = (0.7071068, 0, -0.7071068, 0)  # turns SAPIEN's plane, whose normal is x, to face up. The ground is at z = 0

# static friction, dynamic friction, restitution
PLAIN = (0.3, 0.3, 0.1)  # PhysX's default: ground, table legs, meshes, the robot
GRIPPY = (0.5, 0.5, 0.0)  # wall, table top and primitive shapes


@dataclass(frozen=True)
class Box:
    name: str
    half: tuple[float, float, float]  # half of its sizes
    position: tuple[float, float, float]
    friction: tuple[float, float, float]
    colour: tuple[float, float, float]


_LEG = (TABLE_TOP - 0.05) / 2
ROOM = (
    Box("wall", (3, 0.6, 1.5), (0, 1, 1.5), GRIPPY, (1, 0.9, 0.9)),
    Box("table", (0.6, 0.35, 0.025), (0, 0, TABLE_TOP - 0.025), GRIPPY, (1, 1, 1)),
    *(Box("leg", (0.025, 0.025, _LEG), (x, y, _LEG), PLAIN, (1, 1, 1)) for x in (-0.55, 0.55) for y in (-0.3, 0.3)),
)
