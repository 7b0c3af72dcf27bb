"""What the tests share: the project on the path, its commands as a user runs them, small data."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import preprocessing  # noqa: E402


@pytest.fixture(scope="session")
def command():
    """Run one of the project's scripts; returns what subprocess.run does."""

    def run(*arguments, cwd=ROOT, **options):
        script, *rest = map(str, arguments)
        return subprocess.run(
            [sys.executable, str(ROOT / script), *rest],
            cwd=cwd,
            env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
            **options,
        )

    return run


@pytest.fixture(scope="session")
def dataset_path(tmp_path_factory):
    """A folder with ColoredMNIST in it, drawn from the real digits, for reading only."""
    path = tmp_path_factory.mktemp("data")
    preprocessing.load_dataset(path, seed=7)
    return path


@pytest.fixture(scope="session")
def mnist():
    return preprocessing.load_mnist(ROOT / "data")


@pytest.fixture(scope="session")
def small_files(tmp_path_factory, mnist):
    """A folder ColoredMNIST of the project's own form with 60 digits an environment."""
    folder = tmp_path_factory.mktemp("small") / "ColoredMNIST"
    folder.mkdir()
    write_small(folder, *mnist)
    return folder


def write_small(folder, images, digits, count=60, seed=3):
    generator = torch.Generator().manual_seed(seed)
    for e, name in enumerate(preprocessing.ENVIRONMENTS):
        part = slice(e * count, (e + 1) * count)
        p_e = preprocessing.P_E
        record = preprocessing.color_digits(images[part], digits[part], 0.2, p_e[e], generator)
        drawn = {"p_f": 0.2, "p_e": list(p_e), "seed": seed}
        torch.save(record | drawn, folder / f"{name}.pt")


def assert_one_line(result, *words, status=(1, 2)):
    """The command failed as a user's mistake does: one line with these words, no traceback."""
    assert result.returncode in status, (result.returncode, result.stderr)
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, result.stderr
    for word in words:
        assert str(word) in lines[0], lines[0]
