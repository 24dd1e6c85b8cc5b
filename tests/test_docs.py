"""The documents say nothing that a reader could trip over: links lead somewhere, Python blocks parse, commands exist, ids are registered."""

import ast
import dataclasses
import functools
import importlib
import inspect
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import tyro

import vlahub  # noqa: F401  registers the ids
from vlahub import catalog, cli
from vlahub.catalog import key_values

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


def spelt_out(pattern: str) -> list[str]:
    """ "a{b,c}" -> ["ab", "ac"]"""
    found = re.search(r"\{([^}]*)\}", pattern)
    if not found:
        return [pattern]
    return [text for part in found[1].split(",") for text in spelt_out(pattern[: found.start()] + part + pattern[found.end() :])]


def test_the_readme_lists_every_policy():
    table = (ROOT / "README.md").read_text().split("Known ids,")[1].split("*Verified*")[0]
    cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    listed = [name for cell in cells for pattern in re.findall(r"`([^`]+)`", cell) for name in spelt_out(pattern)]
    assert sorted(listed) == sorted(catalog.POLICIES)


def command_lines(doc: Path) -> list[list[str]]:
    """The words of every `vlahub ...` and `... baselines/NAME.py ...` in the shell blocks, without those that leave something out."""
    lines = []
    for block in re.findall(r"```bash\n(.*?)```", doc.read_text(), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            scripts = [i for i, word in enumerate(words) if re.fullmatch(r"baselines/\w+\.py", word)]
            if words and "..." not in words and not any(word.isupper() for word in words):
                lines += [words] if words[0] == "vlahub" else [words[i:] for i in scripts]
    return lines


@pytest.mark.parametrize("doc", [doc for doc in DOCS if command_lines(doc)], ids=lambda doc: doc.name)
def test_command_lines_parse(doc, monkeypatch):
    ran = {}
    for name in ("list_cards", "doctor", "assets", "evaluate", "record", "plot"):
        monkeypatch.setattr(cli, name, functools.wraps(getattr(cli, name))(lambda **given: ran.update(given)))
    for words in command_lines(doc):
        command = shlex.join(words)
        ran.clear()
        if words[0] == "vlahub":
            assert cli.main(words[1:]) == 0, command
        elif "--resume" not in words:  # that one reads the arguments of a run
            baseline = importlib.import_module(words[0].removesuffix(".py").replace("/", "."))
            ran |= dataclasses.asdict(tyro.cli(baseline.Args, args=words[1:]))
        env_id = ran.get("env", ran.get("env_id", ""))
        if env_id in catalog.ENVS:  # ids that do not exist are another test's; examples name some of the reader's own
            known = inspect.signature(catalog.load(catalog.ENVS[env_id].simulation)).parameters
            assert key_values("env-options", ran.get("env_options", ())).keys() <= known.keys(), command
        options = key_values("policy-options", ran.get("policy_options", ()))
        if doc.stem in catalog.FAMILIES:
            known = catalog.load(catalog.family_card(doc.stem).policy).Config.__dataclass_fields__
            assert options.keys() <= known.keys(), command


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
