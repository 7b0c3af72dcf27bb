"""Train, move the network onto a MemTorch memristor crossbar, test it again.

python memristor.py --seed 1234 --trainer IRM --no_cuda
(Conductances are in siemens, resistances in ohms, voltages in volts, currents in amperes.)
"""

import copy
import random
from collections.abc import Callable
from typing import Annotated
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

import trainer
from dataset import CHUNK, Batch, Digits, concatenate
from metric import summarize
from model import ERM, Network
from preprocessing import Positive, Proportion, Seed, number, refuse, run_command

try:
    import memtorch
    from memtorch.bh.nonideality.DeviceFaults import apply_device_faults
except ImportError:
    memtorch = None

HEADROOM = 1.25  # by which inputs may exceed those of the calibration before they are cut off
HARDENING = 3  # times as long as the training before it


def device_factory(r_on: float, r_off: float, variability: float, seed: int) -> Callable:
    """What `patch_model` calls for each cell of a crossbar: returns a VTEAM device."""
    prototype = memtorch.bh.memristor.VTEAM(r_off=r_off, r_on=r_on)
    draws = random.Random(seed)

    def make_device(cell: bool = False, reference: bool = False, **_):
        if reference or not cell or not variability:
            return prototype  # shared, as only its resistances are read
        device = copy.copy(prototype)
        device.r_on = r_on * max(0.1, draws.gauss(1, variability))
        device.r_off = max(r_off * max(0.1, draws.gauss(1, variability)), device.r_on)
        return device

    return make_device


def quantize_currents(currents: Tensor, bits: int) -> Tensor:
    """A linear ADC without overflow, in place, as MemTorch's `quantize` does it row by row.

    Its step is the power of two at which the largest of a row (..., columns of a tile) just fits.
    """
    largest = currents.abs().amax(-1, keepdim=True)
    mantissa, exponent = torch.frexp(largest + 1e-12)
    step = torch.ldexp(torch.ones_like(mantissa), exponent - (mantissa == 0.5).int() + 1 - bits)
    bound = 2 ** (bits - 1)
    return currents.div_(step).add_(0.5).floor_().clamp_(-bound, bound - 1).mul_(step)


class CrossbarLayer(nn.Module):
    """A MemTorch layer computed tile by tile for a whole batch, with a fixed range of inputs."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer
        positive, negative = layer.crossbars
        self.tiles = positive.conductance_matrix - negative.conductance_matrix
        self.grid, self.columns = positive.tiles_map.long(), positive.columns

    def rows(self, inputs: Tensor) -> Tensor:
        """Inputs as rows for the crossbar: (N, in), or (N · positions, in) of a convolution."""
        if isinstance(self.layer, nn.Linear):
            return inputs
        return nn.functional.unfold(inputs, self.layer.kernel_size).transpose(1, 2).flatten(0, 1)

    def currents(self, rows: Tensor) -> Tensor:
        """Rows (N, in) → (N, columns), as MemTorch's `tiled_inference` has one sample's."""
        limit = self.layer.max_input_voltage
        voltages = (rows * (limit / self.input_range)).clamp_(-limit, limit)
        height, width = self.tiles.shape[-2:]
        total = voltages.new_zeros(len(voltages), self.grid.shape[1], width)
        for volts, row in zip(voltages.split(height, 1), self.grid, strict=True):
            strip = self.tiles[row, : volts.shape[1]].transpose(0, 1).flatten(1)
            currents = (volts @ strip).view(total.shape)
            bits = self.layer.ADC_resolution
            total += quantize_currents(currents, bits) if bits else currents
        return total.flatten(1)[:, : self.columns]

    def calibrate(self, inputs: Tensor, digital_inputs: Tensor) -> None:
        """Fix input range, gains and offsets (least squares) by inputs (N, in) or (N, C, H, W)."""
        rows = self.rows(inputs)
        wanted = self.rows(digital_inputs) @ self.layer.weight.flatten(1).T
        self.input_range = HEADROOM * rows.abs().max().clamp(min=1e-12).item()
        currents = self.currents(rows)
        centered = currents - currents.mean(0)
        variance = centered.square().mean(0)
        covariance = (centered * wanted).mean(0)
        varies = variance > 1e-12 * currents.square().mean(0)  # by more than rounding
        self.gain = torch.where(varies, covariance / variance, 0)
        self.offset = wanted.mean(0) - self.gain * currents.mean(0)
        self.offset += 0 if self.layer.bias is None else self.layer.bias

    def forward(self, inputs: Tensor) -> Tensor:
        outputs = self.currents(self.rows(inputs)) * self.gain + self.offset
        if isinstance(self.layer, nn.Linear):
            return outputs
        width = inputs.shape[-1] - self.layer.kernel_size[-1] + 1
        return outputs.unflatten(0, (len(inputs), -1)).transpose(1, 2).unflatten(2, (-1, width))


def to_crossbar(
    network: nn.Module,
    images: Tensor,
    *,
    tile_shape: Annotated[tuple[int, int], number(int, 1)] = (128, 128),
    adc_resolution: Annotated[int | None, number(int, 2, 16)] = 8,
    r_on: Positive = 1.4e4,
    r_off: Positive = 5e7,
    max_input_voltage: Positive = 0.3,
    lrs_proportion: Proportion = 0.0,
    hrs_proportion: Proportion = 0.0,
    conductance_states: Annotated[int | None, number(int, 2)] = None,
    device_variability: Proportion = 0.0,
    fault_seed: Seed = 0,
) -> nn.Module:
    """A copy of a network whose linear and convolutional layers are memristor crossbars.

    MemTorch builds them, of VTEAM devices; its defaults are a time series resolution of 1e-10 s,
    the double-column scheme, naive mapping, 1T1R cells and an ADC overflow rate of 0. Raises
    UserError without MemTorch, or where resistances or layers don't fit.

    Args:
        network: its `phi` is a flat Sequential, with convolutions without stride or padding
        images: (N, inputs), normalised, to calibrate with, such as `calibration_images`
        tile_shape: rows and columns of a tile
        adc_resolution: bits of the ADC of each tile, 2 to 16 (in code also None: exact)
        r_on: lowest resistance of a device, ohms
        r_off: highest resistance of a device, ohms
        max_input_voltage: volts of 1.25 times the largest input in calibration; more is cut off
        lrs_proportion: proportion of devices stuck at r_on, 0 to 1
        hrs_proportion: proportion of devices stuck at r_off, 0 to 1; drawn for both, it is r_on
        conductance_states: equidistant conductances that a device can have; any, if not given
        device_variability: standard deviation of r_on and r_off between devices, relative, 0 to 1
        fault_seed: seed of stuck devices and variability
    """
    check_devices(r_on, r_off)
    simple = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1}
    for layer in network.phi:
        fits = not isinstance(layer, nn.Conv2d) or simple.items() <= vars(layer).items()
        flat = not [*layer.children()]
        refuse(not (fits and flat), "crossbars take a flat nn.Sequential, no stride and no padding")
    digital = copy.deepcopy(network).cpu().eval()
    crossbar = copy.deepcopy(digital)
    cells = device_factory(r_on, r_off, device_variability, fault_seed)
    options = {"tile_shape": tuple(tile_shape), "ADC_resolution": adc_resolution, "verbose": False}
    options |= {"max_input_voltage": max_input_voltage, "quant_method": adc_resolution and "linear"}
    # 1T1R cells are read from the matrix; `update(from_devices=False)` writes them into devices.
    with mock.patch.object(memtorch.bh.crossbar.Crossbar, "update"):
        memtorch.mn.patch_model(crossbar, cells, {"cell": True}, [nn.Linear, nn.Conv2d], **options)
    np.random.seed(fault_seed)  # of the generator that MemTorch draws stuck devices from
    inputs = digital_inputs = images.cpu()
    with torch.no_grad():
        for index, layer in enumerate(crossbar.phi):
            if hasattr(layer, "crossbars"):
                if conductance_states:  # MemTorch's FiniteConductanceStates fails silently
                    for columns in layer.crossbars:
                        round_conductances(columns, conductance_states)
                if lrs_proportion or hrs_proportion:
                    apply_device_faults(layer, lrs_proportion, hrs_proportion, 0.0)
                layer = crossbar.phi[index] = CrossbarLayer(layer)
                layer.calibrate(inputs, digital_inputs)
            inputs, digital_inputs = layer(inputs), digital.phi[index](digital_inputs)
    return crossbar.eval()


def calibration_images(training: Digits) -> Tensor:
    """The first training images, up to 1000, in both colours: no gain is fitted to a colour."""
    some = training[torch.arange(min(CHUNK // 2, len(training)))]
    return next(concatenate([some, some.recolored()]).chunks()).images


def check_devices(r_on: float, r_off: float) -> None:
    """Raise UserError if there is no MemTorch, or if arguments of `to_crossbar` contradict."""
    refuse(memtorch is None, "MemTorch is not installed: run ./run.sh, or see README.md")
    refuse(r_on >= r_off, f"--r_on {r_on} is not below --r_off {r_off}")


def round_conductances(crossbar, states: int) -> None:
    """Round each device to the nearest of `states` conductances between its 1/r_off and 1/r_on."""
    limits = np.vectorize(lambda device: (1 / device.r_off, 1 / device.r_on))(crossbar.devices)
    lowest, highest = map(torch.from_numpy, limits)
    width = (highest - lowest).clamp(min=1e-30)  # 0 where a device's r_off is its r_on
    steps = ((crossbar.conductance_matrix - lowest) / width * (states - 1)).round()
    crossbar.conductance_matrix = (lowest + steps / (states - 1) * width).float()


class StuckDevices(nn.Module):
    """A weight as the crossbar will have it: limited, and while training with random stuck devices.

    A device stuck on adds or takes away its layer's largest weight, so weights are limited to
    `LIMIT` standard deviations; one stuck off adds nothing. Each step draws how many are stuck, up
    to `MOST_ON` and `MOST_OFF`. The gradient ignores both (straight-through): all weights learn on.
    """

    LIMIT, MOST_ON, MOST_OFF = 0.7, 0.2, 0.25

    def forward(self, weight: Tensor) -> Tensor:
        values = weight.detach()
        limit = self.LIMIT * values.std().item()
        devices = torch.stack([values, -values]).clamp_(0, limit)  # positive and negative columns
        if self.training:
            self.damage(devices, limit)
        return weight + (devices[0] - devices[1] - values)

    def damage(self, devices: Tensor, limit: float) -> None:
        """Some get stuck at `limit`, some at 0, in place."""
        on, off = self.MOST_ON * torch.rand(()).item(), self.MOST_OFF * torch.rand(()).item()
        draws = torch.rand_like(devices)
        devices[draws < on] = limit
        devices[draws > 1 - off] = 0


class Imitation(ERM):
    """Cross entropy against a network's decisions (after Hinton et al. 2015): no label noise."""

    def __init__(self, teacher: Network):
        self.teacher = teacher.eval()

    def losses(self, logits: Tensor, batch: Batch) -> Tensor:
        with torch.no_grad():
            decisions = self.teacher(batch.images) > 0
        return super().losses(logits, batch._replace(labels=decisions.float()))


def harden(network: Network, training: Digits, iteration: int, **options) -> Network:
    """A copy of a trained network that decides as it does whether or not devices are stuck.

    Trained as before on `training` in both colours, `HARDENING` times as long, no weight decay.
    """
    options |= {"iteration": HARDENING * iteration, "weight_decay": 0.0}
    print(f"Hardening: {options['iteration']} iterations, the loss is that against its decisions")
    hardened = copy.deepcopy(network)
    for layer in hardened.phi:
        # A single weight is its layer's largest anyway, and has no standard deviation.
        if isinstance(layer, (nn.Linear, nn.Conv2d)) and layer.weight.numel() > 1:
            nn.utils.parametrize.register_parametrization(layer, "weight", StuckDevices())
    both_colors = concatenate([training, training.recolored()])
    hardened = trainer.train(hardened, Imitation(network), both_colors, None, **options)
    for layer in filter(nn.utils.parametrize.is_parametrized, hardened.phi):
        nn.utils.parametrize.remove_parametrizations(layer, "weight")
    update_bn(both_colors.chunks(), hardened)  # of sound devices
    return hardened.eval()


def main() -> None:
    more = {"harden": f"train on for broken devices, {HARDENING} times as long"}
    args = trainer.parse_arguments(__doc__.split("\n")[0], functions=[to_crossbar], **more)
    check_devices(args.r_on, args.r_off)
    data = trainer.load(args)
    digital, on_crossbar = [], []
    for repetition in range(1, args.repetitions + 1):
        print(f"Repetition {repetition} of {args.repetitions}")
        torch.manual_seed(1000 * args.seed + repetition - 1)
        training, validation = data.hold_out(args.validation)
        network, loss = trainer.build(args)
        options = trainer.arguments_of(trainer.train, args)
        network = trainer.train(network, loss, training, validation, **options)
        if args.harden:
            network = harden(network, training, **options)
        digital.append(trainer.evaluate(network, data.test))
        trainer.save(network, args, repetition, "_hardened" if args.harden else "")
        print(f"Test result: {digital[-1]}")
        images = calibration_images(training)
        crossbar = to_crossbar(network, images, **trainer.arguments_of(to_crossbar, args))
        on_crossbar.append(trainer.evaluate(crossbar, data.test))
        print(f"Crossbar test result: {on_crossbar[-1]}", flush=True)
    print(f"Digital: {summarize(digital)}")
    print(f"Summary: {summarize(on_crossbar)}")


if __name__ == "__main__":
    run_command(main)
