"""Accuracy of plain and hardened networks on damaged crossbars.

python benchmarks/robustness.py
python benchmarks/robustness.py --trainers Backdoor --seeds 1234

The script tests each network without a crossbar and on a crossbar in each of `CONDITIONS`. A random
condition is tested with five patterns. Hardening is also tested with one ingredient alone, either
the limit on the weights or the stuck devices in training. The script prints the test accuracy and
the points lost against the same network without a crossbar. The figure shows the first trainer. The
script also accepts the flags of exp-mnist.py.
"""

import math
import textwrap
from statistics import fmean

from jobs import (
    Table,
    fresh_data,
    print_table,
    save_figure,
    script_parser,
    select,
    training_arguments,
)
from matplotlib.figure import Figure
from torch import Tensor

import memristor
from model import Network
from preprocessing import number, run_command
from register import TRAINERS
from trainer import arguments_of, build, evaluate, seed_repetition, train, train_repetition

CONDITIONS = {"crossbar": {}}
CONDITIONS |= {f"{percent} % on": {"lrs_proportion": percent / 100} for percent in (10, 20, 30)}
CONDITIONS |= {f"{percent} % off": {"hrs_proportion": percent / 100} for percent in (25, 50)}
CONDITIONS |= {f"{states} states": {"conductance_states": states} for states in (2, 4, 8)}
CONDITIONS |= {f"{bits}-bit ADCs": {"adc_resolution": bits} for bits in (2, 4, 6)}
CONDITIONS |= {
    "10 % on, 10 % off": {"lrs_proportion": 0.1, "hrs_proportion": 0.1},
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
PATTERNS = 5  # patterns of each random condition
PRINTED = ("crossbar", "10 % on", "20 % on", "50 % off", "10 % on, 10 % off", "2 states")
PRINTED += ("2-bit ADCs", "r_off / r_on = 10", "variability 0.5", "all at once")
# Title of a panel → position on its axis → condition. Strings are spaced equally.
PANELS = {
    "devices stuck on, %": {0: "crossbar"} | {n: f"{n} % on" for n in (10, 20, 30)},
    "devices stuck off, %": {0: "crossbar"} | {n: f"{n} % off" for n in (25, 50)},
    "conductance states of a device": {str(n): f"{n} states" for n in (2, 4, 8)},
    "ADC resolution, bits": {str(n): f"{n}-bit ADCs" for n in (2, 4, 6)} | {"8": "crossbar"},
}
# Kind of network → arguments of `memristor.harden`.
KINDS = {
    "plain": None,
    "hardened": {},
    "limit only": {"stuck_on": 0.0, "stuck_off": 0.0},
    "faults only": {"limit": math.inf},
}
DRAWN = {"plain": "tab:orange", "hardened": "tab:blue"}
TAKEN_APART = ("Backdoor", "groupDRO")  # trainers tested with all kinds; others with two
COLUMNS = {"trainer": str, "flags": str, "kind": str, "seed": int, "repetition": int}
COLUMNS |= {"condition": str, "pattern": int, "accuracy": float, "current": float}


def measure(
    trainer: str, flags: str, kind: str, seed: int, repetition: int
) -> list[tuple[str, int, float, float]]:
    """Train a network and test it in every condition.

    Returns:
        rows of (condition, pattern, test accuracy, current); the current is the summed conductance
        of layer 1 on an undamaged crossbar, relative to the plain network
    """
    args = training_arguments(f"{trainer} {flags}")
    args.seed = seed
    data = fresh_data(seed)
    plain, _, training, _ = train_repetition(args, data, repetition, report=lambda step: None)
    images = memristor.calibration_images(training)
    network = plain
    if kind != "plain":
        seed_repetition(args, repetition)
        network = memristor.harden(plain, training, **KINDS[kind], **arguments_of(train, args))
    current = conductance(network, images) / conductance(plain, images)
    rows = [("digital", 0, evaluate(network, data.test)["Accuracy"], current)]
    for condition, settings in CONDITIONS.items():
        for pattern in range(PATTERNS if RANDOM & settings.keys() else 1):
            crossbar = memristor.to_crossbar(network, images, fault_seed=pattern, **settings)
            accuracy = evaluate(crossbar, data.test)["Accuracy"]
            rows.append((condition, pattern, accuracy, current))
    return rows


def conductance(network: Network, images: Tensor) -> float:
    """Return the summed conductance of layer 1 on an undamaged crossbar, in siemens."""
    layers = memristor.to_crossbar(network, images).phi
    first = next(layer for layer in layers if isinstance(layer, memristor.CrossbarLayer))
    return first.conductances.sum().item()


def accuracies(rows: list[dict], **values: object) -> list[float]:
    """Return the accuracy, in %, in the rows that have these values."""
    return [100 * row["accuracy"] for row in select(rows, **values)]


def losses(rows: list[dict], condition: str) -> list[float]:
    """Return the points that each crossbar of a condition loses against the digital network."""
    lost = []
    for digital in select(rows, condition="digital"):
        network = {name: digital[name] for name in ("seed", "repetition")}
        for accuracy in accuracies(rows, condition=condition, **network):
            lost.append(100 * digital["accuracy"] - accuracy)
    return lost


def report(rows: list[dict]) -> None:
    """Print a table of accuracies and currents, and a table of losses."""
    results, points = [], []
    for trainer in dict.fromkeys(row["trainer"] for row in rows):
        for kind in KINDS:
            networks = select(rows, trainer=trainer, kind=kind)
            if not networks:
                continue
            result = [trainer, kind, f"{fmean(row['current'] for row in networks):.1f}"]
            result.append(f"{fmean(accuracies(networks, condition='digital')):.1f}")
            lost = [trainer, kind]
            for condition in PRINTED:
                values = accuracies(networks, condition=condition)
                result.append(f"{fmean(values):.1f} ({min(values):.1f})")
                values = losses(networks, condition)
                lost.append(f"{fmean(values):.1f} ({max(values):.1f})")
            results.append(result)
            points.append(lost)
    print("Accuracy in the test environment, %: mean (the worst of all networks and patterns)\n")
    print_table(["trainer", "network", "current of layer 1", "digital", *PRINTED], results)
    print("\nPoints lost against the same network without a crossbar: mean (the most)\n")
    print_table(["trainer", "network", *PRINTED], points)


def draw(rows: list[dict]) -> Figure:
    """Draw a panel for each kind of damage, for the rows of one trainer."""
    trainings = len(select(rows, kind="plain", condition="digital"))
    figure = Figure(figsize=(12.6, 4), layout="constrained")
    caption = (
        f"{rows[0]['trainer']} on damaged crossbars. Points: the mean over trainings ({trainings}) "
        f"and patterns of stuck devices ({PATTERNS}). Bands: from the worst to the best of these. "
        "Dashed: the same networks, digital. Dotted: chance."
    )
    figure.suptitle(textwrap.fill(caption, 150), fontsize=10)
    axes = figure.subplots(1, len(PANELS), sharey=True)
    for axis, (title, panel) in zip(axes, PANELS.items(), strict=True):
        for kind, color in DRAWN.items():
            networks = select(rows, kind=kind)
            values = [accuracies(networks, condition=name) for name in panel.values()]
            positions = list(panel)
            axis.plot(positions, list(map(fmean, values)), "o-", color=color, label=kind)
            worst, best = list(map(min, values)), list(map(max, values))
            axis.fill_between(positions, worst, best, color=color, alpha=0.25)
            digital = fmean(accuracies(networks, condition="digital"))
            axis.axhline(digital, color=color, linestyle="--", linewidth=1)
        axis.axhline(50, color="gray", linestyle=":", linewidth=1)
        axis.set_xlabel(title)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("accuracy in the test environment, %")
    axes[-1].legend(loc="lower left")
    return figure


def main() -> None:
    parser = script_parser(__doc__, "robustness.png", "robustness.csv")
    add = parser.add_argument
    three = ["Backdoor", "groupDRO", "IRM"]
    add(
        "--trainers",
        nargs="+",
        choices=TRAINERS,
        default=three,
        help=f"default: {three}",
    )
    two = [1234, 40000]
    add("--seeds", type=number(int, 0), nargs="+", default=two, help=f"seeds (default: {two})")
    args, words = parser.parse_known_args()
    memristor.check_devices(r_on=1, r_off=2)  # ends here if MemTorch is missing
    flags, jobs = " ".join(words), []
    for trainer in args.trainers:
        training = training_arguments(f"{trainer} {flags}")
        memristor.check_network(build(training)[0])
        for kind in KINDS if trainer in TAKEN_APART else DRAWN:
            for seed in args.seeds:
                for repetition in range(1, training.repetitions + 1):
                    jobs.append((trainer, flags, kind, seed, repetition))
    table = Table(args.table, COLUMNS, args.resume)
    table.fill(measure, {job: job for job in jobs}, args.scheduler)
    print(f"Table: {args.table}\n")
    rows = [row for row in table.rows if tuple(row.values())[:5] in jobs]
    report(rows)
    save_figure(draw(select(rows, trainer=args.trainers[0])), args.figure)


if __name__ == "__main__":
    run_command(main)
