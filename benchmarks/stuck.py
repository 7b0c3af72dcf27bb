"""Accuracy and logits of IRM over 1200 iterations: why some trainings end near chance.

python benchmarks/stuck.py

The script trains three repetitions for each of twenty student IDs. They include all IDs with a
training below 55 % in figures/student_numbers.csv. Every 40 iterations, the script measures the
test accuracy, the fraction of test logits that are exactly 0, and the fraction that are positive,
for the colour with fewer of these. Only a positive logit predicts label 1. Trainings below 60 %
after 400 iterations are marked.
"""

from collections.abc import Iterable
from statistics import fmean

from jobs import (
    ROOT,
    Table,
    fresh_data,
    print_table,
    save_figure,
    script_parser,
    select,
    training_arguments,
    watch_training,
)
from matplotlib.figure import Figure
from student_numbers import COLUMNS as STUDENT_NUMBERS
from student_numbers import chosen_numbers

from dataset import Samples
from metric import metrics
from model import Network
from preprocessing import number, run_command
from trainer import predict

TRAINING = "IRM --iteration 1200 --evaluation_steps 40"
MARKED_AT = 400  # iterations of the assignment's protocol
LOW = 0.6  # accuracy below which a training is marked
COLUMNS = {"number": int, "repetition": int, "iteration": int}
COLUMNS |= {"accuracy": float, "zero_logits": float, "positive_logits": float}


def observe(student_number: int, repetition: int) -> list[tuple[int, float, float, float]]:
    """Train once. Return rows of the values of `COLUMNS` after the repetition."""
    args = training_arguments(TRAINING)
    args.seed = student_number
    data = fresh_data(student_number)
    labels, colors, rows = data.test.labels, data.test.colors, []

    def watch(network: Network, validation: Samples, iteration: int) -> None:
        logits = predict(network, data.test)
        accuracy = metrics(logits, labels)["Accuracy"]
        zero = (logits == 0).double().mean().item()
        positive = min((logits[colors == z] > 0).double().mean().item() for z in (0, 1))
        rows.append((iteration, accuracy, zero, positive))

    watch_training(args, data, repetition, watch)
    return rows


def default_numbers() -> list[int]:
    """Return twenty student IDs, first all that have a training below 55 %."""
    rows = Table(ROOT / "figures" / "student_numbers.csv", STUDENT_NUMBERS).rows
    stuck = [row["number"] for row in select(rows, trainer="IRM", flags="") if row["test"] < 0.55]
    return list(dict.fromkeys(stuck + chosen_numbers(20)))[:20]


def trainings_of(rows: list[dict]) -> list[list[dict]]:
    """Group rows by training, each in the order of iterations."""
    trainings = {}
    for row in rows:
        trainings.setdefault((row["number"], row["repetition"]), []).append(row)
    return list(trainings.values())


def is_marked(training: list[dict]) -> bool:
    """Return whether a training is below 60 % after 400 iterations."""
    (row,) = select(training, iteration=MARKED_AT)
    return row["accuracy"] < LOW


def report(rows: list[dict]) -> None:
    print_table(
        ["iterations", "trainings", "mean, %", "worst, %", "logits 0, %", "logits positive, %"],
        [
            [
                iteration,
                f"{len(group)} {name}",
                f"{100 * fmean(row['accuracy'] for row in group):.1f}",
                f"{100 * min(row['accuracy'] for row in group):.1f}",
                span(row["zero_logits"] for row in group),
                span(row["positive_logits"] for row in group),
            ]
            for iteration in range(MARKED_AT, rows[-1]["iteration"] + 1, MARKED_AT)
            for found in [select(rows, iteration=iteration)]
            for name, group in (
                ("below 60 %", [row for row in found if row["accuracy"] < LOW]),
                ("others", [row for row in found if row["accuracy"] >= LOW]),
            )
            if group
        ],
    )


def span(fractions: Iterable[float]) -> str:
    """Return the smallest and the largest fraction, in %."""
    fractions = list(fractions)
    return f"{100 * min(fractions):.1f} to {100 * max(fractions):.1f}"


def draw(rows: list[dict]) -> Figure:
    """Draw the accuracy and the fractions of logits, one line per training."""
    trainings = trainings_of(rows)
    marked = [training for training in trainings if is_marked(training)]
    others = [training for training in trainings if not is_marked(training)]
    end = rows[-1]["iteration"]
    freed = sum(training[-1]["accuracy"] >= LOW for training in marked)
    labels = {
        "silver": f"other trainings: {len(others)}",
        "tab:red": f"trainings below 60 % after {MARKED_AT} iterations: {len(marked)}, "
        f"of these above 60 % after {end}: {freed}",
    }
    figure = Figure(figsize=(12, 4), layout="constrained")
    axes = figure.subplots(1, 3, sharex=True)
    titles = {
        "accuracy": "test accuracy, %",
        "zero_logits": "test logits that are exactly 0, %",
        "positive_logits": "positive test logits, %, of the colour with fewer",
    }
    for axis, (name, title) in zip(axes, titles.items(), strict=True):
        for group, (color, label) in zip((others, marked), labels.items(), strict=True):
            for training in group:
                iterations = [row["iteration"] for row in training]
                values = [100 * row[name] for row in training]
                axis.plot(iterations, values, color=color, linewidth=0.8, label=label)
                label = None
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("iteration")
        axis.grid(alpha=0.3)
    axes[0].axhline(100 * LOW, color="black", linestyle="--", linewidth=1)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def main() -> None:
    parser = script_parser(__doc__, "stuck.png", "stuck.csv")
    parser.add_argument(
        "--only",
        type=number(int, 0, 9999),
        nargs="+",
        metavar="NUMBER",
        help="student IDs (default: twenty)",
    )
    args = parser.parse_args()
    table = Table(args.table, COLUMNS, args.resume)
    jobs = [
        (student_number, repetition)
        for student_number in args.only or default_numbers()
        for repetition in (1, 2, 3)
    ]
    table.fill(observe, {job: job for job in jobs}, args.scheduler)
    print(f"Table: {args.table}\n")
    report(table.rows)
    save_figure(draw(table.rows), args.figure)


if __name__ == "__main__":
    run_command(main)
