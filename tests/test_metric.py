"""The metrics, and `python metric.py LOG...`, which prints a table of logs."""

import math
import re
import warnings

import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score, roc_auc_score

from metric import group_accuracies, metrics


def test_metrics_are_sklearns():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        logits = torch.randn(50, generator=generator).round(decimals=1)  # with ties and zeros
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
        result = metrics(torch.full((3,), float(logit)), torch.full((3,), float(label)))
    assert math.isnan(result["AUC"])
    assert result["Accuracy"] == result["F1_macro"] == float((logit > 0) == label)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_metrics_take_logits_of_any_float_type(dtype):
    """Logits under autocast are bfloat16, and logits in training have a gradient."""
    logits = torch.tensor([-1.0, 2.0, 0.5, -3.0], dtype=dtype, requires_grad=True)
    result = metrics(logits, torch.tensor([0, 1, 0, 1]))
    assert result == {"Accuracy": 0.5, "AUC": 0.5, "F1_macro": 0.5}
    assert all(type(value) is float for value in result.values())


def test_logits_are_not_rounded():
    logits = torch.tensor([1e-60, 2e-60], dtype=torch.float64)
    result = metrics(logits, torch.tensor([0, 1]))
    assert result == {"Accuracy": 0.5, "AUC": 1.0, "F1_macro": pytest.approx(1 / 3)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_accuracy_of_each_group(dtype):
    logits = torch.tensor([-1, -1, -1, 1, 0, 1, 1, 1, -1, 1], dtype=dtype)  # 0 predicts label 0
    labels = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 1, 1])
    colors = torch.tensor([0, 0, 0, 0, 1, 1, 0, 1, 1, 1])
    accuracies = group_accuracies(logits, labels.float(), colors)
    expected = {"y=0 green": 3 / 4, "y=0 red": 1 / 2, "y=1 green": 1.0, "y=1 red": 2 / 3}
    assert accuracies == pytest.approx(expected)
    assert list(accuracies) == list(expected)
    assert all(type(value) is float for value in accuracies.values())


def test_empty_groups_are_left_out():
    accuracies = group_accuracies(torch.ones(3), torch.tensor([0, 1, 1]), torch.tensor([1, 0, 0]))
    assert accuracies == {"y=0 red": 0.0, "y=1 green": 1.0}


# The table of logs.


def log_text(trainer="IRM", accuracy=0.7, deviation=0.04, crossbar=False):
    """Return the lines of a log, with all that the table depends on."""
    lines = [
        f"Arguments: {{'trainer': '{trainer}', 'network': 'MLP', 'seed': 1234}}",
        "Repetition 1 of 1",
        "Test result: {'Accuracy': 0.12, 'AUC': 0.12, 'F1_macro': 0.12}",
    ]
    if crossbar:
        lines.append("Crossbar test result: {'Accuracy': 0.12, 'AUC': 0.12, 'F1_macro': 0.12}")
    lines.append(
        f"Summary: {{'Accuracy_testmean': {accuracy}, 'Accuracy_teststd': {deviation}, "
        "'AUC_testmean': 0.12, 'AUC_teststd': 0.12, 'F1_macro_testmean': 0.12, "
        "'F1_macro_teststd': 0.12}"
    )
    return "\n".join([*lines, ""])


@pytest.fixture
def table(in_process, tmp_path):
    """Write logs and print their table. Return its rows as columns, and the command's result."""

    def run(*texts):
        paths = [tmp_path / f"{number}.txt" for number in range(len(texts))]
        for path, text in zip(paths, texts, strict=True):
            path.write_text(text, "utf-8")
        result = in_process("metric.py", *paths)
        heading, *rows = (re.split(r" {2,}", line) for line in result.stdout.splitlines())
        assert heading == ["trainer", "test accuracy", "points"]
        return rows, result

    return run


def test_table_of_the_logs_of_run_sh(table):
    rows, result = table(
        log_text("ERM", 0.52),
        log_text("groupDRO", 0.7),
        log_text("Backdoor", 0.758, 0.0109),
        log_text("IRM", 0.56),
        log_text("IRM", 0.65, 0.0, crossbar=True),
    )
    assert rows == [
        ["ERM", "52.00 % ± 4.00 %", "-"],
        ["groupDRO", "70.00 % ± 4.00 %", "15"],
        ["Backdoor", "75.80 % ± 1.09 %", "-"],
        ["IRM", "56.00 % ± 4.00 %", "10"],
        ["IRM on the crossbar", "65.00 % ± 0.00 %", "-"],
        ["together, at most 20", "20"],
    ]
    assert result.stderr == "" and result.returncode == 0
    ends = {line.index(" %") for line in result.stdout.splitlines()[1:-1]}
    assert len(ends) == 1  # columns are aligned


@pytest.mark.parametrize("trainer", ["IRM", "groupDRO"])
@pytest.mark.parametrize(
    ("accuracy", "points"),
    [(0.9, 15), (0.6, 15), (0.599999, 10), (0.55, 10), (0.549999, 0), (0.0, 0)],
)
def test_points_of_the_assignment(table, trainer, accuracy, points):
    rows, _ = table(log_text(trainer, accuracy))
    assert rows[0][2] == rows[1][1] == str(points)


@pytest.mark.parametrize(
    ("irm", "group_dro", "together"),
    [(0.61, 0.56, 20), (0.56, 0.57, 20), (0.61, 0.5, 15), (0.5, 0.5, 0)],
)
def test_points_together_are_at_most_20(table, irm, group_dro, together):
    rows, _ = table(log_text("IRM", irm), log_text("groupDRO", group_dro))
    assert rows[-1] == ["together, at most 20", str(together)]


def test_the_best_of_several_logs_counts(table):
    rows, _ = table(*(log_text("IRM", accuracy) for accuracy in (0.56, 0.61, 0.5)))
    assert [row[2] for row in rows[:3]] == ["10", "15", "0"]
    assert rows[3] == ["together, at most 20", "15"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Arguments: {'trainer': 'IRM'}\nRuntimeError: out of memory\n",
        log_text() + "interrupted\n",
        log_text()[: log_text().index("'Accuracy_teststd'")],
        "Summary: {'Accuracy_testmean': __import__('os').abort(), 'Accuracy_teststd': 0.1,",
    ],
)
def test_a_log_without_a_summary_is_named(table, tmp_path, text):
    """The other logs are printed, and the exit status is 1."""
    rows, result = table(log_text("IRM"), text, log_text("ERM"))
    assert [row[0] for row in rows] == ["IRM", "ERM", "together, at most 20"]
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"metric.py: {tmp_path / '1.txt'} does not end with a Summary.")
    assert result.returncode == 1


@pytest.mark.parametrize("deviation", ["0.0", "1e-05", "2.5e-05", "0.05599590758856103"])
def test_numbers_are_read_in_every_format_that_python_prints(table, deviation):
    rows, _ = table(log_text("IRM", 0.65, deviation))
    assert rows[0][1] == f"65.00 % ± {100 * float(deviation):.2f} %"


def test_nan_in_other_metrics_does_not_matter(table):
    """The AUC is nan if all labels are the same."""
    rows, _ = table(re.sub(r"'AUC_testmean': [\d.]+", "'AUC_testmean': nan", log_text()))
    assert rows[0] == ["IRM", "70.00 % ± 4.00 %", "15"]


def test_table_of_a_real_log(in_process, small_files, table):
    arguments = ("--dataset_path", small_files.parent, "--seed", 3, "--no_cuda", "--iteration", 2)
    log = in_process("exp-mnist.py", "--trainer", "groupDRO", *arguments).stdout
    rows, result = table(log)
    accuracy, deviation = re.search(
        r"\nSummary: {'Accuracy_testmean': ([^,]+), 'Accuracy_teststd': ([^,]+),", log
    ).groups()
    shown = f"{100 * float(accuracy):.2f} % ± {100 * float(deviation):.2f} %"
    assert rows[0][:2] == ["groupDRO", shown] and result.returncode == 0


def test_a_missing_log_is_named(in_process, tmp_path):
    (tmp_path / "IRM_log.txt").write_text(log_text(), "utf-8")
    result = in_process("metric.py", tmp_path / "missing.txt", tmp_path / "IRM_log.txt")
    assert result.returncode == 1 and len(result.stdout.splitlines()) == 3
    missing = f"cannot read {tmp_path / 'missing.txt'}: No such file or directory"
    assert result.stderr == f"metric.py: {missing}\n"
    usage = in_process("metric.py")
    assert usage.returncode == 2 and usage.stderr.startswith("usage: ")
