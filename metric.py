"""Accuracy, AUC and macro F1. The command prints a table of logs.

python metric.py IRM_log.txt groupDRO_log.txt
"""

import argparse
import math
import re
import sys
from pathlib import Path
from typing import NamedTuple

from sklearn.metrics import accuracy_score, f1_score, roc_auc_score
from torch import Tensor

from preprocessing import UserError, run_command

GRADED = ("groupDRO", "IRM")


def metrics(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Return Accuracy, AUC and macro F1, each from 0 to 1.

    A logit above 0 predicts label 1. The AUC is nan if all labels are the same.

    Args:
        logits: (N,), of any float type, on any device
        labels: (N,), 0 or 1
    """
    truth = labels.cpu().numpy()
    scores = logits.detach().cpu().double().numpy()  # because numpy has no bfloat16
    return {
        "Accuracy": float(accuracy_score(truth, scores > 0)),
        "AUC": float(roc_auc_score(truth, scores)) if truth.min() < truth.max() else math.nan,
        "F1_macro": float(f1_score(truth, scores > 0, average="macro")),
    }


def group_accuracies(logits: Tensor, labels: Tensor, colors: Tensor) -> dict[str, float]:
    """Return the accuracy of each group of a label and a colour. Empty groups are left out.

    Args:
        logits: (N,)
        labels: (N,), 0 or 1
        colors: (N,), 1 for red and 0 for green
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


class Log(NamedTuple):
    """The result in a log file."""

    trainer: str
    accuracy: float
    deviation: float
    on_crossbar: bool

    @property
    def points(self) -> int | None:
        """The assignment's points, or None if the assignment does not grade this experiment.

        The assignment requires ≥ 60 % and ≥ 55 % of groupDRO, but > 60 % and > 55 % of IRM. This
        method uses ≥ for both.
        """
        if self.trainer not in GRADED or self.on_crossbar:
            return None
        accuracy = round(self.accuracy, 9)  # a mean of 0.55 can be 0.5499999999999999
        if accuracy >= 0.6:
            return 15
        return 10 if accuracy >= 0.55 else 0


def read_log(path: str) -> Log:
    """Read the trainer from the first line of a log and the accuracy from its last line.

    Raises:
        UserError: the log cannot be read, or its last line is not a Summary
    """
    try:
        text = Path(path).read_text("utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    lines = text.strip().splitlines() or [""]
    number = r"(\d+(?:\.\d+)?(?:e-\d+)?)"
    summary = re.match(
        rf"Summary: {{'Accuracy_testmean': {number}, 'Accuracy_teststd': {number},", lines[-1]
    )
    if not summary:
        raise UserError(f"{path} does not end with a Summary. Run its command again.")
    trainer = re.search(r"'trainer': '([^']*)'", lines[0])
    return Log(
        trainer[1] if trainer else "unknown",
        float(summary[1]),
        float(summary[2]),
        on_crossbar="\nCrossbar test result: " in text,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Print the test accuracy and the points of each log.", allow_abbrev=False
    )
    parser.add_argument("logs", nargs="+", metavar="LOG", help="log file, such as IRM_log.txt")
    args = parser.parse_args()
    failed, points = False, {}
    print(f"{'trainer':<24}{'test accuracy':<22}points")
    for path in args.logs:
        try:
            log = read_log(path)
        except UserError as error:
            print(f"metric.py: {error}", file=sys.stderr)
            failed = True
            continue
        name = log.trainer + (" on the crossbar" if log.on_crossbar else "")
        accuracy = f"{100 * log.accuracy:.2f} % ± {100 * log.deviation:.2f} %"
        print(f"{name:<24}{accuracy:<22}{'-' if log.points is None else log.points}")
        if log.points is not None:
            points[log.trainer] = max(points.get(log.trainer, 0), log.points)  # the best log
    print(f"{'together, at most 20':<46}{min(20, sum(points.values()))}", flush=True)
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    run_command(main)
