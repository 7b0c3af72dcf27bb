"""Distribution of accuracy over student IDs, for the two graded trainers.

python benchmarks/student_numbers.py --numbers 300
python benchmarks/student_numbers.py --numbers 100 --resume --iteration 1200

The last four digits of a student ID are the seed of the data and of three repetitions, as in
`exp-mnist.py --seed 1234`. The IDs are chosen at random, without the IDs whose results were looked
at before the protocol was final. The script writes a table, prints a summary of it and draws it.
It also accepts the flags of exp-mnist.py.
"""

import random
from statistics import fmean, pstdev

import numpy as np
from jobs import Table, print_table, save_figure, script_parser, select, training_arguments
from matplotlib.figure import Figure
from results import measure

from preprocessing import number, run_command

GRADED = {"groupDRO": "tab:green", "IRM": "tab:purple"}
ENVIRONMENTS = {"test": "test environment", "unseen": "unseen digits"}
COLUMNS = {"number": int, "trainer": str, "flags": str, "repetition": int}
COLUMNS |= {"test": float, "unseen": float}
LOOKED_AT = 1000  # IDs at the start of the random order


def accuracies(
    student_number: int, trainer: str, flags: str, repetition: int
) -> list[tuple[float, float]]:
    """Return one row: the accuracy in the test environment and on unseen digits."""
    ((test, unseen, *_),) = measure(f"{trainer} {flags}", student_number, repetition)
    return [(test, unseen)]


def chosen_numbers(count: int) -> list[int]:
    """Return random student IDs that nobody had looked at, always in the same order."""
    return random.Random(0).sample(range(10000), 10000)[LOOKED_AT:][:count]


def means(rows: list[dict], environment: str) -> dict[int, float]:
    """Return each student ID's mean accuracy over its repetitions, in %."""
    values = {}
    for row in rows:
        values.setdefault(row["number"], []).append(100 * row[environment])
    return {student_number: fmean(singles) for student_number, singles in values.items()}


def report(rows: list[dict]) -> None:
    """Print a Markdown table. The accuracy of a student ID is the mean of its repetitions."""
    titles = ["trainer", "accuracy in", "student IDs", "mean, %", "below 60 %", "worst ID"]
    titles += ["1st to 99th percentile", "worst single training"]
    titles += ["standard deviation of a training"]
    lines = []
    groups = [
        (trainer, flags)
        for trainer in GRADED
        for flags in sorted({row["flags"] for row in select(rows, trainer=trainer)})
    ]
    for trainer, flags in groups:
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
    """Draw histograms, with a row for each value of flags and a column for each environment."""
    all_flags = sorted({row["flags"] for row in rows})
    figure = Figure(figsize=(9, 0.9 + 2.6 * len(all_flags)), layout="constrained")
    figure.suptitle(
        "Accuracy of each student ID: the mean of its repetitions. Arrows: the worst ID",
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
                    f"{trainer}, worst of {len(values)}:\nID {worst:04d}, {values[worst]:.1f} %",
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
        axes[0].set_ylabel("student IDs")
    for axis in grid[-1]:
        axis.set_xlim(lowest - 9, highest + 1)  # with space for the annotations
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
        help="random student IDs (default: 100)",
    )
    add("--only", type=number(int, 0, 9999), nargs="+", metavar="NUMBER", help="only these IDs")
    args, words = parser.parse_known_args()
    flags = " ".join(words)
    repetitions = max(training_arguments(f"{name} {flags}").repetitions for name in GRADED)
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
