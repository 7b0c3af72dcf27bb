"""MNIST → the three environments of ColoredMNIST as files, and those files read back, checked.

python preprocessing.py --dataset_path data --p_f 0.2 --p_e 0.1 0.4 0.9 --seed 1234
"""

import argparse
import gc
import io
import math
import os
import pickle
import shutil
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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
    the leftover of a run that was killed, and is removed.
    """
    partial = path.with_name(f".{path.name}.partial")
    with FileLock(path.with_name(".lock")):
        try:
            remove(partial)
            yield partial
            if partial.exists():
                os.replace(partial, path)
        finally:
            remove(partial)


def make_folder(path: Path) -> None:
    """Make a folder and its parents, where they are missing; UserError if that fails."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {path}: {error.strerror}") from None


def remove(path: Path) -> None:
    """Delete a file or a folder, if it exists."""
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def load_mnist(dataset_path: Path) -> tuple[Tensor, Tensor]:
    """The MNIST training set: images (60000, 28, 28) uint8 and digits (60000,) uint8.

    Read from `mnist.npz` in `dataset_path` or else the one that comes with the project; where there
    is none, downloaded by torchvision and kept as `mnist.npz` in `dataset_path`.
    """
    for path in (dataset_path / "mnist.npz", BUNDLED_MNIST):
        if path.exists():
            return read_mnist(path)
    return download_mnist(dataset_path / "mnist.npz")


def read_mnist(path: Path) -> tuple[Tensor, Tensor]:
    try:
        with np.load(path) as archive:
            images, digits = archive["x_train"], archive["y_train"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path} is damaged ({error}): replace or delete it") from None
    if images.shape != (60000, 28, 28) or digits.shape != (60000,) or images.dtype != np.uint8:
        raise UserError(f"{path} does not hold the 60000 MNIST training images: replace it")
    return torch.from_numpy(images), torch.from_numpy(digits.astype(np.uint8))


def download_mnist(path: Path) -> tuple[Tensor, Tensor]:
    from torchvision.datasets import MNIST  # seconds to import, so only where it is needed

    print(f"No {path}: downloading MNIST", file=sys.stderr)
    with replacing(path.with_name(".MNIST")) as folder:
        try:
            mnist = MNIST(folder, train=True, download=True)
        except (RuntimeError, OSError, ValueError, EOFError) as error:
            raise UserError(
                f"MNIST could not be downloaded ({str(error).splitlines()[0]}): put mnist.npz into "
                f"{path.parent}, or train1.pt, train2.pt and test.pt into "
                f"{path.parent / 'ColoredMNIST'}"
            ) from None
        images, digits = mnist.data, mnist.targets.to(torch.uint8)
        remove(folder)
    with replacing(path) as partial, open(partial, "wb") as file:
        np.savez_compressed(file, x_train=images.numpy(), y_train=digits.numpy())
    return images, digits


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


def color_mnist(
    images: Tensor,
    digits: Tensor,
    p_f: float,
    p_e: Sequence[float],
    seed: int,
    sizes: Sequence[int] = SIZES,
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Name and contents of each environment: a part of MNIST, in its order, by `color_digits`."""
    generator = torch.Generator().manual_seed(seed)
    used = sum(sizes)
    parts = zip(images[:used].split(list(sizes)), digits[:used].split(list(sizes)), strict=True)
    for name, part, flip in zip(ENVIRONMENTS, parts, p_e, strict=True):
        yield name, color_digits(*part, p_f, flip, generator)


def make_dataset(
    dataset_path: Path,
    p_f: float = P_F,
    p_e: Sequence[float] = P_E,
    seed: int = 1234,
    sizes: Sequence[int] = SIZES,
) -> Path:
    """Draw `dataset_path`/ColoredMNIST, unless that folder has files already; return the folder.

    Raises UserError if there is nothing to draw from, or no place to write to.
    """
    folder = dataset_path / "ColoredMNIST"
    if is_filled(folder):
        return folder
    try:
        make_folder(dataset_path)
        images, digits = load_mnist(dataset_path)
        with replacing(folder) as partial:
            # Another run may have made it while this one waited for the lock.
            if not is_filled(folder):
                partial.mkdir()
                for name, record in color_mnist(images, digits, p_f, p_e, seed, sizes):
                    drawn = {"p_f": p_f, "p_e": list(p_e), "seed": seed}
                    torch.save(record | drawn, partial / f"{name}.pt")
                if folder.exists():
                    folder.rmdir()
    except (OSError, RuntimeError) as error:  # torch.save raises the latter on a full disk
        raise UserError(f"cannot write {folder}: {one_line(error)}") from None
    return folder


def is_filled(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def one_line(error: Exception) -> str:
    """The first line of an error's message, or what it means where torch's own is no help."""
    if "inline_container" in str(error):
        return "torch could not write all of it; the disk may be full"
    return str(error).strip().split("\n")[0]


class PickledImage:
    """Stands for PIL.Image.Image when a stranger's file is read: keeps the pixels, runs nothing."""

    def __setstate__(self, state: list) -> None:
        _, mode, size, _, data = state[:5]
        if mode != "RGB" or tuple(size) != (28, 28) or len(data) != 3 * 28 * 28:
            raise pickle.UnpicklingError("an image is not RGB, 28 x 28")
        self.data = data


def check_archive(data: bytes) -> None:
    """Raise ValueError unless `data` is, byte for byte, an archive as torch.save writes it.

    torch.load does not compare the checksums of the members, and no checksum covers the frame
    around them; so the frame is made anew from what the archive says that it holds, and compared.
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
        if data[position:start] != header or data[end : end + 16] != b"PK\7\b" + sizes:
            raise ValueError(f"member {member.filename!r} is damaged")
        directory += struct.pack("<4s6H", b"PK\1\2", 0, 0, 0x808, 0, 0, 0) + sizes
        directory += struct.pack("<5H2I", len(name), 0, 0, 0, 0, 0, position) + name
        position = end + 16
    count, size = len(members), len(directory)
    ends = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 798, 45, 0, 0, count, count, size, position)
    ends += struct.pack("<4sIQI", b"PK\6\7", 0, position + size, 1)
    ends += struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, count, count, size, position, 0)
    if data[position:] != directory + ends:
        raise ValueError("its table of contents is damaged")


def read_pt(path: Path) -> object:
    """The object in a .pt file: tensors, numbers, strings, containers and RGB images of 28 x 28.

    Raises UserError if the file is damaged, or holds anything else.
    """
    try:
        data = path.read_bytes()
        check_archive(data)
        with torch.serialization.safe_globals([(PickledImage, "PIL.Image.Image")]):
            return torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    except Exception as error:  # whatever a stranger's bytes may provoke
        if isinstance(error, pickle.UnpicklingError):
            reason = "it holds more than tensors and images of 28 x 28"
        else:
            reason = one_line(error)
        raise refusal(path, reason) from None


def refusal(path: Path, reason: str) -> UserError:
    return UserError(
        f"{path} cannot be used ({reason}): replace it, or delete {path.parent} to draw it anew"
    )


def checked_digits(
    path: Path, images: Tensor, labels: Tensor, colors: Tensor, envs: Tensor
) -> Digits:
    """Images (N, channels, 28, 28) as Digits; UserError for other shapes, types or values."""
    count = len(labels) if isinstance(labels, Tensor) and labels.dim() == 1 else 0
    for name, values in (("labels", labels), ("colours", colors), ("environments", envs)):
        if not isinstance(values, Tensor) or values.shape != (count,):
            raise refusal(path, f"{name} are not a tensor of one number per image")
        if not ((values == 0) | (values == 1) | ((values == 2) & (name == "environments"))).all():
            raise refusal(path, f"{name} are not all 0 or 1")
    if count < 2 or len(images) != count:
        raise refusal(path, "it needs two images or more, and a label for each")
    pixels = images[torch.arange(count), 1 - colors.long()]
    if images.count_nonzero() > pixels.count_nonzero():
        raise refusal(path, "a digit is not in its colour's channel alone")
    return Digits(pixels, labels.to(torch.uint8), colors.to(torch.uint8), envs.long())


def read_environment(path: Path, env: int) -> tuple[Digits, dict]:
    """Digits of one file in the project's form or the course project's, and how it was drawn."""
    record = read_pt(path)
    drawn = {}
    if isinstance(record, dict) and record.keys() >= {"images", "labels", "colors"}:
        images, labels, colors = record["images"], record["labels"], record["colors"]
        drawn = {key: record.get(key) for key in ("p_f", "p_e", "seed")}
    elif isinstance(record, list) and all(is_colored_tuple(entry) for entry in record):
        data = b"".join(image.data for image, _, _ in record)
        images = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0)
        images = images.view(-1, 28, 28, 3).permute(0, 3, 1, 2)
        labels = torch.tensor([label for _, label, _ in record])
        colors = torch.tensor([color for _, _, color in record])
    else:
        raise refusal(
            path, "it is neither this project's form nor a list of (image, label, colour)"
        )
    if not isinstance(images, Tensor) or images.dtype != torch.uint8 or images.dim() != 4:
        raise refusal(path, "its images are not uint8")
    if images.shape[1:] != (3, 28, 28):
        raise refusal(path, "its images are not RGB of 28 x 28")
    return checked_digits(path, images, labels, colors, torch.full((len(images),), env)), drawn


def is_colored_tuple(entry: object) -> bool:
    return (
        isinstance(entry, tuple)
        and len(entry) == 3
        and isinstance(entry[0], PickledImage)
        and isinstance(entry[1], int)
        and isinstance(entry[2], bool)
    )


def read_normalized(path: Path, env: int | None = None) -> Digits:
    """Digits of one file in the course framework's form: [images, labels(, environments)].

    Images are (N, 2352) floats, normalised; their grey levels are recovered exactly.
    """
    record = read_pt(path)
    parts = 2 if env is not None else 3
    if not isinstance(record, (list, tuple)) or len(record) != parts:
        raise refusal(path, f"it is not a list of {parts} tensors")
    images = record[0]
    if not isinstance(images, Tensor) or not images.is_floating_point():
        raise refusal(path, "its images are not floats")
    if images.dim() != 2 or images.shape[1] != 2352:
        raise refusal(path, "its images are not flattened RGB of 28 x 28")
    levels = (images[:, :1568] * STD + MEAN) * 255
    pixels = levels.round().nan_to_num(-1)
    if (levels - pixels).abs().max() > 0.05 or pixels.min() < 0 or pixels.max() > 255:
        raise refusal(path, "its images are not normalised as the assignment says")
    if images[:, 1568:].any():
        raise refusal(path, "its images have a blue channel")
    pixels = pixels.to(torch.uint8).view(-1, 2, 28, 28)
    colors = (pixels[:, 0].flatten(1).sum(1) > 0).to(torch.uint8)
    envs = record[2] if env is None else torch.full((len(images),), env)
    return checked_digits(path, pixels, record[1], colors, envs)


def concatenate(parts: list[Digits]) -> Digits:
    return Digits(*(torch.cat(fields) for fields in zip(*parts, strict=True)))


def load_dataset(
    dataset_path: str | Path,
    p_f: float = P_F,
    p_e: Sequence[float] = P_E,
    seed: int | None = None,
    default_seed: int = 1234,
    sizes: Sequence[int] | None = None,
) -> Dataset:
    """The data in `dataset_path`/ColoredMNIST, drawn first if there is none.

    Args:
        dataset_path: folder that holds, or is to hold, the folder ColoredMNIST.
        p_f, p_e: probabilities as in `color_digits`, one p_e for each of train1, train2 and test.
        seed: what it is drawn with; None takes data drawn with any, and draws with `default_seed`.
        sizes: digits of train1, train2 and test; None takes any, and draws 20000 each.

    Raises UserError if the files are damaged, of no known form, or drawn otherwise than asked.
    """
    if sizes is not None and sum(sizes) > sum(SIZES):
        raise UserError(f"--sizes adds up to {sum(sizes)}, and there are {sum(SIZES)} digits")
    drawing_seed = default_seed if seed is None else seed
    folder = make_dataset(Path(dataset_path), p_f, p_e, drawing_seed, sizes or SIZES)
    present = {path.name for path in folder.glob("*.pt")}
    own, framework = {f"{name}.pt" for name in ENVIRONMENTS}, {"train.pt", "val.pt", "test.pt"}
    if framework <= present and not own <= present:
        train, validation = (read_normalized(folder / name) for name in ("train.pt", "val.pt"))
        test = read_normalized(folder / "test.pt", env=2)
        form = "normalised tensors (the course framework's form), split as given"
    elif own <= present:
        environments, draws = zip(
            *(read_environment(folder / f"{name}.pt", e) for e, name in enumerate(ENVIRONMENTS)),
            strict=True,
        )
        check_drawn_as_asked(folder, draws, {"p_f": p_f, "p_e": list(p_e), "seed": seed})
        train, validation, test = concatenate(environments[:2]), None, environments[2]
        form = "lists of (image, label, colour) (the course project's form)"
        if draws[0]:
            form = "drawn with " + ", ".join(f"{key} {draws[0][key]}" for key in draws[0])
    else:
        raise UserError(
            f"{folder} lacks {', '.join(sorted(own - present))}: put them there, or delete it to "
            "draw it anew"
        )
    parts = [part for part in (train, validation, test) if part is not None]
    found = torch.cat([part.envs for part in parts]).bincount(minlength=3).tolist()
    if sizes is not None and list(sizes) != found:
        raise UserError(
            f"{folder} has environments of {found} digits, asked for are {list(sizes)}: delete it "
            "to draw it anew, or give another --dataset_path"
        )
    for part in (train, test):
        if part.labels.min() == part.labels.max():
            raise UserError(f"{folder} has images of one label only: delete it to draw it anew")
    return Dataset(train, validation, test, f"{folder}, {form}")


def check_drawn_as_asked(folder: Path, draws: tuple[dict, ...], asked: dict) -> None:
    if any(drawn != draws[0] for drawn in draws):
        raise UserError(f"{folder} mixes files of different draws: delete it to draw it anew")
    for key, value in draws[0].items():
        if asked[key] is not None and value != asked[key]:
            raise UserError(
                f"{folder} was drawn with {key} {value}, asked for is {asked[key]}: delete it to "
                "draw it anew, or give another --dataset_path"
            )


def rgb_image(digits: Digits, index: int) -> Tensor:
    """One digit in its colour, (28, 28, 3) uint8."""
    rgb = torch.zeros(28, 28, 3, dtype=torch.uint8)
    rgb[..., 1 - int(digits.colors[index])] = digits.pixels[index]
    return rgb


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
        data = load_dataset(root)
        digits = concatenate([part for part in data[:3] if part is not None])
        chosen = digits.envs < 2 if env == "all_train" else digits.envs == ENVIRONMENTS.index(env)
        self.digits = Digits(*(field[chosen] for field in digits))
        self.transform, self.target_transform = transform, target_transform

    def __len__(self) -> int:
        return len(self.digits.labels)

    def __getitem__(self, index: int) -> tuple:
        from PIL import Image

        image = Image.fromarray(rgb_image(self.digits, index).numpy())
        target = int(self.digits.labels[index])
        if self.transform is not None:
            image = self.transform(image)
        if self.target_transform is not None:
            target = self.target_transform(target)
        return image, target, int(self.digits.colors[index])


def draw_samples(data: Dataset, path: Path) -> None:
    """Save a grid of digits: a row for each environment, each digit's label y above it."""
    from matplotlib.figure import Figure

    digits = concatenate([part for part in data[:3] if part is not None])
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots(len(ENVIRONMENTS), 12)
    for e, name in enumerate(ENVIRONMENTS):
        environment = Digits(*(field[digits.envs == e] for field in digits))
        flipped = (environment.labels != environment.colors).float().mean()
        axes[e, 0].text(-6, 14, f"{name}\ncolour ≠ y: {flipped:.0%}", ha="right", va="center")
        for i, axis in enumerate(axes[e]):
            axis.axis("off")
            if i < len(environment.labels):
                axis.imshow(rgb_image(environment, i).numpy())
                axis.set_title(f"y = {environment.labels[i]}", fontsize=9)
    save_figure(figure, path)


def save_figure(figure, path: str | Path) -> None:
    """Save a matplotlib figure as a PNG; the folder is made if it is missing."""
    path = Path(path)
    try:
        make_folder(path.parent)
        with replacing(path) as partial:
            figure.savefig(partial, format="png", dpi=120)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None
    print(f"Figure: {path}")


class HelpWithDefaults(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, but for those that are worked out later."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """Shows defaults in --help, and says what is wrong with an argument in one line (status 2)."""

    def __init__(self, description: str):
        super().__init__(
            description=description,
            formatter_class=HelpWithDefaults,
            allow_abbrev=False,
        )

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: {message}\n")


def number(
    kind: type, low: float, high: float = math.inf, above: bool = False
) -> Callable[[str], float]:
    """An argument type: an int or a float within [low, high], or (low, high] with `above`."""

    def parse(text: str) -> float:
        bound = f"{'above' if above else 'from'} {low}" + (f" to {high}" if high < math.inf else "")
        wanted = f"{text!r} is not {'a whole' if kind is int else 'a'} number {bound}"
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(wanted) from None
        if not (low < value if above else low <= value) or not value <= high or value == math.inf:
            raise argparse.ArgumentTypeError(wanted)
        return value

    return parse


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    probability = number(float, 0, 1)
    parser.add_argument("--dataset_path", default="./data", help="folder of ColoredMNIST")
    parser.add_argument(
        "--p_f", type=probability, default=P_F, help="probability of flipping a label, 0 to 1"
    )
    parser.add_argument(
        "--p_e",
        type=probability,
        nargs=3,
        default=P_E,
        metavar=("TRAIN1", "TRAIN2", "TEST"),
        help="probabilities that colour is not the label, 0 to 1",
    )
    parser.add_argument(
        "--sizes",
        type=number(int, 2),
        nargs=3,
        metavar=("TRAIN1", "TRAIN2", "TEST"),
        help="digits of each environment, 60000 together at most (default: 20000 each)",
    )


def run(main: Callable[[], None]) -> None:
    """Call a command line's `main`, then exit; a user's mistake and Ctrl-C end in one line."""
    # The thousands of objects of torch live to the end: no need to look through them until then.
    gc.freeze()
    try:
        main()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)  # Python itself would take torch apart first, for a third of a second.
    except UserError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
    except KeyboardInterrupt:
        print(f"{Path(sys.argv[0]).name}: interrupted", file=sys.stderr)
        sys.exit(130)
    except OSError as error:  # standard output: its reader left, or its disk is full
        sys.stdout = None
        sys.exit(f"{Path(sys.argv[0]).name}: cannot write: {error.strerror}")


def main() -> None:
    parser = Parser("Draw the three environments of ColoredMNIST and show samples of them.")
    add_data_arguments(parser)
    parser.add_argument("--seed", type=number(int, 0, 2**63 - 1), help="what to draw with")
    parser.add_argument(
        "--figure", help="PNG of sample digits (default: samples.png in the folder)"
    )
    args = parser.parse_args()
    data = load_dataset(args.dataset_path, args.p_f, args.p_e, args.seed, sizes=args.sizes)
    print(data.description)
    draw_samples(data, Path(args.figure or Path(args.dataset_path) / "samples.png"))


if __name__ == "__main__":
    run(main)
