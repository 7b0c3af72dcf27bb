"""MNIST → the three environments of ColoredMNIST, as files; and what all commands share.

python preprocessing.py --dataset_path data --p_f 0.2 --p_e 0.1 0.4 0.9 --seed 1234
"""

import argparse
import contextlib
import gc
import math
import os
import shutil
import socket
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

ENVIRONMENTS = ("train1", "train2", "test")
P_F, P_E, SIZES = 0.2, (0.1, 0.4, 0.9), (20000, 20000, 20000)
DATA = Path(__file__).resolve().parent / "data"


def color_digits(
    images: Tensor, digits: Tensor, p_f: float, p_e: float, generator: torch.Generator
) -> dict[str, Tensor]:
    """One environment: MNIST's images (N, 28, 28) and digits (N,), coloured (assignment, data set).

    A label is that of its digit (0 for 0-4, 1 for 5-9), flipped with probability `p_f`; a colour
    id, 1 for red, is the label, flipped with probability `p_e`. All are uint8, images RGB.
    """
    labels = (digits >= 5) ^ (torch.rand(len(digits), generator=generator) < p_f)
    colors = labels ^ (torch.rand(len(digits), generator=generator) < p_e)
    rgb = torch.zeros(len(digits), 3, 28, 28, dtype=torch.uint8)
    rgb[colors, 0] = images[colors]
    rgb[~colors, 1] = images[~colors]
    return {"images": rgb, "labels": labels.to(torch.uint8), "colors": colors.to(torch.uint8)}


def draw_environments(
    dataset_path: Path = Path("data"),
    *,
    p_f: float = P_F,
    p_e: tuple[float, float, float] = P_E,
    sizes: tuple[int, int, int] = SIZES,
    shuffle_digits: bool = False,
    seed: int = 1234,
) -> bool:
    """Draw the files of `dataset_path`/ColoredMNIST unless it has files; returns whether it drew.

    Raises UserError if that fails.

    Args:
        dataset_path: folder that contains ColoredMNIST
        p_f: probability of flipping a label, 0 to 1
        p_e: probabilities that the colour is not the label, 0 to 1, of train1, train2 and test
        sizes: digits of train1, train2 and test, in MNIST's order
        shuffle_digits: shuffle those of train1 and train2 together before they are divided
        seed: seed of all random draws
    """
    folder = dataset_path / "ColoredMNIST"
    if folder.is_symlink():
        folder = folder.resolve()
    if (dataset_path / "test.pt").exists():
        raise UserError("--dataset_path is the folder around ColoredMNIST, not that folder itself")
    if folder.is_file():
        raise UserError(f"{folder} is a file, and a folder is to be drawn there: move it away")
    if has_files(folder):
        return False
    generator = torch.Generator().manual_seed(seed)
    images, digits = load_mnist()
    if sum(sizes) > len(digits):
        raise UserError(f"--sizes adds up to {sum(sizes)}, and there are {len(digits)} digits")
    order = torch.arange(sum(sizes))
    if shuffle_digits:
        training = sizes[0] + sizes[1]
        order[:training] = torch.randperm(training, generator=generator)
    drawn = {
        "p_f": p_f,
        "p_e": list(p_e),
        "sizes": list(sizes),
        "shuffle_digits": shuffle_digits,
        "seed": seed,
    }
    with written_whole(folder) as partial, FileLock(dataset_path / ".lock"):
        if has_files(folder):  # another run drew it while this one waited for the lock
            return False
        partial.mkdir()
        for environment, part, flip in zip(ENVIRONMENTS, order.split(sizes), p_e, strict=True):
            record = color_digits(images[part], digits[part], p_f, flip, generator)
            record |= drawn | {"environment": environment}
            torch.save(record, partial / f"{environment}.pt")
        # Renamed here, as long as the lock is held.
        if folder.exists():  # with nothing in it but hidden files, such as .gitkeep
            aside = partial.with_suffix(".hidden")
            folder.rename(aside)
            partial.replace(folder)
            for path in aside.iterdir():
                path.replace(folder / path.name)
            aside.rmdir()
        else:
            partial.replace(folder)
    return True


def has_files(folder: Path) -> bool:
    """Whether there is anything in a folder but hidden files, such as .gitkeep or .DS_Store."""
    return any(not path.name.startswith(".") for path in folder.glob("*"))


def load_mnist(part: str = "train") -> tuple[Tensor, Tensor]:
    """MNIST's "train" or "test" images (N, 28, 28) and digits (N,), uint8.

    From data/mnist.npz; without that from torchvision, which reads data/MNIST/raw or downloads it.
    Raises UserError if that fails.
    """
    path = DATA / "mnist.npz"
    if not path.exists():
        return torchvision_mnist(part == "train")
    try:
        with np.load(path) as archive:
            images, digits = archive[f"x_{part}"], archive[f"y_{part}"]
        return torch.from_numpy(images), torch.from_numpy(digits)
    except Exception:  # whatever damaged bytes may provoke
        raise UserError(f"{path} is damaged: get it again with the project") from None


def torchvision_mnist(train: bool) -> tuple[Tensor, Tensor]:
    """The same from torchvision, as the assignment's framework has it."""
    from torchvision.datasets import MNIST  # half a second that only this needs

    raw = DATA / "MNIST" / "raw"
    try:
        try:
            mnist = MNIST(DATA, train)
        except RuntimeError:  # not there, or not all of it
            print("Downloading MNIST", file=sys.stderr)
            with written_whole(raw) as partial:
                try:
                    mnist = MNIST(partial, train, download=True)
                except (RuntimeError, OSError) as error:  # of several lines, for each mirror
                    raise UserError(" ".join(str(error).split())) from None
                raw.mkdir(exist_ok=True)
                for file in Path(mnist.raw_folder).iterdir():
                    file.replace(raw / file.name)
                remove(partial)
        return mnist.data, mnist.targets.to(torch.uint8)
    except Exception as error:  # of the network, or of damaged files
        reason = str(error).split("\n")[0] or type(error).__name__
        raise UserError(
            f"there is no {DATA / 'mnist.npz'}, and MNIST could not be read from {raw} or "
            f"downloaded ({reason}): put mnist.npz into {DATA}, or MNIST's four files into {raw}, "
            "or ready .pt files into the folder ColoredMNIST"
        ) from None


# What all commands share; it stands here, as the list of files is fixed.


class UserError(Exception):
    """A mistake that the user can mend; its message is shown in one line, without a traceback."""


def warn(text: str) -> None:
    """One line on standard error, as standard output is the log."""
    print(f"{Path(sys.argv[0]).name}: warning: {text}", file=sys.stderr)


def number(kind: type, low: float, high: float = math.inf, above: bool = False) -> Callable:
    """An argument type: an int or a float within [low, high], or (low, high] with `above`."""
    what = f"a {'whole ' if kind is int else ''}number {'above' if above else 'from'} {low}"
    if high < math.inf:
        what += f" to {high}"

    def parse(text: str) -> float:
        with contextlib.suppress(ValueError):
            value = kind(text)
            high_enough = low < value if above else low <= value
            if high_enough and value <= high and value != math.inf:
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}")

    return parse


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Write atomically: yield a path beside `path`, which is renamed to `path` after a success.

    What killed runs on this machine left is removed. Raises UserError if it can't be written.
    """
    own = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    partial = path.with_name(f".{path.name}.{own}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for other in path.parent.iterdir():
            if is_leftover(other, path.name):
                remove(other)
        try:
            yield partial
            if partial.exists():
                partial.replace(path)
        finally:
            remove(partial)
    except (OSError, RuntimeError) as error:  # torch.save raises the latter on a full disk
        reason = "the disk may be full" if "inline_container" in str(error) else error
        raise UserError(f"cannot write {path}: {reason}".split("\n")[0]) from None


def is_leftover(path: Path, name: str) -> bool:
    """Whether a path is the partial file or folder of `name` that a killed run left here."""
    if not (path.name.startswith(f".{name}.") and path.name.endswith(".partial")):
        return False
    host_and_process, _, _ = path.name.removeprefix(f".{name}.").rpartition("-")
    host, _, process = host_and_process.rpartition("-")
    return host == socket.gethostname() and process.isdecimal() and not is_running(int(process))


def is_running(process: int) -> bool:
    try:
        os.kill(process, 0)  # signal 0 is only checked
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it runs as another user
    return True


def remove(path: Path) -> None:
    """Delete a file or a folder, if it exists."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def run_command(main: Callable[[], None]) -> None:
    """Call a script's `main`; a user's mistake, Ctrl-C and a full disk end it in one line."""
    script = Path(sys.argv[0]).name
    if hasattr(sys.stdout, "reconfigure"):  # η is not in every encoding: "?" then
        sys.stdout.reconfigure(errors="replace")
    try:
        main()
        sys.stdout.flush()
        gc.freeze()  # or Python, ending, looks through all of torch for garbage: 0.3 s
    except UserError as error:
        sys.exit(f"{script}: {error}")
    except KeyboardInterrupt:
        print(f"{script}: interrupted", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        if error.filename is not None:
            sys.exit(f"{script}: {error.filename}: {error.strerror}")
        sys.stdout = None  # which is what can't be written
        sys.exit(f"{script}: cannot write its output: {error.strerror or error}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Draw the three environments of ColoredMNIST.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add, proportion = parser.add_argument, number(float, 0, 1)
    add("--dataset_path", type=Path, default=Path("data"), help="folder that contains ColoredMNIST")
    add("--p_f", type=proportion, default=P_F, help="probability of flipping a label")
    flip = "probabilities that the colour is not the label, of train1, train2 and test"
    add("--p_e", type=proportion, nargs=3, default=P_E, help=flip)
    sizes = "digits of train1, train2 and test, in MNIST's order"
    add("--sizes", type=number(int, 2), nargs=3, default=SIZES, help=sizes)
    shuffle = "shuffle the digits of train1 and train2 together before they are divided"
    add("--shuffle_digits", action="store_true", help=shuffle)
    add("--seed", type=number(int, 0, 2**32 - 1), default=1234, help="seed of all random draws")
    args = parser.parse_args()
    if not draw_environments(**vars(args)):
        folder = args.dataset_path / "ColoredMNIST"
        raise UserError(f"{folder} is there: delete it, or name another --dataset_path")
    print(f"Drawn: {args.dataset_path / 'ColoredMNIST'}")


if __name__ == "__main__":
    run_command(main)
