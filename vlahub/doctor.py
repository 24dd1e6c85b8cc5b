"""`vlahub doctor`: one line for each thing that users lose hours on, OK or with its fix.

Every probe runs in its own process without stdin and with a time limit: a graphics driver that crashes, a library that asks a question or one that
hangs is a line in the report, not the end of it. `main` returns 1 if something registered cannot run. Something broken that nothing registered needs is
a WARN.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import vlahub
from vlahub import catalog

SECONDS = 120  # per probe; the slowest, a first picture with shader compilation, takes 20 s on a busy machine
SOFTWARE_VULKAN = (
    "as root run `bash tools/system_packages.sh` in a checkout of vlahub, or install Mesa >= 23.1 with its Vulkan drivers (Debian 12: from bookworm-backports)"
)


@dataclass
class Finding:
    status: Literal["OK", "WARN", "FAIL"]
    text: str
    fix: str = ""


# ------------------------------------------------------------------------------------------------ probes, each run in a process of its own


def probe_python() -> Finding:
    return Finding(
        "OK", f"Python {'.'.join(map(str, sys.version_info[:3]))} at {sys.executable}, vlahub {vlahub.__version__} at {Path(vlahub.__file__).parent}"
    )


def probe_gl() -> Finding:
    """EGL devices that can be initialised (what MuJoCo draws with), and whether OSMesa is there as well."""
    fix = "as root run `bash tools/system_packages.sh` in a checkout of vlahub, or install libegl1 and libgl1"
    try:
        egl = ctypes.CDLL("libEGL.so.1")
        ctypes.CDLL("libGL.so.1")
    except OSError as error:
        return Finding("FAIL", str(error), fix)
    osmesa = any(_loads(name) for name in ("libOSMesa.so.8", "libOSMesa.so.6", "libOSMesa.so"))
    egl.eglGetProcAddress.restype = ctypes.c_void_p
    query, display_of = (egl.eglGetProcAddress(name) for name in (b"eglQueryDevicesEXT", b"eglGetPlatformDisplayEXT"))
    if not (query and display_of):
        return Finding("FAIL", "libEGL has no device extension, so nothing can be drawn without a screen", fix)
    devices, count = (ctypes.c_void_p * 32)(), ctypes.c_int()
    ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)(query)(32, ctypes.byref(devices), ctypes.byref(count))
    get_display = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint, ctypes.c_void_p, ctypes.c_void_p)(display_of)
    egl.eglInitialize.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
    displays = [get_display(0x313F, devices[i], None) for i in range(count.value)]  # 0x313F: EGL_PLATFORM_DEVICE_EXT
    usable = sum(bool(display and egl.eglInitialize(display, None, None)) for display in displays)
    if not usable:
        return Finding(
            "FAIL", f"{count.value} EGL devices, none of which can be initialised", fix + "; check MUJOCO_EGL_DEVICE_ID and __EGL_VENDOR_LIBRARY_FILENAMES"
        )
    return Finding("OK", f"EGL with {usable} usable device{'s' if usable > 1 else ''}{', OSMesa' if osmesa else ''}")


def probe_vulkan() -> Finding:
    """Create a Vulkan instance and name its devices."""
    files, chosen_by = _vulkan_drivers()
    if chosen_by and not any(Path(file).exists() for file in files):
        return Finding("FAIL", f"{chosen_by}={os.environ[chosen_by]} names no file that exists, so there is no Vulkan driver", f"unset {chosen_by}")
    try:
        vulkan = ctypes.CDLL("libvulkan.so.1")
    except OSError as error:
        return Finding("FAIL", str(error), "install libvulkan1: " + SOFTWARE_VULKAN)
    # VkInstanceCreateInfo, 64 bytes: sType = 1, everything else empty
    info, instance = (ctypes.c_uint64 * 8)(1), ctypes.c_void_p()
    error = vulkan.vkCreateInstance(ctypes.byref(info), None, ctypes.byref(instance))
    if error:
        return Finding("FAIL", f"no Vulkan driver works (error {error}); found {', '.join(files) or 'no driver file'}", SOFTWARE_VULKAN)
    count, devices = ctypes.c_uint32(16), (ctypes.c_void_p * 16)()
    vulkan.vkEnumeratePhysicalDevices.argtypes = (ctypes.c_void_p,) * 3
    vulkan.vkGetPhysicalDeviceProperties.argtypes = (ctypes.c_void_p,) * 2
    vulkan.vkEnumeratePhysicalDevices(instance, ctypes.byref(count), devices)
    names = []
    for device in devices[: count.value]:
        properties = ctypes.create_string_buffer(2048)  # VkPhysicalDeviceProperties: five uint32, then the name; 824 bytes in all
        vulkan.vkGetPhysicalDeviceProperties(device, properties)
        names.append(properties.raw[20:276].split(b"\0")[0].decode())
    if not names:
        return Finding("FAIL", "Vulkan finds no device", SOFTWARE_VULKAN)
    text = f"Vulkan devices: {', '.join(names)}"
    if Path("/proc/driver/nvidia").exists() and not any("llvmpipe" not in name for name in names):
        return Finding(
            "WARN",
            text + "; there is an NVIDIA GPU, but its Vulkan driver is not visible, so the CPU draws",
            "in a container set NVIDIA_DRIVER_CAPABILITIES=all; else install the driver's Vulkan part",
        )
    return Finding("OK", text)


def probe_sapien() -> Finding:
    """Draw a red box with SAPIEN and look at the picture."""
    import sapien

    start = time.perf_counter()
    scene = sapien.Scene([sapien.physx.PhysxCpuSystem(), sapien.render.RenderSystem()])
    scene.set_ambient_light([0.5, 0.5, 0.5])
    builder = scene.create_actor_builder()
    builder.add_box_visual(half_size=[0.1, 0.1, 0.1], material=[1.0, 0.0, 0.0])
    builder.build_kinematic(name="box")
    camera = scene.add_camera("camera", 64, 64, 1.0, 0.01, 10.0)
    camera.entity.set_pose(sapien.Pose([-1.0, 0.0, 0.0]))
    scene.update_render()
    camera.take_picture()
    red, green, blue = camera.get_picture("Color")[32, 32, :3]
    if not red > green + 0.1 or not red > blue + 0.1:
        return Finding("FAIL", f"SAPIEN draws a red box in the colour ({red:.2f}, {green:.2f}, {blue:.2f})", "update the graphics driver. " + SOFTWARE_VULKAN)
    device = scene.render_system.device.name
    return Finding("OK", f"SAPIEN {sapien.__version__} draws on {device} (first picture after {time.perf_counter() - start:.1f} s)")


def probe_mujoco() -> Finding:
    """Draw a red box with MuJoCo through the MUJOCO_GL of this process."""
    import mujoco

    start = time.perf_counter()
    world = '<mujoco><worldbody><light pos="0 0 3"/><geom type="box" size=".3 .3 .3" rgba="1 0 0 1"/></worldbody></mujoco>'
    model = mujoco.MjModel.from_xml_string(world)
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    with mujoco.Renderer(model, 64, 64) as renderer:
        renderer.update_scene(data)
        red, green, blue = map(int, renderer.render()[32, 32])
    how = os.environ.get("MUJOCO_GL", "its default")
    if not red > green + 25 or not red > blue + 25:
        return Finding("FAIL", f"MuJoCo through {how} draws a red box in the colour ({red}, {green}, {blue})", "update the graphics driver")
    return Finding("OK", f"MuJoCo {mujoco.__version__} draws through {how} (first picture after {time.perf_counter() - start:.1f} s)")


def probe_torch() -> Finding:
    import torch

    version = f"torch {torch.__version__}"
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 11):
        return Finding("FAIL", version, "vlahub needs torch >= 2.11: pip install -U torch")
    torch.ones(8, 8) @ torch.ones(8, 8)
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        (torch.ones(8, 8, device="cuda") @ torch.ones(8, 8, device="cuda")).sum().item()
        return Finding("OK", f"{version}, {len(names)} GPU{'s' if len(names) > 1 else ''}: {', '.join(sorted(set(names)))}")
    if Path("/proc/driver/nvidia").exists():
        why = (
            "it is a build without CUDA"
            if torch.version.cuda is None
            else f"its CUDA {torch.version.cuda} and the GPU driver do not fit, or CUDA_VISIBLE_DEVICES hides the GPU"
        )
        return Finding(
            "WARN", f"{version} does not see this machine's NVIDIA GPU: {why}", "install the torch build for your driver (the PyTorch install page names it)"
        )
    note = "" if torch.version.cuda is None else " (a CUDA build on a machine without a GPU: works; a CPU build is gigabytes smaller)"
    return Finding("OK", f"{version} on the CPU, {torch.get_num_threads()} threads{note}")


def probe_transformers() -> Finding:
    start = time.perf_counter()
    import transformers
    from transformers import AutoModel, AutoTokenizer  # noqa: F401  the lazy part, which a broken companion package breaks

    version = f"transformers {transformers.__version__} (imported in {time.perf_counter() - start:.1f} s)"
    if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < (5, 17):
        return Finding("FAIL", version, "the policies need transformers >= 5.17: pip install -U transformers")
    if importlib.util.find_spec("torchvision"):
        try:
            importlib.import_module("torchvision")
        except Exception as error:
            return Finding(
                "FAIL",
                f"{version}; torchvision is installed but does not import ({error}), which breaks models that look for it",
                "pip uninstall torchvision; vlahub does not need it",
            )
    return Finding("OK", version)


def probe_video() -> Finding:
    import av
    import numpy as np

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "probe.mp4"
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=10)
            stream.width = stream.height = 64
            stream.pix_fmt = "yuv420p"
            for i in range(8):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((64, 64, 3), 30 * i, np.uint8))))
            container.mux(stream.encode(None))
        with av.open(str(path)) as container:
            frames = sum(1 for _ in container.decode(video=0))
    if frames != 8:
        return Finding("FAIL", f"8 frames written to an mp4, {frames} read back", "pip install -U av")
    return Finding("OK", f"mp4 with libx264 through av {av.__version__}, no ffmpeg needed")


def probe_writing() -> Finding:
    from huggingface_hub.constants import HF_HUB_CACHE

    refused = []
    for what, folder in (
        ("the working folder", Path.cwd()),
        ("the hub cache (HF_HUB_CACHE)", Path(HF_HUB_CACHE)),
        ("the temporary folder (TMPDIR)", Path(tempfile.gettempdir())),
    ):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=folder) as file:
                file.write(bytes(4096))
                file.flush()
        except OSError as error:
            refused.append(f"{what} {folder}: {error.strerror}")
    if refused:
        return Finding("FAIL", f"cannot write to {'; '.join(refused)}", "change to a folder that you own, or set the variable in brackets to one")
    return Finding("OK", f"working folder, hub cache ({HF_HUB_CACHE}) and temporary folder can be written")


def probe_disk() -> Finding:
    from huggingface_hub.constants import HF_HUB_CACHE

    free = {}
    for name, folder in (("working folder", Path.cwd()), ("hub cache", Path(HF_HUB_CACHE)), ("temporary folder", Path(tempfile.gettempdir()))):
        folder = next(parent for parent in (folder, *folder.parents) if parent.exists())
        free[name] = shutil.disk_usage(folder).free / 1e9
    text = "free: " + ", ".join(f"{name} {size:.1f} GB" for name, size in free.items())
    if min(free.values()) < 0.5:
        return Finding("FAIL", text, "free some space: videos, checkpoints and caches need at least 0.5 GB")
    if free["hub cache"] < 20:
        return Finding("WARN", text, "a 4-billion-parameter checkpoint takes 8 to 16 GB: set HF_HOME to a larger disk before you download one")
    return Finding("OK", text)


def probe_memory() -> Finding:
    """Observations of vector environments travel through /dev/shm."""
    if not Path("/dev/shm").is_dir():
        return Finding("OK", "no /dev/shm on this system; shared memory is the system's own")
    free = shutil.disk_usage("/dev/shm").free / 1e6
    text = f"/dev/shm: {free:,.0f} MB free"
    if free < 256:  # 64 MB is Docker's default; three 240 x 320 cameras take 0.7 MB per environment, and PyTorch's loaders use it as well
        return Finding("WARN", text, "start the container with --shm-size=8g (Docker's default of 64 MB ends large vector environments with a bus error)")
    return Finding("OK", text)


def probe_stdin() -> Finding:
    """Libraries that ask a question on stdin hang a batch job. Which of them would?"""
    asking = []
    if importlib.util.find_spec("libero"):
        config = Path(os.environ.get("LIBERO_CONFIG_PATH", Path.home() / ".libero")) / "config.yaml"
        if not config.exists():
            asking.append(f"`import libero` asks where its data sets are until {config} exists (answer it once by hand)")
    if importlib.util.find_spec("mani_skill") and os.environ.get("MS_SKIP_ASSET_DOWNLOAD_PROMPT") != "1":
        asking.append("mani_skill asks before it downloads assets for its own tasks (MS_SKIP_ASSET_DOWNLOAD_PROMPT=1 stops that)")
    if not asking:
        return Finding("OK", "no installed library asks questions")
    # No WARN: the probes of the registered environments run without stdin, so these concern other programs only
    return Finding("OK", f"vlahub needs no answers; in other programs {' and '.join(asking)}")


def probe_environment(card: catalog.EnvCard) -> Finding:
    """Build the simulation, start an episode, look once."""
    from vlahub.observation import validate

    start = time.perf_counter()
    simulation = catalog.make_simulation(card)
    try:
        simulation.reset(0, {})
        validate(simulation.observe())
        return Finding("OK", f"{card.id} runs, assets: {simulation.assets} (first observation after {time.perf_counter() - start:.1f} s)")
    finally:
        simulation.close()


def probe_policies(modules: Mapping[str, str], folders: Mapping[str, str]) -> Finding:
    """Import every family; look for the files of every bundled checkpoint."""
    from vlahub import hub

    broken = []
    for name, reference in modules.items():
        try:
            catalog.load(reference)
        except Exception as error:
            broken.append(f"{name} does not import ({type(error).__name__}: {error})")
    for name in folders:
        folder = hub.resolve(name)
        if not (folder / hub.CONFIG).exists():
            broken.append(f"{name} has no {hub.CONFIG} in {folder}")
    if broken:
        return Finding("FAIL", "; ".join(broken), "install vlahub again: pip install --force-reinstall --no-deps vlahub")
    return Finding("OK", f"families: {', '.join(modules) or 'none'}; {len(folders)} bundled checkpoint{'' if len(folders) == 1 else 's'}")


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def _vulkan_drivers() -> tuple[list[str], str]:
    """The driver files that the Vulkan loader looks at, and the environment variable that chose them, if one did."""
    for name in ("VK_DRIVER_FILES", "VK_ICD_FILENAMES"):  # in the loader's order
        if os.environ.get(name):
            return os.environ[name].split(os.pathsep), name
    folders = (Path("/etc/vulkan/icd.d"), Path("/usr/share/vulkan/icd.d"), Path("/usr/local/share/vulkan/icd.d"))
    return [str(file) for folder in folders if folder.is_dir() for file in sorted(folder.glob("*.json"))], ""


# ------------------------------------------------------------------------------------------------ running them


def isolated(probe: Callable[..., Finding], *arguments: Any, fix: str = "", env: Mapping[str, str] | None = None, seconds: float = SECONDS) -> Finding:
    """What a probe finds, in a process of its own. `fix` is what to do if it crashes, hangs or raises."""
    command = [sys.executable, "-m", "vlahub.doctor", pickle.dumps((probe, arguments)).hex()]
    with tempfile.TemporaryFile("w+") as output:
        # A group of its own, so that what a hanging probe has started ends with it. Output goes to a file: a pipe that a grandchild keeps open would block.
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **(env or {})}, start_new_session=True
        )
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return Finding("FAIL", f"no answer within {seconds:g} s", fix)
        output.seek(0)
        lines = [line for line in output.read().splitlines() if line.strip()]
    if process.returncode < 0:
        return Finding("FAIL", f"the probe was killed by {signal.Signals(-process.returncode).name}{': ' + lines[-1] if lines else ''}", fix)
    for line in reversed(lines):  # libraries may print after the answer
        if line.startswith('{"status"'):
            return Finding(**json.loads(line))
    error = lines[-1] if lines else f"the probe ended with status {process.returncode} and no word"
    if error.startswith("EOFError"):
        error = "it asks a question on stdin"
    return Finding("FAIL", error, fix)


def missing(packages: Iterable[str]) -> list[str]:
    return [package for package in packages if importlib.util.find_spec(package) is None]


def checks() -> list[tuple[str, Callable[[], Finding]]]:
    """Every check by name, in the order of the report."""
    environments, families = [card for card in catalog.ENVS.values() if not card.asks], list(catalog.FAMILIES.values())
    needed = {package for card in (*environments, *families) for package in card.needs}

    def severity(finding: Finding, *packages: str) -> Finding:
        """A FAIL stands only if something registered needs one of the packages."""
        if finding.status == "FAIL" and needed.isdisjoint(packages):
            return Finding("WARN", f"{finding.text} (nothing registered needs it)", finding.fix)
        return finding

    def package(name: str, probe: Callable[[], Finding], fix: str, *also: str) -> Callable[[], Finding]:
        """A probe of an optional package: a missing one matters only if something registered needs it."""
        if missing([name]):
            users = [card for card in (*environments, *families) if name in card.needs]
            if not users:
                return lambda: Finding("OK", f"{name} is not installed, and nothing registered needs it")
            return lambda: Finding("FAIL", f"{name} is not installed", f"pip install 'vlahub[{users[0].extra}]'")
        return lambda: severity(isolated(probe, fix=fix), name, *also)

    def mujoco() -> Finding:
        chosen = os.environ.get("MUJOCO_GL")
        fix = "install libegl1 or libosmesa6: as root run `bash tools/system_packages.sh` in a checkout of vlahub" + (
            f"; MUJOCO_GL={chosen} is set, unset it" if chosen else ""
        )
        tried = {}
        for how in [chosen] if chosen else ["egl", "osmesa"]:
            # PyOpenGL picks its platform when it is first imported, and follows a variable of its own
            platform = {"PYOPENGL_PLATFORM": how} if how in ("egl", "osmesa") else {}
            tried[how] = isolated(probe_mujoco, fix=fix, env={"MUJOCO_GL": how, **platform})
            if tried[how].status == "OK":
                return tried[how]
        return severity(Finding("FAIL", "; ".join(f"{how}: {finding.text}" for how, finding in tried.items()), fix), "mujoco", "robosuite", "libero")

    found: list[tuple[str, Callable[[], Finding]]] = [
        ("python", lambda: isolated(probe_python)),
        ("torch", lambda: isolated(probe_torch, fix="pip install 'torch>=2.11'")),
        ("transformers", package("transformers", probe_transformers, "pip install -U transformers")),
        ("gl", lambda: severity(isolated(probe_gl, fix="update the graphics driver"), "mujoco", "robosuite", "libero")),
        ("vulkan", lambda: severity(isolated(probe_vulkan, fix=SOFTWARE_VULKAN), "sapien", "mani_skill")),
        ("sapien", package("sapien", probe_sapien, SOFTWARE_VULKAN, "mani_skill")),
        ("mujoco", mujoco if not missing(["mujoco"]) else package("mujoco", probe_mujoco, "")),
        ("video", lambda: isolated(probe_video, fix="pip install -U av")),
        ("writing", lambda: isolated(probe_writing)),
        ("disk", lambda: isolated(probe_disk)),
        ("shared memory", lambda: isolated(probe_memory)),
        ("stdin", lambda: isolated(probe_stdin)),
    ]
    # The ids of a family share simulator and assets, so the first one speaks for all.
    for family in dict.fromkeys(card.family for card in environments):
        cards = [card for card in environments if card.family == family]
        lacking = [card for card in cards if missing(card.needs)]
        if lacking:
            names = ", ".join(missing(lacking[0].needs))
            finding = Finding("FAIL", f"{len(lacking)} ids ({lacking[0].id}, ...) need {names}, not installed", f"pip install 'vlahub[{lacking[0].extra}]'")
            found.append((f"env {family}", lambda finding=finding: finding))
        else:
            fix = "see the lines above: the first FAIL there is the likely cause"
            found.append((f"env {family}", lambda cards=cards, fix=fix: isolated(probe_environment, cards[0], fix=fix)))
    lacking = [card for card in families if missing(card.needs)]
    for card in lacking:
        text, fix = f"the {card.name} policies need {', '.join(missing(card.needs))}, not installed", f"pip install 'vlahub[{card.extra}]'"
        found.append((f"policy {card.name}", lambda text=text, fix=fix: Finding("FAIL", text, fix)))
    modules = {card.name: card.policy for card in families if card not in lacking}
    folders = {card.id: card.folder for card in (*catalog.POLICIES.values(), *catalog.WEIGHTS.values()) if card.folder}
    found.append(("policies", lambda: isolated(probe_policies, modules, folders, fix="install vlahub again")))
    return found


def examine() -> Iterable[tuple[str, Finding]]:
    """(name, finding) of every check, as they come in. A few run at a time."""
    with ThreadPoolExecutor(max(1, min(4, os.cpu_count() or 1))) as pool:
        running: list[tuple[str, Future[Finding]]] = [(name, pool.submit(check)) for name, check in checks()]
        for name, future in running:
            yield name, future.result()


def main() -> int:
    """Print the report; 0 if everything registered can run, else 1."""
    from rich.console import Console
    from rich.text import Text

    console, colours = Console(), {"OK": "green", "WARN": "yellow", "FAIL": "bold red"}
    counts = dict.fromkeys(colours, 0)
    for name, finding in examine():
        counts[finding.status] += 1
        console.print(Text(f"{finding.status:<5}", colours[finding.status]) + Text(f"{name:<14} {finding.text}"), soft_wrap=True, highlight=False)
        if finding.status != "OK" and finding.fix:
            console.print(Text(f"{'':<20}-> {finding.fix}"), soft_wrap=True, highlight=False)
    verdict = "everything registered can run" if not counts["FAIL"] else "something registered cannot run: see FAIL above"
    console.print(f"{counts['OK']} OK, {counts['WARN']} WARN, {counts['FAIL']} FAIL: {verdict}", soft_wrap=True, highlight=False)
    return 1 if counts["FAIL"] else 0


if __name__ == "__main__":  # the child of `isolated`; the report itself is `vlahub doctor`
    chosen, values = pickle.loads(bytes.fromhex(sys.argv[1]))
    print("\n" + json.dumps(asdict(chosen(*values))), flush=True)
    # Graphics drivers may crash while they are unloaded, after the answer
    os._exit(0)
