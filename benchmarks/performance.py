"""Time and memory, as ratios that are measured in one run, and the machine. In Markdown.

python benchmarks/performance.py
python benchmarks/performance.py --against ../another-checkout

Training: the unit is the time of 1,200 products of the first layer forward and of its weight
gradient (1024 x 2352 by 2352 x 64) in float32, as three repetitions of 400 iterations make on RGB
images. Unit, command and, with --against, the same command of another checkout of this project are
measured in turn, as machines are noisy. More flags are passed on to exp-mnist.py.

Crossbar: conversion, tuning and evaluation by MemTorch as it comes (patch_model with VTEAM devices
and naive scaling, tune_, its own kernel), and by to_crossbar, on one untrained network.
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
from pathlib import Path
from statistics import median

import torch
from jobs import ROOT, fresh_data, script_parser, training_flags
from torch import nn

from memristor import calibration_images, check_devices, to_crossbar
from preprocessing import UserError, number, run_command
from register import TRAINERS
from trainer import build, predict

UNIT = """
import time, torch
x, w, g = torch.randn(1024, 2352), torch.randn(2352, 64), torch.randn(1024, 64)
for n in (50, 1200):
    start = time.perf_counter()
    for _ in range(n): x @ w, x.T @ g
print(time.perf_counter() - start)
"""
DRAWING = """
import sys, time
sys.path.insert(0, sys.argv[1])
import preprocessing
start = time.perf_counter()
preprocessing.draw_environments(preprocessing.Path(sys.argv[2]))
print(time.perf_counter() - start)
"""
# In a small process of its own: a process's peak is at least that of the one that started it.
COMMAND = """
import os, subprocess, sys, time
start = time.perf_counter()
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(process.pid, 0)
print(time.perf_counter() - start, usage.ru_maxrss / 1024, status)
"""


def seconds_printed(code: str, *arguments: Path) -> float:
    """What a process of its own says that it took."""
    return float(subprocess.check_output([sys.executable, "-c", code, *map(str, arguments)]))


def whole_command(checkout: Path, arguments: list[str]) -> tuple[float, float]:
    """Seconds and peak memory (MiB) of exp-mnist.py in a checkout, imports included."""
    command = [sys.executable, "exp-mnist.py", *arguments]
    measured = subprocess.check_output([sys.executable, "-c", COMMAND, *command], cwd=checkout)
    seconds, peak, status = map(float, measured.split())
    if status:
        raise UserError(f"{' '.join(command[1:])} failed in {checkout}")
    return seconds, peak


def training(options: list[str], runs: int, against: Path | None) -> None:
    """Print the rows of the command in each checkout, and of drawing the data."""
    checkouts = {"this project": ROOT}
    if against:
        checkouts[f"{against.resolve().name} (--against)"] = against
    measured = {name: [] for name in checkouts}  # (seconds, MiB) of each run
    draws = {name: [] for name in checkouts}
    units = []
    with tempfile.TemporaryDirectory() as folder:
        for run in range(runs):
            units.append(seconds_printed(UNIT))
            for place, (name, checkout) in enumerate(checkouts.items()):
                data = Path(folder) / f"{place}-{run}"
                draws[name].append(seconds_printed(DRAWING, checkout.resolve(), data))
                arguments = [*options, "--dataset_path", str(data)]
                measured[name].append(whole_command(checkout, arguments))
    command = " ".join(["exp-mnist.py", *options])
    for name, of_runs in measured.items():
        ratios = sorted(seconds / unit for (seconds, _), unit in zip(of_runs, units, strict=True))
        seconds, peak = (median(values) for values in zip(*of_runs, strict=True))
        print(
            f"| `{command}`, imports included: {name} | {median(ratios):.2f} units "
            f"({ratios[0]:.2f} to {ratios[-1]:.2f}) | {seconds:.1f} (unit {median(units):.1f}) | "
            f"{peak:.0f} |"
        )
    if against:
        pairs = zip(*measured.values(), strict=True)
        ratios = sorted(ours / theirs for (ours, _), (theirs, _) in pairs)
        print(
            f"| this project against that | {median(ratios):.2f} ({ratios[0]:.2f} to "
            f"{ratios[-1]:.2f}) | | |"
        )
    for name, seconds in draws.items():
        ratio = median(seconds) / median(units)
        print(f"| drawing the data: {name} | {ratio:.2f} units | {median(seconds):.2f} | |")


def clock(compute: Callable[[], object]) -> tuple[float, object]:
    start = time.perf_counter()
    result = compute()
    return time.perf_counter() - start, result


def as_it_comes(network: nn.Module) -> nn.Module:
    """A network that MemTorch itself converts, with the course project's settings."""
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


def crossbar(args: argparse.Namespace, count: int) -> None:
    """Print the rows of the crossbar, evaluated on so many samples."""
    data = fresh_data(args.seed)
    test = data.test[:count]
    torch.manual_seed(0)
    network, _ = build(args)
    network.eval()
    images = calibration_images(data.training)
    ours, converted = clock(lambda: to_crossbar(network, images))
    our_evaluation, _ = clock(lambda: predict(converted, test))
    conversion, patched = clock(lambda: as_it_comes(network))
    tuning, _ = clock(patched.tune_)
    evaluation, _ = clock(lambda: predict(patched, test))
    theirs, whole = conversion + tuning + evaluation, ours + our_evaluation
    print(
        f"| MemTorch as it comes: conversion, tuning, evaluation of {len(test)} samples | 1 | "
        f"{theirs:.2f} ({conversion:.2f} + {tuning:.2f} + {evaluation:.2f}) | |"
    )
    print(
        f"| `to_crossbar`, with calibration; evaluation of {len(test)} samples | "
        f"1 / {theirs / whole:.1f} | {whole:.2f} ({ours:.2f} + {our_evaluation:.2f}) | |"
    )


def main() -> None:
    parser = script_parser(__doc__, scheduler=False)
    add = parser.add_argument
    add("--runs", type=number(int, 1), default=5, help="how often each is measured (default: 5)")
    trainer = "what is trained (default: IRM)"
    add("--trainer", default="IRM", choices=TRAINERS, help=trainer)
    checkout = "folder of another checkout of this project, to be measured in turn with this one"
    add("--against", type=Path, metavar="CHECKOUT", help=checkout)
    add("--cuda", action="store_true", help="train on the GPU too")
    samples = "test samples that crossbars are evaluated on, 2 to 20000 (default: 20000)"
    add("--test_samples", type=number(int, 2, 20000), default=20000, help=samples)
    args, options = parser.parse_known_args()
    training_args = training_flags(options, "trainer", "dataset_path", "no_cuda", "save_model")
    check_devices(r_on=1, r_off=2)  # whether there is MemTorch at all
    if args.against and not (args.against / "exp-mnist.py").is_file():
        raise UserError(f"--against {args.against}: there is no exp-mnist.py in it")
    if args.cuda and not torch.cuda.is_available():
        raise UserError("--cuda: there is no GPU that torch can use")
    options = ["--trainer", args.trainer, *options]
    print("| | ratio | seconds | peak memory, MiB |\n| --- | --- | --- | --- |")
    training([*options, "--no_cuda"], args.runs, args.against)
    if args.cuda:
        training(options, args.runs, args.against)
    crossbar(training_args, args.test_samples)
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    print(
        f"\nMachine: {platform.processor() or platform.machine()}, {os.cpu_count()} CPUs{gpu}, "
        f"Python {platform.python_version()}, torch {torch.__version__}"
    )


if __name__ == "__main__":
    run_command(main)
