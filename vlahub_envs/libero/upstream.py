"""The installed `libero` and `robosuite` packages: imported without questions, warnings or files in the user's home; their tasks and initial states.

`libero` asks on stdin where data sets are, unless a configuration file exists. `robosuite` warns of a missing private settings file and writes a log into
/tmp that only its first user may write. Neither is needed here; a user's own configuration, where there is one, is left as it is.
"""

from __future__ import annotations

import codecs
import ctypes.util
import importlib
import importlib.util
import io
import os
import pickle
import re
import sys
import tempfile
import types
import zipfile
import zlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

# The order of LIBERO-130 is that of RLinf, which defines it
SUITES = {
    "Spatial": ("libero_spatial",),
    "Object": ("libero_object",),
    "Goal": ("libero_goal",),
    "10": ("libero_10",),
    "90": ("libero_90",),
    "130": ("libero_spatial", "libero_object", "libero_goal", "libero_90", "libero_10"),
}
TRIALS = 50  # initial states per task, in every suite


@dataclass(frozen=True)
class LiberoTask:
    suite: str  # "libero_spatial"
    number: int  # in that suite
    name: str  # of its files
    language: str
    bddl: Path
    init: Path


def _folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"{package} is not installed: pip install 'vlahub[libero]' && pip install --no-deps -r tools/no_deps.txt")
    return Path(next(iter(spec.submodule_search_locations)))


def _module_of(file: Path, name: str) -> types.ModuleType:
    """A module from its file alone, without importing the packages that it lies in."""
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def tasks(suite: str) -> tuple[LiberoTask, ...]:
    """The tasks of "Spatial", "Object", "Goal", "10", "90" or "130", in their published order."""
    if suite not in SUITES:
        raise ValueError(f"suite must be one of {', '.join(SUITES)}, not {suite!r}")
    root = _folder("libero") / "libero"
    # libero.libero.benchmark imports torch, 190 MB in every worker, for the same list
    names = _module_of(root / "benchmark" / "libero_suite_task_map.py", "_libero_task_map").libero_task_map
    return tuple(
        LiberoTask(part, number, name, language_of(name), root / "bddl_files" / part / f"{name}.bddl", root / "init_files" / part / f"{name}.pruned_init")
        for part in SUITES[suite]
        for number, name in enumerate(names[part])
    )


def language_of(name: str) -> str:
    """The instruction, as every evaluation takes it: the file's name without its scene. The sentence inside the file often differs."""
    return re.sub(r"^[A-Z_]+_SCENE\d+_", "", name).replace("_", " ")


class _ArraysOnly(pickle.Unpickler):
    """Unpickles numpy arrays and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return np._core.multiarray._reconstruct if hasattr(np, "_core") else np.core.multiarray._reconstruct
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return getattr(np, name)
        if (module, name) == ("_codecs", "encode"):
            return codecs.encode
        raise pickle.UnpicklingError(f"an initial-state file holds {module}.{name}; only numpy arrays are read")


@cache
def initial_states(file: Path) -> np.ndarray:
    """[50, 1 + nq + nv] float64: time, positions, velocities. The files are torch archives of one pickled array; torch is not needed to read them."""
    with zipfile.ZipFile(file) as archive:
        entry = next(name for name in archive.namelist() if name.endswith("data.pkl"))
        states = _ArraysOnly(io.BytesIO(archive.read(entry))).load()
    if not isinstance(states, np.ndarray) or states.ndim != 2:
        raise ValueError(f"{file} holds no table of initial states")
    return states


# ------------------------------------------------------------------------------------------------ import


def choose_gl() -> str:
    """ "egl" or "osmesa": $MUJOCO_GL if that is one of them, else what is installed. robosuite fixes the choice when it is imported."""
    wanted = os.environ.get("MUJOCO_GL", "").lower()
    if wanted not in ("", "egl", "osmesa"):
        raise RuntimeError(f"MUJOCO_GL is {wanted!r}; LIBERO draws off screen through 'egl' or 'osmesa': set it to one of them, or unset it")
    tried = (wanted,) if wanted else ("egl", "osmesa")
    for backend in tried:
        if ctypes.util.find_library({"egl": "EGL", "osmesa": "OSMesa"}[backend]):
            return backend
    raise RuntimeError(
        f"no OpenGL library for {' or '.join(tried)}: LIBERO cannot draw. Install one (Debian, Ubuntu: apt-get install libegl1 libgl1 libosmesa6; "
        "tools/system_packages.sh does it)"
    )


@cache
def load() -> types.SimpleNamespace:
    """Import libero and robosuite. -> `domains` (BDDL problem name -> environment class), `libero` (the module), `robosuite`."""
    os.environ["MUJOCO_GL"] = choose_gl()
    _quiet_robosuite()
    device = os.environ.pop("MUJOCO_EGL_DEVICE_ID", None)  # robosuite refuses one outside CUDA_VISIBLE_DEVICES, though EGL counts devices on its own
    try:
        robosuite = importlib.import_module("robosuite")
        robosuite.macros = sys.modules["robosuite.macros"]
        libero = _import_libero()
        domains = importlib.import_module("libero.libero.envs").TASK_MAPPING
    finally:
        if device is not None:
            os.environ["MUJOCO_EGL_DEVICE_ID"] = device
    return types.SimpleNamespace(robosuite=robosuite, libero=libero, domains=domains)


def _quiet_robosuite() -> None:
    """Give robosuite its settings before it looks for them: no warning about missing private ones, no log file in /tmp."""
    if "robosuite" in sys.modules:
        return
    root = _folder("robosuite")
    settings = sys.modules["robosuite.macros"] = _module_of(root / "macros.py", "robosuite.macros")
    settings.FILE_LOGGING_LEVEL = None
    if not (root / "macros_private.py").exists():
        sys.modules["robosuite.macros_private"] = types.ModuleType("robosuite.macros_private")
    # numba keeps compiled functions beside their source, or in the home; matplotlib keeps its fonts in the home. Where none may be written, use /tmp.
    home = Path.home()
    if not os.access(home if home.exists() else "/", os.W_OK):
        spare = Path(tempfile.gettempdir()) / f"vlahub-cache-{os.getuid()}"
        os.environ.setdefault("NUMBA_CACHE_DIR", str(spare / "numba"))
        os.environ.setdefault("MPLCONFIGDIR", str(spare / "matplotlib"))
        (spare / "matplotlib").mkdir(parents=True, exist_ok=True)


def _import_libero() -> types.ModuleType:
    """Import libero.libero, which reads its configuration's place from $LIBERO_CONFIG_PATH. Without a configuration of the user's it gets one in /tmp."""
    if "libero.libero" in sys.modules:
        return sys.modules["libero.libero"]
    given = os.environ.get("LIBERO_CONFIG_PATH")
    if (Path(given) if given else Path.home() / ".libero").joinpath("config.yaml").exists():
        return importlib.import_module("libero.libero")
    root = _folder("libero") / "libero"
    entries = {"benchmark_root": root, "bddl_files": root / "bddl_files", "init_states": root / "init_files"}
    entries |= {"datasets": root.parent / "datasets", "assets": root / "assets"}
    # one file for each installation and user, written whole and renamed, because workers start at the same time
    folder = Path(tempfile.gettempdir()) / f"vlahub-libero-config-{os.getuid()}-{zlib.crc32(str(root).encode()):08x}"
    folder.mkdir(mode=0o700, exist_ok=True)
    draft = folder / f"config.{os.getpid()}"
    draft.write_text("".join(f"{key}: {str(value)!r}\n" for key, value in entries.items()))
    draft.replace(folder / "config.yaml")
    os.environ["LIBERO_CONFIG_PATH"] = str(folder)
    try:
        return importlib.import_module("libero.libero")
    finally:
        if given is None:
            del os.environ["LIBERO_CONFIG_PATH"]
        else:
            os.environ["LIBERO_CONFIG_PATH"] = given
