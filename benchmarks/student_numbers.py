"""The distribution of accuracy over student numbers, for the two graded trainers.

python benchmarks/student_numbers.py --numbers 1000

Each number is a fresh clone: its own draw of the data, then what `exp-mnist.py --seed NUMBER` does
on the CPU; each network is also tested on digits that nothing was trained or chosen on. More flags
are passed on to exp-mnist.py. Writes figures/student_numbers.csv and draws the figure beside it;
`--from figures/student_numbers.csv` only draws, `--resume` adds to that table.
"""

import argparse
import csv
import random
from pathlib import Path
from statistics import fmean, pstdev

from jobs import (
    ROOT,
    add_scheduler_flag,
    experiment,
    refuse_flags,
    run_jobs,
    save_figure,
    unseen_digits,
)

from preprocessing import UserError, number, refuse, run_command, written_whole
from trainer import evaluate, parse_arguments

GRADED = {"groupDRO": "tab:green", "IRM": "tab:purple"}
ENVIRONMENTS = {"test": "test environment", "unseen": "unseen digits"}
COLUMNS = ("number", "trainer", "repetition", *ENVIRONMENTS)


def accuracies(student_number: int, trainer: str, options: tuple[str, ...]) -> list[list[float]]:
    """Each repetition's accuracy in the test environment and on unseen digits."""
    unseen, results = unseen_digits("--grayscale" in options), []
    arguments = ["--trainer", trainer, *options, "--seed", str(student_number)]
    for data, network, *_ in experiment(arguments):
        results.append([evaluate(network, digits)["Accuracy"] for digits in (data.test, unseen)])
    return results


def compute(count: int, options: list[str], scheduler: str | None, known: list[dict]) -> list[dict]:
    """A row for each number, trainer and repetition, in the order of the numbers.

    Numbers and trainers that have rows in `known` are not computed again.
    """
    numbers = random.Random(0).sample(range(10000), 10000)[:count]
    rows = {(student, trainer): [] for student in numbers for trainer in GRADED}
    for row in known:
        rows.setdefault((row["number"], row["trainer"]), []).append(row)
    jobs = [(*key, tuple(options)) for key, found in rows.items() if not found]
    for job, results in run_jobs(accuracies, jobs, scheduler):
        rows[job[:2]] = [
            dict(zip(COLUMNS, (*job[:2], repetition, *values), strict=True))
            for repetition, values in enumerate(results, 1)
        ]
    return [row for found in rows.values() for row in found]


def read(path: Path) -> list[dict]:
    """The rows that an earlier run wrote."""
    try:
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
        whole = {"number": int, "trainer": str, "repetition": int}
        return [{name: whole.get(name, float)(row[name]) for name in COLUMNS} for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None


def means(rows: list[dict], trainer: str, environment: str) -> dict[int, float]:
    """Each number's mean accuracy over its repetitions, in %."""
    values = {}
    for row in rows:
        if row["trainer"] == trainer:
            values.setdefault(row["number"], []).append(100 * row[environment])
    return {student: fmean(of_student) for student, of_student in values.items()}


def report(rows: list[dict]) -> None:
    for trainer in GRADED:
        for environment, title in ENVIRONMENTS.items():
            values = means(rows, trainer, environment)
            worst = min(values, key=values.get)
            single = min(
                (row for row in rows if row["trainer"] == trainer), key=lambda r: r[environment]
            )
            print(
                f"{trainer}, {title}: {len(values)} student numbers, mean "
                f"{fmean(values.values()):.2f} %, standard deviation {pstdev(values.values()):.2f}"
                f", worst {values[worst]:.2f} (number {worst:04d}); worst single repetition "
                f"{100 * single[environment]:.2f} (number {single['number']:04d})"
            )


def draw(rows: list[dict], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    axes = figure.subplots(1, len(ENVIRONMENTS), sharex=True, sharey=True)
    everything = {(t, e): means(rows, t, e) for t in GRADED for e in ENVIRONMENTS}
    least = min(59, *(min(values.values()) for values in everything.values()))
    most = max(61, *(max(values.values()) for values in everything.values()))
    bins = [int(least) + 0.25 * step for step in range(4 * (int(most) + 1 - int(least)) + 1)]
    for axis, (environment, title) in zip(axes, ENVIRONMENTS.items(), strict=True):
        for height, (trainer, color) in zip((0.55, 0.3), GRADED.items(), strict=True):
            values = everything[trainer, environment]
            axis.hist(list(values.values()), bins, color=color, alpha=0.6)
            worst = min(values, key=values.get)
            axis.annotate(
                f"{trainer}, worst number:\n{worst:04d}, {values[worst]:.1f} %",
                (values[worst], 0),
                (60.2, height),
                textcoords=axis.get_xaxis_transform(),
                color=color,
                arrowprops={"arrowstyle": "->", "color": color, "relpos": (1, 0.5)},
            )
        axis.axvline(60, color="black", linestyle="--")
        axis.text(60.2, 0.9, "60 %: full marks", transform=axis.get_xaxis_transform())
        axis.set_title(title)
        axis.set_xlabel("accuracy, mean of the repetitions, %")
    axes[0].set_ylabel("student numbers")
    save_figure(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add, figures = parser.add_argument, ROOT / "figures"
    add("--numbers", type=number(int, 1, 10000), default=100, help="how many (default: 100)")
    add("--from", type=Path, dest="source", metavar="CSV", help="draw this table, compute nothing")
    add("--table", type=Path, default=figures / "student_numbers.csv", help="table to write")
    kept = "keep the rows that the table has already, whatever code and flags made them"
    add("--resume", action="store_true", help=kept)
    add("--figure", type=Path, default=figures / "student_numbers.png", help="figure to write")
    add_scheduler_flag(parser)
    args, options = parser.parse_known_args()
    if args.source:
        rows = read(args.source)
        both = {row["trainer"] for row in rows} == {*GRADED}
        refuse(not both, f"{args.source} has not both trainers' rows")
    else:
        parse_arguments("", options)  # to refuse what can't be run before anything is
        refuse_flags(options, "trainer", "seed", "dataset_path")
        known = read(args.table) if args.resume and args.table.exists() else []
        rows = compute(args.numbers, options, args.scheduler, known)
        with written_whole(args.table) as partial, open(partial, "w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        print(f"Table: {args.table}")
    report(rows)
    draw(rows, args.figure)


if __name__ == "__main__":
    run_command(main)
