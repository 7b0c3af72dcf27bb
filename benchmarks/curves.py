"""Accuracy of every trainer over the iterations, in the three environments.

python benchmarks/curves.py

One repetition of each with default hyperparameters; the weights are those of the moment, not
averaged. In train1 and train2, held-out digits are tested. Draws figures/curves.png.
"""

import argparse
from pathlib import Path

import torch
from jobs import ROOT, add_scheduler_flag, fresh_data, refuse_flags, run_jobs, save_figure
from matplotlib.figure import Figure

from preprocessing import ENVIRONMENTS, number, refuse, run_command
from register import TRAINERS
from trainer import arguments_of, build, evaluate, parse_arguments, train


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


def curves(trainer: str, every: int, options: tuple[str, ...]) -> list[list[float]]:
    """Points of [iteration, accuracy in train1, in train2 and in test, in %]."""
    args = parse_arguments("", ["--trainer", trainer, *options])
    args.average_last, args.evaluation_steps = 0.0, args.iteration
    data, points = fresh_data(args), []
    torch.manual_seed(1000 * args.seed)
    training, held_out = data.hold_out(args.validation)
    environments = [held_out[held_out.envs == env] for env in (0, 1)] + [data.test]
    network, loss = build(args)

    def note() -> None:
        accuracies = [100 * evaluate(network, digits)["Accuracy"] for digits in environments]
        points.append([every * len(points), *accuracies])
        network.train()

    train(network, Watched(loss, every, note), training, None, **arguments_of(train, args))
    note()
    points[-1][0] = args.iteration
    return points


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    every = "iterations between two points (default: 10)"
    parser.add_argument("--every", type=number(int, 1), default=10, help=every)
    parser.add_argument("--figure", type=Path, default=ROOT / "figures" / "curves.png")
    add_scheduler_flag(parser)
    args, options = parser.parse_known_args()
    # What can't be run is refused before anything is.
    refuse(not parse_arguments("", options).validation, "the curves need held-out digits")
    refuse_flags(options, "trainer", "dataset_path")
    jobs = [(trainer, args.every, tuple(options)) for trainer in TRAINERS]
    results = dict(run_jobs(curves, jobs, args.scheduler))

    figure = Figure(figsize=(10, 3), layout="constrained")
    axes = figure.subplots(1, len(jobs), sharey=True)
    for axis, job in zip(axes, jobs, strict=True):
        iterations, *accuracies = zip(*results[job], strict=True)
        for name, values, style in zip(ENVIRONMENTS, accuracies, ("--", ":", "-"), strict=True):
            axis.plot(iterations, values, style, label=name)
        axis.axhline(50, color="gray", linewidth=0.5)
        axis.set_title(job[0])
        axis.set_xlabel("iteration")
        last = (
            f"{e} {values[-1]:.1f} %" for e, values in zip(ENVIRONMENTS, accuracies, strict=True)
        )
        print(f"{job[0]}, iteration {iterations[-1]}: {', '.join(last)}")
    axes[0].set_ylabel("accuracy, %")
    axes[0].legend(loc="lower right")
    save_figure(figure, args.figure)


if __name__ == "__main__":
    run_command(main)
