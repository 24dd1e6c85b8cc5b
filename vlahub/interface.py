"""What an environment offers and what a policy expects, as one record each, and the comparison of the two.

A wrong gripper sign, a rotated camera or a state in another layout raises no exception by itself: the policy runs and scores 0 %.
So both sides declare an `Interface`, and `check` compares them whenever they first meet. It returns how to adapt one to the other
through named adapters, or raises an `InterfaceError` that names every field that differs and what to do.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from gymnasium import spaces

from vlahub.observation import Observation


@dataclass(frozen=True)
class Camera:
    """One view. `height` and `width` are what an environment renders; a policy leaves them 0 if it resizes what it gets."""

    name: str  # "head", "left_wrist", "agentview"
    height: int = 0
    width: int = 0
    turned: int = 0  # degrees by which the picture is turned from what a person expects (LIBERO: 180)


@dataclass(frozen=True)
class Field:
    """A named run of `size` numbers in a state or an action."""

    name: str  # "left_joints", "position", "rotation", "gripper"
    size: int
    unit: str  # "rad", "m", "rad/step", "1" for dimensionless
    reference: Literal["absolute", "delta"] = "absolute"
    rotation: str = ""  # for rotations: "axis_angle", "euler_xyz", "quaternion_wxyz"
    frame: str = ""  # "world", "robot_base", "tool"; empty for joints and grippers
    low: float | tuple[float, ...] = -np.inf
    high: float | tuple[float, ...] = np.inf
    open: float | None = None  # for grippers: the number that means fully open ...
    closed: float | None = None  # ... and the one that means fully closed


@dataclass(frozen=True)
class Interface:
    """Everything that must agree between an environment and a policy."""

    main: Camera
    state: tuple[Field, ...]  # empty in a policy that uses no state
    action: tuple[Field, ...]
    wrists: tuple[Camera, ...] = ()
    extras: tuple[Camera, ...] = ()
    control_hz: float | None = None  # None: the environment has no fixed rate, or the policy does not depend on it
    language: str = "en"
    optional_cameras: tuple[str, ...] = ()  # policy: cameras that it can do without

    @property
    def state_dim(self) -> int:
        return sum(field.size for field in self.state)

    @property
    def action_dim(self) -> int:
        return sum(field.size for field in self.action)

    @property
    def cameras(self) -> dict[str, Camera]:
        return {camera.name: camera for camera in (self.main, *self.wrists, *self.extras)}

    def action_space(self) -> spaces.Box:
        return _box(self.action)

    def state_space(self) -> spaces.Box:
        return _box(self.state)

    def to_dict(self) -> dict:
        """JSON-ready; infinities become None."""
        return _plain(dataclasses.asdict(self))

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Interface:
        record = dict(record)
        unknown = record.keys() - {field.name for field in dataclasses.fields(cls)}
        if unknown:
            raise ValueError(f"interface has unknown entries {sorted(unknown)}")
        record["main"] = Camera(**record["main"])
        for key in ("wrists", "extras"):
            record[key] = tuple(Camera(**camera) for camera in record.get(key, ()))
        for key in ("state", "action"):
            record[key] = tuple(_field(entry) for entry in record[key])
        record["optional_cameras"] = tuple(record.get("optional_cameras", ()))
        return cls(**record)


def _box(fields: tuple[Field, ...]) -> spaces.Box:
    low, high = (np.concatenate([np.broadcast_to(np.float32(getattr(field, side)), field.size) for field in fields]) for side in ("low", "high"))
    return spaces.Box(low, high, dtype=np.float32)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and np.isinf(value) else value


def _field(entry: Mapping[str, Any]) -> Field:
    entry = dict(entry)
    for side, infinite in (("low", -np.inf), ("high", np.inf)):
        bound = entry.get(side)
        if isinstance(bound, list):
            entry[side] = tuple(infinite if one is None else one for one in bound)
        else:
            entry[side] = infinite if bound is None else bound
    return Field(**entry)


class InterfaceError(ValueError):
    """An environment and a policy that do not fit. The message names each field on both sides."""


@dataclass(frozen=True)
class Adapter:
    """A named, tested conversion between two layouts. It applies if both layouts match exactly."""

    name: str
    what: str
    of: Literal["state", "action"]
    source: tuple[tuple[str, int], ...]  # (field name, size) of the env's state, or of the policy's action
    target: tuple[tuple[str, int], ...]  # (field name, size) of the policy's state, or of the env's action
    convert: Callable[[np.ndarray], np.ndarray]  # [..., source size] -> [..., target size]


ADAPTERS: dict[str, Adapter] = {}


def register_adapter(adapter: Adapter) -> Adapter:
    if adapter.name in ADAPTERS:
        raise ValueError(f"an adapter named {adapter.name!r} exists already")
    ADAPTERS[adapter.name] = adapter
    return adapter


register_adapter(
    Adapter(
        name="mean_of_two_fingers",
        what="8-d LIBERO state (position, axis-angle, two finger positions) -> 7-d with the mean of the two finger positions",
        of="state",
        source=(("position", 3), ("rotation", 3), ("fingers", 2)),
        target=(("position", 3), ("rotation", 3), ("gripper", 1)),
        # The plain mean, as the training code of the checkpoints takes it. LIBERO's fingers mirror each other (+q, -q), so it stays near 0
        # and says little about the opening; half their difference would say more, but no checkpoint was trained on it.
        convert=lambda state: np.concatenate([state[..., :6], (state[..., 6:7] + state[..., 7:8]) / 2], axis=-1),
    )
)


@dataclass(frozen=True)
class Fit:
    """How a policy meets an environment: the adapters in use (usually none)."""

    state: Adapter | None = None
    action: Adapter | None = None

    def observation(self, observation: Observation) -> Observation:
        """The env's observation as the policy expects it."""
        if self.state is None:
            return observation
        return {**observation, "states": self.state.convert(np.asarray(observation["states"])).astype(np.float32)}

    def actions(self, actions: np.ndarray) -> np.ndarray:
        """The policy's actions as the env expects them."""
        return actions if self.action is None else self.action.convert(actions).astype(np.float32)

    def __str__(self) -> str:
        used = [adapter.name for adapter in (self.state, self.action) if adapter]
        return f"adapters: {', '.join(used)}" if used else "direct"


def check(env: Any, policy: Any) -> Fit:
    """Compare what `env` offers with what `policy` expects.

    Both are an `Interface` or anything with an `interface` (a gymnasium env is unwrapped). Raises InterfaceError with every difference.
    """
    offer, wants = _interface_of(env, "environment"), _interface_of(policy, "policy")
    problems = _camera_problems(offer, wants)
    state, state_problems = _match("state", source=offer.state, target=wants.state, names=("environment", "policy")) if wants.state else (None, [])
    action, action_problems = _match("action", source=wants.action, target=offer.action, names=("policy", "environment"))
    problems += state_problems + action_problems
    if offer.control_hz and wants.control_hz and abs(offer.control_hz - wants.control_hz) > 1e-6:
        problems.append(
            f"control_hz: the environment runs at {offer.control_hz:g} Hz, the policy was trained at {wants.control_hz:g} Hz; make the environment with the policy's rate"
        )
    if offer.language != wants.language:
        problems.append(f"language: the environment instructs in {offer.language!r}, the policy understands {wants.language!r}")
    if problems:
        raise InterfaceError("this policy does not fit this environment:\n" + "\n".join(f"  - {problem}" for problem in problems))
    return Fit(state, action)


def _interface_of(thing: Any, side: str) -> Interface:
    thing = thing if isinstance(thing, Interface) else getattr(getattr(thing, "unwrapped", thing), "interface", None)
    if not isinstance(thing, Interface):
        raise InterfaceError(f"the {side} declares no vlahub Interface; give it an attribute `interface` (docs/architecture.md shows one)")
    return thing


def _camera_problems(offer: Interface, wants: Interface) -> list[str]:
    problems = []
    for role, offered, wanted in (("main", (offer.main,), (wants.main,)), ("wrists", offer.wrists, wants.wrists), ("extras", offer.extras, wants.extras)):
        required = [camera for camera in wanted if camera.name not in wants.optional_cameras]
        # Images are matched by role and order, as the batch keys are; names only say what one looks at.
        if len(offered) < len(required):
            missing = ", ".join(camera.name for camera in required[len(offered) :])
            problems.append(
                f"cameras.{role}: the policy needs {len(required)} ({missing} missing), the environment offers {len(offered)}; switch its cameras on or take another policy"
            )
        for given, needed in zip(offered, wanted, strict=False):
            if given.turned != needed.turned:
                problems.append(
                    f"cameras.{role}: {given.name!r} is turned by {given.turned} degrees, the policy was trained with {needed.turned} ({needed.name!r})"
                )
    return problems


def _match(of: Literal["state", "action"], source: tuple[Field, ...], target: tuple[Field, ...], names: tuple[str, str]) -> tuple[Adapter | None, list[str]]:
    def layout(fields: tuple[Field, ...]) -> tuple[tuple[str, int], ...]:
        return tuple((field.name, field.size) for field in fields)

    def words(fields: tuple[Field, ...]) -> str:
        return ", ".join(f"{field.name}[{field.size}]" for field in fields) or "nothing"

    for adapter in ADAPTERS.values():
        if adapter.of == of and adapter.source == layout(source) and adapter.target == layout(target):
            return adapter, []
    if layout(source) != layout(target):
        return None, [
            f"{of}: the {names[0]} has {words(source)}, the {names[1]} {words(target)}; "
            "no adapter joins these two layouts (vlahub.interface.register_adapter adds one)"
        ]
    problems = []
    for a, b in zip(source, target, strict=True):
        for attribute in ("unit", "reference", "rotation", "frame", "open", "closed"):
            left, right = getattr(a, attribute), getattr(b, attribute)
            if left != right:
                problems.append(f"{of}.{a.name}.{attribute}: {left!r} in the {names[0]}, {right!r} in the {names[1]}")
    return None, problems
