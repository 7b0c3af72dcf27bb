"""The course project's notebook. The saved one is complete, and a shortened one runs."""

import importlib
import json
import re
import subprocess
import sys
from statistics import fmean

import nbformat
import pytest
import torch
from conftest import ROOT, require_memtorch
from nbclient import NotebookClient

import preprocessing
from dataset import load_data
from trainer import evaluate, train_repetition, training_parser

PATH = ROOT / "notebooks" / "course_project.ipynb"

# Inserted after the parameters: few digits and few steps.
SHORT = """
default_folder, data_folder = data_folder, Path({folder!r})
generate_environments = partial(generate_environments, sizes=(60, 60, 60))
for settings in protocol.values():
    settings |= {{"iteration": 4, "batch_size": 64}}
repetitions, curve_steps, curve_images, calibration_count = 2, 2, 20, 10
cnn_images, as_it_comes_images = 40, 20
hardening_steps = {{"MLP": 1, "CNN": 1}}
stuck_on, patterns = (0.0, 0.1), 1
pd.set_option("display.width", 500)  # one line for each row of a table
"""
# Appended.
REPORT = """
import json
print(json.dumps({
    "prefix": sys.prefix,
    "default_folder": str(default_folder),
    "by_hand": by_hand.tolist(),
    "by_backdoor": by_backdoor.tolist(),
    "results": results,
    "curves": [[*key, list(repeated[0])] for key, repeated in curves.items()],
}))
"""


def has_memtorch():
    try:
        importlib.import_module("memtorch")
    except ImportError:
        return False
    return True


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook):
    return [output for cell in code_cells(notebook) for output in cell.outputs]


def text(notebook, cell_id):
    """Return the printed text and the tables of a cell."""
    (cell,) = [cell for cell in notebook.cells if cell.id == cell_id]
    shown = [
        output.get("text", output.get("data", {}).get("text/plain", "")) for output in cell.outputs
    ]
    return "\n".join(shown)


def table(notebook, cell_id, columns):
    """Return the rows of numbers in the output of a cell, without the index."""
    rows = [line.split()[-columns:] for line in text(notebook, cell_id).splitlines()]
    return [
        [float(value) for value in row]
        for row in rows
        if len(row) == columns and all(re.fullmatch(r"-?\d+\.\d+", value) for value in row)
    ]


@pytest.fixture(scope="module")
def saved():
    return nbformat.read(PATH, as_version=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder that the shortened run generates its data in."""
    return tmp_path_factory.mktemp("notebook") / "course_project"


@pytest.fixture(scope="module")
def executed(folder):
    """The notebook after a shortened run in its own folder, without MemTorch if it is missing."""
    notebook = nbformat.read(PATH, as_version=4)
    if not has_memtorch():
        notebook.cells = [
            cell for cell in notebook.cells if "crossbar" not in cell.metadata.get("tags", [])
        ]
    for cell in code_cells(notebook):
        cell.outputs, cell.execution_count = [], None
    (parameters,) = [index for index, cell in enumerate(notebook.cells) if cell.id == "parameters"]
    shorter = nbformat.v4.new_code_cell(SHORT.format(folder=str(folder)))
    notebook.cells.insert(parameters + 1, shorter)
    notebook.cells.append(nbformat.v4.new_code_cell(REPORT, id="report"))
    before = sorted(PATH.parent.iterdir())
    resources = {"metadata": {"path": str(PATH.parent)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()
    assert sorted(PATH.parent.iterdir()) == before  # it writes nothing beside itself
    return notebook


@pytest.fixture(scope="module")
def report(executed):
    return json.loads(text(executed, "report"))


def test_the_saved_notebook_is_executed_and_complete(saved):
    assert PATH.stat().st_size < 1e6
    counts = [cell.execution_count for cell in code_cells(saved)]
    assert counts == list(range(1, len(counts) + 1))
    assert not [output for output in outputs(saved) if output.output_type == "error"]
    assert not [output for output in outputs(saved) if output.get("name") == "stderr"]
    assert sum("image/png" in output.get("data", {}) for output in outputs(saved)) == 4
    for cell_id in ("data", "population", "table", "crossbar", "memtorch", "hardening", "damage"):
        assert text(saved, cell_id)
    prose = "\n".join(cell.source for cell in saved.cells if cell.cell_type == "markdown")
    assert re.findall(r"^## (\d)\. ", prose, re.MULTILINE) == list("123456")
    for number in ("0.3242", "0.6758"):
        assert number in prose and number in text(saved, "population")
    assert "Watched" not in nbformat.writes(saved)


def test_the_saved_notebook_has_no_paths_and_no_shell_commands(saved):
    for cell in saved.cells:
        shown = cell.source
        if cell.cell_type == "code":
            shown += text(saved, cell.id)
            assert not re.search(r"^\s*[!%]", cell.source, re.MULTILINE)
        assert not re.search(r"/(home|root|tmp|work|Users|mnt)/", shown)


def test_its_imports_work_from_the_root_of_the_project(saved):
    code = "\n".join(cell.source for cell in code_cells(saved)[:2])
    code += "\nimport preprocessing\nprint(preprocessing.__file__)"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.stdout.strip() == str(ROOT / "preprocessing.py"), result.stderr


def test_every_cell_runs(executed, report):
    counts = [cell.execution_count for cell in code_cells(executed)]
    assert counts == list(range(1, len(counts) + 1))
    assert not [output for output in outputs(executed) if output.get("name") == "stderr"]
    assert report["prefix"] == sys.prefix  # the kernel is this interpreter


def test_it_generates_the_course_projects_data_in_its_own_folder(executed, report, folder):
    record = torch.load(folder / "ColoredMNIST" / "train1.pt", weights_only=True)
    assert (record["p_f"], record["p_e"]) == (0.25, [0.2, 0.1, 0.9])
    assert str(preprocessing.DATA / "course_project") in report["default_folder"]


def test_the_exact_population_by_hand_and_by_backdoor(report):
    assert report["by_hand"] == pytest.approx([0.3242, 0.6758], abs=5e-5)
    assert report["by_backdoor"] == pytest.approx(report["by_hand"], abs=1e-5)


def test_the_trainings_are_the_same_as_on_the_command_line(report, folder):
    data = load_data(folder)
    for network, method in (("MLP", "IRM"), ("CNN", "Backdoor")):
        flags = f"--network {network} --trainer {method} --iteration 4 --batch_size 64"
        args = training_parser().parse_args(flags.split())
        trained, *_ = train_repetition(args, data, 1, report=lambda step: None)
        first = next(
            result
            for result in report["results"]
            if (result["network"], result["method"]) == (network, method)
        )
        assert first["test accuracy"] == pytest.approx(evaluate(trained, data.test)["Accuracy"])


def test_the_table_of_the_trainings(executed, report):
    methods = ["ERM", "groupDRO", "IRM", "Backdoor", "balancing", "ERM, grayscale"]
    expected = [["MLP", method] for method in methods]
    methods = ["ERM", "Backdoor", "balancing", "Backdoor, train1 only", "balancing, train1 only"]
    expected += [["CNN", method] for method in methods]
    assert [curve[:2] for curve in report["curves"]] == expected
    assert all(steps == [2, 4] for _, _, steps in report["curves"])

    means = {}
    for network, method in expected:
        accuracies = [
            100 * result["test accuracy"]
            for result in report["results"]
            if [result["network"], result["method"]] == [network, method]
        ]
        assert len(accuracies) == {"MLP": 2, "CNN": 1}[network]
        means[network, method] = fmean(accuracies)
    shown = text(executed, "table")
    told, not_told = (float(number) for number in re.findall(r"([\d.]+) %", shown))
    names = ["Backdoor", "balancing"]
    assert told == pytest.approx(min(means["MLP", name] for name in names), abs=0.051)
    names = ["ERM", "groupDRO", "IRM"]
    assert not_told == pytest.approx(max(means["MLP", name] for name in names), abs=0.051)


def test_the_sections_on_crossbars(executed):
    require_memtorch()
    mapped = table(executed, "crossbar", 3)
    assert len(mapped) == 2
    for digital, crossbar, same_prediction in mapped:
        assert crossbar == pytest.approx(digital, abs=5) and same_prediction >= 95

    # In MemTorch a logit depends on the batch. In `to_crossbar` it does not.
    digital, ours, as_it_comes = table(executed, "memtorch", 5)
    assert digital[1:3] == [100, 1] and ours[2] == pytest.approx(1, abs=0.1)
    assert digital[3] == digital[4] and ours[3] == ours[4]
    assert ours[3] == pytest.approx(digital[3], abs=0.02)
    assert abs(as_it_comes[3] - as_it_comes[4]) > 0.001

    costs = table(executed, "hardening", 3)
    assert len(costs) == 6
    for plain, limited, hardened in (costs[:3], costs[3:]):
        assert plain[2] == 1 and min(limited[2], hardened[2]) > 1
        assert max(limited[0], hardened[0]) < plain[0]

    damaged = [
        re.findall(r"([\d.]+) \(([\d.]+)\)", line) for line in text(executed, "damage").splitlines()
    ]
    damaged = [row for row in damaged if row]
    assert len(damaged) == 6 and all(len(row) == 2 for row in damaged)
    for row, (_, crossbar, _) in zip((damaged[0], damaged[3]), mapped, strict=True):
        assert float(row[0][0]) == pytest.approx(crossbar, abs=0.051)
