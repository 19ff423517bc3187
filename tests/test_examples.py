"""Every example runs through, to the assertion it ends with."""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

import pytest
import torch
import vision

EXAMPLES = Path(__file__).parents[1] / "examples"
# The demo in full takes most of a minute: here it grows one network, a tenth as long.
SHORT = {
    "digits.py": ["--steps", "100", "--seeds", "1"],
    "nonparametric_tasks.py": "poker rectangles --hands 4000 --ticks 2 --penalty 1e-3".split(),
    "gradmax_student_teacher.py": "--repeats 1 --every 30 --last 10".split(),
    "tiny_resnet18.py": ["FOLDER", "--smoke"],
    "tiny_bottleneck.py": "--rounds 1 --images 500".split(),
    "xng_two_units.py": "--runs 3 --steps 40".split(),
    "senn_regression.py": "--steps 60".split(),
    "senn_mnist.py": (
        "--epochs 2 --images 3000 --subsets 200 --candidates 4 --moves 2 --most 1"
    ).split(),
    "nonparametric_mnist.py": "--grow 3 --settle 1 --scratch 1 --images 5000".split(),
}
NEEDS_DATA = {"nonparametric_mnist.py", "senn_mnist.py", "tiny_bottleneck.py"}
SCRIPTS = sorted(p.name for p in EXAMPLES.glob("*.py") if "assert " in p.read_text())


def test_every_script_is_an_example_or_a_part_of_one() -> None:
    parts = {p.name for p in EXAMPLES.glob("*.py")} - set(SCRIPTS)
    assert parts == {
        *("digits_model.py", "digits_report.py"),
        *("nonparametric_report.py", "generated_data.py"),
        *("cifar100.py", "tiny_resnet18_model.py"),
    }


def test_the_example_of_the_readme_runs(capsys: pytest.CaptureFixture[str]) -> None:
    text = (EXAMPLES.parent / "README.md").read_text()
    with torch.random.fork_rng():
        exec(text.split("```python\n")[1].split("```")[0], {})
    assert "exact in train and eval" in capsys.readouterr().out


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_example_runs_to_its_assertion(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if name in NEEDS_DATA and "GRAPHGROW_DATA" not in os.environ:
        pytest.skip("GRAPHGROW_DATA names no directory with the data of this example")
    with vision.silenced():
        vision.torchvision()
    given = [str(tmp_path / "run") if word == "FOLDER" else word for word in SHORT.get(name, [])]
    monkeypatch.setattr(sys, "argv", [name, *given])
    monkeypatch.syspath_prepend(EXAMPLES)
    with torch.random.fork_rng():
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert "skipped" not in capsys.readouterr().out
