"""The distribution of test accuracy over student numbers, for the two graded trainers.

    python benchmarks/student_numbers.py --numbers 100

Each number is a fresh clone: its own draw of the data, then what `exp-mnist.py --seed NUMBER` does
with default hyperparameters, on the CPU. Draws figures/student_numbers.png.
"""

import argparse
import contextlib
import io
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
from pathlib import Path

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from preprocessing import save_figure  # noqa: E402
from trainer import parse_arguments, repetitions, training_parser  # noqa: E402

GRADED = ("groupDRO", "IRM")


def accuracies(job: tuple[int, str, list[str]]) -> tuple[str, int, list[float]]:
    """Test accuracy of each repetition for one student number and trainer."""
    number, name, options = job
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        arguments = ["--seed", str(number), "--trainer", name, "--dataset_path", folder]
        arguments += ["--no_cuda", "--evaluation_steps", "1000", *options]
        args = parse_arguments(training_parser(""), arguments)
        return name, number, [done.result["Accuracy"] for done in repetitions(args)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--numbers", type=int, default=100, help="how many student numbers")
    parser.add_argument("--figure", default=str(ROOT / "figures" / "student_numbers.png"))
    args, options = parser.parse_known_args()
    numbers = random.Random(0).sample(range(10000), args.numbers)
    jobs = [(number, name, options) for number in numbers for name in GRADED]
    means = {name: {} for name in GRADED}
    singles = {name: [] for name in GRADED}
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        done = pool.imap_unordered(accuracies, jobs)
        for name, number, values in tqdm(done, total=len(jobs), disable=None):
            means[name][number] = statistics.fmean(values)
            singles[name] += values

    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axes = figure.subplots()
    for name, color in zip(GRADED, ("tab:green", "tab:purple"), strict=True):
        values = 100 * torch.tensor(list(means[name].values()))
        print(
            f"{name}: {len(values)} student numbers, mean {values.mean():.2f} %, spread (standard "
            f"deviation) {values.std(correction=0):.2f}, worst {values.min():.2f} (number "
            f"{min(means[name], key=means[name].get):04d}), best {values.max():.2f}; worst single "
            f"repetition {100 * min(singles[name]):.2f}"
        )
        axes.hist(values, bins=torch.arange(58, 76, 0.25), color=color, alpha=0.6, label=name)
    axes.axvline(60, color="black", linestyle="--")
    axes.text(60.1, axes.get_ylim()[1] * 0.9, "15 points from here")
    axes.set_xlabel("test accuracy, mean of three repetitions, %")
    axes.set_ylabel("student numbers")
    axes.legend()
    save_figure(figure, args.figure)


if __name__ == "__main__":
    main()
