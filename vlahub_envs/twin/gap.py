"""How the stand-in for the real cell differs from its digital twin. Nothing here is drawn: there is one real cell, and these are its numbers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Colour = tuple[float, float, float]


@dataclass(frozen=True)
class Gap:
    """The numbers of a cell whose twin was measured, modelled and lit with ordinary care. `Gap.none()` is the twin itself."""

    # camera: a calibration that is a centimetre, a degree and two per cent off
    camera_shift: tuple[float, float, float] = (0.010, -0.008, 0.012)  # m, in the world
    camera_turn: tuple[float, float, float] = (0.8, -1.0, 1.2)  # degrees about the camera's own x (its line of sight), y and z
    focal: float = 1.02  # times the nominal focal length
    centre: tuple[float, float] = (0.010, -0.008)  # of the picture, in picture widths and heights

    # light: one dim warm lamp from the window's side instead of three cold ones from above
    ambient: Colour = (0.34, 0.31, 0.26)
    lamps: tuple[tuple[tuple[float, float, float], Colour], ...] = (  # (direction, colour)
        ((0.0, 0.0, -1.0), (1.55, 1.45, 1.25)),
        ((-1.0, -0.5, -1.0), (0.35, 0.34, 0.32)),
        ((1.0, 1.0, -0.6), (1.05, 0.98, 0.82)),
    )

    # surfaces
    table: Colour = (0.50, 0.40, 0.30)
    grain: float = 0.22  # how far the table's planks differ in brightness; 0: one plain colour
    floor: Colour = (0.22, 0.24, 0.24)
    tint: Colour = (0.88, 0.92, 1.06)  # times the colour of every object
    tray: Colour = (0.86, 0.84, 0.78)

    # bodies
    mass: float = 1.25  # times the objects' density: models are hollow, things are not
    friction: float = 0.75  # of objects, tray and table

    # arm
    delay: float = 0.04  # s from a command to the drives' new target
    stiffness: float = 0.85  # times the drives' stiffness
    damping: float = 1.15  # times their damping

    # sensors: standard deviations
    pixel_noise: float = 4.0  # of 255
    exposure_noise: float = 0.02  # of a whole picture's brightness, drawn anew for every picture
    position_noise: float = 0.001  # m
    rotation_noise: float = 0.003  # rad
    gripper_noise: float = 0.0005  # m

    def __post_init__(self):
        for name in ("focal", "mass", "friction", "stiffness", "damping"):
            if not getattr(self, name) > 0:
                raise ValueError(f"gap.{name} is a factor and must be above 0, not {getattr(self, name)!r}")
        for name in ("grain", "delay", "pixel_noise", "exposure_noise", "position_noise", "rotation_noise", "gripper_noise"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"gap.{name} must be at least 0, not {getattr(self, name)!r}")
        if self.delay >= 0.2:
            raise ValueError(f"gap.delay must be below 0.2 s, the time of one action, not {self.delay!r}")

    @classmethod
    def none(cls) -> Gap:
        """The twin, with the published lights."""
        return cls(
            camera_shift=(0, 0, 0), camera_turn=(0, 0, 0), focal=1, centre=(0, 0),
            ambient=(0.3, 0.3, 0.3), lamps=(((0, 0, -1), (2.2, 2.2, 2.2)), ((-1, -0.5, -1), (0.7, 0.7, 0.7)), ((1, 1, -1), (0.7, 0.7, 0.7))),
            table=(0.62, 0.50, 0.36), grain=0, floor=(0.3, 0.3, 0.32), tint=(1, 1, 1), tray=(0.93, 0.93, 0.92),
            mass=1, friction=1, delay=0, stiffness=1, damping=1,
            pixel_noise=0, exposure_noise=0, position_noise=0, rotation_noise=0, gripper_noise=0,
        )  # fmt: skip

    def picture(self, rgb: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """[H, W, 3] uint8 as the sensor gives it."""
        if not (self.pixel_noise or self.exposure_noise):
            return rgb
        exposure = 1 + self.exposure_noise * random.standard_normal(dtype=np.float32)
        noise = self.pixel_noise * random.standard_normal(rgb.shape, dtype=np.float32)
        return np.clip(rgb * exposure + noise + 0.5, 0, 255).astype(np.uint8)

    def state(self, state: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """[7] position, rotation, gripper width, as measured."""
        spread = np.repeat([self.position_noise, self.rotation_noise, self.gripper_noise], (3, 3, 1))
        return state + spread * random.standard_normal(7)
