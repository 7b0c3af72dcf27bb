"""Experiment of the assignment: train on train1 and train2, test on test, several times.

python exp-mnist.py --seed 1234 --trainer IRM > IRM_log.txt

dataset.py loads the data (`load_data`). model.py has the network and the losses. trainer.py has the
training loop (`train`).
"""

from metric import group_accuracies, metrics
from preprocessing import run_command
from trainer import (
    predict,
    start_log,
    summarize,
    train_repetitions,
    training_parser,
    warn_of_unused,
)


def main() -> None:
    args = training_parser(
        "Train on ColoredMNIST by ERM, groupDRO, IRM or backdoor adjustment."
    ).parse_args()
    warn_of_unused(args)
    data = start_log(args)
    test = data.test
    results = []
    for _, network, _ in train_repetitions(args, data):
        logits = predict(network, test)
        results.append(metrics(logits, test.labels))
        print(f"Test result: {results[-1]}")
        groups = group_accuracies(logits, test.labels, test.colors)
        print(f"Group accuracy: {groups}", flush=True)  # not in the assignment
    print(f"Summary: {summarize(results)}")


if __name__ == "__main__":
    run_command(main)
