"""Sweeps: interrupted, on a Dask cluster of which a worker dies, and drawn again from their table.

All of it in a copy of the project that draws small environments, with its own kept results.
"""

import contextlib
import importlib
import itertools
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, assert_one_line

from dataset import Batch, Digits
from model import ERM, IRM

ENVIRONMENT = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
SWEEP = ("benchmarks/student_numbers.py", "--numbers", "4", "--iteration", "20")
JOBS = 8  # of that sweep: two trainers


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("project")
    for path in (*ROOT.glob("*.py"), *ROOT.glob("benchmarks/*.py")):
        copy = folder / path.relative_to(ROOT)
        copy.parent.mkdir(exist_ok=True)
        shutil.copy(path, copy)
    (folder / "data").mkdir()
    (folder / "data" / "mnist.npz").symlink_to(ROOT / "data" / "mnist.npz")
    text = (folder / "preprocessing.py").read_text()
    small = text.replace("(20000, 20000, 20000)", "(700, 700, 700)")
    assert small != text
    (folder / "preprocessing.py").write_text(small)
    return folder


@pytest.fixture
def start(project):
    """Start a process in the project; all of them are gone after the test."""
    started = []

    def run(*arguments):
        command = [sys.executable, *map(str, arguments)]
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        session = {"start_new_session": True, "env": ENVIRONMENT, "cwd": project}
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


def wait_for(condition, seconds: float = 120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def finish(process) -> str:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out


def test_killed_sweep_goes_on(project, start):
    first = start(*SWEEP)
    wait_for(lambda: len(kept(project)) >= 2)
    first.kill()
    first.wait()
    before = kept(project)
    assert 2 <= len(before) < JOBS
    out = finish(start(*SWEEP))
    after = kept(project)
    assert len(after) == JOBS and after.items() >= before.items()
    assert "IRM, unseen digits: 4 student numbers" in out
    rows = (project / "figures" / "student_numbers.csv").read_text().splitlines()
    assert rows[0] == "number,trainer,repetition,test,unseen" and len(rows) == 1 + 3 * JOBS


def test_table_is_added_to(project, start):
    """Where kept results are gone, as on another machine, only what it lacks is computed."""
    whole = finish(start(*SWEEP, "--table", "whole.csv")) and (project / "whole.csv").read_text()
    part = [line for line in whole.splitlines() if ",groupDRO," not in line]
    (project / "part.csv").write_text("\n".join(part) + "\n")
    shutil.rmtree(project / "data" / "jobs")
    finish(start(*SWEEP, "--table", "part.csv", "--resume"))
    assert len(kept(project)) == JOBS // 2
    assert (project / "part.csv").read_text() == whole


def test_kept_results_outlive_a_comment(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    logic = importlib.import_module("jobs").logic
    code = 'def f(x):\n    """What."""\n    return x + 1\n'
    assert logic(code) == logic('"""Doc."""\ndef f(x):  # why\n\n    return (x + 1)\n')
    assert logic(code) != logic(code.replace("1", "2"))


def test_cluster_that_loses_a_worker_gives_the_same_table(project, start):
    local = finish(start(*SWEEP, "--table", "local.csv"))
    shutil.rmtree(project / "data" / "jobs")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    dask = ("-m", "distributed.cli.dask_scheduler")
    start(*dask, "--host", address, "--no-dashboard")
    dask = ("-m", "distributed.cli.dask_worker", address, "--nthreads", "1", "--no-nanny")
    both = [start(*dask, "--no-dashboard", "--local-directory", f"dask{n}") for n in (1, 2)]
    sweep = start(*SWEEP, "--table", "cluster.csv", "--scheduler", address)
    wait_for(lambda: len(kept(project)) >= 2)
    both[0].kill()
    assert len(kept(project)) < JOBS
    assert finish(sweep).replace("cluster.csv", "local.csv") == local
    assert (project / "cluster.csv").read_bytes() == (project / "local.csv").read_bytes()


def test_results_are_the_commands(project, start):
    flags = ["--trainer", "IRM", "--iteration", "20", "--repetitions", "2", "--seed", "5"]
    log = finish(start("exp-mnist.py", "--no_cuda", *flags)).splitlines()
    code = (
        "import json, sys; sys.path.insert(0, 'benchmarks'); import jobs, results; "
        "(_, result), = jobs.run_jobs(results.measure, [tuple(sys.argv[1:])]); "
        "print(json.dumps(result))"
    )
    measured = json.loads(finish(start("-c", code, *flags)))
    tests = [line for line in log if line.startswith("Test result: ")]
    flips = [line for line in log if line.startswith("Flip rate: ")]
    assert len(measured) == len(tests) == 2
    for result, test, flip in zip(measured, tests, flips, strict=True):
        scores = {name: result[name] for name in ("Accuracy", "AUC", "F1_macro")}
        assert test == f"Test result: {scores}"
        assert flip == f"Flip rate: {result['flips']}"


def test_figure_is_drawn_again_from_the_table(tmp_path, in_process, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    table, figure = tmp_path / "numbers.csv", tmp_path / "new" / "numbers.png"
    rows = [f"{n},{t},1,0.6{n},0.7{n}" for n in (1, 2, 3) for t in ("groupDRO", "IRM")]
    table.write_text("\n".join(["number,trainer,repetition,test,unseen", *rows, ""]))
    script = "student_numbers.py"
    result = in_process(script, "--from", table, "--figure", figure)
    assert result.returncode == 0, result.stderr
    assert "IRM, test environment: 3 student numbers, mean 62.00 %" in result.stdout
    assert "worst 61.00 (number 0001)" in result.stdout
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert_one_line(in_process(script, "--from", tmp_path / "none.csv"), "none.csv")
    for text in ("number,trainer\n1,IRM\n", "number,trainer,repetition,test,unseen\n"):
        table.write_text(text)
        assert_one_line(in_process(script, "--from", table), table)


@pytest.mark.parametrize(
    ("script", "flag", "more"),
    [
        ("student_numbers.py", "--trainer=IRM", ()),
        ("student_numbers.py", "--seed=5", ()),
        ("student_numbers.py", "--dataset_path=d", ()),
        ("results.py", "--trainer=IRM", ()),
        ("results.py", "--seed=5", ("--seeds", 1, 2)),
        ("curves.py", "--trainer=IRM", ()),
    ],
)
def test_a_sweep_refuses_what_it_sets_itself(in_process, monkeypatch, script, flag, more):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    assert_one_line(in_process(script, flag, *more), flag.split("=")[0])


def test_a_scheduler_that_is_not_there_is_one_line(project, start):
    process = start(*SWEEP[:3], "--scheduler", "nowhere://127.0.0.1:1")
    out, err = process.communicate(timeout=100)
    assert_one_line(subprocess.CompletedProcess([], process.returncode, out, err), "nowhere")


@pytest.mark.parametrize("script", sorted(path.name for path in ROOT.glob("benchmarks/*.py")))
def test_help_of_every_script(in_process, monkeypatch, script):
    pytest.importorskip("memtorch", reason="MemTorch is not installed (no compiler)")
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    if script != "jobs.py":  # what the others share is no command
        assert in_process(script, "--help").stdout.startswith("usage: ")


def test_robustness_table_and_figure(project, start, tmp_path):
    pytest.importorskip("memtorch", reason="MemTorch is not installed (no compiler)")
    conditions = ("--conditions", "crossbar", "20 % on", "--repetitions", 1, "--patterns", 1)
    flags = ("--trainers", "IRM", *conditions, "--iteration", 20, "--figure", tmp_path / "c.png")
    lines = finish(start("benchmarks/robustness.py", *flags)).splitlines()
    assert lines[0] == "| trainer | training | digital | crossbar | 20 % on |"
    plain, hardened = (line.strip("| ").split(" | ") for line in lines[2:4])
    assert plain[:2] == ["IRM", "plain"] and hardened[:2] == ["IRM", "hardened"]
    for row in (plain, hardened):
        assert abs(float(row[2]) - float(row[3].split()[0])) < 2  # nothing is lost in the move
    assert lines[-2].startswith("- IRM: ")
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def selection(monkeypatch):
    pytest.importorskip("memtorch", reason="MemTorch is not installed (no compiler)")
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("selection")


def test_selection_leaves_the_default_only_for_what_is_clearly_better(selection):
    search = object.__new__(selection.Search)
    search.space = selection.Space((), {"a": (0, 1), "b": (0, 1, 2)}, "risk")
    # Draws differ by 0.2, which cancels; test accuracies speak for others.
    search.results = {
        (1, 2): [(0.40, 0.1), (0.60, 0.1)],
        (1, 0): [(0.37, 0.2), (0.59, 0.2)],
        (0, 2): [(0.41, 0.9), (0.61, 0.9)],
    }
    search.default = (1, 2)
    mean, error = search.difference((0, 2))
    assert math.isclose(mean, 0.01) and error < 1e-9
    assert search.ranking == [(1, 0), (1, 2), (0, 2)]
    assert search.chosen == (1, 2)  # by 0.02 +- 0.01, which may be chance
    assert search.describe((1, 2)) == "**the default**, **chosen**"
    search.results[1, 0][0] = (0.385, 0.2)  # by 0.0125 +- 0.0025
    search.results[1, 1] = [(0.395, 0.9), (0.595, 0.9)]  # also clearly, but by less
    assert search.chosen == (1, 0)
    assert search.describe((1, 0)) == "b 0, **chosen**"


def test_unbiased_penalty_is_the_mean_over_pairs_of_samples(selection):
    torch.manual_seed(0)
    logits, envs = torch.randn(12), torch.tensor([0, 1] * 6)
    batch = Batch(torch.zeros(12, 1), torch.randint(2, (12,)).float(), envs, envs)
    gradients, penalty = (torch.sigmoid(logits) - batch.labels) * logits, 0
    for e in (0, 1):
        g = gradients[envs == e]
        pairs = [g[i] * g[j] for i in range(6) for j in range(6) if i != j]
        penalty += sum(pairs) / len(pairs) / 2
    expected = ERM()(logits, batch) + 50 * penalty
    assert torch.isclose(selection.PenaltyIRM("unbiased")(logits, batch), expected, atol=1e-5)
    assert torch.equal(selection.PenaltyIRM()(logits, batch), IRM()(logits, batch))


def test_every_knob_of_the_selection_turns_something(selection, monkeypatch):
    """Also those that are no flags: trained for five steps, each value gives another network."""
    monkeypatch.setitem(selection.NETWORKS, "MLP", selection.StartedMLP)
    monkeypatch.setitem(selection.TRAINERS, "IRM", selection.PenaltyIRM)
    space = selection.SPACES["IRM"]
    short = (*space.arguments, "--iteration=5")

    def measure(**changed):
        knobs = dict(zip(space.knobs, space.plain, strict=True)) | changed
        return selection.train_and_measure(short, tuple(knobs.items()), space.criterion, 0)

    plain = measure()
    assert measure() == plain
    turned = {"epsilon": 1e-4, "init_scale": 0.3, "from_colors": "same", "to_logit": "equal"}
    turned |= {"penalty": "unbiased", "shift": 1}
    for changed in ({knob: value} for knob, value in turned.items()):
        assert measure(**changed) != plain
    for from_colors, to_logit in itertools.product(("drawn", "same"), ("drawn", "equal")):
        phi = selection.StartedMLP(from_colors=from_colors, to_logit=to_logit).phi
        red, green = phi[0].weight.chunk(2, 1)
        assert torch.equal(red, green) == (from_colors == "same")
        assert (phi[-1].weight.abs().unique().numel() == 1) == (to_logit == "equal")


def test_hardening_can_be_tried_with_few_states_and_coarse_adcs(selection, monkeypatch):
    devices = selection.CoarseDevices()
    weight, limit = torch.linspace(-1, 1, 101).requires_grad_(), devices.LIMIT * 0.5861
    monkeypatch.setattr(selection.CoarseDevices, "STATES", 2)
    values = devices(weight).detach().div(limit)
    assert torch.allclose(values, values.round(), atol=1e-3) and values.unique().numel() > 1
    layer, outputs = torch.nn.Linear(1, 1), torch.tensor([[0.9, 0.4, -0.1]]).requires_grad_()
    read = [selection.CoarseDevices.read(layer, None, outputs) for _ in range(20)]
    assert all(each is outputs for each in read)
    monkeypatch.setattr(selection.CoarseDevices, "BITS", 2)
    read = [selection.CoarseDevices.read(layer, None, outputs) for _ in range(20)]
    assert {tuple(each[0].tolist()) for each in read} == {(0.5, 0.5, 0.0), (*outputs[0].tolist(),)}
    next(each for each in read if each is not outputs).sum().backward()
    assert outputs.grad.eq(1).all()
    assert selection.CoarseDevices.read(layer.eval(), None, outputs) is outputs


def test_the_papers_protocol_sees_raw_pixels(monkeypatch, mnist):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    paper = importlib.import_module("paper_table")
    red = torch.stack([mnist[0][:3], torch.zeros_like(mnist[0][:3])], 1)
    digits = Digits(red, torch.zeros(3), torch.ones(3).long(), torch.zeros(3).long())
    expected = mnist[0][:3, ::2, ::2].flatten(1) / 255
    assert torch.equal(paper.raw_pixels(digits).images[:, :196], expected)
    grayscale = paper.PROTOCOLS["grayscale"]._replace(steps=3)
    assert 40 < paper.paper_accuracy(*grayscale, 0) < 65
