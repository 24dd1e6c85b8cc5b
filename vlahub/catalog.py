"""Every id with its card, as data. Nothing here imports a simulator or a model: families are named by import strings.

An environment family registers its ids with `register_env`, a policy family its loader with `register_family` and its known checkpoints with
`register_policy`. The families that ship with vlahub do so in `vlahub_envs/__init__.py` and `vlahub_policies/__init__.py`; a third party calls the
same functions from its own package.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gymnasium

from vlahub.simulation import Expert, Simulation


@dataclass(frozen=True)
class EnvCard:
    """One environment id."""

    id: str  # "vlahub/RoboTwin-ClickBell"
    family: str  # "robotwin"
    simulation: str  # "vlahub_envs.robotwin.simulation:RoboTwin"; called with `kwargs` and the user's options
    summary: str  # one line
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    expert: str = ""  # "module:Class", called with the simulation; empty if there is none
    vector: str = "vlahub.vector:VectorEnv"  # a natively batched family names its own class here
    cheap: bool = False  # a step takes microseconds: vector envs run it in the calling process, unless told how many workers
    needs: tuple[str, ...] = ()  # importable packages; `pip install vlahub[extra]` brings them
    extra: str = ""
    asks: str = ""  # what the user must give because it does not ship (a world model's weights); empty: the id runs as it is
    protocols: tuple[str, ...] = ()  # values of its option `protocol`, the ways in which published evaluators run it; `trials` is then a number
    limits: str = ""  # what one should know before trusting a number
    measured: str = ""  # what was measured with it, with its command


@dataclass(frozen=True)
class FamilyCard:
    """One policy family: the class that loads it, and how its folders are recognised."""

    name: str  # "pi0"
    policy: str  # "vlahub_policies.pi0:Pi0Policy"
    summary: str
    recognises: Callable[[Path], bool]  # does this folder hold one of the family's published layouts? Reads small files only
    needs: tuple[str, ...] = ()
    extra: str = "policies"


@dataclass(frozen=True)
class PolicyCard:
    """One known checkpoint. `from_pretrained` takes any other folder or repository of a known layout as well."""

    id: str  # "Dexmal/libero-db-pi0", or "vlahub/..." for a bundled one
    family: str
    summary: str
    folder: str = ""  # bundled: "package:relative/folder"
    envs: tuple[str, ...] = ()  # ids that it was trained for
    options: Mapping[str, Any] = field(default_factory=dict)  # arguments of from_pretrained that it needs
    verified: str = ""  # what was verified of it, and what could not be
    measured: str = ""


@dataclass(frozen=True)
class WeightsCard:
    """Bundled weights that are no policy: a world model's."""

    id: str  # "vlahub/evac-tiny-libero-spatial"
    summary: str
    folder: str  # "package:relative/folder"
    measured: str = ""


ENVS: dict[str, EnvCard] = {}
FAMILIES: dict[str, FamilyCard] = {}
POLICIES: dict[str, PolicyCard] = {}
WEIGHTS: dict[str, WeightsCard] = {}


class UnknownId(ValueError):
    """An id that no card has; the message suggests the nearest ones."""


def register_env(card: EnvCard) -> None:
    """Add an environment to the catalog and to Gymnasium: `gym.make`, `gym.make_vec` and `vlahub list` then know it."""
    if not _add(ENVS, card.id, card):
        return
    gymnasium.register(
        id=card.id,
        entry_point="vlahub.env:make",
        vector_entry_point="vlahub.vector:make",
        kwargs={"env_id": card.id},
        # Env enforces the order of calls and checks its arguments itself, so gym.make gives our class bare, with step_chunk in reach.
        order_enforce=False,
        disable_env_checker=True,
    )


def register_family(card: FamilyCard) -> None:
    _add(FAMILIES, card.name, card)


def register_policy(card: PolicyCard) -> None:
    _add(POLICIES, card.id, card)


def register_weights(card: WeightsCard) -> None:
    _add(WEIGHTS, card.id, card)


def _add(cards: dict[str, Any], key: str, card: Any) -> bool:
    """False if the very same card stands there: a notebook cell run again, or a script that is imported under its module's name as well."""
    if key in cards:
        if cards[key] == card:
            return False
        raise ValueError(f"{key!r} is registered already, with another card")
    cards[key] = card
    return True


def env_card(env_id: str) -> EnvCard:
    """The card of an id; "module:id" imports the module that registers it first, as gymnasium.make does."""
    module, _, env_id = env_id.rpartition(":")
    if module:
        importlib.import_module(module)
    if env_id not in ENVS:
        raise UnknownId(f"no environment is called {env_id!r}; {suggest(env_id, ENVS)}")
    return ENVS[env_id]


def family_card(name: str) -> FamilyCard:
    if name not in FAMILIES:
        raise UnknownId(f"no policy family is called {name!r}; {suggest(name, FAMILIES)}")
    return FAMILIES[name]


def suggest(name: str, known: Iterable[str]) -> str:
    """ "did you mean ...", or the whole list where nothing is near."""
    known = list(known)
    by_lower = {entry.lower(): entry for entry in known}
    near = [by_lower[match] for match in difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.5)]
    return f"did you mean {' or '.join(map(repr, near))}?" if near else f"known are {', '.join(map(repr, known)) or 'none'}"


def load(reference: str) -> Any:
    """The object behind "package.module:name"."""
    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(module), name)


def require(needs: Iterable[str], extra: str, what: str) -> None:
    """Raise an ImportError that names what to install."""
    missing = [package for package in needs if importlib.util.find_spec(package) is None]
    if missing:
        raise ImportError(f"{what} needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed: pip install 'vlahub[{extra}]'")


def make_simulation(card: EnvCard | str, **options: Any) -> Simulation:
    """Build the simulation of a card or an id. Unknown options are an error that names the nearest ones.

    Worker processes are given the card itself: ids registered at run time are unknown in a freshly spawned interpreter.
    """
    card = env_card(card) if isinstance(card, str) else card
    require(card.needs, card.extra, card.id)
    factory = load(card.simulation)
    known = {name for name, parameter in inspect.signature(factory).parameters.items() if parameter.kind is not inspect.Parameter.VAR_KEYWORD}
    for name in options:
        if name not in known or name in card.kwargs:
            raise TypeError(f"{card.id} has no option {name!r}; {suggest(name, sorted(known - set(card.kwargs)))}")
    return factory(**{**card.kwargs, **options})


def make_expert(card: EnvCard | str, simulation: Simulation) -> Expert:
    """The scripted expert of a card or an id, bound to a simulation."""
    card = env_card(card) if isinstance(card, str) else card
    if not card.expert:
        raise ValueError(f"{card.id} has no scripted expert")
    return load(card.expert)(simulation)


def key_values(flag: str, words: Sequence[str]) -> dict[str, Any]:
    """["size=64", "assets=official"] -> {"size": 64, "assets": "official"}. Values are read as Python literals, and as text where they are none."""
    found: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key.isidentifier():
            raise ValueError(f"--{flag} takes key=value, not {word!r}")
        if key in found:
            raise ValueError(f"--{flag} has {key!r} twice")
        # the shell's habit of small letters must not turn False into the text "false", which counts as true
        text = {"true": "True", "false": "False", "none": "None"}.get(text, text)
        try:
            found[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            found[key] = text
    return found
