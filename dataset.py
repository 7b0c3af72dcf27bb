"""Files of ColoredMNIST → digits on the device, and minibatches of them."""

import itertools
import json
import warnings
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from preprocessing import ENVIRONMENTS, UserError, draw_environments, refuse

MEAN, STD = 0.1307, 0.3081  # of value / 255, red and green; blue is 0 throughout
RGB = "its images are not two or more RGB ones of 28 x 28, or not of the type they should have"
CHUNK = 2000  # images made into floats at a time when all of them are passed through a network


class Batch(NamedTuple):
    """Samples as networks and losses take them."""

    images: Tensor  # (N, channels · 784) float32, normalised
    labels: Tensor  # (N,) float32, y: 0 or 1
    colors: Tensor  # (N,) int64, z: 1 red, 0 green
    envs: Tensor  # (N,) int64, e: 0 train1, 1 train2, 2 test


@dataclass
class Digits:
    """Digits as bytes on the device; blue, 0 in each, would give its weights no gradient."""

    images: Tensor  # (N, 2, 28, 28) uint8, red and green; (N, 1, 28, 28) without colour
    labels: Tensor  # (N,) float32
    colors: Tensor  # (N,) int64
    envs: Tensor  # (N,) int64

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor) -> "Digits":
        return Digits(*(t[index.to(t.device)] for t in vars(self).values()))

    def recolored(self) -> "Digits":
        """The same digits in the other colour: channels exchanged."""
        return Digits(self.images.flip(1), self.labels, 1 - self.colors, self.envs)

    def grayscale(self) -> "Digits":
        """The same digits without colour: the brighter channel."""
        return Digits(self.images.amax(1, keepdim=True), self.labels, self.colors, self.envs)

    def chunks(self) -> Iterator[Batch]:
        """All digits in order, as batches of nearly the same size, `CHUNK` at most."""
        return self.batches(torch.arange(len(self)).chunk(-(-len(self) // CHUNK)))

    def minibatches(self, size: int, shift: int = 0) -> Iterator[Batch]:
        """Endless minibatches of `size`, or of all digits if they are fewer.

        A pass has a new order and drops its remainder; a minibatch moves by up to `shift` pixels.
        """
        size, count = min(size, len(self)), len(self)
        passes = (torch.randperm(count)[: count // size * size] for _ in itertools.count())
        return self.batches((index for order in passes for index in order.split(size)), shift)

    def batches(self, indices: Iterable[Tensor], shift: int = 0) -> Iterator[Batch]:
        """The digits at each of `indices` (N,); each overwrites the images of the one before."""
        floats = None  # for all batches, as filling is faster than allocating
        for index in indices:
            index = index.to(self.images.device)
            images = self.images.index_select(0, index)
            if shift:  # what leaves on the right, black in most digits, enters on the left
                down, right = torch.randint(-shift, shift + 1, (2,)).tolist()
                images = images.flatten(2).roll(28 * down + right, 2).view_as(images)
            if floats is None or len(floats) != len(index):
                floats = torch.empty_like(images, dtype=torch.float32)
                black = floats.new_tensor(-MEAN / STD)
            torch.add(black, floats.copy_(images), alpha=1 / (255 * STD), out=floats)
            yield Batch(floats.flatten(1), self.labels[index], self.colors[index], self.envs[index])


def concatenate(parts: Iterable[Digits]) -> Digits:
    """Several sets of digits as one, in their order."""
    return Digits(*map(torch.cat, zip(*(vars(part).values() for part in parts), strict=True)))


class Dataset(NamedTuple):
    """What a folder of files holds."""

    training: Digits  # train1 and train2
    validation: Digits | None  # None where `hold_out` takes digits from `training`
    test: Digits
    description: str

    def hold_out(self, proportion: float) -> tuple[Digits, Digits | None]:
        """Digits to train on and digits for validation: drawn at random, unless the files say."""
        if self.validation is not None or not proportion:
            return self.training, self.validation
        count = len(self.training)
        held_out = min(max(1, round(proportion * count)), count - 1)
        order = torch.randperm(count)
        return self.training[order[held_out:]], self.training[order[:held_out]]


def load_dataset(
    dataset_path: str | Path, seed: int = 1234, grayscale: bool = False, device: str = "cpu"
) -> Dataset:
    """The data in `dataset_path`/ColoredMNIST, drawn if there are none; UserError if damaged."""
    folder = Path(dataset_path) / "ColoredMNIST"
    draw_environments(Path(dataset_path), seed=seed)
    anew = "delete the folder to draw the assignment's, or give another --dataset_path"
    present = {path.stem for path in folder.glob("*.pt")}
    framework = {"train", "val", "test"} <= present and not {*ENVIRONMENTS} <= present
    names = dict(train=None, val=None, test=2) if framework else dict(train1=0, train2=1, test=2)
    missing = ", ".join(f"{name}.pt" for name in names if name not in present)
    refuse(missing, f"{folder} lacks {missing}: add that, or {anew}")
    digits, forms = zip(*(read_file(folder / f"{n}.pt", e) for n, e in names.items()), strict=True)
    digits = [part.grayscale() if grayscale else part for part in digits]
    digits = [Digits(*(tensor.to(device) for tensor in vars(part).values())) for part in digits]
    refuse(len(set(forms)) > 1, f"{folder} mixes files of different draws or forms: {anew}")
    training, validation, test = digits if framework else (concatenate(digits[:2]), None, digits[2])
    one_label = any(part.labels.min() == part.labels.max() for part in (training, test))
    refuse(one_label, f"{folder} has images of one label only: {anew}")
    return Dataset(training, validation, test, f"{folder}, {forms[0]}")


def read_file(path: Path, env: int | None) -> tuple[Digits, str]:
    """The digits in a .pt file of any known form, and what form that is.

    The project's is a dict, the course project's a list of (image, label, colour), the framework's
    [images, labels], with environments if `env` is None. UserError names the file and the remedy.
    """
    try:
        checked = zipfile.is_zipfile(path)
        if checked:  # torch.load does not compare the checksums of what it reads
            with zipfile.ZipFile(path) as archive:
                refuse(archive.testzip(), "its checksums do not fit")
        with torch.serialization.safe_globals(STAND_INS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickles that torch did not write
            record = torch.load(path, weights_only=True, map_location="cpu")
        envs = None
        if isinstance(record, dict):
            images, labels, colors = (record[key] for key in ("images", "labels", "colors"))
            drawn = {key: record.get(key) for key in ("p_f", "p_e", "shuffle_digits", "seed")}
            form = "drawn with " + ", ".join(f"{k} {json.dumps(v)}" for k, v in drawn.items())
        elif isinstance(record[0], Tensor):
            images, labels, envs = record if env is None else (*record, None)
            images, form = denormalized(images), "normalised tensors (the course framework's form)"
            colors = images[:, 0].flatten(1).any(1)
        else:
            images, labels, colors = zip(*record, strict=True)
            _, modes, sizes, _, pixels = zip(*(image.state[:5] for image in images), strict=True)
            refuse({*modes} != {"RGB"} or {*sizes} != {(28, 28)}, RGB)
            images = torch.frombuffer(bytearray(b"".join(pixels)), dtype=torch.uint8)
            images = images.view(-1, 28, 28, 3).movedim(3, 1)
            labels, colors = torch.tensor(labels), torch.tensor(colors)
            form = "tuples of (image, label, colour) (the course project's form)"
        envs = torch.full((len(labels),), env) if envs is None else envs
        form += "" if checked else ", in torch's old format, which has no checksums"
        return digits_of(1 if env is None else 2, images, labels, colors, envs), form
    except Exception as error:  # whatever a stranger's bytes may provoke
        reason = error if isinstance(error, (UserError, OSError)) else "damaged or of unknown form"
        remedy = f"replace it, or delete {path.parent} to draw the assignment's data"
        raise UserError(f"{path} cannot be used ({reason}): {remedy}") from None


def denormalized(images: Tensor) -> Tensor:
    """Normalised floats (N, 2352) → the grey levels that they were, (N, 3, 28, 28) uint8."""
    levels = (images.unflatten(1, (3, 784)) * STD + torch.tensor([[MEAN], [MEAN], [0]])) * 255
    grey = levels.round().clamp(0, 255)
    refuse(not (levels - grey).abs().max() <= 0.05, "its images are not normalised as assigned")
    return grey.to(torch.uint8).view(-1, 3, 28, 28)


def digits_of(last: int, images: Tensor, labels: Tensor, colors: Tensor, envs: Tensor) -> Digits:
    """`Digits` of RGB images, environments from 0 to `last`; UserError for anything else."""
    refuse(images.dtype != torch.uint8 or images.shape[1:] != (3, 28, 28) or len(images) < 2, RGB)
    for name, values, high in (("labels", labels, 1), ("colours", colors, 1), ("envs", envs, last)):
        fit = values.shape == images.shape[:1] and {*values.tolist()} <= {*range(high + 1)}
        refuse(not fit, f"its {name} are not whole numbers from 0 to {high}, one for each image")
    dark = images[torch.arange(len(images)), colors.long()].any() or images[:, 2].any()
    refuse(dark, "a digit is not in its colour's channel alone")
    return Digits(images[:, :2].contiguous(), labels.float(), colors.long(), envs.long())


class StandIn:
    """Stands for PIL.Image.Image and numpy.dtype when a stranger's file is read: runs nothing."""

    def __init__(self, *_): ...

    def __setstate__(self, state: tuple | list) -> None:
        self.state = state


# NumPy's scalars are read as the integers that their bytes are, and checked as others are.
SCALARS = [f"numpy.{core}.multiarray.scalar" for core in ("core", "_core")]
STAND_INS = [(StandIn, "PIL.Image.Image"), (StandIn, "numpy.dtype")]
STAND_INS += [(lambda _, data: int.from_bytes(data, "little"), name) for name in SCALARS]


class ColoredMNIST(torch.utils.data.Dataset):
    """The data with torchvision's dataset interface, for a training loop of one's own.

    `root` is the folder of the folder ColoredMNIST, `env` train1, train2, test or all_train. Items
    are (PIL image, label, colour), the first two transformed, colour 1 for red and 0 for green.
    """

    def __init__(self, root="data", env: str = "train1", transform=None, target_transform=None):
        if env not in (*ENVIRONMENTS, "all_train"):
            raise ValueError(f"env {env!r} is none of train1, train2, test, all_train")
        digits = concatenate(part for part in load_dataset(root)[:3] if part is not None)
        chosen = digits.envs < 2 if env == "all_train" else digits.envs == ENVIRONMENTS.index(env)
        self.digits = digits[chosen]
        self.transform = transform or torch.nn.Identity()
        self.target_transform = target_transform or torch.nn.Identity()

    def __len__(self) -> int:
        return len(self.digits)

    def __getitem__(self, index: int) -> tuple:
        image, label, color, _ = (t[index] for t in vars(self.digits).values())
        rgb = torch.nn.functional.pad(image.movedim(0, 2), (0, 1)).numpy()
        return self.transform(Image.fromarray(rgb)), self.target_transform(int(label)), int(color)
