import runpy
from pathlib import Path


def test_the_example_compares_policies_of_every_kind(tmp_path, capsys):
    example = runpy.run_path(str(Path(__file__).parents[1] / "examples" / "evaluate_policy.py"))
    example["main"]("test/Point", episodes=3, num_envs=2, out=str(tmp_path))
    shown = capsys.readouterr().out
    assert "expert on test/Point (assets: none): 100.0 % solved" in shown and "hold_still on test/Point" in shown
    assert (tmp_path / "random" / "report.html").exists()
