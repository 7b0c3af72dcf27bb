"""Conversion, tuning and evaluation of 20,000 samples: MemTorch as it comes, against to_crossbar.

    python benchmarks/crossbar.py

Both on the same network (random weights, 1568-64-16-1) and in one run. MemTorch: patch_model with
VTEAM devices, naive scaling and its own kernel, then tune_().
"""

import copy
import sys
import time
from pathlib import Path

import memtorch
import torch
from memtorch.map.Parameter import naive_map
from memtorch.mn.Module import patch_model

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from dataset import Split  # noqa: E402
from memristor import to_crossbar  # noqa: E402
from model import MLP  # noqa: E402
from preprocessing import load_dataset, run  # noqa: E402
from trainer import predict  # noqa: E402


def as_it_comes(network: MLP) -> torch.nn.Module:
    patched = patch_model(
        copy.deepcopy(network).requires_grad_(False),
        memristor_model=memtorch.bh.memristor.VTEAM,
        memristor_model_params={"time_series_resolution": 1e-10, "r_off": 5e7, "r_on": 1.4e4},
        module_parameters_to_patch=[torch.nn.Linear],
        mapping_routine=naive_map,
        transistor=True,
        programming_routine=None,
        tile_shape=(128, 128),
        max_input_voltage=0.3,
        ADC_resolution=8,
        ADC_overflow_rate=0.0,
        quant_method="linear",
        verbose=False,
    )
    return patched


def main() -> None:
    data = load_dataset(ROOT / "data")
    train, test = (Split(digits, torch.device("cpu")) for digits in (data.train, data.test))
    torch.manual_seed(0)
    network = MLP()
    images = train.batch(torch.arange(2000)).images

    def clock(what) -> tuple[float, torch.nn.Module]:
        start = time.perf_counter()
        result = what()
        return time.perf_counter() - start, result

    ours, crossbar = clock(lambda: to_crossbar(network, images))
    ours_evaluation, _ = clock(lambda: predict(crossbar, test))
    conversion, patched = clock(lambda: as_it_comes(network))
    tuning, _ = clock(patched.tune_)
    evaluation, _ = clock(lambda: predict(patched, test))
    whole = conversion + tuning + evaluation
    print(
        f"MemTorch as it comes: {conversion:.1f} s conversion, {tuning:.1f} s tuning, "
        f"{evaluation:.1f} s evaluation"
    )
    print(f"to_crossbar: {ours:.2f} s with calibration, {ours_evaluation:.2f} s evaluation")
    print(f"Ratio: {whole / (ours + ours_evaluation):.1f}")


if __name__ == "__main__":
    run(main)
