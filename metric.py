"""Logits and labels → Accuracy, AUC, macro F1; their mean over repetitions; and what checks logs.

python metric.py IRM_log.txt groupDRO_log.txt
python metric.py hand-ins/*/
"""

import argparse
import ast
import codecs
import math
import os
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


# Checking logs. What makes one useless is a UserError; what its reader should know is a note.

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

    hand_in: str  # the folder that it belongs to
    file: str
    trainer: str
    seed: str
    summary: dict[str, float]
    checked: bool  # whether the Summary was computed again
    notes: list[str]  # what whoever grades it should know

    @property
    def points(self) -> int | None:
        """The assignment's 15, 10 or 0; None for what it does not grade.

        Its sheet has ≥ 60 % and ≥ 55 % for groupDRO, > for IRM: here both are ≥.
        """
        if self.trainer not in GRADED:
            return None
        # The mean of three accuracies is often a little less than 0.55 where it is just that.
        accuracy = self.summary["Accuracy_testmean"] + 1e-9
        if accuracy >= 0.6:
            return 15
        return 10 if accuracy >= 0.55 else 0


def read_log(hand_in: str, file: str) -> Log:
    """Check a log of this project, or read the Summary of another one; UserError if it is wrong."""
    lines = [line.strip() for line in read_text(file).splitlines() if line.strip()]
    if not lines:
        raise UserError("it is empty")
    with_summary = [line for line in lines if "Summary: {" in line]
    if not with_summary:
        raise UserError(f"it has no Summary; its last line is {lines[-1][:100]}")
    last = with_summary[-1]
    summary = read_figures(last[last.rindex("Summary: {") :], SUMMARY)
    notes = []
    if lines[-1] != last:
        notes.append(f"after its Summary there is more: {lines[-1][:40]}")
    if len(with_summary) > 1:
        notes.append(f"it is the last of {len(with_summary)} Summaries")
    runs = [line for line in lines if line.startswith("Arguments: ")]
    used = read_arguments(runs[0]) if runs else None
    if used is None:
        trainer = named_trainer(file) or "?"
        if trainer == "?":
            notes.append("its name says no trainer")
        if any(line.startswith(("Group accuracy: ", "Flip rate: ")) for line in lines):
            notes.append("its Arguments line is missing, or was changed")
        return Log(hand_in, file, trainer, "-", summary, False, notes)

    if len(runs) > 1:
        raise UserError(
            f"it holds {len(runs)} runs ({len(runs)} Arguments lines): keep one of them"
        )
    on_crossbar = check_results(summary, lines, used["repetitions"])
    trainer = used["trainer"] + (" on the crossbar" if on_crossbar else "")
    notes += notes_on(used, lines)
    if named_trainer(file) not in (None, trainer):
        notes.append(f"its name says {named_trainer(file)}")
    wanted = wanted_seeds(hand_in)
    if wanted and used.get("seed") not in wanted:
        notes.append(f"its seed is not {' or '.join(f'{seed:04}' for seed in wanted)}")
    return Log(hand_in, file, trainer, str(used.get("seed", "-")), summary, True, notes)


def wanted_seeds(hand_in: str) -> list[int]:
    """The last four digits of the student number in a folder's name, and of other long numbers."""
    numbers = re.findall(r"\d{6,}", Path(hand_in).name)
    return [int(number[-4:]) for number in numbers]


def check_results(summary: dict[str, float], lines: list[str], repetitions: int) -> bool:
    """Whether a log is of a crossbar; UserError if its Summary does not follow from its results."""
    digital = [line for line in lines if line.startswith("Test result: ")]
    on_crossbar = [line for line in lines if line.startswith("Crossbar test result: ")]
    results = [read_figures(line, METRICS) for line in on_crossbar or digital]
    if not results or len(results) != repetitions:
        raise UserError(f"it has results of {len(results)} of {repetitions} repetitions")
    for name, value in summarize(results).items():
        if not np.isclose(summary[name], value, rtol=0, atol=1e-9, equal_nan=True):
            raise UserError(f"its Summary says {name} {summary[name]}, its results give {value}")
    return bool(on_crossbar)


NAME = re.compile(
    r"(?:.*[^a-z])?"  # no letter before it, as in confirm_log.txt
    r"(ERM|(?:group[ _-]?)?DRO|IRM)"
    r"(?:log|[^a-z]).*(?:txt|log)",  # none after it but log, as in ermine.txt
    re.IGNORECASE,
)


def named_trainer(file: str) -> str | None:
    """The trainer that a log's name says: IRM for IRM_log.txt, irm.log, 学号_IRM_log (1).txt."""
    match = NAME.fullmatch(Path(file).name)
    if not match:
        return None
    trainer = match[1].upper()
    return "groupDRO" if trainer.endswith("DRO") else trainer


def logs_below(hand_in: str) -> list[str]:
    """The logs of the assignment in a folder; those of its subfolders, too, if one is missing."""
    found = []
    for folder, subfolders, files in os.walk(hand_in):
        logs = [name for name in sorted(files) if named_trainer(name) and name[0] not in ".~"]
        found += [os.path.join(folder, name) for name in logs]
        if set(map(named_trainer, logs)).issuperset(GRADED):
            subfolders.clear()  # where os.walk goes on
        subfolders[:] = [name for name in sorted(subfolders) if not ignored(name)]
    return found


def ignored(folder: str) -> bool:
    """Whether logs in a folder are none of a hand-in's: hidden ones, and those that run.sh kept."""
    return folder.startswith(".") or folder in ("former_logs", "__MACOSX")


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
        form = f"{{{names[0]!r}: 0.5, ...}} with {', '.join(names[1:])}, in this order"
        raise UserError(f"its {title} is not of the form {form}: {figures[:60]}")
    values = [float(number) for number in match.groups()]
    for name, value in zip(names, values, strict=True):
        if value < 0 or value > 1:
            raise UserError(f"its {title} has {name} {value}, which is not from 0 to 1")
    return dict(zip(names, values, strict=True))


def read_arguments(line: str) -> dict | None:
    """What an Arguments line of this project says, None of another; it is read, never run."""
    text = line.removeprefix("Arguments: ")
    if len(text) > LONGEST:
        return None
    try:
        arguments = ast.literal_eval(text)
        # Only as Python itself writes a dict: no number that is too large for text, say.
        if not isinstance(arguments, dict) or str(arguments) != text:
            return None
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return None
    trainer, repetitions = arguments.get("trainer"), arguments.get("repetitions")
    return arguments if isinstance(trainer, str) and isinstance(repetitions, int) else None


def notes_on(arguments: dict, lines: list[str]) -> list[str]:
    """What differs from the assignment: flags, and how the data were drawn."""
    notes = []
    for line in lines:
        if line.startswith("Data: "):
            drawn = re.search(r", drawn (?:now )?with (p_f .*), seed (.*)$", line)
            if not drawn:
                notes.append(f"data of others: {line.removeprefix('Data: ')}")
                continue
            if drawn[2] != str(arguments.get("seed")):
                notes.append(f"seed {arguments.get('seed')} trained on the data of seed {drawn[2]}")
            if drawn[1] != DRAWN_WITH:
                notes.append(f"data drawn with {drawn[1]}")
    for name, default in DEFAULTS.items():
        if name in ONLY_OF and ONLY_OF[name] != arguments["trainer"]:
            continue  # what has no effect on this trainer is no difference
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
    for log in logs:
        mean, deviation = log.summary["Accuracy_testmean"], log.summary["Accuracy_teststd"]
        # Three decimals, as 59.998 % must not look like 60.
        accuracy = f"{100 * mean:7.3f} % ± {100 * deviation:.3f}"
        points = "-" if log.points is None else str(log.points)
        file = log.file + (f"  ({'; '.join(log.notes)})" if log.notes else "")
        checked = "checked" if log.checked else "not checked"
        cells = [log.trainer, accuracy, points, log.seed, checked, file]
        rows.append([on_one_line(cell) for cell in cells])
    return table(rows)


def note_same_results(logs: list[Log]) -> None:
    """Add notes to logs whose three means are the same in five decimals, as a copy's are."""
    same = {}
    for log in logs:
        means = tuple(f"{log.summary[f'{name}_testmean']:.5f}" for name in METRICS)
        same.setdefault(means, []).append(log)
    for copies in same.values():
        for log in copies:
            in_its_own = [other for other in copies if other.hand_in == log.hand_in]
            elsewhere = [other for other in copies if other.hand_in != log.hand_in]
            others = elsewhere or [other for other in in_its_own if other is not log]
            if others:
                more = f" and {len(others) - 1} more" if len(others) > 1 else ""
                other = f"{others[0].file} (seed {others[0].seed})"
                log.notes.append(f"the same results as {other}{more}")


def points_table(
    hand_ins: list[str], logs: list[Log], faulty: list[tuple[str, str, UserError]]
) -> str:
    """A row for each hand-in: its points, and which logs have notes.

    Of several logs of one trainer the best counts. `faulty` are hand-in, file and reason of the
    logs that could not be read.
    """
    rows = [["points together, at most 20", *GRADED, "notes on", "folder"]]
    for hand_in in dict.fromkeys(hand_ins):
        ours = [
            log
            for log in logs
            if log.hand_in == hand_in
            and (log.trainer in GRADED or named_trainer(log.file) in GRADED)
        ]
        unread = [named_trainer(file) for folder, file, _ in faulty if folder == hand_in]
        found = {}
        for trainer in GRADED:
            points = [log.points for log in ours if log.trainer == trainer]
            if points:
                found[trainer] = max(points)
            elif trainer in unread:
                found[trainer] = "faulty"
            else:
                found[trainer] = "missing"
        together = str(min(20, sum(points for points in found.values() if isinstance(points, int))))
        if "faulty" in found.values():
            together += " ?"  # as somebody should look at it
        noted = ", ".join(dict.fromkeys(log.trainer for log in ours if log.notes)) or "-"
        row = [together, *map(str, found.values()), noted, hand_in]
        rows.append([on_one_line(cell) for cell in row])
    return table(rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Check logs, and show their results and the points that these earn.",
        epilog="A log of this project is checked: its Summary is computed again from the results "
        "in it, and what departs from the assignment is noted. Of others the Summary is read. The "
        "exit status is 1 if a log is faulty.",
        allow_abbrev=False,
    )
    what = "such as IRM_log.txt, or a folder: one hand-in, whose logs are looked for in it"
    parser.add_argument("logs", nargs="+", metavar="LOG", help=what)
    arguments = list(dict.fromkeys(parser.parse_args().logs))
    hand_ins, logs, faulty = [], [], []
    for argument in arguments:
        if os.path.isdir(argument):
            hand_in, files = str(Path(argument)), logs_below(argument)
        else:
            hand_in, files = str(Path(argument).parent), [argument]
        hand_ins.append(hand_in)
        for file in files:
            try:
                logs.append(read_log(hand_in, file))
            except UserError as reason:
                faulty.append((hand_in, file, reason))
    note_same_results(logs)
    if logs:
        print(log_table(logs))
    if any(map(os.path.isdir, arguments)) or {log.trainer for log in logs}.issuperset(GRADED):
        print(f"\n{points_table(hand_ins, logs, faulty)}")
    if not all(log.checked for log in logs):
        print("\nnot checked: there is nothing but a Summary to go by")
    sys.stdout.flush()
    for _, file, reason in faulty:
        print(on_one_line(f"metric.py: {file}: {reason}"), file=sys.stderr)
    if faulty:
        sys.exit(1)


if __name__ == "__main__":
    run_command(main)
