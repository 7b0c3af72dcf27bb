"""run.sh: with stand-ins for the Python of its environment and for python3, and once for real."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from packaging.requirements import Requirement

# Each call is a line in the file `calls`. A file `lacks` has the modules that can't be imported,
# `reason` why MemTorch can't be after its build, and `broken` is there if that build fails.
PYTHON = r"""#!/usr/bin/env bash
printf '%q ' "$@" >>calls; echo >>calls
folder=${0%/*}
case "$*" in
    --version) cat "$folder/version" ;;
    *"pip install -r"*)
        echo "Collecting torch"
        if [ -e slow ]; then /bin/sleep 1; fi
        if [ -e offline ]; then echo "No matching distribution"; exit 1; fi ;;
    *memtorch-cpu*)
        if [ -e broken ]; then echo "fatal error: Python.h is missing"; exit 1; fi
        command -v ninja >ninja
        touch "$folder/memtorch" ;;
    *"import memtorch"*)
        echo "Traceback (most recent call last):" >&2
        if [ ! -e "$folder/memtorch" ]; then
            echo "ModuleNotFoundError: No module named 'memtorch'" >&2; exit 1
        elif [ -e reason ]; then cat reason >&2; exit 1; fi ;;
    *"import "*)
        for module in $(cat lacks 2>/dev/null); do
            case "$*" in *"$module"*) echo "ImportError: no $module" >&2; exit 1 ;; esac
        done ;;
    *--help*) echo "usage: exp-mnist.py" ;;
    *--fail*groupDRO*) echo "Arguments: none"; exit 2 ;;
    *--late*groupDRO* | *--wait*) trap 'exit 130' INT; touch waiting; /bin/sleep 20; exit 1 ;;
    *--load_model*) if [ -e unfit ]; then exit 1; fi; echo "Summary: {}" ;;
    *exp-mnist.py*)
        previous=
        for argument in "$@"; do
            case $previous in --save_model) models=$argument ;; --seed) seed=$argument ;; esac
            case $argument in --save_model=*) models=${argument#*=} ;; esac
            previous=$argument
        done
        echo "Arguments: $*"
        if [ -e slow ]; then /bin/sleep 0.2; fi
        if [ -n "${models:-}" ]; then
            mkdir -p "$models"
            for repetition in 1 2; do
                echo new >"$models/IRM_MLP_steady_seed${seed}_repetition$repetition.pt"
                echo "Saved: $models/IRM_MLP_steady_seed${seed}_repetition$repetition.pt"
            done
        fi
        echo "Summary: {'seed': $seed}" ;;
    *metric.py*) echo "table: $*" ;;
esac
"""
LOGS = ["ERM_log.txt", "groupDRO_log.txt", "Backdoor_log.txt", "IRM_log.txt", "memristor_log.txt"]
NETWORKS = ["IRM_MLP_steady_seed1234_repetition1.pt", "IRM_MLP_steady_seed1234_repetition2.pt"]


def executable(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def make_python(path, version="Python 3.11.2\n"):
    executable(path, PYTHON)
    (path.parent / "version").write_text(version)


class Clone:
    """A folder with run.sh in it, set up but for MemTorch, whose commands are stand-ins."""

    def __init__(self, folder):
        self.folder = folder
        shutil.copy(ROOT / "requirements.txt", folder)
        script = (ROOT / "run.sh").read_text()  # in which a student writes a number
        executable(folder / "run.sh", re.sub(r"^seed=\d+", "seed=1234", script, flags=re.M))
        for name in ("exp-mnist.py", "memristor.py", "metric.py"):
            (folder / name).touch()
        make_python(folder / ".venv" / "bin" / "python")
        requirements = (ROOT / "requirements.txt").read_text()
        (folder / ".venv" / "installed").write_text("Python 3.11\n" + requirements)
        executable(folder / "bin" / "g++", "#!/usr/bin/env bash\n")

    def start(self, *arguments, script="run.sh", cwd=None, **environment):
        mine = ("CI", "CDPATH", "LOGS", "PYTHON", "SEED")
        variables = {name: value for name, value in os.environ.items() if name not in mine}
        variables["PATH"] = f"{self.folder / 'bin'}:{os.environ['PATH']}"
        command = ["bash", script, *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        options = {"cwd": cwd or self.folder, "env": variables | environment} | pipes
        # A shell that runs the tests in the background has them ignore Ctrl-C.
        options["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
        return subprocess.Popen(command, start_new_session=True, **options)

    def run(self, *arguments, **options):
        return finished(self.start(*arguments, **options))

    def calls(self, word=""):
        """What the stand-in for Python was called with, where it has this word."""
        lines = (self.folder / "calls").read_text().splitlines()
        return [line.strip() for line in lines if word in line]

    def text(self, name):
        return (self.folder / name).read_text()


def finished(process):
    out, err = process.communicate(timeout=60)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def table(*logs):
    return f"table: metric.py {' '.join(logs)}\n"


@pytest.fixture
def clone(tmp_path):
    return Clone(tmp_path)


# The experiments


def test_every_experiment_has_a_log_and_a_row(clone):
    result = clone.run("--no_cuda", "--eta", "0.1")
    assert result.returncode == 0 and result.stdout == table(*LOGS)
    for trainer in ("ERM", "groupDRO", "Backdoor", "IRM"):
        log = clone.text(f"{trainer}_log.txt")
        assert "--seed 1234" in log and f"--no_cuda --eta 0.1 --trainer {trainer}\n" in log
        assert log.endswith("Summary: {'seed': 1234}\n")
    assert clone.text("memristor_log.txt") == "Summary: {}\n"
    assert "run.sh: 5 of 5: .venv/bin/python memristor.py" in result.stderr


def test_the_seed_at_the_top_is_the_one_to_edit(clone):
    text = clone.text("run.sh")
    assert text.count("seed=1234") == 1
    (clone.folder / "run.sh").write_text(text.replace("seed=1234", "seed=0042"))
    clone.run()
    assert clone.text("IRM_log.txt").endswith("Summary: {'seed': 0042}\n")
    clone.run(SEED="2024")
    assert clone.text("IRM_log.txt").endswith("Summary: {'seed': 2024}\n")


@pytest.mark.parametrize("seed", ["学号后四位", "０７３１", "abc", "-1", "1 2"])
def test_a_seed_that_is_no_number_is_refused(clone, seed):
    result = clone.run(SEED=seed)
    (line,) = result.stderr.splitlines()
    assert result.returncode == 2 and line.startswith(f"run.sh: seed={seed}: the last four digits")
    assert not (clone.folder / "calls").exists()


def test_the_crossbars_networks_are_those_that_this_run_saved(clone):
    models = clone.folder / "data" / "models"
    models.mkdir(parents=True)
    (models / "IRM_MLP_seed1234_repetition1.pt").write_text("of an earlier run")
    os.utime(models / "IRM_MLP_seed1234_repetition1.pt", (1e9, 1e9))
    clone.run("--eta", "0.1", "--no_cuda", "--dataset_path", "my data")
    files = " ".join(f"data/models/{name}" for name in NETWORKS)
    expected = rf"memristor.py --no_cuda --dataset_path my\ data --load_model {files}"
    assert clone.calls("--load_model") == [expected]
    assert len(clone.calls("--save_model")) == 1, "the other trainers' networks are not kept"
    clone.run("--dataset_path=other")
    assert clone.calls("--load_model")[1].startswith("memristor.py --dataset_path=other --load")


@pytest.mark.parametrize("arguments", [("--save_model", "my nets"), ("--save_model=my nets",)])
def test_the_users_own_folder_of_networks(clone, arguments):
    assert clone.run(*arguments).returncode == 0
    files = " ".join(rf"my\ nets/{name}" for name in NETWORKS)
    assert clone.calls("--load_model") == [f"memristor.py --load_model {files}"]
    assert not (clone.folder / "data").exists()


def test_a_path_with_spaces_is_said_as_it_can_be_pasted(clone):
    result = clone.run("--dataset_path", "my data")
    assert r"exp-mnist.py --seed 1234 --dataset_path my\ data --trainer ERM" in result.stderr
    assert r"memristor.py --dataset_path my\ data --load_model" in result.stderr


def test_a_hand_in_without_memristor(clone):
    (clone.folder / "memristor.py").unlink()
    result = clone.run()
    assert result.returncode == 0 and result.stdout == table(*LOGS[:4])
    assert "4 of 4" in result.stderr and not clone.calls("memtorch")


def test_a_training_that_fails_ends_it_with_the_table_of_the_rest(clone):
    (clone.folder / "groupDRO_log.txt").write_text("old")
    result = clone.run("--fail")
    assert result.returncode == 2 and result.stdout == table("ERM_log.txt")
    assert clone.text("groupDRO_log.txt") == "old" and not clone.calls("Backdoor")
    assert all(line.startswith("run.sh: ") for line in result.stderr.splitlines()), result.stderr
    assert not [*clone.folder.glob(".*.partial")]


def test_a_crossbar_that_fails_leaves_the_table_of_the_rest(clone):
    (clone.folder / "memristor_log.txt").write_text("old")
    (clone.folder / "unfit").touch()
    result = clone.run()
    assert result.returncode == 1 and result.stdout == table(*LOGS[:4])
    assert clone.text("memristor_log.txt") == "old"


def test_a_log_that_metric_refuses_is_the_runs_failure(clone):
    python = clone.folder / ".venv" / "bin" / "python"
    python.write_text(PYTHON.replace('echo "table: $*"', 'echo "table: $*"; exit 1'))
    assert clone.run().returncode == 1


def test_help_leaves_the_logs(clone):
    (clone.folder / "ERM_log.txt").write_text("old")
    result = clone.run("--help")
    assert result.returncode == 0 and result.stdout == "usage: exp-mnist.py\n"
    assert clone.text("ERM_log.txt") == "old" and not [*clone.folder.glob(".*.partial")]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(("--seed", "5"), "SEED="), (("--seed=5",), "SEED="), (("--trainer", "IRM"), "exp-mnist.py")],
)
def test_what_run_sets_itself_is_refused(clone, arguments, words):
    result = clone.run(*arguments)
    assert result.returncode == 2 and words in result.stderr
    assert not (clone.folder / "ERM_log.txt").exists()


@pytest.mark.parametrize(("flag", "words"), [("--wait", ""), ("--late", "; complete: ERM_log.txt")])
def test_ctrl_c_ends_it_at_once(clone, flag, words):
    process = clone.start(flag)
    for _ in range(300):
        if (clone.folder / "waiting").exists():
            break
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    result = finished(process)
    assert result.returncode == 130 and result.stdout == ""
    assert result.stderr.splitlines()[-1] == f"run.sh: interrupted{words}"
    assert len(clone.calls("exp-mnist.py")) == 1 + (flag == "--late")
    assert not [*clone.folder.glob(".*.partial")]


# Where logs go


def test_logs_elsewhere(clone):
    (clone.folder / "IRM_log.txt").write_text("complete")
    result = clone.run("--iteration", "1", LOGS="my trial")
    trial = clone.folder / "my trial"
    assert result.stdout == table(*[f"my trial/{name}" for name in LOGS])
    assert all((trial / name).exists() for name in LOGS)
    assert sorted(path.name for path in (trial / "models").iterdir()) == NETWORKS
    assert clone.text("IRM_log.txt") == "complete" and not (clone.folder / "data").exists()
    assert not [*clone.folder.glob("**/*.partial")]


def test_a_log_that_another_run_replaces_is_kept_and_that_is_said(clone):
    clone.run()
    complete = {name: clone.text(name) for name in LOGS[:4]}
    assert "is kept" not in clone.run().stderr, "the same logs once more"
    trial = clone.run("--iteration", "1")
    (folder,) = (clone.folder / "data" / "former_logs").iterdir()
    for name, text in complete.items():
        assert (folder / name).read_text() == text != clone.text(name)
        assert f"{name} that was here is kept in data/former_logs/{folder.name}" in trial.stderr


def test_a_log_is_there_at_every_moment_of_its_replacement(clone):
    clone.run()
    mv = '#!/usr/bin/env bash\n[ -e "${@: -1}" ] || touch gap\nexec /bin/mv "$@"\n'
    executable(clone.folder / "bin" / "mv", mv)
    clone.run("--iteration", "1")
    assert "--iteration 1" in clone.text("IRM_log.txt") and not (clone.folder / "gap").exists()


def test_two_runs_at_once_share_nothing_unfinished(clone):
    clone.run()
    (clone.folder / "slow").touch()
    runs = [clone.start(SEED=seed) for seed in ("1", "2")]
    results = [finished(run) for run in runs]
    assert [run.returncode for run in results] == [0, 0], results
    for name in LOGS[:4]:
        log = clone.text(name)
        assert log.count("Arguments") == log.count("Summary") == 1, log
        assert ("--seed 1" in log) == ("'seed': 1}" in log), log
    assert not [*clone.folder.glob(".*.partial")]


def test_cdpath_leads_nowhere_else(clone, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    (other / clone.folder.name).mkdir()
    script = f"{clone.folder.name}/run.sh"
    result = clone.run(script=script, cwd=clone.folder.parent, CDPATH=str(other))
    assert result.returncode == 0 and result.stdout == table(*LOGS)
    assert (clone.folder / "IRM_log.txt").exists()


# MemTorch


def test_a_failed_build_of_memtorch_says_why_and_is_tried_again(clone):
    (clone.folder / "broken").touch()
    (clone.folder / "memristor_log.txt").write_text("old")
    failed = clone.run()
    assert failed.returncode == 0 and failed.stdout == table(*LOGS[:4])
    for words in ("No module named 'memtorch'", "Python.h is missing", "apt install g++"):
        assert words in failed.stderr
    assert "the next run tries again" in failed.stderr
    (clone.folder / "broken").unlink()
    assert clone.run().stdout == table(*LOGS)
    assert len(clone.calls("memtorch-cpu")) == 2
    assert "building" not in clone.run().stderr


def test_memtorch_is_built_with_the_environments_ninja(clone):
    executable(clone.folder / ".venv" / "bin" / "ninja", "#!/usr/bin/env bash\n")
    clone.run()
    assert clone.text("ninja") == f"{clone.folder}/.venv/bin/ninja\n"


def test_a_memtorch_of_another_torch_is_built_again(clone):
    (clone.folder / ".venv" / "bin" / "memtorch").touch()
    reason = "ImportError: memtorch_bindings.so: undefined symbol: _ZN3c10"
    (clone.folder / "reason").write_text(reason + "\n")
    result = clone.run()
    assert f"can't import it ({reason})" in result.stderr
    (build,) = clone.calls("memtorch-cpu")
    assert "--force-reinstall" in build and "--no-deps" in build
    assert f"is built, but can't be imported: {reason}" in result.stderr
    assert result.returncode == 0 and result.stdout == table(*LOGS[:4])


def test_without_a_compiler_all_but_the_crossbar_works(clone, tmp_path_factory):
    path = tmp_path_factory.mktemp("path")
    for folder in filter(os.path.isdir, os.environ["PATH"].split(":")):
        for tool in Path(folder).iterdir():
            if "g++" not in tool.name and not (path / tool.name).is_symlink():
                (path / tool.name).symlink_to(tool)
    result = clone.run(PATH=str(path))
    assert result.returncode == 0 and result.stdout == table(*LOGS[:4])
    assert "there is no g++" in result.stderr and "apt install g++" in result.stderr


# The tests' command


def test_the_tests(clone):
    result = clone.run("test", "-k", "a or b")
    assert result.returncode == 0 and clone.calls("pytest") == [r"-m pytest -k a\ or\ b"]
    assert clone.calls("memtorch-cpu"), "MemTorch is built for them"
    assert clone.run("test", CI="true").returncode == 0


def test_without_memtorch_the_tests_fail_under_ci_only(clone):
    (clone.folder / "broken").touch()
    result = clone.run("test", CI="true")
    assert result.returncode == 1 and "Python.h is missing" in result.stderr
    assert not clone.calls("pytest")
    assert clone.run("test").returncode == 0 and clone.calls("pytest") == ["-m pytest"]


# The environment


def not_set_up(clone):
    (clone.folder / ".venv" / "installed").unlink()
    python3 = '#!/usr/bin/env bash\necho "python3 $*" >>calls\n'
    executable(clone.folder / "bin" / "python3", python3)


def test_the_set_up_is_told_while_it_goes_on(clone):
    not_set_up(clone)
    executable(clone.folder / "bin" / "sleep", "#!/usr/bin/env bash\nexec /bin/sleep 0.3\n")
    (clone.folder / "slow").touch()
    first = clone.run()
    assert first.returncode == 0 and first.stdout == table(*LOGS)
    told = [line for line in first.stderr.splitlines() if ".venv has" in line]
    assert told and told[0].endswith(" MB: Collecting torch") and " s, " in told[0]
    steps = [line for line in first.stderr.splitlines() if "set-up" in line]
    assert "2 of 3" in steps[-2] and "3 of 3" in steps[-1]
    assert "set-up" not in clone.run().stderr and len(clone.calls("pip install -r")) == 1


def test_a_failed_installation_shows_its_end_and_is_tried_again(clone):
    not_set_up(clone)
    (clone.folder / "offline").touch()
    failed = clone.run()
    assert failed.returncode == 1 and failed.stdout == ""
    *_, why, last = failed.stderr.splitlines()
    assert why == "No matching distribution" and "installing requirements.txt failed" in last
    (clone.folder / "offline").unlink()
    assert clone.run().stdout == table(*LOGS)


def test_an_environment_of_other_packages_or_another_python_is_brought_up_to_date(clone):
    clone.run()
    assert not clone.calls("pip install -r")
    with (clone.folder / "requirements.txt").open("a") as file:
        file.write("tomli==2.0.0\n")
    clone.run()
    assert len(clone.calls("pip install -r")) == 1
    (clone.folder / ".venv" / "bin" / "version").write_text("Python 3.14.0\n")
    clone.run()
    assert len(clone.calls("pip install -r")) == 2
    (clone.folder / ".venv" / "bin" / "version").write_text("Python 3.14.1\n")
    clone.run()
    assert len(clone.calls("pip install -r")) == 2


@pytest.mark.skipif(not shutil.which("flock"), reason="there is no flock")
def test_two_first_runs_at_once_set_up_once(clone):
    not_set_up(clone)
    (clone.folder / "slow").touch()
    results = [finished(run) for run in [clone.start(), clone.start(LOGS="other")]]
    assert [run.returncode for run in results] == [0, 0], results
    assert len(clone.calls("pip install -r")) == len(clone.calls("memtorch-cpu")) == 1
    assert "another run sets up" in results[0].stderr + results[1].stderr


def claimed_python(version):
    """A python3 that says to be of this version, and can't make an environment."""
    code = f"import sys; sys.version_info = {version}; exec(sys.argv[1])"
    return f"""#!/usr/bin/env bash
[ "$1" = -c ] && exec '{sys.executable}' -c '{code}' "$2"
exit 1
"""


VERSIONS = [((3, 9, 9), False), ((3, 10, 0), True), ((3, 14, 1), True), ((3, 15, 0), False)]


@pytest.mark.parametrize(("version", "works"), VERSIONS)
def test_only_pythons_that_work(clone, version, works):
    shutil.rmtree(clone.folder / ".venv")
    executable(clone.folder / "bin" / "python3", claimed_python(version))
    result = clone.run()
    last = result.stderr.splitlines()[-1]
    assert result.returncode == 1
    assert ("python3-venv" if works else "not Python 3.10 to 3.14") in last


# PYTHON=


@pytest.fixture
def own_python(clone):
    """A Python of the user's own, that has everything but MemTorch."""
    shutil.rmtree(clone.folder / ".venv")
    path = clone.folder / "my env" / "python"
    make_python(path)
    return str(path)


def test_the_users_own_python_is_used_as_it_is(clone, own_python):
    Path(own_python).with_name("memtorch").touch()
    result = clone.run(PYTHON=own_python)
    assert result.returncode == 0 and result.stdout == table(*LOGS)
    assert not clone.calls("pip") and not (clone.folder / ".venv").exists()
    assert all(line.startswith("run.sh: ") for line in result.stderr.splitlines()), result.stderr


def test_what_the_users_own_python_lacks_is_said_in_one_line(clone, own_python):
    (clone.folder / "lacks").write_text("sklearn tqdm\n")
    result = clone.run(PYTHON=own_python)
    assert result.returncode == 1 and result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert "can't import scikit-learn tqdm (ImportError: no sklearn; ImportError: no tqdm)" in line
    assert line.endswith(r"my\ env/python -m pip install scikit-learn tqdm")
    assert not clone.calls("pip")
    (clone.folder / "lacks").write_text("pytest distributed\n")
    result = clone.run("test", PYTHON=own_python)
    assert result.stderr.endswith("pip install pytest distributed\n") and result.returncode == 1
    assert clone.run(PYTHON=own_python).returncode == 0, "only the tests need these"


def test_without_memtorch_the_users_own_python_does_the_rest(clone, own_python):
    result = clone.run(PYTHON=own_python)
    assert result.returncode == 0 and result.stdout == table(*LOGS[:4])
    line = result.stderr.splitlines()[1]
    assert (
        "no crossbar" in line and "No module named 'memtorch'" in line and "memtorch-cpu==" in line
    )
    assert not clone.calls("pip")


def test_the_users_own_python_of_another_version_is_refused(clone):
    executable(clone.folder / "old", claimed_python((3, 9, 1)))
    result = clone.run(PYTHON="./old")
    (line,) = result.stderr.splitlines()
    assert result.returncode == 1 and "PYTHON=./old is not Python 3.10 to 3.14" in line
    assert clone.run(PYTHON="./nowhere").returncode == 1


# For real

SHEET = ["dataset.py", "exp-mnist.py", "LICENSE", "metric.py", "model.py", "preprocessing.py"]
SHEET += ["register.py", "requirements.txt", "run.sh", "trainer.py"]


def test_a_hand_in_as_the_sheet_lists_it_runs(tmp_path, small_files):
    for name in SHEET:
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(small_files, tmp_path / "data" / "ColoredMNIST")
    command = ["./run.sh", "--no_cuda", "--iteration", "2", "--repetitions", "1"]
    environment = os.environ | {"PYTHON": sys.executable, "SEED": "3"}
    options = {"capture_output": True, "text": True, "check": False}
    result = subprocess.run(command, cwd=tmp_path, env=environment, **options)
    assert result.returncode == 0, result.stderr
    rows = [line for line in result.stdout.splitlines() if "_log.txt" in line]
    assert [row.split()[0] for row in rows] == ["ERM", "groupDRO", "Backdoor", "IRM"]
    assert len([*(tmp_path / "data" / "models").glob("IRM_*seed3_repetition1.pt")]) == 1


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13", "3.14"])
def test_requirements_pin_each_package_once_for_every_python(python):
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pins = {}
    for line in lines:
        if line.startswith("#"):
            continue
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"python_version": python}):
            assert requirement.name not in pins, requirement.name
            (specifier,) = requirement.specifier
            assert specifier.operator == "==", line
            pins[requirement.name] = specifier.version
    names = {Requirement(line).name for line in lines if not line.startswith("#")}
    assert set(pins) == names
    assert int(pins["setuptools"].split(".")[0]) < 82, "what torch 2.11.0 wants"


def test_a_new_log_is_not_lost_where_the_old_one_cannot_be_kept(clone):
    (clone.folder / "ERM_log.txt").write_text("old")
    (clone.folder / "data").mkdir(exist_ok=True)
    (clone.folder / "data" / "former_logs").write_text("a file where the folder should be")
    result = clone.run()
    assert result.returncode != 0 and "ERM_log.txt.new" in result.stderr
    assert clone.text("ERM_log.txt") == "old"
    assert clone.text("ERM_log.txt.new").splitlines()[-1].startswith("Summary: ")


def test_what_killed_runs_left_goes(clone):
    """What runs left that go on stays."""
    gone, running = f".run.{2**22 + 1}.partial", f".run.{os.getpid()}.partial"
    for name in (gone, running):
        (clone.folder / name).write_text("half a log")
    assert clone.run().returncode == 0
    assert not (clone.folder / gone).exists() and (clone.folder / running).exists()
