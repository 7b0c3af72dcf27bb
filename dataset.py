"""Stored digits → tensors on the device, and minibatches of them."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from preprocessing import MEAN, STD, Digits

CHUNK = 4000  # images made into floats at a time when a whole split is passed through a network


class Batch(NamedTuple):
    """Samples as networks and losses take them; R stacked repetitions make each field (R, N, …)."""

    images: Tensor  # (N, inputs) float32, normalised
    labels: Tensor  # (N,) float32, y: 0 or 1
    colors: Tensor  # (N,) int64, z: 1 red, 0 green
    envs: Tensor  # (N,) int64, e: 0 train1, 1 train2, 2 test


class Split:
    """Coloured digits kept on the device as bytes, given out as batches.

    The blue channel is left out. It is 0 in every image, also once normalised, so no weight that
    reads it has an effect or a gradient: a network on the 1568 other inputs is the same function.

    Args:
        digits: what to hold.
        device: where to hold it.
        grayscale: show each digit without its colour, as 784 inputs.
        image_size: side of the images in pixels; 14 keeps every other row and column.
    """

    def __init__(
        self, digits: Digits, device: torch.device, grayscale: bool = False, image_size: int = 28
    ):
        step = 28 // image_size
        pixels = digits.pixels[:, :, ::step, ::step]
        if grayscale:
            pixels = pixels.sum(1, dtype=torch.uint8)
        self.grayscale = grayscale
        self.pixels = pixels.flatten(1).contiguous().to(device)
        self.labels = digits.labels.float().to(device)
        self.colors = digits.colors.long().to(device)
        self.envs = digits.envs.to(device)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def inputs(self) -> int:
        """Numbers per image."""
        return self.pixels.shape[1]

    def batch(self, index: Tensor) -> Batch:
        """The samples at `index` (N,)."""
        # (value / 255 - mean) / std, as one product and one difference
        images = self.pixels.index_select(0, index).float()
        images = images.mul_(1 / (255 * STD)).sub_(MEAN / STD)
        return Batch(images, self.labels[index], self.colors[index], self.envs[index])

    def chunks(self) -> Iterator[Batch]:
        """The whole split, in order, `CHUNK` samples at a time."""
        for index in torch.arange(len(self), device=self.labels.device).split(CHUNK):
            yield self.batch(index)

    def recolored(self, images: Tensor) -> Tensor:
        """Images (N, inputs) with each digit in the other colour."""
        if self.grayscale:
            return images
        return images.view(len(images), 2, -1).flip(1).flatten(1)

    def minibatches(self, size: int, generator: torch.Generator) -> Iterator[Batch]:
        """Endless minibatches without replacement, of all environments together.

        Each pass through the data is in a new order; what is left of it below `size` is dropped.
        """
        size = min(size, len(self))
        while True:
            order = torch.randperm(len(self), generator=generator).to(self.labels.device)
            for index in order[: len(self) // size * size].split(size):
                yield self.batch(index)


def hold_out(
    digits: Digits, proportion: float, generator: torch.Generator
) -> tuple[Digits, Digits]:
    """Split at random into digits for training and, of the given proportion, for validation."""
    order = torch.randperm(len(digits.labels), generator=generator)
    count = max(1, round(proportion * len(order)))
    validation, train = order[:count], order[count:]
    return Digits(*(field[train] for field in digits)), Digits(*(f[validation] for f in digits))
