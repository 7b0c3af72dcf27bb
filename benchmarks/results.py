"""The README's table of results, in Markdown.

python benchmarks/results.py
python benchmarks/results.py --no_cnn --seeds $(seq 30000 30009)

The first is what `OMP_NUM_THREADS=1 python exp-mnist.py --no_cuda`, with a row's flags, prints:
three repetitions of seed 1234, mean and population standard deviation. The second trains once with
each seed, on that seed's own draw of the data; these are no student numbers, and no setting was
chosen by them. More flags are passed on to exp-mnist.py.
"""

import argparse
import time
from statistics import fmean, pstdev

from jobs import add_scheduler_flag, experiment, refuse_flags, run_jobs, unseen_digits

from metric import metrics
from model import Backdoor
from preprocessing import number, run_command
from trainer import evaluate, parse_arguments, predict

ROWS = (
    "--trainer ERM",
    "--trainer groupDRO",
    "--trainer IRM",
    "--trainer Backdoor",
    "--trainer Backdoor --adjustment weights",
    "--trainer Backdoor --network CNN",
    "--trainer ERM --grayscale",
    "--trainer Backdoor --grayscale",
)


def measure(*arguments: str) -> list[dict[str, float]]:
    """Each repetition's scores in the test environment and on unseen digits, and its seconds."""
    unseen, results = unseen_digits("--grayscale" in arguments), []
    start = time.perf_counter()
    for data, network, loss, *_ in experiment(list(arguments)):
        logits, recolored = predict(network, data.test), predict(network, data.test.recolored())
        flips = ((logits > 0) != (recolored > 0)).double().mean().item()
        result = {"flips": flips, "unseen": evaluate(network, unseen)["Accuracy"]}
        if isinstance(loss, Backdoor):  # where the sum of the formula decides otherwise than Φ
            result["other"] = ((loss.probability(logits) > 0.5) != (logits > 0)).sum().item()
        seconds, start = time.perf_counter() - start, time.perf_counter()
        results.append(metrics(logits, data.test.labels) | result | {"seconds": seconds})
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    seed = number(int, 0, 2**32 - 1)
    parser.add_argument("--seeds", type=seed, nargs="+", help="train once with each of these")
    parser.add_argument("--no_cnn", action="store_true", help="leave out the CNN, which takes long")
    add_scheduler_flag(parser)
    args, options = parser.parse_known_args()
    parse_arguments("", options)  # to refuse what can't be run before anything is
    refuse_flags(
        options, "trainer", "network", "grayscale", "dataset_path", *["seed"] * bool(args.seeds)
    )
    rows = {row: [] for row in ROWS if not (args.no_cnn and "CNN" in row)}
    once = [("--repetitions", "1", "--seed", str(seed)) for seed in args.seeds or ()]
    jobs = {(*row.split(), *options, *more): row for row in rows for more in once or [()]}
    results = dict(run_jobs(measure, list(jobs), args.scheduler))
    for job, row in jobs.items():
        rows[row] += results[job]

    print("| trainer | test, % | unseen digits, % | AUC | macro F1 | flip rate | seconds |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for row, repetitions in rows.items():
        cells = []
        for name in ("Accuracy", "unseen"):
            values = [100 * repetition[name] for repetition in repetitions]
            cells.append(f"{fmean(values):.1f} ± {pstdev(values):.1f}")
        for name in ("AUC", "F1_macro", "flips"):
            cells.append(f"{fmean(repetition[name] for repetition in repetitions):.3f}")
        cells.append(f"{sum(repetition['seconds'] for repetition in repetitions):.0f}")
        trainer, _, flags = row.removeprefix("--trainer ").partition(" ")
        print(f"| {trainer}{f', `{flags}`' if flags else ''} | {' | '.join(cells)} |")
    print("\nWhere P(y = 1 | do(x)) > 1/2 decides otherwise than Φ > 0, of each 20,000:")
    for row, repetitions in rows.items():
        if "other" in repetitions[0]:
            print(f"- {row}: {[repetition['other'] for repetition in repetitions]}")


if __name__ == "__main__":
    run_command(main)
