import json
import os
import subprocess
import sys
import types

import pytest

import vlahub
from tests.worlds import PointWorld
from vlahub import catalog, cli

EVAL = ["eval", "--env", "test/Point", "--policy"]


def call(*arguments):
    """-> status. tyro itself leaves by SystemExit."""
    try:
        return cli.main(list(arguments))
    except SystemExit as leaving:
        return leaving.code


@pytest.fixture
def cards():
    """A registered family and checkpoint, removed afterwards."""
    catalog.register_family(catalog.FamilyCard("walker", "tests.fragile:Seeker", "Walks.", lambda folder: False, needs=("no_such_package",)))
    catalog.register_policy(catalog.PolicyCard("test/walker", "walker", "A tiny walker [sic].", envs=("test/Point",), options={"steps": 3}))
    yield
    del catalog.FAMILIES["walker"], catalog.POLICIES["test/walker"]


# ------------------------------------------------------------------------------------------------ list


def test_list_shows_what_is_registered_and_how_to_install_what_is_missing(cards, capsys):
    assert call("list") == 0
    shown = capsys.readouterr().out
    assert "test/Point" in shown and "test/walker" in shown and "[sic]" in shown
    assert "vlahub[policies]" in shown.replace("\n", "")


def test_list_of_one_id_is_its_whole_card(cards, capsys):
    assert call("list", "test/Point") == 0
    shown = capsys.readouterr().out
    assert "tests.worlds:PointExpert" in shown and "Push a point" in shown
    assert call("list", "test/walker", "--json") == 0
    card = json.loads(capsys.readouterr().out)
    assert card["options"] == {"steps": 3} and card["envs"] == ["test/Point"] and card["installed"] is False
    assert call("list", "walker") == 0 and "Walks." in capsys.readouterr().out


def test_list_for_machines(cards, capsys):
    assert call("list", "--json") == 0
    everything = json.loads(capsys.readouterr().out)
    assert "test/Point" in [card["id"] for card in everything["environments"]]
    assert {card["name"]: card["installed"] for card in everything["families"]}["walker"] is False


def test_list_of_an_unknown_id_suggests_the_nearest(capsys):
    assert call("list", "test/Piont") == 2
    error = capsys.readouterr().err
    assert error.startswith("vlahub: nothing is called 'test/Piont'; did you mean 'test/Point'")


# ------------------------------------------------------------------------------------------------ doctor


def test_doctor_gives_the_status_of_its_checks(monkeypatch):
    checks = types.ModuleType("vlahub.doctor")
    checks.main = lambda: 1
    monkeypatch.setitem(sys.modules, "vlahub.doctor", checks)
    monkeypatch.setattr(vlahub, "doctor", checks, raising=False)
    assert call("doctor") == 1


# ------------------------------------------------------------------------------------------------ eval


def test_eval_writes_and_shows_the_result(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert call(*EVAL, "expert", "--episodes", "5", "--out", str(tmp_path / "out"), "--videos", "1", "--max-steps", "15", "--env-options", "size=30") == 0
    shown = capsys.readouterr().out
    assert "go to the green target" in shown and "100.0 % solved" in shown and str(tmp_path / "out" / "report.html") in shown
    settings = json.loads((tmp_path / "out" / "results.json").read_text())["settings"]
    assert settings["max_steps"] == 15 and settings["env_options"] == {"size": 30} and settings["episodes"] == 5
    assert call(*EVAL, "expert", "--episodes", "5", "--out", str(tmp_path / "out"), "--max-steps", "15", "--env-options", "size=31") == 2
    assert "env_options is {'size': 30} there, {'size': 31} here" in capsys.readouterr().err


def test_eval_loads_a_checkpoint_with_its_options(tmp_path, monkeypatch, capsys):
    from tests.mlp import FlowMlp

    FlowMlp.tiny(PointWorld().interface).save_pretrained(tmp_path / "policy")
    arguments = (*EVAL, str(tmp_path / "policy"), "--episodes", "3", "--videos", "0", "--out", str(tmp_path / "out"))
    assert call(*arguments, "--policy-options", "horizon=2", "log_std=-1", "--device", "cpu", "--dtype", "float32", "--execute", "1") == 0
    settings = json.loads((tmp_path / "out" / "results.json").read_text())["settings"]
    assert settings["policy_options"] == {"horizon": 2, "log_std": -1} and settings["execute"] == 1 and len(settings["weights"]) == 12
    assert settings["policy"] == str(tmp_path / "policy") and settings["adapters"] == "direct"
    assert call(*arguments, "--policy-options", "horizen=2") == 2
    assert "did you mean 'horizon'" in capsys.readouterr().err


def test_eval_runs_a_function_from_a_module_here(tmp_path, monkeypatch, capsys):
    (tmp_path / "my_policy_here.py").write_text("import numpy as np\ndef still(observation):\n    return np.zeros((len(observation['states']), 2, 2))\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert call(*EVAL, "my_policy_here:still", "--episodes", "3", "--videos", "0") == 0
    assert (tmp_path / "runs" / "test_Point-my_policy_here_still-0" / "results.json").exists()
    assert call(*EVAL, "my_policy_here:run", "--episodes", "3") == 2
    assert "has no attribute 'run'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["eval", "--env", "test/Piont", "--policy", "expert"], "did you mean 'test/Point'"),
        (["eval", "--env", "no_module:test/Point", "--policy", "expert"], "no module 'no_module'"),
        ([*EVAL, "expert", "--protocol", "openvla"], "test/Point has no protocols"),
        ([*EVAL, "exprt"], "`expert` and `random` need no checkpoint"),
        ([*EVAL, "lab/any", "--device", "cuda:99"], "--device cuda:99: there is no such device"),
        ([*EVAL, "lab/any", "--device", "gpu"], "--device gpu: there is no such device"),
        ([*EVAL, "no_module:act"], "no module 'no_module'"),
        ([*EVAL, "expert", "--episodes", "0"], "episodes must be a whole number of at least 1"),
        ([*EVAL, "expert", "--num-envs", "0"], "num_envs must be"),
        ([*EVAL, "expert", "--seed", "-1"], "seed must be"),
        ([*EVAL, "random", "--execute", "0"], "execute must be at least 1"),
        ([*EVAL, "expert", "--env-options", "sise=3"], "no option 'sise'; did you mean 'size'"),
        ([*EVAL, "expert", "--env-options", "num_envs=3"], "num_envs is not one; see the other arguments"),
        ([*EVAL, "expert", "--env-options", "size"], "--env-options takes key=value"),
        ([*EVAL, "expert", "--policy-options", "a=1"], "--policy-options and --dtype are for checkpoints"),
        ([*EVAL, "expert", "--out", "/proc/nowhere"], "cannot write to the output folder /proc/nowhere"),
        ([*EVAL, "expert", "--video-episodes", "99"], "episodes are numbered 0 to 49"),
    ],
)
def test_a_mistake_is_one_message_and_status_2(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call(*arguments) == 2
    error = capsys.readouterr().err
    assert words in error and error.startswith("vlahub: ") and "Traceback" not in error


def test_debug_shows_the_traceback():
    with pytest.raises(vlahub.UnknownId):
        cli.main(["list", "--debug", "no/thing"])


def test_a_wrong_flag_is_status_2(capsys):
    assert call(*EVAL, "expert", "--episodse", "3") == 2
    assert "--episodes" in "".join(capsys.readouterr())
    assert call("evaluate") == 2


def test_options_are_read_as_literals():
    words = ["size=64", "rate=0.5", "assets=official", "on=true", "off=False", "none=none", "shape=(3,4)", "path=a=b"]
    assert catalog.key_values("x", words) == {
        "size": 64, "rate": 0.5, "assets": "official", "on": True, "off": False, "none": None, "shape": (3, 4), "path": "a=b",
    }  # fmt: skip
    with pytest.raises(ValueError, match="'a' twice"):
        catalog.key_values("x", ["a=1", "a=2"])


def test_python_m_vlahub_explains_itself():
    shown = subprocess.run(
        [sys.executable, "-m", "vlahub", "eval", "--help"], capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"}, timeout=240
    )
    assert shown.returncode == 0 and "--num-envs" in shown.stdout and "the results do not depend on it" in shown.stdout


def test_the_command_line_starts_without_torch():
    code = "import sys, vlahub.cli, vlahub.evaluation; print('torch' in sys.modules, 'av' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240).stdout.split() == ["False", "False"]
