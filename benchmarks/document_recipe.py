"""The training recipe in the course project's document, on the course project's data.

python benchmarks/document_recipe.py

The CNN is trained on train1 alone by SGD, on pixels from 0 to 255. In each colour, samples of the
rarer label are repeated until both labels are equally frequent. The script prints the test accuracy
after each epoch.
"""

import torch
from jobs import fresh_data, print_table, script_parser
from torch.nn import functional as F
from tqdm import tqdm

from dataset import EVALUATION_BATCH_SIZE, Samples, concatenate
from model import CNN, Network
from preprocessing import number, run_command

GENERATION = {"p_f": 0.25, "p_e": (0.2, 0.1, 0.9)}
LEARNING_RATE, BATCH_SIZE = 1e-3, 32


def balanced(samples: Samples) -> Samples:
    """Repeat samples until both labels are equally frequent in each colour."""
    parts = []
    for color in (0, 1):
        of_color = samples[samples.colors == color]
        labels = [of_color[of_color.labels == label] for label in (0, 1)]
        count = max(map(len, labels))
        parts += [part[torch.arange(count) % len(part)] for part in labels]
    return concatenate(parts)


def train_epoch(network: Network, optimizer: torch.optim.Optimizer, samples: Samples) -> None:
    for index in tqdm(torch.randperm(len(samples)).split(BATCH_SIZE), disable=None, leave=False):
        batch = samples[index]
        objective = F.binary_cross_entropy_with_logits(network(batch.images.float()), batch.labels)
        optimizer.zero_grad()
        objective.backward()
        optimizer.step()


@torch.no_grad()
def accuracy(network: Network, samples: Samples) -> float:
    """Return the accuracy in %."""
    images = samples.images.split(EVALUATION_BATCH_SIZE)
    logits = torch.cat([network(part.float()) for part in images])
    return 100 * ((logits > 0) == (samples.labels > 0)).double().mean().item()


def main() -> None:
    parser = script_parser(__doc__, scheduler=False)
    add = parser.add_argument
    add("--seed", type=number(int, 0), default=1234, help="random seed (default: 1234)")
    add("--epochs", type=number(int, 1), default=10, help="number of epochs (default: 10)")
    args = parser.parse_args()
    data = fresh_data(args.seed, **GENERATION)
    train1 = balanced(data.training[data.training.envs == 0])
    torch.manual_seed(args.seed)
    network = CNN()
    optimizer = torch.optim.SGD(network.phi.parameters(), lr=LEARNING_RATE)
    lines = []
    for epoch in range(1, args.epochs + 1):
        train_epoch(network, optimizer, train1)
        lines.append([epoch, f"{accuracy(network, data.test):.1f}"])
    print_table(["epoch", "test accuracy, %"], lines)


if __name__ == "__main__":
    run_command(main)
