"""Train on train1 and train2, test on test, several times.

The data are in dataset.py (`load_dataset`), network and losses in model.py, the optimizer and the
training loop in trainer.py (`train`), the repetitions and their seeds there too (`repetitions`).

python exp-mnist.py --seed 1234 --trainer IRM > IRM_log.txt
"""

from statistics import fmean

from metric import group_accuracies, metrics, summarize
from preprocessing import run_command, warn
from trainer import (
    load,
    parse_arguments,
    predict,
    repetitions,
    save,
    train,
    training_settings,
)


def main() -> None:
    args = parse_arguments("Train on ColoredMNIST by ERM, groupDRO, IRM or backdoor adjustment.")
    data = load(args)
    test = data.test
    results, flip_rates = [], []
    for repetition, network, loss, training, validation in repetitions(args, data):
        print(f"Repetition {repetition} of {args.repetitions}")
        train(network, loss, training, validation, **training_settings(args))

        logits, recolored = predict(network, test), predict(network, test.recolored())
        # Beyond the assignment: each label in each colour, and the share of the decisions that
        # change if the colour does.
        groups = group_accuracies(logits, test.labels, test.colors)
        results.append(metrics(logits, test.labels))
        flip_rates.append(((logits > 0) != (recolored > 0)).double().mean().item())
        print(f"Test result: {results[-1]}")
        print(f"Group accuracy: {groups}")
        print(f"Worst group: {min(groups.values())}")
        print(f"Flip rate: {flip_rates[-1]}", flush=True)
        if (logits > 0).unique().numel() == 1:
            warn(f"repetition {repetition} predicts the same label for all test images")
        save(args, repetition, network, loss, data.form)

    print(f"Mean flip rate: {fmean(flip_rates)}")
    print(f"Summary: {summarize(results)}")


if __name__ == "__main__":
    run_command(main)
