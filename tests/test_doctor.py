import os
import signal
import time

import pytest

from tests.worlds import POINT
from vlahub import catalog, doctor
from vlahub.catalog import EnvCard, FamilyCard
from vlahub.doctor import Finding, isolated


def crash() -> Finding:
    os.kill(os.getpid(), signal.SIGSEGV)
    return Finding("OK", "")


def hang() -> Finding:
    time.sleep(3600)
    return Finding("OK", "")


def ask() -> Finding:
    input("Where are your data sets? ")
    return Finding("OK", "")


def fall_apart() -> Finding:
    raise RuntimeError("the driver is too old")


@pytest.fixture
def registered(monkeypatch):
    """Replace what is registered by the given cards."""

    def replace(*cards):
        monkeypatch.setattr(catalog, "ENVS", {card.id: card for card in cards if isinstance(card, EnvCard)})
        monkeypatch.setattr(catalog, "FAMILIES", {card.name: card for card in cards if isinstance(card, FamilyCard)})
        monkeypatch.setattr(catalog, "POLICIES", {})

    return replace


def needing(*packages, simulation=POINT.simulation, **kwargs):
    return EnvCard(id="test/Needy", family="needy", simulation=simulation, summary="", needs=packages, extra="sapien", kwargs=kwargs)


@pytest.mark.parametrize(
    ("probe", "words"),
    [(crash, "SIGSEGV"), (hang, "no answer within 2 s"), (ask, "asks a question on stdin"), (fall_apart, "RuntimeError: the driver is too old")],
)
def test_a_probe_that_misbehaves_is_a_finding_with_its_fix(probe, words):
    finding = isolated(probe, fix="do this", seconds=2 if probe is hang else 120)  # on a busy machine a process takes seconds to start
    assert finding.status == "FAIL" and words in finding.text and finding.fix == "do this"


def test_the_report_on_this_machine(registered, capsys):
    registered(POINT)
    status = doctor.main()
    lines = capsys.readouterr().out.splitlines()
    named = {line[5:19].strip(): line for line in lines if line.startswith(("OK ", "WARN ", "FAIL "))}
    assert status == 0, "\n".join(lines)
    assert set(named) >= {
        "torch",
        "transformers",
        "gl",
        "vulkan",
        "sapien",
        "mujoco",
        "video",
        "writing",
        "disk",
        "shared memory",
        "stdin",
        "env test",
        "policies",
    }
    assert "test/Point runs, assets: none" in named["env test"]
    assert "libx264" in named["video"]
    assert "everything registered can run" in lines[-1]


def test_no_vulkan_driver_fails_what_needs_it_and_says_what_to_do(registered, capsys, monkeypatch):
    pytest.importorskip("sapien", reason="the renderer under test")
    monkeypatch.setenv("VK_DRIVER_FILES", "/nothing")
    registered(needing("sapien"))
    assert doctor.main() == 1
    out = capsys.readouterr().out
    assert "FAIL vulkan         VK_DRIVER_FILES=/nothing names no file that exists" in out and "-> unset VK_DRIVER_FILES" in out
    assert "FAIL sapien" in out and "mesa >= 23.1" in out.lower()
    assert "something registered cannot run" in out


def test_the_same_failure_is_a_warning_where_nothing_needs_it(registered, monkeypatch):
    monkeypatch.setenv("VK_DRIVER_FILES", "/nothing")
    registered(POINT)
    finding = dict(doctor.checks())["vulkan"]()
    assert finding.status == "WARN" and "nothing registered needs it" in finding.text and finding.fix == "unset VK_DRIVER_FILES"


def test_missing_packages_fail_with_the_command_that_installs_them(registered):
    family = FamilyCard(name="grand", policy="nowhere:Grand", summary="", recognises=lambda folder: False, needs=("no_such_model",), extra="policies")
    registered(needing("no_such_simulator"), family)
    found = {name: check() for name, check in doctor.checks() if name in ("env needy", "policy grand")}
    assert found["env needy"].status == found["policy grand"].status == "FAIL"
    assert "no_such_simulator" in found["env needy"].text and found["env needy"].fix == "pip install 'vlahub[sapien]'"
    assert "no_such_model" in found["policy grand"].text and found["policy grand"].fix == "pip install 'vlahub[policies]'"


def test_an_environment_that_cannot_start_fails():
    finding = isolated(doctor.probe_environment, needing(simulation="tests.worlds:Nothing"), fix="look above")
    assert finding.status == "FAIL" and "Nothing" in finding.text and finding.fix == "look above"


def test_a_family_that_does_not_import_fails():
    finding = isolated(doctor.probe_policies, {"grand": "tests.nowhere:Grand"}, {})
    assert finding.status == "FAIL" and "grand does not import (ModuleNotFoundError" in finding.text


def test_folders_that_cannot_be_written_are_named():
    finding = isolated(doctor.probe_writing, env={"HF_HUB_CACHE": "/proc/nowhere"})
    assert finding.status == "FAIL" and "/proc/nowhere" in finding.text and "HF_HUB_CACHE" in finding.text


def test_mujoco_draws_through_osmesa_where_egl_does_not_work(registered, monkeypatch):
    pytest.importorskip("mujoco", reason="the renderer under test")
    registered(needing("mujoco"))
    for name in ("MUJOCO_GL", "PYOPENGL_PLATFORM"):  # a LIBERO world in this process may have chosen one
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("__EGL_VENDOR_LIBRARY_FILENAMES", "/nothing")  # EGL finds no driver
    found = dict(doctor.checks())
    assert found["gl"]().status == "FAIL"
    finding = found["mujoco"]()
    assert finding.status == "OK" and "osmesa" in finding.text
    monkeypatch.setenv("MUJOCO_GL", "egl")  # ... unless one insists
    finding = found["mujoco"]()
    assert finding.status == "FAIL" and "MUJOCO_GL=egl is set, unset it" in finding.fix
