"""Train on train1 and train2, report on test.

python exp-mnist.py --seed 1234 --trainer IRM > IRM_log.txt
"""

from preprocessing import run
from trainer import parse_arguments, repetitions, summarize, training_parser


def main() -> None:
    args = parse_arguments(training_parser("Train on ColoredMNIST by ERM, groupDRO, IRM, ..."))
    done = list(repetitions(args))
    print(f"Mean flip rate: {sum(repetition.flip_rate for repetition in done) / len(done)}")
    print(f"Summary: {summarize([repetition.result for repetition in done])}")


if __name__ == "__main__":
    run(main)
