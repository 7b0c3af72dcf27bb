"""Files of ColoredMNIST → samples on a device → minibatches."""

import os
import zipfile
from collections.abc import Callable, Iterator
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
    generate_environments,
    load_mnist,
)

MEAN, STD = 0.1307, 0.3081  # of value / 255 in the red and green channels; blue is always 0
EVALUATION_BATCH_SIZE = 2000
UNSEEN_SEED = 10000  # above the last four digits of every student ID


class Batch(NamedTuple):
    """A batch of normalised samples, the input of networks and losses."""

    images: Tensor  # (N, 2, 28, 28) float32, normalised red and green channels
    labels: Tensor  # (N,) float32, y: 0 or 1
    colors: Tensor  # (N,) int64, z: 1 red, 0 green
    envs: Tensor  # (N,) int64, e: 0 train1, 1 train2, 2 test


@dataclass
class Samples:
    """Samples on a device, with images as bytes."""

    images: Tensor  # (N, 2, 28, 28) uint8, red and green channels
    labels: Tensor  # (N,) float32
    colors: Tensor  # (N,) int64
    envs: Tensor  # (N,) int64

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: slice | Tensor) -> "Samples":
        """Select samples by a slice, by positions (n,) int64, or by a mask (N,) bool."""
        if isinstance(index, Tensor):
            index = index.to(self.labels.device)
        return Samples(self.images[index], self.labels[index], self.colors[index], self.envs[index])

    def to(self, device: str | torch.device) -> "Samples":
        """Return the same samples on a device."""
        return Samples(
            self.images.to(device),
            self.labels.to(device),
            self.colors.to(device),
            self.envs.to(device),
        )

    def recolored(self) -> "Samples":
        """Return the same digits and labels in the other colour."""
        return Samples(self.images.flip(1), self.labels, 1 - self.colors, self.envs)

    def batch(self) -> Batch:
        """Return all samples as one batch, with images (value / 255 − mean) / std."""
        images = self.images.float().div_(255).sub_(MEAN).div_(STD)
        return Batch(images, self.labels, self.colors, self.envs)

    def chunks(self) -> Iterator[Batch]:
        """Yield all samples in order, in batches of the evaluation batch size."""
        for start in range(0, len(self), EVALUATION_BATCH_SIZE):
            yield self[start : start + EVALUATION_BATCH_SIZE].batch()

    def minibatches(self, size: int) -> Iterator[Batch]:
        """Yield shuffled minibatches forever. The last one of an epoch may be smaller."""
        while True:
            for index in torch.randperm(len(self)).split(size):
                yield self[index].batch()


def concatenate(parts: list[Samples]) -> Samples:
    """Join several sets of samples, in order."""
    return Samples(
        torch.cat([part.images for part in parts]),
        torch.cat([part.labels for part in parts]),
        torch.cat([part.colors for part in parts]),
        torch.cat([part.envs for part in parts]),
    )


class Dataset(NamedTuple):
    """The samples in a folder ColoredMNIST."""

    training: Samples  # train1 and train2
    validation: Samples | None  # the course's val.pt; None if `hold_out` splits `training`
    test: Samples
    folder: Path
    description: str  # for the log
    seed: int | None  # seed that generated the data, None for the course's files

    def to(self, device: str | torch.device) -> "Dataset":
        """Return the same data on a device."""
        validation = None if self.validation is None else self.validation.to(device)
        return self._replace(
            training=self.training.to(device), validation=validation, test=self.test.to(device)
        )

    def hold_out(self, fraction: float) -> tuple[Samples, Samples | None]:
        """Split the training samples at random into training and validation samples.

        Each part has at least one sample. Nothing is split if the fraction is 0 or if the data
        already have validation samples.

        Args:
            fraction: fraction of the training samples to hold out, 0 to 1
        """
        if self.validation is not None or fraction == 0:
            return self.training, self.validation
        count = len(self.training)
        held_out = min(max(1, round(fraction * count)), count - 1)
        order = torch.randperm(count)
        return self.training[order[held_out:]], self.training[order[:held_out]]


def load_data(dataset_path: str | Path = "data", seed: int = 1234) -> Dataset:
    """Load `dataset_path`/ColoredMNIST. Generate it first, with `seed`, if it does not exist.

    The folder contains train1.pt, train2.pt and test.pt, as generated here or in the course
    project's format. It can also contain the assignment's download: train.pt, val.pt and test.pt.

    Raises:
        UserError: the files are incomplete, corrupt or in another format
    """
    folder = Path(os.path.expanduser(dataset_path)) / "ColoredMNIST"
    generate_environments(folder.parent, seed=seed)
    names = {path.stem for path in folder.glob("*.pt")}
    if names not in ({"train1", "train2", "test"}, {"train", "val", "test"}):
        raise UserError(
            f"{folder} must have train1.pt, train2.pt and test.pt, or train.pt, val.pt and "
            f"test.pt, and no other .pt file. Delete {folder} to generate the data again."
        )
    files = {name: read_file(folder / f"{name}.pt") for name in sorted(names)}
    samples = {name: part for name, (part, _, _) in files.items()}
    if "train" in names:
        training, validation = samples["train"], samples["val"]
    else:
        training, validation = concatenate([samples["train1"], samples["train2"]]), None
    if len(training.envs.unique()) < 2:
        raise UserError(
            f"{folder} has one training environment, but two are needed. "
            f"Delete {folder} to generate the data again."
        )
    _, description, file_seed = files["test"]
    return Dataset(
        training, validation, samples["test"], folder, f"{folder}, {description}", file_seed
    )


def unseen_samples(p_f: float = P_F, p_e: float = P_E[2]) -> Samples:
    """Return a test environment made from MNIST's 10,000 test digits, always with the same seed.

    These digits are used neither for training nor for choosing anything.
    """
    generator = torch.Generator().manual_seed(UNSEEN_SEED)
    return read_generated(color_digits(*load_mnist("test"), p_f, p_e, generator), "test")


# Readers of the three file formats.


def read_file(path: Path) -> tuple[Samples, str, int | None]:
    """Read a .pt file without running any code in it.

    Returns:
        the samples, a description of the format for the log, and the seed if the file has one

    Raises:
        UserError: the file cannot be read, or it is corrupt or in another format
    """
    seed = None
    try:
        check_integrity(path)
        with torch.serialization.safe_globals([(StandIn, "PIL.Image.Image")]):
            record = torch.load(path, weights_only=True, map_location="cpu")
        if isinstance(record, dict):
            samples = read_generated(record, path.stem)
            seed = record["seed"]
            description = f"p_f {record['p_f']}, p_e {record['p_e']}, seed {seed}"
        elif isinstance(record[0], Tensor):
            samples = read_normalized(record, path.stem)
            description = "the course's normalised tensors"
        else:
            samples = read_pil_images(record, path.stem)
            description = "the course project's PIL images"
        return samples, description, seed
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except Exception:  # an untrusted file can raise anything
        raise UserError(
            f"{path} is corrupt, or it is not an environment in one of the three known formats. "
            f"Delete {path.parent} to generate the data again."
        ) from None


def check_integrity(path: str | Path) -> None:
    """Raise an exception unless a file is an intact zip archive, the format of torch.save."""
    with zipfile.ZipFile(path) as archive:
        if archive.testzip() is not None:
            raise ValueError("a checksum is wrong")


def read_generated(record: dict, name: str) -> Samples:
    """Read the project's format: the dict of `color_digits` with the environment's name."""
    if record.get("environment", name) != name:
        raise ValueError("this file is another environment")
    envs = torch.full((len(record["labels"]),), ENVIRONMENTS.index(name))
    return checked_samples(record["images"], record["labels"], record["colors"], envs)


def read_normalized(record: list, name: str) -> Samples:
    """Read the assignment's download: [images (N, 2352) float32, labels (N,), environments (N,)].

    test.pt has no environments. The course's framework generates these files with p_e = 0.4 in
    environment 0 and 0.1 in environment 1.
    """
    images, labels, *envs = record
    envs = torch.full((len(labels),), 2) if name == "test" else envs[0]
    if name != "test" and not set(envs.tolist()) <= {0, 1}:
        raise ValueError("an environment is not 0 or 1")
    mean = torch.tensor([[MEAN], [MEAN], [0]])
    levels = (images.unflatten(1, (3, 784)) * STD + mean) * 255
    grey = levels.round().clamp(0, 255)
    if not (levels - grey).abs().max() <= 0.05:  # refuses nan as well
        raise ValueError("the images are not normalised")
    images = grey.to(torch.uint8).view(-1, 3, 28, 28)
    return checked_samples(images, labels, images[:, 0].flatten(1).any(1), envs)


def read_pil_images(record: list, name: str) -> Samples:
    """Read the course project's format: a list of (PIL image, label, colour is red)."""
    images, labels, colors = zip(*record, strict=True)
    envs = torch.full((len(labels),), ENVIRONMENTS.index(name))
    images = torch.stack([image.pixels() for image in images])
    return checked_samples(images, torch.tensor(labels), torch.tensor(colors), envs)


class StandIn:
    """A stand-in for PIL.Image.Image in an untrusted file. It stores the state and runs no code."""

    def __setstate__(self, state: list) -> None:
        self.state = state

    def pixels(self) -> Tensor:
        """Return the pixels (3, 28, 28) uint8 of an RGB image."""
        _, mode, size, _, pixels = self.state[:5]
        if mode != "RGB" or size != (28, 28):
            raise ValueError("the image is not RGB of 28 × 28 pixels")
        return torch.frombuffer(bytearray(pixels), dtype=torch.uint8).view(28, 28, 3).movedim(2, 0)


def checked_samples(images: Tensor, labels: Tensor, colors: Tensor, envs: Tensor) -> Samples:
    """Check the contents of a file, with RGB images (N, 3, 28, 28) uint8. Return `Samples`.

    Raises:
        ValueError: shapes differ, a label or a colour is not 0 or 1, or an image has pixels outside
            the channel of its colour
    """
    count = len(labels)
    if images.dtype != torch.uint8 or images.shape != (count, 3, 28, 28) or count < 2:
        raise ValueError("the images are not RGB of 28 × 28 pixels")
    for values in (labels, colors):
        if values.shape != (count,) or not set(values.tolist()) <= {0, 1}:
            raise ValueError("a label or a colour is not 0 or 1")
    # Colour 1 is red, in channel 0. Colour 0 is green, in channel 1. So the channel whose number is
    # the colour must be empty.
    empty = images[torch.arange(count), colors.long()]
    if empty.any() or images[:, 2].any():
        raise ValueError("a digit is not in the channel of its colour")
    if envs.shape != (count,):
        raise ValueError("there is not one environment for each image")
    return Samples(images[:, :2].contiguous(), labels.float(), colors.long(), envs.long())


class ColoredMNIST(torch.utils.data.Dataset):
    """ColoredMNIST with the interface of torchvision's datasets, for a training loop of your own.

    Items are (PIL image, label, colour). Colour 1 is red, colour 0 is green. `targets` contains
    the labels, (N,) int64.

    Args:
        root: folder that contains ColoredMNIST, which is generated with seed 1234 if it is missing
        env: train1, train2, test, or all_train for both training environments
        transform: function applied to each image
        target_transform: function applied to each label
    """

    def __init__(
        self,
        root: str | Path = "data",
        env: str = "train1",
        transform: Callable | None = None,
        target_transform: Callable | None = None,
    ):
        if env not in (*ENVIRONMENTS, "all_train"):
            raise ValueError(f"env is {env!r}. Use train1, train2, test or all_train.")
        data = load_data(root)
        samples = (
            data.training
            if data.validation is None
            else concatenate([data.training, data.validation])
        )
        if env == "test":
            samples = data.test
        elif env != "all_train":
            samples = samples[samples.envs == ENVIRONMENTS.index(env)]
        self.samples = samples
        self.targets = samples.labels.long()
        self.transform = transform
        self.target_transform = target_transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple:
        red_and_green = self.samples.images[index].movedim(0, 2)
        image = Image.fromarray(F.pad(red_and_green, (0, 1)).numpy())  # blue is 0
        label, color = int(self.targets[index]), int(self.samples.colors[index])
        if self.transform is not None:
            image = self.transform(image)
        if self.target_transform is not None:
            label = self.target_transform(label)
        return image, label, color
