"""A grid of images: a row for each environment, each image's label y above it.

python benchmarks/samples.py

They are of data of its own, drawn with --seed as those of a first run are.
"""

import torch
from jobs import check_writable, fresh_data, save_figure, script_parser
from matplotlib.figure import Figure
from torch.nn import functional as F

from preprocessing import ENVIRONMENTS, number, run_command

COLUMNS = 12


def main() -> None:
    parser = script_parser(__doc__, "samples.png", scheduler=False)
    seed = "seed of the data (default: 1234)"
    parser.add_argument("--seed", type=number(int, 0, 2**32 - 1), default=1234, help=seed)
    args = parser.parse_args()
    check_writable(args.figure)
    data = fresh_data(args.seed)
    figure = Figure(figsize=(9, 4), layout="constrained")
    figure.suptitle(
        f"The first {COLUMNS} images of each environment, and their labels y. A digit below 5 has "
        "y = 0,\nany other y = 1, but for one in five; beside: how often the colour goes against y",
        fontsize=10,
    )
    print("| environment | images | colour is not y: red is 1 | y = 1 | red |")
    print("| --- " * 5 + "|")
    grid = figure.subplots(len(ENVIRONMENTS), COLUMNS)
    for env, (name, axes) in enumerate(zip(ENVIRONMENTS, grid, strict=True)):
        samples = data.test if env == 2 else data.training[data.training.envs == env]
        against = (samples.labels != samples.colors).float().mean()
        ones, red = samples.labels.mean(), samples.colors.float().mean()
        print(f"| {name} | {len(samples)} | {against:.1%} | {ones:.1%} | {red:.1%} |")
        axes[0].text(-6, 14, f"{name}\nagainst y: {against:.0%}", ha="right", va="center")
        some = samples[torch.arange(COLUMNS)]
        images = F.pad(some.images.movedim(1, 3), (0, 1))  # blue is 0
        for axis, image, label in zip(axes, images, some.labels, strict=True):
            axis.imshow(image.numpy())
            axis.set_title(f"y = {label:.0f}", fontsize=9)
            axis.axis("off")
    save_figure(figure, args.figure)


if __name__ == "__main__":
    run_command(main)
