"""A grid of sample digits: a row for each environment, each digit's label y above it.

python benchmarks/samples.py

Shows the files in data/ColoredMNIST, which are drawn first if there are none. Draws
figures/samples.png.
"""

import argparse
from pathlib import Path

from jobs import ROOT, save_figure
from matplotlib.figure import Figure

from dataset import ColoredMNIST
from preprocessing import ENVIRONMENTS, run_command


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--dataset_path", type=Path, default=ROOT / "data")
    parser.add_argument("--figure", type=Path, default=ROOT / "figures" / "samples.png")
    args = parser.parse_args()
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for name, axes in zip(ENVIRONMENTS, figure.subplots(len(ENVIRONMENTS), 12), strict=True):
        environment = ColoredMNIST(args.dataset_path, name)
        flipped = (environment.digits.labels != environment.digits.colors).float().mean()
        axes[0].text(-6, 14, f"{name}\ncolour ≠ y: {flipped:.0%}", ha="right", va="center")
        for index, axis in enumerate(axes):
            axis.axis("off")
            if index < len(environment):
                image, label, _ = environment[index]
                axis.imshow(image)
                axis.set_title(f"y = {label}", fontsize=9)
    save_figure(figure, args.figure)


if __name__ == "__main__":
    run_command(main)
