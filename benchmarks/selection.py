"""Choose each trainer's settings on held-out training samples, without the test environment.

python benchmarks/selection.py --trainers ERM groupDRO IRM Backdoor --seeds 5

A setting is one value for each of a trainer's knobs, in `SPACES`. Tried are the plain setting
(all knobs as textbooks have them), then, again and again, all settings that differ in one knob from
the best one so far or from the one that would be chosen, until there are no new ones; and the
default. Each is trained with several seeds, the same for all, and each seed is a draw of
the data of its own; those within two standard errors of the best go on to more seeds, and the
choice is between these. The best setting is that of the lowest mean criterion; chosen is the
setting of the fewest knobs turned away from the plain one whose criterion is within one standard
error (of the difference from the best, seed by seed) of the best. The accuracy in the test
environment is printed beside all that, and nothing depends on it. Draws figures/selection.png.
"""

import argparse
import itertools
import math
from collections.abc import Iterable, Iterator
from statistics import fmean, stdev
from typing import NamedTuple
from unittest import mock

from jobs import ROOT, add_scheduler_flag, experiment, run_jobs, save_figure
from matplotlib.figure import Figure

from dataset import concatenate
from memristor import StuckDevices, harden, to_crossbar
from model import ERM, IRM
from preprocessing import number, run_command
from trainer import arguments_of, evaluate, parse_arguments, predict, train

Setting = tuple  # a value for each knob of a space, in its order


class Space(NamedTuple):
    """What is tried for a trainer, and what is minimised."""

    arguments: tuple[str, ...]  # of exp-mnist.py
    knobs: dict[str, tuple]  # name → values; the first is the plain one
    criterion: str  # a key of `train_and_measure`, or DISAGREEMENT

    @property
    def plain(self) -> Setting:
        return tuple(values[0] for values in self.knobs.values())

    @property
    def default(self) -> Setting:
        """What the command line does."""
        defaults = vars(StuckDevices) | vars(parse_arguments("", list(self.arguments)))
        return tuple(defaults[knob] for knob in self.knobs)

    def neighbours(self, setting: Setting) -> Iterator[Setting]:
        """All settings that differ from one in one knob."""
        for index, values in enumerate(self.knobs.values()):
            for value in values:
                yield (*setting[:index], value, *setting[index + 1 :])

    def turned(self, setting: Setting) -> list[str]:
        """The knobs that are turned away from the plain setting, and their values."""
        pairs = zip(self.knobs, setting, self.plain, strict=True)
        return [f"{knob} {value}" for knob, value, plain in pairs if value != plain]


KNOBS = {
    "average_last": (0.0, 0.25, 0.5, 0.75),
    "max_gradient_norm": (0.0, 0.1, 1.0),
    "init_scale": (1.0, 0.3, 0.1),
    "epsilon": (1e-8, 1e-4),
    "shift": (0, 1, 2),
}
CNN_KNOBS = {
    "average_last": (0.0, 0.75),
    "max_gradient_norm": (0.0, 0.1),
    "epsilon": (1e-8, 1e-4),
    "shift": (0, 2),
    "drop_rate": (0.0, 0.3),
}
# Attributes of StuckDevices. Textbooks have no plain setting: round numbers stand for it.
HARDENING_KNOBS = {
    "LIMIT": (1.0, 0.5, 0.7, 1.5),
    "MOST_ON": (0.2, 0.1, 0.3),
    "MOST_OFF": (0.0, 0.25, 0.5),
}
# Proportions of devices stuck at low and at high resistance that a hardened network is tried with.
BROKEN = ((0.2, 0.0), (0.0, 0.5), (0.1, 0.1))
ENTROPY = "cross entropy of σ(Φ + o_s)"
DISAGREEMENT = "disagreement with the plain network"
SPACES = {
    "ERM": Space(("--trainer=ERM",), KNOBS, "mean risk"),
    "groupDRO": Space(("--trainer=groupDRO",), KNOBS, "larger risk"),
    "IRM": Space(("--trainer=IRM",), KNOBS | {"penalty": ("plain", "unbiased")}, "IRM's objective"),
    "Backdoor": Space(
        ("--trainer=Backdoor",), KNOBS | {"adjustment": ("offset", "weights")}, ENTROPY
    ),
    "CNN": Space(("--trainer=Backdoor", "--network=CNN"), CNN_KNOBS, ENTROPY),
    "hardening": Space((), HARDENING_KNOBS, DISAGREEMENT),
}


def train_and_measure(
    arguments: tuple[str, ...], knobs: tuple[tuple, ...], criterion: str, seed: int
) -> tuple[float, float]:
    """Train a network; its criterion on the digits held out, and its test accuracy."""
    flags = [f"--{knob}={value}" for knob, value in knobs]
    arguments = [*arguments, *flags, f"--seed={seed}", "--repetitions=1"]
    ((data, network, loss, _, held_out),) = experiment(arguments)
    logits = predict(network, held_out)
    criteria = {
        "mean risk": lambda: ERM()(logits, held_out),
        "larger risk": lambda: loss.risks(logits, held_out).max(),
        "IRM's objective": lambda: IRM(50, "unbiased")(logits, held_out),
        ENTROPY: lambda: loss.fitted(logits, held_out).mean(),
    }
    return float(criteria[criterion]()), evaluate(network, data.test)["Accuracy"]


def harden_and_measure(
    _: tuple, knobs: tuple[tuple, ...], criterion: str, seed: int
) -> tuple[float, float]:
    """Train and harden a network by each of three trainers, and break it on crossbars.

    Returns the proportion of digits held out, in both colours, on which it decides otherwise than
    the network that was not hardened, and its test accuracy: means over trainers and over `BROKEN`.
    """
    criteria, accuracies = [], []
    for trainer in ("groupDRO", "IRM", "Backdoor"):
        arguments = [f"--trainer={trainer}", f"--seed={seed}", "--repetitions=1"]
        ((data, plain, _, training, held_out),) = experiment(arguments)
        options = arguments_of(train, parse_arguments("", arguments))
        with mock.patch.multiple(StuckDevices, **dict(knobs)):
            hardened = harden(plain, training, **options)
        digits = concatenate([held_out, held_out.recolored()])
        decisions = predict(plain, digits) > 0
        images = next(training.chunks()).images
        for on, off in BROKEN:
            broken = {"lrs_proportion": on, "hrs_proportion": off, "fault_seed": seed}
            crossbar = to_crossbar(hardened, images, **broken)
            others = (predict(crossbar, digits) > 0) != decisions
            criteria.append(others.double().mean().item())
            accuracies.append(evaluate(crossbar, data.test)["Accuracy"])
    return fmean(criteria), fmean(accuracies)


class Search:
    """The settings tried for one trainer, and what they gave."""

    def __init__(self, name: str, scheduler: str | None):
        self.name, self.space, self.scheduler = name, SPACES[name], scheduler
        self.results = {}  # setting → seed → (criterion, test accuracy)

    def run(self, seeds: int, final_seeds: int) -> None:
        space, wanted = self.space, {self.space.plain}
        while wanted:
            self.train(wanted, range(seeds))
            wanted = {*space.neighbours(self.best), *space.neighbours(self.chosen)}
            wanted -= self.results.keys()
        self.train({space.default} - self.results.keys(), range(seeds))
        self.train(self.near(2), range(seeds, final_seeds))

    def train(self, settings: Iterable[Setting], seeds: range) -> None:
        jobs = {}
        for setting, seed in itertools.product(sorted(settings), seeds):
            knobs = tuple(zip(self.space.knobs, setting, strict=True))
            jobs[self.space.arguments, knobs, self.space.criterion, seed] = setting
        function = harden_and_measure if self.name == "hardening" else train_and_measure
        for job, result in run_jobs(function, list(jobs), self.scheduler):
            self.results.setdefault(jobs[job], {})[job[-1]] = result

    def criteria(self, setting: Setting) -> list[float]:
        return [self.results[setting][seed][0] for seed in sorted(self.results[setting])]

    def accuracies(self, setting: Setting) -> list[float]:
        return [100 * self.results[setting][seed][1] for seed in sorted(self.results[setting])]

    @property
    def ranking(self) -> list[Setting]:
        """By the mean criterion; those trained with more seeds come first."""

        def rank(setting: Setting) -> tuple[int, float]:
            return -len(self.results[setting]), fmean(self.criteria(setting))

        return sorted(self.results, key=rank)

    @property
    def best(self) -> Setting:
        return self.ranking[0]

    def behind(self, setting: Setting) -> tuple[float, float]:
        """How much higher the criterion is than the best one's, and the standard error of that."""
        pairs = zip(self.criteria(setting), self.criteria(self.best), strict=False)
        return mean_and_error([criterion - best for criterion, best in pairs])

    def near(self, errors: float) -> list[Setting]:
        """The settings of most seeds within so many standard errors of the best, by rank."""
        most = len(self.results[self.best])
        finalists = [s for s in self.ranking if len(self.results[s]) == most]
        return [s for s in finalists if self.behind(s)[0] <= errors * self.behind(s)[1]]

    @property
    def chosen(self) -> Setting:
        """The first by rank of the plainest settings within one standard error of the best."""
        return min(self.near(1), key=lambda setting: len(self.space.turned(setting)))


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """The mean, and its standard error."""
    return fmean(values), stdev(values) / math.sqrt(len(values))


def print_table(search: Search) -> None:
    space, ranking = search.space, search.ranking
    print(f"\n### {search.name}: {len(ranking)} settings\n")
    print(
        f"| | setting | seeds | held-out {space.criterion} | behind the best | test accuracy, % |"
    )
    print("| --- | --- | --- | --- | --- | --- |")
    for rank, setting in enumerate(ranking, 1):
        marks = ["**chosen**"] * (setting == search.chosen)
        marks += ["the default"] * (setting == space.default)
        text = ", ".join(space.turned(setting)) or "plain"
        text += f" ({', '.join(marks)})" if marks else ""
        seeds = len(search.results[setting])
        criterion = "{:.4f} ± {:.4f}".format(*mean_and_error(search.criteria(setting)))
        behind = "{:.4f} ± {:.4f}".format(*search.behind(setting))
        accuracy = "{:.2f} ± {:.2f}".format(*mean_and_error(search.accuracies(setting)))
        print(f"| {rank} | {text} | {seeds} | {criterion} | {behind} | {accuracy} |", flush=True)


def draw(searches: list[Search], path: str) -> None:
    """Criterion against test accuracy, a panel a trainer, a point a setting.

    Both are means over the seeds that all settings have, as draws of the data differ.
    """
    columns = min(3, len(searches))
    rows = math.ceil(len(searches) / columns)
    figure = Figure(figsize=(3.6 * columns, 3.2 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, search in zip(panels, searches, strict=False):
        space = search.space
        shared = slice(min(len(seeds) for seeds in search.results.values()))
        for settings, style in (
            (search.ranking, {"color": "tab:gray", "s": 12, "label": "settings tried"}),
            ([space.plain], {"color": "tab:blue", "marker": "s", "label": "plain"}),
            ([space.default], {"color": "tab:orange", "marker": "D", "label": "the default"}),
            ([search.chosen], {"color": "tab:red", "marker": "*", "s": 120, "label": "chosen"}),
        ):
            criteria = [fmean(search.criteria(setting)[shared]) for setting in settings]
            accuracies = [fmean(search.accuracies(setting)[shared]) for setting in settings]
            axes.scatter(criteria, accuracies, **style)
        axes.set_title(search.name, fontsize=10)
        axes.set_xlabel(f"held-out {space.criterion}", fontsize=9)
        axes.grid(alpha=0.3)
    for axes in panels[len(searches) :]:
        axes.axis("off")
    for axes in panels[::columns]:
        axes.set_ylabel("test accuracy, %")
    panels[0].legend(fontsize=8)
    save_figure(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    choices = {"choices": SPACES, "default": list(SPACES)}
    parser.add_argument("--trainers", nargs="+", **choices, help="whose settings to choose")
    parser.add_argument("--seeds", type=number(int, 2), default=5, help="trainings of each setting")
    finals = "trainings of each setting within two standard errors of the best"
    parser.add_argument("--final_seeds", type=number(int, 2), default=20, help=finals)
    add_scheduler_flag(parser)
    parser.add_argument("--figure", default=str(ROOT / "figures" / "selection.png"))
    args = parser.parse_args()
    searches = [Search(name, args.scheduler) for name in args.trainers]
    for search in searches:
        search.run(args.seeds, args.final_seeds)
        print_table(search)
    draw(searches, args.figure)


if __name__ == "__main__":
    run_command(main)
