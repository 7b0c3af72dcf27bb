"""The distribution of accuracy over student numbers, for the two graded trainers.

python benchmarks/student_numbers.py --numbers 300
python benchmarks/student_numbers.py --numbers 100 --steady --resume

Each number is a fresh clone: its own draw of the data, then what `exp-mnist.py --seed NUMBER` does
on the CPU; each network is also tested on digits that nothing was trained or chosen on. The numbers
are drawn at random from those that nobody had looked at when the protocol was settled. More flags
are passed on to exp-mnist.py: with them the protocol has another name than "letter" (of the
assignment) or "steady". Writes a table, prints what it comes to, and draws a figure of that;
`--from TABLE` computes nothing.
"""

import random
from pathlib import Path
from statistics import fmean, pstdev

import numpy as np
from jobs import (
    Table,
    check_writable,
    commit,
    experiment,
    run_jobs,
    save_figure,
    script_parser,
    training_flags,
)
from matplotlib.figure import Figure

from dataset import unseen_samples
from preprocessing import UserError, number, run_command
from trainer import evaluate

GRADED = {"groupDRO": "tab:green", "IRM": "tab:purple"}
ENVIRONMENTS = {"test": "test environment", "unseen": "unseen digits"}
TITLES = {"letter": "to the letter of the assignment", "steady": "with --steady"}
COLUMNS = {"number": int, "trainer": str, "protocol": str, "repetition": int}
COLUMNS |= {"test": float, "unseen": float, "commit": str}
LOOKED_AT = 1000  # the first numbers of the order in which they are drawn


def accuracies(student_number: int, trainer: str, options: tuple[str, ...]) -> list[list[float]]:
    """Each repetition's accuracy in the test environment and on unseen digits."""
    unseen, results = unseen_samples(), []
    for trained in experiment(["--trainer", trainer, *options, "--seed", str(student_number)]):
        tested = (trained.data.test, unseen)
        results.append([evaluate(trained.network, samples)["Accuracy"] for samples in tested])
    return results


def drawn_numbers(count: int) -> list[int]:
    """Student numbers that were not looked at before, in an order that is always the same."""
    return random.Random(0).sample(range(10000), 10000)[LOOKED_AT:][:count]


def protocol_of(options: list[str]) -> str:
    """ "letter" or "steady", and what other flags there are."""
    name = "steady" if "--steady" in options else "letter"
    return " ".join([name, *[word for word in options if word != "--steady"]])


def compute(
    table: Table, numbers: list[int], options: list[str], repetitions: int, scheduler: str | None
) -> None:
    """Add to the table a row for each number, trainer and repetition that it lacks."""
    protocol = protocol_of(options)
    known = {(row["number"], row["trainer"], row["protocol"]) for row in table.rows}
    jobs = [
        (student, trainer, tuple(options))
        for student in numbers
        for trainer in GRADED
        if (student, trainer, protocol) not in known
    ]
    table.expect(len(table.rows) + repetitions * len(jobs))
    of_commit = commit()
    for (student, trainer, _), results in run_jobs(accuracies, jobs, scheduler):
        rows = []
        for repetition, (test, unseen) in enumerate(results, 1):
            values = (student, trainer, protocol, repetition, test, unseen, of_commit)
            rows.append(dict(zip(COLUMNS, values, strict=True)))
        table.add(rows)


def select(rows: list[dict], trainer: str, protocol: str) -> list[dict]:
    return [row for row in rows if (row["trainer"], row["protocol"]) == (trainer, protocol)]


def means(rows: list[dict], environment: str) -> dict[int, float]:
    """Each number's mean accuracy over its repetitions, in %."""
    values = {}
    for row in rows:
        values.setdefault(row["number"], []).append(100 * row[environment])
    return {student: fmean(of_student) for student, of_student in values.items()}


def report(rows: list[dict], protocols: list[str]) -> None:
    """Print a table: a number's accuracy is the mean of its repetitions."""
    print(
        "| trainer, protocol | accuracy in | numbers | mean, % | below 60 % | worst number | "
        "1st to 99th percentile | worst single training | standard deviation of a training |"
    )
    print("| --- " * 9 + "|")
    for trainer in GRADED:
        for protocol in protocols:
            chosen = select(rows, trainer, protocol)
            for environment, title in ENVIRONMENTS.items():
                values = means(chosen, environment)
                share = fmean(value < 60 for value in values.values())
                worst = min(values, key=values.get)
                low, high = np.percentile(list(values.values()), (1, 99))
                singles = [100 * row[environment] for row in chosen]
                single = chosen[singles.index(min(singles))]["number"]
                cells = (
                    f"{trainer}, {protocol}",
                    title,
                    len(values),
                    f"{fmean(values.values()):.1f}",
                    f"{share:.1%}",
                    f"{values[worst]:.1f} ({worst:04d})",
                    f"{low:.1f} to {high:.1f}",
                    f"{min(singles):.1f} ({single:04d})",
                    f"{pstdev(singles):.1f}",
                )
                print(f"| {' | '.join(map(str, cells))} |")


def draw(rows: list[dict], protocols: list[str]) -> Figure:
    """A row of histograms for each protocol, a column for each set of tested samples."""
    figure = Figure(figsize=(9, 0.9 + 2.6 * len(protocols)), layout="constrained")
    figure.suptitle(
        "Accuracy of each student number: the mean of its repetitions. Arrows: the worst number",
        fontsize=11,
    )
    grid = figure.subplots(len(protocols), 2, sharex=True, sharey="row", squeeze=False)
    every = [
        means(select(rows, trainer, protocol), environment)
        for trainer in GRADED
        for protocol in protocols
        for environment in ENVIRONMENTS
    ]
    least = min(59, *(min(values.values()) for values in every))
    most = max(61, *(max(values.values()) for values in every))
    bins = np.arange(int(least), int(most) + 1.1, 0.25)
    for axes, protocol in zip(grid, protocols, strict=True):
        for axis, (environment, title) in zip(axes, ENVIRONMENTS.items(), strict=True):
            for height, (trainer, color) in zip((0.6, 0.25), GRADED.items(), strict=True):
                values = means(select(rows, trainer, protocol), environment)
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
            line = "60 %: full marks"
            axis.axvline(60, color="black", linestyle="--", zorder=0, label=line)
            axis.set_title(f"{title}, {TITLES.get(protocol, protocol)}", fontsize=10)
        axes[0].set_ylabel("student numbers")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    for axis in grid[-1]:
        axis.set_xlabel("accuracy, % (bars of 0.25 points)")
    return figure


def main() -> None:
    parser = script_parser(__doc__, "student_numbers.png", "student_numbers.csv")
    which = parser.add_mutually_exclusive_group()
    add = which.add_argument
    most = 10000 - LOOKED_AT
    add("--numbers", type=number(int, 1, most), default=100, help="how many (default: 100)")
    add("--only", type=number(int, 0, 9999), nargs="+", metavar="NUMBER", help="these numbers")
    add("--from", type=Path, dest="source", metavar="CSV", help="draw this table, compute nothing")
    args, options = parser.parse_known_args()
    check_writable(args.figure)
    if args.source:
        table = Table(args.source, COLUMNS)
        if not table.rows:
            raise UserError(f"{args.source} is not there, or has no rows")
    else:
        ours = ("trainer", "seed", "dataset_path", "grayscale", "save_model")
        training = training_flags(options, *ours)
        table = Table(args.table, COLUMNS, args.resume)
        numbers = list(dict.fromkeys(args.only or drawn_numbers(args.numbers)))
        compute(table, numbers, options, training.repetitions, args.scheduler)
        print(f"Table: {args.table}")
    protocols = sorted({row["protocol"] for row in table.rows})
    for protocol in protocols:
        for trainer in GRADED:
            if not select(table.rows, trainer, protocol):
                raise UserError(f"{table.path} has no rows of {trainer}, {protocol}")
    report(table.rows, protocols)
    save_figure(draw(table.rows, protocols), args.figure)


if __name__ == "__main__":
    run_command(main)
