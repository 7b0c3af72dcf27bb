"""Table 1 of Arjovsky et al. 2019 (arXiv:1907.02893), by the paper's protocol, in Markdown.

python benchmarks/paper_table.py

The environments have shuffled digits, p_f 0.25 and p_e 0.2, 0.1 and 0.9. Each step trains on all
50,000 training digits, in float32, with an annealed penalty. According to the paper's code, the
hyperparameters of IRM and of grayscale were chosen by test accuracy. The data are generated anew in
each draw. The table has the mean and the population standard deviation of the test accuracy over
the draws. Seconds are the CPU seconds of one training.
"""

import time
from statistics import fmean, pstdev
from typing import NamedTuple

import torch
from jobs import Table, fresh_data, print_table, script_parser, select
from torch import nn

from dataset import Batch, Samples
from metric import metrics
from model import ERM, IRM, Network
from preprocessing import UserError, number, run_command

GENERATION = {
    "p_f": 0.25,
    "p_e": (0.2, 0.1, 0.9),
    "sizes": (25000, 25000, 10000),
    "shuffle_digits": True,
}


class Protocol(NamedTuple):
    """Hyperparameters of the paper's code, code/colored_mnist/reproduce_paper_results.sh."""

    loss: str
    hidden_dim: int
    learning_rate: float
    weight_decay: float  # of Adam: twice the code's `l2_regularizer_weight`
    steps: int = 501
    grayscale: bool = False


PROTOCOLS = {
    "IRM": Protocol("IRM", 390, 4.9e-4, 0.0022),
    "ERM": Protocol("ERM", 256, 1e-3, 0.002),
    "grayscale": Protocol("ERM", 83, 2.8e-3, 0.00172, steps=101, grayscale=True),
}
# At step ANNEALED, the weight of IRM's penalty rises from 1 to REG_LAMBDA. From then on the whole
# objective, with its weight decay, is divided by REG_LAMBDA.
ANNEALED, REG_LAMBDA = 190, 91257.0
PUBLISHED = {"IRM": "66.9 ± 2.5", "ERM": "17.1 ± 0.6", "grayscale": "73.0 ± 0.4"}
COLUMNS = {"row": str, "device": str, "draw": int, "accuracy": float, "seconds": float}


class PaperNetwork(Network):
    """The paper's network, for images (N, 2, 14, 14).

    Args:
        hidden_dim: units of both hidden layers
        grayscale: hide the colours
    """

    def __init__(self, hidden_dim: int, grayscale: bool):
        layers = [
            nn.Flatten(),
            nn.Linear(14 * 14 if grayscale else 2 * 14 * 14, hidden_dim),
            nn.ReLU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.ReLU(),
            nn.Linear(hidden_dim, 1),
        ]
        for layer in layers[1::2]:
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        super().__init__(nn.Sequential(*layers), grayscale)


def paper_batch(samples: Samples) -> Batch:
    """Return all samples as one batch: every other row and column of the images, value / 255."""
    images = samples.images[:, :, ::2, ::2].float() / 255
    return Batch(images, samples.labels, samples.colors, samples.envs)


def paper_training(protocol: Protocol, training: Batch, seed: int) -> PaperNetwork:
    """Train a network by the paper's protocol, on all samples in each step."""
    torch.manual_seed(seed)
    network = PaperNetwork(protocol.hidden_dim, protocol.grayscale).to(training.labels.device)
    loss = IRM(1.0) if protocol.loss == "IRM" else ERM()
    optimizer = torch.optim.Adam(
        network.phi.parameters(), lr=protocol.learning_rate, weight_decay=protocol.weight_decay
    )
    divisor = 1.0
    for step in range(protocol.steps):
        if step == ANNEALED and protocol.loss == "IRM":
            loss.reg_lambda = divisor = REG_LAMBDA
            optimizer.param_groups[0]["weight_decay"] = protocol.weight_decay / divisor
        objective = loss(network, training) / divisor
        network.zero_grad()
        objective.backward()
        optimizer.step()
    return network


def measure(name: str, device: str, draw: int) -> list[tuple[float, float]]:
    """Train once. Return one row: the test accuracy, in %, and the seconds of the training."""
    data = fresh_data(draw, **GENERATION).to(device)
    start = time.process_time()
    network = paper_training(PROTOCOLS[name], paper_batch(data.training), draw)
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.process_time() - start
    test = paper_batch(data.test)
    with torch.no_grad():
        return [(100 * metrics(network(test.images), test.labels)["Accuracy"], seconds)]


def report(rows: list[dict]) -> None:
    """Print the paper's results beside the results in `rows`."""
    lines = []
    for name in PROTOCOLS:
        trainings = select(rows, row=name)
        if trainings:
            values = [row["accuracy"] for row in trainings]
            result = f"{fmean(values):.1f} ± {pstdev(values):.1f}"
            seconds = f"{fmean(row['seconds'] for row in trainings):.0f}"
            lines.append([name, PUBLISHED[name], result, len(values), seconds])
    print_table(["", "the paper, %", "here, %", "draws", "seconds of a training"], lines)


def main() -> None:
    parser = script_parser(__doc__, table="paper_table.csv")
    add, names = parser.add_argument, list(PROTOCOLS)
    add("--rows", nargs="+", choices=names, default=names, help="rows of the table (default: all)")
    add("--draws", type=number(int, 1), default=10, help="generated data sets (default: 10)")
    add("--cuda", action="store_true", help="train on the GPU")
    args = parser.parse_args()
    if args.cuda and not torch.cuda.is_available():
        raise UserError("torch finds no GPU. Leave out --cuda.")
    device = "cuda" if args.cuda else "cpu"
    table = Table(args.table, COLUMNS, args.resume)
    jobs = [(name, device, draw) for draw in range(args.draws) for name in args.rows]
    table.fill(measure, {job: job for job in jobs}, args.scheduler)
    print(f"Table: {args.table}\n")
    report(select(table.rows, device=device))


if __name__ == "__main__":
    run_command(main)
