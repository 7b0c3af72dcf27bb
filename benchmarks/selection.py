"""Choose each trainer's settings on held-out training samples, not by the test environment.

python benchmarks/selection.py

A setting is one value for each of a trainer's knobs, in `SPACES`. Tried are the default, all that
differ from it in one knob, and the plain setting (every knob as textbooks have it); each with
several seeds, and each seed is a draw of the data. The default stays unless a setting's criterion
is lower on the same draws by more than `CLEARLY` standard errors of the mean difference: then the
best of these is chosen. Printed beside that is the accuracy in the test environment, on which
nothing depends. MNIST's own test digits are not read. Draws figures/selection.png.
"""

import argparse
import itertools
import math
from collections.abc import Iterator
from statistics import fmean, stdev
from typing import Literal, NamedTuple
from unittest import mock

import torch
from jobs import ROOT, add_scheduler_flag, experiment, run_jobs, save_figure
from matplotlib.figure import Figure
from torch import nn

from dataset import concatenate
from memristor import StuckDevices, calibration_images, harden, quantize_currents, to_crossbar
from model import IRM, MLP
from preprocessing import run_command
from register import NETWORKS, TRAINERS
from trainer import arguments_of, evaluate, parse_arguments, predict, train

Setting = tuple  # a value for each knob of a space, in its order
CLEARLY = 3  # chance alone gets there with one setting in twenty for three draws, in fifty for five


class StartedMLP(MLP):
    """An MLP with a choice of initial weights.

    The first layer's are Glorot's times `init_scale`, those from red and green "drawn" each or the
    "same"; the logit's are "drawn" as Glorot's, or "equal" in size.
    """

    def __init__(
        self,
        channels: int = 2,
        init_scale: float = 1.0,
        from_colors: Literal["drawn", "same"] = "same",
        to_logit: Literal["drawn", "equal"] = "equal",
    ):
        super().__init__(channels)
        if from_colors == "drawn":
            nn.init.xavier_uniform_(self.phi[0].weight)
        self.phi[0].weight.data.mul_(init_scale)
        if to_logit == "drawn":
            nn.init.xavier_uniform_(self.phi[-1].weight)


class PenaltyIRM(IRM):
    """IRM with a choice of penalty.

    "plain" is the square of the minibatch's mean of (σ(Φ) - y) Φ, as the assignment has it, whose
    expectation is too large by the mean's variance. "unbiased" is the mean product of two different
    samples' (Arjovsky et al. 2019, section 3.2, multiply the means of two minibatches).
    """

    def __init__(self, penalty: Literal["plain", "unbiased"] = "plain"):
        super().__init__()
        self.penalty = penalty

    def __call__(self, logits, batch):
        if self.penalty == "plain":
            return super().__call__(logits, batch)
        slopes = (torch.sigmoid(logits) - batch.labels) * logits
        sizes = batch.envs.bincount(minlength=self.environments)
        squares = sizes * self.means(slopes, batch).square() - self.means(slopes.square(), batch)
        return self.risks(logits, batch).mean() + self.reg_lambda * (squares / (sizes - 1)).mean()


class CoarseDevices(StuckDevices):
    """Stuck devices that may also have few conductances, and coarse ADCs behind them.

    All while training alone: STATES conductances (0: any), and ADCs of BITS bits (0: exact).
    """

    STATES = BITS = 0

    def damage(self, devices, limit):
        if self.STATES:
            devices.mul_((self.STATES - 1) / limit).round_().mul_(limit / (self.STATES - 1))
        super().damage(devices, limit)

    @classmethod
    def read(cls, layer, inputs, outputs):
        """Forward hook: the outputs, half of the time as ADCs read them (straight-through)."""
        if not layer.training or not cls.BITS or torch.rand(()) < 0.5:
            return outputs
        values = outputs.detach()
        return outputs + (quantize_currents(values.clone(), cls.BITS) - values)


NETWORKS["MLP"], TRAINERS["IRM"] = StartedMLP, PenaltyIRM
# Knobs that exp-mnist.py has not.
OURS = {"init_scale": 1.0, "from_colors": "same", "to_logit": "equal", "penalty": "plain"}


class Space(NamedTuple):
    """What is tried for a trainer, and what is minimised."""

    arguments: tuple[str, ...]  # of exp-mnist.py
    knobs: dict[str, tuple]  # name → values; the first is the plain one
    criterion: str
    seeds: int = 5

    @property
    def plain(self) -> Setting:
        return tuple(values[0] for values in self.knobs.values())

    def of(self, *arguments: str) -> Setting:
        """What the command line does with these arguments."""
        values = OURS | vars(StuckDevices) | vars(CoarseDevices)
        values |= vars(parse_arguments("", list(arguments)))
        return tuple(values[knob] for knob in self.knobs)

    def neighbours(self, setting: Setting) -> Iterator[Setting]:
        """A setting, and all that differ from it in one knob."""
        for index, values in enumerate(self.knobs.values()):
            for value in values:
                yield (*setting[:index], value, *setting[index + 1 :])


KNOBS = {
    "average_last": (0.0, 0.25, 0.5, 0.75),
    "max_gradient_norm": (0.0, 0.1, 1.0),
    "shift": (0, 1, 2),
    "init_scale": (1.0, 0.3, 0.1),
    "from_colors": ("drawn", "same"),
    "to_logit": ("drawn", "equal"),
    "epsilon": (1e-8, 1e-4, 1e-3),
    "weight_decay": (0.0, 3e-4, 1e-3),
}
# The assignment says how many iterations the others' are.
BACKDOOR_KNOBS = KNOBS | {"iteration": (400, 800), "adjustment": ("offset", "weights")}
CNN_KNOBS = {
    "average_last": (0.0, 0.25),
    "shift": (0, 1, 2),
    "drop_rate": (0.0, 0.3),
    "epsilon": (1e-8, 1e-4),
    "weight_decay": (0.0, 1e-3),
}
# Attributes of CoarseDevices. Textbooks have no plain setting: some devices stuck both ways is it.
HARDENING_KNOBS = {
    "LIMIT": (0.7, 0.5, 1.0),
    "MOST_ON": (0.2, 0.1, 0.3),
    "MOST_OFF": (0.25, 0.0, 0.5),
    "STATES": (0, 2, 4),
    "BITS": (0, 2, 3),
}
# The crossbars that a hardened network is tried on.
BROKEN = (
    {"lrs_proportion": 0.2},
    {"hrs_proportion": 0.5},
    {"lrs_proportion": 0.1, "hrs_proportion": 0.1, "conductance_states": 8, "adc_resolution": 4},
    {"adc_resolution": 2},
)
ENTROPY = "cross entropy of σ(Φ + o_s)"
SPACES = {
    "ERM": Space(("--trainer=ERM",), KNOBS, "mean risk"),
    "groupDRO": Space(("--trainer=groupDRO",), KNOBS, "larger risk"),
    "IRM": Space(
        ("--trainer=IRM",), KNOBS | {"penalty": ("plain", "unbiased")}, "IRM objective", 20
    ),
    "Backdoor": Space(("--trainer=Backdoor",), BACKDOOR_KNOBS, ENTROPY),
    "CNN": Space(("--trainer=Backdoor", "--network=CNN"), CNN_KNOBS, ENTROPY, 3),
    "hardening": Space((), HARDENING_KNOBS, "disagreement with the plain network", 3),
}


def train_and_measure(
    arguments: tuple[str, ...], knobs: tuple[tuple, ...], criterion: str, seed: int
) -> tuple[float, float]:
    """Train a network; its criterion on the digits held out, and its test accuracy."""
    flags = [f"--{knob}={value}" for knob, value in knobs]
    arguments = [*arguments, *flags, f"--seed={seed}", "--repetitions=1"]
    ((data, network, loss, _, held_out),) = experiment(arguments)
    logits = predict(network, held_out)
    strata = 2 * held_out.envs + held_out.colors
    criteria = {
        "mean risk": lambda: loss.risks(logits, held_out).mean(),
        "larger risk": lambda: loss.risks(logits, held_out).max(),
        "IRM objective": lambda: PenaltyIRM("unbiased")(logits, held_out),
        ENTROPY: lambda: loss.losses(logits + loss.offsets[strata], held_out).mean(),
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
    for name in ("groupDRO", "IRM", "Backdoor"):
        arguments = [f"--trainer={name}", f"--seed={seed}", "--repetitions=1"]
        ((data, plain, _, training, held_out),) = experiment(arguments)
        options = arguments_of(train, parse_arguments("", arguments))
        for layer in plain.phi:
            if isinstance(layer, nn.Linear):
                layer.register_forward_hook(CoarseDevices.read)
        with (
            mock.patch.multiple(CoarseDevices, **dict(knobs)),
            mock.patch("memristor.StuckDevices", CoarseDevices),
        ):
            hardened = harden(plain, training, **options)
        digits = concatenate([held_out, held_out.recolored()])
        decisions = predict(plain, digits) > 0
        images = calibration_images(training)
        for defects in BROKEN:
            # robustness.py's patterns are others.
            crossbar = to_crossbar(hardened, images, **defects, fault_seed=1000 + seed)
            others = (predict(crossbar, digits) > 0) != decisions
            criteria.append(others.double().mean().item())
            accuracies.append(evaluate(crossbar, data.test)["Accuracy"])
    return fmean(criteria), fmean(accuracies)


class Search:
    """The settings tried for one trainer, and what they gave, seed by seed."""

    def __init__(self, name: str, scheduler: str | None):
        self.name, self.space = name, SPACES[name]
        self.default = self.space.of(*self.space.arguments)
        self.results = {}  # setting → (criterion, test accuracy) of each seed
        tried = {self.space.plain, *self.space.neighbours(self.default)}
        jobs = {}
        for setting, seed in itertools.product(sorted(tried), range(self.space.seeds)):
            knobs = tuple(zip(self.space.knobs, setting, strict=True))
            jobs[self.space.arguments, knobs, self.space.criterion, seed] = setting
        function = harden_and_measure if name == "hardening" else train_and_measure
        found = dict(run_jobs(function, list(jobs), scheduler))
        for job, setting in jobs.items():
            self.results.setdefault(setting, []).append(found[job])

    def criterion(self, setting: Setting) -> tuple[float, float]:
        """Its mean and standard error."""
        return mean_and_error([criterion for criterion, _ in self.results[setting]])

    def accuracy(self, setting: Setting) -> tuple[float, float]:
        """That in the test environment in %, its mean and standard error."""
        return mean_and_error([100 * accuracy for _, accuracy in self.results[setting]])

    def difference(self, setting: Setting) -> tuple[float, float]:
        """By how much its criterion is above the default's on the same seed: mean and error."""
        pairs = zip(self.results[setting], self.results[self.default], strict=True)
        return mean_and_error([its[0] - defaults[0] for its, defaults in pairs])

    @property
    def ranking(self) -> list[Setting]:
        return sorted(self.results, key=self.criterion)

    @property
    def chosen(self) -> Setting:
        """The best of those that are clearly better than the default, or else the default."""
        for setting in self.ranking:
            difference, error = self.difference(setting)
            if difference < -CLEARLY * error:
                return setting
        return self.default

    def describe(self, setting: Setting) -> str:
        """In which knobs it differs from the default, and what else it is."""
        pairs = zip(self.space.knobs, setting, self.default, strict=True)
        words = [f"{knob} {value}" for knob, value, default in pairs if value != default]
        names = {"the default": self.default, "plain": self.space.plain, "chosen": self.chosen}
        words += [f"**{name}**" for name, other in names.items() if setting == other]
        return ", ".join(words)


def mean_and_error(values: list[float]) -> tuple[float, float]:
    return fmean(values), stdev(values) / math.sqrt(len(values))


def print_table(search: Search) -> None:
    """The settings ranked by the criterion; the last column is the test environment's."""
    print(f"\n### {search.name}\n")
    print(f"| | differs by | held-out {search.space.criterion} | above the default's | test, % |")
    print("| --- | --- | --- | --- | --- |")
    for rank, setting in enumerate(search.ranking, 1):
        criterion = "{:.4f} ± {:.4f}".format(*search.criterion(setting))
        accuracy = "{:.2f} ± {:.2f}".format(*search.accuracy(setting))
        difference = "{:+.4f} ± {:.4f}".format(*search.difference(setting))
        print(
            f"| {rank} | {search.describe(setting)} | {criterion} | {difference} | {accuracy} |",
            flush=True,
        )


def draw(searches: list[Search], path: str) -> None:
    """Criterion against test accuracy, a panel a trainer, a point a setting."""
    columns = min(3, len(searches))
    rows = math.ceil(len(searches) / columns)
    figure = Figure(figsize=(3.6 * columns, 3.2 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, search in zip(panels, searches, strict=False):
        for settings, style in (
            (search.ranking, {"color": "tab:gray", "s": 12, "label": "settings tried"}),
            ([search.space.plain], {"color": "tab:blue", "marker": "s", "label": "plain"}),
            ([search.default], {"color": "tab:orange", "marker": "D", "label": "the default"}),
            ([search.chosen], {"color": "tab:red", "marker": "*", "s": 90, "label": "chosen"}),
        ):
            criteria = [search.criterion(setting)[0] for setting in settings]
            axes.scatter(criteria, [search.accuracy(setting)[0] for setting in settings], **style)
        axes.set_title(search.name, fontsize=10)
        axes.locator_params(axis="x", nbins=4)
        axes.set_xlabel(f"held-out {search.space.criterion}", fontsize=9)
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
    add_scheduler_flag(parser)
    parser.add_argument("--figure", default=str(ROOT / "figures" / "selection.png"))
    args = parser.parse_args()
    searches = []
    for name in args.trainers:
        searches.append(Search(name, args.scheduler))
        print_table(searches[-1])
    draw(searches, args.figure)


if __name__ == "__main__":
    run_command(main)
