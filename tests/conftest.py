"""Fixtures and helpers of all tests: the project's commands and small data."""

import contextlib
import gc
import importlib
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

# On busy cores torch's threads wait for each other, and tests take ten times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# argparse wraps its lines at the terminal's width, and Python 3.14 colours them.
os.environ |= {"COLUMNS": "100", "PYTHON_COLORS": "0"}
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import dataset  # noqa: E402
import preprocessing  # noqa: E402


def require_memtorch():
    """Return the module memtorch. If it is missing, skip the calling file, or fail it under CI."""
    try:
        return importlib.import_module("memtorch")
    except ImportError as error:
        reason = f"MemTorch cannot be imported: {error}"
    if os.environ.get("CI"):
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason, allow_module_level=True)


@pytest.fixture(scope="session")
def command():
    """Run one of the project's scripts as a process, and return the result of subprocess.run.

    A GPU is used if there is one, so tests that compare results pass `--no_cuda`.
    """

    def run(*arguments, cwd=ROOT, **options):
        script, *rest = map(str, arguments)
        options = {"capture_output": True, "text": True} | options
        return subprocess.run([sys.executable, str(ROOT / script), *rest], cwd=cwd, **options)

    return run


@pytest.fixture(scope="session")
def in_process():
    """Run one of the project's scripts in this process, which saves seconds of start-up.

    Arguments and result are the same as for `command`. An exception of the script is raised.
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
            gc.unfreeze()  # because Python does not end here
            sys.argv = argv
        return subprocess.CompletedProcess(rest, status, out.getvalue(), err.getvalue())

    return run


@pytest.fixture(scope="session")
def dataset_path(tmp_path_factory):
    """A folder that contains ColoredMNIST, generated from all digits with seed 7. Read only."""
    path = tmp_path_factory.mktemp("data")
    preprocessing.generate_environments(path, seed=7)
    return path


@pytest.fixture(scope="session")
def data(dataset_path):
    """The data in `dataset_path`. Read only."""
    return dataset.load_data(dataset_path, seed=7)


@pytest.fixture(scope="session")
def mnist():
    """MNIST's training images and digits."""
    return preprocessing.load_mnist()


@pytest.fixture(scope="session")
def small_files(tmp_path_factory):
    """A folder ColoredMNIST with 60 digits in each environment, generated with seed 3."""
    folder = tmp_path_factory.mktemp("small") / "ColoredMNIST"
    preprocessing.generate_environments(folder.parent, sizes=(60, 60, 60), seed=3)
    return folder


def assert_one_line(result, *words, status=(1, 2)):
    """Assert that a command failed with one line that has these words, and no traceback."""
    assert result.returncode in status, (result.returncode, result.stderr)
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, result.stderr
    for word in words:
        assert str(word) in lines[0], lines[0]


def assert_refused(result, *words):
    """Assert that argparse refused the arguments: its usage, then one line with these words."""
    assert result.returncode == 2 and result.stdout == "", (result.returncode, result.stderr)
    assert result.stderr.startswith("usage: ") and "Traceback" not in result.stderr
    last = result.stderr.splitlines()[-1]
    assert ": error: " in last
    for word in words:
        assert str(word) in last, last


def same(ours, theirs):
    """Return whether two `Samples` are equal, bit for bit."""
    pairs = zip(vars(ours).values(), vars(theirs).values(), strict=True)
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)
