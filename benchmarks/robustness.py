"""What broken hardware costs, and what hardening saves: the crossbar table and its figure.

    python benchmarks/robustness.py

For each trainer: three repetitions, plain and hardened, digital and on crossbars in every condition
below, five patterns of it where it is random. Prints the mean and, in brackets, the worst pattern's
test accuracy; draws the first trainer's accuracy over each kind of damage, with bands from the
worst to the best pattern. Other flags, such as --network CNN, are passed on to exp-mnist.py.
"""

import argparse
import itertools
from statistics import fmean

from jobs import ROOT, add_scheduler_flag, experiment, run_jobs, save_figure

import memristor
from preprocessing import number, run_command
from trainer import arguments_of, evaluate, parse_arguments, train

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
RANDOM = {"lrs_proportion", "hrs_proportion", "device_variability"}
CURVES = {
    "devices stuck on, %": ("lrs_proportion", (0.0, 0.05, 0.1, 0.15, 0.2, 0.3)),
    "devices stuck off, %": ("hrs_proportion", (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)),
    "conductance states": ("conductance_states", (2, 3, 4, 8, 16)),
    "ADC resolution, bits": ("adc_resolution", (2, 3, 4, 5, 6, 8)),
}


def accuracies(
    options: tuple[str, ...], hardened: bool, repetition: int, patterns: int, settings: tuple
) -> list[list[float]]:
    """Test accuracy digitally, then with each of the crossbar's settings: one for each pattern."""
    arguments = ["--no_cuda", *options]
    args = parse_arguments("", arguments)
    ((data, network, _, training, _),) = experiment(arguments, only=repetition)
    if hardened:
        network = memristor.harden(network, training, **arguments_of(train, args))
    images = memristor.calibration_images(training)
    measured = [[evaluate(network, data.test)["Accuracy"]]]
    for setting in map(dict, settings):
        seeds = range(patterns if RANDOM & setting.keys() else 1)
        crossbars = (memristor.to_crossbar(network, images, fault_seed=s, **setting) for s in seeds)
        measured.append([evaluate(crossbar, data.test)["Accuracy"] for crossbar in crossbars])
    return measured


def draw(path: str, trainer: str, measured: dict[bool, dict]) -> None:
    """The figure: for plain (False) and hardened (True) setting → accuracies, in %."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.4), layout="constrained")
    axes = figure.subplots(1, len(CURVES), sharey=True)
    for axis, (label, (option, values)) in zip(axes, CURVES.items(), strict=True):
        shown = range(len(values)) if isinstance(values[0], int) else [100 * v for v in values]
        if isinstance(values[0], int):
            axis.set_xticks(shown, values)
        for hardened, color in ((False, "tab:orange"), (True, "tab:blue")):
            rows = [measured[hardened][((option, value),)] for value in values]
            name = "hardened" if hardened else "plain"
            axis.plot(shown, [fmean(row) for row in rows], "o-", color=color, label=name)
            axis.fill_between(shown, [*map(min, rows)], [*map(max, rows)], color=color, alpha=0.25)
            digital = fmean(measured[hardened]["digital"])
            axis.axhline(digital, color=color, linestyle="--", linewidth=1)
        axis.axhline(50, color="gray", linestyle=":", linewidth=1)
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("test accuracy, %")
    axes[-1].legend(loc="lower left", title=f"{trainer} (dashed: digital)")
    save_figure(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add, names = parser.add_argument, list(CONDITIONS)
    add("--trainers", nargs="+", default=["Backdoor", "groupDRO", "IRM"])
    which = str(names).replace("%", "%%")
    add("--conditions", nargs="+", default=names, choices=names, metavar="NAME", help=which)
    add("--repetitions", type=number(int, 1), default=3)
    add("--patterns", type=number(int, 1), default=5, help="of each random condition")
    add("--figure", default=str(ROOT / "figures" / "crossbar.png"), help='"" draws none')
    add_scheduler_flag(parser)
    args, options = parser.parse_known_args()
    memristor.check_devices(r_on=1, r_off=2)
    table = [tuple(CONDITIONS[name].items()) for name in args.conditions]
    curves = [((option, value),) for option, values in CURVES.values() for value in values]
    jobs = []
    for trainer in args.trainers:
        settings = table
        if args.figure and trainer == args.trainers[0]:
            settings = list(dict.fromkeys(table + curves))
        flags = ("--trainer", trainer, *options)
        parse_arguments("", [*flags])  # so that a mistake is found before anything is trained
        for repetition in range(1, args.repetitions + 1):
            for hardened in (False, True):
                jobs.append((flags, hardened, repetition, args.patterns, tuple(settings)))
    results = dict(run_jobs(accuracies, jobs, args.scheduler))
    print(f"| trainer | training | digital | {' | '.join(args.conditions)} |")
    print("| --- " * (3 + len(table)) + "|")
    curves_of, losses = {}, {trainer: [] for trainer in args.trainers}
    for trainer, hardened in itertools.product(args.trainers, (False, True)):
        measured = {}  # setting → accuracy of each repetition and pattern, in %
        for job in jobs:
            if job[0][1] == trainer and job[1] == hardened:
                (digital,), *others = results[job]
                for setting, values in zip(
                    ("digital", *job[-1]), ([digital], *others), strict=True
                ):
                    measured.setdefault(setting, []).extend(100 * value for value in values)
                    if hardened and setting in table:
                        name = args.conditions[table.index(setting)]
                        losses[trainer].append((100 * (digital - min(values)), name))
        cells = [f"{fmean(measured[key]):.1f} ({min(measured[key]):.1f})" for key in table]
        kind, digital = "hardened" if hardened else "plain", fmean(measured["digital"])
        print(f"| {trainer} | {kind} | {digital:.1f} | {' | '.join(cells)} |")
        if trainer == args.trainers[0]:
            curves_of[hardened] = measured
    print("\nWhat a pattern costs a hardened network at most, in points of its digital result:")
    for trainer, of_trainer in losses.items():
        lost, where = max(of_trainer)
        print(f"- {trainer}: {lost:.1f} ({where})")
    if args.figure:
        draw(args.figure, args.trainers[0], curves_of)


if __name__ == "__main__":
    run_command(main)
