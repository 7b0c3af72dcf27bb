"""MNIST → the three environments of ColoredMNIST, as files. Helpers that every script uses.

python preprocessing.py --dataset_path data --p_f 0.2 --p_e 0.1 0.4 0.9 --seed 1234
"""

import argparse
import contextlib
import gc
import io
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

ENVIRONMENTS = ("train1", "train2", "test")
P_F, P_E = 0.2, (0.1, 0.4, 0.9)
DATA = Path(__file__).resolve().parent / "data"


def color_digits(
    images: Tensor, digits: Tensor, p_f: float, p_e: float, generator: torch.Generator
) -> dict[str, Tensor]:
    """Colour MNIST images for one environment (assignment, steps 2 to 4).

    The label is 0 for the digits 0-4 and 1 for 5-9, flipped with probability `p_f`. The colour is
    the label, flipped with probability `p_e`. Colour 1 is red, colour 0 is green.

    Args:
        images: grey levels (N, 28, 28), uint8
        digits: (N,), 0 to 9
        p_f: probability of flipping a label
        p_e: probability that the colour differs from the label
        generator: random number generator

    Returns:
        `images` (N, 3, 28, 28), `labels` (N,) and `colors` (N,), all uint8
    """
    labels = (digits >= 5) ^ (torch.rand(len(digits), generator=generator) < p_f)
    colors = labels ^ (torch.rand(len(digits), generator=generator) < p_e)
    rgb = torch.zeros(len(digits), 3, 28, 28, dtype=torch.uint8)
    rgb[colors, 0] = images[colors]
    rgb[~colors, 1] = images[~colors]
    return {"images": rgb, "labels": labels.to(torch.uint8), "colors": colors.to(torch.uint8)}


def generate_environments(
    dataset_path: str | Path = "data",
    *,
    p_f: float = P_F,
    p_e: tuple[float, float, float] = P_E,
    seed: int = 1234,
    sizes: tuple[int, int, int] | None = None,
    shuffle_digits: bool = False,
) -> bool:
    """Generate `dataset_path`/ColoredMNIST if it does not exist. Return True if it was generated.

    Args:
        dataset_path: folder that contains ColoredMNIST
        p_f: probability of flipping a label
        p_e: probability that the colour differs from the label, in train1, train2 and test
        seed: random seed
        sizes: numbers of digits in train1, train2 and test, in MNIST's order; by default, thirds
        shuffle_digits: shuffle the digits of train1 and train2 before they are divided

    Raises:
        UserError: the data cannot be generated or written
    """
    dataset_path = Path(os.path.expanduser(dataset_path))
    folder = dataset_path / "ColoredMNIST"
    if (dataset_path / "test.pt").exists():
        raise UserError(
            f"{dataset_path} is the folder ColoredMNIST itself. "
            f"Pass the folder that contains it: --dataset_path {dataset_path.parent}"
        )
    if is_filled(folder):
        return False
    images, digits = load_mnist()
    sizes = sizes or (len(digits) // 3,) * 3
    generator = torch.Generator().manual_seed(seed)
    order = torch.arange(sum(sizes))
    if shuffle_digits:
        training = sizes[0] + sizes[1]
        order[:training] = torch.randperm(training, generator=generator)
    with replacing(folder) as partial:
        if is_filled(folder):  # another run generated it while this run waited for the lock
            return False
        partial.mkdir()
        for environment, part, flip in zip(ENVIRONMENTS, order.split(sizes), p_e, strict=True):
            record = color_digits(images[part], digits[part], p_f, flip, generator)
            record |= {"environment": environment, "p_f": p_f, "p_e": list(p_e), "seed": seed}
            save(record, partial / f"{environment}.pt")
    return True


def is_filled(folder: Path) -> bool:
    """Return whether a folder has any entries. A folder that does not exist has none."""
    return folder.exists() and any(folder.iterdir())


def load_mnist(part: str = "train") -> tuple[Tensor, Tensor]:
    """Load the images (N, 28, 28) and digits (N,) of MNIST's "train" or "test" part, uint8.

    They come from data/mnist.npz. If this file is missing, torchvision reads data/MNIST/raw or
    downloads MNIST to it.

    Raises:
        UserError: MNIST cannot be loaded
    """
    path = DATA / "mnist.npz"
    if path.exists():
        try:
            with np.load(path) as archive:
                images, digits = archive[f"x_{part}"], archive[f"y_{part}"]
            return torch.from_numpy(images), torch.from_numpy(digits)
        except Exception:  # a corrupt file can raise anything
            raise UserError(f"{path} is corrupt. Get it again with the project.") from None
    try:
        from torchvision.datasets import MNIST

        DATA.mkdir(exist_ok=True)
        with FileLock(DATA / "MNIST.lock"):
            mnist = MNIST(DATA, part == "train", download=True)
        return mnist.data, mnist.targets.to(torch.uint8)
    except Exception as error:  # no network, corrupt files, a torchvision that cannot be imported
        reason = " ".join(str(error).split())
        raise UserError(
            f"MNIST cannot be loaded: {path} is missing, and torchvision failed ({reason}). "
            f"Put mnist.npz into {DATA}, or MNIST's four files into {DATA / 'MNIST' / 'raw'}."
        ) from None


# Helpers for all scripts. They are here because the project's list of files is fixed.


class UserError(Exception):
    """A mistake that the user can correct. `run_command` shows it in one line."""


def warn(text: str) -> None:
    """Print one line on standard error, because standard output is the log."""
    print(f"{Path(sys.argv[0]).name}: warning: {text}", file=sys.stderr)


def number(kind: type, low: float, high: float = 10**9) -> Callable[[str], float]:
    """Return an argparse type: an int or a float from `low` to `high`."""

    def parse(text: str) -> float:
        with contextlib.suppress(ValueError):
            if low <= kind(text) <= high:
                return kind(text)
        whole = "whole " if kind is int else ""
        raise argparse.ArgumentTypeError(f"{text!r} is not a {whole}number from {low} to {high}")

    return parse


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write a file or a folder completely or not at all.

    Yield `path`.tmp, which the caller writes. At the end it replaces `path`. A lock keeps other
    runs out. The next run deletes the leftover of a killed run.

    Raises:
        UserError: the file or folder cannot be written
    """
    partial = path.with_name(f"{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f"{path.name}.lock")):
            if partial.is_dir():
                shutil.rmtree(partial)
            partial.unlink(missing_ok=True)
            yield partial
            if partial.exists():
                os.replace(partial, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None


def save(record: object, path: Path) -> None:
    """Save a record with torch. A full disk raises OSError."""
    buffer = io.BytesIO()  # because torch hides the OSError of a file
    torch.save(record, buffer)
    path.write_bytes(buffer.getvalue())


def run_command(main: Callable[[], None]) -> None:
    """Call a script's `main`. Report a user's mistake, an I/O error and Ctrl-C in one line."""
    script = Path(sys.argv[0]).name
    if hasattr(sys.stdout, "reconfigure"):  # a terminal without Unicode prints "?" for η
        sys.stdout.reconfigure(errors="replace")
    try:
        main()
        sys.stdout.flush()
        gc.freeze()  # saves 0.3 s, because Python does not search torch for garbage at its end
    except UserError as error:
        sys.exit(f"{script}: {error}")
    except KeyboardInterrupt:
        print(f"{script}: interrupted", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        if error.filename is not None:
            sys.exit(f"{script}: {error.filename}: {error.strerror}")
        sys.stdout = None  # standard output itself failed, so Python must not flush it again
        sys.exit(f"{script}: cannot write its output: {error.strerror or error}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Generate the three environments of ColoredMNIST.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add, probability = parser.add_argument, number(float, 0, 1)
    add("--dataset_path", default="data", help="folder that contains ColoredMNIST")
    add("--p_f", type=probability, default=P_F, help="probability of flipping a label")
    add(
        "--p_e",
        type=probability,
        nargs=3,
        default=P_E,
        help="probability that the colour differs from the label, in train1, train2 and test",
    )
    add("--seed", type=number(int, 0), default=1234, help="random seed")
    args = parser.parse_args()
    folder = Path(os.path.expanduser(args.dataset_path)) / "ColoredMNIST"
    if not generate_environments(**vars(args)):
        raise UserError(f"{folder} exists. Delete it, or use another --dataset_path.")
    print(f"Generated: {folder}")


if __name__ == "__main__":
    run_command(main)
