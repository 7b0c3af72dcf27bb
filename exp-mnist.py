"""Train on train1 and train2, report on test. (The optimizer is in trainer.py's `train`.)

python exp-mnist.py --seed 1234 --trainer IRM > IRM_log.txt
"""

from statistics import fmean

import torch

from metric import metrics, summarize
from preprocessing import run_command
from trainer import arguments_of, build, load, parse_arguments, predict, save, train


def main() -> None:
    args = parse_arguments("Train on ColoredMNIST by ERM, groupDRO, IRM or backdoor adjustment.")
    data = load(args)
    results, flip_rates = [], []
    for repetition in range(1, args.repetitions + 1):
        print(f"Repetition {repetition} of {args.repetitions}")
        torch.manual_seed(1000 * args.seed + repetition - 1)
        training, validation = data.hold_out(args.validation)
        network, loss = build(args)
        network = train(network, loss, training, validation, **arguments_of(train, args))

        logits, recolored = predict(network, data.test), predict(network, data.test.recolored())
        results.append(metrics(logits, data.test.labels))
        flip_rates.append(((logits > 0) != (recolored > 0)).double().mean().item())
        print(f"Test result: {results[-1]}")
        print(f"Flip rate: {flip_rates[-1]}", flush=True)
        save(network, args, repetition)

    print(f"Mean flip rate: {fmean(flip_rates)}")
    print(f"Summary: {summarize(results)}")


if __name__ == "__main__":
    run_command(main)
