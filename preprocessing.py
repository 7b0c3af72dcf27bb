"""MNIST → the three environments of ColoredMNIST, as files; and what all commands share.

python preprocessing.py --dataset_path data --p_f 0.2 --p_e 0.1 0.4 0.9 --seed 1234
"""

import argparse
import gc
import inspect
import math
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Annotated, Literal, get_args, get_origin

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

ENVIRONMENTS = ("train1", "train2", "test")
P_F, P_E = 0.2, (0.1, 0.4, 0.9)
MNIST = Path(__file__).parent / "data" / "mnist.npz"


class UserError(Exception):
    """A mistake that the user can mend; the message is the one line that they see."""


def refuse(condition: object, reason: str) -> None:
    """Raise UserError with the reason if the condition holds."""
    if condition:
        raise UserError(reason)


def number(kind: type, low: float, high: float = math.inf, above: bool = False) -> Callable:
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


def flags(function: Callable) -> Iterator[tuple[str, dict]]:
    """Yield (name, options) of a flag for each default; types are hints, help is in docstrings."""
    found = re.findall(r"^ {4}(\w+): (.*(?:\n {5,}.*)*)", inspect.getdoc(function) or "", re.M)
    for name, parameter in inspect.signature(function, eval_str=True).parameters.items():
        default, hint = parameter.default, parameter.annotation
        if default is parameter.empty or name == "channels":  # what --grayscale decides
            continue
        options = {"type": hint if hint in (int, float, str) else type(default)}
        if isinstance(default, bool):
            options = {"action": argparse.BooleanOptionalAction if default else "store_true"}
        elif get_origin(hint) is Literal:
            options["choices"] = get_args(hint)
        elif get_origin(hint) is Annotated:
            options["type"] = hint.__metadata__[0]
            if isinstance(default, tuple):
                options["nargs"] = "+" if ... in get_args(hint.__origin__) else len(default)
        described = " ".join(dict(found).get(name, f"of {function.__name__}").split())
        yield name, options | {"default": default, "help": described.replace("%", "%%")}


Count = Annotated[int, number(int, 1)]
Amount = Annotated[float, number(float, 0)]
Positive = Annotated[float, number(float, 0, above=True)]
Proportion = Annotated[float, number(float, 0, 1)]
DropRate = Annotated[float, number(float, 0, 0.99)]
Seed = Annotated[int, number(int, 0, 2**32 - 1)]


@contextmanager
def written_whole(path: Path, lock: FileLock | None = None) -> Iterator[Path]:
    """Yield where to write a file or folder; a clean exit renames it. UserError if that fails."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with lock or nullcontext(), ExitStack() as leftovers:  # one at a time, if locked
            remove(partial)  # of a run that was killed
            leftovers.callback(remove, partial)
            yield partial
            if partial.exists():
                partial.replace(path)
    except (OSError, RuntimeError) as error:  # torch.save raises the latter on a full disk
        reason = "the disk may be full" if "inline_container" in str(error) else error
        raise UserError(f"cannot write {path}: {reason}".split("\n")[0]) from None


def remove(path: Path) -> None:
    """Delete a file or a folder, if it exists."""
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def load_mnist(part: str = "train") -> tuple[Tensor, Tensor]:
    """MNIST's "train" or "test" images (N, 28, 28) and digits (N,), uint8; UserError if damaged."""
    try:
        with np.load(MNIST) as archive:
            return tuple(torch.from_numpy(archive[f"{axis}_{part}"]) for axis in "xy")
    except Exception:  # whatever damaged bytes may provoke
        raise UserError(f"{MNIST} is missing or damaged: get it again with the project") from None


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
    rgb[torch.arange(len(digits)), (~colors).long()] = images
    return {"images": rgb, "labels": labels.to(torch.uint8), "colors": colors.to(torch.uint8)}


def draw_environments(
    dataset_path: Path = Path("data"),
    *,
    p_f: Proportion = P_F,
    p_e: Annotated[tuple[float, float, float], number(float, 0, 1)] = P_E,
    sizes: Annotated[tuple[int, int, int], number(int, 2)] = (20000, 20000, 20000),
    shuffle_digits: bool = False,
    seed: Seed = 1234,
) -> bool:
    """Draw `dataset_path`/ColoredMNIST unless it has files: True if drawn, UserError if that fails.

    Args:
        dataset_path: folder of the folder ColoredMNIST
        p_f: probability of flipping a label, 0 to 1
        p_e: probabilities that the colour is not the label, 0 to 1, of train1, train2 and test
        sizes: digits of train1, train2 and test, in MNIST's order
        shuffle_digits: shuffle those of train1 and train2 together before they are divided
        seed: seed of all random draws
    """
    folder = dataset_path / "ColoredMNIST"
    refuse((dataset_path / "test.pt").exists(), "--dataset_path is the folder around ColoredMNIST")
    if any(folder.glob("*")):
        return False
    generator = torch.Generator().manual_seed(seed)
    images, digits = load_mnist()
    total = sum(sizes)
    refuse(total > len(digits), f"--sizes adds up to {total}, and there are {len(digits)} digits")
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


def run_command(main: Callable[[], None]) -> None:
    """Call a script's `main`; a user's mistake, Ctrl-C and a full disk end it in one line."""
    script = Path(sys.argv[0]).name
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
        if error.filename is not None:  # that of a file, not of standard output
            raise
        sys.stdout = None
        sys.exit(f"{script}: cannot write its output: {error.strerror or error}")


def main() -> None:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.description = "Draw the three environments of ColoredMNIST."
    for name, options in flags(draw_environments):
        parser.add_argument(f"--{name}", **options)
    args = parser.parse_args()
    folder = args.dataset_path / "ColoredMNIST"
    refuse(not draw_environments(**vars(args)), f"{folder} is there: delete it, or name another")
    print(f"Drawn: {folder}")


if __name__ == "__main__":
    run_command(main)
