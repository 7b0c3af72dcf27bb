"""Train, move the network onto a MemTorch memristor crossbar, test it again.

python memristor.py --seed 1234 --trainer IRM --no_cuda
python memristor.py --load_model data/models/IRM_MLP_seed1234_repetition*.pt

Conductances are in siemens, resistances in ohms, voltages in volts, currents in amperes.
"""

import argparse
import copy
import itertools
import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim.swa_utils import update_bn

from dataset import Batch, Dataset, Samples, concatenate
from metric import metrics, summarize
from model import ERM, Loss, Network
from preprocessing import UserError, number, run_command, warn
from trainer import (
    default_arguments,
    evaluate,
    load,
    load_saved,
    predict,
    repetitions,
    save,
    settings_of_its_own,
    train,
    training_parser,
    training_settings,
    warn_of_unused,
)

try:
    from memtorch.bh.crossbar.Crossbar import Crossbar, Scheme
    from memtorch.bh.memristor import VTEAM
    from memtorch.bh.nonideality.DeviceFaults import apply_device_faults
    from memtorch.map.Parameter import naive_map

    IMPORT_ERROR = None
except Exception as error:  # whatever one that was built for other versions may raise
    Crossbar, IMPORT_ERROR = object, error

HEADROOM = 1.25  # by which inputs may exceed those of the calibration before they are cut off
CALIBRATION = 1000  # training samples to calibrate with, each in both colours
HARDENING = 3  # times as long as the training before it


class CellMatrix(Crossbar):
    """MemTorch's crossbar, with its conductances in the matrix that 1T1R cells are read from.

    MemTorch writes each of them into a device object as well, one by one, which takes seconds.
    """

    def update(self, from_devices: bool = True, parallelize: bool = False) -> None:
        pass


def program(
    weight: Tensor,
    device: "VTEAM",
    draws: np.random.Generator,
    *,
    tile_shape: tuple[int, int],
    lrs_proportion: float,
    hrs_proportion: float,
    conductance_states: int | None,
    device_variability: float,
) -> list[CellMatrix]:
    """Weights (outputs, ...) → MemTorch's crossbars of the positive and of the negative ones.

    They are made of devices like the one given; the rest is as in `to_crossbar`.
    """
    crossbars = []
    for conductances in naive_map(weight, device.r_on, device.r_off, Scheme.DoubleColumn):
        crossbar = CellMatrix(lambda: device, {}, conductances.shape, tuple(tile_shape))
        if device_variability:
            vary(crossbar.devices, device_variability, draws)
        crossbar.write_conductance_matrix(conductances)  # within the limits of each device
        if conductance_states:  # MemTorch's FiniteConductanceStates fails silently
            round_conductances(crossbar, conductance_states)
        crossbars.append(crossbar)
    if lrs_proportion or hrs_proportion:
        layer = SimpleNamespace(crossbars=crossbars)  # all that it needs of one
        apply_device_faults(layer, lrs_proportion, hrs_proportion, 0.0)
    return crossbars


def vary(devices: np.ndarray, variability: float, draws: np.random.Generator) -> None:
    """Put copies of the devices in their places, with r_on and r_off drawn for each.

    Both are log-normal: their mean is the device's own, their standard deviation `variability`
    times that. An r_off below its r_on becomes that r_on.
    """
    variance = math.log(1 + variability**2)  # of the logarithm
    on = draws.lognormal(-variance / 2, math.sqrt(variance), devices.shape)
    off = draws.lognormal(-variance / 2, math.sqrt(variance), devices.shape)
    for index, device in np.ndenumerate(devices):
        devices[index] = copy.copy(device)
        devices[index].r_on = device.r_on * on[index]
        devices[index].r_off = max(device.r_off * off[index], devices[index].r_on)


def round_conductances(crossbar: CellMatrix, states: int) -> None:
    """Round each device to the nearest of `states` conductances between its 1/r_off and 1/r_on."""
    lowest = torch.tensor([1 / device.r_off for device in crossbar.devices.flat])
    highest = torch.tensor([1 / device.r_on for device in crossbar.devices.flat])
    matrix = crossbar.conductance_matrix
    step = (highest - lowest).view(matrix.shape) / (states - 1)
    lowest = lowest.view(matrix.shape)
    steps = ((matrix - lowest) / step.clamp(min=1e-30)).round()  # 0 where r_off is r_on
    crossbar.conductance_matrix = lowest + steps * step


def quantize_currents(currents: Tensor, bits: int) -> Tensor:
    """A linear ADC without overflow, in place, as MemTorch's `quantize` does it row by row.

    Its step is the power of two at which the largest of a row (..., columns of a tile) just fits.
    Columns that a layer leaves unused count, as in MemTorch: broken devices there widen the range.
    """
    largest = currents.abs().amax(-1, keepdim=True)
    mantissa, exponent = torch.frexp(largest + 1e-12)  # mantissa * 2 ** exponent, from 0.5 to 1
    exponent -= (mantissa == 0.5).int()  # 2 ** exponent is now the next power of two
    step = torch.ldexp(torch.ones_like(mantissa), exponent + 1 - bits)
    bound = 2 ** (bits - 1)
    return currents.div_(step).add_(0.5).floor_().clamp_(-bound, bound - 1).mul_(step)


class CrossbarLayer(nn.Module):
    """A layer on a crossbar, tile by tile for a whole batch, with a fixed range of inputs.

    All that its outputs depend on stands in buffers, so that `state_dict` holds it, and nothing of
    MemTorch is needed any more.

    Args:
        positive: MemTorch's crossbar of the positive weights
        negative: that of the negative ones, of the same shape
        kernel_size: that of a convolution, None for a fully connected layer
        max_input_voltage: volts that the largest input becomes
        adc_resolution: bits of each tile's ADC, None for an exact one
    """

    def __init__(
        self,
        positive: "Crossbar",
        negative: "Crossbar",
        kernel_size: tuple[int, int] | None,
        max_input_voltage: float,
        adc_resolution: int | None,
    ):
        super().__init__()
        self.kernel_size = kernel_size
        add = self.register_buffer
        # Siemens, (2, tiles, rows of a tile, columns of a tile): positive, negative.
        matrices = [positive.conductance_matrix, negative.conductance_matrix]
        add("conductances", torch.stack(matrices).float())
        # Which tile stands where, (tiles above each other, tiles beside each other).
        add("grid", positive.tiles_map.long())
        add("max_input_voltage", torch.tensor(max_input_voltage))
        add("adc_resolution", torch.tensor(adc_resolution or 0))
        # What `calibrate` fits: the input that becomes max_input_voltage, and of each column the
        # output per ampere and the output without a current.
        add("input_range", torch.ones(()))
        add("gain", torch.ones(positive.columns))
        add("offset", torch.zeros(positive.columns))

    def rows(self, inputs: Tensor) -> Tensor:
        """Inputs as rows for the crossbar: (N, in), or (N · positions, in) of a convolution."""
        if self.kernel_size is None:
            return inputs.flatten(0, -2)
        return nn.functional.unfold(inputs, self.kernel_size).transpose(1, 2).flatten(0, 1)

    def currents(self, rows: Tensor) -> Tensor:
        """Rows (N, in) → (N, columns), as MemTorch's `tiled_inference` has one sample's."""
        limit, bits = self.max_input_voltage, int(self.adc_resolution)
        voltages = (rows * (limit / self.input_range)).clamp(-limit, limit)
        tiles = self.conductances[0] - self.conductances[1]
        height, width = tiles.shape[1:]
        total = voltages.new_zeros(len(rows), self.grid.shape[1], width)
        for volts, in_line in zip(voltages.split(height, 1), self.grid, strict=True):
            conductances = tiles[in_line, : volts.shape[1]]
            currents = torch.einsum("nr,trc->ntc", volts, conductances)
            total += quantize_currents(currents, bits) if bits else currents
        return total.flatten(1)[:, : len(self.gain)]

    def calibrate(self, inputs: Tensor, wanted: Tensor) -> None:
        """Fix range, gains and offsets (least squares) by inputs and the outputs wanted for them.

        Their shapes are those of the layer, (N, in) and (N, out), or (N, channels, height, width).
        """
        rows = self.rows(inputs)
        if self.kernel_size is None:
            wanted = wanted.flatten(0, -2)
        else:
            wanted = wanted.movedim(1, -1).flatten(0, 2)
        self.input_range = HEADROOM * rows.abs().max().clamp(min=1e-12)
        currents = self.currents(rows)
        centered = currents - currents.mean(0)
        variance = centered.square().mean(0)
        covariance = (centered * (wanted - wanted.mean(0))).mean(0)
        varies = variance > 1e-12 * currents.square().mean(0)  # by more than rounding
        self.gain = torch.where(varies, covariance / variance, 0)
        self.offset = wanted.mean(0) - self.gain * currents.mean(0)

    def forward(self, inputs: Tensor) -> Tensor:
        """What the layer's digital forward gives, of the same shape."""
        outputs = self.currents(self.rows(inputs)) * self.gain + self.offset
        if self.kernel_size is None:
            return outputs.unflatten(0, inputs.shape[:-1])
        width = inputs.shape[-1] - self.kernel_size[1] + 1
        return outputs.unflatten(0, (len(inputs), -1, width)).movedim(-1, 1)


def to_crossbar(
    network: Network,
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
) -> Network:
    """A copy of a network, on the CPU, whose layers with weights are memristor crossbars.

    MemTorch builds them of VTEAM devices in 1T1R cells, in the double-column scheme with its naive
    mapping; the ADCs' overflow rate is 0. Batch normalisation stays digital, as the linear tuning
    after a layer does. Raises UserError without MemTorch, or where resistances or layers don't fit.

    Args:
        network: its `phi` is a flat Sequential of what `check_network` lets pass
        images: (N, 2 or 3, 28, 28), normalised, to calibrate with, as of `calibration_images`
        tile_shape: rows and columns of a tile
        adc_resolution: bits of the ADC of each tile, 2 to 16, None for an exact one
        r_on: lowest resistance of a device, ohms
        r_off: highest resistance of a device, ohms
        max_input_voltage: volts of 1.25 times the largest input in calibration; more is cut off
        lrs_proportion: proportion of devices stuck at r_on, 0 to 1
        hrs_proportion: proportion of devices stuck at r_off, 0 to 1; drawn for both, it is r_on
        conductance_states: equidistant conductances that a device can have, None for any
        device_variability: standard deviation of r_on and r_off between devices, relative to their
            mean, 0 to 1; both are log-normal
        fault_seed: seed of stuck devices and variability
    """
    check_devices(r_on, r_off)
    check_network(network)
    digital = copy.deepcopy(network).cpu().eval()
    crossbar = copy.deepcopy(digital)
    device = VTEAM(r_off=r_off, r_on=r_on)
    draws = np.random.default_rng(fault_seed)
    state_before = np.random.get_state()
    np.random.seed(fault_seed)  # MemTorch draws stuck devices from NumPy's global generator
    with torch.no_grad():
        inputs = digital.channels(images.cpu()).clone()
        digital_inputs = inputs.clone()
        for index, layer in enumerate(digital.phi):
            digital_outputs = layer(digital_inputs)
            if isinstance(layer, (nn.Linear, nn.Conv2d)):
                positive, negative = program(
                    layer.weight,
                    device,
                    draws,
                    tile_shape=tile_shape,
                    lrs_proportion=lrs_proportion,
                    hrs_proportion=hrs_proportion,
                    conductance_states=conductance_states,
                    device_variability=device_variability,
                )
                kernel_size = layer.kernel_size if isinstance(layer, nn.Conv2d) else None
                crossbar.phi[index] = CrossbarLayer(
                    positive, negative, kernel_size, max_input_voltage, adc_resolution
                )
                crossbar.phi[index].calibrate(inputs, digital_outputs)
            inputs = crossbar.phi[index](inputs)
            digital_inputs = digital_outputs
    np.random.set_state(state_before)
    return crossbar.eval()


def calibration_images(training: Samples) -> Tensor:
    """The first 1000 training images in both colours, (2000, 2, 28, 28), normalised.

    In both, so that no gain is fitted to a colour. Fewer if there are fewer.
    """
    some = training[:CALIBRATION]
    return concatenate([some, some.recolored()]).batch().images


def check_devices(r_on: float, r_off: float) -> None:
    """Raise UserError if there is no MemTorch, or if arguments of `to_crossbar` contradict."""
    if IMPORT_ERROR is not None:
        reason = str(IMPORT_ERROR).split("\n")[0] or type(IMPORT_ERROR).__name__
        raise UserError(f"MemTorch can't be imported ({reason}): run ./run.sh, or see README.md")
    if r_on >= r_off or math.isclose(r_on, r_off):  # MemTorch refuses these, too
        raise UserError(f"--r_on {r_on} is not below --r_off {r_off}")


def check_network(network: Network) -> None:
    """Raise UserError if a network has weights that crossbars can't take.

    They take nn.Linear, and nn.Conv2d without stride, padding, dilation and groups. Batch
    normalisation is computed digitally, and so is what has no weights. Everything else that has
    weights, a class derived from these two as well, is refused, wherever it stands.
    """
    names = [name for name in network.state_dict() if not name.startswith("phi.")]
    if names != ["output_layer"] or not isinstance(network.phi, nn.Sequential):
        raise UserError("crossbars take a network whose weights are all in `phi`, an nn.Sequential")
    for index, layer in enumerate(network.phi):
        if type(layer) is nn.Conv2d:
            plain = layer.stride == (1, 1) and layer.padding == (0, 0)
            fits = plain and layer.dilation == (1, 1) and layer.groups == 1
        else:
            digital = (nn.Linear, nn.BatchNorm1d, nn.BatchNorm2d)
            fits = type(layer) in digital or not layer.state_dict()
        if not fits:
            raise UserError(
                f"crossbars can't take phi[{index}], {type(layer).__name__}: of layers with weights"
                " they take nn.Linear, and nn.Conv2d without stride, padding, dilation and groups"
            )


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
    """ERM with a network's decisions as labels (after Hinton et al. 2015): no label noise.

    Args:
        teacher: the network, in evaluation mode all the time
    """

    def __init__(self, teacher: Network):
        super().__init__()
        self.teacher = teacher.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> "Imitation":
        super().train(mode)
        self.teacher.eval()
        return self

    def losses(self, logits: Tensor, batch: Batch) -> Tensor:
        with torch.no_grad():
            decisions = self.teacher(batch.images) > 0
        return super().losses(logits, batch._replace(labels=decisions.float()))


def harden(network: Network, training: Samples, **settings) -> Network:
    """A copy of a trained network that decides as it does whether or not devices are stuck.

    Trained on `training` in both colours by `trainer.train` with its `settings`, but `HARDENING`
    times as long and without weight decay. Raises UserError where `check_network` does.

    It trains as `--steady` does only where the settings say so.
    """
    check_network(network)
    settings["iteration"] = HARDENING * settings.get("iteration", 400)
    settings["weight_decay"] = 0.0
    print(f"Hardening: {settings['iteration']} iterations, the loss is that against its decisions")
    hardened = copy.deepcopy(network)
    for layer in hardened.phi:
        # A single weight is its layer's largest anyway, and has no standard deviation.
        if isinstance(layer, (nn.Linear, nn.Conv2d)) and layer.weight.numel() > 1:
            parametrize.register_parametrization(layer, "weight", StuckDevices())
    both_colors = concatenate([training, training.recolored()])
    train(hardened, Imitation(copy.deepcopy(network)), both_colors, **settings)
    for layer in hardened.phi:
        if parametrize.is_parametrized(layer):
            parametrize.remove_parametrizations(layer, "weight")
    update_bn(both_colors.chunks(), hardened)  # of sound devices
    return hardened.eval()


def memristor_parser() -> argparse.ArgumentParser:
    """All flags of a training, and those of the crossbar; defaults are those of `to_crossbar`."""
    parser = training_parser("Train, move the network onto a memristor crossbar, test it again.")
    add = parser.add_argument
    ohms, proportion = number(float, 1, 1e12), number(float, 0, 1)
    saved = "move networks that --save_model saved onto crossbars, in place of training"
    add("--load_model", nargs="+", metavar="FILE", help=saved)
    hardening = f"train on for broken devices, {HARDENING} times as long"
    add("--harden", action="store_true", help=hardening)

    tile = "rows and columns of a tile, 1 to 1024"
    add("--tile_shape", type=number(int, 1, 1024), nargs=2, default=(128, 128), help=tile)
    bits = "bits of the ADC of each tile, 2 to 16"
    add("--adc_resolution", type=number(int, 2, 16), default=8, help=bits)
    add("--r_on", type=ohms, default=1.4e4, help="lowest resistance of a device, ohms")
    add("--r_off", type=ohms, default=5e7, help="highest resistance of a device, ohms")
    volts = "volts of 1.25 times the largest input in calibration; more is cut off"
    add("--max_input_voltage", type=number(float, 1e-9, 1000), default=0.3, help=volts)
    lrs = "proportion of devices stuck at r_on, 0 to 1"
    add("--lrs_proportion", type=proportion, default=0.0, help=lrs)
    hrs = "proportion of devices stuck at r_off, 0 to 1; drawn for both, it is r_on"
    add("--hrs_proportion", type=proportion, default=0.0, help=hrs)
    states = "equidistant conductances that a device can have, 2 to 65536; any, if not given"
    add("--conductance_states", type=number(int, 2, 65536), help=states)
    variability = "standard deviation of r_on and r_off between devices, relative, 0 to 1"
    add("--device_variability", type=proportion, default=0.0, help=variability)
    fault_seed = "seed of stuck devices and variability, the same in each repetition"
    add("--fault_seed", type=number(int, 0, 2**32 - 1), default=0, help=fault_seed)
    return parser


def crossbar_settings(args: argparse.Namespace) -> dict:
    """Those of the command line's arguments that `to_crossbar` takes."""
    return {
        "tile_shape": tuple(args.tile_shape),
        "adc_resolution": args.adc_resolution,
        "r_on": args.r_on,
        "r_off": args.r_off,
        "max_input_voltage": args.max_input_voltage,
        "lrs_proportion": args.lrs_proportion,
        "hrs_proportion": args.hrs_proportion,
        "conductance_states": args.conductance_states,
        "device_variability": args.device_variability,
        "fault_seed": args.fault_seed,
    }


def seed_repetition(args: argparse.Namespace, repetition: int) -> None:
    """Seed as `trainer.repetitions` does, so that what follows doesn't depend on what was before.

    A loaded network gets the hold-out of its training, and is hardened as right after it.
    """
    torch.manual_seed(1000 * args.seed + repetition - 1)


def trained(args: argparse.Namespace, data: Dataset) -> Iterator[tuple[Network, Samples]]:
    """Yield each network, trained, hardened if asked for and saved, and its training samples."""
    for repetition, network, loss, training, validation in repetitions(args, data):
        print(f"Repetition {repetition} of {args.repetitions}")
        check_network(network)
        train(network, loss, training, validation, **training_settings(args))
        if args.harden:
            network = harden_repetition(args, repetition, network, training, data.test)
        save(args, repetition, network, loss, data.form)
        yield network, training


def harden_repetition(
    args: argparse.Namespace, repetition: int, network: Network, training: Samples, test: Samples
) -> Network:
    """What `harden` makes of a network, whose test result is printed before."""
    print(f"Before hardening: {evaluate(network, test)}")
    seed_repetition(args, repetition)
    return harden(network, training, **training_settings(args))


class Saved(NamedTuple):
    """A file of `--save_model`."""

    path: str
    network: Network
    loss: Loss
    repetition: int
    arguments: argparse.Namespace
    data: str  # what the data were

    @property
    def hardened(self) -> bool:
        return getattr(self.arguments, "harden", False)  # exp-mnist.py has no such flag

    @property
    def settings(self) -> dict:
        """What all networks of a Summary have in common."""
        chosen = {name: getattr(self.arguments, name) for name in ("trainer", "network", "seed")}
        return {**chosen, **settings_of_its_own(self.arguments), "data": self.data}


def read_networks(paths: list[str]) -> list[Saved]:
    """Saved networks in the order of their repetitions; UserError if they don't go together."""
    files = []
    for path in paths:
        network, loss, saved = load_saved(path)
        check_network(network)
        files.append(
            Saved(path, network, loss, saved["repetition"], saved["arguments"], saved["data"])
        )
    files.sort(key=lambda file: file.repetition)
    for previous, file in itertools.pairwise(files):
        ours, theirs = file.settings, previous.settings
        names = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
        if names:
            raise UserError(
                f"{previous.path} and {file.path} differ in {', '.join(names)}, and a Summary is "
                "of one setting: call this once for each"
            )
        if file.repetition == previous.repetition:
            raise UserError(f"{previous.path} and {file.path} are the same repetition's")
    return files


def arguments_beside(files: list[Saved]) -> argparse.Namespace:
    """The command line's arguments, but those of the training as they are in the files."""
    of_files = {"repetitions": len(files)}
    not_theirs = ("repetitions", "no_cuda", "evaluation_steps", "save_model")
    for name, value in vars(files[0].arguments).items():
        if name in default_arguments() and name not in not_theirs:
            of_files[name] = value
    # What isn't given stays as it is in the namespace: so this tells what is given.
    args = memristor_parser().parse_args(namespace=argparse.Namespace(**of_files))
    ignored = []
    for name, value in of_files.items():
        if name != "dataset_path" and getattr(args, name) != value:
            ignored.append(f"--{name}")
            setattr(args, name, value)
    if ignored:
        warn(f"{', '.join(sorted(ignored))}: what the files say counts, not what was given beside")
    if files[0].hardened and args.harden:
        warn("--harden: these networks were saved hardened, and stay as they are")
    elif args.save_model and not args.harden:
        warn("--save_model: there is nothing new to save without --harden")
    args.harden = args.harden or files[0].hardened
    return args


def loaded(
    args: argparse.Namespace, data: Dataset, files: list[Saved]
) -> Iterator[tuple[Network, Samples]]:
    """Yield what `trained` does, of saved networks."""
    if data.form != files[0].data:
        warn(f"the networks were trained on other data than these: {files[0].data}")
    for position, file in enumerate(files, 1):
        print(f"Repetition {position} of {len(files)}")
        print(f"Loaded: {file.path}")
        seed_repetition(args, file.repetition)
        training, _ = data.hold_out(args.validation)
        network = file.network.to(training.images.device)
        if args.harden and not file.hardened:
            network = harden_repetition(args, file.repetition, network, training, data.test)
            save(args, file.repetition, network, file.loss, file.data)
        yield network, training


def result(network: Network, test: Samples, name: str) -> dict[str, float]:
    """The test's metrics, printed as a line of the log."""
    logits = predict(network, test)
    figures = metrics(logits, test.labels)
    print(f"{name}: {figures}", flush=True)
    if (logits > 0).unique().numel() == 1:
        warn(f"{name}: it decides alike on all test images, a constant predictor")
    return figures


def main() -> None:
    args = memristor_parser().parse_args()
    check_devices(args.r_on, args.r_off)
    if args.load_model:
        files = read_networks(args.load_model)
        args = arguments_beside(files)
        data = load(args)
        networks = loaded(args, data, files)
    else:
        warn_of_unused(args)
        data = load(args)
        networks = trained(args, data)

    digital, on_crossbar = [], []
    for network, training in networks:
        digital.append(result(network, data.test, "Test result"))
        crossbar = to_crossbar(network, calibration_images(training), **crossbar_settings(args))
        on_crossbar.append(result(crossbar, data.test, "Crossbar test result"))
    print(f"Digital: {summarize(digital)}")
    print(f"Summary: {summarize(on_crossbar)}")


if __name__ == "__main__":
    run_command(main)
