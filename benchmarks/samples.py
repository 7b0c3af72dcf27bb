"""Grid of images, with a row for each environment and the label y above each image.

python benchmarks/samples.py
"""

from jobs import fresh_data, print_table, save_figure, script_parser
from matplotlib.figure import Figure
from torch.nn import functional as F

from dataset import Dataset, Samples
from preprocessing import ENVIRONMENTS, number, run_command

COLUMNS = 12


def environment(data: Dataset, env: int) -> Samples:
    """Return the samples of train1, train2 or test: env 0, 1 or 2."""
    return data.test if env == 2 else data.training[data.training.envs == env]


def differing(samples: Samples) -> float:
    """Return the fraction of samples whose colour differs from the label."""
    return (samples.labels != samples.colors).float().mean().item()


def report(data: Dataset) -> None:
    lines = []
    for env, name in enumerate(ENVIRONMENTS):
        samples = environment(data, env)
        ones, red = samples.labels.mean(), samples.colors.float().mean()
        fractions = [f"{value:.1%}" for value in (ones, red, differing(samples))]
        lines.append([name, len(samples), *fractions])
    print_table(["environment", "images", "y = 1", "red", "colour ≠ y"], lines)


def draw(data: Dataset) -> Figure:
    """Draw the first images of each environment."""
    figure = Figure(figsize=(9.5, 3.6), layout="constrained")
    figure.suptitle(
        f"The first {COLUMNS} images of each environment and their labels y: 0 for the digits 0 to "
        "4 and 1 for 5 to 9, but one in five is flipped.\nColour ≠ y: the fraction of images that "
        "are green where y = 1, or red where y = 0.",
        fontsize=9,
    )
    grid = figure.subplots(len(ENVIRONMENTS), COLUMNS)
    for env, (name, axes) in enumerate(zip(ENVIRONMENTS, grid, strict=True)):
        samples = environment(data, env)
        title = f"{name}\ncolour ≠ y: {differing(samples):.0%}"
        axes[0].text(-6, 14, title, ha="right", va="center")
        some = samples[:COLUMNS]
        images = F.pad(some.images.movedim(1, 3), (0, 1))  # blue is 0
        for axis, image, label in zip(axes, images, some.labels, strict=True):
            axis.imshow(image.numpy())
            axis.set_title(f"y = {label:.0f}", fontsize=9)
            axis.axis("off")
    return figure


def main() -> None:
    parser = script_parser(__doc__, "samples.png", scheduler=False)
    parser.add_argument(
        "--seed", type=number(int, 0), default=1234, help="seed of the data (default: 1234)"
    )
    args = parser.parse_args()
    data = fresh_data(args.seed)
    report(data)
    save_figure(draw(data), args.figure)


if __name__ == "__main__":
    run_command(main)
