"""A grid of images: a row for each environment, each image's label y above it.

python benchmarks/samples.py

They are of data of its own, drawn with --seed as those of a first run are.
"""

import torch
from jobs import check_writable, fresh_data, save_figure, script_parser
from matplotlib.figure import Figure
from torch.nn import functional as F

from dataset import Dataset, Samples
from preprocessing import ENVIRONMENTS, number, run_command

COLUMNS = 12


def environment(data: Dataset, env: int) -> Samples:
    """The samples of train1, train2 or test: env 0, 1 or 2."""
    return data.test if env == 2 else data.training[data.training.envs == env]


def report(data: Dataset) -> None:
    print("| environment | images | y = 1 | red | green where y = 1, or red where y = 0 |")
    print("| --- " * 5 + "|")
    for env, name in enumerate(ENVIRONMENTS):
        samples = environment(data, env)
        against = (samples.labels != samples.colors).float().mean()
        ones, red = samples.labels.mean(), samples.colors.float().mean()
        print(f"| {name} | {len(samples)} | {ones:.1%} | {red:.1%} | {against:.1%} |")


def draw(data: Dataset) -> Figure:
    """A row of the first images for each environment."""
    figure = Figure(figsize=(9.5, 3.6), layout="constrained")
    figure.suptitle(
        f"The first {COLUMNS} images of each environment, and their labels y: 0 for the digits "
        "0 to 4 and 1 for 5 to 9, but one in five is flipped.\nColour ≠ y: the share of all images "
        "that are green where y = 1, or red where y = 0.",
        fontsize=9,
    )
    grid = figure.subplots(len(ENVIRONMENTS), COLUMNS)
    for env, (name, axes) in enumerate(zip(ENVIRONMENTS, grid, strict=True)):
        samples = environment(data, env)
        against = (samples.labels != samples.colors).float().mean()
        axes[0].text(-6, 14, f"{name}\ncolour ≠ y: {against:.0%}", ha="right", va="center")
        some = samples[torch.arange(COLUMNS)]
        images = F.pad(some.images.movedim(1, 3), (0, 1))  # blue is 0
        for axis, image, label in zip(axes, images, some.labels, strict=True):
            axis.imshow(image.numpy())
            axis.set_title(f"y = {label:.0f}", fontsize=9)
            axis.axis("off")
    return figure


def main() -> None:
    parser = script_parser(__doc__, "samples.png", scheduler=False)
    seed = "seed of the data (default: 1234)"
    parser.add_argument("--seed", type=number(int, 0, 2**32 - 1), default=1234, help=seed)
    args = parser.parse_args()
    check_writable(args.figure)
    data = fresh_data(args.seed)
    report(data)
    save_figure(draw(data), args.figure)


if __name__ == "__main__":
    run_command(main)
