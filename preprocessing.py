"""MNIST → the three environments of ColoredMNIST as files, and those files read back, checked.

python preprocessing.py --dataset_path data --p_f 0.2 --p_e 0.1 0.4 0.9 --seed 1234
"""

import argparse
import io
import json
import math
import os
import shutil
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

ENVIRONMENTS = ("train1", "train2", "test")
P_F = 0.2
P_E = (0.1, 0.4, 0.9)
SIZES = (20000, 20000, 20000)
# Of the value / 255, in the red and the green channel; blue is 0 throughout.
MEAN, STD = 0.1307, 0.3081
BUNDLED_MNIST = Path(__file__).parent / "data" / "mnist.npz"


class UserError(Exception):
    """A mistake that the user can mend; the message is the one line that they see."""


def need(condition: bool, otherwise: str) -> None:
    """Raise UserError with the message `otherwise` unless the condition holds."""
    if not condition:
        raise UserError(otherwise)


class Digits(NamedTuple):
    """Coloured digits as they are stored, and the environment that each belongs to."""

    pixels: Tensor  # (N, 28, 28) uint8, grey levels, shown in the channel of the colour
    labels: Tensor  # (N,) uint8, y
    colors: Tensor  # (N,) uint8, z: 1 red, 0 green
    envs: Tensor  # (N,) int64: 0 train1, 1 train2, 2 test


class Dataset(NamedTuple):
    """What a folder of files holds; `validation` is None where the user splits `train` anew."""

    train: Digits
    validation: Digits | None
    test: Digits
    description: str


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path to write a file or folder at; a clean exit renames it to `path`.

    A lock beside `path` admits one writer at a time, so whatever lies at the path to write at is
    the leftover of a run that was killed, and is removed. UserError if writing fails.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        make_folder(path.parent)
        with FileLock(path.with_name(".lock")):
            try:
                remove(partial)
                yield partial
                if partial.exists():
                    os.replace(partial, path)
            finally:
                remove(partial)
    except (OSError, RuntimeError) as error:  # torch.save raises the latter on a full disk
        raise UserError(f"cannot write {path}: {one_line(error)}") from None


def make_folder(path: Path) -> None:
    """Make a folder and its parents, where they are missing; UserError if that fails."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {path}: {error.strerror}") from None


def remove(path: Path) -> None:
    """Delete a file or a folder, if it exists."""
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def one_line(error: Exception) -> str:
    """The first line of an error's message, or what it means where torch's own is no help."""
    if "inline_container" in str(error):
        return "torch could not write all of it; the disk may be full"
    return str(error).strip().split("\n")[0]


def load_mnist(dataset_path: Path) -> tuple[Tensor, Tensor]:
    """The MNIST training set: images (60000, 28, 28) uint8 and digits (60000,) uint8.

    Read from `mnist.npz` in `dataset_path` or else the one that comes with the project; where there
    is none, downloaded by torchvision and kept as `mnist.npz` in `dataset_path`.
    """
    path = dataset_path / "mnist.npz"
    if not path.exists():
        path = BUNDLED_MNIST if BUNDLED_MNIST.exists() else download_mnist(path)
    try:
        with np.load(path) as archive:
            images, digits = archive["x_train"], archive["y_train"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path} is damaged ({error}): replace or delete it") from None
    whole = images.shape == (60000, 28, 28) and digits.shape == (60000,)
    whole = whole and images.dtype == np.uint8
    need(whole, f"{path} does not hold the 60000 MNIST training images: replace it")
    return torch.from_numpy(images), torch.from_numpy(digits.astype(np.uint8))


def download_mnist(path: Path) -> Path:
    """Have torchvision download MNIST; save it at `path`, and return that."""
    from torchvision.datasets import MNIST  # seconds to import, so only where it is needed

    print(f"No {path}: downloading MNIST", file=sys.stderr)
    with replacing(path.with_name(".MNIST")) as folder:
        try:
            mnist = MNIST(folder, train=True, download=True)
        except (RuntimeError, OSError, ValueError, EOFError) as error:
            reason = f"MNIST could not be downloaded ({one_line(error)})"
            remedy = f"put mnist.npz into {path.parent}, or train1.pt, train2.pt and test.pt into"
            raise UserError(f"{reason}: {remedy} {path.parent / 'ColoredMNIST'}") from None
        remove(folder)
    with replacing(path) as partial, open(partial, "wb") as file:
        np.savez_compressed(file, x_train=mnist.data.numpy(), y_train=mnist.targets.numpy())
    return path


def color_digits(
    images: Tensor, digits: Tensor, p_f: float, p_e: float, generator: torch.Generator
) -> dict[str, Tensor]:
    """One environment (assignment, data set): digits → RGB images, labels and colours.

    Args:
        images: (N, 28, 28) uint8 grey levels.
        digits: (N,) which digit each image shows.
        p_f: probability that the label is not that of the digit (0 for 0-4, 1 for 5-9).
        p_e: probability that the colour id is not the label.
        generator: what the flips are drawn from.

    Returns:
        "images" (N, 3, 28, 28), "labels" (N,) and "colors" (N,), all uint8; colour 1 is red.
    """
    count = len(digits)
    labels = (digits >= 5) ^ (torch.rand(count, generator=generator) < p_f)
    colors = labels ^ (torch.rand(count, generator=generator) < p_e)
    rgb = torch.zeros(count, 3, 28, 28, dtype=torch.uint8)
    rgb[torch.arange(count), (~colors).long()] = images
    return {"images": rgb, "labels": labels.to(torch.uint8), "colors": colors.to(torch.uint8)}


def make_dataset(
    dataset_path: Path,
    p_f: float = P_F,
    p_e: Sequence[float] = P_E,
    seed: int = 1234,
    sizes: Sequence[int] = SIZES,
    shuffle_digits: bool = False,
) -> Path:
    """Draw `dataset_path`/ColoredMNIST, unless that folder has files already; return the folder.

    Each environment is a part of MNIST, in its order unless those of training are to be shuffled.
    Raises UserError if there is nothing to draw from, or no place to write to.
    """
    folder = dataset_path / "ColoredMNIST"
    if any(folder.glob("*")):
        return folder
    generator = torch.Generator().manual_seed(seed)
    images, digits = load_mnist(dataset_path)
    if shuffle_digits:
        order = torch.randperm(sum(sizes[:2]), generator=generator)
        for part in (images, digits):
            part[: len(order)] = part[order]
    images, digits = (part[: sum(sizes)].split(list(sizes)) for part in (images, digits))
    drawn = {"p_f": p_f, "p_e": list(p_e), "seed": seed, "shuffle_digits": shuffle_digits}
    with replacing(folder) as partial:
        # Another run may have made it while this one waited for the lock.
        if not any(folder.glob("*")):
            partial.mkdir()
            for name, *part, flip in zip(ENVIRONMENTS, images, digits, p_e, strict=True):
                record = color_digits(*part, p_f, flip, generator)
                torch.save(record | drawn, partial / f"{name}.pt")
            if folder.exists():
                folder.rmdir()
    return folder


IMAGES = "its images are not RGB of 28 x 28, or not of the type they should have"


class PickledImage:
    """Stands for PIL.Image.Image when a stranger's file is read: keeps the pixels, runs nothing."""

    def __setstate__(self, state: list) -> None:
        _, mode, size, _, self.data = state[:5]
        need(mode == "RGB" and tuple(size) == (28, 28) and len(self.data) == 3 * 28 * 28, IMAGES)


def check_archive(data: bytes) -> None:
    """Raise UserError unless `data` is, byte for byte, an archive as torch.save writes it.

    torch.load does not compare the checksums of the members, and no checksum covers the frame
    around them; so the frame is made anew from what the archive says that it holds, and compared.
    Its records are those of the ZIP format (PKWARE, APPNOTE.TXT, section 4.3), constants torch's.
    """
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = sorted(archive.infolist(), key=lambda member: member.header_offset)
    position, directory = 0, b""
    for member in members:
        name = member.filename.encode()
        (extra,) = struct.unpack_from("<H", data, position + 28)
        header = struct.pack("<4s5H3I2H", b"PK\3\4", 0, 0x808, *[0] * 6, len(name), extra) + name
        header += struct.pack("<2sH", b"FB", extra - 4) + b"Z" * (extra - 4)
        start = position + len(header)
        crc = zlib.crc32(memoryview(data)[start : start + member.file_size])
        sizes = struct.pack("<3I", crc, member.file_size, member.file_size)
        end = start + member.file_size
        need(data[position:start] == header, "its frame is damaged")
        need(data[end : end + 16] == b"PK\7\b" + sizes, "its contents are damaged")
        directory += struct.pack("<4s6H", b"PK\1\2", 0, 0, 0x808, 0, 0, 0) + sizes
        directory += struct.pack("<5H2I", len(name), 0, 0, 0, 0, 0, position) + name
        position = end + 16
    count, size = len(members), len(directory)
    ends = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 798, 45, 0, 0, count, count, size, position)
    ends += struct.pack("<4sIQI", b"PK\6\7", 0, position + size, 1)
    ends += struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, count, count, size, position, 0)
    need(data[position:] == directory + ends, "its table of contents is damaged")


def read_environment(path: Path, env: int | None) -> tuple[Digits, dict]:
    """The digits in a .pt file of any known form, and how they were drawn, if it says so.

    The project's own form is a dict, the course project's a list of (image, label, colour); the
    course framework's is [images, labels] or, where `env` is None, [images, labels, environments],
    with images as (N, 2352) normalised floats, whose grey levels are recovered exactly.

    Raises UserError, naming the file and the remedy, if it is damaged or holds anything else.
    """
    try:
        data = path.read_bytes()
        check_archive(data)
        with torch.serialization.safe_globals([(PickledImage, "PIL.Image.Image")]):
            record = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
        drawn = {}
        if isinstance(record, dict):
            images, labels, colors = (record[key] for key in ("images", "labels", "colors"))
            need(images.shape[1:] == (3, 28, 28), IMAGES)
            drawn = {key: record.get(key) for key in ("p_f", "p_e", "seed")}
            drawn["shuffle_digits"] = record.get("shuffle_digits", False)
            json.dumps(drawn)  # raises TypeError unless they are plain numbers, to be compared
        elif isinstance(record[0], Tensor):
            images, labels, *envs = record
            need(len(envs) == (env is None), f"it is not a list of {2 + (env is None)} tensors")
            need(images.is_floating_point() and images.shape[1:] == (2352,), IMAGES)
            levels = (images[:, :1568] * STD + MEAN) * 255
            pixels = levels.round().nan_to_num(-1)
            exact = (levels - pixels).abs().max() <= 0.05 and 0 <= pixels.min() <= pixels.max()
            normalised = exact and pixels.max() <= 255 and not images[:, 1568:].any()
            need(normalised, "its images are not normalised as the assignment says")
            images = pixels.to(torch.uint8).view(-1, 2, 28, 28)
            colors = images[:, 0].flatten(1).any(1)
        else:
            images, labels, colors = zip(*record, strict=True)
            typed = {*map(type, labels)} == {int} and {*map(type, colors)} == {bool}
            need(typed, "it does not hold tuples of (image, label as int, colour as bool)")
            images = bytearray(b"".join(image.data for image in images))
            images = torch.frombuffer(images, dtype=torch.uint8).view(-1, 28, 28, 3).movedim(3, 1)
            labels, colors = torch.tensor(labels), torch.tensor(colors)
        envs = torch.full((len(labels),), env) if env is not None else envs[0]
        return check_digits(images, labels, colors, envs), drawn
    except Exception as error:  # whatever a stranger's bytes may provoke
        known = isinstance(error, (UserError, OSError))
        reason = error if known else "it is damaged, or of no known form"
        raise UserError(
            f"{path} cannot be used ({reason}): replace it, or delete {path.parent} to draw it anew"
        ) from None


def check_digits(images: Tensor, labels: Tensor, colors: Tensor, envs: Tensor) -> Digits:
    """Images (N, channels, 28, 28) as Digits; UserError for other shapes, types or values."""
    need(images.dtype == torch.uint8, IMAGES)
    need(len(images) >= 2, "it needs two images or more")
    for name, values, high in (("labels", labels, 1), ("colours", colors, 1), ("envs", envs, 2)):
        need(values.shape == images.shape[:1], f"its {name} are not one number for each image")
        need(values.long().eq(values).all(), f"its {name} are not whole numbers")
        need(values.min() >= 0 and values.max() <= high, f"its {name} are not from 0 to {high}")
    pixels = images[torch.arange(len(images)), 1 - colors.long()]
    alone = images.count_nonzero() == pixels.count_nonzero()
    need(alone, "a digit is not in its colour's channel alone")
    return Digits(pixels, labels.to(torch.uint8), colors.to(torch.uint8), envs.long())


def concatenate(parts: Sequence[Digits]) -> Digits:
    return Digits(*map(torch.cat, zip(*parts, strict=True)))


def load_dataset(
    dataset_path: str | Path,
    p_f: float | None = None,
    p_e: Sequence[float] | None = None,
    data_seed: int | None = None,
    seed: int = 1234,
    sizes: Sequence[int] | None = None,
    shuffle_digits: bool | None = None,
) -> Dataset:
    """The data in `dataset_path`/ColoredMNIST, drawn first if there is none.

    Args:
        dataset_path: folder that holds, or is to hold, the folder ColoredMNIST.
        p_f, p_e: probabilities as in `color_digits`, one p_e for each of train1, train2 and test.
        data_seed: what it is to have been drawn with.
        seed: what it is drawn with where that is None.
        sizes: digits of train1, train2 and test.
        shuffle_digits: shuffle the digits of train1 and train2 together before they are divided.

    What is None is taken as it is found, and drawn as the assignment says.

    Raises UserError if the files are damaged, of no known form, or drawn otherwise than asked.
    """
    total, most = sum(sizes or SIZES), sum(SIZES)
    need(total <= most, f"--sizes adds up to {total}, and there are {most} digits")
    asked = {"p_f": p_f, "p_e": p_e and [*p_e], "seed": data_seed, "sizes": sizes and [*sizes]}
    asked["shuffle_digits"] = shuffle_digits
    asked = {name: value for name, value in asked.items() if value is not None}
    folder = make_dataset(Path(dataset_path), **{"seed": seed} | asked)
    anew = "delete it to draw it anew, or give another --dataset_path"
    present = {path.stem for path in folder.glob("*.pt")}
    names = {name: env for env, name in enumerate(ENVIRONMENTS)}
    framework = {"train", "val", "test"} <= present and not names.keys() <= present
    names = {"train": None, "val": None, "test": 2} if framework else names
    missing = ", ".join(f"{name}.pt" for name in names if name not in present)
    need(not missing, f"{folder} lacks {missing}: put it there, or {anew}")
    read = (read_environment(folder / f"{name}.pt", env) for name, env in names.items())
    digits, (drawn, *others) = zip(*read, strict=True)
    need(others == [drawn, drawn], f"{folder} mixes files of different draws: {anew}")
    sizes_found = torch.cat([part.envs for part in digits]).bincount(minlength=3).tolist()
    found = drawn | {"sizes": sizes_found}
    for name, value in asked.items():
        has = f"{folder} has {name} {found.get(name)}, asked for is {value}"
        need(name not in found or found[name] == value, f"{has}: {anew}")
    form = "lists of (image, label, colour) (the course project's form)"
    if framework:
        form = "normalised tensors (the course framework's form), split as given"
    if drawn:
        form = "drawn with " + ", ".join(f"{name} {value}" for name, value in drawn.items())
    train, validation, test = digits if framework else (concatenate(digits[:2]), None, digits[2])
    both = all(part.labels.min() < part.labels.max() for part in (train, test))
    need(both, f"{folder} has images of one label only: {anew}")
    return Dataset(train, validation, test, f"{folder}, {form}")


class ColoredMNIST(torch.utils.data.Dataset):
    """The data with torchvision's dataset interface, for a training loop of one's own.

    Args:
        root: folder that holds, or is to hold, the folder ColoredMNIST.
        env: "train1", "train2", "test" or "all_train".
        transform: applied to the PIL image.
        target_transform: applied to the label.

    Items are (image, target, colour): target 0 or 1, colour 1 for red and 0 for green.
    """

    def __init__(
        self,
        root: str | Path = "./data",
        env: str = "train1",
        transform: Callable | None = None,
        target_transform: Callable | None = None,
    ):
        if env not in (*ENVIRONMENTS, "all_train"):
            raise ValueError(f"env {env!r} is none of train1, train2, test, all_train")
        digits = concatenate([part for part in load_dataset(root)[:3] if part is not None])
        chosen = digits.envs < 2 if env == "all_train" else digits.envs == ENVIRONMENTS.index(env)
        self.digits = Digits(*(field[chosen] for field in digits))
        self.transform = transform or (lambda image: image)
        self.target_transform = target_transform or (lambda target: target)

    def __len__(self) -> int:
        return len(self.digits.labels)

    def __getitem__(self, index: int) -> tuple:
        from PIL import Image

        target, color = int(self.digits.labels[index]), int(self.digits.colors[index])
        rgb = np.zeros((28, 28, 3), np.uint8)
        rgb[..., 1 - color] = self.digits.pixels[index].numpy()
        return self.transform(Image.fromarray(rgb)), self.target_transform(target), color


def draw_samples(dataset_path: Path, figure_path: Path) -> None:
    """Save a grid of digits: a row for each environment, each digit's label y above it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for name, axes in zip(ENVIRONMENTS, figure.subplots(len(ENVIRONMENTS), 12), strict=True):
        environment = ColoredMNIST(dataset_path, name)
        flipped = (environment.digits.labels != environment.digits.colors).float().mean()
        axes[0].text(-6, 14, f"{name}\ncolour ≠ y: {flipped:.0%}", ha="right", va="center")
        for i, axis in enumerate(axes):
            axis.axis("off")
            if i < len(environment):
                image, label, _ = environment[i]
                axis.imshow(image)
                axis.set_title(f"y = {label}", fontsize=9)
    save_figure(figure, figure_path)


def save_figure(figure, path: str | Path) -> None:
    """Save a matplotlib figure as a PNG; the folder is made if it is missing."""
    with replacing(Path(path)) as partial:
        figure.savefig(partial, format="png", dpi=120)
    print(f"Figure: {path}")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, but for those that are worked out later."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


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


class Parser(argparse.ArgumentParser):
    """The arguments that all command lines share: those of the data.

    Shows defaults in --help, and says what is wrong with an argument in one line (status 2).
    """

    def __init__(self, description: str):
        super().__init__(description=description, formatter_class=HelpFormatter, allow_abbrev=False)
        add, share, names = self.add_argument, number(float, 0, 1), ("TRAIN1", "TRAIN2", "TEST")
        add("--dataset_path", default="./data", help="folder of ColoredMNIST")
        add("--p_f", type=share, default=P_F, help="probability of flipping a label, 0 to 1")
        each = "probabilities that colour is not the label, 0 to 1"
        add("--p_e", type=share, nargs=3, default=P_E, metavar=names, help=each)
        each = f"digits of each environment, {sum(SIZES)} in all at most (default: {SIZES[0]} each)"
        add("--sizes", type=number(int, 2), nargs=3, metavar=names, help=each)
        shuffled = "shuffle the digits of TRAIN1 and TRAIN2 together before they are divided"
        add("--shuffle_digits", action="store_true", help=shuffled)

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: {message}\n")


def run(main: Callable[[], None]) -> None:
    """Call a command line's `main`, then exit; a user's mistake and Ctrl-C end in one line."""
    script = Path(sys.argv[0]).name
    try:
        main()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)  # Python itself would take torch apart first, for a third of a second.
    except UserError as error:
        sys.exit(f"{script}: {error}")
    except KeyboardInterrupt:
        print(f"{script}: interrupted", file=sys.stderr)
        sys.exit(130)
    except OSError as error:  # standard output: its reader left, or its disk is full
        sys.stdout = None
        sys.exit(f"{script}: cannot write: {error.strerror}")


def main() -> None:
    parser = Parser("Draw the three environments of ColoredMNIST and show samples of them.")
    add, seed = parser.add_argument, number(int, 0, 2**63 - 1)
    add("--seed", dest="data_seed", metavar="SEED", type=seed, help="what to draw with")
    add("--figure", help="PNG of sample digits (default: samples.png in the folder)")
    drawing = vars(parser.parse_args())
    path, figure = Path(drawing["dataset_path"]), drawing.pop("figure")
    print(load_dataset(**drawing).description)
    draw_samples(path, Path(figure or path / "samples.png"))


if __name__ == "__main__":
    run(main)
