"""Train on train1 and train2, test on test, several times.

python exp-mnist.py --seed 1234 --trainer IRM > IRM_log.txt

The data are in dataset.py (`load_data`), the network and the losses in model.py, the training loop
in trainer.py (`train`).
"""

from statistics import fmean

from metric import group_accuracies, metrics
from preprocessing import run_command, warn
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
    results, flip_rates = [], []
    for repetition, network, _ in train_repetitions(args, data):
        logits, recolored = predict(network, test), predict(network, test.recolored())
        results.append(metrics(logits, test.labels))
        print(f"Test result: {results[-1]}")
        # In addition to the assignment: the accuracy of each label in each colour, and the fraction
        # of predictions that change if only the colour changes.
        groups = group_accuracies(logits, test.labels, test.colors)
        flip_rates.append(((logits > 0) != (recolored > 0)).double().mean().item())
        print(f"Group accuracy: {groups}")
        print(f"Worst group: {min(groups.values())}")
        print(f"Flip rate: {flip_rates[-1]}", flush=True)
        if (logits > 0).unique().numel() == 1:
            warn(f"repetition {repetition} predicts the same label for all test images")

    print(f"Mean flip rate: {fmean(flip_rates)}")
    print(f"Summary: {summarize(results)}")


if __name__ == "__main__":
    run_command(main)
