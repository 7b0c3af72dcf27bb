"""Logits and labels → Accuracy, AUC, macro F1; their mean over repetitions; and what checks logs.

python metric.py IRM_log.txt groupDRO_log.txt
"""

import argparse
import ast
import codecs
import math
import re
import sys
from pathlib import Path
from statistics import fmean, pstdev
from typing import NamedTuple

import numpy as np
from sklearn.metrics import accuracy_score, f1_score, roc_auc_score
from torch import Tensor

from preprocessing import UserError, run_command


def metrics(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Scores, 0 to 1, of predicting 1 where a logit (N,) is above 0; AUC of one label is nan.

    Logits of any float type, on any device.
    """
    truth = labels.cpu().numpy()
    scores = logits.detach().cpu().double().numpy()  # numpy has no bfloat16
    return {
        "Accuracy": float(accuracy_score(truth, scores > 0)),
        "AUC": float(roc_auc_score(truth, scores)) if truth.min() < truth.max() else math.nan,
        "F1_macro": float(f1_score(truth, scores > 0, average="macro")),
    }


def group_accuracies(logits: Tensor, labels: Tensor, colors: Tensor) -> dict[str, float]:
    """Accuracy of each group of a label and a colour (1 is red), all (N,).

    A group without a sample is left out. The worst group's is the `min` of the values.
    """
    labels, colors = labels.cpu(), colors.cpu()
    correct = (logits.cpu() > 0) == (labels > 0)
    accuracies = {}
    for label in (0, 1):
        for color, color_name in enumerate(("green", "red")):
            group = (labels == label) & (colors == color)
            if group.any():
                accuracies[f"y={label} {color_name}"] = correct[group].double().mean().item()
    return accuracies


def summarize(results: list[dict[str, float]]) -> dict[str, float]:
    """Mean and population standard deviation of each metric over repetitions; nan if one is nan."""
    summary = {}
    for name in results[0]:
        values = [float(result[name]) for result in results]
        mean = fmean(values)
        summary[f"{name}_testmean"] = mean
        summary[f"{name}_teststd"] = math.nan if math.isnan(mean) else pstdev(values)
    return summary


# Checking logs. Whatever is wrong with one is a UserError, whose message is the reason.

METRICS = ["Accuracy", "AUC", "F1_macro"]
SUMMARY = [f"{name}_test{figure}" for name in METRICS for figure in ("mean", "std")]
NUMBER = r"(-?(?:\d+(?:\.\d+)?(?:e[+-]?\d+)?|inf|nan))"
LARGEST = 10**7  # bytes of a log; one of this project has about 3000
LONGEST = 50_000  # characters of an Arguments line: much more can crash Python's parser

# The assignment's, and what the log's Data line says of data that were drawn as it wants.
DEFAULTS = {
    "network": "MLP",
    "repetitions": 3,
    "validation": 0.2,
    "grayscale": False,
    "iteration": 400,
    "batch_size": 1024,
    "learning_rate": 1e-3,
    "weight_decay": 0.0,
    "steady": False,
    "hidden_dim": (64, 16),
    "bias": False,
    "drop_rate": 0.0,
    "eta": 0.05,
    "reg_lambda": 50.0,
}
GRADED = ("groupDRO", "IRM")
ONLY_OF = {"eta": "groupDRO", "reg_lambda": "IRM"}
DRAWN_WITH = "p_f 0.2, p_e [0.1, 0.4, 0.9], sizes [20000, 20000, 20000], shuffle_digits false"


class Log(NamedTuple):
    """What a row of the table shows."""

    file: str
    trainer: str
    seed: str
    summary: dict[str, float]
    checked: bool  # whether the Summary was computed again
    notes: list[str]  # what whoever grades it should know

    @property
    def points(self) -> int | None:
        """The assignment's 15, 10 or 0; None for what it does not grade."""
        if self.trainer not in GRADED:
            return None
        # The mean of three accuracies is often a little less than 0.55 where it is just that.
        accuracy = self.summary["Accuracy_testmean"] + 1e-9
        if accuracy >= 0.6:
            return 15
        return 10 if accuracy >= 0.55 else 0


def read_log(file: str) -> Log:
    """Check a log of this project, or read one of the course's framework; UserError if wrong."""
    lines = [line.strip() for line in read_text(file).splitlines() if line.strip()]
    if not lines:
        raise UserError("it is empty")
    if not lines[-1].startswith("Summary: "):
        raise UserError("it is cut off, as its last line is not the Summary")
    summary = read_figures(lines[-1], SUMMARY)
    arguments = [line for line in lines if line.startswith("Arguments: ")]
    if not arguments and not any(re.fullmatch(r"Repetition \d+ of \d+", line) for line in lines):
        if any(line.startswith(("Group accuracy: ", "Flip rate: ")) for line in lines):
            raise UserError("it has no Arguments line, which each log of this project begins with")
        return Log(file, named_trainer(file) or "?", "-", summary, False, [])

    if len(arguments) != 1:
        raise UserError(f"it has {len(arguments)} Arguments lines: a log is of one run")
    used = read_arguments(arguments[0])
    digital = [line for line in lines if line.startswith("Test result: ")]
    on_crossbar = [line for line in lines if line.startswith("Crossbar test result: ")]
    results = [read_figures(line, METRICS) for line in on_crossbar or digital]
    if not results or len(results) != used["repetitions"]:
        raise UserError(f"it has results of {len(results)} of {used['repetitions']} repetitions")
    for name, value in summarize(results).items():
        if not np.isclose(summary[name], value, rtol=0, atol=1e-9, equal_nan=True):
            raise UserError(f"its Summary says {name} {summary[name]}, its results give {value}")
    trainer = used["trainer"] + (" on the crossbar" if on_crossbar else "")
    notes = notes_on(used, lines)
    if named_trainer(file) not in (None, trainer):
        notes.append(f"its name says {named_trainer(file)}")
    return Log(file, trainer, str(used.get("seed", "-")), summary, True, notes)


def named_trainer(file: str) -> str | None:
    """The trainer that a log's name says, as the assignment wants these names; None for others."""
    trainers = {"erm_log.txt": "ERM", "groupdro_log.txt": "groupDRO", "irm_log.txt": "IRM"}
    return trainers.get(Path(file).name.lower())


def read_text(file: str) -> str:
    """A file's text: UTF-8, or UTF-16 as PowerShell's > writes it."""
    path = Path(file)
    try:
        size = path.stat().st_size
        if not path.is_file():  # nothing may ever come out of a pipe
            raise UserError("it is not a file")
        if size > LARGEST:
            raise UserError("it is too large for a log")
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"it cannot be read: {error.strerror or error}") from None
    utf_16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    # What isn't UTF-8, such as a folder's name on a Chinese Windows, is in no line that counts.
    text = content.decode("utf-16" if utf_16 else "utf-8-sig", errors="replace")
    if "\0" in text:
        raise UserError("it is not text")
    return text


def read_figures(line: str, names: list[str]) -> dict[str, float]:
    """The numbers, 0 to 1 or nan, of a line "Summary: {...}" or "Test result: {...}"."""
    title, _, figures = line.partition(": ")
    figures = re.sub(r"np\.float64\(([^()]*)\)", r"\1", figures)
    form = r"\{" + ", ".join(f"'{name}': {NUMBER}" for name in names) + r"\}"
    match = re.fullmatch(form, figures)
    if not match:
        raise UserError(f"its {title} is not of the form {{{names[0]!r}: 0.5, ...}}")
    values = [float(number) for number in match.groups()]
    for name, value in zip(names, values, strict=True):
        if value < 0 or value > 1:
            raise UserError(f"its {title} has {name} {value}, which is not from 0 to 1")
    return dict(zip(names, values, strict=True))


def read_arguments(line: str) -> dict:
    """What an Arguments line says; it is read, never run."""
    text = line.removeprefix("Arguments: ")
    try:
        arguments = ast.literal_eval(text) if len(text) <= LONGEST else None
        # Only as Python itself writes a dict: no number that is too large for text, say.
        is_ours = isinstance(arguments, dict) and str(arguments) == text
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        is_ours = False
    if not is_ours:
        raise UserError("its Arguments line is not of this project's form")
    for name, kind in (("trainer", str), ("repetitions", int)):
        if not isinstance(arguments.get(name), kind):
            raise UserError(f"its Arguments line says no {name}")
    return arguments


def notes_on(arguments: dict, lines: list[str]) -> list[str]:
    """What differs from the assignment: flags, and how the data were drawn."""
    notes = []
    for line in lines:
        if line.startswith("Data: "):
            drawn = re.search(r", drawn (?:now )?with (p_f .*), seed (.*)$", line)
            if drawn and drawn[2] != str(arguments.get("seed")):
                notes.append(f"seed {arguments.get('seed')} trained on the data of seed {drawn[2]}")
            if drawn and drawn[1] != DRAWN_WITH:
                notes.append(f"data drawn with {drawn[1]}")
    for name, default in DEFAULTS.items():
        # What has no effect on this trainer is no difference.
        if ONLY_OF.get(name, arguments["trainer"]) != arguments["trainer"]:
            continue
        value = arguments.get(name, default)
        if isinstance(value, list):
            value = tuple(value)
        if value != default:
            notes.append(f"{name} is {value}")
    return notes


def table(rows: list[list[str]]) -> str:
    """Rows with aligned columns; the last needs no width, so it may be in wide characters."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    widths[-1] = 0
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join(cells))
    return "\n".join(lines)


def on_one_line(text: str) -> str:
    """Without what would move a terminal's cursor, which a file's name may hold."""
    return "".join(character if character.isprintable() else "?" for character in text)


def log_table(logs: list[Log]) -> str:
    """A row for each log."""
    rows = [["trainer", "test accuracy", "points", "seed", "Summary", "file"]]
    first_with = {}
    for log in logs:
        first = first_with.setdefault(str(log.summary), log.file)
        notes = log.notes + ([f"the same Summary as {first}"] if first != log.file else [])
        mean, deviation = log.summary["Accuracy_testmean"], log.summary["Accuracy_teststd"]
        # Three decimals, as 59.998 % must not look like 60.
        accuracy = f"{100 * mean:7.3f} % ± {100 * deviation:.3f}"
        points = "-" if log.points is None else str(log.points)
        file = log.file + (f"  ({'; '.join(notes)})" if notes else "")
        checked = "checked" if log.checked else "not checked"
        cells = [log.trainer, accuracy, points, log.seed, checked, file]
        rows.append([on_one_line(cell) for cell in cells])
    return table(rows)


def points_table(logs: list[Log], faulty: list[str]) -> str:
    """A row for each folder that has one of the assignment's logs; "" unless both kinds are there.

    Of two logs of one trainer the better counts. `faulty` are the files that could not be read.
    """
    folders = {}
    for log in logs:
        if log.points is not None:
            best = folders.setdefault(str(Path(log.file).parent), {})
            best[log.trainer] = max(log.points, best.get(log.trainer, 0))
    for file in faulty:
        if named_trainer(file) in GRADED:
            folders.setdefault(str(Path(file).parent), {}).setdefault(named_trainer(file), "faulty")
    if {trainer for best in folders.values() for trainer in best} != set(GRADED):
        return ""
    rows = [["points together, at most 20", *GRADED, "folder"]]
    for folder in sorted(folders):
        shown = [folders[folder].get(trainer, "missing") for trainer in GRADED]
        together = min(20, sum(points for points in shown if isinstance(points, int)))
        rows.append([str(together), *map(str, shown), on_one_line(folder)])
    return table(rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Check logs, and show their results and the points that these earn.",
        epilog="A log of this project is checked: its Summary is computed again. "
        "The exit status is 1 if anything is wrong.",
        allow_abbrev=False,
    )
    parser.add_argument("logs", nargs="+", metavar="LOG", help="such as IRM_log.txt")
    logs, faulty, faults = [], [], []
    for file in parser.parse_args().logs:
        try:
            logs.append(read_log(file))
        except UserError as reason:
            faulty.append(file)
            faults.append(on_one_line(f"metric.py: {file}: {reason}"))
    if logs:
        print(log_table(logs))
    points = points_table(logs, faulty)
    if points:
        print(f"\n{points}")
    if not all(log.checked for log in logs):
        print("\nnot checked: there is nothing but a Summary to go by")
    sys.stdout.flush()
    for fault in faults:
        print(fault, file=sys.stderr)
    if faults:
        sys.exit(1)


if __name__ == "__main__":
    run_command(main)
