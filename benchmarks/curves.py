"""Accuracy of every trainer over the iterations, in the three environments.

    python benchmarks/curves.py

One repetition of each with default hyperparameters; the weights are those of the moment, not
averaged. Draws figures/curves.png.
"""

import argparse
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from dataset import Split  # noqa: E402
from model import MLP  # noqa: E402
from preprocessing import ENVIRONMENTS, load_dataset, run, save_figure  # noqa: E402
from register import TRAINERS  # noqa: E402
from trainer import (  # noqa: E402
    Run,
    call,
    evaluate,
    parse_arguments,
    train,
    training_parser,
)


class Watched:
    """A loss that, every so many calls, first notes the network's accuracies."""

    def __init__(self, loss, every: int, note):
        self.loss, self.every, self.note, self.calls = loss, every, note, 0

    def __getattr__(self, name: str):
        return getattr(self.loss, name)

    def __call__(self, logits, batch):
        if self.calls % self.every == 0:
            self.note()
        self.calls += 1
        return self.loss(logits, batch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--every", type=int, default=10, help="iterations between two points")
    parser.add_argument("--figure", default=str(ROOT / "figures" / "curves.png"))
    args = parser.parse_args()
    data = load_dataset(ROOT / "data", seed=args.seed)
    cpu = torch.device("cpu")
    everything, test = Split(data.train, cpu), Split(data.test, cpu)
    kept, held_out = everything.hold_out(0.2, torch.Generator().manual_seed(1000 * args.seed))
    environments = everything.envs[held_out.index]
    splits = [held_out.part((environments == e).nonzero()[:, 0]) for e in (0, 1)] + [test]
    splits = [split.by_color() for split in splits]

    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3), layout="constrained")
    axes = figure.subplots(1, len(TRAINERS), sharey=True)
    for axis, name in zip(axes, TRAINERS, strict=True):
        curves = []
        torch.manual_seed(1000 * args.seed)
        options = parse_arguments(training_parser(""), ["--trainer", name])
        network = MLP()
        network.scale_first_layer(options.init_scale)

        def note(network=network, curves=curves):
            curves.append([100 * evaluate(network, split)["Accuracy"] for split in splits])
            network.train()

        loss = Watched(call(TRAINERS[name], options=vars(options)), args.every, note)
        generator = torch.Generator().manual_seed(1000 * args.seed)
        settings = vars(options) | {"average_last": 0, "evaluation_steps": 10**9}
        call(train, [Run(1, network, kept, None, generator)], loss, options=settings)
        iterations = [args.every * step for step in range(len(curves))]
        styles = zip(ENVIRONMENTS, zip(*curves, strict=True), ("--", ":", "-"), strict=True)
        for environment, accuracies, style in styles:
            axis.plot(iterations, accuracies, style, label=environment)
        axis.axhline(50, color="gray", linewidth=0.5)
        axis.set_title(name)
        axis.set_xlabel("iteration")
        print(
            f"{name}: "
            + ", ".join(f"{e} {a:.1f} %" for e, a in zip(ENVIRONMENTS, curves[-1], strict=True))
        )
    axes[0].set_ylabel("accuracy, %")
    axes[0].legend(loc="lower right")
    save_figure(figure, args.figure)


if __name__ == "__main__":
    run(main)
