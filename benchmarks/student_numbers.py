"""Distribution of accuracy over student numbers, for the two graded trainers.

python benchmarks/student_numbers.py --numbers 300
python benchmarks/student_numbers.py --numbers 100 --resume --iteration 1200

A number is the seed of the data and of three repetitions, as in `exp-mnist.py --seed NUMBER`. The
numbers are chosen at random among those that nobody had looked at when the protocol was settled.
More flags are passed on to exp-mnist.py. Writes a table, prints a summary of it, and draws it.
"""

import random
from pathlib import Path
from statistics import fmean, pstdev

import numpy as np
from jobs import Table, print_table, save_figure, script_parser, select, training_arguments
from matplotlib.figure import Figure
from results import measure

from preprocessing import UserError, number, run_command

GRADED = {"groupDRO": "tab:green", "IRM": "tab:purple"}
ENVIRONMENTS = {"test": "test environment", "unseen": "unseen digits"}
COLUMNS = {"number": int, "trainer": str, "flags": str, "repetition": int}
COLUMNS |= {"test": float, "unseen": float}
LOOKED_AT = 1000  # the first numbers of the random order


def accuracies(
    student_number: int, trainer: str, flags: str, repetition: int
) -> list[tuple[float, float]]:
    """Return one row: the accuracy in the test environment and on unseen digits."""
    ((test, unseen, *_),) = measure(f"{trainer} {flags}", student_number, repetition)
    return [(test, unseen)]


def chosen_numbers(count: int) -> list[int]:
    """Return student numbers that were not looked at before, in an order that never changes."""
    return random.Random(0).sample(range(10000), 10000)[LOOKED_AT:][:count]


def means(rows: list[dict], environment: str) -> dict[int, float]:
    """Return each number's mean accuracy over its repetitions, in %."""
    values = {}
    for row in rows:
        values.setdefault(row["number"], []).append(100 * row[environment])
    return {student_number: fmean(singles) for student_number, singles in values.items()}


def report(rows: list[dict]) -> None:
    """Print a Markdown table. The accuracy of a number is the mean of its repetitions."""
    titles = ["trainer", "accuracy in", "numbers", "mean, %", "below 60 %", "worst number"]
    titles += ["1st to 99th percentile", "worst single training"]
    titles += ["standard deviation of a training"]
    lines = []
    groups = {(row["trainer"], row["flags"]) for row in rows}
    for trainer, flags in sorted(groups, key=lambda group: (list(GRADED).index(group[0]), group)):
        trainings = select(rows, trainer=trainer, flags=flags)
        for environment, title in ENVIRONMENTS.items():
            values = means(trainings, environment)
            worst = min(values, key=values.get)
            low, high = np.percentile(list(values.values()), (1, 99))
            singles = [(100 * row[environment], row["number"]) for row in trainings]
            worst_accuracy, worst_number = min(singles)
            lines.append(
                [
                    f"{trainer}, `{flags}`" if flags else trainer,
                    title,
                    len(values),
                    f"{fmean(values.values()):.1f}",
                    f"{fmean(value < 60 for value in values.values()):.1%}",
                    f"{values[worst]:.1f} ({worst:04d})",
                    f"{low:.1f} to {high:.1f}",
                    f"{worst_accuracy:.1f} ({worst_number:04d})",
                    f"{pstdev(accuracy for accuracy, _ in singles):.1f}",
                ]
            )
    print_table(titles, lines)


def draw(rows: list[dict]) -> Figure:
    """Draw histograms: a row of panels for each value of flags, a column for test and unseen."""
    all_flags = sorted({row["flags"] for row in rows})
    figure = Figure(figsize=(9, 0.9 + 2.6 * len(all_flags)), layout="constrained")
    figure.suptitle(
        "Accuracy of each student number: the mean of its repetitions. Arrows: the worst number",
        fontsize=11,
    )
    grid = figure.subplots(len(all_flags), 2, sharex=True, sharey="row", squeeze=False)
    lowest, highest = 59.0, 61.0
    for axes, flags in zip(grid, all_flags, strict=True):
        for axis, (environment, title) in zip(axes, ENVIRONMENTS.items(), strict=True):
            for height, (trainer, color) in zip((0.6, 0.25), GRADED.items(), strict=True):
                values = means(select(rows, trainer=trainer, flags=flags), environment)
                if not values:
                    continue
                bins = np.arange(0, 100.1, 0.25)
                axis.hist(list(values.values()), bins, color=color, alpha=0.6, label=trainer)
                worst = min(values, key=values.get)
                axis.annotate(
                    f"{trainer}, worst of {len(values)}:\nnumber {worst:04d}, "
                    f"{values[worst]:.1f} %",
                    (values[worst], 0),
                    (0.02, height),
                    textcoords="axes fraction",
                    color=color,
                    fontsize=9,
                    bbox={"color": "white", "pad": 1},
                    arrowprops={"arrowstyle": "->", "color": color},
                )
                lowest = min(lowest, values[worst])
                highest = max(highest, *values.values())
            axis.axvline(60, color="black", linestyle="--", zorder=0, label="60 %: full marks")
            protocol = f"with {flags}" if flags else "to the letter of the assignment"
            axis.set_title(f"{title}, {protocol}", fontsize=10)
        axes[0].set_ylabel("student numbers")
    for axis in grid[-1]:
        axis.set_xlim(lowest - 1, highest + 1)
        axis.set_xlabel("accuracy, % (bars of 0.25 points)")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def main() -> None:
    parser = script_parser(__doc__, "student_numbers.png", "student_numbers.csv")
    which = parser.add_mutually_exclusive_group()
    add = which.add_argument
    add(
        "--numbers",
        type=number(int, 1, 10000 - LOOKED_AT),
        default=100,
        help="how many (default: 100)",
    )
    add("--only", type=number(int, 0, 9999), nargs="+", metavar="NUMBER", help="these numbers")
    add("--from", type=Path, dest="source", metavar="CSV", help="draw this table, train nothing")
    args, words = parser.parse_known_args()
    flags = " ".join(words)
    for trainer in GRADED:
        repetitions = training_arguments(f"{trainer} {flags}").repetitions
    if args.source:
        table = Table(args.source, COLUMNS)
        if not table.rows:
            raise UserError(f"{args.source} has no rows. Name another table.")
    else:
        table = Table(args.table, COLUMNS, args.resume)
        jobs = [
            (student_number, trainer, flags, repetition)
            for student_number in args.only or chosen_numbers(args.numbers)
            for trainer in GRADED
            for repetition in range(1, repetitions + 1)
        ]
        table.fill(accuracies, {job: job for job in jobs}, args.scheduler)
        print(f"Table: {args.table}\n")
    report(table.rows)
    save_figure(draw(table.rows), args.figure)


if __name__ == "__main__":
    run_command(main)
