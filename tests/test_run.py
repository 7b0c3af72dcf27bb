"""run.sh, with stand-ins for the Python of its environment and for python3."""

import os
import shutil
import subprocess

import pytest
from conftest import ROOT

PYTHON = """#!/usr/bin/env bash
echo "$*" >>calls
case "$*" in
    *memtorch-cpu*) if [ -e broken ]; then echo "fatal error: Python.h is missing"; exit 1; fi ;;
    *--help*) echo "usage: exp-mnist.py" ;;
    *--fail*groupDRO*) echo "Arguments: none"; exit 2 ;;
    *exp-mnist.py* | *memristor.py*)
        echo "Data: data/ColoredMNIST, drawn with p_f 0.2, seed 7"
        case "$*" in *groupDRO*) mean=0.6 ;; *memristor*) mean=0.56 ;; *) mean=0.5999 ;; esac
        echo "Summary: {'Accuracy_testmean': $mean, 'Accuracy_teststd': 0.01, 'AUC_testmean': 1.0}"
        ;;
esac
"""


def executable(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def clone(tmp_path):
    """A folder with run.sh in it, set up but for MemTorch; returns what runs it."""
    for name in ("run.sh", "requirements.txt"):
        shutil.copy(ROOT / name, tmp_path)
    executable(tmp_path / ".venv" / "bin" / "python", PYTHON)
    shutil.copy(ROOT / "requirements.txt", tmp_path / ".venv" / "installed")
    executable(tmp_path / "bin" / "g++", "#!/usr/bin/env bash\n")

    def run(*arguments, **environment):
        path = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
        variables = os.environ | path | environment
        options = {"cwd": tmp_path, "env": variables, "capture_output": True, "text": True}
        return subprocess.run(["bash", "run.sh", "--no_cuda", *arguments], check=False, **options)

    run.folder = tmp_path
    return run


def test_grades(clone):
    header, *rows = clone().stdout.splitlines()
    assert header.split() == ["trainer", "test", "accuracy", "points"]
    assert [row.split()[0] for row in rows] == ["ERM", "groupDRO", "IRM", "Backdoor", "IRM"]
    assert [row.split()[-1] for row in rows] == ["-", "15", "10", "-", "-"]
    assert "60.00 % ±  1.00" in rows[1] and rows[4].startswith("IRM on the crossbar")


def test_a_failed_build_of_memtorch_says_why_and_is_tried_again(clone):
    (clone.folder / "broken").touch()
    (clone.folder / "memristor_log.txt").write_text("Summary: {'Accuracy_testmean': 0.9, }\n")
    failed = clone()
    assert failed.returncode == 0 and "on the crossbar" not in failed.stdout
    for words in ("Python.h is missing", "python3-dev", "tries again"):
        assert words in failed.stderr
    (clone.folder / "broken").unlink()
    assert "IRM on the crossbar" in clone().stdout
    assert (clone.folder / "calls").read_text().count("memtorch-cpu") == 2
    assert "building" not in clone().stderr


def test_another_seed_than_the_datas_is_said(clone):
    said = [line for line in clone(SEED="2024").stderr.splitlines() if "data of seed 7" in line]
    assert len(said) == 1 and "rm -r data/ColoredMNIST" in said[0]
    assert "data of seed" not in clone(SEED="0007").stderr


def test_a_command_that_fails_ends_it_and_leaves_the_old_log(clone):
    (clone.folder / "groupDRO_log.txt").write_text("old")
    result = clone("--fail")
    assert result.returncode == 2 and result.stdout == ""
    assert all(line.startswith("run.sh: ") for line in result.stderr.splitlines()), result.stderr
    assert (clone.folder / "groupDRO_log.txt").read_text() == "old"
    assert not [*clone.folder.glob(".*.partial")]


def test_help_leaves_the_logs(clone):
    (clone.folder / "ERM_log.txt").write_text("old")
    result = clone("--help")
    assert result.returncode == 0 and result.stdout == "usage: exp-mnist.py\n"
    assert (clone.folder / "ERM_log.txt").read_text() == "old"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(("--seed", "5"), "SEED="), (("--seed=5",), "SEED="), (("--trainer", "IRM"), "exp-mnist.py")],
)
def test_what_run_sets_itself_is_refused(clone, arguments, words):
    result = clone(*arguments)
    assert result.returncode == 2 and words in result.stderr
    assert not (clone.folder / "ERM_log.txt").exists()


@pytest.mark.parametrize(
    ("version", "refused"), [("3, 9", True), ("3, 13", False), ("3, 14", True)]
)
def test_only_pythons_that_work(clone, version, refused):
    """A python3 that says to be of this version, and can't make an environment."""
    (clone.folder / ".venv" / "installed").unlink()
    check = 'import sys; sys.version_info = ({version}); exec(sys.argv[2].split(";")[1].strip())'
    stand_in = f"#!/usr/bin/env bash\n[ $1 = -c ] && exec {shutil.which('python3')} -c '"
    stand_in += check.format(version=version) + '\' -c "$2"\nexit 1\n'
    executable(clone.folder / "bin" / "python3", stand_in)
    result = clone()
    last = result.stderr.splitlines()[-1]
    assert result.returncode == 1
    assert ("3.10, 3.11, 3.12 or 3.13" if refused else "python3-venv") in last
