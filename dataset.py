"""Files of ColoredMNIST → samples on the device, and minibatches of them."""

import itertools
import json
import math
import pickle
import warnings
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from preprocessing import (
    ENVIRONMENTS,
    P_E,
    P_F,
    UserError,
    color_digits,
    draw_environments,
    load_mnist,
)

MEAN, STD = 0.1307, 0.3081  # of value / 255, red and green; blue is 0 throughout
CHUNK = 2000  # images passed through a network at a time when there are many
NOT_RGB = "it must hold two or more RGB images of 28 x 28 pixels, of bytes"
DRAWN_WITH = ("p_f", "p_e", "sizes", "shuffle_digits", "seed")  # as `draw_environments` notes
UNSEEN_SEED = 10000  # the first that is no student number


class Batch(NamedTuple):
    """Samples as networks and losses take them."""

    images: Tensor  # (N, 2, 28, 28) float32, normalised: red and green, as blue is always 0
    labels: Tensor  # (N,) float32, y: 0 or 1
    colors: Tensor  # (N,) int64, z: 1 red, 0 green
    envs: Tensor  # (N,) int64, e: 0 train1, 1 train2, 2 test


@dataclass
class Samples:
    """Samples on the device, images as bytes; indexed by an int, a slice, positions or a mask."""

    images: Tensor  # (N, 2, 28, 28) uint8, red and green
    labels: Tensor  # (N,) float32
    colors: Tensor  # (N,) int64
    envs: Tensor  # (N,) int64

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int | slice | Tensor) -> "Samples":
        """The samples at these positions, or those where a mask is True; IndexError beyond."""
        if isinstance(index, Tensor) and index.dim() > 0:
            index = index.to(self.labels.device)
        elif not isinstance(index, slice):
            position = range(len(self))[index]
            index = slice(position, position + 1)
        return Samples(self.images[index], self.labels[index], self.colors[index], self.envs[index])

    def to(self, device: str | torch.device) -> "Samples":
        """The same samples on a device."""
        return Samples(
            self.images.to(device),
            self.labels.to(device),
            self.colors.to(device),
            self.envs.to(device),
        )

    def recolored(self) -> "Samples":
        """The same digits and labels in the other colour."""
        return Samples(self.images.flip(1), self.labels, 1 - self.colors, self.envs)

    def batch(self) -> Batch:
        """All of these samples as one batch."""
        images = self.images.float().div_(255).sub_(MEAN).div_(STD)
        return Batch(images, self.labels, self.colors, self.envs)

    def chunks(self) -> Iterator[Batch]:
        """All samples in order, in batches of nearly the same size, `CHUNK` at most.

        Nearly the same, as `torch.optim.swa_utils.update_bn` gives all batches the same weight.
        """
        count = math.ceil(len(self) / CHUNK)
        size = math.ceil(len(self) / count)
        for start in range(0, len(self), size):
            yield self[start : start + size].batch()

    def minibatches(self, size: int) -> Iterator[Batch]:
        """Shuffled passes over all samples, without end; a pass's last minibatch is smaller."""
        while True:
            for index in torch.randperm(len(self)).split(size):
                yield self[index].batch()


def concatenate(parts: Iterable[Samples]) -> Samples:
    """Several sets of samples as one, in their order."""
    parts = list(parts)
    return Samples(
        torch.cat([part.images for part in parts]),
        torch.cat([part.labels for part in parts]),
        torch.cat([part.colors for part in parts]),
        torch.cat([part.envs for part in parts]),
    )


class Dataset(NamedTuple):
    """What a folder of files holds."""

    training: Samples  # train1 and train2
    validation: Samples | None  # None where `hold_out` takes samples from `training`
    test: Samples
    folder: Path
    form: str  # what the files are, such as "drawn with p_f 0.2, ..., seed 1234"
    seed: int | None = None  # that they were drawn with, where the files say
    drawn_now: bool = False

    @property
    def description(self) -> str:
        form = self.form.replace("drawn with", "drawn now with") if self.drawn_now else self.form
        return f"{self.folder}, {form}"

    def hold_out(self, proportion: float) -> tuple[Samples, Samples | None]:
        """Samples to train on, and samples for validation.

        A proportion of the training samples, 0 to 1, drawn at random, is held out, unless the files
        have validation samples of their own. At least one remains on either side.
        """
        if self.validation is not None or proportion == 0:
            return self.training, self.validation
        count = len(self.training)
        held_out = min(max(1, round(proportion * count)), count - 1)
        order = torch.randperm(count)
        return self.training[order[held_out:]], self.training[order[:held_out]]


def load_dataset(
    dataset_path: str | Path = "data", seed: int = 1234, device: str | torch.device = "cpu"
) -> Dataset:
    """Load `dataset_path`/ColoredMNIST onto a device; draw it first, with `seed`, if it is absent.

    Raises UserError if the data can't be used.
    """
    folder = Path(dataset_path) / "ColoredMNIST"
    drawn_now = draw_environments(Path(dataset_path), seed=seed)
    anew = "delete the folder to draw the assignment's, or give another --dataset_path"
    present = {path.stem for path in folder.glob("*.pt") if not path.name.startswith(".")}
    if "train1" in present or "train2" in present or "train" not in present:
        envs_of = {"train1": 0, "train2": 1, "test": 2}
    else:  # the course framework's files: its training samples say their environments themselves
        envs_of = {"train": None, "val": None, "test": 2}
    missing = [f"{name}.pt" for name in envs_of if name not in present]
    if missing:
        raise UserError(f"{folder} lacks {', '.join(missing)}: add that, or {anew}")
    others = sorted(f"{name}.pt" for name in present if name not in envs_of)
    if others:
        raise UserError(
            f"{folder} has {', '.join(others)} beside {', '.join(envs_of)}: two training "
            f"environments and one test environment are supported; remove what is more, or {anew}"
        )

    files = {name: read_file(folder / f"{name}.pt", env) for name, env in envs_of.items()}
    if len({form for _, form, _ in files.values()}) > 1:
        raise UserError(f"{folder} mixes files of different draws or forms: {anew}")
    for one, other in itertools.combinations(files, 2):
        if torch.equal(files[one][0].images, files[other][0].images):
            raise UserError(f"{folder} has the same images as {one} and as {other}: {anew}")
    samples = {name: part.to(device) for name, (part, _, _) in files.items()}
    test, (_, form, file_seed) = samples["test"], files["test"]
    if "train1" in samples:
        training, validation = concatenate([samples["train1"], samples["train2"]]), None
    else:
        training, validation = samples["train"], samples["val"]
    if len(training.envs.unique()) < 2:
        raise UserError(f"{folder} has one training environment, and two are needed: {anew}")
    if len(training.labels.unique()) < 2 or len(test.labels.unique()) < 2:
        raise UserError(f"{folder} has images of one label only: {anew}")
    return Dataset(training, validation, test, folder, form, file_seed, drawn_now)


def unseen_samples() -> Samples:
    """A test environment of MNIST's own 10,000 test digits, always the same.

    Nothing is trained on them, and nothing may be chosen by them.
    """
    generator = torch.Generator().manual_seed(UNSEEN_SEED)
    drawn = color_digits(*load_mnist("test"), P_F, P_E[2], generator)
    envs = torch.full((len(drawn["labels"]),), 2)
    return Samples(
        drawn["images"][:, :2].contiguous(), drawn["labels"].float(), drawn["colors"].long(), envs
    )


# Files of the project's own form and of others.


def read_file(path: Path, env: int | None) -> tuple[Samples, str, int | None]:
    """The samples in a .pt file of any known form, what form that is, and the seed if it says.

    The project's own is a dict; the course project's a list of (image, label, colour), other public
    generators' of (image, label) or (image, label, colour, digit); the course framework's is
    [images, labels], with environments where `env` is None. UserError names file and remedy.
    """
    try:
        has_sums = check_sums(path)
        with torch.serialization.safe_globals(STAND_INS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickles that torch did not write
            record = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # whatever a stranger's bytes may provoke
        if isinstance(error, pickle.UnpicklingError) and "Unsupported global" in str(error):
            reason = "whole, but not read, as it holds more than tensors, numbers and images"
        elif isinstance(error, (UserError, OSError)):
            reason = str(error)
        else:
            reason = "damaged"
        raise unusable(path, reason) from None
    try:
        samples, form, seed = samples_of(record, path.stem, env)
    except UserError as error:
        raise unusable(path, str(error)) from None
    except Exception:
        raise unusable(path, f"whole, but of no known form: {described(record)}") from None
    if not has_sums:
        form += ", in torch's old format, which has no checksums"
    return samples, form, seed


def check_sums(path: str | Path) -> bool:
    """Compare a file's checksums, as torch.load does not; False where it has none.

    Those of torch's old format have none. Raises UserError or others if they don't fit.
    """
    with open(path, "rb") as file:
        zipped = file.read(4) == b"PK\x03\x04"  # as torch.load tells its two formats apart
    if zipped:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():
                raise UserError("its checksums do not fit")
    return zipped


def unusable(path: Path, reason: str) -> UserError:
    return UserError(
        f"{path} cannot be used ({reason}): replace it, or move {path.parent} away to draw the "
        "assignment's data"
    )


def described(record: object) -> str:
    """What a file holds: which type, how many entries, and of what type the first one is."""
    text = f"a {type(record).__name__}"
    if isinstance(record, (list, tuple, dict)):
        text += f" of {len(record)} entries"
        if record:
            first = next(iter(record))
            text += f", the first a {type(first).__name__}"
            if isinstance(first, (list, tuple)):
                text += f" of {len(first)}"
    return text


def samples_of(record: object, name: str, env: int | None) -> tuple[Samples, str, int | None]:
    """What a file holds, as `read_file` returns it; raises anything if it is of no known form."""
    if isinstance(record, dict):
        if record.get("environment", name) != name:
            raise UserError(f"it holds the environment {record['environment']}")
        images, labels, colors = record["images"], record["labels"], record["colors"]
        if "sizes" in record and record["sizes"][env] != len(images):
            raise UserError(f"it has {len(images)} images of the {record['sizes'][env]} drawn")
        envs = torch.full((len(images),), env)
        form = form_of_drawn(record)
        return checked_samples(images, labels, colors, envs), form, record.get("seed")
    if isinstance(record[0], Tensor):
        if env is None:
            images, labels, envs = record
            if not set(envs.tolist()) <= {0, 1} or len(envs) != len(images):
                raise UserError("its environments are not 0 or 1, one for each image")
        else:
            images, labels = record
            envs = torch.full((len(images),), env)
        images = denormalized(images)
        colors = images[:, 0].flatten(1).any(1)
        form = "normalised tensors (the course framework's form)"
        return checked_samples(images, labels, colors, envs), form, None
    lengths = {len(entry) for entry in record}
    if lengths not in ({2}, {3}, {4}):
        raise ValueError
    length = lengths.pop()
    images = torch.stack([pixels_of(entry[0]) for entry in record])
    labels = torch.tensor([entry[1] for entry in record])
    colors = images[:, 0].flatten(1).any(1)  # red, where the digit is in the red channel
    if length == 3:
        colors = torch.tensor([entry[2] for entry in record])
    parts = {2: "image, label", 3: "image, label, colour", 4: "image, label, colour, digit"}
    form = f"tuples of ({parts[length]})"
    envs = torch.full((len(images),), env)
    return checked_samples(images, labels, colors, envs), form, None


def form_of_drawn(record: dict) -> str:
    """What files of the project's own are, by what they were drawn with."""
    drawn = [f"{key} {json.dumps(record.get(key))}" for key in DRAWN_WITH]
    return f"drawn with {', '.join(drawn)}"


def pixels_of(image: "StandIn") -> Tensor:
    """The pixels (3, 28, 28) of a PIL image that was read from a file."""
    _, mode, size, _, pixels = image.state[:5]
    if mode != "RGB" or size != (28, 28):
        raise UserError(NOT_RGB)
    return torch.frombuffer(bytearray(pixels), dtype=torch.uint8).view(28, 28, 3).movedim(2, 0)


def denormalized(images: Tensor) -> Tensor:
    """Normalised floats (N, 2352) → the grey levels that they were, (N, 3, 28, 28) uint8."""
    mean = torch.tensor([[MEAN], [MEAN], [0]])
    levels = (images.unflatten(1, (3, 784)) * STD + mean) * 255
    grey = levels.round().clamp(0, 255)
    if not (levels - grey).abs().max() <= 0.05:  # so written, nan is refused as well
        raise UserError("its images are not normalised as assigned")
    return grey.to(torch.uint8).view(-1, 3, 28, 28)


def checked_samples(images: Tensor, labels: Tensor, colors: Tensor, envs: Tensor) -> Samples:
    """`Samples` of RGB images (N, 3, 28, 28) uint8; UserError for anything else."""
    if images.dtype != torch.uint8 or images.shape[1:] != (3, 28, 28) or len(images) < 2:
        raise UserError(NOT_RGB)
    for name, values in (("labels", labels), ("colours", colors)):
        if values.shape != images.shape[:1] or not set(values.tolist()) <= {0, 1}:
            raise UserError(f"its {name} are not 0 or 1, one for each image")
    # Colour 1, red, is channel 0, so the channel whose number is the colour must be empty.
    other_channel = images[torch.arange(len(images)), colors.long()]
    if other_channel.any() or images[:, 2].any():
        raise UserError("a digit is not in its colour's channel alone")
    return Samples(images[:, :2].contiguous(), labels.float(), colors.long(), envs.long())


class StandIn:
    """Stands for PIL.Image.Image and numpy.dtype when a stranger's file is read: runs nothing."""

    def __init__(self, *_): ...

    def __setstate__(self, state: tuple | list) -> None:
        self.state = state


def integer_of(_: object, data: bytes) -> int:
    """Stands for what makes NumPy's scalars: the integer that their bytes are."""
    return int.from_bytes(data, "little")


STAND_INS = [
    (StandIn, "PIL.Image.Image"),
    (StandIn, "PIL.PngImagePlugin.PngImageFile"),
    (StandIn, "numpy.dtype"),
    (integer_of, "numpy.core.multiarray.scalar"),
    (integer_of, "numpy._core.multiarray.scalar"),
]


class ColoredMNIST(torch.utils.data.Dataset):
    """The data with torchvision's dataset interface, for a training loop of one's own.

    `root` is the folder that contains ColoredMNIST, which is drawn with seed 1234 if it is absent;
    `env` is train1, train2, test or all_train. Items are (PIL image, label, colour), the first two
    transformed, colour 1 for red and 0 for green.
    """

    def __init__(self, root="data", env: str = "train1", transform=None, target_transform=None):
        if env not in (*ENVIRONMENTS, "all_train"):
            raise ValueError(f"env {env!r} is none of train1, train2, test, all_train")
        data = load_dataset(root)
        samples = concatenate(
            part for part in (data.training, data.validation, data.test) if part is not None
        )
        if env == "all_train":
            self.samples = samples[samples.envs < 2]
        else:
            self.samples = samples[samples.envs == ENVIRONMENTS.index(env)]
        self.transform = transform
        self.target_transform = target_transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple:
        red_and_green = self.samples.images[index].movedim(0, 2)
        image = Image.fromarray(F.pad(red_and_green, (0, 1)).numpy())
        label, color = int(self.samples.labels[index]), int(self.samples.colors[index])
        if self.transform is not None:
            image = self.transform(image)
        if self.target_transform is not None:
            label = self.target_transform(label)
        return image, label, color
