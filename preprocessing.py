"""MNIST → the three environments of ColoredMNIST, as files.

python preprocessing.py --dataset_path data --p_f 0.2 --p_e 0.1 0.4 0.9 --seed 1234
"""

import argparse
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

ENVIRONMENTS = ("train1", "train2", "test")
P_F = 0.2
P_E = (0.1, 0.4, 0.9)
SIZES = (20000, 20000, 20000)
BUNDLED_MNIST = Path(__file__).parent / "data" / "mnist.npz"


class UserError(Exception):
    """A mistake that the user can mend; the message is the one line that they see."""


def refuse(condition: object, reason: str) -> None:
    """Raise UserError with the reason if the condition holds."""
    if condition:
        raise UserError(reason)


@contextmanager
def written_whole(path: Path, lock: FileLock | None = None) -> Iterator[Path]:
    """Yield a path beside `path` to write a file or folder at; a clean exit renames it to `path`.

    Where several runs may write at once, `lock` lets them in one by one. Raises UserError if
    writing fails.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with lock or nullcontext():
            try:
                remove(partial)  # of a run that was killed
                yield partial
                if partial.exists():
                    os.replace(partial, path)
            finally:
                remove(partial)
    except (OSError, RuntimeError) as error:  # torch.save raises the latter on a full disk
        reason = "the disk may be full" if "inline_container" in str(error) else error
        raise UserError(f"cannot write {path}: {reason}".split("\n")[0]) from None


def remove(path: Path) -> None:
    """Delete a file or a folder, if it exists."""
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def load_mnist(dataset_path: Path, part: str = "train") -> tuple[Tensor, Tensor]:
    """MNIST's "train" or "test" part: images (N, 28, 28) uint8 and digits (N,) uint8.

    Read from `mnist.npz` in `dataset_path` or else the one that comes with the project; where there
    is none, torchvision downloads MNIST to `dataset_path`. UserError if none of that works.
    """
    path = dataset_path / "mnist.npz"
    path = path if path.exists() else BUNDLED_MNIST
    try:
        if path.exists():
            with np.load(path) as archive:
                images, digits = (torch.from_numpy(archive[f"{axis}_{part}"]) for axis in "xy")
        else:
            from torchvision.datasets import MNIST  # seconds to import, so only where it is needed

            with redirect_stdout(sys.stderr):
                mnist = MNIST(dataset_path, train=part == "train", download=True)
            images, digits = mnist.data, mnist.targets
        count = {"train": 60000, "test": 10000}[part]
        if images.shape != (count, 28, 28) or images.dtype != torch.uint8 or len(digits) != count:
            raise ValueError(f"not MNIST's {part} part")
    except Exception as error:  # of a damaged file, or of the network
        source = f"{path} is damaged" if path.exists() else "MNIST could not be downloaded"
        reason, folder = str(error).strip().split("\n")[0], dataset_path / "ColoredMNIST"
        remedy = f"put mnist.npz into {dataset_path}, or train1.pt, train2.pt and test.pt into"
        raise UserError(f"{source} ({reason}): {remedy} {folder}") from None
    return images, digits.to(torch.uint8)


def color_digits(
    images: Tensor, digits: Tensor, p_f: float, p_e: float, generator: torch.Generator
) -> dict[str, Tensor]:
    """One environment: MNIST's images (N, 28, 28) uint8 and digits (N,), coloured.

    A label is that of its digit (0 for 0-4, 1 for 5-9), but flipped with probability `p_f`; a
    colour id is the label, but flipped with probability `p_e` (assignment, data set).

    Returns:
        "images" (N, 3, 28, 28), "labels" (N,) and "colors" (N,), all uint8; colour 1 is red.
    """
    count = len(digits)
    labels = (digits >= 5) ^ (torch.rand(count, generator=generator) < p_f)
    colors = labels ^ (torch.rand(count, generator=generator) < p_e)
    rgb = torch.zeros(count, 3, 28, 28, dtype=torch.uint8)
    rgb[torch.arange(count), (~colors).long()] = images
    return {"images": rgb, "labels": labels.to(torch.uint8), "colors": colors.to(torch.uint8)}


def draw_environments(
    dataset_path: Path,
    p_f: float = P_F,
    p_e: Sequence[float] = P_E,
    sizes: Sequence[int] = SIZES,
    shuffle_digits: bool = False,
    seed: int = 1234,
) -> bool:
    """Draw `dataset_path`/ColoredMNIST, unless that folder has files already; say whether it did.

    Each of train1, train2 and test has its `p_e` and its size, and is a part of MNIST in its order,
    unless `shuffle_digits` has those of train1 and train2 shuffled before they are divided.

    Raises UserError if there is nothing to draw from, or no place to write to.
    """
    folder = dataset_path / "ColoredMNIST"
    if any(folder.glob("*")):
        return False
    total, most = sum(sizes), sum(SIZES)
    refuse(total > most, f"--sizes adds up to {total}, and there are {most} digits")
    generator = torch.Generator().manual_seed(seed)
    images, digits = load_mnist(dataset_path)
    order = torch.arange(total)
    if shuffle_digits:
        order[: sum(sizes[:2])] = torch.randperm(sum(sizes[:2]), generator=generator)
    drawn = {"p_f": p_f, "p_e": list(p_e), "seed": seed, "shuffle_digits": shuffle_digits}
    with written_whole(folder, FileLock(dataset_path / ".lock")) as partial:
        if any(folder.glob("*")):  # another run drew it while this one waited for the lock
            return False
        partial.mkdir()
        for name, part, flip in zip(ENVIRONMENTS, order.split(list(sizes)), p_e, strict=True):
            record = color_digits(images[part], digits[part], p_f, flip, generator)
            torch.save(record | drawn, partial / f"{name}.pt")
    return True


def number(
    kind: type, low: float, high: float = math.inf, above: bool = False
) -> Callable[[str], float]:
    """An argument type: an int or a float within [low, high], or (low, high] with `above`."""
    bounds = f"{'above' if above else 'from'} {low}" + (f" to {high}" if high < math.inf else "")
    what = f"a {'whole ' if kind is int else ''}number {bounds}"

    def parse(text: str) -> float:
        with suppress(ValueError):
            value = kind(text)
            if (low < value if above else low <= value) and value <= high and value != math.inf:
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}")

    return parse


def run_command(main: Callable[[], None]) -> None:
    """Call a script's `main`; a user's mistake, Ctrl-C and a full disk end it in one line."""
    script = Path(sys.argv[0]).name
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        sys.exit(f"{script}: {error}")
    except KeyboardInterrupt:
        print(f"{script}: interrupted", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        if error.filename is not None:  # that of a file, not of standard output
            raise
        sys.stdout = None
        sys.exit(f"{script}: cannot write its output: {error.strerror or error}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Draw the three environments of ColoredMNIST.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add, share, names = parser.add_argument, number(float, 0, 1), ("TRAIN1", "TRAIN2", "TEST")
    add("--dataset_path", type=Path, default="data", help="folder of the folder ColoredMNIST")
    add("--p_f", type=share, default=P_F, help="probability of flipping a label, 0 to 1")
    each = "probabilities that the colour is not the label, 0 to 1"
    add("--p_e", type=share, nargs=3, default=P_E, metavar=names, help=each)
    each = "digits of each environment"
    add("--sizes", type=number(int, 2), nargs=3, default=SIZES, metavar=names, help=each)
    shuffled = "shuffle the digits of TRAIN1 and TRAIN2 together before they are divided"
    add("--shuffle_digits", action="store_true", help=shuffled)
    add("--seed", type=number(int, 0, 2**32 - 1), default=1234, help="seed of all random draws")
    args = parser.parse_args()
    folder = args.dataset_path / "ColoredMNIST"
    there = not draw_environments(**vars(args))
    refuse(there, f"{folder} is there: delete it to draw it anew, or name another folder")
    print(f"Drawn: {folder}")


if __name__ == "__main__":
    run_command(main)
