"""What broken hardware costs, and what hardening saves: the crossbar's tables and figure.

python benchmarks/robustness.py

For each trainer: three repetitions, plain and hardened, digital and on crossbars in every condition
below, five patterns of it where it is random. Prints accuracy in the test environment, and what is
lost of it; draws the first trainer's accuracy over each kind of damage. More flags, such as
--network CNN, are passed on to exp-mnist.py.
"""

import textwrap
from statistics import fmean

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

import memristor
from preprocessing import number, run_command
from register import TRAINERS
from trainer import build, evaluate, training_parser, training_settings

CONDITIONS = {
    "crossbar": {},
    "10 % on": {"lrs_proportion": 0.1},
    "20 % on": {"lrs_proportion": 0.2},
    "50 % off": {"hrs_proportion": 0.5},
    "10 % on, 10 % off": {"lrs_proportion": 0.1, "hrs_proportion": 0.1},
    "1-bit devices": {"conductance_states": 2},
    "2-bit ADCs": {"adc_resolution": 2},
    "r_off / r_on = 10": {"r_off": 1.4e5},
    "variability 0.5": {"device_variability": 0.5},
    "all at once": {
        "lrs_proportion": 0.1,
        "hrs_proportion": 0.1,
        "device_variability": 0.3,
        "conductance_states": 8,
        "adc_resolution": 4,
    },
}
RANDOM = ("lrs_proportion", "hrs_proportion", "device_variability")
CURVES = {
    "lrs_proportion": (0.0, 0.05, 0.1, 0.15, 0.2, 0.3),
    "hrs_proportion": (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6),
    "conductance_states": (2, 3, 4, 8, 16),
    "adc_resolution": (2, 3, 4, 5, 6, 8),
}
LABELS = {
    "lrs_proportion": "devices stuck on, %",
    "hrs_proportion": "devices stuck off, %",
    "conductance_states": "conductance states of a device",
    "adc_resolution": "ADC resolution, bits",
}
KINDS = {"plain": "tab:orange", "hardened": "tab:blue"}
COLUMNS = {"trainer": str, "flags": str, "kind": str, "repetition": int}
COLUMNS |= {"condition": str, "pattern": int, "accuracy": float, "commit": str}


def accuracies(
    options: tuple[str, ...], kind: str, repetition: int, patterns: int, settings: tuple
) -> list[tuple]:
    """(condition, pattern, test accuracy) of one network: digital, then with each of the settings.

    Args:
        options: arguments as those of exp-mnist.py
        kind: "plain" or "hardened"
        repetition: which one
        patterns: of each random condition; others have one
        settings: (condition, ((argument of `to_crossbar`, value), ...)) of each condition
    """
    args = training_parser().parse_args(options)
    (trained,) = experiment(list(options), only=repetition)
    network, test = trained.network, trained.data.test
    if kind == "hardened":
        memristor.seed_repetition(args, repetition)
        network = memristor.harden(network, trained.training, **training_settings(args))
    images = memristor.calibration_images(trained.training)
    measured = [("digital", 0, evaluate(network, test)["Accuracy"])]
    for condition, of_devices in settings:
        of_devices = dict(of_devices)
        for pattern in range(patterns_of(of_devices, patterns)):
            crossbar = memristor.to_crossbar(network, images, fault_seed=pattern, **of_devices)
            measured.append((condition, pattern, evaluate(crossbar, test)["Accuracy"]))
    return measured


def patterns_of(settings: dict, patterns: int) -> int:
    return patterns if any(settings.get(name) for name in RANDOM) else 1


def curve_settings(options: list[str]) -> dict[str, dict]:
    """Name of a condition → settings, of every point of the curves of these options."""
    return {f"{option} {value}": {option: value} for option in options for value in CURVES[option]}


def compute(
    table: Table,
    networks: dict[tuple[str, str, int], dict],
    options: list[str],
    patterns: int,
    scheduler: str | None,
) -> None:
    """Add to the table what it lacks.

    Args:
        table: the table
        networks: (trainer, kind, repetition) → {condition: settings} to test it in
        options: more arguments of exp-mnist.py
        patterns: of each random condition
        scheduler: address of a Dask cluster, whose workers then do the work
    """
    flags, key = " ".join(options), list(COLUMNS)[:-2]
    known = {tuple(row[name] for name in key) for row in table.rows}
    jobs, expected = {}, set(known)
    for (trainer, kind, repetition), conditions in networks.items():
        row, lacking = (trainer, flags, kind, repetition), []
        for condition, settings in {"digital": {}, **conditions}.items():
            rows = {(*row, condition, n) for n in range(patterns_of(settings, patterns))}
            expected |= rows
            if not rows <= known and condition != "digital":
                lacking.append((condition, tuple(settings.items())))
        if lacking or (*row, "digital", 0) not in known:
            arguments = ("--trainer", trainer, *options)
            jobs[arguments, kind, repetition, patterns, tuple(lacking)] = row
    table.expect(len(expected))
    of_commit = commit()
    for job, measured in run_jobs(accuracies, list(jobs), scheduler):
        rows = []
        for condition, pattern, accuracy in measured:
            values = (*jobs[job], condition, pattern, accuracy, of_commit)
            if values[: len(key)] not in known:
                rows.append(dict(zip(COLUMNS, values, strict=True)))
        table.add(rows)


def select(rows: list[dict], trainer: str, kind: str, condition: str) -> list[float]:
    """Accuracy of each repetition and pattern, in %."""
    wanted = (trainer, kind, condition)
    return [
        100 * row["accuracy"]
        for row in rows
        if (row["trainer"], row["kind"], row["condition"]) == wanted
    ]


def losses(rows: list[dict], trainer: str, kind: str, condition: str) -> list[float]:
    """What each repetition and pattern loses of the digital accuracy of its network, in points."""
    lost = []
    for repetition in {row["repetition"] for row in rows}:
        of_one = [row for row in rows if row["repetition"] == repetition]
        digital = select(of_one, trainer, kind, "digital")
        for accuracy in select(of_one, trainer, kind, condition):
            lost.append(digital[0] - accuracy)
    return lost


def report(rows: list[dict], trainers: list[str], conditions: list[str]) -> None:
    """Print a table of accuracies, and one of what is lost against the digital network."""
    print("Accuracy in the test environment, %: mean (the worst of all repetitions and patterns)\n")
    print(f"| trainer | training | digital | {' | '.join(conditions)} |")
    print("| --- " * (3 + len(conditions)) + "|")
    for trainer in trainers:
        for kind in KINDS:
            cells = [trainer, kind, f"{fmean(select(rows, trainer, kind, 'digital')):.1f}"]
            for condition in conditions:
                values = select(rows, trainer, kind, condition)
                cells.append(f"{fmean(values):.1f} ({min(values):.1f})")
            print(f"| {' | '.join(cells)} |")
    print("\nPoints lost against the same network's digital result: mean (the most)\n")
    print(f"| trainer | training | {' | '.join(conditions)} |")
    print("| --- " * (2 + len(conditions)) + "|")
    for trainer in trainers:
        for kind in KINDS:
            cells = [trainer, kind]
            for condition in conditions:
                values = losses(rows, trainer, kind, condition)
                cells.append(f"{fmean(values):.1f} ({max(values):.1f})")
            print(f"| {' | '.join(cells)} |")


def draw(rows: list[dict], trainer: str, options: list[str]) -> Figure:
    """A panel for each kind of damage."""
    repetitions = len({row["repetition"] for row in rows})
    trainings = "1 training" if repetitions == 1 else f"{repetitions} trainings"
    patterns = len({row["pattern"] for row in rows})
    width = 3 * len(options) + 0.6  # inches
    figure = Figure(figsize=(width, 4), layout="constrained")
    caption = (
        f"{trainer} on crossbars with defects. Points: the mean of {trainings} "
        f"with {patterns} patterns of broken devices where they are stuck. Bands: from the worst "
        "of these to the best. Dashed: the same networks, digital. Dotted: chance."
    )
    figure.suptitle(textwrap.fill(caption, int(12 * width)), fontsize=10)
    axes = figure.subplots(1, len(options), sharey=True, squeeze=False)[0]
    for axis, option in zip(axes, options, strict=True):
        values = CURVES[option]
        if isinstance(values[0], int):  # bits and states: at equal distances
            shown = range(len(values))
            axis.set_xticks(shown, values)
        else:
            shown = [100 * value for value in values]
        for kind, color in KINDS.items():
            found = [select(rows, trainer, kind, f"{option} {value}") for value in values]
            axis.plot(shown, [fmean(each) for each in found], "o-", color=color, label=kind)
            worst, best = [min(each) for each in found], [max(each) for each in found]
            axis.fill_between(shown, worst, best, color=color, alpha=0.25)
            digital = fmean(select(rows, trainer, kind, "digital"))
            axis.axhline(digital, color=color, linestyle="--", linewidth=1)
        axis.axhline(50, color="gray", linestyle=":", linewidth=1)
        axis.set_xlabel(LABELS[option])
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("accuracy in the test environment, %")
    axes[-1].legend(loc="lower left")
    return figure


def main() -> None:
    parser = script_parser(__doc__, "robustness.png", "robustness.csv")
    add, names = parser.add_argument, list(CONDITIONS)
    trainers = "default: Backdoor groupDRO IRM"
    three = ["Backdoor", "groupDRO", "IRM"]
    add("--trainers", nargs="+", choices=TRAINERS, default=three, help=trainers)
    which = f"columns of the table; default: all, {names}".replace("%", "%%")
    add("--conditions", nargs="+", default=names, choices=names, metavar="NAME", help=which)
    panels = "panels of the figure, of the first trainer; default: all; none: no figure"
    add("--curves", nargs="*", default=list(CURVES), choices=CURVES, help=panels)
    add("--repetitions", type=number(int, 1), default=3, help="default: 3")
    patterns = "of each random condition; default: 5"
    add("--patterns", type=number(int, 1), default=5, help=patterns)
    args, options = parser.parse_known_args()
    memristor.check_devices(r_on=1, r_off=2)  # whether there is MemTorch at all
    network, _ = build(training_flags(options, "trainer", "dataset_path", "save_model"))
    memristor.check_network(network)
    if args.curves:
        check_writable(args.figure)
    networks = {}
    for trainer in args.trainers:
        conditions = {name: CONDITIONS[name] for name in args.conditions}
        if trainer == args.trainers[0]:
            conditions |= curve_settings(args.curves)
        for kind in KINDS:
            for repetition in range(1, args.repetitions + 1):
                networks[trainer, kind, repetition] = conditions
    table = Table(args.table, COLUMNS, args.resume)
    compute(table, networks, options, args.patterns, args.scheduler)
    print(f"Table: {args.table}\n")
    rows = [row for row in table.rows if row["flags"] == " ".join(options)]
    report(rows, args.trainers, args.conditions)
    if args.curves:
        save_figure(draw(rows, args.trainers[0], args.curves), args.figure)


if __name__ == "__main__":
    run_command(main)
