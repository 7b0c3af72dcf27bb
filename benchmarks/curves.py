"""Accuracy of every trainer over the iterations, in the three environments.

python benchmarks/curves.py

The first repetition of each; the weights are those of the moment. In train1 and train2 the samples
that were held out are tested. More flags are passed on to exp-mnist.py.
"""

from jobs import (
    check_writable,
    fresh_data,
    run_jobs,
    save_figure,
    script_parser,
    training_flags,
)
from matplotlib.figure import Figure

from preprocessing import ENVIRONMENTS, UserError, number, run_command
from register import TRAINERS
from trainer import (
    Watched,
    evaluate,
    repetitions,
    train,
    training_parser,
    training_settings,
)


def curves(trainer: str, every: int, options: tuple[str, ...]) -> list[list[float]]:
    """Points of [iteration, accuracy in train1, in train2 and in test, in %]."""
    args = training_parser().parse_args(["--trainer", trainer, *options])
    args.evaluation_steps = args.iteration + 1  # no figures for a log that nobody reads
    data, points = fresh_data(args.seed), []
    _, network, loss, training, held_out = next(repetitions(args, data))
    tested = [held_out[held_out.envs == 0], held_out[held_out.envs == 1], data.test]
    if not all(map(len, tested)):
        raise UserError("no samples of an environment are held out: raise --validation")

    def note(iteration: int) -> None:
        accuracies = [100 * evaluate(network, samples)["Accuracy"] for samples in tested]
        points.append([iteration, *accuracies])

    train(network, Watched(loss, every, note), training, **training_settings(args))
    note(args.iteration)
    return points


def draw(results: dict[str, list[list[float]]]) -> Figure:
    """A panel for each trainer; in each a line for each environment."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    figure.suptitle(
        "Accuracy in each environment after so many iterations of one training "
        "(train1, train2: on the samples that were held out)",
        fontsize=10,
    )
    axes = figure.subplots(1, len(results), sharey=True)
    for axis, (trainer, points) in zip(axes, results.items(), strict=True):
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
    every = "iterations between two points (default: 10)"
    parser.add_argument("--every", type=number(int, 1), default=10, help=every)
    args, options = parser.parse_known_args()
    ours = ("trainer", "dataset_path", "repetitions", "save_model")
    training = training_flags(options, *ours)
    if training.validation == 0:
        raise UserError("--validation 0: the curves need samples that are held out")
    check_writable(args.figure)
    jobs = [(trainer, args.every, tuple(options)) for trainer in TRAINERS]
    finished = dict(run_jobs(curves, jobs, args.scheduler))
    results = {job[0]: finished[job] for job in jobs}
    print(f"| after the last iteration | {', % | '.join(ENVIRONMENTS)}, % |\n" + "| --- " * 4 + "|")
    for trainer, points in results.items():
        _, *last = points[-1]
        print(f"| {trainer} | {' | '.join(f'{value:.1f}' for value in last)} |")
    save_figure(draw(results), args.figure)


if __name__ == "__main__":
    run_command(main)
