"""The scripts in benchmarks/, on small data: sweeps and their tables, every script once."""

import ast
import contextlib
import csv
import importlib
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, assert_one_line, assert_refused, require_memtorch, same
from torch.nn import functional as F

import preprocessing
import register
from metric import metrics
from model import MLP, GroupDRO
from trainer import predict, train_repetition, training_parser

SCRIPTS = sorted(path.stem for path in ROOT.glob("benchmarks/*.py") if path.stem != "jobs")
NEEDS_MEMTORCH = ("performance", "robustness")
DATA = "p_f 0.2, p_e 0.1 0.4 0.9"


@pytest.fixture(scope="module", autouse=True)
def small_mnist(tmp_path_factory):
    """Let scripts in this process use 600 of MNIST's digits and run one job at a time."""
    folder = tmp_path_factory.mktemp("mnist")
    with np.load(ROOT / "data" / "mnist.npz") as archive:
        small = {name: archive[name][: 600 if "train" in name else 200] for name in archive}
    np.savez(folder / "mnist.npz", **small)
    trainers = dict(register.TRAINERS)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        patch.setattr(preprocessing, "DATA", folder)
        patch.setenv("LOKY_MAX_CPU_COUNT", "1")
        yield folder
    register.TRAINERS.clear()  # without the controls of results.py
    register.TRAINERS.update(trainers)


@pytest.fixture
def module():
    """Import a script. Skip the test if the script needs MemTorch and MemTorch is missing."""

    def load(name):
        if name in NEEDS_MEMTORCH:
            require_memtorch()
        return importlib.import_module(name)

    return load


@pytest.fixture
def run(in_process, tmp_path):
    """Run a script in this process. Return its output, after success, and its table's rows."""

    def script(name, *arguments):
        files, table = [], tmp_path / "table.csv"
        shown = in_process(name, "--help").stdout
        if "--table" in shown:
            files += ["--table", table]
        if "--figure" in shown:
            files += ["--figure", tmp_path / "figure.png"]
        result = in_process(name, *arguments, *files)
        assert result.returncode == 0, result.stderr
        if "--figure" in shown:
            assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
        return result.stdout, read(table) if "--table" in shown else []

    return script


def read(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def cells(text):
    """Return the cells of the lines of Markdown tables, without the lines of dashes."""
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line] for line in lines]
    return [row for row in rows if set(row) != {"---"}]


def logged(text, name):
    """Return the value in the only line of a log that starts with a name."""
    (line,) = [line for line in text.splitlines() if line.startswith(f"{name}: ")]
    return ast.literal_eval(line.removeprefix(f"{name}: "))


def flags_of(seed, iteration):
    return ["--seed", seed, "--repetitions", 1, "--iteration", iteration, "--no_cuda"]


# Sweeps, in a copy of the project, because their workers are other processes.


VREX = '''
class VREx(ERM):
    """Risk extrapolation: the mean and the weighted variance of L_e over e."""

    def __init__(self, beta: float = 1.0):
        super().__init__()
        self.beta = beta

    def forward(self, network, batch):
        risks = self.risks(network(batch.images), batch)
        return risks.mean() + self.beta * risks.var(unbiased=False)


TRAINERS["VREx"] = VREx
'''


@pytest.fixture(scope="module")
def project(tmp_path_factory, small_mnist):
    """A copy of the project with a user's loss, the flag of this loss, and small data."""
    folder = tmp_path_factory.mktemp("project")
    for path in (*ROOT.glob("*.py"), *ROOT.glob("benchmarks/*.py")):
        (folder / path.relative_to(ROOT)).parent.mkdir(exist_ok=True)
        shutil.copy(path, folder / path.relative_to(ROOT))
    (folder / "data").mkdir()
    shutil.copy(small_mnist / "mnist.npz", folder / "data")
    with open(folder / "register.py", "a", encoding="utf-8") as file:
        file.write(VREX)
    code = (folder / "trainer.py").read_text("utf-8")
    flag = '    add("--beta", type=float, default=1.0)\n    add("--eta"'
    (folder / "trainer.py").write_text(code.replace('    add("--eta"', flag), "utf-8")
    return folder


@pytest.fixture
def start(project):
    """Start a script of the copy, on two cores."""
    started = []

    def process(script, *arguments):
        command = [sys.executable, f"benchmarks/{script}", *map(str, arguments)]
        environment = os.environ | {"LOKY_MAX_CPU_COUNT": "2"}
        environment["GIT_CEILING_DIRECTORIES"] = str(project.parent)
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(
            subprocess.Popen(command, cwd=project, env=environment, start_new_session=True, **pipes)
        )
        return started[-1]

    yield process
    for each in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(each.pid, signal.SIGKILL)
        each.communicate()


def test_killed_sweep_continues_with_the_same_rows(project, start, run):
    """Two rows have a user's loss, which only the copy knows."""
    rows = [
        f"{name} --iteration 10" for name in ("VREx --beta 30", "VREx", "groupDRO_groups", "IRM")
    ]
    table = project / "rows.csv"
    sweep = ("results.py", "--seeds", 1, 2, 3, "--table", table, "--rows", *rows)
    first = start(*sweep)
    end = time.monotonic() + 300
    while not table.exists():
        assert first.poll() is None and time.monotonic() < end
        time.sleep(0.01)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    before = read(table)
    assert 1 <= len(before) < 12

    second = start(*sweep, "--resume")
    out, err = second.communicate(timeout=300)
    assert second.returncode == 0 and err == ""
    after = read(table)
    assert len(after) == 12 and all(row in after for row in before)
    assert [line[:2] for line in cells(out)[1:]] == [
        ["VREx, `--beta 30 --iteration 10`", "3"],
        ["VREx, `--iteration 10`", "3"],
        ["groupDRO_groups, `--iteration 10`", "3"],
        ["IRM, `--iteration 10`", "3"],
    ]
    assert {row["commit"] for row in after} == {""}  # the copy has no git
    assert len({row["auc"] for row in after}) == 12

    _, uninterrupted = run("results", "--seeds", 1, 2, 3, "--rows", *rows[2:])
    for row in (*after, *uninterrupted):
        row["seconds"] = row["commit"] = ""
    assert uninterrupted == [row for row in after if "VREx" not in row["row"]]


# Tables.


def test_an_existing_table_needs_resume(run, in_process, tmp_path):
    _, rows = run("results", "--rows", "ERM --iteration 2", "--seeds", 1)
    table = tmp_path / "table.csv"
    refused = in_process("results", "--rows", "ERM", "--seeds", 2, "--table", table)
    assert_one_line(refused, table, "exists", "--resume", "delete")
    assert read(table) == rows
    table.write_text(table.read_text().replace(rows[0]["test"], "0.125"))
    arguments = ("--rows", "ERM --iteration 2", "--resume", "--seeds")
    out, rows = run("results", *arguments, 1, 2)
    assert [(row["seed"], row["repetition"]) for row in rows] == [("1", "1"), ("2", "1")]
    assert rows[0]["test"] == "0.125" != rows[1]["test"]
    out, _ = run("results", *arguments, 1)  # the report is of the wanted rows
    assert cells(out)[1][1:3] == ["1", "12.5"]


@pytest.mark.parametrize(
    "text", ["data,row\nx,ERM\n", "number,trainer,flags,repetition\n1,IRM,,x\n"]
)
def test_another_table_is_refused(in_process, tmp_path, text):
    table = tmp_path / "table.csv"
    table.write_text(text)
    result = in_process("student_numbers", "--only", 1, "--table", table, "--resume")
    assert_one_line(result, table, "number, trainer, flags, repetition, test, unseen, commit")
    assert table.read_text() == text


def test_a_table_that_cannot_be_written_is_one_line(in_process, tmp_path):
    (tmp_path / "file").touch()
    files = ("--table", tmp_path / "file" / "table.csv")
    result = in_process("results", "--rows", "ERM --iteration 1", "--seeds", 1, *files)
    assert_one_line(result, "cannot write", files[1])


def test_an_unreachable_cluster_is_one_line(in_process, tmp_path):
    address = "nowhere://127.0.0.1:1"
    sweep = ("results", "--rows", "ERM", "--table", tmp_path / "table.csv", "--scheduler", address)
    assert_one_line(in_process(*sweep), address, "--scheduler")


def test_commit_has_a_plus_if_code_differs(module, tmp_path, monkeypatch):
    jobs = module("jobs")
    monkeypatch.setattr(jobs, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert jobs.commit() == ""
    if not shutil.which("git"):
        pytest.skip("there is no git")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e@example.org"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "first"], check=True)
    head = subprocess.check_output([*git, "rev-parse", "HEAD"], text=True)
    (tmp_path / "table.csv").touch()
    assert len(jobs.commit()) >= 7 and head.startswith(jobs.commit())
    (tmp_path / "my_losses.py").touch()
    assert jobs.commit().endswith("+") and head.startswith(jobs.commit()[:-1])


@pytest.mark.parametrize("name", ["results", "student_numbers", "paper_table"])
def test_tables_of_the_project_are_readable(module, name):
    jobs, script = module("jobs"), module(name)
    table = jobs.Table(ROOT / "figures" / f"{name}.csv", script.COLUMNS)
    assert len(table.rows) >= 30
    assert all(row["commit"] and "--steady" not in row.values() for row in table.rows)
    with open(table.path, encoding="utf-8") as file:
        assert file.readline().strip() == ",".join(table.columns)
    if name == "results":
        assert {row["data"] for row in table.rows if row["seed"] >= 40000} >= {DATA}
        backdoor = jobs.select(table.rows, row="Backdoor --adjustment weights", data=DATA)
        assert sorted(row["seed"] for row in backdoor) == list(range(40000, 40010))
    if name == "student_numbers":
        letter = jobs.select(table.rows, flags="")
        assert len(letter) == 2 * 3 * len({row["number"] for row in letter}) == 1800


def test_default_files_are_ignored_by_git(module):
    args = module("jobs").script_parser("", "f.png", "t.csv").parse_args([])
    assert args.figure.parent == args.table.parent == ROOT / "data" / "figures"


# Each script.


@pytest.mark.parametrize("name", SCRIPTS)
def test_help(module, in_process, name):
    text = in_process(name, "--help").stdout
    assert text.startswith(f"usage: {name}")
    assert module(name).__doc__.split("\n")[0] in text
    assert f"python benchmarks/{name}.py" in text


@pytest.mark.parametrize("name", ["curves", "performance", "robustness", "student_numbers"])
def test_flags_that_are_passed_on_are_checked_first(module, in_process, tmp_path, name):
    module(name)
    assert_refused(in_process(name, "--itteration", 3), "--itteration")
    assert_one_line(in_process(name, "--save_model", tmp_path), "--save_model", "Leave it out")
    assert_one_line(in_process(name, f"--dataset_path={tmp_path}"), "--dataset_path")


@pytest.mark.parametrize("row", ["", "VREx", "IRM --itteration 3", "ERM --eta -1"])
def test_a_row_is_parsed_before_the_first_job(in_process, tmp_path, row):
    sweep = ("results", "--rows", "ERM", row, "--table", tmp_path / "table.csv")
    assert_refused(in_process(*sweep))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flag", ["--seed 5", "--seed=5", "--save_model d", "--dataset_path d"])
def test_a_row_cannot_set_everything(in_process, tmp_path, flag):
    sweep = ("results", "--rows", f"ERM {flag}", "--table", tmp_path / "table.csv")
    assert_one_line(in_process(*sweep), flag.split("=")[0].split()[0])


def test_an_unused_flag_of_a_row_gives_a_warning(in_process, tmp_path):
    sweep = ("results", "--rows", "IRM --iteration 1 --eta 3", "--seeds", 1)
    result = in_process(*sweep, "--table", tmp_path / "table.csv")
    assert_one_line(result, "warning", "--eta", status=(0,))


def test_results_are_the_same_as_the_command_prints(run, in_process, tmp_path):
    """Test the columns against exp-mnist.py with the same flags, and with other data."""
    row = "IRM --iteration 5 --reg_lambda 2"
    generation = ("--p_f", 0.25, "--p_e", 0.2, 0.1, 0.8)
    out, (result,) = run("results", "--rows", row, "--seeds", 6, *generation)
    assert (result["data"], result["row"]) == ("p_f 0.25, p_e 0.2 0.1 0.8", row)
    assert f"Data: {result['data']}" in out
    generate = in_process("preprocessing", "--seed", 6, *generation, "--dataset_path", tmp_path)
    assert generate.returncode == 0
    flags = [*flags_of(6, 5), "--reg_lambda", 2, "--dataset_path", tmp_path]
    log = in_process("exp-mnist.py", "--trainer", "IRM", *flags).stdout
    columns = {"Accuracy": "test", "AUC": "auc", "F1_macro": "f1_macro"}
    test_result = {metric: float(result[name]) for metric, name in columns.items()}
    assert logged(log, "Test result") == test_result
    groups = logged(log, "Group accuracy")
    assert len(groups) == 4 and min(groups.values()) == float(result["worst_group"])
    assert result["unseen"] != result["test"] and 0 < float(result["seconds"]) < 60


def test_flip_rate(module):
    """It is 1 if only the colour counts, and 0 if the colours are hidden."""
    measure = module("results").measure
    for row, rate in (("ERM --iteration 20", 1), ("ERM --iteration 20 --grayscale", 0)):
        ((*_, flip_rate, _),) = measure(row, 1, 1, 0.0, (0.0, 0.0, 0.0))
        assert flip_rate == rate


def test_unseen_digits_have_the_test_environments_probabilities(run):
    """ERM learns the colour, which here equals the label, also for the unseen digits."""
    arguments = ("--rows", "ERM --iteration 20", "--seeds", 1, "--p_f", 0, "--p_e", 0, 0)
    _, (result,) = run("results", *arguments, 0)
    assert float(result["unseen"]) == float(result["test"]) == 1


def test_trainings_of_a_row(run, module, monkeypatch):
    """Without --seeds, a row has the three trainings of the command."""
    monkeypatch.setattr(module("results"), "ROWS", ("ERM --iteration 1",))
    out, rows = run("results")
    assert [(row["seed"], row["repetition"]) for row in rows] == [("1234", n) for n in "123"]
    accuracies = [100 * float(row["test"]) for row in rows]
    (line,) = cells(out)[1:]
    assert line[1:3] == ["3", f"{np.mean(accuracies):.1f} ± {np.std(accuracies):.1f}"]
    rows = ("--rows", "ERM --iteration 1", "ERM --iteration 1 --repetitions 2", "--resume")
    out, _ = run("results", *rows, "--seeds", 1, 2)
    assert [line[1] for line in cells(out)[1:]] == ["2", "4"]


def test_control_losses(module, small_files):
    results = module("results")
    samples = module("dataset").load_data(small_files.parent, 3).training
    torch.manual_seed(0)
    network, batch = MLP(), samples.batch()
    losses = F.binary_cross_entropy_with_logits(
        network(batch.images), batch.labels, reduction="none"
    )
    train2 = results.TRAINERS["ERM_train2"]()(network, batch)
    assert torch.isclose(train2, losses[batch.envs == 1].mean())
    loss = results.TRAINERS["groupDRO_groups"](eta=0.5)
    risks = [
        losses[(batch.labels == label) & (batch.colors == color)].mean()
        for label in (0, 1)
        for color in (0, 1)
    ]
    q = torch.stack([0.25 * (0.5 * risk).exp() for risk in risks]).detach()
    q /= q.sum()
    assert torch.isclose(loss(network, batch), sum(q * torch.stack(risks)))
    assert torch.allclose(loss.q, q) and isinstance(loss, GroupDRO)


NUMBERS = """number,trainer,flags,repetition,test,unseen,commit
1,IRM,,1,0.63,0.73,abc
1,IRM,,2,0.64,0.74,abc
2,IRM,,1,0.55,0.75,abc
2,IRM,,2,0.56,0.76,abc
3,IRM,,1,0.67,0.77,abc
3,IRM,,2,0.68,0.78,abc
1,groupDRO,--bias,1,0.7,0.71,abc
"""


def test_report_and_figure_of_student_numbers(module, tmp_path, capsys):
    table = tmp_path / "numbers.csv"
    table.write_text(NUMBERS)
    numbers = module("student_numbers")
    rows = numbers.Table(table, numbers.COLUMNS).rows
    numbers.report(rows)
    _, bias, _, irm, unseen = cells(capsys.readouterr().out)
    assert bias[:4] == ["groupDRO, `--bias`", "test environment", "1", "70.0"]
    # The student IDs have 63.5, 55.5 and 67.5 %.
    assert irm[:6] == ["IRM", "test environment", "3", "62.2", "33.3%", "55.5 (0002)"]
    assert irm[6:] == ["55.7 to 67.4", "55.0 (0002)", "5.0"]
    assert unseen[:6] == ["IRM", "unseen digits", "3", "75.5", "0.0%", "73.5 (0001)"]
    axes = numbers.draw(rows).axes
    assert ["--bias" in axis.get_title() for axis in axes] == [False, False, True, True]
    heights = [sum(bar.get_height() for bar in axis.patches) for axis in axes]
    assert heights == [3, 3, 1, 1]
    assert axes[0].texts[0].get_text() == "IRM, worst of 3:\nID 0002, 55.5 %"


def test_student_numbers_are_chosen_among_those_that_nobody_looked_at(module):
    numbers = module("student_numbers")
    chosen = numbers.chosen_numbers(9000)
    assert len(set(chosen)) == 9000 and chosen[:2] == numbers.chosen_numbers(2)
    rows = read(ROOT / "figures" / "student_numbers.csv")
    assert {int(row["number"]) for row in rows} == set(chosen[:300])


def test_curves_end_where_the_command_does(run, in_process, tmp_path):
    out, _ = run("curves", "--seed", 5, "--every", 4, "--iteration", 8)
    lines = {line[0]: line[1:] for line in cells(out)[1:]}
    assert list(lines) == list(register.TRAINERS)
    command = ("exp-mnist.py", "--trainer", "IRM", *flags_of(5, 8), "--dataset_path", tmp_path)
    accuracy = logged(in_process(*command).stdout, "Test result")["Accuracy"]
    assert lines["IRM"][0] == "8" and lines["IRM"][3] == f"{100 * accuracy:.1f}"


def test_curves_have_points_from_step_0(module):
    curves = module("curves")
    points = curves.curve("ERM", 5, 4, "--iteration 10")
    assert [point[0] for point in points] == [0, 4, 8]
    assert points[-1][1] > 80 and points[-1][3] < 20  # it learns the colour
    axes = curves.draw({"ERM": points, "IRM": points[:2]}).axes
    assert [axis.get_title() for axis in axes] == ["ERM", "IRM"]
    assert list(axes[0].lines[2].get_ydata()) == [point[3] for point in points]


def test_stuck(run, module, monkeypatch):
    stuck = module("stuck")
    monkeypatch.setattr(stuck, "TRAINING", "IRM --iteration 6 --evaluation_steps 2")
    monkeypatch.setattr(stuck, "MARKED_AT", 2)

    def with_zeros(network, samples):  # and with positive and negative logits
        logits = predict(network, samples)
        logits = logits - logits.median()
        return torch.where(logits.abs() < logits.abs().median(), 0, logits)

    monkeypatch.setattr(stuck, "predict", with_zeros)
    number = "5"
    out, rows = run("stuck", "--only", number)
    assert [(row["number"], row["repetition"], row["iteration"]) for row in rows] == [
        (number, repetition, iteration) for repetition in "123" for iteration in "0246"
    ]
    assert sorted({line[0] for line in cells(out)[1:]}) == ["2", "4", "6"]
    args = training_parser().parse_args(["--trainer", "IRM", "--iteration", "6"])
    args.seed = int(number)
    data = module("jobs").fresh_data(args.seed)
    network, *_ = train_repetition(args, data, 2)
    logits = with_zeros(network, data.test)
    assert rows[7]["accuracy"] == str(metrics(logits, data.test.labels)["Accuracy"])
    assert float(rows[7]["zero_logits"]) == (logits == 0).double().mean()
    positive = [(logits[data.test.colors == z] > 0).double().mean() for z in (0, 1)]
    assert float(rows[7]["positive_logits"]) == min(positive)


def test_stuck_figure(module, capsys):
    """One training stays stuck, one becomes free, one was never stuck."""
    stuck = module("stuck")
    rows = []
    accuracies = {3: (0.5, 0.4, 0.5, 0.5), 4: (0.5, 0.58, 0.62, 0.7), 5: (0.5, 0.62, 0.7, 0.7)}
    for number, values in accuracies.items():
        for iteration, accuracy in zip((0, 400, 800, 1200), values, strict=True):
            row = {"number": number, "repetition": 1, "iteration": iteration}
            row |= {"zero_logits": 1 - accuracy, "positive_logits": accuracy / 2}
            rows.append(row | {"accuracy": accuracy})
    stuck.report(rows)
    assert cells(capsys.readouterr().out)[1:] == [
        ["400", "2 below 60 %", "49.0", "40.0", "42.0 to 60.0", "20.0 to 29.0"],
        ["400", "1 others", "62.0", "62.0", "38.0 to 38.0", "31.0 to 31.0"],
        ["800", "1 below 60 %", "50.0", "50.0", "50.0 to 50.0", "25.0 to 25.0"],
        ["800", "2 others", "66.0", "62.0", "30.0 to 38.0", "31.0 to 35.0"],
        ["1200", "1 below 60 %", "50.0", "50.0", "50.0 to 50.0", "25.0 to 25.0"],
        ["1200", "2 others", "70.0", "70.0", "30.0 to 30.0", "35.0 to 35.0"],
    ]
    figure = stuck.draw(rows)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "other trainings: 1",
        "trainings below 60 % after 400 iterations: 2, of these above 60 % after 1200: 1",
    ]
    expected = [50, 40, 50, 50], [50, 60, 50, 50], [25, 20, 25, 25]
    for axis, shown in zip(figure.axes, expected, strict=True):
        curves = [line for line in axis.lines if len(line.get_xdata()) == 4]
        assert [line.get_color() for line in curves] == ["silver", "tab:red", "tab:red"]
        assert curves[1].get_ydata() == pytest.approx(shown)


def test_robustness(run, module, monkeypatch, in_process, tmp_path):
    """Crossbars are the same as memristor.py's with the same flags, plain and hardened."""
    robustness = module("robustness")
    names = ("crossbar", "20 % on", "2-bit ADCs")
    few = {name: robustness.CONDITIONS[name] for name in names}
    monkeypatch.setattr(robustness, "CONDITIONS", few)
    monkeypatch.setattr(robustness, "PRINTED", names)
    monkeypatch.setattr(robustness, "PATTERNS", 2)
    panels = {"on": {0: "crossbar", 20: "20 % on"}, "bits": {"2": "2-bit ADCs"}}
    monkeypatch.setattr(robustness, "PANELS", panels)
    flags = ("--iteration", 8, "--hidden_dim", 16, "--repetitions", 1, "--grayscale")
    out, rows = run("robustness", "--trainers", "Backdoor", "--seeds", 5, *flags)
    kinds = ("plain", "hardened", "limit only", "faults only")
    found = {(row["kind"], row["condition"], row["pattern"]): row for row in rows}
    assert len(found) == len(rows) == 4 * 5
    command = ("memristor.py", "--trainer", "Backdoor", *flags, "--seed", 5, "--no_cuda")
    command += ("--dataset_path", tmp_path, "--fault_seed", 1, "--lrs_proportion", 0.2)
    for kind, more in (("plain", ()), ("hardened", ("--harden",))):
        log = in_process(*command, *more).stdout
        digital = logged(log, "Test result")["Accuracy"]
        assert float(found[kind, "digital", "0"]["accuracy"]) == digital
        on_crossbar = logged(log, "Crossbar test result")["Accuracy"]
        assert float(found[kind, "20 % on", "1"]["accuracy"]) == on_crossbar
    currents = {kind: float(found[kind, "crossbar", "0"]["current"]) for kind in kinds}
    assert currents["plain"] == 1 < currents["limit only"] and len(set(currents.values())) == 4
    assert {row["flags"] for row in rows} == {" ".join(map(str, flags))}
    accuracies, losses = cells(out)[1:5], cells(out)[6:]
    assert [line[1] for line in accuracies] == [line[1] for line in losses] == list(kinds)
    both = [100 * float(found["plain", "20 % on", pattern]["accuracy"]) for pattern in "01"]
    assert accuracies[0][5] == f"{np.mean(both):.1f} ({min(both):.1f})"
    lost = [100 * float(found["plain", "digital", "0"]["accuracy"]) - value for value in both]
    assert losses[0][3] == f"{np.mean(lost):.1f} ({max(lost):.1f})"


def test_robustness_has_every_condition(module):
    robustness = module("robustness")
    drawn = {name for panel in robustness.PANELS.values() for name in panel.values()}
    assert drawn | set(robustness.PRINTED) == set(robustness.CONDITIONS)
    parameters = set().union(*robustness.CONDITIONS.values())
    assert parameters <= set(module("memristor").to_crossbar.__kwdefaults__)


def test_paper_table(run, module, monkeypatch):
    paper = module("paper_table")
    monkeypatch.setitem(paper.GENERATION, "sizes", (240, 240, 100))
    for name, protocol in paper.PROTOCOLS.items():
        monkeypatch.setitem(paper.PROTOCOLS, name, protocol._replace(steps=20))
    out, rows = run("paper_table", "--draws", 2)
    for line, (name, published) in zip(cells(out)[1:], paper.PUBLISHED.items(), strict=True):
        values = [float(row["accuracy"]) for row in rows if row["row"] == name]
        assert line[:2] == [name, published] and line[3] == "2"
        assert line[2] == f"{np.mean(values):.1f} ± {np.std(values):.1f}"
    assert max(float(row["accuracy"]) for row in rows if row["row"] == "ERM") < 40


@pytest.fixture
def paper_data(small_files, module):
    return module("dataset").load_data(small_files.parent, 3).training


@pytest.mark.parametrize("row", ["IRM", "ERM", "grayscale"])
def test_the_papers_protocol(module, monkeypatch, paper_data, row):
    """Compare with the paper's formulas, written here a second time."""
    paper = module("paper_table")
    monkeypatch.setattr(paper, "ANNEALED", 4)
    monkeypatch.setattr(paper, "REG_LAMBDA", 50.0)
    protocol = paper.PROTOCOLS[row]._replace(steps=8, hidden_dim=20)
    ours = paper.paper_training(protocol, paper.paper_batch(paper_data), seed=1)

    images = paper_data.images[:, :, ::2, ::2] / 255
    images = images.amax(1).flatten(1) if protocol.grayscale else images.flatten(1)
    torch.manual_seed(1)
    start = paper.PaperNetwork(20, protocol.grayscale).phi
    for layer in start[1::2]:
        bound = math.sqrt(6 / sum(layer.weight.shape))  # Glorot's
        assert 0.8 * bound < layer.weight.abs().max() <= bound and not layer.bias.any()
    parameters = list(start.parameters())
    penalty_weight, l2 = 1.0, protocol.weight_decay / 2
    optimizer = torch.optim.Adam(parameters, protocol.learning_rate)
    for step in range(8):
        risks, penalties = [], []
        logits = start(images).squeeze(1)
        for env in (0, 1):
            chosen = paper_data.envs == env
            logit, label = logits[chosen], paper_data.labels[chosen]
            risks.append(F.binary_cross_entropy_with_logits(logit, label))
            slope = ((torch.sigmoid(logit) - label) * logit).mean()
            penalties.append(slope**2)
        objective = sum(risks) / 2 + l2 * sum(p.square().sum() for p in parameters)
        if row == "IRM":
            penalty_weight = 50.0 if step >= 4 else 1.0
            objective = objective + penalty_weight * sum(penalties) / 2
        if penalty_weight > 1:
            objective = objective / penalty_weight
        optimizer.zero_grad()
        objective.backward()
        optimizer.step()
    for name, weight in start.state_dict().items():
        assert torch.allclose(ours.phi.state_dict()[name], weight, atol=2e-5), name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_the_papers_protocol_on_a_gpu(module, paper_data):
    paper = module("paper_table")
    protocol = paper.PROTOCOLS["IRM"]._replace(steps=8, hidden_dim=20)
    batch = paper.paper_batch(paper_data)
    network = paper.paper_training(protocol, paper.paper_batch(paper_data.to("cuda")), seed=1)
    assert all(parameter.is_cuda for parameter in network.parameters())
    expected = paper.paper_training(protocol, batch, seed=1)(batch.images)
    assert torch.allclose(network.cpu()(batch.images), expected, atol=1e-3)


def test_paper_table_without_a_gpu(in_process):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert_one_line(in_process("paper_table", "--cuda"), "--cuda", "GPU")


def test_performance(run, module, monkeypatch):
    performance = module("performance")
    monkeypatch.setattr(performance, "products", lambda count: time.sleep(0.1))
    flags = ("--repetitions", 1, "--iteration", 1, "--grayscale", "--hidden_dim", 2)
    out, _ = run("performance", "--runs", 1, *flags)
    command, generation, theirs, ours = cells(out)[1:]
    assert command[0].startswith("`exp-mnist.py --trainer IRM --no_cuda --repetitions 1")
    seconds = float(command[2].split()[0])
    assert float(command[1].split()[0]) == pytest.approx(seconds / 0.1, rel=0.1)
    assert float(command[3]) > 200 and float(generation[2]) < seconds
    parts = [float(part) for part in theirs[2].split("(")[1].rstrip(")").split(" + ")]
    assert float(theirs[2].split()[0]) == pytest.approx(sum(parts), abs=0.02)
    assert ours[1].startswith("1 / ") and out.splitlines()[-1].startswith("Machine: ")


def test_samples(run, module):
    out, _ = run("samples", "--seed", 5)
    assert [line[:2] for line in cells(out)[1:]] == [
        [name, "200"] for name in ("train1", "train2", "test")
    ]
    samples = module("samples")
    data = module("jobs").fresh_data(5)
    axes = samples.draw(data).axes
    for place, axis in enumerate(axes):
        env, index = divmod(place, samples.COLUMNS)
        of_env = samples.environment(data, env)
        assert axis.get_title() == f"y = {int(of_env.labels[index])}"
        shown = torch.from_numpy(axis.images[0].get_array().data)
        assert torch.equal(shown[..., :2].movedim(2, 0), of_env.images[index])


def test_document_recipe(run, module):
    recipe = module("document_recipe")
    data = module("jobs").fresh_data(5, **recipe.GENERATION)
    train1 = data.training[data.training.envs == 0]
    balanced = recipe.balanced(train1)
    for color in (0, 1):
        of_color = balanced[balanced.colors == color]
        assert of_color.labels.mean() == 0.5
        for label in (0, 1):
            group = train1[(train1.colors == color) & (train1.labels == label)]
            repeated = of_color[of_color.labels == label]
            assert same(repeated[: len(group)], group)
    out, _ = run("document_recipe", "--epochs", 2)
    assert [line[0] for line in cells(out)[1:]] == ["1", "2"]
