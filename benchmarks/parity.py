"""Compare our models with outputs of the original implementations ("goldens").

    python benchmarks/parity.py FOLDER...            # every golden below the folders, one row per tensor
    python benchmarks/parity.py FOLDER --only unet   # only goldens whose path contains a text
    python benchmarks/parity.py FOLDER --worst       # one row per golden: its worst tensor

A golden is NAME.json (configuration, seed, meaning, tolerance), usually with NAME.safetensors (inputs and outputs) beside it.
Weights are not stored: every tensor is a function of its published name, its shape and the seed (`filled`).
Each module of benchmarks/goldens/ offers `place(golden)`, which returns a function that yields one `Check` per tensor, or None if the golden is not its own.

Exit status 0 only if every golden was placed and every check passed.
"""

import importlib
import json
import pkgutil
import sys
import traceback
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro

if __package__ in (None, ""):  # run as a script: make `benchmarks` importable
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    __package__ = "benchmarks"
    from benchmarks import parity  # noqa: F401  the family modules import Check from this name
from benchmarks import goldens


@dataclass(frozen=True)
class Golden:
    """One golden: `meta` is its JSON, `tensors` its safetensors file (empty if there is none)."""

    path: Path

    @cached_property
    def meta(self) -> dict:
        return json.loads(self.path.read_text())

    @cached_property
    def tensors(self) -> dict[str, torch.Tensor]:
        from safetensors.torch import load_file

        file = self.path.with_suffix(".safetensors")
        return load_file(file) if file.exists() else {}


@dataclass(frozen=True)
class Check:
    """One comparison. Passes if |actual - expected| <= atol + rtol * |expected| everywhere, shapes being equal."""

    tensor: str
    actual: object  # tensor, array, number, string or list of these
    expected: object
    atol: float = 0.0
    rtol: float = 0.0

    def verdict(self) -> tuple[bool, str]:
        """(passed, the largest error in words)"""
        actual, expected = _numeric(self.actual), _numeric(self.expected)
        if actual is None or expected is None:
            return (self.actual == self.expected), ("equal" if self.actual == self.expected else "differs")
        if actual.shape != expected.shape:
            return False, f"shape {tuple(actual.shape)} for {tuple(expected.shape)}"
        if actual.size == 0:
            return True, "empty"
        error = np.where(actual == expected, 0.0, np.abs(actual - expected))  # equal infinities
        if not np.isfinite(error).all():
            return False, "not finite"
        return bool((error <= self.atol + self.rtol * np.abs(expected)).all()), f"{error.max():.2e}"

    def tolerance(self) -> str:
        if not self.atol and not self.rtol:
            return "exact"
        return f"{self.atol:.0e}" + (f" + {self.rtol:.0e} rel" if self.rtol else "")


def _numeric(value: object) -> np.ndarray | None:
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().to(torch.float64).numpy()
    try:
        array = np.asarray(value)
        return array.astype(np.float64) if array.dtype.kind in "fiub" else None
    except (ValueError, TypeError):  # ragged lists, objects
        return None


def filled(name: str, shape: Iterable[int], seed: int) -> torch.Tensor:
    """The weight called `name`: normal / sqrt(fan_in) for matrices and kernels, 1 + 0.1 normal for norm scales, 0.1 normal for other vectors."""
    shape = tuple(shape)
    values = np.random.Generator(np.random.Philox(key=(seed << 32) + zlib.crc32(name.encode()))).standard_normal(shape, dtype=np.float32)
    if len(shape) >= 2:
        values = values / np.float32(np.sqrt(np.prod(shape[1:], dtype=np.float64)))  # fan_in: all dimensions but the first
    elif name.endswith("weight"):
        values = 1.0 + 0.1 * values
    else:
        values = 0.1 * values
    return torch.from_numpy(np.asarray(values, dtype=np.float32))


def filled_state(shapes: Mapping[str, Iterable[int]], seed: int) -> dict[str, torch.Tensor]:
    """The whole published state dict of a golden from its list of keys and shapes."""
    return {name: filled(name, shape, seed) for name, shape in shapes.items()}


def families() -> list:
    return [importlib.import_module(f"{goldens.__name__}.{module.name}") for module in pkgutil.iter_modules(goldens.__path__)]


def runner_for(golden: Golden) -> Callable[[Golden], Iterable[Check]] | None:
    runners = [runner for family in families() if (runner := family.place(golden)) is not None]
    if len(runners) > 1:
        raise ValueError(f"{golden.path}: claimed by {len(runners)} families")
    return runners[0] if runners else None


def find(folders: Iterable[Path]) -> list[Golden]:
    found = []
    for folder in folders:
        if not folder.exists():
            raise SystemExit(f"parity: {folder} does not exist")
        found += [Golden(path) for path in ([folder] if folder.is_file() else sorted(folder.rglob("*.json")))]
    return found


def main(folders: tyro.conf.Positional[tuple[Path, ...]], /, only: str = "", worst: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False) -> int:
    """Recompute goldens and compare.

    Args:
        folders: Folders (searched recursively) or single golden JSON files.
        only: Run only goldens whose path contains this text.
        worst: Print one row per golden instead of one per tensor.
    """
    torch.manual_seed(0)
    failed = 0
    selected = [golden for golden in find(folders) if only in str(golden.path)]
    if not selected:
        print("parity: no golden found")
        return 1
    print(f"{'golden':<36} {'tensor':<44} {'max error':>24} {'tolerance':>20}")
    for golden in selected:
        name = f"{golden.path.parent.name}/{golden.path.stem}"
        runner = runner_for(golden)
        if runner is None:
            print(f"{name:<36} {'-':<44} {'no family claims it':>24} {'':>20} FAIL")
            failed += 1
            continue
        rows = []
        try:
            for check in runner(golden):
                passed, error = check.verdict()
                rows.append((passed, f"{name:<36} {check.tensor:<44} {error:>24} {check.tolerance():>20} {'PASS' if passed else 'FAIL'}"))
        except Exception as error:  # one broken golden must not hide the others' results; it is reported and counted
            traceback.print_exc()
            rows.append((False, f"{name:<36} {'-':<44} {type(error).__name__:>24} {'':>20} FAIL"))
        if not rows:
            rows.append((False, f"{name:<36} {'-':<44} {'nothing compared':>24} {'':>20} FAIL"))
        failed += sum(not passed for passed, _ in rows)
        if worst:
            bad = [row for passed, row in rows if not passed]
            print("\n".join(bad) if bad else f"{name:<36} {f'{len(rows)} tensors':<44} {'':>24} {'':>20} PASS")
        else:
            print("\n".join(row for _, row in rows))
    print(f"{len(selected)} goldens, {failed} failures")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
