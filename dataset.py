"""Stored digits → tensors on the device, and minibatches of them."""

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from preprocessing import MEAN, STD, Digits

CHUNK = 2000  # images made into floats at a time when a whole split is passed through a network


class Batch(NamedTuple):
    """Samples as networks and losses take them; R stacked repetitions make each field (R, N, …).

    A digit and its colour come apart: a network paints the one in the other (`Network.paint`).
    """

    images: Tensor  # (N, pixels) float32, the digit's grey levels, normalised unless asked for raw
    labels: Tensor  # (N,) float32, y: 0 or 1
    colors: Tensor  # (N,) int64, z: 1 red, 0 green
    envs: Tensor  # (N,) int64, e: 0 train1, 1 train2, 2 test


class Split:
    """Digits on the device, given out as batches.

    Args:
        digits: what to hold.
        device: where to hold it.
        image_size: side of the images in pixels; 14 keeps every other row and column.
        raw_pixels: give values / 255 out as they are, not normalised.
    """

    def __init__(
        self, digits: Digits, device: torch.device, image_size: int = 28, raw_pixels: bool = False
    ):
        step = 28 // image_size
        self.mean, self.std = (0.0, 1.0) if raw_pixels else (MEAN, STD)
        self.images = digits.pixels[:, ::step, ::step].flatten(1).to(device)
        self.labels = digits.labels.float().to(device)
        self.colors = digits.colors.long().to(device)
        self.envs = digits.envs.to(device)
        self.index = torch.arange(len(self.labels), device=device)

    def __len__(self) -> int:
        return len(self.index)

    def part(self, positions: Tensor) -> "Split":
        """The samples at these positions, as a split that shares this one's memory."""
        part = copy.copy(self)
        part.index = self.index[positions.to(self.index.device)]
        return part

    def by_color(self) -> "Split":
        """The same samples, red digits first, in their order otherwise."""
        return self.part(self.colors[self.index].argsort(descending=True, stable=True))

    def in_both_colors(self) -> "Split":
        """The same digits twice, also in the other colour; with the labels that they had."""
        twice = copy.copy(self)
        twice.colors = torch.cat([self.colors, 1 - self.colors])
        for name in ("images", "labels", "envs"):
            setattr(twice, name, torch.cat([getattr(self, name)] * 2))
        twice.index = torch.cat([self.index, self.index + len(self.labels)])
        return twice

    def hold_out(self, proportion: float, generator: torch.Generator) -> tuple["Split", "Split"]:
        """Split at random: for training, and of the given proportion for validation."""
        order = torch.randperm(len(self), generator=generator)
        count = max(1, round(proportion * len(self)))
        return self.part(order[count:]), self.part(order[:count])

    def chunks(self) -> Iterator[Batch]:
        """The whole split, in order, `CHUNK` samples at a time, as `batches` gives them."""
        return self.batches(self.index.split(CHUNK))

    def batches(
        self, indices: Iterable[Tensor], shift: int = 0, generators: Sequence[torch.Generator] = ()
    ) -> Iterator[Batch]:
        """The digits at each of `indices` (…, N); each batch overwrites the last one's images.

        Sharing memory is for speed: to ask the system for it takes longer than to fill it.
        """
        images, black = None, torch.tensor(-self.mean / self.std, device=self.images.device)
        for index in indices:
            if images is None or images.shape[:-1] != index.shape:
                pixels = self.images.new_empty(index.numel(), self.images.shape[1])
                images = pixels.float().view(*index.shape, -1)
            torch.index_select(self.images, 0, index.flatten(), out=pixels)
            drawn = move(pixels, shift, generators) if shift else pixels
            images.copy_(drawn.view_as(images))
            torch.add(black, images, alpha=1 / (255 * self.std), out=images)
            yield Batch(images, self.labels[index], self.colors[index], self.envs[index])


def minibatches(
    parts: Sequence[Split], size: int, generators: Sequence[torch.Generator], shift: int = 0
) -> Iterator[Batch]:
    """Endless minibatches of R parts of one split, stacked, (R, N, …); see `Split.batches`.

    A minibatch has all environments together, red digits first. Each pass through a part is without
    replacement and in a new order; what is left of it below `size` is dropped. Each image is moved
    at random, by up to `shift` pixels up or down and as many to the left or right.
    """
    count = len(parts[0])
    size = min(size, count)

    def indices() -> Iterator[Tensor]:
        while True:
            orders = [torch.randperm(count, generator=generator) for generator in generators]
            passes = [part.part(order) for part, order in zip(parts, orders, strict=True)]
            index = torch.stack([each.index[: count // size * size] for each in passes])
            index = index.unflatten(1, (-1, size))
            order = parts[0].colors[index].argsort(dim=-1, descending=True, stable=True)
            yield from index.gather(-1, order).unbind(1)

    return parts[0].batches(indices(), shift, generators)


def move(images: Tensor, shift: int, generators: Sequence[torch.Generator]) -> Tensor:
    """Bytes (R · N, pixels), each image moved in reading order by a number of rows and of pixels.

    So what leaves a row enters the one beside it; what leaves at the top or the bottom is lost.
    """
    count, pixels = images.shape
    side, each = math.isqrt(pixels), (2, count // len(generators))
    draws = [torch.randint(-shift, shift + 1, each, generator=own) for own in generators]
    down, right = torch.cat(draws, 1).to(images.device)
    margin = shift * (side + 1)
    padded = images.new_zeros(count + 1, margin + pixels)
    padded[:-1, margin:] = images
    starts = padded.shape[1] * torch.arange(count, device=images.device) + margin
    windows = padded.flatten().unfold(0, pixels, 1)
    return windows.index_select(0, starts - side * down - right)
