"""run.sh with PYTHON=, once with the project's scripts, otherwise with short ones."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT
from packaging.requirements import Requirement

TRAINERS = ["ERM", "groupDRO", "Backdoor", "IRM"]
LOGS = [f"{trainer}_log.txt" for trainer in TRAINERS]
# The short scripts in place of exp-mnist.py, memristor.py and metric.py.
EXPERIMENT = """
import os, sys, time
if "--help" in sys.argv:
    sys.exit(print("usage: ..."))
with open("calls", "a") as calls:
    print(*sys.argv, sep="|", file=calls)
print("Arguments:", sys.argv)
if "--fail" in sys.argv:
    sys.exit(3)
while os.path.exists("wait"):
    time.sleep(0.01)
print("Summary: {}")
"""
TABLE = "import sys; print('table of', *sys.argv[1:])"


def start(folder, *arguments, script=("./run.sh",), cwd=None, **variables):
    """Start run.sh in a folder, as the leader of a process group."""
    mine = ("CDPATH", "PYTHON", "SEED")
    environment = {name: value for name, value in os.environ.items() if name not in mine}
    return subprocess.Popen(
        [*script, *arguments],
        cwd=cwd or folder,
        env=environment | {"PYTHON": sys.executable} | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # Processes of a shell's background job ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def finish(process):
    out, err = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def run(folder, *arguments, **options):
    return finish(start(folder, *arguments, **options))


def messages(result):
    """Return the lines of standard error that do not announce a command."""
    return [line for line in result.stderr.splitlines() if " > " not in line]


@pytest.fixture
def folder(tmp_path):
    """A folder with run.sh and the short scripts. There is a space in its name."""
    folder = tmp_path / "my project"
    folder.mkdir()
    shutil.copy(ROOT / "run.sh", folder)
    for name in ("exp-mnist.py", "memristor.py"):
        (folder / name).write_text(EXPERIMENT)
    (folder / "metric.py").write_text(TABLE)
    (folder / "memtorch.py").touch()  # found before an installed MemTorch
    return folder


def calls(folder):
    """Return the arguments that the experiments were called with, in order."""
    return [line.split("|") for line in (folder / "calls").read_text().splitlines()]


def wait_for_a_call(process, folder):
    """Wait until a run has called its first experiment, or has ended."""
    path = folder / "calls"
    while process.poll() is None and not (path.exists() and path.stat().st_size):
        time.sleep(0.01)


def test_the_project(tmp_path):
    """Each experiment writes a log with the Summary at its end, and the table has a row for it."""
    for path in [*ROOT.glob("*.py"), ROOT / "run.sh", ROOT / "requirements.txt"]:
        shutil.copy(path, tmp_path)
    (tmp_path / "data").mkdir()
    with np.load(ROOT / "data" / "mnist.npz") as archive:
        few = {key: archive[key][:300] for key in archive}
        np.savez(tmp_path / "data" / "mnist.npz", **few)
    flags = ("--no_cuda", "--iteration", "5", "--repetitions", "1")
    result = run(tmp_path, *flags, SEED="2024")
    assert result.returncode == 0, result.stderr
    crossbar = "MemTorch cannot be imported" not in result.stderr
    assert crossbar or not os.environ.get("CI")
    logs = LOGS + ["memristor_log.txt"] * crossbar
    assert sorted(path.name for path in tmp_path.glob("*_log.txt*")) == sorted(logs)
    for log in logs:
        lines = (tmp_path / log).read_text().splitlines()
        assert "'seed': 2024" in lines[0] and "'iteration': 5" in lines[0]
        assert lines[-1].startswith("Summary: {'Accuracy_testmean': ")
    header, *rows, total = result.stdout.splitlines()
    assert header.startswith("trainer") and total.startswith("together")
    assert [row.split()[0] for row in rows] == TRAINERS + ["IRM"] * crossbar
    assert (tmp_path / "data" / "models" / "IRM" / "repetition1.pt").exists()


def test_the_commands(folder):
    """The user's arguments reach each of them, and memristor.py gets the networks of IRM."""
    result = run(folder, "--no_cuda", "--dataset_path", "my data")
    assert result.returncode == 0
    assert result.stdout == f"table of {' '.join(LOGS)} memristor_log.txt\n"
    assert len(result.stderr.splitlines()) == 5 and not messages(result)
    arguments = ["--no_cuda", "--dataset_path", "my data"]
    seed = re.search(r"^seed=(\d+)", (folder / "run.sh").read_text(), re.M)[1]
    common = ["exp-mnist.py", "--seed", seed, *arguments, "--trainer"]
    expected = [[*common, name] for name in TRAINERS]
    expected[3] += ["--save_model", "data/models/IRM"]
    expected += [["memristor.py", *arguments, "--load_model", "data/models/IRM"]]
    assert calls(folder) == expected
    for log, command in zip([*LOGS, "memristor_log.txt"], expected, strict=True):
        assert (folder / log).read_text() == f"Arguments: {command}\nSummary: {{}}\n"


def test_the_seed(folder):
    text = re.sub(r"^seed=\d+", "seed=0042", (folder / "run.sh").read_text(), flags=re.M)
    (folder / "run.sh").write_text(text)
    run(folder)
    run(folder, SEED="2024")
    seeds = [arguments[2] for arguments in calls(folder) if arguments[0] == "exp-mnist.py"]
    assert seeds == ["0042"] * 4 + ["2024"] * 4


@pytest.mark.parametrize("without", ["memristor.py", "memtorch.py"])
def test_without_the_crossbar_everything_else_runs(folder, without):
    """The assignment asks for no memristor.py, and MemTorch may not be built."""
    (folder / "memristor_log.txt").write_text("old")
    if without == "memristor.py":
        (folder / without).unlink()
    else:
        (folder / without).write_text("raise ImportError")
    result = run(folder)
    assert result.returncode == 0 and result.stdout == f"table of {' '.join(LOGS)}\n"
    assert len(calls(folder)) == 4 and (folder / "memristor_log.txt").read_text() == "old"
    problem = {
        "memristor.py": "memristor.py is missing",
        "memtorch.py": "MemTorch cannot be imported",
    }
    assert messages(result) == [f"run.sh: {problem[without]}. The crossbar is left out."]


def test_help_replaces_no_log(folder):
    (folder / "ERM_log.txt").write_text("old")
    result = run(folder, "--help")
    assert result.returncode == 0 and result.stdout == "usage: ...\n"
    assert [path.read_text() for path in folder.glob("*_log.txt")] == ["old"]


def test_a_command_that_fails_ends_the_run_and_keeps_the_old_log(folder):
    (folder / "ERM_log.txt").write_text("old")
    result = run(folder, "--fail")
    assert result.returncode == 3 and result.stdout == "" and len(calls(folder)) == 1
    assert [path.read_text() for path in folder.glob("*_log.txt")] == ["old"]
    run(folder)
    assert (folder / "ERM_log.txt").read_text().endswith("\nSummary: {}\n")
    assert not [*folder.glob("*.tmp")]


@pytest.mark.skipif(not shutil.which("flock"), reason="needs flock")
def test_a_second_run_waits(folder):
    (folder / "wait").touch()
    first = start(folder, SEED="1")
    try:
        wait_for_a_call(first, folder)
        second = start(folder, SEED="2")
        assert second.stderr.readline() == "run.sh: waiting for another run to end\n"
        assert len(calls(folder)) == 1
    finally:
        (folder / "wait").unlink()
    assert [finish(process).returncode for process in (first, second)] == [0, 0]
    seeds = [arguments[2] for arguments in calls(folder) if arguments[0] == "exp-mnist.py"]
    assert seeds == ["1"] * 4 + ["2"] * 4


def test_ctrl_c_ends_the_run(folder):
    (folder / "ERM_log.txt").write_text("old")
    (folder / "wait").touch()
    process = start(folder)
    wait_for_a_call(process, folder)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    result = finish(process)
    assert result.returncode == 130 and result.stdout == "" and len(calls(folder)) == 1
    assert (folder / "ERM_log.txt").read_text() == "old"


def test_sh_runs_it_from_any_folder(folder, tmp_path):
    (tmp_path / "elsewhere" / folder.name).mkdir(parents=True)
    script = ("sh", f"{folder.name}/run.sh")
    variables = {"CDPATH": str(tmp_path / "elsewhere")}  # cd would look for the folder there
    result = run(folder, script=script, cwd=tmp_path, **variables)
    assert result.returncode == 0 and len(calls(folder)) == 5


def test_a_file_that_is_no_python_is_one_line(folder):
    (folder / "other").write_text("#!/bin/sh\nexit 1\n")
    (folder / "other").chmod(0o755)
    result = run(folder, PYTHON="./other")
    assert result.returncode == 1 and result.stdout == "" and not (folder / "calls").exists()
    (line,) = result.stderr.splitlines()
    assert line.startswith("run.sh: ./other is not Python 3.10 to 3.14. Set PYTHON, or ")


@pytest.mark.parametrize(
    ("version", "works"),
    [("(3, 9, 9)", False), ("(3, 10, 0)", True), ("(3, 14, 9)", True), ("(3, 15, 0)", False)],
)
def test_versions_of_python(folder, version, works):
    code = f"import sys; sys.version_info = {version}; exec(sys.argv[1])"
    python = f"""#!/bin/sh
[ "$1" = -c ] && exec '{sys.executable}' -c '{code}' "$2"
exec '{sys.executable}' "$@"
"""
    (folder / "other").write_text(python)
    (folder / "other").chmod(0o755)
    result = run(folder, PYTHON="./other")
    assert result.returncode == (0 if works else 1)
    assert ("is not Python 3.10 to 3.14" in result.stderr) != works
    assert not (folder / ".venv").exists()


def test_arguments_after_test_go_to_pytest(folder):
    (folder / "test_two.py").write_text("def test_one(): ...\ndef test_other(): assert False\n")
    result = run(folder, "test", "-p", "no:cacheprovider", "-k", "one or none")
    assert result.returncode == 0 and "1 passed, 1 deselected" in result.stdout
    assert run(folder, "test", "-p", "no:cacheprovider").returncode == 1
    assert not (folder / "calls").exists()


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13", "3.14"])
def test_requirements_pin_each_package_once_for_each_python(python):
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    requirements = [Requirement(line) for line in lines if not line.startswith("#")]
    pinned = [
        requirement.name
        for requirement in requirements
        if requirement.marker is None or requirement.marker.evaluate({"python_version": python})
    ]
    assert len(pinned) == len(set(pinned))
    assert set(pinned) == {requirement.name for requirement in requirements}
    assert all(str(requirement.specifier).startswith("==") for requirement in requirements)
