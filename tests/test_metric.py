"""Metrics, their mean over repetitions, and `python metric.py LOG...`, which checks logs."""

import ast
import math
import os
import re
import subprocess
import time
import warnings

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score, roc_auc_score

import metric
from metric import group_accuracies, metrics, summarize


def test_metrics_are_sklearns():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        logits = torch.randn(50, generator=generator).round(decimals=1)  # with ties, and zeros
        labels = torch.randint(2, (50,), generator=generator).float()
        assert metrics(logits, labels) == pytest.approx(
            {
                "Accuracy": accuracy_score(labels, logits > 0),
                "AUC": roc_auc_score(labels, logits),
                "F1_macro": f1_score(labels, logits > 0, average="macro"),
            }
        )


@pytest.mark.parametrize("label", [0, 1])
@pytest.mark.parametrize("logit", [-1, 1])
def test_auc_of_one_label_is_nan_without_a_warning(label, logit):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = metrics(torch.full((3,), float(logit)), torch.full((3,), float(label)))
    assert math.isnan(scores["AUC"])
    assert scores["Accuracy"] == scores["F1_macro"] == float((logit > 0) == label)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_metrics_take_logits_of_any_float_type(dtype):
    """Those of a network under autocast are bfloat16, those in training have a gradient."""
    logits = torch.tensor([-1.0, 2.0, 0.5, -3.0], dtype=dtype, requires_grad=True)
    scores = metrics(logits, torch.tensor([0, 1, 0, 1]))
    assert scores == {"Accuracy": 0.5, "AUC": 0.5, "F1_macro": 0.5}
    assert all(type(value) is float for value in scores.values())


def test_no_logit_is_rounded():
    logits = torch.tensor([1e-60, 2e-60], dtype=torch.float64)
    assert metrics(logits, torch.tensor([0, 1])) == {
        "Accuracy": 0.5,
        "AUC": 1.0,
        "F1_macro": pytest.approx(1 / 3),
    }


def test_summary_is_mean_and_population_deviation():
    results = [{"Accuracy": 0.5, "AUC": 0.25}, {"Accuracy": 0.7, "AUC": 0.25}]
    expected = {
        "Accuracy_testmean": 0.6,
        "Accuracy_teststd": 0.1,
        "AUC_testmean": 0.25,
        "AUC_teststd": 0.0,
    }
    assert summarize(results) == pytest.approx(expected)
    assert list(summarize(results)) == list(expected)


def test_summary_is_printed_as_plain_floats():
    results = [{"Accuracy": np.float64(value), "AUC": np.float32(value)} for value in (0.25, 0.75)]
    plain = {"Accuracy_testmean": 0.5, "Accuracy_teststd": 0.25}
    plain |= {"AUC_testmean": 0.5, "AUC_teststd": 0.25}
    assert str(summarize(results)) == str(plain)
    assert str(summarize(results[:1]))[:50] == "{'Accuracy_testmean': 0.25, 'Accuracy_teststd': 0."


def test_summary_of_nan_is_nan():
    one_label = metrics(torch.tensor([1.0, -1.0]), torch.tensor([1, 1]))
    both_labels = metrics(torch.tensor([1.0, -1.0]), torch.tensor([1, 0]))
    summary = summarize([one_label, both_labels])
    assert math.isnan(summary["AUC_testmean"]) and math.isnan(summary["AUC_teststd"])
    assert summary["Accuracy_testmean"] == 0.75 and summary["Accuracy_teststd"] == 0.25


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_accuracy_of_each_group(dtype):
    logits = torch.tensor([-1, -1, -1, 1, 0, 1, 1, 1, -1, 1], dtype=dtype)  # 0 predicts label 0
    labels = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 1, 1])
    colors = torch.tensor([0, 0, 0, 0, 1, 1, 0, 1, 1, 1])
    accuracies = group_accuracies(logits, labels.float(), colors)
    right = {"y=0 green": 3 / 4, "y=0 red": 1 / 2, "y=1 green": 1.0, "y=1 red": 2 / 3}
    assert accuracies == pytest.approx(right)
    assert list(accuracies) == list(right)
    assert all(type(value) is float for value in accuracies.values())


def test_a_group_without_a_sample_is_left_out():
    accuracies = group_accuracies(torch.ones(3), torch.tensor([0, 1, 1]), torch.tensor([1, 0, 0]))
    assert accuracies == {"y=0 red": 0.0, "y=1 green": 1.0}


# Logs.

METRICS = ("Accuracy", "AUC", "F1_macro")
DRAWN = "p_f 0.2, p_e [0.1, 0.4, 0.9], sizes [20000, 20000, 20000], shuffle_digits false"
GOOD = (0.65, 0.7, 0.75)  # accuracies of three repetitions: mean 0.7
GROUP_DRO = (0.66, 0.7, 0.75)


def result_lines(accuracies, title="Test result"):
    """A line for each repetition, and the Summary that follows, by numpy."""
    results = [{"Accuracy": a, "AUC": a - 0.1, "F1_macro": a - 0.01} for a in accuracies]
    summary = {}
    for name in METRICS:
        values = [result[name] for result in results]
        summary[f"{name}_testmean"] = float(np.mean(values))
        summary[f"{name}_teststd"] = float(np.std(values))
    return [f"{title}: {result}" for result in results], f"Summary: {summary}"


def log_text(accuracies=GOOD, trainer="IRM", data=f"drawn with {DRAWN}, seed 1804", **changed):
    """A log of this project."""
    arguments = {"trainer": trainer, "network": "MLP", "seed": 1804, "repetitions": 3}
    arguments |= {"dataset_path": "./data", "reg_lambda": 50.0, "hidden_dim": [64, 16]}
    lines = [f"Arguments: {arguments | changed}", "Device: CPU", f"Data: data/ColoredMNIST, {data}"]
    results, summary = result_lines(accuracies)
    for number, result in enumerate(results, 1):
        lines += [f"Repetition {number} of {len(results)}"]
        lines += ["Iteration 100: objective 0.5432; loss of train1 0.4321, train2 –", result]
        lines += ["Group accuracy: {'y=0 green': 0.7}", "Worst group: 0.7", "Flip rate: 0.1234"]
    return "\n".join([*lines, "Mean flip rate: 0.12", summary, ""])


def memristor_text(digital, on_crossbar, **changed):
    lines = log_text(digital, **changed).splitlines()[:-2]
    crossbar_lines, summary = result_lines(on_crossbar, "Crossbar test result")
    return "\n".join([*lines, *crossbar_lines, "Digital: {}", summary, ""])


def framework_text(accuracy, form="np.float64({})"):
    """A log of the course's framework: all that is known of it is its last line."""
    values = [accuracy, 0.02, 0.6, 0.0, 0.61, 1e-05]
    names = [f"{name}_test{figure}" for name in METRICS for figure in ("mean", "std")]
    pairs = zip(names, values, strict=True)
    summary = ", ".join(f"'{name}': {form.format(value)}" for name, value in pairs)
    return f"epoch 1\nloss 0.5\nSummary: {{{summary}}}\n"


@pytest.fixture
def check(in_process, tmp_path, monkeypatch):
    """Write logs, name → text or bytes, and check them all: (rows, what else, faults, status).

    A row is a list of its columns.
    """
    monkeypatch.chdir(tmp_path)

    def run(logs):
        for name, content in logs.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        result = in_process("metric.py", *logs)
        table, _, rest = result.stdout.partition("\n\n")
        rows = [re.split(r" {2,}", line, maxsplit=5) for line in table.splitlines()[1:]]
        return rows, rest, result.stderr.splitlines(), result.returncode

    return run


def accuracies_with_mean(mean):
    return (mean - 0.05, mean, mean + 0.05)


def test_a_log_is_checked(check):
    rows, rest, faults, status = check({"IRM_log.txt": log_text()})
    assert rows == [["IRM", "70.000 % ± 4.082", "15", "1804", "checked", "IRM_log.txt"]]
    assert (rest, faults, status) == ("", [], 0)


def test_the_five_logs_of_run_sh(check):
    logs = {}
    for number, trainer in enumerate(("ERM", "groupDRO", "IRM", "Backdoor")):
        accuracies = accuracies_with_mean(0.7 + number / 100)
        logs[f"{trainer}_log.txt"] = log_text(accuracies, trainer)
    logs["memristor_log.txt"] = memristor_text(GOOD, accuracies_with_mean(0.65))
    rows, rest, faults, status = check(logs)
    assert [row[:3] for row in rows] == [
        ["ERM", "70.000 % ± 4.082", "-"],
        ["groupDRO", "71.000 % ± 4.082", "15"],
        ["IRM", "72.000 % ± 4.082", "15"],
        ["Backdoor", "73.000 % ± 4.082", "-"],
        ["IRM on the crossbar", "65.000 % ± 4.082", "-"],
    ]
    assert [row[3:5] for row in rows] == [["1804", "checked"] for _ in logs]
    assert [row[5] for row in rows] == list(logs)
    assert rest.splitlines()[1].split() == ["20", "15", "15", "-", "."]
    assert (faults, status) == ([], 0)


@pytest.mark.parametrize("trainer", ["IRM", "groupDRO"])
@pytest.mark.parametrize(
    "mean, points",
    [(0.6, 15), (0.59999, 10), (0.599998, 10), (0.55, 10), (0.54999, 0), (0.3, 0)],
)
def test_points_are_the_sheets(check, trainer, mean, points):
    rows, *_ = check({"log.txt": log_text(accuracies_with_mean(mean), trainer)})
    assert rows[0][2] == str(points)
    if mean == 0.599998:
        assert rows[0][1].startswith("60.000")  # what is shown is rounded, what counts is not


def test_points_where_rounding_makes_a_mean_a_little_less(check):
    """0.55 exactly, which in floating point is 0.5499999999999999."""
    accuracies = (0.5, 0.5499, 0.6001)
    rows, *_ = check({"log.txt": log_text(accuracies)})
    assert np.mean(accuracies) < 0.55 and rows[0][2] == "10"


@pytest.mark.parametrize(
    "irm, group_dro, together",
    [
        (0.61, 0.62, "20"),
        (0.61, 0.56, "20"),
        (0.56, 0.57, "20"),
        (0.61, 0.5, "15"),
        (0.5, 0.5, "0"),
    ],
)
def test_points_of_both_are_at_most_20_together(check, irm, group_dro, together):
    logs = {
        "张 三/IRM_log.txt": framework_text(irm),
        "张 三/groupDRO_log.txt": log_text(accuracies_with_mean(group_dro), "groupDRO"),
        "李四/IRM_log.txt": log_text(),
        "李四/ERM_log.txt": log_text(trainer="ERM"),
        "c/groupDRO_log.txt": log_text(trainer="groupDRO"),
        "c/memristor_log.txt": memristor_text(GOOD, GOOD),
    }
    _, rest, faults, status = check(logs)
    points, note = rest.split("\n\n")
    assert note.startswith("not checked: ")
    rows = [re.split(r" {2,}", line) for line in points.splitlines()[1:]]
    ours = {row[-1]: row[:3] for row in rows}
    assert ours["c"] == ["15", "15", "missing"] and ours["李四"] == ["15", "missing", "15"]
    assert ours["张 三"][0] == together and len(rows) == 3
    assert (faults, status) == ([], 0)


def test_folders_of_faulty_logs_are_among_the_points(check):
    logs = {"a/IRM_log.txt": log_text(), "a/groupDRO_log.txt": log_text(GROUP_DRO, "groupDRO")}
    _, rest, _, _ = check(logs | {"b/IRM_log.txt": "", "b/groupDRO_log.txt": "cut"})
    assert [line.split() for line in rest.splitlines()[1:]] == [
        ["20", "15", "15", "-", "a"],
        ["0", "?", "faulty", "faulty", "-", "b"],
    ]


def test_every_hand_in_has_a_row(in_process, tmp_path, monkeypatch):
    """Nobody is lost whose logs have other names, lie deeper or are not there."""
    monkeypatch.chdir(tmp_path)
    irm, group_dro = log_text(), log_text(GROUP_DRO, "groupDRO")
    hand_ins = {
        "plain": {"IRM_log.txt": irm, "groupDRO_log.txt": group_dro, "data/old/IRM_log.txt": ""},
        "张 三": {"irm_log.txt": irm, "groupDRO.log": group_dro},
        "copies": {"IRM_log (1).txt": irm, "DRO_log.txt.txt": group_dro, "notes.txt": "IRM"},
        "deep": {"src/name/IRM_log.txt": irm, "logs/groupDRO_log.txt": group_dro},
        "half": {"IRM_log.txt": irm, "ERM_log.txt": irm, "src/groupDRO_log.txt": group_dro},
        "named": {"2021_IRM_log.txt": irm, "副本group DRO日志.txt": group_dro},
        "one": {
            "IRM.txt": irm,
            ".IRM_log.txt": "",
            ".venv/groupDRO_log.txt": group_dro,
            "data/former_logs/groupDRO_log.txt": group_dro,
            "__MACOSX/groupDRO_log.txt": "",
        },
        "none": {"README.txt": "", "IRM.pt": "", "confirm_log.txt": "", ".venv/IRM_log.txt": irm},
        "faulty": {"a/IRM_log.txt": "", "b/IRM_log.txt": ""},
    }
    for hand_in, logs in hand_ins.items():
        (tmp_path / hand_in).mkdir()
        (tmp_path / hand_in / "loop").symlink_to(tmp_path / hand_in)
        for name, text in logs.items():
            path = tmp_path / hand_in / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, "utf-8")
    result = in_process("metric.py", *(f"{hand_in}/" for hand_in in hand_ins))
    points = result.stdout.split("\n\n")[1].splitlines()[1:]
    rows = {row[-1]: row[:3] for row in (re.split(r" {2,}", line) for line in points)}
    assert list(rows) == list(hand_ins)
    for hand_in in ("plain", "张 三", "copies", "deep", "half", "named"):
        assert rows[hand_in] == ["20", "15", "15"], hand_in
    assert rows["one"] == ["15", "missing", "15"]
    assert rows["none"] == ["0", "missing", "missing"]
    assert rows["faulty"] == ["0 ?", "missing", "faulty"]
    assert len(result.stderr.splitlines()) == 2 and result.returncode == 1
    alone = in_process("metric.py", "one")
    assert alone.stdout.splitlines()[-1].split() == ["15", "missing", "15", "-", "one"]
    assert alone.returncode == 0


def test_a_log_that_is_named_twice_is_no_copy(in_process, tmp_path):
    (tmp_path / "IRM_log.txt").write_text(log_text(), "utf-8")
    result = in_process("metric.py", tmp_path / "IRM_log.txt", tmp_path / "IRM_log.txt")
    assert len(result.stdout.splitlines()) == 2 and "same results" not in result.stdout


def test_which_logs_have_notes_is_among_the_points(check):
    logs = {"a/IRM_log.txt": log_text(steady=True), "a/groupDRO_log.txt": framework_text(0.6)}
    logs["a/Backdoor_log.txt"] = log_text((0.7, 0.71, 0.72), "Backdoor", steady=True)  # not graded
    _, rest, _, _ = check(logs)
    assert rest.splitlines()[1].split() == ["20", "15", "15", "IRM", "a"]


def test_a_seed_that_is_not_the_student_numbers_is_pointed_out(check):
    for folder, pointed_out in (
        ("2021211804_张三", False),
        ("2021211804_张三_20241231", False),
        ("张三 2021211805", True),
        ("homework 2", False),
        ("2021211805/src", False),
    ):
        rows, *_ = check({f"{folder}/IRM_log.txt": log_text()})
        expected = "  (its seed is not 1805)" if pointed_out else ""
        assert rows[0][-1] == f"{folder}/IRM_log.txt{expected}"


def test_a_log_without_its_arguments_is_pointed_out(check):
    """Somebody may have cut away what it could be checked by."""
    lines = [line for line in log_text().splitlines() if line.startswith(("Group", "Summary"))]
    rows, _, faults, status = check({"IRM_log.txt": "\n".join(lines)})
    assert rows[0][:5] == ["IRM", "70.000 % ± 4.082", "15", "-", "not checked"]
    assert note(rows) == "  (its Arguments line is missing, or was changed)"
    assert (faults, status) == ([], 0)


@pytest.mark.parametrize("more", ["训练完成", "(ood) zhang@pc:~$", "100%|####| 400/400", "real 3s"])
def test_what_follows_a_summary_is_pointed_out(check, more):
    rows, _, faults, status = check({"IRM_log.txt": log_text() + more})
    assert rows[0][4] == "checked" and (faults, status) == ([], 0)
    assert note(rows) == f"  (after its Summary there is more: {more})"


@pytest.mark.parametrize("before", ["100%|####| 400/400", "$ ", "[INFO] {3} "])
def test_a_summary_is_found_wherever_it_stands_in_its_line(check, before):
    text = framework_text(0.61).replace("Summary: ", before + "Summary: ")
    rows, _, _, status = check({"IRM_log.txt": text})
    assert rows[0][2] == "15" and note(rows) == "" and status == 0


@pytest.mark.parametrize(
    "arguments",
    [
        "Namespace(trainer='IRM')",
        "{'lr': 0.001}",
        "{'trainer': None, 'repetitions': 3}",
        "{'trainer': 'IRM'}",
        "{'trainer': 'IRM', 'repetitions': '3'}",
        "['trainer', 'repetitions']",
        "__import__('os').system('touch ran')",
        "[" * 4000,
        "-" * 9000 + "1",
        "1" + "+1" * 4900,
        "(" * 10**6,
        "{{}: 1}",
        "{'trainer': 'IRM', 'repetitions': 0x" + "f" * 9000 + "}",
        str({"trainer": "IRM", "repetitions": 3, "dataset_path": "x" * 60_000}),
    ],
)
def test_arguments_of_others_are_not_checked(check, arguments):
    """Of whatever form they are; none is run, and none can crash Python's parser."""
    rows, _, faults, status = check(
        {"IRM_log.txt": f"Arguments: {arguments}\nRepetition 1 of 3\n" + framework_text(0.61)}
    )
    assert rows == [["IRM", "61.000 % ± 2.000", "15", "-", "not checked", "IRM_log.txt"]]
    assert (faults, status) == ([], 0) and not os.path.exists("ran")


def test_the_same_results_are_pointed_out_in_both(check):
    """Also where somebody changed a standard deviation."""
    changed = re.sub(r"('AUC_teststd': 0.0)\d", r"\g<1>9", framework_text(0.61))
    logs = {"a/IRM_log.txt": framework_text(0.61), "b/IRM_log.txt": changed}
    rows, *_ = check(logs)
    assert rows[0][-1].endswith("  (the same results as b/IRM_log.txt (seed -))")
    assert rows[1][-1].endswith("  (the same results as a/IRM_log.txt (seed -))")
    names = ("a/IRM_log.txt", "a/IRM_log (1).txt", "b/IRM_log.txt")
    rows, *_ = check(dict.fromkeys(names, log_text()))
    assert rows[0][-1].endswith("  (the same results as b/IRM_log.txt (seed 1804))")
    rows, *_ = check(logs | {"c/IRM_log.txt": framework_text(0.61)})
    assert rows[2][-1].endswith("  (the same results as a/IRM_log.txt (seed -) and 1 more)")
    rows, *_ = check({f"a/{name}": framework_text(0.61) for name in ("IRM_log.txt", "IRM.txt")})
    assert rows[0][-1].endswith("  (the same results as a/IRM.txt (seed -))")
    other_auc = framework_text(0.61, "{}").replace("'AUC_testmean': 0.6", "'AUC_testmean': 0.5")
    rows, *_ = check({"a/IRM_log.txt": framework_text(0.61), "b/IRM_log.txt": other_auc})
    assert [row[-1] for row in rows] == ["a/IRM_log.txt", "b/IRM_log.txt"]
    rows, *_ = check({"a/IRM_log.txt": log_text(), "b/IRM_log.txt": log_text(seed=1805)})
    assert rows[0][-1].endswith("(the same results as b/IRM_log.txt (seed 1805))")


def test_a_log_of_another_trainer_than_its_name_says_is_pointed_out(check):
    rows, *_ = check({"IRM_log.txt": log_text(trainer="groupDRO")})
    assert note(rows) == "  (its name says IRM)"
    logs = {"a/IRM_log.txt": log_text(trainer="Backdoor"), "a/DRO.txt": framework_text(0.6)}
    _, rest, _, _ = check({**logs, "b/IRM_log.txt": log_text(GROUP_DRO)})
    assert rest.splitlines()[1].split() == ["15", "15", "missing", "Backdoor", "a"]


def test_of_two_logs_of_one_trainer_the_better_counts(check):
    bad = accuracies_with_mean(0.5)
    logs = {"IRM_log.txt": log_text(), "groupDRO_log.txt": log_text(bad, "groupDRO")}
    _, rest, _, _ = check(logs | {"IRM_log2.txt": log_text(accuracies_with_mean(0.51))})
    assert rest.splitlines()[1].split() == ["15", "0", "15", "-", "."]


def test_columns_are_aligned(in_process, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    logs = {"a b.txt": log_text((0.1,) * 3, "groupDRO"), "ERM_log.txt": framework_text(1.0)}
    logs["学号 1804.txt"] = memristor_text(GOOD, GOOD)
    for name, content in logs.items():
        (tmp_path / name).write_text(content, "utf-8")
    lines = in_process("metric.py", *logs).stdout.splitlines()
    assert len(lines[:-2]) == 4 and lines[-1].startswith("not checked: ")
    lines = lines[:4]
    assert len({line.index(name) for line, name in zip(lines, ["file", *logs], strict=True)}) == 1
    assert len({line.index("%") for line in lines[1:]}) == 1
    assert len({line.index("±") for line in lines[1:]}) == 1


@pytest.mark.parametrize("form", ["{}", "np.float64({})"])
@pytest.mark.parametrize(
    "name, trainer, points",
    [
        ("IRM_log.txt", "IRM", "15"),
        ("irm_LOG.txt", "IRM", "15"),
        ("GROUPDRO_log.txt", "groupDRO", "15"),
        ("ERM_log.txt", "ERM", "-"),
        ("irm.log", "IRM", "15"),
        ("IRM_log (1).txt", "IRM", "15"),
    ],
)
def test_a_log_of_the_courses_framework_is_told_by_its_name(check, form, name, trainer, points):
    rows, _, faults, status = check({name: framework_text(0.68, form)})
    assert rows == [[trainer, "68.000 % ± 2.000", points, "-", "not checked", name]]
    assert (faults, status) == ([], 0)


@pytest.mark.parametrize("name", ["other.txt", "IRM_log.old", "confirm_log.txt", "ermine.txt"])
def test_a_log_of_another_name_earns_no_points(check, name):
    rows, *_ = check({name: framework_text(0.68)})
    assert rows[0][0] == "?" and rows[0][2] == "-"
    assert rows[0][-1] == f"{name}  (its name says no trainer)"


def test_of_two_runs_of_the_framework_in_one_file_the_last_counts(check):
    rows, *_ = check({"IRM_log.txt": framework_text(0.5) + framework_text(0.57)})
    assert rows[0][1:3] == ["57.000 % ± 2.000", "10"]
    assert note(rows) == "  (it is the last of 2 Summaries)"


def test_this_projects_trainer_is_told_by_the_log(check):
    rows, *_ = check({"IRM_log.txt": log_text(trainer="ERM")})
    assert rows[0][0] == "ERM"


@pytest.mark.parametrize("position", range(6))
def test_a_figure_that_does_not_follow_is_found(check, position):
    *lines, last = log_text().splitlines()
    summary = ast.literal_eval(last.removeprefix("Summary: "))
    name = list(summary)[position]
    for off, fault in ((3e-9, True), (-3e-9, True), (3e-10, False)):
        changed = f"Summary: {summary | {name: summary[name] + off}}"
        rows, _, faults, status = check({"IRM_log.txt": "\n".join([*lines, changed])})
        if fault:
            assert rows == [] and status == 1 and len(faults) == 1
            for words in ("metric.py: IRM_log.txt: ", name, "its results give "):
                assert words in faults[0]
        else:
            assert len(rows) == 1 and (faults, status) == ([], 0)


def test_of_a_memristor_log_the_crossbars_results_count(check):
    worse = accuracies_with_mean(0.5)
    assert check({"good.txt": memristor_text(GOOD, worse)})[-1] == 0
    changed = memristor_text(GOOD, worse).replace("Crossbar test result", "Crossbar")
    rows, _, faults, status = check({"bad.txt": changed})
    assert rows == [] and "its results give" in faults[0] and status == 1


def test_a_memristor_log_may_be_of_many_saved_networks(check):
    files = [f"models/IRM_MLP_seed1234_repetition{number}.pt" for number in range(500)]
    many = [0.5 + number / 1000 for number in range(500)]
    log = memristor_text(many, many, load_model=files, repetitions=500)
    rows, _, faults, status = check({"good.txt": log})
    assert rows[0][0] == "IRM on the crossbar" and (faults, status) == ([], 0)


def test_nan_follows_from_nan_alone(check):
    with_nan = re.sub(r"'AUC(\w*)': [\d.]+", r"'AUC\1': nan", log_text())
    rows, _, faults, status = check({"IRM_log.txt": with_nan})
    assert rows[0][:3] == ["IRM", "70.000 % ± 4.082", "15"] and (faults, status) == ([], 0)
    one_nan = re.sub(r"'AUC_testmean': [\d.]+", "'AUC_testmean': nan", log_text())
    _, _, faults, status = check({"IRM_log.txt": one_nan})
    assert status == 1 and "AUC_testmean" in faults[0]
    one_number = re.sub(r"'AUC': [\d.]+", "'AUC': nan", log_text())
    assert check({"IRM_log.txt": one_number})[-1] == 1


def without_lines(text, start):
    return "".join(line for line in text.splitlines(True) if not line.startswith(start))


def with_summary(text):
    return log_text().rpartition("Summary: ")[0] + "Summary: " + text


def with_arguments(text):
    return log_text().replace(log_text().splitlines()[0], f"Arguments: {text}")


WRONG = {
    "empty": ("", "empty"),
    "blank": ("\n \n", "empty"),
    "cut off": (log_text()[:900], "no Summary; its last line is"),
    "no Summary": (without_lines(log_text(), "Summary"), "its last line is Mean flip rate: 0.12"),
    "error": ("Arguments: {}\nRuntimeError: out of memory", "is RuntimeError: out of memory"),
    "cut Summary": (log_text()[:-5], "its Summary is not of the form"),
    "too few": (log_text(GOOD[:2]), "results of 2 of 3 repetitions"),
    "too many": (log_text((*GOOD, 0.7)), "results of 4 of 3 repetitions"),
    "none": (without_lines(log_text(repetitions=0), "Test result"), "results of 0 of 0"),
    "twice": (log_text() + log_text(), "it holds 2 runs"),
    "other keys": (with_summary("{'Accuracy_testmean': 0.7}"), "its Summary is not of the form"),
    "no dict": (with_summary("0.7"), "no Summary; its last line is Summary: 0.7"),
    "more after it": (log_text().strip() + "!", "its Summary is not of the form"),
    "other order": (
        re.sub(r"('Acc\w+mean': [^,]+), ('Acc\w+std': [^,]+)", r"\2, \1", log_text()),
        "its Summary is not of the form",
    ),
    "other result": (
        log_text().replace("'AUC': ", "'auc': "),
        "its Test result is not of the form",
    ),
    "more": (framework_text(1.01), "Accuracy_testmean 1.01, which is not from 0 to 1"),
    "less": (framework_text(-0.01), "Accuracy_testmean -0.01, which is not from 0 to 1"),
    "infinite": (framework_text("inf"), "inf, which is not from 0 to 1"),
    "huge": (framework_text("9" * 5000), "inf, which is not from 0 to 1"),
    "result above 1": (log_text((0.65, 0.7, 1.2)), "Accuracy 1.2, which is not from 0 to 1"),
    "no number": (framework_text("1.2.3"), "its Summary is not of the form"),
    "code": (framework_text("__import__('os').system('touch ran')"), "not of the form"),
    "code in np.float64": (framework_text("open('ran', 'w')"), "not of the form"),
    "binary": (bytes(range(256)) * 9, "not text"),
    "zeros": (bytes(999), "not text"),
    "half of UTF-16": ((log_text()[:600]).encode("utf-16")[:-1], "no Summary"),
    "too large": (b" " * 10_000_001, "too large"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_log_is_named_and_the_others_are_shown(check, kind):
    text, reason = WRONG[kind]
    logs = {"a/IRM_log.txt": log_text(), "b/groupDRO_log.txt": text}
    logs["c/IRM_log.txt"] = log_text(GROUP_DRO)
    rows, _, faults, status = check(logs)
    assert [row[-1] for row in rows] == ["a/IRM_log.txt", "c/IRM_log.txt"]
    assert status == 1 and len(faults) == 1, faults
    assert faults[0].startswith("metric.py: b/groupDRO_log.txt: ") and reason in faults[0]
    assert len(faults[0]) < 300
    assert not os.path.exists("ran")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", ["missing", "pipe", "link", "nameless"])
def test_what_is_no_file_is_named(in_process, tmp_path, kind):
    (tmp_path / "IRM_log.txt").write_text(log_text(), "utf-8")
    name = tmp_path / "other"
    if kind == "pipe":
        os.mkfifo(name)  # that nobody ever writes into
    elif kind == "link":
        name.symlink_to(name)
    elif kind == "nameless":
        name = tmp_path / ("x" * 1000)
    result = in_process("metric.py", name, tmp_path / "IRM_log.txt")
    assert result.returncode == 1 and "checked" in result.stdout
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"metric.py: {name}: it ")


@pytest.mark.parametrize(
    "encode",
    [
        lambda text: text.encode("utf-8-sig"),
        lambda text: text.encode("utf-16"),  # with a byte order mark, as PowerShell has it
        lambda text: b"\xfe\xff" + text.encode("utf-16-be"),
        lambda text: text.replace("\n", "\r\n").encode(),
        lambda text: text.replace("\n", "\r\n").encode("utf-16"),
        lambda text: text.replace("./data", "D:/作业").encode("gbk"),
        lambda text: text.replace("Device", "\n10%|#\r20%|##\nDevice").encode() + b"\n \n",
    ],
)
def test_logs_as_other_systems_write_them(check, encode):
    logs = {"a/IRM_log.txt": encode(log_text()), "b/IRM_log.txt": encode(framework_text(0.5))}
    rows, _, faults, status = check(logs)
    assert [row[2:5:2] for row in rows] == [["15", "checked"], ["0", "not checked"]]
    assert (faults, status) == ([], 0)


def note(rows):
    (row,) = rows
    return row[-1].removeprefix("IRM_log.txt")


def test_other_data_are_pointed_out(check):
    for drawn in ("drawn with", "drawn now with"):
        own = f"{drawn} {DRAWN}, seed "
        assert note(check({"IRM_log.txt": log_text(data=own + "1804")})[0]) == ""
        rows, _, _, status = check({"IRM_log.txt": log_text(data=own + "1234")})
        assert note(rows) == "  (seed 1804 trained on the data of seed 1234)" and status == 0
        easier = own.replace("0.4, 0.9]", "0.4, 0.1]")
        rows, *_ = check({"IRM_log.txt": log_text(data=easier + "1804")})
        assert note(rows).startswith("  (data drawn with p_f 0.2, p_e [0.1, 0.4, 0.1], sizes ")
    foreign = log_text(data="normalised tensors")
    expected = "  (data of others: data/ColoredMNIST, normalised tensors)"
    assert note(check({"IRM_log.txt": foreign})[0]) == expected


def test_other_settings_are_pointed_out(check):
    changed = {"reg_lambda": 1000.0, "hidden_dim": [32], "steady": True, "no_cuda": True}
    changed["eta"] = 0.5  # groupDRO's
    rows, _, _, status = check({"IRM_log.txt": log_text(**changed)})
    words = note(rows).strip(" ()").split("; ")
    assert sorted(words) == ["hidden_dim is (32,)", "reg_lambda is 1000.0", "steady is True"]
    assert status == 0 and rows[0][2] == "15"


def test_no_text_of_a_log_or_its_name_moves_the_cursor(check):
    name = "b\n\x1b[2J.txt"
    logs = {name: log_text(trainer="IRM\n\x1b[1A", network="\x1b[2J"), "\x1b[1A": "cut off"}
    rows, _, faults, status = check(logs)
    assert len(rows) == 1 and len(faults) == 1 and status == 1
    assert "\x1b" not in "".join([*rows[0], *faults])
    assert rows[0][0] == "IRM??[1A" and rows[0][-1].startswith("b??[2J.txt  (network is ?[2J")


def test_defaults_are_the_trainings():
    """What is not pointed out is what a training does unless told otherwise."""
    from trainer import parse_arguments

    used = vars(parse_arguments("", []))
    for name, default in metric.DEFAULTS.items():
        assert (tuple(used[name]) if isinstance(used[name], list) else used[name]) == default, name


def test_a_real_log_is_checked(in_process, small_files, check):
    """Small data and few steps, which the row says; nothing else."""
    arguments = ("--dataset_path", small_files.parent, "--seed", 3, "--no_cuda", "--iteration", 2)
    log = in_process("exp-mnist.py", "--trainer", "groupDRO", *arguments)
    assert log.returncode == 0, log.stderr
    rows, _, faults, status = check({"IRM_log.txt": log.stdout})
    assert (faults, status) == ([], 0)
    assert rows[0][0] == "groupDRO" and rows[0][3:5] == ["3", "checked"]
    sizes = DRAWN.replace("20000", "60")
    assert note(rows) == f"  (data drawn with {sizes}; iteration is 2; its name says IRM)"


def test_the_command(command, in_process, tmp_path):
    """As a process, where standard output can't take every character: what is wrong comes last."""
    (tmp_path / "IRM_log.txt").write_text(log_text(), "utf-8")
    ascii_only = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    ascii_only["PYTHONUNBUFFERED"] = ""  # as most users have it
    streams = {"capture_output": False, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    logs = ("IRM_log.txt", "没有.txt")
    result = command("metric.py", *logs, cwd=tmp_path, env=ascii_only, **streams)
    assert result.returncode == 1
    heading, row, fault = result.stdout.splitlines()
    assert heading.startswith("trainer ")
    assert row.split()[:4] == ["IRM", "70.000", "%", "?"]
    assert fault.startswith("metric.py: ") and fault.endswith(": No such file or directory")
    usage = in_process("metric.py")
    assert usage.returncode == 2 and usage.stderr.startswith("usage: ")


def test_eighty_logs_take_no_second(check):
    logs = {f"{student:02}/IRM_log.txt": log_text() for student in range(80)}
    start = time.process_time()
    rows, *_ = check(logs)
    assert len(rows) == 80 and time.process_time() - start < 1


@pytest.mark.parametrize(
    "piece",
    ["np.float64(", "9", "1+", "Summary: ", "Repetition 1 of ", ", seed ", " with ", "{'", "\n"],
)
def test_long_lines_take_no_time(check, piece):
    """Reading a log takes time in proportion to its length, whatever it holds."""
    many = piece * (3_000_000 // len(piece))
    start = time.process_time()
    texts = [many, f"Summary: {many}", log_text().replace("drawn with", many)]
    texts += [framework_text(f"{many}x"), with_arguments(f"{many}1")]
    for text in texts:
        check({"IRM_log.txt": text})
    assert time.process_time() - start < 3
