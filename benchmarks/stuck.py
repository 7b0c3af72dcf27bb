"""Accuracy and logits of IRM over 1200 iterations: why some trainings end near chance.

python benchmarks/stuck.py

The script trains three repetitions for each of twenty student IDs. They include all IDs with a
training below 55 % in figures/student_numbers.csv. Every 40 iterations, the script measures the
test accuracy and the fraction of test logits that are exactly 0. A logit of 0 predicts label 0.
Trainings below 60 % after 400 iterations are marked.
"""

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
from model import Network
from preprocessing import number, run_command
from trainer import predict

TRAINING = "IRM --iteration 1200 --evaluation_steps 40"
MARKED_AT = 400  # iterations of the assignment's protocol
COLUMNS = {"number": int, "repetition": int, "iteration": int}
COLUMNS |= {"accuracy": float, "zero_logits": float}


def observe(student_number: int, repetition: int) -> list[tuple[int, float, float]]:
    """Train once. Return rows of (iteration, test accuracy, fraction of logits that are 0)."""
    args = training_arguments(TRAINING)
    args.seed = student_number
    data = fresh_data(student_number)
    positive, rows = data.test.labels > 0, []

    def watch(network: Network, validation: Samples, iteration: int) -> None:
        logits = predict(network, data.test)
        accuracy = ((logits > 0) == positive).double().mean().item()
        rows.append((iteration, accuracy, (logits == 0).double().mean().item()))

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
    return row["accuracy"] < 0.6


def report(rows: list[dict]) -> None:
    print_table(
        ["iterations", "trainings", "below 60 %", "mean, %", "worst, %", "most logits 0, %"],
        [
            [
                iteration,
                len(found),
                sum(row["accuracy"] < 0.6 for row in found),
                f"{100 * fmean(row['accuracy'] for row in found):.1f}",
                f"{100 * min(row['accuracy'] for row in found):.1f}",
                f"{100 * max(row['zero_logits'] for row in found):.1f}",
            ]
            for iteration in range(MARKED_AT, rows[-1]["iteration"] + 1, MARKED_AT)
            for found in [select(rows, iteration=iteration)]
        ],
    )


def draw(rows: list[dict]) -> Figure:
    """Draw accuracy and the fraction of logits that are 0, one line per training."""
    trainings = trainings_of(rows)
    marked = [training for training in trainings if is_marked(training)]
    others = [training for training in trainings if not is_marked(training)]
    end = rows[-1]["iteration"]
    freed = sum(training[-1]["accuracy"] > 0.6 for training in marked)
    labels = {
        "silver": f"other trainings: {len(others)}",
        "tab:red": f"trainings below 60 % after {MARKED_AT} iterations: {len(marked)}, "
        f"of these above 60 % after {end}: {freed}",
    }
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots(1, 2, sharex=True)
    titles = {"accuracy": "test accuracy, %", "zero_logits": "test logits that are exactly 0, %"}
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
    axes[0].axhline(60, color="black", linestyle="--", linewidth=1)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def main() -> None:
    parser = script_parser(__doc__, "stuck.png", "stuck.csv")
    parser.add_argument(
        "--numbers", type=number(int, 0, 9999), nargs="+", help="student IDs (default: twenty)"
    )
    args = parser.parse_args()
    table = Table(args.table, COLUMNS, args.resume)
    jobs = [
        (student_number, repetition)
        for student_number in args.numbers or default_numbers()
        for repetition in (1, 2, 3)
    ]
    table.fill(observe, {job: job for job in jobs}, args.scheduler)
    print(f"Table: {args.table}\n")
    report(table.rows)
    save_figure(draw(table.rows), args.figure)


if __name__ == "__main__":
    run_command(main)
