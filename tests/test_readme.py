"""The README: its Python blocks run, and its loss gets into the table of results."""

import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, require_memtorch

README = (ROOT / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)
LINES = re.findall(r"^    (\S.*)$", README, re.M)


def test_every_python_block_runs(tmp_path, monkeypatch, capsys):
    require_memtorch()
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in BLOCKS:
        exec(block, names)
    out = capsys.readouterr().out
    plain, hardened = (
        [float(accuracy) for accuracy in re.findall(rf"^{name} 0\.[01] [01] (0\.\d+)$", out, re.M)]
        for name in ("plain", "hardened")
    )
    assert len(plain) == len(hardened) == 4  # two fractions, two patterns
    assert min(hardened) > min(plain)
    assert (tmp_path / "data" / "crossbar.pt").exists()
    assert {"Network", "VREx", "to_crossbar"} <= names.keys()


@pytest.fixture
def project(tmp_path):
    """Return a copy of the project with few digits."""
    for file in (*ROOT.glob("*.py"), *ROOT.glob("benchmarks/*.py")):
        target = tmp_path / file.relative_to(ROOT)
        target.parent.mkdir(exist_ok=True)
        shutil.copy(file, target)
    with np.load(ROOT / "data" / "mnist.npz") as mnist:
        few = {name: mnist[name][:900] for name in mnist.files}
    (tmp_path / "data").mkdir()
    np.savez(tmp_path / "data" / "mnist.npz", **few)
    return tmp_path


def insert(path, after, text):
    """Insert text after the first line that contains `after`."""
    lines = path.read_text("utf-8").splitlines(keepends=True)
    position = next(i for i, line in enumerate(lines) if after in line)
    lines.insert(position + 1, text)
    path.write_text("".join(lines), "utf-8")


def test_a_new_loss_gets_into_the_table(project):
    """Do what the section "Your own loss" says, and nothing else."""
    (loss,) = [block for block in BLOCKS if "class VREx" in block]
    with open(project / "model.py", "a", encoding="utf-8") as model:
        model.write(loss.replace("from model import Loss\n", ""))
    (trainers,) = [line for line in LINES if line.startswith("TRAINERS = ")]
    insert(project / "register.py", "TRAINERS = ", f"from model import VREx\n{trainers}\n")
    (flag,) = [line for line in LINES if line.startswith('add("--beta"')]
    insert(project / "trainer.py", 'add("--reg_lambda"', f"    {flag}\n")
    (command,) = [line for line in LINES if line.startswith("python benchmarks/results.py")]
    command = command.replace("VREx --beta 30", "VREx --beta 30 --iteration 3")
    command = re.sub(r"--seeds [\d ]+", "--seeds 0 ", command)
    command = command.replace("python", sys.executable, 1)
    result = subprocess.run(
        ["bash", "-c", command], cwd=project, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    rows = [line.split(" | ")[0] for line in result.stdout.splitlines() if line.startswith("| ")]
    assert rows[2:] == ["| VREx", "| VREx, `--beta 30 --iteration 3`", "| IRM"]
