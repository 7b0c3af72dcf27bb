"""Time and memory of a command and of a crossbar, as ratios to a fixed computation, in Markdown.

python benchmarks/performance.py

Training: the unit is the time of 1,200 products of the first layer forward and of its weight
gradient (1024 x 2352 by 2352 x 64) in float32. Three repetitions of 400 iterations make as many on
RGB images. Unit and command are measured in turn, because machines are noisy. More flags are passed
on to exp-mnist.py.

Crossbar: conversion, tuning and evaluation by MemTorch's own functions (patch_model with VTEAM
devices and naive scaling, tune_, its inference), and by to_crossbar, on one untrained network.
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
    """Return the seconds of a call and its result."""
    start = time.perf_counter()
    result = compute()
    return time.perf_counter() - start, result


def products(count: int) -> None:
    """Compute the products of the unit."""
    inputs, weight = torch.randn(1024, 2352), torch.randn(2352, 64)
    gradient = torch.randn(1024, 64)
    for _ in range(count):
        inputs @ weight, inputs.T @ gradient


def whole_command(arguments: list[str]) -> tuple[float, float]:
    """Return the seconds and the peak memory, in MiB, of exp-mnist.py, imports included."""
    command = [sys.executable, str(ROOT / "exp-mnist.py"), *arguments]
    output = subprocess.check_output([sys.executable, "-c", COMMAND, *command])
    seconds, peak, status = map(float, output.split())
    if status:
        raise UserError(f"{' '.join(command)} failed. Run it to see why.")
    return seconds, peak


def training_lines(flags: list[str], runs: int) -> list[list[str]]:
    """Measure the command and the generation of the data."""
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
    """Return a network that MemTorch itself converted, with the course project's settings."""
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
    """Measure both ways onto a crossbar."""
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
    add("--runs", type=number(int, 1), default=5, help="of the command (default: 5)")
    add("--trainer", default="IRM", choices=TRAINERS, help="default: IRM")
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
