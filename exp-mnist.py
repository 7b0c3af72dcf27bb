"""Train on train1 and train2, report on test.

python exp-mnist.py --seed 1234 --trainer IRM > IRM_log.txt
"""

from statistics import fmean

from preprocessing import run
from trainer import parse_arguments, repetitions, summarize, training_parser


def main() -> None:
    args = parse_arguments(training_parser("Train on ColoredMNIST by ERM, groupDRO, IRM, ..."))
    done = [(repetition.result, repetition.flip_rate) for repetition in repetitions(args)]
    results, flip_rates = zip(*done, strict=True)
    print(f"Mean flip rate: {fmean(flip_rates)}")
    print(f"Summary: {summarize(results)}")


if __name__ == "__main__":
    run(main)
