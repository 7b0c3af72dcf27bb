"""Files of ColoredMNIST → digits on the device, and minibatches of them."""

import json
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from preprocessing import ENVIRONMENTS, UserError, draw_environments

# Of the value / 255, in the red and the green channel; blue is 0 throughout.
MEAN, STD = 0.1307, 0.3081
CHUNK = 2000  # images made into floats at a time when all of them are passed through a network


class Batch(NamedTuple):
    """Samples as networks and losses take them."""

    images: Tensor  # (N, channels · 784) float32, normalised
    labels: Tensor  # (N,) float32, y: 0 or 1
    colors: Tensor  # (N,) int64, z: 1 red, 0 green
    envs: Tensor  # (N,) int64, e: 0 train1, 1 train2, 2 test


@dataclass
class Digits:
    """Coloured digits as bytes, kept where they are used. `digits[index]` is a part of them.

    The blue channel is left out: it is 0 in every image, also once normalised, so that no weight
    that reads it has an effect or a gradient.
    """

    images: Tensor  # (N, 2, 28, 28) uint8, red and green; (N, 1, 28, 28) without colour
    labels: Tensor  # (N,) float32
    colors: Tensor  # (N,) int64
    envs: Tensor  # (N,) int64

    def each(self, change: Callable[[Tensor], Tensor]) -> "Digits":
        return Digits(*(change(getattr(self, field.name)) for field in fields(self)))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor) -> "Digits":
        return self.each(lambda tensor: tensor[index.to(tensor.device)])

    def to(self, device: torch.device) -> "Digits":
        return self.each(lambda tensor: tensor.to(device))

    def recolored(self) -> "Digits":
        """The same digits in the other colour: channels exchanged."""
        return Digits(self.images.flip(1), self.labels, 1 - self.colors, self.envs)

    def grayscale(self) -> "Digits":
        """The same digits without colour: the brighter channel."""
        return Digits(self.images.amax(1, keepdim=True), self.labels, self.colors, self.envs)

    def chunks(self) -> Iterator[Batch]:
        """All digits in order, `CHUNK` at a time, as `batches` gives them."""
        return self.batches(torch.arange(len(self)).split(CHUNK))

    def minibatches(self, size: int, shift: int = 0) -> Iterator[Batch]:
        """Endless minibatches, as `batches` gives them; all of them are smaller if there are fewer.

        Each pass through the digits is without replacement and in a new order; what is left of it
        below `size` is dropped. Each minibatch is moved, by up to `shift` pixels up or down and as
        many to the left or right.
        """
        size = min(size, len(self))

        def indices() -> Iterator[Tensor]:
            while True:
                yield from torch.randperm(len(self))[: len(self) // size * size].split(size)

        return self.batches(indices(), shift)

    def batches(self, indices: Iterable[Tensor], shift: int = 0) -> Iterator[Batch]:
        """The digits at each of `indices` (N,). Each batch overwrites the images of the last one.

        For speed: asking the system for new memory takes longer than filling it.
        """
        floats = None
        for index in indices:
            index = index.to(self.images.device)
            images = self.images.index_select(0, index)
            if shift:
                images = images.roll(torch.randint(-shift, shift + 1, (2,)).tolist(), (2, 3))
            if floats is None or len(floats) != len(index):
                floats = torch.empty_like(images, dtype=torch.float32)
            floats.copy_(images).sub_(255 * MEAN).div_(255 * STD)
            yield Batch(floats.flatten(1), self.labels[index], self.colors[index], self.envs[index])


def concatenate(parts: Iterable[Digits]) -> Digits:
    """Several sets of digits as one, in their order."""
    parts = list(parts)
    return Digits(*(torch.cat([getattr(p, field.name) for p in parts]) for field in fields(Digits)))


class Dataset(NamedTuple):
    """What a folder of files holds."""

    training: Digits  # train1 and train2
    validation: Digits | None  # None where the user holds digits out of `training`
    test: Digits
    description: str

    def to(self, device: torch.device, grayscale: bool = False) -> "Dataset":
        """The same on a device, and without colour if `grayscale`."""
        parts = (digits and digits.to(device) for digits in self[:3])
        return Dataset(*((d.grayscale() if d and grayscale else d) for d in parts), self[3])

    def hold_out(self, proportion: float) -> tuple[Digits, Digits | None]:
        """Digits to train on and digits for validation: drawn at random, unless the files say."""
        count = len(self.training)
        if self.validation is not None or not proportion or count < 2:
            return self.training, self.validation
        order, kept = (
            torch.randperm(count),
            count - min(max(1, round(proportion * count)), count - 1),
        )
        return self.training[order[:kept]], self.training[order[kept:]]


def load_dataset(dataset_path: str | Path, seed: int = 1234) -> Dataset:
    """The data in `dataset_path`/ColoredMNIST; where there are none, drawn first with `seed`.

    Raises UserError if the files are damaged or of no known form.
    """
    folder = Path(dataset_path) / "ColoredMNIST"
    draw_environments(Path(dataset_path), seed=seed)
    anew = "delete it to draw it anew, or give another --dataset_path"
    present = {path.stem for path in folder.glob("*.pt")}
    names = {name: env for env, name in enumerate(ENVIRONMENTS)}
    framework = {"train", "val", "test"} <= present and not names.keys() <= present
    names = {"train": None, "val": None, "test": 2} if framework else names
    missing = ", ".join(f"{name}.pt" for name in names if name not in present)
    if missing:
        raise UserError(f"{folder} lacks {missing}: put it there, or {anew}")
    digits, forms = zip(*(read_file(folder / f"{n}.pt", e) for n, e in names.items()), strict=True)
    if len(set(forms)) > 1:
        raise UserError(f"{folder} mixes files of different draws or forms: {anew}")
    training, validation, test = digits
    if not framework:
        training, validation = concatenate(digits[:2]), None
    if any(part.labels.min() == part.labels.max() for part in (training, test)):
        raise UserError(f"{folder} has images of one label only: {anew}")
    return Dataset(training, validation, test, f"{folder}, {forms[0]}")


def read_file(path: Path, env: int | None) -> tuple[Digits, str]:
    """The digits in a .pt file of any known form, and what form that is.

    The project's own form is a dict, the course project's a list of (image, label, colour); the
    course framework's is [images, labels] or, where `env` is None, [images, labels, environments].

    Raises UserError, naming the file and the remedy, if it is damaged or holds anything else.
    """
    try:
        checked = zipfile.is_zipfile(path)
        if checked:  # torch.load does not compare the checksums of what it reads
            with zipfile.ZipFile(path) as archive:
                refuse(archive.testzip() is not None, "its checksums do not fit")
        with torch.serialization.safe_globals(STAND_INS):
            record = torch.load(path, weights_only=True, map_location="cpu")
        if isinstance(record, dict):
            digits, form = read_own_form(record)
        elif isinstance(record[0], Tensor):
            refuse(len(record) != 2 + (env is None), f"it has {len(record)} tensors")
            digits, form = read_framework_form(*record)
        else:
            digits, form = read_course_project_form(record)
        if env is not None:
            digits.envs = torch.full((len(digits),), env)
        check(digits, environments=2 if env is None else 3)
        unchecked = "" if checked else ", in torch's old format, which has no checksums"
        return digits, form + unchecked
    except Exception as error:  # whatever a stranger's bytes may provoke
        known = isinstance(error, (UserError, OSError))
        reason = error if known else "it is damaged, or of no known form"
        raise UserError(
            f"{path} cannot be used ({reason}): replace it, or delete {path.parent} to draw it anew"
        ) from None


def refuse(condition: bool, reason: str) -> None:
    """Raise UserError with the reason if the condition holds."""
    if condition:
        raise UserError(reason)


def read_own_form(record: dict) -> tuple[Digits, str]:
    """What `preprocessing.draw_environments` wrote."""
    drawn = {key: record.get(key) for key in ("p_f", "p_e", "shuffle_digits", "seed")}
    form = ", ".join(f"{key} {json.dumps(value)}" for key, value in drawn.items())
    return rgb_digits(record["images"], record["labels"], record["colors"]), f"drawn with {form}"


def read_framework_form(images: Tensor, labels: Tensor, *envs: Tensor) -> tuple[Digits, str]:
    """(N, 2352) normalised floats, whose grey levels are recovered exactly."""
    refuse(not images.is_floating_point() or images.shape[1:] != (2352,), IMAGES)
    levels = (images[:, :1568] * STD + MEAN) * 255
    grey = levels.round().nan_to_num(-1)
    exact = (levels - grey).abs().max() <= 0.05 and grey.min() >= 0 and grey.max() <= 255
    normalised = exact and not images[:, 1568:].any()
    refuse(not normalised, "its images are not normalised as the assignment says")
    rgb = torch.cat([grey.to(torch.uint8), torch.zeros(len(grey), 784, dtype=torch.uint8)], 1)
    rgb = rgb.view(-1, 3, 28, 28)
    digits = rgb_digits(rgb, labels, rgb[:, 0].flatten(1).any(1))
    digits.envs = envs[0].long() if envs else digits.envs
    return digits, "normalised tensors (the course framework's form), split as given"


def read_course_project_form(record: list) -> tuple[Digits, str]:
    """Tuples of (PIL image, label, colour); the latter may be NumPy's numbers as well."""
    images, labels, colors = zip(*record, strict=True)
    kinds = {*map(type, labels)} <= {int}, {*map(type, colors)} <= {bool}
    refuse(kinds != (True, True), "it does not hold tuples of (image, int label, bool colour)")
    pixels = bytearray(b"".join(image.data for image in images))
    rgb = torch.frombuffer(pixels, dtype=torch.uint8).view(-1, 28, 28, 3).movedim(3, 1)
    form = "lists of (image, label, colour) (the course project's form)"
    return rgb_digits(rgb, torch.tensor(labels), torch.tensor(colors)), form


IMAGES = "its images are not RGB of 28 x 28, or not of the type they should have"


def rgb_digits(images: Tensor, labels: Tensor, colors: Tensor) -> Digits:
    """RGB images (N, 3, 28, 28) uint8 as Digits of environment 0; UserError if blue is not 0."""
    refuse(images.dtype != torch.uint8 or images.shape[1:] != (3, 28, 28), IMAGES)
    refuse(bool(images[:, 2].any()), "a digit is not in its colour's channel alone")
    envs = torch.zeros(len(images), dtype=torch.int64)
    return Digits(images[:, :2].contiguous(), labels, colors.long(), envs)


def check(digits: Digits, environments: int) -> None:
    """Raise UserError for shapes or values that digits don't have; labels become float32."""
    refuse(len(digits.images) < 2, "it needs two images or more")
    highest = {"labels": 1, "colors": 1, "envs": environments - 1}
    for name, high in highest.items():
        values = getattr(digits, name)
        refuse(values.shape != digits.images.shape[:1], f"its {name} are not one for each image")
        refuse(not values.long().eq(values).all(), f"its {name} are not whole numbers")
        refuse(values.min() < 0 or values.max() > high, f"its {name} are not from 0 to {high}")
    other = digits.images[torch.arange(len(digits)), digits.colors]
    refuse(bool(other.any()), "a digit is not in its colour's channel alone")
    digits.labels = digits.labels.float()


class PickledImage:
    """Stands for PIL.Image.Image when a stranger's file is read: keeps the pixels, runs nothing."""

    def __setstate__(self, state: list) -> None:
        _, mode, size, _, self.data = state[:5]
        wrong = mode != "RGB" or tuple(size) != (28, 28) or len(self.data) != 3 * 28 * 28
        refuse(wrong, IMAGES)


class PickledType:
    """Stands for numpy.dtype: keeps its name, such as "i8"."""

    def __init__(self, name: str, *_):
        self.name = name

    def __setstate__(self, state: tuple) -> None:
        refuse(state[1] == ">", "its numbers are big-endian")


def pickled_number(kind: PickledType, data: bytes) -> int | bool:
    """Stands for NumPy's constructor of scalars: integers and booleans as Python's own."""
    refuse(kind.name[0] not in "iub", "it has numbers that are neither integers nor booleans")
    value = int.from_bytes(data, "little", signed=kind.name[0] == "i")
    return bool(value) if kind.name[0] == "b" else value


STAND_INS = [(PickledImage, "PIL.Image.Image"), (PickledType, "numpy.dtype")]
for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
    STAND_INS.append((pickled_number, f"{module}.scalar"))


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
        digits = concatenate(part for part in load_dataset(root)[:3] if part is not None)
        chosen = digits.envs < 2 if env == "all_train" else digits.envs == ENVIRONMENTS.index(env)
        self.digits = digits[chosen]
        self.transform = transform or (lambda image: image)
        self.target_transform = target_transform or (lambda target: target)

    def __len__(self) -> int:
        return len(self.digits)

    def __getitem__(self, index: int) -> tuple:
        from PIL import Image

        target, color = int(self.digits.labels[index]), int(self.digits.colors[index])
        rgb = torch.zeros(28, 28, 3, dtype=torch.uint8)
        rgb[..., :2] = self.digits.images[index].movedim(0, 2)
        return self.transform(Image.fromarray(rgb.numpy())), self.target_transform(target), color
