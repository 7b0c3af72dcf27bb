"""Experiment on a memristor crossbar: train, map the network onto MemTorch, test it again.

python memristor.py --seed 1234 --trainer IRM --no_cuda
python memristor.py --load_model data/models/IRM

Conductances are in siemens, resistances in ohms, voltages in volts, currents in amperes.
"""

import argparse
import copy
import dataclasses
import math
import os
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from dataset import Dataset, Samples, concatenate
from model import ERM, Network
from preprocessing import UserError, number, run_command, warn
from trainer import (
    arguments_of,
    build,
    evaluate,
    load_model,
    model_arguments,
    model_path,
    predict,
    seed_repetition,
    start_log,
    summarize,
    train,
    train_repetitions,
    training_parser,
    warn_of_unused,
)

try:
    from memtorch.bh.crossbar.Crossbar import Crossbar, Scheme
    from memtorch.bh.memristor import VTEAM
    from memtorch.bh.nonideality.DeviceFaults import apply_device_faults
    from memtorch.map.Parameter import naive_map

    IMPORT_ERROR = None
except Exception as error:  # a MemTorch that was built for another torch can raise anything
    Crossbar, IMPORT_ERROR = object, error

HEADROOM = 1.25  # input clipping limit, as a multiple of the largest calibration input
CALIBRATION = 1000  # training samples for calibration, each in both colours
HARDENING = 3  # length of hardening, as a multiple of the training


class CellMatrix(Crossbar):
    """MemTorch's crossbar, which here stores conductances in its matrix only.

    1T1R cells are read from the matrix. MemTorch also writes each conductance into a device object,
    which takes seconds.
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
    """Return MemTorch's two crossbars, for positive and for negative weights.

    Args:
        weight: weights of a layer, (outputs, ...)
        device: the nominal device
        draws: random number generator for `device_variability`

    For the other arguments, see `to_crossbar`.
    """
    crossbars = []
    for conductances in naive_map(weight, device.r_on, device.r_off, Scheme.DoubleColumn):
        # If all weights are 0, naive_map divides by 0. All devices are at r_off then.
        conductances = conductances.nan_to_num(nan=1 / device.r_off)
        crossbar = CellMatrix(lambda: device, {}, conductances.shape, tuple(tile_shape))
        if device_variability:
            vary(crossbar.devices, device_variability, draws)
        crossbar.write_conductance_matrix(conductances)  # clips to each device's limits
        if conductance_states:  # MemTorch's FiniteConductanceStates fails silently
            round_conductances(crossbar, conductance_states)
        crossbars.append(crossbar)
    if lrs_proportion or hrs_proportion:
        layer = SimpleNamespace(crossbars=crossbars)  # the only attribute that MemTorch reads
        apply_device_faults(layer, lrs_proportion, hrs_proportion, 0.0)
    return crossbars


def vary(devices: np.ndarray, variability: float, draws: np.random.Generator) -> None:
    """Give each device its own random r_on and r_off, in place.

    Both are log-normal. Their mean is the nominal resistance. Their standard deviation is
    `variability` times the mean. An r_off below the device's r_on is set to this r_on.
    """
    variance = math.log(1 + variability**2)  # of the logarithm
    on = draws.lognormal(-variance / 2, math.sqrt(variance), devices.shape)
    off = draws.lognormal(-variance / 2, math.sqrt(variance), devices.shape)
    for index, device in np.ndenumerate(devices):
        devices[index] = copy.copy(device)
        devices[index].r_on = device.r_on * on[index]
        devices[index].r_off = max(device.r_off * off[index], devices[index].r_on)


def round_conductances(crossbar: CellMatrix, states: int) -> None:
    """Round each conductance to the nearest of `states` levels from 1/r_off to 1/r_on, in place."""
    lowest = torch.tensor([1 / device.r_off for device in crossbar.devices.flat])
    highest = torch.tensor([1 / device.r_on for device in crossbar.devices.flat])
    matrix = crossbar.conductance_matrix
    step = (highest - lowest).view(matrix.shape) / (states - 1)
    lowest = lowest.view(matrix.shape)
    steps = ((matrix - lowest) / step.clamp(min=1e-30)).round()  # 0 where r_off equals r_on
    crossbar.conductance_matrix = lowest + steps * step


def quantize_currents(currents: Tensor, bits: int) -> Tensor:
    """Quantise currents (..., columns of a tile) in place, by a linear ADC without overflow.

    Each row is quantised as by MemTorch's `quantize`. The step is the smallest power of two for
    which the row's largest current fits. As in MemTorch, the range includes unused columns of a
    tile, so stuck devices in them widen it.
    """
    largest = currents.abs().amax(-1, keepdim=True)
    mantissa, exponent = torch.frexp(largest + 1e-12)  # mantissa from 0.5 to 1, base 2
    exponent -= (mantissa == 0.5).int()  # 2 ** exponent is now the next power of two
    step = torch.ldexp(torch.ones_like(mantissa), exponent + 1 - bits)
    bound = 2 ** (bits - 1)
    return currents.div_(step).add_(0.5).floor_().clamp_(-bound, bound - 1).mul_(step)


class CrossbarLayer(nn.Module):
    """A layer on a crossbar, with a fixed input range. It computes a whole batch tile by tile.

    All values that determine the outputs are buffers. So `state_dict` is complete, and inference
    does not need MemTorch.

    Args:
        positive: MemTorch's crossbar of the positive weights
        negative: MemTorch's crossbar of the negative weights, of the same shape
        kernel_size: kernel size of a convolution, None for a fully connected layer
        max_input_voltage: input clipping limit, volts
        adc_resolution: bits of the ADC of each tile, None for exact currents
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
        # Positive and negative, in siemens: (2, tiles, rows of a tile, columns of a tile).
        matrices = [positive.conductance_matrix, negative.conductance_matrix]
        add("conductances", torch.stack(matrices).float())
        # Index of the tile at each position, (rows of tiles, columns of tiles).
        add("grid", positive.tiles_map.long())
        add("max_input_voltage", torch.tensor(max_input_voltage))
        add("adc_resolution", torch.tensor(adc_resolution or 0))
        # `calibrate` fits these. `input_range` is the input that becomes max_input_voltage. In each
        # column, `gain` is the output per ampere, and `offset` is the output at zero current.
        add("input_range", torch.ones(()))
        add("gain", torch.ones(positive.columns))
        add("offset", torch.zeros(positive.columns))

    def rows(self, inputs: Tensor) -> Tensor:
        """Return the inputs as rows: (N, in), or (N · positions, in) for a convolution."""
        if self.kernel_size is None:
            return inputs.flatten(0, -2)
        return nn.functional.unfold(inputs, self.kernel_size).transpose(1, 2).flatten(0, 1)

    def currents(self, rows: Tensor) -> Tensor:
        """Return the currents (N, columns) for rows (N, in), as in MemTorch's `tiled_inference`."""
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
        """Measure the input range. Fit gains and offsets by least squares.

        Args:
            inputs: inputs of the layer, (N, in) or (N, channels, height, width)
            wanted: outputs of the digital layer, (N, out) or (N, channels, height, width)
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
        varies = variance > 1e-12 * currents.square().mean(0)  # by more than rounding errors
        self.gain = torch.where(varies, covariance / variance, 0)
        self.offset = wanted.mean(0) - self.gain * currents.mean(0)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the layer's outputs, in the shape of the digital layer's outputs."""
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
    """Return a copy of a network, on the CPU, with memristor crossbars in place of its layers.

    MemTorch builds the crossbars from VTEAM devices in 1T1R cells, with the double-column scheme
    and its naive mapping. Only the two resistances of the VTEAM model are used. There are no
    dynamics and no read disturb. A conductance between the limits of a working device is written
    exactly, unless `conductance_states` is given. Gains and offsets are fitted after the damage,
    separately for each crossbar.

    Args:
        network: its `phi` is a flat Sequential that passes `check_network`
        images: normalised images (N, 2 or 3, 28, 28) for calibration, see `calibration_images`
        tile_shape: rows and columns of a tile
        adc_resolution: bits of the ADC of each tile, 2 to 16, None for exact currents
        r_on: lowest resistance of a device, ohms
        r_off: highest resistance of a device, ohms
        max_input_voltage: input clipping limit, volts (1.25 times the largest calibration input)
        lrs_proportion: fraction of devices stuck at r_on, 0 to 1
        hrs_proportion: fraction of devices stuck at r_off, 0 to 1; a device in both fractions is
            stuck at r_on
        conductance_states: number of equidistant conductances of a device, None for any conductance
        device_variability: standard deviation of r_on and r_off between devices, relative to their
            mean, 0 to 1; both are log-normal
        fault_seed: seed of stuck devices and variability

    Raises:
        UserError: MemTorch is missing, r_on is not below r_off, or a layer does not fit
    """
    check_devices(r_on, r_off)
    check_network(network)
    digital = copy.deepcopy(network).cpu().eval()
    crossbar = copy.deepcopy(digital)
    device = VTEAM(r_off=r_off, r_on=r_on)
    draws = np.random.default_rng(fault_seed)
    state_before = np.random.get_state()
    np.random.seed(fault_seed)  # MemTorch uses NumPy's global generator for stuck devices
    with torch.no_grad():
        inputs = digital.channels(images.cpu()).clone()  # a layer can work in place
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
    """Return the first 1000 training images in both colours, (2000, 2, 28, 28), normalised.

    Both colours are used so that gains are not fitted to a single colour.
    """
    some = training[:CALIBRATION]
    return concatenate([some, some.recolored()]).batch().images


def check_devices(r_on: float, r_off: float) -> None:
    """Raise UserError if MemTorch is missing or r_on is not below r_off."""
    if IMPORT_ERROR is not None:
        reason = str(IMPORT_ERROR).split("\n")[0]
        raise UserError(f"MemTorch cannot be imported ({reason}). Run ./run.sh to build it.")
    if r_on >= r_off or math.isclose(r_on, r_off):  # MemTorch refuses these as well
        raise UserError(f"--r_on {r_on} is not below --r_off {r_off}.")


def check_network(network: Network) -> None:
    """Raise UserError if a network has a layer with weights that does not fit a crossbar.

    nn.Linear fits, and so does nn.Conv2d without stride, padding, dilation and groups. Other layers
    in `phi` must not have weights.
    """
    names = [name for name in network.state_dict() if not name.startswith("phi.")]
    if names != ["output_layer"] or not isinstance(network.phi, nn.Sequential):
        raise UserError("A crossbar needs a network with all weights in `phi`, an nn.Sequential.")
    for index, layer in enumerate(network.phi):
        if type(layer) is nn.Conv2d:
            plain = layer.stride == (1, 1) and layer.padding == (0, 0)
            fits = plain and layer.dilation == (1, 1) and layer.groups == 1
        else:
            fits = type(layer) is nn.Linear or not layer.state_dict()
        if not fits:
            raise UserError(
                f"phi[{index}], {type(layer).__name__}, does not fit a crossbar. Use nn.Linear, or "
                "nn.Conv2d without stride, padding, dilation and groups."
            )


class StuckDevices(nn.Module):
    """Simulation of the weights on a damaged crossbar, for training.

    A device stuck on adds or subtracts the largest weight of its layer, so the weights are limited.
    A device stuck off removes its weight. In training mode, each call chooses two random fractions,
    up to `stuck_on` and `stuck_off`. It makes these fractions of the devices stuck. The gradient
    ignores the limit and the damage (straight-through), so all weights continue to learn.

    Args:
        limit: largest weight, in standard deviations of the layer's weights
        stuck_on: largest fraction of devices stuck on, 0 to 1
        stuck_off: largest fraction of devices stuck off, 0 to 1
    """

    def __init__(self, limit: float, stuck_on: float, stuck_off: float):
        super().__init__()
        self.limit, self.stuck_on, self.stuck_off = limit, stuck_on, stuck_off

    def forward(self, weight: Tensor) -> Tensor:
        values = weight.detach()
        limit = min(values.abs().max().item(), self.limit * values.std().item())
        devices = torch.stack([values, -values]).clamp_(0, limit)  # positive and negative columns
        if self.training:
            on = self.stuck_on * torch.rand(()).item()
            off = self.stuck_off * torch.rand(()).item()
            draws = torch.rand_like(devices)
            devices[draws < on] = limit
            devices[draws > 1 - off] = 0
        # The value is the damaged weight. Its gradient reaches `weight` unchanged.
        return weight + (devices[0] - devices[1] - values)


def harden(
    network: Network,
    training: Samples,
    *,
    limit: float = 0.7,
    stuck_on: float = 0.2,
    stuck_off: float = 0.25,
    **settings,
) -> Network:
    """Return a copy of a trained network that tolerates stuck devices.

    During training, the weights are limited and random devices are stuck (`StuckDevices`). The
    limit has the larger effect. For networks of groupDRO, the faults add to it. The network learns
    its own predictions, in both colours, by ERM (distillation, Hinton et al. 2015,
    arXiv:1503.02531). Hardening has `HARDENING` times as many iterations as a training.

    The limit has a cost. It makes the conductance of the MLP's layer 1, and so its current, four to
    six times as large, because most weights are now closer to the largest one.

    Args:
        network: the trained network
        training: training samples; their labels are not used
        limit: largest weight, in standard deviations of the layer's weights
        stuck_on: largest fraction of devices stuck on during training, 0 to 1
        stuck_off: largest fraction of devices stuck off during training, 0 to 1
        settings: other arguments of `trainer.train`; weight decay is ignored

    Raises:
        UserError: a layer does not fit a crossbar
    """
    check_network(network)
    settings["iteration"] = HARDENING * settings.get("iteration", 400)
    settings["weight_decay"] = 0.0
    print(f"Hardening: {settings['iteration']} iterations on the network's own predictions")
    both_colors = concatenate([training, training.recolored()])
    labels = (predict(network, both_colors) > 0).float()
    hardened = copy.deepcopy(network)
    for layer in hardened.phi:
        # A single weight has no standard deviation.
        if isinstance(layer, (nn.Linear, nn.Conv2d)) and layer.weight.numel() > 1:
            damage = StuckDevices(limit, stuck_on, stuck_off)
            parametrize.register_parametrization(layer, "weight", damage)
    train(hardened, ERM(), dataclasses.replace(both_colors, labels=labels), **settings)
    for layer in hardened.phi:
        if parametrize.is_parametrized(layer):
            parametrize.remove_parametrizations(layer, "weight")
    return hardened


def memristor_parser() -> argparse.ArgumentParser:
    """Return the parser of the training flags and the crossbar flags."""
    parser = training_parser("Train, map the network onto a memristor crossbar, test it again.")
    add = parser.add_argument
    ohms, fraction = number(float, 1, 1e12), number(float, 0, 1)
    add(
        "--load_model",
        type=os.path.expanduser,
        metavar="DIR",
        help="load the networks in this folder of --save_model instead of training; their training "
        "flags override the command line",
    )
    add(
        "--harden",
        action="store_true",
        help="make the network tolerate stuck devices, by a second training of "
        f"{HARDENING} times as many iterations",
    )
    add(
        "--tile_shape",
        type=number(int, 1, 1024),
        nargs=2,
        default=(128, 128),
        help="rows and columns of a tile, 1 to 1024",
    )
    add(
        "--adc_resolution",
        type=number(int, 2, 16),
        default=8,
        help="bits of the ADC of each tile, 2 to 16",
    )
    add("--r_on", type=ohms, default=1.4e4, help="lowest resistance of a device, ohms")
    add("--r_off", type=ohms, default=5e7, help="highest resistance of a device, ohms")
    add(
        "--max_input_voltage",
        type=number(float, 1e-9, 1000),
        default=0.3,
        help="input clipping limit, in volts (1.25 times the largest calibration input)",
    )
    add(
        "--lrs_proportion",
        type=fraction,
        default=0.0,
        help="fraction of devices stuck at r_on, 0 to 1",
    )
    add(
        "--hrs_proportion",
        type=fraction,
        default=0.0,
        help="fraction of devices stuck at r_off, 0 to 1; stuck at r_on takes precedence",
    )
    add(
        "--conductance_states",
        type=number(int, 2, 65536),
        help="number of equidistant conductances of a device, 2 to 65536; by default, any",
    )
    add(
        "--device_variability",
        type=fraction,
        default=0.0,
        help="relative standard deviation of r_on and r_off between devices, 0 to 1",
    )
    add(
        "--fault_seed",
        type=number(int, 0),
        default=0,
        help="seed of stuck devices and variability, the same in each repetition",
    )
    return parser


def load_models(folder: str) -> tuple[list[Network], argparse.Namespace]:
    """Load the networks in a folder of --save_model, one per repetition, and their arguments.

    Raises:
        UserError: a file is missing or corrupt, or the arguments in two files differ
    """
    first, _, args = load_model(model_path(folder, 1))
    networks = [first]
    for repetition in range(2, args.repetitions + 1):
        path = model_path(folder, repetition)
        network, _, others = load_model(path)
        if vars(others) != vars(args):
            raise UserError(
                f"{path} was trained with other flags than {model_path(folder, 1)}. "
                "Train both again with --save_model."
            )
        networks.append(network)
    return networks, args


def use_arguments_of_model(args: argparse.Namespace, saved: argparse.Namespace) -> None:
    """Replace the training arguments with a saved network's arguments. Warn about given flags."""
    ignored = []
    defaults = training_parser().parse_args([])
    for name, value in model_arguments(saved).items():
        if getattr(args, name) not in (value, getattr(defaults, name)):
            ignored.append(f"--{name}")
        setattr(args, name, value)
    if args.save_model:
        ignored.append("--save_model")
        args.save_model = None
    if ignored:
        warn(
            f"{', '.join(ignored)}: no effect, because --load_model uses the values of the saved "
            "networks."
        )


def load_repetitions(
    args: argparse.Namespace, data: Dataset, networks: list[Network]
) -> Iterator[tuple[int, Network, Samples]]:
    """Yield the same as `trainer.train_repetitions`, but with loaded networks."""
    for repetition, network in enumerate(networks, 1):
        print(f"Repetition {repetition} of {args.repetitions}")
        seed_repetition(args, repetition)
        training, _ = data.hold_out(args.validation)
        yield repetition, network.to(training.images.device), training


def print_result(network: Network, test: Samples, name: str) -> dict[str, float]:
    """Return the test metrics and print them as a line of the log."""
    result = evaluate(network, test)
    print(f"{name}: {result}", flush=True)
    return result


def main() -> None:
    args = memristor_parser().parse_args()
    check_devices(args.r_on, args.r_off)
    if args.load_model is not None:
        networks, saved = load_models(args.load_model)
        use_arguments_of_model(args, saved)
    warn_of_unused(args)
    check_network(build(args)[0])
    data = start_log(args)
    if args.load_model is not None:
        repetitions = load_repetitions(args, data, networks)
    else:
        repetitions = train_repetitions(args, data)

    digital, on_crossbar = [], []
    for repetition, network, training in repetitions:
        if args.harden:
            print(f"Before hardening: {evaluate(network, data.test)}")
            seed_repetition(args, repetition)
            network = harden(network, training, **arguments_of(train, args))
        digital.append(print_result(network, data.test, "Test result"))
        images = calibration_images(training)
        crossbar = to_crossbar(network, images, **arguments_of(to_crossbar, args))
        on_crossbar.append(print_result(crossbar, data.test, "Crossbar test result"))
    print(f"Digital: {summarize(digital)}")
    print(f"Summary: {summarize(on_crossbar)}")


if __name__ == "__main__":
    run_command(main)
