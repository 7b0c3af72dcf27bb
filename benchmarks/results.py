"""The table of results, in Markdown: each trainer to the letter of the assignment, and steady.

python benchmarks/results.py
python benchmarks/results.py --seeds $(seq 40000 40009)

The first is what `OMP_NUM_THREADS=1 python exp-mnist.py --no_cuda`, with a row's flags, prints:
three repetitions of seed 1234, mean and population standard deviation. The second trains once with
each seed, on that seed's own draw of the data; these are no student numbers. The CNN takes long:
only the first seed trains it, to the letter. More flags are passed on to exp-mnist.py. Seconds are
those that the training takes of one core.
"""

from collections import Counter
from statistics import fmean, pstdev

from jobs import Table, commit, experiment, run_jobs, script_parser, training_flags

from dataset import unseen_samples
from metric import group_accuracies, metrics
from preprocessing import number, run_command
from trainer import evaluate, parse_arguments, predict

CNN = "Backdoor --network CNN"
ROWS = (
    "ERM",
    "groupDRO",
    "IRM",
    "Backdoor",
    "Backdoor --adjustment weights",
    CNN,
    "ERM --grayscale",
    "Backdoor --grayscale",
)
PROTOCOLS = {"letter": (), "steady": ("--steady",)}
FIGURES = ("test", "unseen", "worst_group", "auc", "f1_macro", "flip_rate", "seconds")
COLUMNS = {"row": str, "protocol": str, "flags": str, "seed": int, "repetition": int}
COLUMNS |= dict.fromkeys(FIGURES, float) | {"commit": str}


def measure(*arguments: str) -> list[list[float]]:
    """The `FIGURES` of each repetition; seconds are those of a core in training."""
    unseen, results = unseen_samples(), []
    for trained in experiment(list(arguments)):
        network, test = trained.network, trained.data.test
        logits, recolored = predict(network, test), predict(network, test.recolored())
        scores = metrics(logits, test.labels)
        figures = {
            "test": scores["Accuracy"],
            "unseen": evaluate(network, unseen)["Accuracy"],
            "worst_group": min(group_accuracies(logits, test.labels, test.colors).values()),
            "auc": scores["AUC"],
            "f1_macro": scores["F1_macro"],
            "flip_rate": ((logits > 0) != (recolored > 0)).double().mean().item(),
            "seconds": trained.seconds,
        }
        results.append([figures[name] for name in FIGURES])
    return results


def compute(
    table: Table, wanted: list[tuple], options: list[str], repetitions: int, scheduler: str | None
) -> None:
    """Add to the table what it lacks of the wanted (row, protocol, seed)."""
    flags = " ".join(options)
    known = Counter((row["row"], row["protocol"], row["flags"], row["seed"]) for row in table.rows)
    jobs, missing = {}, 0
    for row, protocol, seed in wanted:
        key = (row, protocol, flags, seed)
        if known[key] < repetitions:
            missing += repetitions - known[key]
            more = ("--seed", str(seed), "--repetitions", str(repetitions), *options)
            jobs["--trainer", *row.split(), *PROTOCOLS[protocol], *more] = key
    table.expect(len(table.rows) + missing)
    of_commit = commit()
    for job, results in run_jobs(measure, list(jobs), scheduler):
        rows = []
        for repetition, figures in enumerate(results, 1):
            if repetition > known[jobs[job]]:
                values = (*jobs[job], repetition, *figures, of_commit)
                rows.append(dict(zip(COLUMNS, values, strict=True)))
        table.add(rows)


def report(rows: list[dict]) -> None:
    print(
        "| trainer | protocol | trainings | test, % | unseen digits, % | worst group, % | AUC | "
        "macro F1 | flip rate | seconds of a training |"
    )
    print("| --- " * 10 + "|")
    for name in ROWS:
        for protocol in PROTOCOLS:
            found = [row for row in rows if (row["row"], row["protocol"]) == (name, protocol)]
            if found:
                trainer, _, flags = name.partition(" ")
                cells = [f"{trainer}, `{flags}`" if flags else trainer, protocol, str(len(found))]
                for figure in ("test", "unseen", "worst_group"):
                    values = [100 * row[figure] for row in found]
                    cells.append(f"{fmean(values):.1f} ± {pstdev(values):.1f}")
                for figure in ("auc", "f1_macro", "flip_rate"):
                    cells.append(f"{fmean(row[figure] for row in found):.3f}")
                cells.append(f"{fmean(row['seconds'] for row in found):.1f}")
                print(f"| {' | '.join(cells)} |")


def main() -> None:
    parser = script_parser(__doc__, table="results.csv")
    add, seed = parser.add_argument, number(int, 0, 2**32 - 1)
    add("--seeds", type=seed, nargs="+", help="train once with each of these")
    add("--rows", nargs="+", choices=ROWS, default=ROWS, metavar="ROW", help=f"of {ROWS}")
    protocols = "default: both"
    add("--protocols", nargs="+", choices=PROTOCOLS, default=list(PROTOCOLS), help=protocols)
    args, options = parser.parse_known_args()
    ours = {"trainer", "steady", "dataset_path", "seed", "repetitions", "save_model"}
    for row in args.rows:
        ours |= {word.removeprefix("--") for word in row.split() if word.startswith("--")}
    training_flags(options, *ours)
    for row in args.rows:
        parse_arguments("", ["--trainer", *row.split(), *options])  # says what has no effect
    seeds = list(dict.fromkeys(args.seeds or [1234]))
    repetitions = 1 if args.seeds else 3
    wanted = []
    for number_of_seed, seed in enumerate(seeds):
        for row in ROWS:
            for protocol in PROTOCOLS:
                left_out = row == CNN and (number_of_seed > 0 or protocol != "letter")
                if row in args.rows and protocol in args.protocols and not left_out:
                    wanted.append((row, protocol, seed))
    table = Table(args.table, COLUMNS, args.resume)
    compute(table, wanted, options, repetitions, args.scheduler)
    print(f"Table: {args.table}\n")
    if options:
        print(f"With {' '.join(options)}:\n")
    rows = [row for row in table.rows if row["flags"] == " ".join(options)]
    report([row for row in rows if row["seed"] in seeds and row["repetition"] <= repetitions])


if __name__ == "__main__":
    run_command(main)
