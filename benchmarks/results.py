"""Table of results over seeds, for any flags of exp-mnist.py, in Markdown.

python benchmarks/results.py
python benchmarks/results.py --seeds $(seq 40000 40009)
python benchmarks/results.py --rows IRM "VREx --beta 30" "IRM --iteration 1200" --seeds 0 1 2 3 4

A row is a trainer with other flags of exp-mnist.py. Each seed generates its own data. A row has one
training per seed, or three trainings without --seeds. --repetitions in a row changes this number. A
training gives the same numbers as `OMP_NUM_THREADS=1 python exp-mnist.py --no_cuda` with the same
flags. The table has the mean and the population standard deviation over the trainings. Unseen
digits are a test environment made from MNIST's test digits. Seconds are the CPU seconds of one
training. ERM_train2 and groupDRO_groups are controls, which exist only in this script.
"""

import time
from statistics import fmean, pstdev

import torch
from jobs import Table, fresh_data, print_table, script_parser, select, training_arguments
from torch import Tensor

from dataset import Batch, unseen_samples
from metric import group_accuracies, metrics
from model import GroupDRO, Loss, Network
from preprocessing import P_E, P_F, number, run_command
from register import TRAINERS
from trainer import evaluate, predict, train_repetition

ROWS = ("ERM", "groupDRO", "IRM", "Backdoor", "Backdoor --adjustment weights", "ERM --grayscale")
METRICS = ("test", "unseen", "worst_group", "auc", "f1_macro", "flip_rate", "seconds")
COLUMNS = {"data": str, "row": str, "seed": int, "repetition": int} | dict.fromkeys(METRICS, float)


class ERMOnTrain2(Loss):
    """ERM on the samples of train2 in a minibatch."""

    def forward(self, network: Network, batch: Batch) -> Tensor:
        return self.losses(network(batch.images), batch)[batch.envs == 1].mean()


class GroupDROOverGroups(GroupDRO):
    """Group DRO over the four groups of a label and a colour instead of the two environments."""

    def __init__(self, eta: float = 0.05):
        super().__init__(eta)
        self.q = torch.full((4,), 0.25)

    def forward(self, network: Network, batch: Batch) -> Tensor:
        groups = 2 * batch.labels.long() + batch.colors
        return super().forward(network, batch._replace(envs=groups))


# Workers import this module, so they know the two controls as well.
TRAINERS |= {"ERM_train2": ERMOnTrain2, "groupDRO_groups": GroupDROOverGroups}


def measure(
    row: str,
    seed: int,
    repetition: int,
    p_f: float = P_F,
    p_e: tuple[float, float, float] = P_E,
) -> list[tuple[float, ...]]:
    """Train one repetition and test it. Return one row of the values of `METRICS`.

    Args:
        row: a trainer and other flags of exp-mnist.py
        seed: seed of the data and the training
        repetition: number of the repetition, 1, 2 ...
        p_f: probability of flipping a label
        p_e: probability that the colour differs from the label, in train1, train2 and test
    """
    args = training_arguments(row)
    args.seed = seed
    data = fresh_data(seed, p_f=p_f, p_e=p_e)
    start = time.process_time()
    network, *_ = train_repetition(args, data, repetition, report=lambda step: None)
    seconds = time.process_time() - start
    test = data.test
    logits, recolored = predict(network, test), predict(network, test.recolored())
    result = metrics(logits, test.labels)
    unseen = evaluate(network, unseen_samples(p_f, p_e[2]))["Accuracy"]
    worst_group = min(group_accuracies(logits, test.labels, test.colors).values())
    flip_rate = ((logits > 0) != (recolored > 0)).double().mean().item()
    scores = (result["AUC"], result["F1_macro"])
    return [(result["Accuracy"], unseen, worst_group, *scores, flip_rate, seconds)]


def report(rows: list[dict]) -> None:
    """Print a Markdown table, one line for each row of flags."""
    titles = ["row", "trainings", "test, %", "unseen digits, %", "worst group, %"]
    titles += ["AUC", "macro F1", "flip rate", "seconds"]
    lines = []
    for name in dict.fromkeys(row["row"] for row in rows):
        trainings = select(rows, row=name)
        trainer, *flags = name.split(maxsplit=1)
        line = [trainer + (f", `{flags[0]}`" if flags else ""), len(trainings)]
        for metric in ("test", "unseen", "worst_group"):
            values = [100 * training[metric] for training in trainings]
            deviation = f" ± {pstdev(values):.1f}" if len(values) > 1 else ""
            line.append(f"{fmean(values):.1f}{deviation}")
        for metric in ("auc", "f1_macro", "flip_rate"):
            line.append(f"{fmean(training[metric] for training in trainings):.3f}")
        line.append(f"{fmean(training['seconds'] for training in trainings):.1f}")
        lines.append(line)
    print_table(titles, lines)


def main() -> None:
    parser = script_parser(__doc__, table="results.csv")
    add, probability = parser.add_argument, number(float, 0, 1)
    add(
        "--rows",
        nargs="+",
        default=ROWS,
        metavar="ROW",
        help='trainer and flags, such as IRM "IRM --iteration 1200" (default: six rows)',
    )
    add("--seeds", type=number(int, 0), nargs="+", help="default: 1234, with three trainings")
    add("--p_f", type=probability, default=P_F, help=f"probability of label flips (default: {P_F})")
    add(
        "--p_e",
        type=probability,
        nargs=3,
        default=P_E,
        help=f"probability that the colour differs from the label (default: {P_E})",
    )
    args = parser.parse_args()
    table = Table(args.table, COLUMNS, args.resume)
    p_f, p_e = args.p_f, tuple(args.p_e)
    data = f"p_f {p_f}, p_e {' '.join(map(str, p_e))}"
    rows = {}  # row → number of trainings per seed
    for row in map(str.strip, args.rows):
        training = training_arguments(row)
        given = "--repetitions" in row
        rows[row] = training.repetitions if given or not args.seeds else 1
    jobs = {
        (data, row, seed, repetition): (row, seed, repetition, p_f, p_e)
        for seed in args.seeds or [1234]
        for row, repetitions in rows.items()
        for repetition in range(1, repetitions + 1)
    }
    table.fill(measure, jobs, args.scheduler)
    by_key = {tuple(row.values())[:4]: row for row in table.rows}
    print(f"Table: {args.table}\nData: {data}\n")
    report([by_key[key] for key in jobs])


if __name__ == "__main__":
    run_command(main)
