"""Train, move the network onto a MemTorch memristor crossbar, test it again.

    python memristor.py --seed 1234 --trainer IRM --no_cuda

Conductances are in siemens, resistances in ohms, voltages in volts, currents in amperes.
"""

import argparse
import copy
import functools
import itertools
import statistics
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from tqdm import tqdm

from dataset import Batch
from model import Loss, Network
from preprocessing import UserError, make_folder, number, run, save_figure
from trainer import (
    Repetition,
    Run,
    evaluate,
    parse_arguments,
    repetitions,
    summarize,
    train,
    training_parser,
)

try:
    import memtorch
    from memtorch.bh.nonideality.DeviceFaults import apply_device_faults
    from memtorch.map.Parameter import naive_map
    from memtorch.mn.Module import patch_model
except ImportError:
    memtorch = None

TIME_SERIES_RESOLUTION = 1e-10  # seconds, of the VTEAM devices
# The inputs of a layer may exceed those of the calibration by this factor before they are cut off.
HEADROOM = 1.25
# How many times as long as the training before it hardening takes.
HARDENING = 3
NOT_INSTALLED = "MemTorch is not installed: run ./run.sh, or see 'The crossbar' in README.md"


def device_factory(r_on: float, r_off: float, variability: float, generator: np.random.Generator):
    """What `patch_model` calls for each cell of a crossbar: returns a VTEAM device.

    Identical cells share one device object, as only its resistances are read; where devices vary,
    each is a copy with resistances of its own, drawn from a normal distribution whose standard
    deviation is `variability` times the mean, at least a tenth of the mean.
    """
    prototype = memtorch.bh.memristor.VTEAM(TIME_SERIES_RESOLUTION, r_off=r_off, r_on=r_on)
    draws = itertools.chain.from_iterable(
        np.clip(1 + variability * generator.standard_normal((65536, 2)), 0.1, None).tolist()
        for _ in itertools.count()
    )

    def make_device(cell: bool = False, reference: bool = False, **_):
        if reference or not cell or not variability:
            return prototype
        of_on, of_off = next(draws)
        device = object.__new__(type(prototype))
        device.__dict__.update(prototype.__dict__)
        device.r_on = r_on * of_on
        device.r_off = max(r_off * of_off, device.r_on)
        return device

    return make_device


@contextmanager
def quick_crossbars():
    """Make MemTorch build crossbars that write devices in one pass, and shared ones not at all."""
    original = memtorch.bh.crossbar.Crossbar

    class QuickCrossbar(original):
        def update(self, from_devices: bool = True, parallelize: bool = False) -> None:
            devices = self.devices.ravel()
            # Shared devices: the matrix alone knows the conductances. A matrix of zeros: not yet
            # programmed.
            if devices[0] is devices[-1] or not self.conductance_matrix.any():
                return
            if from_devices:
                super().update(from_devices=True)
            for device, conductance in zip(
                devices, self.conductance_matrix.ravel().tolist(), strict=True
            ):
                device.set_conductance(conductance)

    memtorch.bh.crossbar.Crossbar = QuickCrossbar
    try:
        yield
    finally:
        memtorch.bh.crossbar.Crossbar = original


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
    used = width
    if len(grid[0]) == 1 and not tiles[:, :, columns:].any():
        used = columns  # columns without current are no part of any result
    total = voltages.new_zeros(len(voltages), len(grid[0]), used)
    for volts, row in zip(voltages.split(height, 1), grid, strict=True):
        strip = tiles[row, : volts.shape[1], :used].transpose(0, 1).flatten(1)
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
        height, width = (
            side - kernel + 1
            for side, kernel in zip(inputs.shape[-2:], self.layer.kernel_size, strict=True)
        )
        return outputs.unflatten(0, (len(inputs), -1)).transpose(1, 2).unflatten(2, (height, width))


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

    MemTorch builds them: double-column scheme, naive mapping, 1T1R cells, VTEAM devices.

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
    if memtorch is None:
        raise UserError(NOT_INSTALLED)
    images = images.cpu()
    digital = copy.deepcopy(network).cpu().eval()
    crossbar = copy.deepcopy(digital)
    generator = np.random.default_rng(fault_seed)
    with quick_crossbars():
        patch_model(
            crossbar,
            memristor_model=device_factory(r_on, r_off, device_variability, generator),
            memristor_model_params={"cell": True},
            module_parameters_to_patch=[nn.Linear, nn.Conv2d],
            mapping_routine=naive_map,
            transistor=True,
            tile_shape=tuple(tile_shape),
            max_input_voltage=max_input_voltage,
            ADC_resolution=adc_resolution,
            ADC_overflow_rate=0.0,
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
    devices of its own, from none to `most`, so that the network is right with few of them as with
    many.
    """

    LIMIT = 0.7

    def __init__(self, most: float):
        super().__init__()
        self.most = most

    def forward(self, weight: Tensor) -> Tensor:
        values = weight.detach()
        limit = self.LIMIT * values.std().item()
        positive, negative = values.clamp(0, limit), (-values).clamp(0, limit)
        if self.training:
            proportion = self.most * torch.rand((), device=weight.device)
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


def harden(run: Run, iterations: int = 1200, most: float = 0.3, **settings) -> Network:
    """A copy of a trained network that decides as it does whether or not devices are stuck.

    Args:
        run: the network to imitate, which is left as it is, and the images to imitate it on. They
            are shown in both colours: what counts is what it says of them.
        iterations: of this second training; weights are averaged over the last quarter.
        most: up to this proportion of the devices is stuck in training, 0 to 1, others each step.
        settings: further arguments of `train`.
    """
    print(f"Hardening: {iterations} iterations")
    hardened = copy.deepcopy(run.network)
    for layer in hardened.layers():
        # A single weight is its layer's largest anyway, and has no standard deviation.
        if layer.weight.numel() > 1:
            parametrize.register_parametrization(layer, "weight", StuckDevices(most))
    run_on = run._replace(network=hardened, train=run.train.in_both_colors())
    average_last = iterations // 4
    loss = Imitation(run.network)
    train([run_on], loss, iterations=iterations, average_last=average_last, **settings)
    return hardened


CROSSBAR_OPTIONS = (
    "tile_shape",
    "adc_resolution",
    "r_on",
    "r_off",
    "max_input_voltage",
    "lrs_proportion",
    "hrs_proportion",
    "conductance_states",
    "device_variability",
    "fault_seed",
)


def hardening(args: argparse.Namespace) -> Callable[..., Network]:
    """`harden`, for as long as the arguments imply."""
    return functools.partial(harden, iterations=HARDENING * args.iteration)


def crossbar_parser():
    parser = training_parser("Train on ColoredMNIST, move the network onto a memristor crossbar.")
    side, ohms, proportion = number(int, 1), number(float, 0, above=True), number(float, 0, 1)
    add = parser.add_argument
    add("--tile_shape", type=side, nargs=2, default=(128, 128), help="rows and columns of a tile")
    add("--adc_resolution", type=number(int, 2, 16), default=8, help="bits of the ADCs, 2 to 16")
    add("--r_on", type=ohms, default=1.4e4, help="lowest resistance of a device, ohms")
    add("--r_off", type=ohms, default=5e7, help="highest resistance of a device, ohms")
    add("--max_input_voltage", type=ohms, default=0.3, help="voltage of the largest input, volts")
    add("--lrs_proportion", type=proportion, default=0.0, help="devices stuck at r_on, 0 to 1")
    add("--hrs_proportion", type=proportion, default=0.0, help="devices stuck at r_off, 0 to 1")
    add("--conductance_states", type=number(int, 2), help="states per device (default: any)")
    add(
        "--device_variability",
        type=number(float, 0, 1),
        default=0.0,
        help="standard deviation of r_on and r_off between devices, relative to their mean",
    )
    add("--fault_seed", type=number(int, 0, 2**32 - 1), default=0, help="seed of the stuck devices")
    add(
        "--harden",
        action="store_true",
        help=f"train on for stuck devices, {HARDENING} times as long",
    )
    add("--sweep", action="store_true", help="draw accuracy over stuck devices and ADC resolution")
    add("--fault_patterns", type=side, default=5, help="of --sweep, for each proportion")
    add("--figure", default="figures/crossbar.png", help="where --sweep saves its figure")
    return parser


def describe(crossbar: nn.Module) -> str:
    """How many layers, tiles and devices a crossbar has."""
    columns = [
        column
        for layer in crossbar.phi
        if isinstance(layer, CrossbarLayer)
        for column in layer.layer.crossbars
    ]
    tiles = sum(len(column.devices) for column in columns)
    devices = sum(column.devices.size for column in columns)
    return f"{len(columns) // 2} layers on {tiles} tiles, {devices} devices"


def on_crossbar(repetition: Repetition, options: dict) -> tuple[nn.Module, dict[str, float]]:
    """A repetition's network on a crossbar calibrated with training images; its test result."""
    network, calibration = repetition.network, next(repetition.train.chunks())
    images = network.paint(calibration.images, calibration.colors)
    crossbar = to_crossbar(network, images, **options)
    return crossbar, evaluate(crossbar, repetition.test.to(torch.device("cpu")))


def sweep(args: argparse.Namespace, options: dict) -> None:
    """Draw the test accuracy over stuck devices and over ADC resolution, plain and hardened.

    One network of each kind; as many fault patterns as asked, drawn as a band from worst to best.
    """
    args.repetitions = 1
    (plain,) = repetitions(args)
    (hardened,) = repetitions(args, hardening(args))
    networks = {"plain": plain, "hardened": hardened}
    proportions, resolutions = (0, 0.025, 0.05, 0.1, 0.15, 0.2), range(2, 11)
    patterns = range(args.fault_seed, args.fault_seed + args.fault_patterns)
    figure = Figure(figsize=(10, 4), layout="constrained")
    over_faults, over_bits = figure.subplots(1, 2, sharey=True)
    steps = len(networks) * (len(proportions) * len(patterns) + len(resolutions))
    with tqdm(total=steps, disable=None, leave=False) as progress:

        def measure(name: str, changed: dict) -> float:
            progress.update()
            _, result = on_crossbar(networks[name], options | changed)
            return 100 * result["Accuracy"]

        for name, color in (("plain", "tab:orange"), ("hardened", "tab:blue")):
            digital = 100 * networks[name].result["Accuracy"]
            rows = [
                [measure(name, {"lrs_proportion": p, "fault_seed": seed}) for seed in patterns]
                for p in proportions
            ]
            for proportion, row in zip(proportions, rows, strict=True):
                print(
                    f"Stuck at low resistance: {proportion:.1%}, {name}: accuracy "
                    f"{statistics.fmean(row):.2f} % (worst {min(row):.2f}, best {max(row):.2f})"
                )
            shares = [100 * proportion for proportion in proportions]
            over_faults.plot(shares, [statistics.fmean(row) for row in rows], "o-", color=color)
            over_faults.fill_between(
                shares, [min(r) for r in rows], [max(r) for r in rows], color=color, alpha=0.25
            )
            bits = [measure(name, {"adc_resolution": resolution}) for resolution in resolutions]
            for resolution, accuracy in zip(resolutions, bits, strict=True):
                print(f"ADC of {resolution} bits, {name}: accuracy {accuracy:.2f} %")
            over_bits.plot(resolutions, bits, "o-", color=color, label=f"{name}, crossbar")
            for axis in (over_faults, over_bits):
                label = f"{name}, digital ({digital:.1f} %)"
                axis.axhline(digital, color=color, linestyle="--", linewidth=1, label=label)
    for axis, label in (
        (over_faults, "devices stuck at low resistance, %"),
        (over_bits, "ADC resolution, bits"),
    ):
        axis.axhline(50, color="gray", linestyle=":", label="chance")
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    over_faults.set_ylabel("test accuracy, %")
    over_faults.set_title(f"{args.trainer}: band over {len(patterns)} fault patterns", fontsize=10)
    over_bits.set_title("no device stuck", fontsize=10)
    over_bits.legend(fontsize=8, loc="lower right")
    save_figure(figure, args.figure)


def main() -> None:
    parser = crossbar_parser()
    args = parse_arguments(parser)
    if args.r_on >= args.r_off:
        parser.error(f"--r_on {args.r_on} is not below --r_off {args.r_off}")
    if args.lrs_proportion + args.hrs_proportion > 1:
        parser.error("--lrs_proportion and --hrs_proportion add up to more than 1")
    if memtorch is None:
        raise UserError(NOT_INSTALLED)
    options = {name: getattr(args, name) for name in CROSSBAR_OPTIONS}
    if args.sweep:
        make_folder(Path(args.figure).parent)
        return sweep(args, options)
    digital_results, results = [], []
    for repetition in repetitions(args, hardening(args) if args.harden else None):
        crossbar, result = on_crossbar(repetition, options)
        print(f"Crossbar: {describe(crossbar)}")
        print(f"Crossbar test result: {result}", flush=True)
        digital_results.append(repetition.result)
        results.append(result)
    print(f"Digital: {summarize(digital_results)}")
    print(f"Summary: {summarize(results)}")


if __name__ == "__main__":
    run(main)
