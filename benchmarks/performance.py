"""Time and memory of exp-mnist.py and time of a crossbar, in Markdown.

python benchmarks/performance.py

The time of exp-mnist.py is measured in units. A unit is the time of 1,200 products of the first
layer (1024 x 2352 by 2352 x 64) and 1,200 products of its weight gradient, in float32. Three
repetitions of 400 iterations need the same products for RGB images. The unit and exp-mnist.py are
measured in turn, because the speed of a machine varies. The script also accepts the flags of
exp-mnist.py.

The time of a crossbar is measured on one untrained network, first with MemTorch's own functions and
then with `to_crossbar`. It includes conversion, tuning and evaluation. MemTorch's functions are
patch_model with VTEAM devices and naive scaling, tune_, and its inference.
"""

import argparse
import copy
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from jobs import ROOT, fresh_data, print_table, script_parser, training_arguments
from torch import nn

from memristor import calibration_images, check_devices, check_network, to_crossbar
from preprocessing import UserError, generate_environments, number, run_command
from register import TRAINERS
from trainer import build, predict

# A small process starts the command, because a process's peak memory is at least its parent's.
COMMAND = """
import os, subprocess, sys, time
start = time.perf_counter()
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(process.pid, 0)
print(time.perf_counter() - start, usage.ru_maxrss / 1024, status)
"""


def clock(compute: Callable[[], object]) -> tuple[float, object]:
    """Call a function. Return its seconds and its result."""
    start = time.perf_counter()
    result = compute()
    return time.perf_counter() - start, result


def products(count: int) -> None:
    """Compute the unit's products, `count` of each kind."""
    inputs, weight = torch.randn(1024, 2352), torch.randn(2352, 64)
    gradient = torch.randn(1024, 64)
    for _ in range(count):
        inputs @ weight, inputs.T @ gradient


def whole_command(arguments: list[str]) -> tuple[float, float]:
    """Run exp-mnist.py. Return its seconds and its peak memory in MiB, imports included."""
    command = [sys.executable, str(ROOT / "exp-mnist.py"), *arguments]
    output = subprocess.check_output([sys.executable, "-c", COMMAND, *command])
    seconds, peak, status = map(float, output.split())
    if status:
        raise UserError(f"{' '.join(command)} failed. Run it to see why.")
    return seconds, peak


def training_lines(flags: list[str], runs: int) -> list[list[str]]:
    """Measure exp-mnist.py and the generation of the data. Return lines of the table."""
    units, generations, seconds, peaks = [], [], [], []
    products(50)  # the first ones are slower
    for _ in range(runs):
        units.append(clock(lambda: products(1200))[0])
        with tempfile.TemporaryDirectory() as folder:
            generations.append(clock(partial(generate_environments, folder))[0])
            measured = whole_command([*flags, "--dataset_path", folder])
        seconds.append(measured[0])
        peaks.append(measured[1])
    ratios = sorted(second / unit for second, unit in zip(seconds, units, strict=True))
    return [
        [
            f"`exp-mnist.py {' '.join(flags)}`, imports included",
            f"{median(ratios):.2f} units ({ratios[0]:.2f} to {ratios[-1]:.2f})",
            f"{median(seconds):.1f} (unit {median(units):.1f})",
            f"{median(peaks):.0f}",
        ],
        [
            "generating the data",
            f"{median(generations) / median(units):.2f} units",
            f"{median(generations):.2f}",
            "",
        ],
    ]


def converted_by_memtorch(network: nn.Module) -> nn.Module:
    """Convert a network with MemTorch alone, in the course project's settings."""
    import memtorch

    return memtorch.mn.Module.patch_model(
        copy.deepcopy(network).requires_grad_(False),
        memristor_model=memtorch.bh.memristor.VTEAM,
        memristor_model_params={"time_series_resolution": 1e-10, "r_off": 5e7, "r_on": 1.4e4},
        module_parameters_to_patch=[nn.Linear, nn.Conv2d],
        mapping_routine=memtorch.map.Parameter.naive_map,
        transistor=True,
        programming_routine=None,
        tile_shape=(128, 128),
        max_input_voltage=0.3,
        ADC_resolution=8,
        ADC_overflow_rate=0.0,
        quant_method="linear",
        verbose=False,
    )


def crossbar_lines(args: argparse.Namespace) -> list[list[str]]:
    """Measure MemTorch's functions and `to_crossbar`. Return lines of the table."""
    data = fresh_data(args.seed)
    torch.manual_seed(0)
    network, _ = build(args)
    network.eval()
    images = calibration_images(data.training)
    our_conversion, ours = clock(lambda: to_crossbar(network, images))
    our_evaluation, _ = clock(lambda: predict(ours, data.test))
    conversion, theirs = clock(lambda: converted_by_memtorch(network))
    tuning, _ = clock(theirs.tune_)
    evaluation, _ = clock(lambda: predict(theirs, data.test))
    our_total, total = our_conversion + our_evaluation, conversion + tuning + evaluation
    return [
        [
            "MemTorch's conversion, tuning and evaluation of the test environment",
            "1",
            f"{total:.2f} ({conversion:.2f} + {tuning:.2f} + {evaluation:.2f})",
            "",
        ],
        [
            "`to_crossbar`, with calibration, and evaluation of the test environment",
            f"1 / {total / our_total:.1f}",
            f"{our_total:.2f} ({our_conversion:.2f} + {our_evaluation:.2f})",
            "",
        ],
    ]


def main() -> None:
    parser = script_parser(__doc__, scheduler=False)
    add = parser.add_argument
    add("--runs", type=number(int, 1), default=5, help="runs of exp-mnist.py (default: 5)")
    add("--trainer", default="IRM", choices=TRAINERS, help="trainer to measure (default: IRM)")
    args, words = parser.parse_known_args()
    training = training_arguments(" ".join([args.trainer, *words]))
    check_devices(r_on=1, r_off=2)  # ends here if MemTorch is missing
    check_network(build(training)[0])
    lines = training_lines(["--trainer", args.trainer, "--no_cuda", *words], args.runs)
    print_table(["", "ratio", "seconds", "peak memory, MiB"], lines + crossbar_lines(training))
    print(
        f"\nMachine: {platform.processor() or platform.machine()}, {os.cpu_count()} CPUs, "
        f"Python {platform.python_version()}, torch {torch.__version__}"
    )


if __name__ == "__main__":
    run_command(main)
