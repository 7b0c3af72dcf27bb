"""What the tests share: the project on the path, its commands as a user runs them, small data."""

import contextlib
import gc
import importlib
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

# On busy cores torch's threads wait for each other: tests take ten times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# argparse breaks its lines by the terminal's width, and Python 3.14 colours them.
os.environ |= {"COLUMNS": "100", "PYTHON_COLORS": "0"}
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import nn  # noqa: E402

import dataset  # noqa: E402
import preprocessing  # noqa: E402
from model import Network  # noqa: E402


class Normalized(Network):
    """A network of a user's own, with batch normalisation."""

    def __init__(self, drop_rate: float = 0.0):
        super().__init__(
            nn.Sequential(
                nn.Flatten(),
                nn.Linear(1568, 64),
                nn.BatchNorm1d(64),
                nn.ReLU(),
                nn.Dropout(drop_rate),
                nn.Linear(64, 1),
            )
        )


def require_memtorch():
    """The module memtorch; without it the calling file's tests are skipped, and fail under CI.

    What is tested on a crossbar would otherwise be left out without anybody's noticing.
    """
    try:
        return importlib.import_module("memtorch")
    except ImportError as error:
        reason = f"MemTorch can't be imported: {error}"
    if os.environ.get("CI"):
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason, allow_module_level=True)


@pytest.fixture(scope="session")
def command():
    """Run one of the project's scripts as a process; returns what subprocess.run does.

    Nothing here hides a GPU: trainings whose figures are compared are told `--no_cuda`.
    """

    def run(*arguments, cwd=ROOT, **options):
        script, *rest = map(str, arguments)
        options = {"capture_output": True, "text": True} | options
        return subprocess.run([sys.executable, str(ROOT / script), *rest], cwd=cwd, **options)

    return run


@pytest.fixture(scope="session")
def in_process():
    """Run one of the project's scripts in this process, which saves the seconds of its start.

    Takes and returns what `command` does; a fault of the script's own is raised.
    """

    def run(*arguments):
        script, *rest = map(str, arguments)
        module = importlib.import_module(script.removesuffix(".py"))
        out, err, status, argv = io.StringIO(), io.StringIO(), 0, sys.argv
        sys.argv = [script, *rest]
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                preprocessing.run_command(module.main)
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
            err.write("" if isinstance(end.code, int) else f"{end.code}\n")
        finally:
            gc.unfreeze()  # here Python does not end
            sys.argv = argv
        return subprocess.CompletedProcess(rest, status, out.getvalue(), err.getvalue())

    return run


@pytest.fixture(scope="session")
def dataset_path(tmp_path_factory):
    """A folder with ColoredMNIST in it, drawn from the real digits, for reading only."""
    path = tmp_path_factory.mktemp("data")
    preprocessing.draw_environments(path, seed=7)
    return path


@pytest.fixture(scope="session")
def data(dataset_path):
    """What is in `dataset_path`, for reading only."""
    return dataset.load_dataset(dataset_path)


@pytest.fixture(scope="session")
def mnist():
    return preprocessing.load_mnist()


@pytest.fixture(scope="session")
def small_files(tmp_path_factory):
    """A folder ColoredMNIST of the project's own form with 60 digits an environment."""
    folder = tmp_path_factory.mktemp("small") / "ColoredMNIST"
    preprocessing.draw_environments(folder.parent, sizes=(60, 60, 60), seed=3)
    return folder


def assert_one_line(result, *words, status=(1, 2)):
    """The command failed as a user's mistake does: one line with these words, no traceback."""
    assert result.returncode in status, (result.returncode, result.stderr)
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, result.stderr
    for word in words:
        assert str(word) in lines[0], lines[0]


def assert_refused(result, *words):
    """argparse refused the arguments: its usage, then one line of error with these words."""
    assert result.returncode == 2 and result.stdout == "", (result.returncode, result.stderr)
    assert result.stderr.startswith("usage: ") and "Traceback" not in result.stderr
    last = result.stderr.splitlines()[-1]
    assert ": error: " in last
    for word in words:
        assert str(word) in last, last


def same(ours, theirs):
    """Whether two sets of samples are equal, bit for bit."""
    pairs = zip(vars(ours).values(), vars(theirs).values(), strict=True)
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)
