"""Accuracy of every trainer over the iterations, in the three environments.

python benchmarks/curves.py

The script trains the first repetition of each trainer. In train1 and train2, it tests the
validation samples. It also accepts the flags of exp-mnist.py.
"""

from jobs import (
    fresh_data,
    print_table,
    run_jobs,
    save_figure,
    script_parser,
    training_arguments,
    watch_training,
)
from matplotlib.figure import Figure

from dataset import Samples
from model import Network
from preprocessing import ENVIRONMENTS, UserError, number, run_command
from register import TRAINERS
from trainer import evaluate


def curve(trainer: str, seed: int, every: int, flags: str) -> list[tuple[float, ...]]:
    """Train once. Return points (iteration, accuracy in train1, in train2, in test), in %."""
    args = training_arguments(f"{trainer} {flags}")
    args.seed, args.evaluation_steps = seed, every
    data, points = fresh_data(seed), []

    def watch(network: Network, validation: Samples, iteration: int) -> None:
        parts = [validation[validation.envs == env] for env in (0, 1)]
        accuracies = [100 * evaluate(network, part)["Accuracy"] for part in (*parts, data.test)]
        points.append((iteration, *accuracies))

    watch_training(args, data, 1, watch)
    return points


def draw(curves: dict[str, list[tuple[float, ...]]]) -> Figure:
    """Draw a panel for each trainer, with a line for each environment."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    figure.suptitle(
        "Accuracy in each environment over the iterations of one training "
        "(train1, train2: validation samples)",
        fontsize=10,
    )
    axes = figure.subplots(1, len(curves), sharey=True)
    for axis, (trainer, points) in zip(axes, curves.items(), strict=True):
        iterations, *accuracies = zip(*points, strict=True)
        for name, values, style in zip(ENVIRONMENTS, accuracies, ("--", ":", "-"), strict=True):
            axis.plot(iterations, values, style, label=name)
        axis.axhline(50, color="gray", linewidth=0.5, label="50 %: chance")
        axis.set_title(trainer)
        axis.set_xlabel("iteration")
    axes[0].set_ylabel("accuracy, %")
    axes[-1].legend(loc="lower right", fontsize=8)
    return figure


def main() -> None:
    parser = script_parser(__doc__, "curves.png")
    add = parser.add_argument
    add("--seed", type=number(int, 0), default=1234, help="random seed (default: 1234)")
    add(
        "--every",
        type=number(int, 1),
        default=10,
        help="iterations between two points (default: 10)",
    )
    args, words = parser.parse_known_args()
    flags = " ".join(words)
    for trainer in TRAINERS:
        if training_arguments(f"{trainer} {flags}").validation == 0:
            raise UserError("The curves need validation samples. Leave out --validation 0.")
    jobs = {trainer: (trainer, args.seed, args.every, flags) for trainer in TRAINERS}
    finished = dict(run_jobs(curve, jobs, args.scheduler))
    curves = {trainer: finished[trainer] for trainer in jobs}
    print_table(
        ["trainer", "iterations", *(f"{name}, %" for name in ENVIRONMENTS)],
        [
            [trainer, points[-1][0], *(f"{value:.1f}" for value in points[-1][1:])]
            for trainer, points in curves.items()
        ],
    )
    save_figure(draw(curves), args.figure)


if __name__ == "__main__":
    run_command(main)
