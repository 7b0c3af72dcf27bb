"""The performance table of the README, as ratios measured in one run, and the machine.

python benchmarks/performance.py

Training: the unit is the time of 1,200 products of the first layer forward and of its weight
gradient (1024 x 2352 by 2352 x 64) in float32, as three repetitions of 400 iterations make on RGB
images. Unit and command are measured in turn, as machines are noisy.

Crossbar: conversion, tuning and evaluation of 20,000 samples by MemTorch as it comes (patch_model
with VTEAM devices and naive scaling, tune_, its own kernel), and by to_crossbar, on one network.
"""

import argparse
import copy
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time

import torch
from jobs import ROOT

from dataset import load_dataset
from memristor import calibration_images, check_devices, memtorch, to_crossbar
from model import MLP
from preprocessing import UserError, number, run_command
from trainer import predict

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


def seconds_printed(code: str, *arguments: str) -> float:
    """What a process of its own says that it took."""
    return float(subprocess.check_output([sys.executable, "-c", code, *arguments]))


def whole_command(*arguments: str) -> tuple[float, float]:
    """Seconds and peak memory (MiB) of a command, imports included."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *arguments], cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise UserError(f"{' '.join(arguments)} failed")
    return time.perf_counter() - start, usage.ru_maxrss / 1024


def training(trainer: str, options: list[str], runs: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        draws = [seconds_printed(DRAWING, str(ROOT), f"{folder}/{n}") for n in range(runs)]
    command = ("exp-mnist.py", "--trainer", trainer, *options)
    measured = [(*whole_command(*command), seconds_printed(UNIT)) for _ in range(runs)]
    seconds, peak, units = map(statistics.median, zip(*measured, strict=True))
    ratios = sorted(whole / unit for whole, _, unit in measured)
    print(
        f"| `{' '.join(command)}`, imports included | {statistics.median(ratios):.2f} units "
        f"({ratios[0]:.2f} to {ratios[-1]:.2f}) | {seconds:.1f} (unit {units:.1f}) | {peak:.0f} |"
    )
    draw = statistics.median(draws)
    print(f"| drawing the data | {draw / units:.2f} units | {draw:.2f} | |")


def crossbar() -> None:
    data = load_dataset(ROOT / "data")
    torch.manual_seed(0)
    network = MLP().eval()
    images = calibration_images(data.training)

    def clock(what) -> tuple[float, torch.nn.Module]:
        start = time.perf_counter()
        result = what()
        return time.perf_counter() - start, result

    def as_it_comes() -> torch.nn.Module:
        return memtorch.mn.Module.patch_model(
            copy.deepcopy(network).requires_grad_(False),
            memristor_model=memtorch.bh.memristor.VTEAM,
            memristor_model_params={"time_series_resolution": 1e-10, "r_off": 5e7, "r_on": 1.4e4},
            module_parameters_to_patch=[torch.nn.Linear],
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

    ours, converted = clock(lambda: to_crossbar(network, images))
    our_evaluation, _ = clock(lambda: predict(converted, data.test))
    conversion, patched = clock(as_it_comes)
    tuning, _ = clock(patched.tune_)
    evaluation, _ = clock(lambda: predict(patched, data.test))
    theirs, whole = conversion + tuning + evaluation, ours + our_evaluation
    print(
        f"| MemTorch as it comes: conversion, tuning, evaluation | 1 | {theirs:.1f} "
        f"({conversion:.1f} + {tuning:.1f} + {evaluation:.1f}) | |"
    )
    print(
        f"| `to_crossbar`, with calibration; evaluation | 1 / {theirs / whole:.1f} | {whole:.1f} "
        f"({ours:.1f} + {our_evaluation:.1f}) | |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=number(int, 1), default=5, help="how often each is measured")
    parser.add_argument("--trainer", default="IRM", help="what is trained (default: IRM)")
    parser.add_argument("--cuda", action="store_true", help="train on the GPU too")
    args = parser.parse_args()
    check_devices(r_on=1, r_off=2)
    print("| | ratio | seconds | peak memory, MiB |\n| --- | --- | --- | --- |")
    training(args.trainer, ["--no_cuda"], args.runs)
    if args.cuda:
        training(args.trainer, [], args.runs)
    crossbar()
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    print(
        f"\nMachine: {platform.processor() or platform.machine()}, {os.cpu_count()} CPUs{gpu}, "
        f"Python {platform.python_version()}, torch {torch.__version__}"
    )


if __name__ == "__main__":
    run_command(main)
