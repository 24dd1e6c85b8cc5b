"""The documents say nothing that a reader could trip over: links lead somewhere, Python blocks parse, commands exist, ids are registered."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

import vlahub  # noqa: F401  registers the ids
from vlahub import catalog

ROOT = Path(__file__).resolve().parent.parent
DOCS = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("doc", DOCS, ids=[doc.name for doc in DOCS])
def test_links_lead_somewhere_and_python_parses(doc):
    text = doc.read_text()
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        assert (doc.parent / target).exists(), f"{doc.name} links to {target}"
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        ast.parse(block)


@pytest.mark.parametrize("doc", DOCS, ids=[doc.name for doc in DOCS])
def test_ids_and_make_targets_exist(doc):
    text = doc.read_text()
    for env_id in set(re.findall(r"vlahub/(?:RoboTwin|LIBERO|Twin|EVAC)-\w[\w-]*", text)):
        assert env_id in catalog.ENVS, f"{doc.name} names {env_id}"
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:^|`)make ([a-z]+)", text, re.MULTILINE)) <= targets


def test_make_help_lists_the_targets():
    out = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert all(f"make {target}" in out for target in ("setup", "demo", "test", "lint", "clean"))


def test_shell_scripts_parse():
    for script in (ROOT / "tools" / "system_packages.sh", ROOT / ".ci" / "run"):
        subprocess.run(["bash", "-n", script], check=True)


def test_constraints_fit_what_pyproject_allows():
    import tomllib

    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = {name.lower().replace("_", "-"): version for name, version in (line.split("==") for line in lines)}
    wanted = [*project["dependencies"], *(entry for extra in project["optional-dependencies"].values() for entry in extra)]
    for requirement in map(Requirement, wanted):
        if requirement.name != "vlahub":
            assert pins[requirement.name.lower().replace("_", "-")] in requirement.specifier, requirement
