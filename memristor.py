"""Train, move the network onto a MemTorch memristor crossbar, test it again.

    python memristor.py --seed 1234 --trainer IRM --no_cuda

Conductances are in siemens, resistances in ohms, voltages in volts, currents in amperes.
"""

import argparse
import copy
import random
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from tqdm import tqdm

import trainer
from dataset import Batch
from model import Loss, Network
from preprocessing import Parser, make_folder, need, number, run, save_figure

try:
    import memtorch
    from memtorch.bh.nonideality.DeviceFaults import apply_device_faults
    from memtorch.mn.Module import patch_model
except ImportError:
    memtorch = None

TIME_SERIES_RESOLUTION = 1e-10  # seconds, of the VTEAM devices
# The inputs of a layer may exceed those of the calibration by this factor before they are cut off.
HEADROOM = 1.25
# How many times as long as the training before it hardening takes.
HARDENING = 3
NOT_INSTALLED = "MemTorch is not installed: run ./run.sh, or see 'The crossbar' in README.md"


def device_factory(r_on: float, r_off: float, variability: float, seed: int) -> Callable:
    """What `patch_model` calls for each cell of a crossbar: returns a VTEAM device.

    Identical cells share one device object, as only its resistances are read; where devices vary,
    each is a copy with resistances of its own, drawn from a normal distribution whose standard
    deviation is `variability` times the mean, at least a tenth of the mean.
    """
    prototype = memtorch.bh.memristor.VTEAM(TIME_SERIES_RESOLUTION, r_off=r_off, r_on=r_on)
    draws = random.Random(seed)

    def make_device(cell: bool = False, reference: bool = False, **_):
        if reference or not cell or not variability:
            return prototype
        device = copy.copy(prototype)
        device.r_on = r_on * max(0.1, draws.gauss(1, variability))
        device.r_off = max(r_off * max(0.1, draws.gauss(1, variability)), device.r_on)
        return device

    return make_device


@contextmanager
def quick_crossbars():
    """Have MemTorch build crossbars without writing each conductance into its device as well.

    It reads 1T1R cells from the crossbar's matrix alone; to look at devices, first write them by
    the crossbar's `update(from_devices=False)`.
    """
    crossbar_class = memtorch.bh.crossbar.Crossbar
    update, crossbar_class.update = crossbar_class.update, lambda *_, **__: None
    try:
        yield
    finally:
        crossbar_class.update = update


def quantize_currents(currents: Tensor, bits: int) -> Tensor:
    """A linear ADC without overflow, in place, as MemTorch's `quantize` does it row by row.

    Args:
        currents: (..., columns of one tile). The step is the power of two at which the largest
            magnitude of the row just fits into `bits` bits, sign included.
    """
    largest = currents.abs().amax(-1, keepdim=True)
    mantissa, exponent = torch.frexp(largest + 1e-12)
    step = torch.ldexp(torch.ones_like(mantissa), exponent - (mantissa == 0.5).int() + 1 - bits)
    # A row of equal currents (all zero, as a rule) goes through MemTorch's ADC as it is.
    step = torch.where(largest == 0, 1.0, step)
    bound = 2 ** (bits - 1)
    return currents.div_(step).add_(0.5).floor_().clamp_(-bound, bound - 1).mul_(step)


def tile_currents(
    voltages: Tensor, tiles: Tensor, tiles_map: Tensor, columns: int, bits: int | None
) -> Tensor:
    """Currents out of tiles of devices, each tile read by an ADC of its own, added up.

    Args:
        voltages: (N, rows).
        tiles: (tiles, tile rows, tile columns), differences of conductances of the two columns.
        tiles_map: (tile grid rows, tile grid columns), indices into `tiles`.
        columns: how many of the columns are in use.
        bits: resolution of the ADCs; None reads exactly.

    Returns:
        (N, columns). What MemTorch's `tiled_inference` computes for one sample at a time.
    """
    height, width = tiles.shape[-2:]
    grid = tiles_map.long()
    total = voltages.new_zeros(len(voltages), len(grid[0]), width)
    for volts, row in zip(voltages.split(height, 1), grid, strict=True):
        strip = tiles[row, : volts.shape[1]].transpose(0, 1).flatten(1)
        currents = (volts @ strip).view(total.shape)
        total += currents if bits is None else quantize_currents(currents, bits)
    return total.flatten(1)[:, :columns]


class CrossbarLayer(nn.Module):
    """A MemTorch layer computed tile by tile for a whole batch, with a fixed range of inputs.

    MemTorch divides each batch by its own largest input (`naive_scale`) and does not multiply it
    back. Here `calibrate` fixes the range once, and finds by least squares the gain and the offset
    that turn each output's current into the digital layer's number (MemTorch's `tune`, for each
    output instead of each layer, and on the inputs that the layer really gets).
    """

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer
        self.tiles = layer.crossbars[0].conductance_matrix - layer.crossbars[1].conductance_matrix
        self.bits = layer.ADC_resolution if layer.quant_method else None

    def rows(self, inputs: Tensor) -> Tensor:
        """Inputs as rows for the crossbar: (N, in), or (N · positions, in) of a convolution."""
        if isinstance(self.layer, nn.Linear):
            return inputs
        return F.unfold(inputs, self.layer.kernel_size).transpose(1, 2).flatten(0, 1)

    def currents(self, rows: Tensor) -> Tensor:
        limit = self.layer.max_input_voltage
        voltages = (rows * (limit / self.input_range)).clamp_(-limit, limit)
        crossbar = self.layer.crossbars[0]
        return tile_currents(voltages, self.tiles, crossbar.tiles_map, crossbar.columns, self.bits)

    def calibrate(self, inputs: Tensor, digital_inputs: Tensor) -> None:
        """Set the range of the inputs, and gain and offset of each output.

        Args:
            inputs: what reaches this layer on the crossbar, (N, in) or (N, channels, H, W).
            digital_inputs: what reaches it in the digital network.
        """
        rows = self.rows(inputs)
        weight = self.layer.weight.detach().flatten(1)
        wanted = self.rows(digital_inputs) @ weight.T
        self.input_range = HEADROOM * rows.abs().max().clamp(min=1e-12).item()
        currents = self.currents(rows)
        # Columns whose current does not vary, such as those of dead inputs, have gain 0.
        centered = currents - currents.mean(0)
        variance = centered.square().mean(0)
        covariance = (centered * wanted).mean(0)
        self.gain = torch.where(variance > 0, covariance / variance, 0)
        self.offset = wanted.mean(0) - self.gain * currents.mean(0)
        if self.layer.bias is not None:
            self.offset = self.offset + self.layer.bias.detach()

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
    tile_shape: tuple[int, int] = (128, 128),
    adc_resolution: int | None = 8,
    r_on: float = 1.4e4,
    r_off: float = 5e7,
    max_input_voltage: float = 0.3,
    lrs_proportion: float = 0.0,
    hrs_proportion: float = 0.0,
    conductance_states: int | None = None,
    device_variability: float = 0.0,
    fault_seed: int = 0,
) -> nn.Module:
    """A copy of a network whose linear and convolutional layers are memristor crossbars.

    MemTorch builds them, of VTEAM devices; its defaults are the double-column scheme, naive
    mapping, 1T1R cells and an ADC overflow rate of 0.

    Args:
        network: layers in `network.phi`, a Sequential; convolutions without stride or padding.
        images: (N, inputs) to calibrate with, painted; a thousand training images are enough.
        tile_shape: rows and columns of a tile.
        adc_resolution: bits of the ADC of each tile, 2 or more; None reads currents exactly.
        r_on, r_off: lowest and highest resistance of a device, ohms.
        max_input_voltage: volts that the largest input is encoded as.
        lrs_proportion, hrs_proportion: proportions of devices stuck at r_on and at r_off, 0 to 1.
        conductance_states: how many equidistant conductances a device can have; None: any.
        device_variability: standard deviation of r_on and r_off between devices, as a proportion.
        fault_seed: what stuck devices and variability are drawn with.

    Raises:
        UserError: MemTorch is not installed.
    """
    need(memtorch is not None, NOT_INSTALLED)
    images = images.cpu()
    digital = copy.deepcopy(network).cpu().eval()
    crossbar = copy.deepcopy(digital)
    with quick_crossbars():
        patch_model(
            crossbar,
            memristor_model=device_factory(r_on, r_off, device_variability, fault_seed),
            memristor_model_params={"cell": True},
            module_parameters_to_patch=[nn.Linear, nn.Conv2d],
            tile_shape=tuple(tile_shape),
            max_input_voltage=max_input_voltage,
            ADC_resolution=adc_resolution,
            quant_method="linear" if adc_resolution else None,
            verbose=False,
        )
    # MemTorch draws the stuck devices from NumPy's global generator.
    np.random.seed(fault_seed)
    inputs = digital_inputs = images
    with torch.no_grad():
        for index, layer in enumerate(crossbar.phi):
            if hasattr(layer, "crossbars"):
                if conductance_states:
                    for columns in layer.crossbars:
                        round_conductances(columns, conductance_states)
                if lrs_proportion or hrs_proportion:
                    apply_device_faults(layer, lrs_proportion, hrs_proportion, 0.0)
                layer = crossbar.phi[index] = CrossbarLayer(layer)
                layer.calibrate(inputs, digital_inputs)
            inputs, digital_inputs = layer(inputs), digital.phi[index](digital_inputs)
    return crossbar.eval()


def round_conductances(crossbar, states: int) -> None:
    """Round each device to the nearest of `states` conductances between its 1/r_off and 1/r_on.

    MemTorch's own `FiniteConductanceStates` leaves every device as it is: its rounding of a range
    that is a tensor fails, and it passes over the failure.
    """
    lowest = 1 / torch.tensor(np.vectorize(lambda device: device.r_off)(crossbar.devices))
    highest = 1 / torch.tensor(np.vectorize(lambda device: device.r_on)(crossbar.devices))
    steps = (crossbar.conductance_matrix - lowest) / (highest - lowest) * (states - 1)
    rounded = lowest + steps.round() / (states - 1) * (highest - lowest)
    crossbar.conductance_matrix = rounded.float()


class StuckDevices(nn.Module):
    """A weight as the crossbar will have it: limited, and while training with random stuck devices.

    A device stuck at low resistance adds or takes away the largest weight of its layer, so weights
    are limited to `LIMIT` standard deviations: the largest is then no rare outlier that makes each
    stuck device worse. The gradient passes through limit and damage unchanged (straight-through),
    so all weights learn to do without any of the others. Each step has a proportion of stuck
    devices of its own, from none to `MOST`, so that the network is right with few of them as with
    many.
    """

    LIMIT = 0.7
    MOST = 0.3

    def forward(self, weight: Tensor) -> Tensor:
        values = weight.detach()
        limit = self.LIMIT * values.std().item()
        positive, negative = values.clamp(0, limit), (-values).clamp(0, limit)
        if self.training:
            proportion = self.MOST * torch.rand((), device=weight.device)
            for devices in (positive, negative):
                devices[torch.rand_like(devices) < proportion] = limit
        return weight + (positive - negative - values)


class Imitation(Loss):
    """Cross entropy against the predictions of a trained network (Hinton et al. 2015).

    They have no label noise to memorise, and invariance to colour, or what there is of it, need not
    be found again under damage, where an objective such as IRM's has too much variance.
    """

    def __init__(self, teacher: Network):
        self.teacher = teacher.eval()

    def __call__(self, logits: Tensor, batch: Batch) -> Tensor:
        with torch.no_grad():
            predictions = self.teacher(batch.images.flatten(0, -2), batch.colors.flatten()) > 0
        labels = predictions.float().view_as(logits)
        return self.losses(logits, batch._replace(labels=labels)).mean(-1)


def harden(run: trainer.Run, options: dict) -> Network:
    """A copy of a trained network that decides as it does whether or not devices are stuck.

    Args:
        run: the network to imitate, which is left as it is, and the images to imitate it on. They
            are shown in both colours: what counts is what it says of them.
        options: arguments of the training before, but this one takes `HARDENING` times as long.
    """
    options = options | {"iteration": HARDENING * options["iteration"], "average_last": 0.25}
    print(f"Hardening: {options['iteration']} iterations")
    torch.manual_seed(run.generator.initial_seed())
    hardened = copy.deepcopy(run.network)
    for layer in hardened.layers():
        # A single weight is its layer's largest anyway, and has no standard deviation.
        if layer.weight.numel() > 1:
            parametrize.register_parametrization(layer, "weight", StuckDevices())
    run_on = run._replace(network=hardened, train=run.train.in_both_colors())
    trainer.call(trainer.train, [run_on], Imitation(run.network), options=options)
    return hardened


def crossbar_parser() -> Parser:
    parser = trainer.training_parser("Train, move the network onto a memristor crossbar, test.")
    side, amount, share = number(int, 1), number(float, 0, above=True), number(float, 0, 1)
    add = parser.add_argument
    add("--tile_shape", type=side, nargs=2, default=(128, 128), help="rows and columns of a tile")
    add("--adc_resolution", type=number(int, 2, 16), default=8, help="bits of the ADCs, 2 to 16")
    add("--r_on", type=amount, default=1.4e4, help="lowest resistance of a device, ohms")
    add("--r_off", type=amount, default=5e7, help="highest resistance of a device, ohms")
    add("--max_input_voltage", type=amount, default=0.3, help="voltage of the largest input, volts")
    add("--lrs_proportion", type=share, default=0.0, help="proportion stuck at r_on, 0 to 1")
    add("--hrs_proportion", type=share, default=0.0, help="proportion stuck at r_off, 0 to 1")
    add("--conductance_states", type=number(int, 2), help="states per device (default: any)")
    spread = "standard deviation of r_on and r_off between devices, relative to their mean, 0 to 1"
    add("--device_variability", type=share, default=0.0, help=spread)
    add("--fault_seed", type=number(int, 0, 2**32 - 1), default=0, help="seed of the stuck devices")
    longer = f"train on for stuck devices, {HARDENING} times as long"
    add("--harden", action="store_true", help=longer)
    add("--sweep", action="store_true", help="draw accuracy over stuck devices and ADC resolution")
    add("--fault_patterns", type=side, default=5, help="of --sweep, for each proportion")
    add("--figure", default="figures/crossbar.png", help="where --sweep saves its figure")
    return parser


def describe(crossbar: nn.Module) -> str:
    """How many layers, tiles and devices a crossbar has."""
    layers = [layer.layer for layer in crossbar.phi if isinstance(layer, CrossbarLayer)]
    columns = [column for layer in layers for column in layer.crossbars]
    tiles = sum(len(column.devices) for column in columns)
    devices = sum(column.devices.size for column in columns)
    return f"{len(layers)} layers on {tiles} tiles, {devices} devices"


def on_crossbar(repetition: trainer.Repetition, options: dict) -> tuple[nn.Module, dict]:
    """A repetition's network on a crossbar calibrated with training images; its test result."""
    network, calibration = repetition.run.network, next(repetition.run.train.chunks())
    images = network.paint(calibration.images, calibration.colors)
    crossbar = trainer.call(to_crossbar, network, images, options=options)
    return crossbar, trainer.evaluate(crossbar, repetition.test)


def sweep(args: argparse.Namespace) -> None:
    """Draw the test accuracy over stuck devices and over ADC resolution, plain and hardened.

    One network of each kind; as many fault patterns as asked, drawn as a band from worst to best.
    """
    args.repetitions = 1
    (plain,) = trainer.repetitions(args)
    hardened = plain._replace(run=plain.run._replace(network=harden(plain.run, vars(args))))
    patterns = range(args.fault_seed, args.fault_seed + args.fault_patterns)
    proportions = (0, 0.025, 0.05, 0.1, 0.15, 0.2)
    figure = Figure(figsize=(10, 4), layout="constrained")
    over_faults, over_bits = figure.subplots(1, 2, sharey=True)
    panels = (
        (over_faults, "lrs_proportion", proportions, patterns, "devices stuck at low resistance"),
        (over_bits, "adc_resolution", range(2, 11), patterns[:1], "ADC resolution, bits"),
    )
    steps = 2 * sum(len(values) * len(seeds) for _, _, values, seeds, _ in panels)
    progress = tqdm(total=steps, disable=None, leave=False)

    def accuracy(repetition: trainer.Repetition, **changed) -> float:
        progress.update()
        return 100 * on_crossbar(repetition, vars(args) | changed)[1]["Accuracy"]

    for name, each, color in (("plain", plain, "tab:orange"), ("hardened", hardened, "tab:blue")):
        digital = 100 * trainer.evaluate(each.run.network, each.test)["Accuracy"]
        for axis, option, values, seeds, label in panels:
            rows = [[accuracy(each, fault_seed=s, **{option: v}) for s in seeds] for v in values]
            means, worst, best = ([of(row) for row in rows] for of in (fmean, min, max))
            for value, mean, row in zip(values, means, rows, strict=True):
                spread = f"worst {min(row):.2f}, best {max(row):.2f}"
                print(f"{option} {value}, {name}: accuracy {mean:.2f} % ({spread})")
            axis.plot(values, means, "o-", color=color, label=f"{name}, crossbar")
            axis.fill_between(values, worst, best, color=color, alpha=0.25)
            line = {"color": color, "linestyle": "--", "linewidth": 1}
            axis.axhline(digital, label=f"{name}, digital ({digital:.1f} %)", **line)
            axis.set_xlabel(label)
    progress.close()
    for axis in (over_faults, over_bits):
        axis.axhline(50, color="gray", linestyle=":", label="chance")
        axis.grid(alpha=0.3)
    over_faults.xaxis.set_major_formatter(PercentFormatter(1))
    over_faults.set_ylabel("test accuracy, %")
    over_faults.set_title(f"{args.trainer}: band over {len(patterns)} fault patterns", fontsize=10)
    over_bits.legend(fontsize=8, loc="lower right")
    save_figure(figure, args.figure)


def main() -> None:
    parser = crossbar_parser()
    args = trainer.parse_arguments(parser)
    if args.r_on >= args.r_off:
        parser.error(f"--r_on {args.r_on} is not below --r_off {args.r_off}")
    if args.lrs_proportion + args.hrs_proportion > 1:
        parser.error("--lrs_proportion and --hrs_proportion add up to more than 1")
    need(memtorch is not None, NOT_INSTALLED)
    if args.sweep:
        make_folder(Path(args.figure).parent)
        return sweep(args)
    results = []
    for repetition in trainer.repetitions(args, harden if args.harden else None):
        crossbar, result = on_crossbar(repetition, vars(args))
        print(f"Crossbar: {describe(crossbar)}")
        print(f"Crossbar test result: {result}", flush=True)
        results.append((repetition.result, result))
    for name, of_each in zip(("Digital", "Summary"), zip(*results, strict=True), strict=True):
        print(f"{name}: {trainer.summarize(of_each)}")


if __name__ == "__main__":
    run(main)
