"""What hardening costs and what it saves: the crossbar's test accuracy with stuck devices.

    python benchmarks/robustness.py

For each trainer: three repetitions, plain and hardened, digital and on crossbars whose devices are
stuck at low resistance in proportions of 0, 10 and 20 %, five fault patterns each.
"""

import argparse
import contextlib
import io
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import memristor  # noqa: E402
from preprocessing import run  # noqa: E402
from trainer import parse_arguments, repetitions  # noqa: E402

PROPORTIONS = (0.0, 0.1, 0.2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--trainers", nargs="+", default=["Backdoor", "groupDRO", "IRM"])
    parser.add_argument("--patterns", type=int, default=5, help="fault patterns")
    parser.add_argument("--trainings", nargs="+", default=["plain", "hardened"])
    known, options = parser.parse_known_args()
    stuck = "".join(f" {proportion:>8.0%}" for proportion in PROPORTIONS)
    print(f"{'trainer':10} {'training':10} {'digital':>8}{stuck} stuck")
    for trainer in known.trainers:
        for training in known.trainings:
            arguments = ["--trainer", trainer, "--evaluation_steps", "100000", *options]
            args = parse_arguments(memristor.crossbar_parser(), arguments)
            hook = memristor.harden if training == "hardened" else None
            digital, crossbar = [], {proportion: [] for proportion in PROPORTIONS}
            with contextlib.redirect_stdout(io.StringIO()):
                for repetition in repetitions(args, hook):
                    digital.append(repetition.result["Accuracy"])
                    for proportion in PROPORTIONS:
                        for pattern in range(known.patterns if proportion else 1):
                            faults = {"lrs_proportion": proportion, "fault_seed": pattern}
                            _, result = memristor.on_crossbar(repetition, vars(args) | faults)
                            crossbar[proportion].append(result["Accuracy"])
            cells = [statistics.fmean(values) for values in (digital, *crossbar.values())]
            numbers = " ".join(f"{100 * cell:8.2f}" for cell in cells)
            print(f"{trainer:10} {training:10} {numbers}", flush=True)


if __name__ == "__main__":
    run(main)
