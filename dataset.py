"""Stored digits → tensors on the device, and minibatches of them."""

import copy
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from preprocessing import MEAN, STD, Digits

BLACK = -MEAN / STD  # a normalised pixel of 0
CHUNK = 2000  # images made into floats at a time when a whole split is passed through a network


class Batch(NamedTuple):
    """Samples as networks and losses take them; R stacked repetitions make each field (R, N, …)."""

    images: Tensor  # (N, inputs) float32, normalised unless asked for raw
    labels: Tensor  # (N,) float32, y: 0 or 1
    colors: Tensor  # (N,) int64, z: 1 red, 0 green
    envs: Tensor  # (N,) int64, e: 0 train1, 1 train2, 2 test


class Split:
    """Coloured digits on the device, given out as batches.

    The blue channel is left out. It is 0 in every image, also once normalised, so no weight that
    reads it has an effect or a gradient: a network on the 1568 other inputs is the same function.

    Args:
        digits: what to hold.
        device: where to hold it.
        grayscale: show each digit without its colour, as 784 inputs.
        image_size: side of the images in pixels; 14 keeps every other row and column.
        raw_pixels: give values / 255 out as they are, not normalised.
    """

    def __init__(
        self,
        digits: Digits,
        device: torch.device,
        grayscale: bool = False,
        image_size: int = 28,
        raw_pixels: bool = False,
    ):
        step = 28 // image_size
        pixels = digits.pixels[:, :, ::step, ::step]
        if grayscale:
            pixels = pixels.sum(1, dtype=torch.uint8)
        self.grayscale = grayscale
        self.mean, self.std = (0.0, 1.0) if raw_pixels else (MEAN, STD)
        self.images = pixels.flatten(1).to(device)
        self.labels = digits.labels.float().to(device)
        self.colors = digits.colors.long().to(device)
        self.envs = digits.envs.to(device)
        self.index = torch.arange(len(self.labels), device=device)
        self.kept_chunks = None

    def __len__(self) -> int:
        return len(self.index)

    @property
    def inputs(self) -> int:
        """Numbers per image."""
        return self.images.shape[1]

    def part(self, positions: Tensor) -> "Split":
        """The samples at these positions, as a split that shares this one's memory."""
        part = copy.copy(self)
        part.index = self.index[positions.to(self.index.device)]
        part.kept_chunks = None
        return part

    def by_color(self) -> "Split":
        """The same samples, red digits first, in their order otherwise."""
        return self.part(self.red_first(torch.arange(len(self), device=self.index.device)))

    def keep_chunks(self) -> "Split":
        """The same split with `chunks` made once, in four times the memory."""
        kept = copy.copy(self)
        kept.kept_chunks = [b._replace(images=b.images.clone()) for b in self.chunks()]
        return kept

    def to(self, device: torch.device) -> "Split":
        """The same split on another device."""
        moved = copy.copy(self)
        for name in ("images", "labels", "colors", "envs", "index"):
            setattr(moved, name, getattr(self, name).to(device))
        moved.kept_chunks = None
        return moved

    def batch(self, positions: Tensor) -> Batch:
        """The samples at `positions` (N,) of this split."""
        return next(self.batches([positions]))

    def batches(self, positions: Iterable[Tensor]) -> Iterator[Batch]:
        """The samples at each `positions`; a batch's images are overwritten by those of the next.

        Sharing memory is for speed: to ask the system for it takes longer than to fill it.
        """
        images = None
        for chosen in positions:
            if images is None or len(images) != len(chosen):
                pixels = self.images.new_empty(len(chosen), self.inputs)
                images = pixels.float()
            index = self.index[chosen]
            torch.index_select(self.images, 0, index, out=pixels)
            images.copy_(pixels).mul_(1 / (255 * self.std)).add_(-self.mean / self.std)
            yield Batch(
                images,
                *(field.index_select(0, index) for field in (self.labels, self.colors, self.envs)),
            )

    def chunks(self) -> Iterator[Batch]:
        """The whole split, in order, `CHUNK` samples at a time, as `batches` gives them."""
        if self.kept_chunks is not None:
            return iter(self.kept_chunks)
        return self.batches(torch.arange(len(self), device=self.index.device).split(CHUNK))

    def minibatches(self, size: int, generator: torch.Generator) -> Iterator[Batch]:
        """Endless minibatches of all environments together, as `batches` gives them, red first.

        Each pass through the data is without replacement and in a new order; what is left of it
        below `size` is dropped.
        """
        size = min(size, len(self))

        def positions() -> Iterator[Tensor]:
            while True:
                order = torch.randperm(len(self), generator=generator).to(self.index.device)
                yield from self.red_first(order[: len(self) // size * size].view(-1, size))

        return self.batches(positions())

    def red_first(self, positions: Tensor) -> Tensor:
        """Positions (..., N) with those of red digits first, in their order otherwise."""
        colors = self.colors[self.index[positions]]
        return positions.gather(-1, colors.argsort(dim=-1, descending=True, stable=True))

    def recolored(self, images: Tensor) -> Tensor:
        """Images (N, inputs) with each digit in the other colour."""
        if self.grayscale:
            return images
        return images.view(len(images), 2, -1).flip(1).flatten(1)

    def in_both_colors(self) -> "Split":
        """The same digits twice, also in the other colour; with the labels that they had."""
        twice = copy.copy(self)
        twice.images = torch.cat([self.images, self.recolored(self.images)])
        twice.colors = torch.cat([self.colors, 1 - self.colors])
        twice.labels, twice.envs = self.labels.repeat(2), self.envs.repeat(2)
        twice.index = torch.cat([self.index, self.index + len(self.labels)])
        twice.kept_chunks = None
        return twice

    def hold_out(self, proportion: float, generator: torch.Generator) -> tuple["Split", "Split"]:
        """Split at random: for training, and of the given proportion for validation."""
        order = torch.randperm(len(self), generator=generator)
        count = max(1, round(proportion * len(self)))
        return self.part(order[count:]), self.part(order[:count])
