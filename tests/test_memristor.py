"""The crossbar: equal to MemTorch's own kernel, nothing lost in the move, robust when hardened."""

import ast
import copy
import functools
import inspect
import math
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import Normalized, assert_one_line, assert_refused, require_memtorch
from torch import nn
from torch.nn import functional as F

memtorch = require_memtorch()

from memtorch.bh.crossbar.Tile import tiled_inference  # noqa: E402
from memtorch.bh.nonideality.DeviceFaults import apply_device_faults  # noqa: E402

import memristor  # noqa: E402
import metric  # noqa: E402
import preprocessing  # noqa: E402
from dataset import load_dataset  # noqa: E402
from memristor import (  # noqa: E402
    CrossbarLayer,
    Imitation,
    StuckDevices,
    calibration_images,
    crossbar_settings,
    harden,
    memristor_parser,
    quantize_currents,
    to_crossbar,
)
from model import CNN, ERM, MLP, Backdoor, Network  # noqa: E402
from preprocessing import UserError  # noqa: E402
from trainer import evaluate, predict, train  # noqa: E402


def images_of(samples, count):
    """The first images, normalised."""
    return samples[:count].batch().images


@pytest.fixture(scope="module")
def networks(data):
    """Trained networks of each kind; short trainings, as only the move is looked at."""
    kinds = {
        "plain": (lambda: MLP(), 100, 1024),
        "bias": (lambda: MLP(bias=True), 100, 1024),
        "grayscale": (lambda: MLP(grayscale=True), 60, 1024),
        "batchnorm": (lambda: Normalized(), 60, 1024),
        "CNN": (lambda: CNN(), 40, 128),
    }
    networks = {}
    for kind, (build, iteration, size) in kinds.items():
        torch.manual_seed(0)
        networks[kind] = build()
        train(networks[kind], Backdoor(), data.training, iteration=iteration, batch_size=size)
    return networks


def damage_of(network, crossbar, samples):
    """What the move costs in accuracy, and the slope of the crossbar's logits on the digital."""
    digital, logits = predict(network, samples), predict(crossbar, samples)
    before, after = (metric.metrics(each, samples.labels) for each in (digital, logits))
    assert before["Accuracy"] > 0.6
    return before["Accuracy"] - after["Accuracy"], np.polyfit(digital, logits, 1)[0]


@pytest.mark.parametrize("kind", ["plain", "bias", "grayscale", "batchnorm", "CNN"])
def test_nothing_is_lost_in_the_move(kind, networks, data):
    """Batch normalisation stays digital; every layer of weights is a crossbar."""
    network = networks[kind]
    samples = data.test[:400] if kind == "CNN" else data.test[:5000]
    crossbar = to_crossbar(network, images_of(data.training, 300))
    for layer, moved in zip(network.phi, crossbar.phi, strict=True):
        is_of_weights = isinstance(layer, (nn.Linear, nn.Conv2d))
        assert type(moved) is (CrossbarLayer if is_of_weights else type(layer))
    lost, slope = damage_of(network, crossbar, samples)
    assert abs(lost) < 0.005 and 0.97 < slope < 1.03


def test_an_exact_crossbar_computes_what_the_layers_do(networks, data):
    """Shapes and orders of both kinds of layers, of a kernel and images that aren't square."""
    torch.manual_seed(0)
    convolution = nn.Conv2d(2, 3, (3, 5))
    network = Network(nn.Sequential(convolution, nn.ReLU(), nn.Linear(24, 4)))
    images = torch.randn(50, 2, 9, 28)
    crossbar = to_crossbar(network, images, adc_resolution=None, r_off=1e12, tile_shape=(7, 2))
    with torch.no_grad():
        for index in (0, 2):
            inputs = network.phi[:index](images)
            expected = network.phi[: index + 1](images)
            assert torch.allclose(crossbar.phi[index](inputs), expected, rtol=1e-3, atol=1e-4)


def test_logits_do_not_depend_on_the_batch(networks, data):
    crossbar = to_crossbar(networks["bias"], images_of(data.training, 500), lrs_proportion=0.05)
    batch = images_of(data.test, 64)
    with torch.no_grad():
        alone = torch.cat([crossbar(image[None]) for image in batch])
        batch[40:] *= 100  # a batch with other samples, very large ones
        together = crossbar(batch)
    close = (alone[:40] - together[:40]).abs() <= 1e-5 * alone.abs().max()
    assert close.sum() >= 38  # the sums are in another order: an ADC's rounding may turn over


def memtorch_layers(network, bits, faults, tile_shape):
    """The network's layers as MemTorch alone makes them, of the document's settings."""
    patched = memtorch.mn.patch_model(
        copy.deepcopy(network),
        memristor_model=memtorch.bh.memristor.VTEAM,
        memristor_model_params={"time_series_resolution": 1e-10, "r_off": 5e7, "r_on": 1.4e4},
        module_parameters_to_patch=[nn.Linear, nn.Conv2d],
        mapping_routine=memtorch.map.Parameter.naive_map,
        transistor=True,
        tile_shape=tile_shape,
        max_input_voltage=0.3,
        ADC_resolution=bits,
        ADC_overflow_rate=0.0,
        quant_method="linear" if bits else None,
        verbose=False,
    )
    np.random.seed(1)
    layers = [layer for layer in patched.phi if hasattr(layer, "crossbars")]
    for layer in layers:
        if faults:
            apply_device_faults(layer, faults, faults, 0.0)
    return layers


@pytest.mark.parametrize(
    ("tile_shape", "faults"), [((128, 128), 0.1), ((50, 6), 0.1), ((50, 6), 0.0)]
)
def test_crossbars_are_memtorchs(tile_shape, faults):
    """The same conductances, stuck devices and outputs of every layer, with and without ADC."""
    torch.manual_seed(0)
    convolution = nn.Conv2d(2, 5, 4)
    phi = nn.Sequential(convolution, nn.ReLU(), nn.Flatten(), nn.Linear(180, 20), nn.Linear(20, 9))
    network = Network(phi)
    inputs = torch.randn(100, 2, 9, 9)
    crossbar = to_crossbar(
        network,
        inputs,
        tile_shape=tile_shape,
        lrs_proportion=faults,
        hrs_proportion=faults,
        fault_seed=1,
    )
    ours = [layer for layer in crossbar.phi if isinstance(layer, CrossbarLayer)]
    theirs = memtorch_layers(network, 8, faults, tile_shape)
    rounded, outputs = 0, 0
    for layer, memtorch_layer in zip(ours, theirs, strict=True):
        for conductances, part in zip(layer.conductances, memtorch_layer.crossbars, strict=True):
            assert torch.equal(conductances, part.conductance_matrix.float())
        layer.input_range = layer.max_input_voltage  # inputs are voltages already
        rows = memtorch_layer.crossbars[0].rows
        voltages = torch.randn(100, rows).clamp(-3, 3) / 10
        for bits in (None, 8, 4):
            layer.adc_resolution = torch.tensor(bits or 0)
            memtorch_layer.ADC_resolution = bits
            memtorch_layer.quant_method = "linear" if bits else None
            expected = tiled_inference(voltages, memtorch_layer, transistor=True)
            deviation = (layer.currents(voltages) - expected).abs() / expected.abs().max()
            # A current next to the boundary of two ADC levels rounds one step up or down.
            assert deviation.max() < (2.0 ** (2 - bits) if bits else 1e-5)
            rounded += (deviation > 1e-5).sum().item()
            outputs += deviation.numel()
    assert rounded <= 0.002 * outputs, f"{rounded} of {outputs}"


def test_adc_is_memtorchs():
    torch.manual_seed(0)
    for bits in range(2, 11):
        rows = torch.cat([torch.randn(50, 64) * 1e-5, torch.zeros(1, 64), torch.ones(1, 64) / 2])
        rows[-1, 0] = 0.25
        expected = torch.stack(
            [memtorch.bh.Quantize.quantize(row, quant=bits, quant_method="linear") for row in rows]
        )
        assert torch.equal(quantize_currents(rows.clone(), bits), expected)


def test_inputs_beyond_the_calibration_are_cut_off():
    """At 1.25 times its largest one."""
    network = Network(nn.Sequential(nn.Linear(2, 1, bias=False)))
    sample = torch.tensor([[0.5, 1.0], [1.0, 2.0], [-1.0, 0.3]])[:, None]  # (N, channels, in)
    crossbar = to_crossbar(network, sample, adc_resolution=None)
    outputs = [crossbar.phi[0](torch.tensor([[0.0, value]])) for value in (2.4, 2.5, 2.6, 9.0)]
    assert crossbar.phi[0].input_range == 2.5
    assert outputs[0] != outputs[1] and outputs[1] == outputs[2] == outputs[3]


@functools.cache
def devices_of(variability, r_off=5e7):
    """r_on and r_off of many devices, as they are drawn."""
    import memristor

    devices = np.empty((50, 40, 40), dtype=object)
    devices.fill(memtorch.bh.memristor.VTEAM(r_off=r_off, r_on=1.4e4))
    memristor.vary(devices, variability, np.random.default_rng(3))
    on = np.array([device.r_on for device in devices.flat])
    return on, np.array([device.r_off for device in devices.flat])


@pytest.mark.parametrize("variability", [0.2, 0.5, 1.0])
def test_device_variability_is_the_relative_standard_deviation(variability):
    """Of log-normal resistances: their logarithms have no skew."""
    for resistances, mean in zip(devices_of(variability), (1.4e4, 5e7), strict=True):
        assert resistances.mean() == pytest.approx(mean, rel=0.01)
        assert resistances.std() / resistances.mean() == pytest.approx(variability, rel=0.03)
        logarithms = np.log(resistances)
        centered = logarithms - logarithms.mean()
        assert abs((centered**3).mean() / logarithms.std() ** 3) < 0.03
    on, off = devices_of(variability)
    assert abs(np.corrcoef(np.log(on), np.log(off))[0, 1]) < 0.01  # drawn independently


def test_no_device_has_an_r_off_below_its_r_on(data):
    on, off = devices_of(1.0, r_off=2e4)
    assert (off >= on).all() and (off == on).any()
    damage = {"r_off": 2e4, "device_variability": 1.0, "conductance_states": 8}
    crossbar = to_crossbar(
        MLP(hidden_dim=(4,)), images_of(data.training, 50), tile_shape=(64, 4), **damage
    )
    assert predict(crossbar, data.test[:50]).isfinite().all()


def test_variable_devices_have_limits_of_their_own(data):
    """A conductance that the device can't have is the nearest that it can have."""
    sample = images_of(data.training, 300)
    network = MLP(hidden_dim=(8,))
    with torch.no_grad():
        network.phi[1].weight.fill_(0.01)  # each device of the positive columns is at its 1/r_on
    crossbars = [
        to_crossbar(
            network, sample, tile_shape=(64, 8), device_variability=0.2, fault_seed=fault_seed
        )
        for fault_seed in (3, 3, 4)
    ]
    first, again, other = (crossbar.phi[1].conductances for crossbar in crossbars)
    assert torch.equal(first, again) and not torch.equal(first, other)
    nominal = np.float32(1 / 1.4e4)
    on = first[0, :24].flatten()  # of the tiles that are full
    # A device can only lack conductance: where it could have more, the weight asks for 1 / r_on.
    assert on.max() == nominal
    assert 0.4 < (on < nominal).float().mean() < 0.6
    resistances = np.random.default_rng(3).lognormal(-math.log(1.04) / 2, math.log(1.04) ** 0.5)
    assert first[0].flatten()[0].item() == pytest.approx(
        min(nominal, nominal / resistances), rel=1e-5
    )


def test_states_are_equidistant_and_as_many_as_asked(data):
    sample = images_of(data.training, 300)
    crossbar = to_crossbar(MLP(hidden_dim=(8,)), sample, conductance_states=5)
    states = crossbar.phi[1].conductances.unique()
    assert torch.allclose(states, torch.linspace(1 / 5e7, 1 / 1.4e4, 5), rtol=1e-4)
    any_state = to_crossbar(MLP(hidden_dim=(8,)), sample).phi[1].conductances
    assert len(any_state.unique()) > 1000


def test_a_conductance_is_rounded_to_the_nearest_state():
    network = Network(nn.Sequential(nn.Linear(4, 1, bias=False)))
    with torch.no_grad():
        network.phi[0].weight.copy_(torch.tensor([[1.0, 0.74, 0.76, -0.2]]))
    crossbar = to_crossbar(network, torch.randn(9, 1, 4), conductance_states=3, r_off=1e12)
    positive, negative = crossbar.phi[0].conductances[:, 0, :4, 0] * 1.4e4
    assert torch.allclose(positive, torch.tensor([1, 0.5, 1, 0]), atol=1e-4)
    assert torch.allclose(negative, torch.zeros(4), atol=1e-4)


@pytest.mark.parametrize(("on", "off"), [(0.1, 0.2), (0.6, 0.6)])
def test_stuck_devices_are_as_many_as_asked(on, off, data):
    some = images_of(data.training, 300)
    crossbar = to_crossbar(MLP(hidden_dim=(8,)), some, lrs_proportion=on, hrs_proportion=off)
    for conductances in crossbar.phi[1].conductances:
        at_low = (conductances == np.float32(1 / 1.4e4)).float().mean()
        assert on - 0.005 < at_low < on + 0.01  # the largest weight is there too


def test_the_move_leaves_the_random_generators_alone(networks, data):
    torch.manual_seed(5)
    np.random.seed(5)
    expected = torch.rand(()), np.random.rand()
    torch.manual_seed(5)
    np.random.seed(5)
    to_crossbar(networks["plain"], images_of(data.training, 50), lrs_proportion=0.1)
    assert (torch.rand(()), np.random.rand()) == expected


# A crossbar is a network of torch's alone.


@pytest.fixture(scope="module")
def crossbar(networks, data):
    sample = images_of(data.training, 300)
    return to_crossbar(networks["CNN"], sample, lrs_proportion=0.05, max_input_voltage=0.2)


def test_a_crossbar_can_be_copied_and_its_state_loaded(crossbar, data, tmp_path):
    """Into one of the same shape, whatever that had been made of."""
    samples = data.test[:100]
    expected = predict(crossbar, samples)
    assert torch.equal(predict(copy.deepcopy(crossbar), samples), expected)
    torch.save(crossbar.state_dict(), tmp_path / "state.pt")
    other = to_crossbar(CNN(), images_of(data.test, 20), adc_resolution=4, fault_seed=9)
    assert not torch.equal(predict(other, samples), expected)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(predict(other, samples), expected)


def test_a_saved_crossbar_needs_no_memtorch(crossbar, data, command, tmp_path, monkeypatch):
    samples = data.test[:50]
    torch.save(crossbar, tmp_path / "crossbar.pt")
    torch.save(samples.batch().images, tmp_path / "images.pt")
    hide_memtorch(tmp_path, monkeypatch, "hidden for this test")
    (tmp_path / "load.py").write_text(
        "import sys, torch\n"
        "crossbar = torch.load(sys.argv[1], weights_only=False)\n"
        "with torch.no_grad():\n"
        "    torch.save(crossbar(torch.load(sys.argv[2])), sys.argv[3])\n"
    )
    paths = [tmp_path / f"{name}.pt" for name in ("crossbar", "images", "logits")]
    result = command(tmp_path / "load.py", *paths)
    assert result.returncode == 0, result.stderr
    assert torch.allclose(torch.load(paths[2]), predict(crossbar, samples), atol=1e-5)


def hide_memtorch(folder, monkeypatch, reason):
    """Let `import memtorch` fail with this reason in processes that are started from now on."""
    (folder / "memtorch.py").write_text(f"raise ImportError({reason!r})")
    root = inspect.getfile(preprocessing).rpartition("/")[0]
    monkeypatch.setenv("PYTHONPATH", f"{folder}:{root}")


# Networks that crossbars can't take.


class Doubled(nn.Linear):
    def forward(self, inputs):
        return 2 * super().forward(inputs)


class TwoBranches(Network):
    def __init__(self):
        super().__init__(nn.Sequential(nn.Flatten(), nn.Linear(1568, 1)))
        self.branch = nn.Linear(1568, 1)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(2, 1, 3),
        nn.Conv2d(2, 1, 3, stride=2),
        nn.Conv2d(2, 1, 3, padding=1),
        nn.Conv2d(2, 1, 3, padding="same"),
        nn.Conv2d(2, 1, 3, dilation=2),
        nn.Conv2d(2, 2, 3, groups=2),
        nn.ConvTranspose2d(2, 1, 3),
        nn.Embedding(3, 2),
        nn.PReLU(),
        nn.LayerNorm(28),
        nn.Sequential(nn.Linear(28, 1)),
        nn.ModuleList([nn.ReLU(), nn.Linear(28, 1)]),
        nn.utils.parametrizations.weight_norm(nn.Linear(28, 1)),
        Doubled(28, 1),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_layers_that_crossbars_cannot_take_are_refused(layer, data):
    """Before the training of a hardened one, too; none stays digital in silence."""
    network = Network(nn.Sequential(nn.ReLU(), layer))
    for move in (to_crossbar, harden):
        with pytest.raises(UserError) as caught:
            move(network, data.training[:10] if move is harden else torch.zeros(2, 2, 28, 28))
        message = str(caught.value)
        assert f"phi[1], {type(layer).__name__}:" in message and "\n" not in message
        assert "nn.Linear" in message


def test_weights_beside_phi_are_refused(data):
    no_sequence = Network(nn.Linear(28, 1))
    for network in (TwoBranches(), no_sequence):
        with pytest.raises(UserError, match="`phi`"):
            to_crossbar(network, torch.zeros(2, 2, 28, 28))


def test_they_are_refused_before_the_training(in_process, folder, monkeypatch):
    import register

    def unfit(hidden_dim=()):
        return Network(nn.Sequential(nn.Flatten(), Doubled(1568, 1)))

    monkeypatch.setitem(register.NETWORKS, "MLP", unfit)
    result = in_process("memristor.py", *FLAGS, "--dataset_path", folder, "--seed", 7)
    assert_one_line(result, "memristor.py: crossbars can't take phi[1], Doubled")
    assert result.stdout.splitlines()[-1] == "Repetition 1 of 2"


def test_a_current_that_varies_by_rounding_alone_has_no_gain():
    torch.manual_seed(0)
    network = Network(nn.Sequential(nn.Linear(50, 9, bias=False)))
    constant = torch.rand(1, 1, 50)
    crossbar = to_crossbar(network, constant.repeat(1999, 1, 1), adc_resolution=None)
    assert not crossbar.phi[0].gain.any()
    assert torch.allclose(crossbar.phi[0].offset, network.phi(constant)[0, 0], atol=1e-5)


def test_calibration_sees_each_digit_in_both_colors(data):
    both = calibration_images(data.training)
    assert both.shape == (2000, 2, 28, 28)
    assert torch.equal(both[:1000], images_of(data.training, 1000))
    assert torch.equal(both[1000:], both[:1000].flip(1)) and both.std() > 0.5
    assert calibration_images(data.training[:3]).shape == (6, 2, 28, 28)


# Hardening.


def test_stuck_devices_limit_and_break_weights():
    torch.manual_seed(0)
    weight = torch.randn(200, 300, requires_grad=True)
    stuck, limit = StuckDevices(), (StuckDevices.LIMIT * weight.std()).item()
    whole = stuck.eval()(weight)
    assert torch.allclose(whole, weight.clamp(-limit, limit), atol=1e-6)
    # A weight is whole if the device that holds it is sound and the other one of the pair is not
    # stuck on: with a probability of 0.55 * 0.8 or more. At the limit, stuck on changes nothing.
    stuck.train()
    free = whole.abs() < 0.99 * limit
    sound = [((stuck(weight) - whole)[free] == 0).float().mean() for _ in range(20)]
    assert 0.42 < min(sound) < 0.65 and max(sound) > 0.8
    damaged = stuck(weight)[free]
    kinds = [damaged == value for value in (0, limit, -limit)] + [damaged == whole[free]]
    assert all(kind.any() for kind in kinds)
    stuck(weight).sum().backward()
    assert (weight.grad == 1).all()


def test_imitation_takes_decisions_for_labels(data):
    """Of a teacher without dropout, and also in what the log says of the environments."""
    teacher = MLP(drop_rate=0.9)
    loss, batch = Imitation(teacher).train(), data.training[::400].batch()
    assert loss.training and not teacher.training
    decided = (teacher.eval()(batch.images) > 0).float()
    pupil = MLP()
    logits = pupil(batch.images)
    expected = F.binary_cross_entropy_with_logits(logits, decided)  # 50 of each environment
    assert torch.isclose(loss(pupil, batch), expected)
    assert torch.isclose(loss.risks(logits, batch).mean(), expected)


def test_hardened_network_keeps_its_accuracy_on_broken_hardware(data):
    """A short training; the README has the measurements of the whole one."""
    torch.manual_seed(0)
    network = train(MLP(), Backdoor(), data.training, iteration=300, batch_size=512)
    weights = copy.deepcopy(network.state_dict())
    hardened = harden(network, data.training, iteration=150, batch_size=512)
    assert all(torch.equal(weights[name], value) for name, value in network.state_dict().items())
    test = data.test[:5000]
    plain, digital = (evaluate(each, test)["Accuracy"] for each in (network, hardened))
    assert plain > 0.7 and digital > plain - 0.02
    sample = calibration_images(data.training)
    for damage in ({"lrs_proportion": 0.2}, {"hrs_proportion": 0.4}, {"conductance_states": 2}):
        crossbar = to_crossbar(hardened, sample, **damage)
        assert evaluate(crossbar, test)["Accuracy"] > digital - 0.03
    unhardened = to_crossbar(network, sample, lrs_proportion=0.2)
    assert evaluate(unhardened, test)["Accuracy"] < plain - 0.05


def test_statistics_of_a_hardened_batch_normalisation_are_of_sound_devices(networks, data):
    part = data.training[::20]
    hardened = harden(networks["batchnorm"], part, iteration=3, batch_size=256)
    both = torch.cat([part.batch().images, part.recolored().batch().images])
    with torch.no_grad():
        outputs = hardened.phi[:2](both)
    assert torch.allclose(hardened.phi[2].running_var, outputs.var(0), rtol=0.02)


def test_a_cnn_can_be_hardened(networks, data):
    hardened = harden(networks["CNN"], data.training, iteration=2, batch_size=16)
    crossbar = to_crossbar(hardened, images_of(data.training, 50), lrs_proportion=0.1)
    assert predict(crossbar, data.test[:20]).isfinite().all()


def test_hardening_is_three_times_as_long_and_has_no_weight_decay(networks, data, capsys):
    part = data.training[:500]
    weights = []
    for decay in (0.0, 0.5):
        torch.manual_seed(0)
        settings = {"iteration": 2, "evaluation_steps": 1, "weight_decay": decay}
        hardened = harden(networks["plain"], part, **settings)
        assert "Iteration 6:" in capsys.readouterr().out
        weights.append(hardened.phi[1].weight)
    assert torch.equal(*weights)


def test_a_layer_of_a_single_weight_can_be_hardened(data):
    hardened = harden(MLP(hidden_dim=(4, 1)), data.training[:500], iteration=1)
    assert all(parameter.isfinite().all() for parameter in hardened.parameters())


def test_erm_on_the_crossbar_is_still_erm(data):
    """A control: the crossbar adds no accuracy of its own."""
    torch.manual_seed(0)
    network = train(MLP(), ERM(), data.training, iteration=60)
    crossbar = to_crossbar(network, calibration_images(data.training))
    digital, moved = (evaluate(each, data.test)["Accuracy"] for each in (network, crossbar))
    assert digital < 0.5 and abs(moved - digital) < 0.005


# The command.

FLAGS = ("--no_cuda", "--iteration", 40, "--repetitions", 2, "--batch_size", 256)
FLAGS += ("--hidden_dim", 16)
TILES = ("--no_cuda", "--tile_shape", 64, 16)  # the fewer devices, the sooner they are made


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of small data, as little depends on how much is tested."""
    path = tmp_path_factory.mktemp("few")
    preprocessing.draw_environments(path, sizes=(1500, 1500, 2000), seed=7)
    return path


@pytest.fixture(scope="module")
def memristor_log(in_process, folder):
    """Run the command on small data; returns its log's lines of standard output."""

    def run(*arguments):
        result = in_process("memristor.py", "--dataset_path", folder, *TILES, *arguments)
        assert result.returncode == 0, result.stderr
        return result.stdout.splitlines()

    return run


@pytest.fixture(scope="module")
def logs(memristor_log, tmp_path_factory):
    """The logs of trainings anew: trainer and hardened or not → lines; "models" → their folder."""
    logs = {"models": tmp_path_factory.mktemp("models")}
    common = (*FLAGS, "--seed", 7, "--save_model", logs["models"])
    for trainer in ("Backdoor", "IRM"):
        logs[trainer, False] = memristor_log(*common, "--trainer", trainer)
        logs[trainer, True] = memristor_log(*common, "--trainer", trainer, "--harden")
    return logs


def saved(logs, trainer, hardened):
    files = sorted(logs["models"].glob(f"{trainer}_*.pt"))
    return [file for file in files if ("harden" in file.name) == hardened]


def figures(line):
    return ast.literal_eval(line.split(": ", 1)[1])


def test_the_log(logs, tmp_path):
    """Its lines in their order; metric.py's check counts the crossbar's results."""
    lines = logs["IRM", False]
    heads = [line.split(":")[0] for line in lines]
    repetition = ["Saved", "Test result", "Crossbar test result"]
    expected = ["Arguments", "Device", "Data", "Repetition 1 of 2", *repetition]
    assert heads == [*expected, "Repetition 2 of 2", *repetition, "Digital", "Summary"]
    results = [figures(line) for line in lines if line.startswith("Crossbar test result: ")]
    assert figures(lines[-1]) == metric.summarize(results)
    digital = [figures(line) for line in lines if line.startswith("Test result: ")]
    assert figures(lines[-2]) == metric.summarize(digital)
    assert results != digital
    (tmp_path / "memristor_log.txt").write_text("\n".join(lines))
    checked = metric.read_log(str(tmp_path), str(tmp_path / "memristor_log.txt"))
    assert checked.trainer == "IRM on the crossbar"


def test_the_digital_training_is_the_other_commands(logs, in_process, folder):
    arguments = ("--dataset_path", folder, *FLAGS, "--seed", 7, "--trainer", "IRM")
    summary = in_process("exp-mnist.py", *arguments).stdout.splitlines()[-1]
    assert figures(logs["IRM", False][-2]) == figures(summary)


@pytest.mark.parametrize("trainer", ["Backdoor", "IRM"])
@pytest.mark.parametrize("hardened", [False, True])
def test_loaded_networks_give_the_summary_of_training_anew(
    trainer, hardened, logs, memristor_log, in_process
):
    """In whatever order they are given; their log says what was tested."""
    files = saved(logs, trainer, hardened)
    assert len(files) == 2
    lines = memristor_log("--load_model", *reversed(files))
    results = [line for line in logs[trainer, hardened] if "result: " in line]
    assert [line for line in lines if "result: " in line] == results
    assert lines[-2:] == logs[trainer, hardened][-2:]
    arguments, original = figures(lines[0]), figures(logs[trainer, hardened][0])
    assert arguments.pop("load_model") == [str(file) for file in reversed(files)]
    assert original.pop("load_model") is None and original.pop("save_model")
    assert arguments.pop("save_model") is None
    assert arguments == original
    assert lines.count("Repetition 1 of 2") == lines.count("Repetition 2 of 2") == 1
    assert [line for line in lines if line.startswith("Loaded: ")] == [
        f"Loaded: {file}" for file in files
    ]


def test_a_loaded_network_is_hardened_as_after_its_training(logs, memristor_log, tmp_path):
    """The same bits, Summary and saved weights."""
    lines = memristor_log(
        "--load_model", *saved(logs, "IRM", False), "--harden", "--save_model", tmp_path
    )
    assert lines[-2:] == logs["IRM", True][-2:]
    assert figures(lines[0])["harden"] is True
    written = sorted(tmp_path.glob("*.pt"))
    for ours, theirs in zip(written, saved(logs, "IRM", True), strict=True):
        assert ours.name == theirs.name
        ours, theirs = (torch.load(path)["network"] for path in (ours, theirs))
        assert all(torch.equal(ours[name], value) for name, value in theirs.items())


def test_what_was_saved_hardened_stays_as_it_is(logs, in_process, folder):
    files = saved(logs, "IRM", True)
    arguments = ("--dataset_path", folder, *TILES, "--harden", "--load_model", *files)
    result = in_process("memristor.py", *arguments)
    assert result.stdout.splitlines()[-2:] == logs["IRM", True][-2:]
    assert_warned(result, "--harden", "saved hardened")
    assert "Hardening:" not in result.stdout


def assert_warned(result, *words):
    """One line of warning with these words, and the command did its work."""
    assert result.returncode == 0, result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith("memristor.py: warning: ")
    assert all(word in line for word in words), line


def test_flags_of_training_beside_a_file_are_named(logs, in_process, folder):
    """Those that differ from the file's, whether or not they are the defaults."""
    given = ("--seed", 1234, "--trainer", "IRM", "--eta", 0.5, "--iteration", 40, "--steady")
    arguments = ("--dataset_path", folder, *TILES, *given, "--repetitions", 3)
    result = in_process("memristor.py", *arguments, "--load_model", *saved(logs, "IRM", False))
    assert_warned(result, "warning: --eta, --repetitions, --seed, --steady: what the files say")
    assert result.stdout.splitlines()[-2:] == logs["IRM", False][-2:]
    arguments = figures(result.stdout.splitlines()[0])
    assert (arguments["seed"], arguments["repetitions"], arguments["steady"]) == (7, 2, False)


def test_data_that_lie_elsewhere(logs, in_process, folder, tmp_path):
    """--dataset_path counts; without it, the file's does; other data are pointed out."""
    file = saved(logs, "IRM", False)[1]
    shutil.copytree(folder, tmp_path / "moved")
    for more in ((), ("--dataset_path", tmp_path / "moved")):
        result = in_process("memristor.py", *TILES, "--load_model", file, *more)
        assert result.returncode == 0 and result.stderr == "", result.stderr
        assert f"Data: {more[1] if more else folder}/ColoredMNIST" in result.stdout
        assert "Repetition 1 of 1" in result.stdout
        crossbar = [line for line in logs["IRM", False] if line.startswith("Crossbar")][1]
        assert crossbar in result.stdout
    preprocessing.draw_environments(tmp_path / "other", sizes=(100, 100, 100), seed=7)
    other = ("--dataset_path", tmp_path / "other")
    result = in_process("memristor.py", *TILES, "--load_model", file, *other)
    assert_warned(result, "other data", "sizes [1500, 1500, 2000]")


def test_files_that_do_not_go_together_are_refused(logs, in_process, folder, tmp_path):
    irm, backdoor = saved(logs, "IRM", False), saved(logs, "Backdoor", False)
    result = in_process("memristor.py", "--load_model", irm[0], backdoor[1])
    assert_one_line(result, irm[0], backdoor[1], "differ in trainer,")
    hardened = saved(logs, "IRM", True)
    result = in_process("memristor.py", "--load_model", irm[0], hardened[1], "--harden")
    assert_one_line(result, "differ in harden,")
    result = in_process("memristor.py", "--load_model", irm[0], irm[0])
    assert_one_line(result, "the same repetition")
    result = in_process("memristor.py", "--load_model", irm[0], tmp_path / "none.pt")
    assert_one_line(result, "none.pt", "No such file")
    (tmp_path / "damaged.pt").write_bytes(irm[0].read_bytes()[:2000])
    result = in_process("memristor.py", "--load_model", tmp_path / "damaged.pt")
    assert_one_line(result, "damaged.pt", "--save_model")
    assert result.stdout == ""


@pytest.fixture(scope="module")
def summary_of(memristor_log, logs):
    """The Summary with given flags of one saved network."""

    @functools.cache
    def run(*arguments):
        return figures(memristor_log("--load_model", saved(logs, "IRM", False)[0], *arguments)[-1])

    return run


@pytest.mark.parametrize(
    "arguments",
    [
        ("--lrs_proportion", 0.5),
        ("--hrs_proportion", 0.5),
        ("--conductance_states", 2),
        ("--device_variability", 0.5),
        ("--adc_resolution", 2),
        ("--r_off", 1.4e5),
        ("--r_on", 1e7),
        ("--max_input_voltage", 1e-7),
        ("--tile_shape", 16, 8),
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_changed_flag_changes_the_summary(arguments, summary_of):
    """By the value that `to_crossbar` computes with it, which its own tests look at."""
    assert summary_of(*arguments) != summary_of()


def test_flags_reach_the_crossbar(logs, folder, memristor_log):
    """The Summary of changed flags is that of the same arguments of `to_crossbar`."""
    from trainer import load_saved

    file = saved(logs, "IRM", False)[1]
    flags = {
        "tile_shape": (64, 32),
        "adc_resolution": 5,
        "r_on": 2e4,
        "r_off": 4e5,
        "max_input_voltage": 0.2,
        "lrs_proportion": 0.05,
        "hrs_proportion": 0.1,
        "conductance_states": 9,
        "device_variability": 0.1,
        "fault_seed": 5,
    }
    assert flags.keys() == crossbar_settings(memristor_parser().parse_args([])).keys()
    given = []
    for name, value in flags.items():
        given += [f"--{name}", *(value if isinstance(value, tuple) else (value,))]
    network, _, _ = load_saved(file)
    data = load_dataset(folder)
    torch.manual_seed(7001)  # the seed of repetition 2
    training, _ = data.hold_out(0.2)
    crossbar = to_crossbar(network, calibration_images(training), **flags)
    expected = metric.summarize([evaluate(crossbar, data.test)])
    assert figures(memristor_log("--load_model", file, *given)[-1]) == expected


def test_each_fault_seed_has_stuck_devices_of_its_own(summary_of):
    summaries = [
        summary_of("--lrs_proportion", 0.2, "--fault_seed", seed)["AUC_testmean"]
        for seed in (0, 1, 1)
    ]
    assert summaries[0] != summaries[1] == summaries[2]


def test_a_crossbar_that_always_decides_alike_is_pointed_out(logs, in_process):
    """Its currents are too small for the ADC."""
    flags = ("--r_on", 1e8, "--r_off", 1e9, "--max_input_voltage", 1e-9)
    result = in_process(
        "memristor.py", "--load_model", saved(logs, "IRM", False)[0], *TILES, *flags
    )
    assert_warned(result, "Crossbar test result", "constant predictor")


def test_what_a_network_was_before_hardening_is_shown(logs):
    before = [line for line in logs["IRM", True] if line.startswith("Before hardening: ")]
    plain = [line for line in logs["IRM", False] if line.startswith("Test result: ")]
    assert [figures(line) for line in before] == [figures(line) for line in plain]


def test_saving_without_hardening_is_pointed_out(logs, in_process, folder, tmp_path):
    file = saved(logs, "IRM", False)[0]
    arguments = ("--dataset_path", folder, *TILES, "--load_model", file, "--save_model", tmp_path)
    assert_warned(in_process("memristor.py", *arguments), "--save_model", "without --harden")


def test_where_and_how_often_it_reports_is_not_the_files(logs):
    """A network that was trained with --no_cuda may be hardened on a GPU."""
    (file,) = memristor.read_networks([str(saved(logs, "IRM", False)[0])])
    assert file.arguments.no_cuda
    argv, sys.argv = sys.argv, ["memristor.py", "--load_model", file.path]
    try:
        args = memristor.arguments_beside([file])
    finally:
        sys.argv = argv
    assert (args.no_cuda, args.evaluation_steps, args.save_model) == (False, 100, None)
    assert (args.seed, args.iteration, args.trainer) == (7, 40, "IRM")


def test_harden_changes_the_network(logs):
    assert logs["IRM", True][-1] != logs["IRM", False][-1]
    assert logs["IRM", True][-2] != logs["IRM", False][-2]
    assert "Hardening: 120 iterations" in "\n".join(logs["IRM", True])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--adc_resolution", 0), ("--adc_resolution", "'0'")),
        (("--adc_resolution", 17), ("--adc_resolution", "'17'")),
        (("--lrs_proportion", 1.5), ("--lrs_proportion",)),
        (("--hrs_proportion", -0.1), ("--hrs_proportion",)),
        (("--r_on", 1e-300), ("--r_on",)),
        (("--r_off", 0), ("--r_off",)),
        (("--tile_shape", 0, 128), ("--tile_shape",)),
        (("--tile_shape", 128), ("--tile_shape",)),
        (("--tile_shape", 100000, 100000), ("--tile_shape", "1 to 1024")),
        (("--tile_shape", 128, 1025), ("--tile_shape", "1 to 1024")),
        (("--max_input_voltage", 0), ("--max_input_voltage",)),
        (("--max_input_voltage", 1e39), ("--max_input_voltage",)),
        (("--conductance_states", 1), ("--conductance_states",)),
        (("--conductance_states", 10**400), ("--conductance_states",)),
        (("--device_variability", "nan"), ("--device_variability",)),
        (("--fault_seed", -1), ("--fault_seed",)),
        (("--load_model",), ("--load_model",)),
    ],
)
def test_nonsense_is_refused(arguments, words, in_process):
    assert_refused(in_process("memristor.py", *arguments), *words)


def test_contradictions_are_refused_before_anything_is_done(in_process):
    for given in (("--r_on", 1e9), ("--r_on", 1.4e4, "--r_off", 14000.000001)):
        result = in_process("memristor.py", *given)
        assert_one_line(result, "--r_on", "--r_off")
        assert result.stdout == ""


def test_a_flag_that_changes_nothing_is_named(in_process, folder):
    arguments = ("--trainer", "ERM", "--eta", 1, *TILES, *FLAGS)
    result = in_process("memristor.py", "--dataset_path", folder, "--seed", 7, *arguments)
    assert_warned(result, "--eta")


def test_defaults_are_those_of_to_crossbar():
    parameters = inspect.signature(to_crossbar).parameters.values()
    keywords = [each for each in parameters if each.kind is each.KEYWORD_ONLY]
    assert crossbar_settings(memristor_parser().parse_args([])) == {
        each.name: each.default for each in keywords
    }


def test_help_explains_each_flag_on_any_terminal(command, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    result = command("memristor.py", "--help")
    assert result.returncode == 0 and result.stderr == "", result.stderr
    for action in memristor_parser()._actions:
        assert action.help and action.option_strings[-1] in result.stdout


def test_without_memtorch_it_says_why(command, tmp_path, monkeypatch):
    """What the import says itself, as a MemTorch that was built for another torch is no less."""
    hide_memtorch(tmp_path, monkeypatch, "memtorch_bindings.so: undefined symbol: _ZN3c10\nmore")
    result = command("memristor.py")
    reason = "MemTorch can't be imported (memtorch_bindings.so: undefined symbol: _ZN3c10)"
    assert_one_line(result, reason, "run.sh", "README.md")
    assert result.stdout == ""
