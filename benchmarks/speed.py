"""How long the main command takes, as a ratio to the arithmetic that the protocol implies.

    python benchmarks/speed.py

The unit is the time of 1,200 products of the first layer forward and of its weight gradient
(1024 x 2352 by 2352 x 64), what three repetitions of 400 iterations cannot do without on RGB
images. Unit and command are measured in turn, in one run, as machines are noisy.
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


def unit() -> float:
    """Seconds for the products, in a process of their own like the command."""
    code = (
        "import time, torch\n"
        "x, w, g = torch.randn(1024, 2352), torch.randn(2352, 64), torch.randn(1024, 64)\n"
        "for n in (50, 1200):\n"
        "    start = time.perf_counter()\n"
        "    for _ in range(n): x @ w, x.T @ g\n"
        "print(time.perf_counter() - start)"
    )
    return float(subprocess.check_output([sys.executable, "-c", code]))


def command(*arguments: str) -> tuple[float, float]:
    """Seconds and peak memory (MiB) of a whole command, imports included."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *arguments], cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0
    return time.perf_counter() - start, usage.ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=5, help="how often each is measured")
    parser.add_argument("--trainer", default="IRM", help="what is trained (default: IRM)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        drawing = [
            f"import sys, time; sys.path.insert(0, {str(ROOT)!r}); import preprocessing as p; "
            "from pathlib import Path; start = time.perf_counter(); "
            f"p.make_dataset(Path({folder!r}) / '{run}'); print(time.perf_counter() - start)"
            for run in range(args.runs)
        ]
        draws = [float(subprocess.check_output([sys.executable, "-c", code])) for code in drawing]
    main_command = ("exp-mnist.py", "--trainer", args.trainer, "--no_cuda")
    measured = [(*command(*main_command), unit()) for _ in range(args.runs)]
    seconds, peak, units = map(statistics.median, zip(*measured, strict=True))
    ratios = sorted(whole / one for whole, _, one in measured)
    print(f"{' '.join(main_command)}: {seconds:.1f} s, {peak:.0f} MiB; unit {units:.1f} s")
    print(f"Ratio: {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")
    print(f"Drawing the data: {statistics.median(draws):.2f} s")
    print(
        f"Machine: {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    )


if __name__ == "__main__":
    main()
