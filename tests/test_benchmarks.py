"""Every script of benchmarks/ runs once, small; sweeps are killed, gone on with, and spread.

All of it in a copy of the project that draws small environments, with its own kept results.
"""

import contextlib
import csv
import importlib
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from ast import literal_eval
from pathlib import Path
from statistics import fmean

import pytest
import torch
from conftest import ROOT, assert_one_line, assert_refused, require_memtorch
from PIL import Image, ImageChops
from torch.nn import functional as F

import register
from dataset import load_dataset, unseen_samples
from model import IRM
from preprocessing import UserError, draw_environments

ENVIRONMENT = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
SCRIPTS = sorted(path.name for path in ROOT.glob("benchmarks/*.py") if path.name != "jobs.py")
NUMBERS = ("benchmarks/student_numbers.py", "--numbers", "4", "--iteration", "5")
JOBS = 8  # of that sweep: two trainers
SMALLER = (
    ("preprocessing.py", "(20000, 20000, 20000)", "(700, 700, 700)"),
    ("benchmarks/paper_table.py", "(25000, 25000, 10000)", "(300, 300, 200)"),
    ("benchmarks/performance.py", "(50, 1200)", "(1, 2)"),
    ("benchmarks/performance.py", "tile_shape=(128, 128)", "tile_shape=(128, 16)"),
)


@pytest.fixture(autouse=True)
def benchmarks_on_the_path(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("project")
    for path in (*ROOT.glob("*.py"), *ROOT.glob("benchmarks/*.py")):
        copy = folder / path.relative_to(ROOT)
        copy.parent.mkdir(exist_ok=True)
        shutil.copy(path, copy)
    (folder / "data").mkdir()
    (folder / "data" / "mnist.npz").symlink_to(ROOT / "data" / "mnist.npz")
    for name, text, small in SMALLER:
        code = (folder / name).read_text()
        assert text in code
        (folder / name).write_text(code.replace(text, small))
    return folder


@pytest.fixture
def start(project):
    """Start a process in the project; all of them are gone after the test."""
    with starter(project) as run:
        yield run


@contextlib.contextmanager
def starter(project, **variables):
    started = []

    def run(*arguments):
        command = [sys.executable, *map(str, arguments)]
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        session = {"start_new_session": True, "env": ENVIRONMENT | variables, "cwd": project}
        started.append(subprocess.Popen(command, **options, **session))
        return started[-1]

    yield run
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its own workers as well
        process.communicate()


def kept(project: Path) -> dict[Path, int]:
    """The results that are kept, and when each was written."""
    return {path: path.stat().st_mtime_ns for path in project.glob("data/jobs/**/output.pkl")}


def wait_for(condition, seconds: float = 300):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def finish(process) -> str:
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    return out


def read(path: Path) -> list[dict]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def cells(line: str) -> list[str]:
    """Those of a row of a table in Markdown."""
    return [cell.strip() for cell in line.strip("|\n ").split("|")]


# Sweeps


@pytest.fixture(scope="module")
def swept(project):
    """The table of a sweep that was killed and started again."""
    shutil.rmtree(project / "data" / "jobs", ignore_errors=True)  # what other tests kept
    with starter(project) as start:
        first = start(*NUMBERS, "--table", "swept.csv")
        wait_for(lambda: len(kept(project)) >= 2)
        first.kill()
        first.wait()
        before = kept(project)
        assert 2 <= len(before) < JOBS
        out = finish(start(*NUMBERS, "--table", "swept.csv", "--figure", "swept.png"))
        after = kept(project)
    assert len(after) == JOBS and after.items() >= before.items()
    return out, (project / "swept.csv").read_text()


def test_killed_sweep_goes_on(swept):
    out, table = swept
    lines = table.splitlines()
    assert lines[0] == "number,trainer,protocol,repetition,test,unseen,commit"
    assert len(lines) == 1 + 3 * JOBS
    rows = [cells(line) for line in out.splitlines() if line.startswith("| ")][2:]
    assert [row[:3] for row in rows] == [
        [f"{trainer}, letter --iteration 5", environment, "4"]
        for trainer in ("groupDRO", "IRM")
        for environment in ("test environment", "unseen digits")
    ]


def test_cluster_that_loses_a_worker_gives_the_same_table(project, start, swept):
    shutil.rmtree(project / "data" / "jobs")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    dask = ("-m", "distributed.cli.dask_scheduler")
    start(*dask, "--host", address, "--no-dashboard")
    dask = ("-m", "distributed.cli.dask_worker", address, "--nthreads", "1", "--no-nanny")
    both = [start(*dask, "--no-dashboard", "--local-directory", f"dask{n}") for n in (1, 2)]
    files = ("--table", "cluster.csv", "--figure", "cluster.png")
    sweep = start(*NUMBERS, *files, "--scheduler", address)
    wait_for(lambda: len(kept(project)) >= 2)
    both[0].kill()
    assert len(kept(project)) < JOBS
    out, table = swept
    assert finish(sweep).replace("cluster", "swept") == out
    assert (project / "cluster.csv").read_text() == table


def test_a_scheduler_that_is_not_there_is_one_line(in_process, tmp_path):
    files = ("--table", tmp_path / "t.csv", "--figure", tmp_path / "f.png")
    where = ("--scheduler", "nowhere://127.0.0.1:1")
    result = in_process("student_numbers.py", *SHORT["student_numbers.py"], *files, *where)
    assert_one_line(result, "nowhere")


def test_kept_results_outlive_a_comment():
    logic = importlib.import_module("jobs").logic
    code = 'def f(x):\n    """What."""\n    return x + 1\n'
    assert logic(code) == logic('"""Doc."""\ndef f(x):  # why\n\n    return (x + 1)\n')
    assert logic(code) != logic(code.replace("1", "2"))


def test_no_script_changes_what_a_worker_computes_after_it(monkeypatch, tmp_path):
    jobs = importlib.import_module("jobs")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "doubling.py").write_text("def double(x):\n    return 2 * x\n")
    doubling = importlib.import_module("doubling")
    key = ("doubling", "double", jobs.version(doubling.double), "(21,)")
    settings = (torch.get_default_dtype, torch.get_float32_matmul_precision)
    before = [setting() for setting in settings]
    for script in SCRIPTS:
        if script not in ("robustness.py", "performance.py") or memtorch_is_there():
            importlib.import_module(script.removesuffix(".py"))
    assert jobs.perform(key, (21,)) == (key, (21,), 42)
    assert [setting() for setting in settings] == before
    with pytest.raises(UserError, match="another version"):
        jobs.perform((*key[:2], "of another day", key[3]), (21,))
    monkeypatch.setitem(register.TRAINERS, "ERM", IRM)
    with pytest.raises(UserError, match="register.TRAINERS"):
        jobs.perform(key, (21,))


def memtorch_is_there() -> bool:
    return importlib.util.find_spec("memtorch") is not None


# Each script once. One process runs them all, in turn, as a worker that outlives a sweep would.

DRIVER = """
import contextlib, importlib, io, json, sys, traceback

sys.path.insert(0, "benchmarks")
sys.path.insert(0, ".")
outcomes = {}
for name, (script, *arguments) in json.load(open("runs.json")).items():
    out, error, sys.argv = io.StringIO(), "", [script, *arguments]
    try:
        with contextlib.redirect_stdout(out):
            importlib.import_module(script).main()
    except BaseException:
        error = traceback.format_exc()
    outcomes[name] = out.getvalue(), error
json.dump(outcomes, open("outcomes.json", "w"))
"""
TRAINING = ("--iteration", "8", "--learning_rate", "0.01", "--hidden_dim", "16", "8")
SEED = ("--seed", "5", "--repetitions", "1")
RUNS = {
    "command": ("exp-mnist", "--trainer", "IRM", "--no_cuda", *TRAINING, *SEED),
    "steady": ("exp-mnist", "--trainer", "IRM", "--no_cuda", "--steady", *TRAINING, *SEED),
    "results": ("results", "--rows", "IRM", "Backdoor --network CNN", "--seeds", "5", "6"),
    "curves": ("curves", "--seed", "5", "--every", "4"),
    "student_numbers": ("student_numbers", "--only", "5", "--repetitions", "1", "--resume"),
    "samples": ("samples", "--seed", "5"),
    "paper_table": ("paper_table", "--steps", "30", "--draws", "2"),
}
BROKEN = ("--trainer", "ERM", "--no_cuda", "--fault_seed", "1", "--lrs_proportion")
CROSSBAR_RUNS = {
    "plain": ("memristor", *BROKEN, "0.2", *TRAINING, *SEED),
    "hardened": ("memristor", *BROKEN, "0.2", *TRAINING, *SEED, "--harden"),
    "robustness": ("robustness", "--trainers", "ERM", "--repetitions", "1", "--seed", "5")
    + ("--patterns", "2", "--conditions", "crossbar", "20 % on", "2-bit ADCs")
    + ("--curves", "adc_resolution"),
    "performance": ("performance", "--runs", "1", "--repetitions", "1", "--test_samples", "20")
    + ("--grayscale", "--against", "another"),
}
TRAINED = ("results", "curves", "student_numbers", "robustness", "performance")


@pytest.fixture(scope="module")
def outcomes(project):
    """What each of the runs printed, and its error."""
    another = project / "another"  # a checkout that takes a second and draws in no time
    another.mkdir()
    (another / "exp-mnist.py").write_text("import time\ntime.sleep(1)\n")
    drawing = "from pathlib import Path\ndef draw_environments(path): pass\n"
    (another / "preprocessing.py").write_text(drawing)
    table = "number,trainer,protocol,repetition,test,unseen,commit\n"
    protocol = " ".join(("letter", "--repetitions", "1", *TRAINING))
    row = f"5,IRM,{protocol},1,0.125,0.25,old\n"
    (project / "student_numbers.csv").write_text(table + row)
    runs = RUNS | (CROSSBAR_RUNS if memtorch_is_there() else {})
    for name in TRAINED:
        if name in runs:
            runs = runs | {name: (*runs[name], *TRAINING)}
    for name in ("results", "student_numbers", "paper_table", "robustness"):
        if name in runs:
            runs = runs | {name: (*runs[name], "--table", f"{name}.csv")}
    (project / "runs.json").write_text(json.dumps(runs))
    with starter(project, LOKY_MAX_CPU_COUNT="1") as start:  # in the process itself
        finish(start("-c", DRIVER))
    return json.loads((project / "outcomes.json").read_text())


@pytest.fixture
def printed(outcomes):
    """The lines that a run printed; fails if the run did."""

    def of(name: str) -> list[str]:
        if name in CROSSBAR_RUNS:
            require_memtorch()
        out, error = outcomes[name]
        assert not error, error
        return out.splitlines()

    return of


def logged(lines: list[str], name: str):
    """The value in a log's only line of that name."""
    (line,) = [line for line in lines if line.startswith(f"{name}: ")]
    return literal_eval(line.removeprefix(f"{name}: "))


def looked_at(path: Path) -> Image.Image:
    """A figure that was written: some thousand pixels of it are neither white nor black."""
    with Image.open(path) as file:
        image = file.convert("RGB")
    saturation = image.convert("HSV").getchannel("S")
    assert sum(saturation.histogram()[128:]) > 1000
    return image


def test_results(project, printed):
    """A row is what the command prints with its flags; the CNN is trained once."""
    lines = printed("results")
    rows = read(project / "results.csv")
    kinds = [(row["row"], row["protocol"], row["seed"]) for row in rows]
    assert kinds == [
        ("Backdoor --network CNN", "letter", "5"),
        *[("IRM", protocol, seed) for protocol in ("letter", "steady") for seed in "56"],
    ]
    assert all(row["commit"] == "" and row["repetition"] == "1" for row in rows)
    for row, run in ((rows[1], "command"), (rows[3], "steady")):
        log = printed(run)
        scores = {"Accuracy": "test", "AUC": "auc", "F1_macro": "f1_macro"}
        assert logged(log, "Test result") == {m: float(row[name]) for m, name in scores.items()}
        assert logged(log, "Worst group") == float(row["worst_group"])
        assert logged(log, "Flip rate") == float(row["flip_rate"])
        assert 0 < float(row["seconds"]) < 60
        assert abs(float(row["unseen"]) - float(row["test"])) < 0.1 and row["unseen"] != row["test"]
    assert rows[1]["test"] != rows[3]["test"]
    (header, *shown) = [cells(line) for line in lines if line.startswith("| ")]
    (letter,) = [row for row in shown if row[:2] == ["IRM", "letter"]]
    values = [100 * float(row["test"]) for row in rows[1:3]]
    spread = abs(values[0] - values[1]) / 2
    assert letter[header.index("test, %")] == f"{fmean(values):.1f} ± {spread:.1f}"
    assert letter[header.index("trainings")] == "2"
    assert [row[0] for row in shown[1:]] == ["IRM", "IRM", "Backdoor, `--network CNN`"]


def test_results_go_on_where_repetitions_are_missing(monkeypatch, tmp_path, capsys):
    """One training of --seeds is not taken for three, nor averaged with other seeds' trainings."""
    results = importlib.import_module("results")
    asked = []

    def run_jobs(function, jobs, scheduler):
        for job in jobs:
            asked.append(job)
            count = int(job[job.index("--repetitions") + 1])
            yield job, [[number / 10] * len(results.FIGURES) for number in range(count)]

    monkeypatch.setattr(results, "run_jobs", run_jobs)

    def run(*arguments):
        few = ("--rows", "ERM", "--protocols", "letter", "--resume")
        monkeypatch.setattr(sys, "argv", ["results.py", *few, "--table", str(table), *arguments])
        results.main()
        shown = capsys.readouterr()
        assert ("--eta" in shown.err) == ("--eta" in arguments)  # which has no effect on ERM
        (line,) = [line for line in shown.out.splitlines() if "| ERM" in line]
        return cells(line)[2:4]

    table = tmp_path / "results.csv"
    assert run("--seeds", "1", "2") == ["2", "0.0 ± 0.0"]
    assert run("--seeds", "1234") == ["1", "0.0 ± 0.0"]
    assert run() == ["3", "10.0 ± 8.2"]
    assert [row["repetition"] for row in read(table)] == ["1", "1", "1", "2", "3"]
    assert run() == ["3", "10.0 ± 8.2"] and len(asked) == 4  # nothing was left to do
    assert run("--seeds", "1", "1234") == ["2", "0.0 ± 0.0"]
    assert run("--seeds", "1", "--eta", "3") == ["1", "0.0 ± 0.0"]


def test_a_flag_that_a_row_sets_is_refused(in_process, monkeypatch):
    """The row's name would say another value than it was trained with."""
    results = importlib.import_module("results")
    monkeypatch.setattr(results, "ROWS", (*results.ROWS, "Backdoor --eta 3"))
    result = in_process("results.py", "--rows", "Backdoor --eta 3", "--eta", "1")
    assert_one_line(result, "--eta", "each job sets itself")


def test_curves(project, printed):
    """They end where the command does, to which watching changes nothing."""
    table = [cells(line) for line in printed("curves") if line.startswith("| ")]
    accuracies = {row[0]: row[1:] for row in table[2:]}
    assert list(accuracies) == list(register.TRAINERS)
    wanted = 100 * logged(printed("command"), "Test result")["Accuracy"]
    assert accuracies["IRM"][2] == f"{wanted:.1f}"
    looked_at(project / "data" / "figures" / "curves.png")


def test_curves_have_a_point_every_so_many_iterations(monkeypatch):
    curves = importlib.import_module("curves")
    drawing = {"sizes": (700, 700, 700)}
    fresh_data = curves.fresh_data
    monkeypatch.setattr(curves, "fresh_data", lambda seed: fresh_data(seed, drawing))
    points = curves.curves("ERM", 4, ("--iteration", "10", "--seed", "5"))
    assert [point[0] for point in points] == [0, 4, 8, 10]
    assert points[0][1] < 70 < points[-1][1]  # untrained it guesses, then it has learnt colour
    assert points[-1][3] < 30 < points[0][3]
    with pytest.raises(UserError, match="raise --validation"):  # of one environment none is left
        curves.curves("ERM", 4, ("--iteration", "10", "--seed", "5", "--validation", "0.0001"))
    figure = curves.draw({"ERM": points, "IRM": points[:2]})
    assert [axis.get_title() for axis in figure.axes] == ["ERM", "IRM"]
    train1, train2, test, chance = figure.axes[0].lines
    assert list(train1.get_xdata()) == [0, 4, 8, 10]
    for env, line in enumerate((train1, train2, test)):
        assert list(line.get_ydata()) == [point[1 + env] for point in points]
    assert set(chance.get_ydata()) == {50}


def test_student_numbers(project, printed):
    """A number that was there stays as it was; what is computed is what the command prints."""
    lines = printed("student_numbers")
    rows = {row["trainer"]: row for row in read(project / "student_numbers.csv")}
    assert set(rows) == {"groupDRO", "IRM"} and len(lines) == 8
    assert (rows["IRM"]["test"], rows["IRM"]["commit"]) == ("0.125", "old")
    assert rows["groupDRO"]["commit"] == ""
    assert rows["groupDRO"]["protocol"] == rows["IRM"]["protocol"]
    looked_at(project / "data" / "figures" / "student_numbers.png")
    assert "| 12.5 | 100.0% | 12.5 (0005) |" in lines[-3]


def test_student_numbers_are_those_of_the_command(project, printed, swept):
    """The sweep's rows and the command's log, of a number that the sweep has."""
    numbers = importlib.import_module("student_numbers")
    looked_at_before = set(numbers.random.Random(0).sample(range(10000), 10000)[:1000])
    drawn = numbers.drawn_numbers(9000)
    assert len(set(drawn)) == 9000 and not looked_at_before & set(drawn)
    assert drawn[:4] == numbers.drawn_numbers(4) and sorted(drawn)[:4] != drawn[:4]
    rows = list(csv.DictReader(swept[1].splitlines()))
    assert {int(row["number"]) for row in rows} == set(drawn[:4])
    assert {6311, 1804} & set(drawn) == {1804} - looked_at_before
    assert numbers.protocol_of([]) == "letter" and numbers.protocol_of(["--steady"]) == "steady"
    assert numbers.protocol_of(["--eta", "1", "--steady"]) == "steady --eta 1"
    assert len({row["test"] for row in rows}) > 12  # every training has a result of its own


def test_samples(project, printed):
    lines = [cells(line) for line in printed("samples") if line.startswith("| ")]
    assert [row[:2] for row in lines[2:]] == [
        [name, "700"] for name in ("train1", "train2", "test")
    ]
    for row, p_e in zip(lines[2:], (10, 40, 90), strict=True):
        assert abs(float(row[-1].rstrip("%")) - p_e) < 8
    image = looked_at(project / "data" / "figures" / "samples.png")
    red, green, blue = (
        channel.point(lambda level: 255 * (level > 150)) for channel in image.split()
    )
    for color, others in ((red, (green, blue)), (green, (red, blue))):
        alone = ImageChops.subtract(color, ImageChops.add(*others))
        assert alone.histogram()[255] > 1000
    assert not ImageChops.subtract(blue, ImageChops.add(red, green)).getbbox()


def test_samples_stand_below_their_labels(data):
    samples = importlib.import_module("samples")
    axes = samples.draw(data).axes
    assert len(axes) == 3 * samples.COLUMNS
    for place, axis in enumerate(axes):
        env, index = divmod(place, samples.COLUMNS)
        of_env = data.test if env == 2 else data.training[data.training.envs == env]
        assert axis.get_title() == f"y = {int(of_env.labels[index])}"
        shown = torch.from_numpy(axis.images[0].get_array().data)
        assert torch.equal(shown[..., :2].movedim(2, 0), of_env.images[index])
        assert not shown[..., 2].any()


def test_paper_table(project, printed):
    lines = [cells(line) for line in printed("paper_table") if line.startswith("| ")]
    rows = read(project / "paper_table.csv")
    of = {name: [float(r["accuracy"]) for r in rows if r["row"] == name] for name in PUBLISHED}
    for line, (name, published) in zip(lines[2:], PUBLISHED.items(), strict=True):
        assert len(of[name]) == 2 and of[name][0] != of[name][1]
        spread = abs(of[name][0] - of[name][1]) / 2
        assert line[:4] == [name, published, f"{fmean(of[name]):.1f} ± {spread:.1f}", "2"]
    # After thirty steps ERM believes colour already, and the grayscale network can't.
    assert max(of["ERM"]) < 40 < 50 < min(of["grayscale"])


PUBLISHED = {"IRM": "66.9 ± 2.5", "ERM": "17.1 ± 0.6", "grayscale": "73.0 ± 0.4"}


@pytest.mark.parametrize("row", PUBLISHED)
def test_the_papers_protocol(monkeypatch, tmp_path, row):
    """The network is the one that the paper's formulas give, written down once more."""
    paper = importlib.import_module("paper_table")
    monkeypatch.setattr(paper, "ANNEALED", 4)
    monkeypatch.setattr(paper, "REG_LAMBDA", 50.0)
    draw_environments(tmp_path, seed=3, sizes=(300, 300, 200))
    samples = load_dataset(tmp_path).training
    protocol = paper.PROTOCOLS[row]._replace(steps=8, hidden_dim=20)
    ours = paper.paper_training(protocol, paper.paper_batch(samples, protocol.grayscale), seed=1)

    images = samples.images[:, :, ::2, ::2] / 255
    images = images.amax(1).flatten(1) if protocol.grayscale else images.flatten(1)
    torch.manual_seed(1)
    start = paper.PaperNetwork(196, images.shape[1] // 196, 20).phi
    for layer in start[::2]:
        bound = math.sqrt(6 / sum(layer.weight.shape))  # Glorot's
        assert 0.8 * bound < layer.weight.abs().max() <= bound and not layer.bias.any()
    parameters = list(start.parameters())
    penalty_weight, l2 = 1.0, protocol.weight_decay / 2
    optimizer = torch.optim.Adam(parameters, protocol.learning_rate)
    for step in range(8):
        risks, penalties = [], []
        logits = start(images).squeeze(1)
        for env in (0, 1):
            chosen = samples.envs == env
            logit, label = logits[chosen], samples.labels[chosen]
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
    assert len(ours.phi) == 5 and [layer.out_features for layer in ours.phi[::2]] == [20, 20, 1]


def test_robustness(project, printed):
    """Its crossbars are those of memristor.py with the same flags, plain and hardened."""
    lines = printed("robustness")
    rows = read(project / "robustness.csv")
    found = {(r["kind"], r["condition"], r["pattern"]): float(r["accuracy"]) for r in rows}
    for kind in ("plain", "hardened"):
        log = printed(kind)
        assert logged(log, "Test result")["Accuracy"] == found[kind, "digital", "0"] < 0.4
        assert logged(log, "Crossbar test result")["Accuracy"] == found[kind, "20 % on", "1"]
    conditions = {"digital", "crossbar", "20 % on", "2-bit ADCs"}
    conditions |= {f"adc_resolution {bits}" for bits in (2, 3, 4, 5, 6, 8)}
    assert {row["condition"] for row in rows} == conditions
    assert len(rows) == 2 * (len(conditions) + 1)  # a second pattern of stuck devices
    assert found["plain", "20 % on", "1"] != found["hardened", "20 % on", "1"]
    plain = {condition: found["plain", condition, "0"] for condition in conditions}
    assert plain["2-bit ADCs"] == plain["adc_resolution 2"] != plain["crossbar"]
    assert plain["crossbar"] == plain["adc_resolution 8"]
    assert plain["20 % on"] != found["plain", "20 % on", "1"]
    tables = [cells(line) for line in lines if line.startswith("| ")]
    assert tables[0] == ["trainer", "training", "digital", "crossbar", "20 % on", "2-bit ADCs"]
    for row, kind in zip(tables[2:4], ("plain", "hardened"), strict=True):
        both = [100 * found[kind, "20 % on", pattern] for pattern in "01"]
        assert row[:2] == ["ERM", kind]
        assert row[4] == f"{fmean(both):.1f} ({min(both):.1f})"
    both = [100 * (found["plain", "digital", "0"] - found["plain", "20 % on", p]) for p in "01"]
    assert tables[6][3] == f"{fmean(both):.1f} ({max(both):.1f})"
    looked_at(project / "data" / "figures" / "robustness.png")


def test_robustness_figure():
    require_memtorch()
    robustness = importlib.import_module("robustness")
    rows, expected = [], {}
    for kind, level in (("plain", 0.6), ("hardened", 0.7)):
        rows.append(row_of(kind, 1, "digital", 0, level))
        for value in robustness.CURVES["lrs_proportion"]:
            for pattern in (0, 1):
                accuracy = level - value / 2 - 0.05 * pattern
                rows.append(row_of(kind, 1, f"lrs_proportion {value}", pattern, accuracy))
        expected[kind] = [100 * (level - v / 2 - 0.025) for v in (0, 0.05, 0.1, 0.15, 0.2, 0.3)]
    (axis,) = robustness.draw(rows, "IRM", ["lrs_proportion"]).axes
    lines = {line.get_label(): line for line in axis.lines}
    dashed = {line.get_ydata()[0] for line in axis.lines if line.get_linestyle() == "--"}
    assert dashed == {60, 70}
    for kind, band in zip(("plain", "hardened"), axis.collections, strict=True):
        assert lines[kind].get_ydata() == pytest.approx(expected[kind])
        assert lines[kind].get_xdata() == pytest.approx([0, 5, 10, 15, 20, 30])
        heights = band.get_paths()[0].vertices[:, 1]
        assert heights.max() == pytest.approx(expected[kind][0] + 2.5)
        assert heights.min() == pytest.approx(expected[kind][-1] - 2.5)


def row_of(kind, repetition, condition, pattern, accuracy):
    row = {"trainer": "IRM", "flags": "", "kind": kind, "repetition": repetition}
    return row | {"condition": condition, "pattern": pattern, "accuracy": accuracy}


def test_performance(printed):
    lines = [cells(line) for line in printed("performance") if line.startswith("| ")]
    ours, theirs, ratio, draw, no_draw, memtorch, converted = lines[2:]
    assert ours[0].startswith("`exp-mnist.py --trainer IRM --repetitions 1 --grayscale")
    seconds = [float(row[2].split()[0]) for row in (ours, theirs)]
    # That one sleeps for a second; how much longer anything takes is the machine's affair.
    assert seconds[1] > 0.9 and theirs[0].endswith("another (--against)")
    assert float(ratio[1].split()[0]) == pytest.approx(seconds[0] / seconds[1], rel=0.2)
    assert float(ours[3]) > 200 > float(theirs[3]) > 1  # MiB: torch, and a Python that sleeps
    assert float(draw[2]) > float(no_draw[2])
    total, parts = memtorch[2].split(" (")
    times = [float(part) for part in parts.rstrip(")").split(" + ")]
    assert len(times) == 3 and float(total) == pytest.approx(sum(times), abs=0.2)
    assert min(times[:2]) > 0, memtorch
    assert "20 samples" in memtorch[0] and "20 samples" in converted[0]
    factor, whole = float(converted[1].removeprefix("1 / ")), float(converted[2].split(" (")[0])
    assert factor == pytest.approx(float(total) / whole, rel=0.3), (memtorch, converted)
    assert printed("performance")[-1].startswith("Machine: ")


# Tables and figures


TABLE = "number,trainer,protocol,repetition,test,unseen,commit\n"


def numbers_table(path: Path, protocols=("letter", "steady")) -> Path:
    """Numbers 1 to 3 with two repetitions; IRM to the letter has a number below 60 %."""
    lines = []
    for protocol in protocols:
        for student in (1, 2, 3):
            for trainer in ("groupDRO", "IRM"):
                low = 0.1 if (trainer, protocol, student) == ("IRM", "letter", 2) else 0
                for repetition in (1, 2):
                    test = 0.6 + 0.02 * student + 0.01 * repetition - low
                    unseen = test + 0.1
                    values = (student, trainer, protocol, repetition, f"{test:.4f}")
                    lines.append(",".join(map(str, (*values, f"{unseen:.4f}", "abc"))))
    path.write_text(TABLE + "\n".join(lines) + "\n")
    return path


def test_report_and_figure_of_a_table(tmp_path, in_process):
    table, figure = numbers_table(tmp_path / "numbers.csv"), tmp_path / "new" / "numbers.png"
    result = in_process("student_numbers.py", "--from", table, "--figure", figure)
    assert result.returncode == 0, result.stderr
    rows = [cells(line) for line in result.stdout.splitlines() if line.startswith("| ")]
    (row,) = [row for row in rows if row[:2] == ["IRM, letter", "test environment"]]
    # 63.5, 55.5 and 67.5 %; of the six trainings the deviation is sqrt(mean of squares).
    assert row[2:] == ["3", "62.2", "33.3%", "55.5 (0002)", "55.7 to 67.4", "55.0 (0002)", "5.0"]
    (row,) = [row for row in rows if row[:2] == ["groupDRO, steady", "unseen digits"]]
    assert row[2:6] == ["3", "75.5", "0.0%", "73.5 (0001)"]
    looked_at(figure)

    numbers = importlib.import_module("student_numbers")
    rows = numbers.Table(table, numbers.COLUMNS).rows
    axes = numbers.draw(rows, ["letter", "steady"]).axes
    titles = [axis.get_title() for axis in axes]
    assert len(axes) == 4 and "letter" in titles[0] and "--steady" in titles[2]
    for axis in axes:
        bars = [bar for bar in axis.patches if bar.get_height()]
        assert sum(bar.get_height() for bar in bars) == 6  # three numbers, two trainers
    worst = [text.get_text() for text in axes[0].texts]
    assert worst[1] == "IRM, worst of 3:\nnumber 0002, 55.5 %"
    lefts = [bar.get_x() for bar in axes[0].patches if bar.get_height()]
    assert min(lefts) == 55.5 and max(lefts) == 67.5


@pytest.mark.parametrize("text", ["number,trainer\n1,IRM\n", TABLE, TABLE + "x,IRM,l,1,2,3,\n"])
def test_a_table_that_is_none_is_refused(tmp_path, in_process, text):
    table = tmp_path / "numbers.csv"
    table.write_text(text)
    assert_one_line(in_process("student_numbers.py", "--from", table), table)


def test_a_table_of_one_trainer_is_not_drawn(tmp_path, in_process):
    table = numbers_table(tmp_path / "numbers.csv")
    lines = table.read_text().splitlines(keepends=True)
    table.write_text("".join(line for line in lines if "IRM,steady" not in line))
    figure = tmp_path / "f.png"
    result = in_process("student_numbers.py", "--from", table, "--figure", figure)
    assert_one_line(result, table, "IRM, steady")
    missing = tmp_path / "none.csv"
    assert_one_line(in_process("student_numbers.py", "--from", missing), missing)
    assert not missing.exists()


@pytest.mark.parametrize(
    "script", ["student_numbers.py", "results.py", "paper_table.py", "robustness.py"]
)
def test_a_longer_table_is_never_replaced(tmp_path, in_process, script):
    if script == "robustness.py":
        require_memtorch()
    module = importlib.import_module(script.removesuffix(".py"))
    table = tmp_path / "table.csv"
    blank = ",".join("1" for _ in module.COLUMNS)
    text = "\n".join([",".join(module.COLUMNS), *[blank] * 1000]) + "\n"
    table.write_text(text)
    result = in_process(script, "--table", table, *SHORT[script])
    assert_one_line(result, table, "1000 rows", "--resume")
    assert table.read_text() == text


def test_a_table_is_written_as_its_rows_come(tmp_path):
    jobs = importlib.import_module("jobs")
    path, columns = tmp_path / "t.csv", {"number": int, "value": float}
    table = jobs.Table(path, columns, resume=False)
    table.add([{"number": 10, "value": 0.1}])
    table.add([{"number": 9, "value": 0.25}])
    assert path.read_text() == "number,value\n9,0.25\n10,0.1\n"
    assert jobs.Table(path, columns).rows == table.rows
    fresh = jobs.Table(path, columns, resume=False)
    fresh.expect(2)
    fresh.add([{"number": 1, "value": 1.0}])
    assert path.read_text() == "number,value\n9,0.25\n10,0.1\n"  # until the new one is as long
    fresh.add([{"number": 2, "value": 2.0}])
    assert path.read_text() == "number,value\n1,1.0\n2,2.0\n"


def test_the_commit_is_named(tmp_path, monkeypatch):
    jobs = importlib.import_module("jobs")
    monkeypatch.setattr(jobs, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert jobs.commit() == ""
    if not shutil.which("git"):
        pytest.skip("there is no git")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e@example.org"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "first"], check=True)
    head = subprocess.check_output([*git, "rev-parse", "HEAD"], text=True)
    assert len(jobs.commit()) >= 7 and head.startswith(jobs.commit())
    (tmp_path / "table.csv").touch()
    assert not jobs.commit().endswith("+")
    (tmp_path / "my_losses.py").touch()  # code that is in no commit
    assert jobs.commit().endswith("+") and head.startswith(jobs.commit()[:-1])
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "second"], check=True)
    assert not jobs.commit().endswith("+")
    (tmp_path / "my_losses.py").write_text("changed = True\n")
    assert jobs.commit().endswith("+")


# What can't be run is refused before anything is. Where it isn't, these are soon at an end.

SHORT = {
    "curves.py": ("--iteration", 1),
    "paper_table.py": ("--draws", 1, "--steps", 1),
    "performance.py": ("--runs", 1, "--iteration", 1, "--test_samples", 2),
    "results.py": ("--seeds", 5, "--rows", "IRM", "--iteration", 1),
    "robustness.py": ("--repetitions", 1, "--trainers", "IRM", "--conditions", "crossbar")
    + ("--curves", "adc_resolution", "--iteration", 1),
    "samples.py": (),
    "student_numbers.py": ("--only", 42, "--iteration", 1),
}


@pytest.mark.parametrize(
    ("script", "flag"),
    [
        ("student_numbers.py", "--trainer=IRM"),
        ("student_numbers.py", "--seed=5"),
        ("student_numbers.py", "--dataset_path=d"),
        ("results.py", "--trainer=IRM"),
        ("results.py", "--seed=5"),
        ("results.py", "--steady"),
        ("curves.py", "--trainer=IRM"),
        ("curves.py", "--dataset_path=d"),
        ("curves.py", "--validation=0"),
        ("curves.py", "--save_model=d"),
        ("student_numbers.py", "--save_model=d"),
        ("results.py", "--save_model=d"),
        ("robustness.py", "--dataset_path=typo"),
        ("robustness.py", "--trainer=IRM"),
        ("performance.py", "--dataset_path=d"),
        ("performance.py", "--against=nowhere"),
    ],
)
def test_a_script_refuses_what_it_sets_itself(in_process, script, flag):
    if script in ("robustness.py", "performance.py"):
        require_memtorch()
    assert_one_line(in_process(script, *SHORT[script], flag), flag.split("=")[0])


@pytest.mark.parametrize("script", [name for name in SCRIPTS if name != "samples.py"])
def test_a_mistake_in_a_trainings_flags_is_found_first(in_process, script):
    if script in ("robustness.py", "performance.py"):
        require_memtorch()
    assert_refused(in_process(script, *SHORT[script], "--itteration", "20"), "--itteration")


@pytest.mark.parametrize("flag", ["--figure", "--table"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_file_that_cannot_be_written_is_found_first(in_process, tmp_path, script, flag):
    if script in ("robustness.py", "performance.py"):
        require_memtorch()
    (tmp_path / "file").touch()
    if flag in in_process(script, "--help").stdout:
        for path in (tmp_path, tmp_path / "file" / "name"):
            assert_one_line(in_process(script, *SHORT[script], flag, path), path)


@pytest.mark.parametrize("script", ["paper_table.py", "performance.py"])
def test_no_gpu_is_said_first(in_process, script):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    if script == "performance.py":
        require_memtorch()
    assert_one_line(in_process(script, *SHORT[script], "--cuda"), "--cuda", "GPU")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("row", PUBLISHED)
def test_the_papers_protocol_on_a_gpu(tmp_path, row):
    paper = importlib.import_module("paper_table")
    draw_environments(tmp_path, seed=3, sizes=(300, 300, 200))
    samples = load_dataset(tmp_path).training
    protocol = paper.PROTOCOLS[row]._replace(steps=8, hidden_dim=20)
    batch = paper.paper_batch(samples, protocol.grayscale)
    on_gpu = paper.paper_batch(samples.to("cuda"), protocol.grayscale)
    network = paper.paper_training(protocol, on_gpu, seed=1)
    assert all(value.is_cuda for value in (*network.parameters(), *on_gpu.images))
    expected = paper.paper_training(protocol, batch, seed=1)(batch.images)
    assert torch.allclose(network(on_gpu.images).cpu(), expected, atol=1e-3)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_of_every_script(in_process, script):
    if script in ("robustness.py", "performance.py"):
        require_memtorch()
    text = in_process(script, "--help").stdout
    module = importlib.import_module(script.removesuffix(".py"))
    assert text.startswith(f"usage: {script}") and module.__doc__.split("\n")[0] in text
    assert f"python benchmarks/{script}" in text


def test_a_default_run_replaces_no_figure_of_the_projects(monkeypatch, in_process):
    """Where figures and tables go without flags is a folder that git ignores."""
    jobs = importlib.import_module("jobs")
    parser = jobs.script_parser("", "f.png", "t.csv")
    args = parser.parse_args([])
    assert args.figure.parent == args.table.parent == ROOT / "data" / "figures"
    if shutil.which("git") and (ROOT / ".git").exists():
        subprocess.run(["git", "-C", str(ROOT), "check-ignore", "-q", args.figure], check=True)


def test_unseen_digits_are_tested_on(data):
    """What the column "unseen" is: never the digits of any environment."""
    unseen = unseen_samples()
    assert len(unseen) == 10000 and not torch.equal(unseen.images[:700], data.test.images[:700])
