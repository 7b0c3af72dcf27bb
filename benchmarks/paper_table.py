"""Table 1 of Arjovsky et al. 2019 (arXiv:1907.02893), in Markdown.

python benchmarks/paper_table.py --draws 10

The paper's environments are of shuffled digits (p_f 0.25; p_e 0.2, 0.1 and 0.9), and it trains on
all 50,000 training digits in each step, with an annealed penalty. Its hyperparameters of IRM and of
grayscale were chosen with the help of the test accuracy, as its code says. The table has its
numbers, its protocol's (here with products of bfloat16) and the assignment's on the same draws:
test accuracy, mean ± standard deviation over draws. A draw takes minutes on one core.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, pstdev
from typing import NamedTuple

import torch
from jobs import add_scheduler_flag, experiment, run_jobs
from torch import nn

from dataset import Batch, Digits, load_dataset
from metric import metrics
from model import ERM, IRM, Network
from preprocessing import draw_environments, number, run_command
from trainer import evaluate

DRAWING = {
    "p_f": 0.25,
    "p_e": (0.2, 0.1, 0.9),
    "sizes": (25000, 25000, 10000),
    "shuffle_digits": True,
}
CHUNK = 2500  # images passed through the network at a time: a layer's output then fits the cache


class Protocol(NamedTuple):
    """The hyperparameters of the paper's code, `code/colored_mnist/reproduce_paper_results.sh`."""

    loss: str
    hidden_dim: int
    learning_rate: float
    weight_decay: float  # Adam's: twice the code's `l2_regularizer_weight`
    steps: int = 501
    grayscale: bool = False


PROTOCOLS = {
    "IRM": Protocol("IRM", 390, 4.9e-4, 0.0022),
    "ERM": Protocol("ERM", 256, 1e-3, 0.002),
    "grayscale": Protocol("ERM", 83, 2.8e-3, 0.00172, steps=101, grayscale=True),
}
# From this step on the weight of IRM's penalty is as high as this, and the objective, weight decay
# included, is divided by it; until then the weight is 1.
ANNEALED, REG_LAMBDA = 190, 91257.0
ASSIGNMENT = {
    "IRM": ("--trainer", "IRM"),
    "ERM": ("--trainer", "ERM"),
    "grayscale": ("--trainer", "ERM", "--grayscale"),
    "groupDRO": ("--trainer", "groupDRO"),
    "Backdoor": ("--trainer", "Backdoor"),
}
PUBLISHED = {"IRM": "66.9 ± 2.5", "ERM": "17.1 ± 0.6", "grayscale": "73.0 ± 0.4"}


def assignment_accuracy(arguments: tuple[str, ...], draw: int) -> float:
    """Test accuracy, %, of one training by the assignment's protocol on one draw of the data."""
    arguments = [*arguments, "--repetitions", "1", "--seed", str(draw)]
    ((data, network, *_),) = experiment(arguments, DRAWING)
    return 100 * evaluate(network, data.test)["Accuracy"]


def paper_accuracy(
    loss: str,
    hidden_dim: int,
    learning_rate: float,
    weight_decay: float,
    steps: int,
    grayscale: bool,
    draw: int,
) -> float:
    """The same by the paper's protocol."""
    with tempfile.TemporaryDirectory() as folder:
        draw_environments(Path(folder), seed=draw, **DRAWING)
        data = load_dataset(folder, grayscale=grayscale)
    training, test = (raw_pixels(digits) for digits in (data.training, data.test))
    torch.manual_seed(draw)
    network = Network(
        nn.Sequential(
            nn.Linear(training.images.shape[1], hidden_dim),
            nn.ReLU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.ReLU(),
            nn.Linear(hidden_dim, 1),
        )
    )
    loss = IRM(1.0) if loss == "IRM" else ERM()
    optimizer = torch.optim.Adam(network.parameters(), learning_rate, weight_decay=weight_decay)
    divisor = 1.0
    for step in range(steps):
        if step == ANNEALED and isinstance(loss, IRM):
            loss.reg_lambda = divisor = REG_LAMBDA
            optimizer.param_groups[0]["weight_decay"] = weight_decay / divisor
        torch.set_float32_matmul_precision("medium")
        logits = torch.cat([network(images) for images in training.images.split(CHUNK)])
        optimizer.zero_grad()
        (loss(logits, training) / divisor).backward()
        torch.set_float32_matmul_precision("highest")
        optimizer.step()
    with torch.no_grad():
        return 100 * metrics(network(test.images), test.labels)["Accuracy"]


def raw_pixels(digits: Digits) -> Batch:
    """All digits as the paper's networks see them: every other row and column, value / 255."""
    images = digits.images[:, :, ::2, ::2].flatten(1) / 255
    return Batch(images, digits.labels, digits.colors, digits.envs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    rows = [*PROTOCOLS, "assignment"]
    which = "rows of the paper's protocol, and the assignment's protocol"
    parser.add_argument("--rows", nargs="+", choices=rows, default=rows, help=which)
    draws = "draws of the environments, each with one training a number"
    parser.add_argument("--draws", type=number(int, 1), default=10, help=draws)
    add_scheduler_flag(parser)
    args = parser.parse_args()
    draws = range(args.draws)
    paper = {row: protocol for row, protocol in PROTOCOLS.items() if row in args.rows}
    assignment = ASSIGNMENT if "assignment" in args.rows else {}
    jobs = {(*protocol, draw): row for row, protocol in paper.items() for draw in draws}
    by_paper = collect(paper_accuracy, jobs, args.scheduler)
    jobs = {(arguments, draw): row for row, arguments in assignment.items() for draw in draws}
    by_assignment = collect(assignment_accuracy, jobs, args.scheduler)
    print("| test accuracy, % | the paper | here, its protocol | here, the assignment's |")
    print("| --- | --- | --- | --- |")
    for row in ASSIGNMENT:
        found = [by_paper.get(row), by_assignment.get(row)]
        if any(found):
            texts = [f"{fmean(each):.1f} ± {pstdev(each):.1f}" if each else "–" for each in found]
            print(f"| {row} | {PUBLISHED.get(row, '–')} | {' | '.join(texts)} |")


def collect(
    function: Callable, rows: dict[tuple, str], scheduler: str | None
) -> dict[str, list[float]]:
    """Do the jobs, which are the keys of `rows`; the results of each row."""
    results = {}
    for job, result in run_jobs(function, list(rows), scheduler):
        results.setdefault(rows[job], []).append(result)
    return results


if __name__ == "__main__":
    run_command(main)
