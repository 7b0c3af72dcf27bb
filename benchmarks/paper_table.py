"""Table 1 of Arjovsky et al. 2019 (arXiv:1907.02893), by the paper's protocol, in Markdown.

python benchmarks/paper_table.py --draws 10

The paper's environments are of shuffled digits (p_f 0.25; p_e 0.2, 0.1 and 0.9), and it trains on
all 50,000 training digits in each step, with an annealed penalty. Its hyperparameters of IRM and of
grayscale were chosen with the help of the test accuracy, as its code says. The table has its
numbers and those here: test accuracy, mean ± population standard deviation over draws. Seconds are
those that a training takes of one core, or of the GPU.
"""

import tempfile
import time
from pathlib import Path
from statistics import fmean, pstdev
from typing import NamedTuple

import torch
from jobs import Table, commit, run_jobs, script_parser
from torch import Tensor, nn
from torch.nn import functional as F

from dataset import Batch, Samples, load_dataset
from metric import metrics
from model import ERM, IRM, Network
from preprocessing import UserError, draw_environments, number, run_command

DRAWING = {
    "p_f": 0.25,
    "p_e": (0.2, 0.1, 0.9),
    "sizes": (25000, 25000, 10000),
    "shuffle_digits": True,
}
CHUNK = 500  # images passed through the network at a time: a layer's output then fits the cache


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
PUBLISHED = {"IRM": "66.9 ± 2.5", "ERM": "17.1 ± 0.6", "grayscale": "73.0 ± 0.4"}
COLUMNS = {"row": str, "device": str, "steps": int, "draw": int, "accuracy": float}
COLUMNS |= {"seconds": float, "commit": str}


class Pixels(NamedTuple):
    """Images as `PaperNetwork` takes them."""

    values: Tensor  # (N, pixels), value / 255
    channels: Tensor  # (N,) int64: the only one where an image has something


class PaperNetwork(Network):
    """The paper's network. A first layer's products with the empty channel are left out.

    Args:
        pixels: of each channel
        channels: two, or one where the colours are hidden
        hidden_dim: units of both hidden layers
    """

    def __init__(self, pixels: int, channels: int, hidden_dim: int):
        layers = [
            nn.Linear(channels * pixels, hidden_dim),
            nn.ReLU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.ReLU(),
            nn.Linear(hidden_dim, 1),
        ]
        for layer in layers[::2]:
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        super().__init__(nn.Sequential(*layers))
        self.pixels = pixels

    def forward(self, images: Pixels) -> Tensor:
        """Images that are sorted by channel → logits (N,)."""
        first = self.phi[0]
        logits = []
        for channel, weight in enumerate(first.weight.split(self.pixels, 1)):
            for chunk in images.values[images.channels == channel].split(CHUNK):
                logits.append(self.phi[1:](F.linear(chunk, weight, first.bias)))
        return self.output_layer * torch.cat(logits).squeeze(-1)


def paper_batch(samples: Samples, grayscale: bool) -> Batch:
    """All samples as the paper's networks see them: every other row and column, value / 255."""
    samples = samples[samples.colors.argsort(stable=True, descending=True)]  # red first
    values = samples.images.amax(1)[:, ::2, ::2].flatten(1) / 255
    channels = torch.zeros_like(samples.colors) if grayscale else 1 - samples.colors
    return Batch(Pixels(values, channels), samples.labels, samples.colors, samples.envs)


def paper_training(protocol: Protocol, training: Batch, seed: int) -> PaperNetwork:
    """A network that is trained by the paper's protocol on all samples in each step."""
    torch.manual_seed(seed)
    pixels = training.images.values.shape[1]
    network = PaperNetwork(pixels, 1 if protocol.grayscale else 2, protocol.hidden_dim)
    network.to(training.labels.device)
    loss = IRM(1.0) if protocol.loss == "IRM" else ERM()
    optimizer = torch.optim.Adam(
        network.phi.parameters(), lr=protocol.learning_rate, weight_decay=protocol.weight_decay
    )
    divisor = 1.0
    for step in range(protocol.steps):
        if step == ANNEALED and isinstance(loss, IRM):
            loss.reg_lambda = divisor = REG_LAMBDA
            optimizer.param_groups[0]["weight_decay"] = protocol.weight_decay / divisor
        objective = loss(network, training) / divisor
        network.zero_grad()
        objective.backward()
        optimizer.step()
    return network


def paper_accuracy(protocol: tuple, draw: int, device: str) -> tuple[float, float]:
    """Test accuracy, %, of one training by a `Protocol` on one draw, and its seconds."""
    protocol = Protocol(*protocol)
    with tempfile.TemporaryDirectory() as folder:
        draw_environments(Path(folder), seed=draw, **DRAWING)
        data = load_dataset(folder, device=device)
    start = time.process_time()
    network = paper_training(protocol, paper_batch(data.training, protocol.grayscale), draw)
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.process_time() - start
    test = paper_batch(data.test, protocol.grayscale)
    with torch.no_grad():
        return 100 * metrics(network(test.images), test.labels)["Accuracy"], seconds


def report(rows: list[dict]) -> None:
    """Print the table, of what there is."""
    print("| | the paper, % | here, % | draws | seconds a training |")
    print("| --- " * 5 + "|")
    for name in PROTOCOLS:
        found = [row for row in rows if row["row"] == name]
        if found:
            values = [row["accuracy"] for row in found]
            seconds = fmean(row["seconds"] for row in found)
            ours = f"{fmean(values):.1f} ± {pstdev(values):.1f}"
            print(f"| {name} | {PUBLISHED[name]} | {ours} | {len(found)} | {seconds:.0f} |")


def main() -> None:
    parser = script_parser(__doc__, table="paper_table.csv")
    add, names = parser.add_argument, list(PROTOCOLS)
    add("--rows", nargs="+", choices=names, default=names, help="default: all")
    draws = "draws of the environments, each with one training (default: 10)"
    add("--draws", type=number(int, 1), default=10, help=draws)
    steps = "train for so many steps at most: for a trial (default: the paper's, 501 and 101)"
    add("--steps", type=number(int, 1), default=501, help=steps)
    add("--cuda", action="store_true", help="train on the GPU, which takes seconds, not minutes")
    args = parser.parse_args()
    if args.cuda and not torch.cuda.is_available():
        raise UserError("--cuda: there is no GPU that torch can use")
    device = "cuda" if args.cuda else "cpu"
    table = Table(args.table, COLUMNS, args.resume)
    known = {(row["row"], row["device"], row["steps"], row["draw"]) for row in table.rows}
    jobs = {}
    for draw in range(args.draws):
        for name in args.rows:
            steps = min(args.steps, PROTOCOLS[name].steps)
            if (name, device, steps, draw) not in known:
                protocol = PROTOCOLS[name]._replace(steps=steps)
                jobs[tuple(protocol), draw, device] = name, device, steps, draw
    table.expect(len(table.rows) + len(jobs))
    of_commit = commit()
    for job, result in run_jobs(paper_accuracy, list(jobs), args.scheduler):
        table.add([dict(zip(COLUMNS, (*jobs[job], *result, of_commit), strict=True))])
    print(f"Table: {args.table}\n")
    rows = [row for row in table.rows if row["device"] == device]
    report([r for r in rows if r["steps"] == min(args.steps, PROTOCOLS[r["row"]].steps)])


if __name__ == "__main__":
    run_command(main)
