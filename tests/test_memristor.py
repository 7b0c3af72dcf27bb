"""The crossbar equals MemTorch's own, the mapping loses no accuracy, hardening keeps accuracy."""

import ast
import copy
import dataclasses
import functools
import inspect
import math
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT, assert_one_line, assert_refused, require_memtorch
from torch import nn
from torch.nn.utils import parametrize

memtorch = require_memtorch()

from memtorch.bh.crossbar.Tile import tiled_inference  # noqa: E402
from memtorch.bh.nonideality.DeviceFaults import apply_device_faults  # noqa: E402

import register  # noqa: E402
from dataset import concatenate, load_data  # noqa: E402
from memristor import (  # noqa: E402
    CrossbarLayer,
    StuckDevices,
    calibration_images,
    harden,
    memristor_parser,
    quantize_currents,
    to_crossbar,
    vary,
)
from metric import metrics, read_log  # noqa: E402
from model import CNN, ERM, MLP, Backdoor, Network  # noqa: E402
from preprocessing import UserError, generate_environments  # noqa: E402
from trainer import (  # noqa: E402
    arguments_of,
    evaluate,
    load_model,
    predict,
    seed_repetition,
    summarize,
    train,
)

R_ON, R_OFF = 1.4e4, 5e7  # the defaults
LOWEST, HIGHEST = np.float32(1 / R_OFF), np.float32(1 / R_ON)


def images_of(samples, count):
    """Return the first images, normalised."""
    return samples[:count].batch().images


def same_weights(ours, theirs):
    """Return whether two networks have the same weights, bit for bit."""
    ours, theirs = ours.state_dict(), theirs.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.fixture(scope="module")
def networks(data):
    """A network of each kind after a short training."""
    kinds = {
        "plain": (lambda: MLP(), 100, 1024),
        "bias": (lambda: MLP(bias=True), 100, 1024),
        "grayscale": (lambda: MLP(grayscale=True), 60, 1024),
        "CNN": (lambda: CNN(), 40, 128),
    }
    networks = {}
    for kind, (build, iteration, size) in kinds.items():
        torch.manual_seed(0)
        networks[kind] = build()
        train(networks[kind], Backdoor(), data.training, iteration=iteration, batch_size=size)
    return networks


# The mapping.


@pytest.mark.parametrize("kind", ["plain", "bias", "grayscale", "CNN"])
def test_the_mapping_loses_no_accuracy(kind, networks, data):
    """Every layer with weights is on a crossbar. The logits keep their scale."""
    network = networks[kind]
    samples = data.test[:400] if kind == "CNN" else data.test[:5000]
    crossbar = to_crossbar(network, images_of(data.training, 300))
    for layer, mapped in zip(network.phi, crossbar.phi, strict=True):
        has_weights = isinstance(layer, (nn.Linear, nn.Conv2d))
        assert type(mapped) is (CrossbarLayer if has_weights else type(layer))
    digital, logits = predict(network, samples), predict(crossbar, samples)
    before, after = (metrics(each, samples.labels)["Accuracy"] for each in (digital, logits))
    assert before > 0.6 and abs(after - before) < 0.005
    assert 0.97 < np.polyfit(digital, logits, 1)[0] < 1.03


def test_an_exact_crossbar_computes_the_layers():
    """The kernel and the images are not square, so that swapped sides are noticed."""
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
        batch[40:] *= 100  # other samples in the batch are very large
        together = crossbar(batch)
    close = (alone[:40] - together[:40]).abs() <= 1e-5 * alone.abs().max()
    assert close.sum() >= 38  # sums are in another order, so an ADC can round another way


def memtorch_layers(network, faults, tile_shape):
    """Map a network by MemTorch alone, with the settings of the course project."""
    patched = memtorch.mn.patch_model(
        copy.deepcopy(network),
        memristor_model=memtorch.bh.memristor.VTEAM,
        memristor_model_params={"time_series_resolution": 1e-10, "r_off": R_OFF, "r_on": R_ON},
        module_parameters_to_patch=[nn.Linear, nn.Conv2d],
        mapping_routine=memtorch.map.Parameter.naive_map,
        transistor=True,
        tile_shape=tile_shape,
        max_input_voltage=0.3,
        ADC_resolution=8,
        ADC_overflow_rate=0.0,
        quant_method="linear",
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
def test_crossbars_equal_memtorchs(tile_shape, faults):
    """Conductances, stuck devices and outputs of each layer are equal, with and without ADC."""
    torch.manual_seed(0)
    convolution = nn.Conv2d(2, 5, 4)
    phi = nn.Sequential(convolution, nn.ReLU(), nn.Flatten(), nn.Linear(180, 20), nn.Linear(20, 9))
    network = Network(phi)
    crossbar = to_crossbar(
        network,
        torch.randn(100, 2, 9, 9),
        tile_shape=tile_shape,
        lrs_proportion=faults,
        hrs_proportion=faults,
        fault_seed=1,
    )
    ours = [layer for layer in crossbar.phi if isinstance(layer, CrossbarLayer)]
    theirs = memtorch_layers(network, faults, tile_shape)
    rounded, outputs = 0, 0
    for layer, memtorch_layer in zip(ours, theirs, strict=True):
        for conductances, part in zip(layer.conductances, memtorch_layer.crossbars, strict=True):
            assert torch.equal(conductances, part.conductance_matrix.float())
        layer.input_range = layer.max_input_voltage  # inputs are voltages
        rows = memtorch_layer.crossbars[0].rows
        voltages = torch.randn(100, rows).clamp(-3, 3) / 10
        for bits in (None, 8, 4):
            layer.adc_resolution = torch.tensor(bits or 0)
            memtorch_layer.ADC_resolution = bits
            memtorch_layer.quant_method = "linear" if bits else None
            expected = tiled_inference(voltages, memtorch_layer, transistor=True)
            deviation = (layer.currents(voltages) - expected).abs() / expected.abs().max()
            # A current near the boundary of two ADC levels can round to the other one.
            assert deviation.max() < (2.0 ** (2 - bits) if bits else 1e-5)
            rounded += (deviation > 1e-5).sum().item()
            outputs += deviation.numel()
    assert rounded <= 0.002 * outputs, f"{rounded} of {outputs}"


def test_the_adc_equals_memtorchs():
    torch.manual_seed(0)
    for bits in range(2, 11):
        rows = torch.randn(60, 64) * 1e-5
        rows[-10:] *= 1e-7  # MemTorch adds 1e-12 to the largest current
        rows[0] = 0
        rows[1], rows[1, 0] = 0.5, 0.25
        expected = torch.stack(
            [memtorch.bh.Quantize.quantize(row, quant=bits, quant_method="linear") for row in rows]
        )
        assert torch.equal(quantize_currents(rows.clone(), bits), expected)


def test_inputs_are_clipped_at_1_25_times_the_largest_of_the_calibration():
    network = Network(nn.Sequential(nn.Linear(2, 1, bias=False)))
    sample = torch.tensor([[0.5, 1.0], [1.0, -2.0], [-1.0, 0.3]])[:, None]  # (N, channels, in)
    crossbar = to_crossbar(network, sample, adc_resolution=None)
    for sign in (1, -1):
        inputs = [torch.tensor([[0.0, sign * value]]) for value in (2.4, 2.5, 2.6, 9.0)]
        outputs = [crossbar.phi[0](each) for each in inputs]
        assert outputs[0] != outputs[1] and outputs[1] == outputs[2] == outputs[3]


def test_gains_and_offsets_are_fitted_after_the_damage(networks, data):
    """They are a least squares fit to the digital layer, also behind a damaged layer."""
    network, images = networks["bias"], images_of(data.training, 500)
    crossbar = to_crossbar(network, images, lrs_proportion=0.05, hrs_proportion=0.3)
    with torch.no_grad():
        for index in (1, 3, 5):
            outputs = crossbar.phi[: index + 1](images)
            wanted = network.phi[: index + 1](images)
            residual = wanted - outputs
            scale = wanted.std(0).max()
            assert (residual.mean(0) / scale).abs().max() < 1e-4
            assert ((residual * outputs).mean(0) / scale**2).abs().max() < 1e-3
        assert residual.std() > 0.1 * scale  # the damage is considerable


def test_a_constant_current_has_no_gain():
    """Rounding errors of a constant current are no signal."""
    torch.manual_seed(0)
    network = Network(nn.Sequential(nn.Linear(50, 9, bias=False)))
    constant = torch.rand(1, 1, 50)
    crossbar = to_crossbar(network, constant.repeat(1999, 1, 1), adc_resolution=None)
    assert not crossbar.phi[0].gain.any()
    assert torch.allclose(crossbar.phi[0].offset, network.phi(constant)[0, 0], atol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("damage", [{}, {"lrs_proportion": 0.1, "device_variability": 0.2}])
def test_a_layer_of_zeros_gives_zeros_or_its_bias(bias, damage, data):
    """All its devices are at r_off, except for the damage."""
    network = MLP(hidden_dim=(8,), bias=bias)
    nn.init.zeros_(network.phi[1].weight)
    crossbar = to_crossbar(network, images_of(data.training, 50), tile_shape=(64, 8), **damage)
    layer = crossbar.phi[1]
    if not damage:
        assert (layer.conductances == LOWEST).all()
    with torch.no_grad():
        outputs = layer(images_of(data.test, 50).flatten(1))
    expected = network.phi[1].bias if bias else torch.zeros(8)
    assert torch.allclose(outputs, expected.expand(50, 8), atol=1e-6)
    logits, digital = predict(crossbar, data.test[:50]), predict(network, data.test[:50])
    assert torch.allclose(logits, digital, atol=1e-3)


def test_calibration_images_are_in_both_colours(data):
    both = calibration_images(data.training)
    assert both.shape == (2000, 2, 28, 28)
    assert torch.equal(both[:1000], images_of(data.training, 1000))
    assert torch.equal(both[1000:], both[:1000].flip(1)) and both.std() > 0.5
    assert calibration_images(data.training[:3]).shape == (6, 2, 28, 28)


def test_the_mapping_leaves_the_network_and_the_random_generators_alone(data):
    torch.manual_seed(0)
    network = MLP(hidden_dim=(8,), drop_rate=0.5).train()
    before = copy.deepcopy(network)
    torch.manual_seed(5)
    np.random.seed(5)
    expected = torch.rand(()), np.random.rand()
    torch.manual_seed(5)
    np.random.seed(5)
    damage = {"lrs_proportion": 0.1, "device_variability": 0.1}
    crossbar = to_crossbar(network, images_of(data.training, 50), tile_shape=(64, 8), **damage)
    assert (torch.rand(()), np.random.rand()) == expected
    assert same_weights(network, before) and network.training
    assert not any(module.training for module in crossbar.modules())


def test_erm_on_the_crossbar_is_still_erm(data):
    """The crossbar itself adds no accuracy."""
    torch.manual_seed(0)
    network = train(MLP(), ERM(), data.training, iteration=60)
    crossbar = to_crossbar(network, calibration_images(data.training))
    digital, mapped = (evaluate(each, data.test)["Accuracy"] for each in (network, crossbar))
    assert digital < 0.5 and abs(mapped - digital) < 0.005


# Devices.


@functools.cache
def resistances(variability, r_off=R_OFF):
    """Return r_on and r_off of 32,000 devices after `vary`."""
    devices = np.empty((20, 40, 40), dtype=object)
    devices.fill(memtorch.bh.memristor.VTEAM(r_off=r_off, r_on=R_ON))
    vary(devices, variability, np.random.default_rng(3))
    on = np.array([device.r_on for device in devices.flat])
    return on, np.array([device.r_off for device in devices.flat])


@pytest.mark.parametrize("variability", [0.2, 1.0])
def test_device_variability_is_the_relative_standard_deviation(variability):
    """Resistances are log-normal, so their logarithms have no skew."""
    on, off = resistances(variability)
    for values, mean in ((on, R_ON), (off, R_OFF)):
        assert values.mean() == pytest.approx(mean, rel=0.015)
        assert values.std() / values.mean() == pytest.approx(variability, rel=0.05)
        centered = np.log(values) - np.log(values).mean()
        assert abs((centered**3).mean() / centered.std() ** 3) < 0.04
    assert abs(np.corrcoef(np.log(on), np.log(off))[0, 1]) < 0.02  # independent


def test_no_device_has_an_r_off_below_its_r_on(data):
    on, off = resistances(1.0, r_off=2e4)
    assert (off >= on).all() and (off == on).any()
    damage = {"r_off": 2e4, "device_variability": 1.0, "conductance_states": 8}
    crossbar = to_crossbar(
        MLP(hidden_dim=(4,)), images_of(data.training, 50), tile_shape=(64, 4), **damage
    )
    assert predict(crossbar, data.test[:50]).isfinite().all()


def test_a_conductance_outside_a_devices_limits_is_set_to_the_nearest(data):
    network = MLP(hidden_dim=(8,))
    nn.init.constant_(network.phi[1].weight, 0.01)  # all positive columns ask for 1 / r_on
    crossbars = [
        to_crossbar(
            network,
            images_of(data.training, 50),
            tile_shape=(64, 8),
            device_variability=0.2,
            fault_seed=fault_seed,
        )
        for fault_seed in (3, 3, 4)
    ]
    first, again, other = (crossbar.phi[1].conductances for crossbar in crossbars)
    assert torch.equal(first, again) and not torch.equal(first, other)
    on, off = (part[:24].flatten() for part in first)  # the full tiles
    # A device whose 1 / r_on is above the nominal one still gets the nominal conductance.
    assert on.max() == HIGHEST and 0.4 < (on < HIGHEST).float().mean() < 0.6
    assert off.min() == LOWEST and 0.4 < (off > LOWEST).float().mean() < 0.6
    factor = np.random.default_rng(3).lognormal(-math.log(1.04) / 2, math.log(1.04) ** 0.5)
    assert on[0].item() == pytest.approx(min(HIGHEST, HIGHEST / factor), rel=1e-5)


def test_conductance_states_are_equidistant(data):
    sample = images_of(data.training, 50)
    crossbar = to_crossbar(MLP(hidden_dim=(8,)), sample, conductance_states=5)
    states = crossbar.phi[1].conductances.unique()
    assert torch.allclose(states, torch.linspace(LOWEST, HIGHEST, 5), rtol=1e-4)
    any_state = to_crossbar(MLP(hidden_dim=(8,)), sample).phi[1].conductances
    assert len(any_state.unique()) > 1000


def test_a_conductance_is_rounded_to_the_nearest_state():
    network = Network(nn.Sequential(nn.Linear(4, 1, bias=False)))
    with torch.no_grad():
        network.phi[0].weight.copy_(torch.tensor([[1.0, 0.74, 0.76, -0.2]]))
    crossbar = to_crossbar(network, torch.randn(9, 1, 4), conductance_states=3, r_off=1e12)
    positive, negative = crossbar.phi[0].conductances[:, 0, :4, 0] * R_ON
    assert torch.allclose(positive, torch.tensor([1, 0.5, 1, 0]), atol=1e-4)
    assert torch.allclose(negative, torch.zeros(4), atol=1e-4)


@pytest.mark.parametrize(("on", "off"), [(0.1, 0.2), (0.6, 0.6)])
def test_the_fractions_of_stuck_devices(on, off, data):
    """A device in both fractions is stuck at r_on. Positive and negative devices differ."""
    torch.manual_seed(0)
    images, network = images_of(data.training, 50), MLP(hidden_dim=(8,))
    whole = to_crossbar(network, images).phi[1].conductances
    stuck = to_crossbar(network, images, lrs_proportion=on, hrs_proportion=off).phi[1].conductances
    for before, after in zip(whole, stuck, strict=True):
        used = (before > LOWEST) & (before < HIGHEST)
        assert (after == HIGHEST).float().mean() == pytest.approx(on, abs=0.001)
        assert (after[used] == LOWEST).float().mean() == pytest.approx(off * (1 - on), abs=0.02)
    assert not torch.equal(stuck[0] == HIGHEST, stuck[1] == HIGHEST)


# Saved crossbars.


@pytest.fixture(scope="module")
def crossbar(networks, data):
    images = images_of(data.training, 100)
    return to_crossbar(networks["CNN"], images, lrs_proportion=0.05, max_input_voltage=0.2)


def test_a_crossbar_can_be_copied_and_its_state_dict_loaded(crossbar, data, tmp_path):
    """The state can be loaded into any crossbar of the same shape."""
    samples = data.test[:50]
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
    """Make `import memtorch` fail with this reason in processes that start from now on."""
    (folder / "memtorch.py").write_text(f"raise ImportError({reason!r})")
    monkeypatch.setenv("PYTHONPATH", f"{folder}:{ROOT}")


# Networks that do not fit a crossbar.


class Doubled(nn.Linear):
    def forward(self, inputs):
        return 2 * super().forward(inputs)


class TwoBranches(Network):
    def __init__(self):
        super().__init__(nn.Sequential(nn.Flatten(), nn.Linear(1568, 1)))
        self.branch = nn.Linear(1568, 1)


class Unfit(Network):
    def __init__(self):
        super().__init__(nn.Sequential(nn.Flatten(), Doubled(1568, 1)))


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
        nn.BatchNorm1d(2),
        nn.BatchNorm2d(2),
        nn.BatchNorm2d(2, affine=False),
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
def test_layers_that_do_not_fit_are_refused(layer, data):
    network = Network(nn.Sequential(nn.ReLU(), layer))
    for function, argument in ((to_crossbar, torch.zeros(2, 2, 28, 28)), (harden, data.training)):
        with pytest.raises(UserError) as caught:
            function(network, argument)
        message = str(caught.value)
        assert message.startswith(f"phi[1], {type(layer).__name__}, does not fit a crossbar.")
        assert "nn.Linear" in message and "\n" not in message


def test_weights_beside_phi_are_refused():
    no_sequence = Network(nn.Linear(28, 1))
    for network in (TwoBranches(), no_sequence):
        with pytest.raises(UserError, match="`phi`"):
            to_crossbar(network, torch.zeros(2, 2, 28, 28))


def test_a_network_that_does_not_fit_is_refused_before_the_training(
    in_process, folder, monkeypatch
):
    monkeypatch.setitem(register.NETWORKS, "MLP", Unfit)
    result = in_process("memristor.py", "--dataset_path", folder, "--no_cuda")
    assert_one_line(result, "memristor.py: phi[1], Doubled, does not fit a crossbar.")
    assert result.stdout == ""


# Hardening.


def stuck_weights(weight, calls=30, **arguments):
    """Return a weight in training mode, (calls, ...), rounded to 6 decimals."""
    torch.manual_seed(0)
    stuck = StuckDevices(**arguments).train()
    return torch.stack([stuck(weight) for _ in range(calls)]).detach().round(decimals=6)


def test_in_evaluation_mode_weights_are_only_limited():
    torch.manual_seed(0)
    weight = torch.randn(200, 300)
    for limit in (0.7, 2.0):
        largest = (limit * weight.std()).item()
        limited = StuckDevices(limit, stuck_on=1.0, stuck_off=1.0).eval()(weight)
        assert torch.allclose(limited, weight.clamp(-largest, largest), atol=1e-6)
    assert torch.equal(StuckDevices(math.inf, 1.0, 1.0).eval()(weight), weight)


@pytest.mark.parametrize("sign", [1, -1])
def test_devices_stuck_off_remove_weights(sign):
    """Each call has another fraction, up to `stuck_off`."""
    weight = sign * torch.linspace(0.2, 0.9, 20000)
    calls = stuck_weights(weight, limit=math.inf, stuck_on=0.0, stuck_off=0.5)
    assert ((calls == 0) | (calls == weight.round(decimals=6))).all()
    fractions = (calls == 0).float().mean(1)
    assert fractions.min() < 0.1 and 0.4 < fractions.max() < 0.51


@pytest.mark.parametrize("sign", [1, -1])
def test_devices_stuck_on_add_or_subtract_the_limit(sign):
    """With a limit of infinity, it is the layer's largest weight. Each call has another fraction.

    The two devices of a weight are stuck independently. If both are, the weight is 0.
    """
    weight = sign * torch.linspace(0.2, 0.9, 20000)
    largest = weight[-1]
    calls = stuck_weights(weight, limit=math.inf, stuck_on=0.5, stuck_off=0.0)
    whole, on, subtracted, both = (
        ((calls - value).abs() < 2e-6).float().mean(1)
        for value in (weight, largest, weight - largest, 0)
    )
    assert torch.allclose(whole + on + subtracted + both, torch.ones(30), atol=1e-3)
    fractions = on + both
    assert fractions.min() < 0.1 and 0.4 < fractions.max() < 0.51
    assert torch.allclose(both, fractions**2, atol=0.01)
    assert torch.allclose(subtracted + both, fractions, atol=0.02)


def test_stuck_weights_stay_within_the_limit():
    torch.manual_seed(0)
    weight = torch.randn(100, 200)
    calls = stuck_weights(weight, limit=0.7, stuck_on=0.2, stuck_off=0.25)
    limit = 0.7 * weight.std()
    assert torch.isclose(calls.max(), limit) and torch.isclose(calls.min(), -limit)


def test_the_gradient_ignores_limit_and_damage():
    weight = torch.randn(50, 40, requires_grad=True)
    factors = torch.randn(50, 40)
    (factors * StuckDevices(0.7, 0.5, 0.5).train()(weight)).sum().backward()
    assert torch.equal(weight.grad, factors)


def assert_limited(weight):
    """Assert that many weights are at the limit, and that no devices are stuck."""
    magnitudes = weight.abs()
    assert (magnitudes > 0.999 * magnitudes.max()).float().mean() > 0.1
    assert (magnitudes == 0).float().mean() < 0.01


def test_a_hardened_network_keeps_its_accuracy_on_damaged_crossbars(data):
    """The README has the measurements of a whole training. This one is short."""
    torch.manual_seed(0)
    network = train(MLP(), Backdoor(), data.training, iteration=300, batch_size=512)
    weights = copy.deepcopy(network)
    hardened = harden(network, data.training, iteration=150, batch_size=512)
    assert same_weights(network, weights)
    for layer in (hardened.phi[1], hardened.phi[3]):
        assert_limited(layer.weight)
    test = data.test[:5000]
    plain, digital = (evaluate(each, test)["Accuracy"] for each in (network, hardened))
    assert plain > 0.7 and digital > plain - 0.02
    images = calibration_images(data.training)
    for damage in ({"lrs_proportion": 0.2}, {"hrs_proportion": 0.4}, {"conductance_states": 2}):
        crossbar = to_crossbar(hardened, images, **damage)
        assert evaluate(crossbar, test)["Accuracy"] > digital - 0.03
    unhardened = to_crossbar(network, images, lrs_proportion=0.2)
    assert evaluate(unhardened, test)["Accuracy"] < plain - 0.05


def test_hardening_is_erm_on_the_networks_predictions_in_both_colours(data):
    """The samples' labels and weight decay are ignored. It takes 3 times the iterations.

    Without limit and damage, the weights are the same as after such a training, bit for bit.
    """
    torch.manual_seed(0)
    network = train(MLP(), Backdoor(), data.training, iteration=20)
    part = data.training[::100]
    settings = {"iteration": 5, "batch_size": 50, "learning_rate": 0.01}
    both = concatenate([part, part.recolored()])
    pseudo_labels = (predict(network, both) > 0).float()
    assert not torch.equal(pseudo_labels[:400], pseudo_labels[400:])
    torch.manual_seed(1)
    expected = train(
        copy.deepcopy(network),
        ERM(),
        dataclasses.replace(both, labels=pseudo_labels),
        **settings | {"iteration": 15},
    )
    flipped = dataclasses.replace(part, labels=1 - part.labels)
    for samples in (part, flipped):
        torch.manual_seed(1)
        hardened = harden(
            network, samples, limit=math.inf, stuck_on=0, stuck_off=0, weight_decay=0.5, **settings
        )
        assert same_weights(hardened, expected) and not same_weights(hardened, network)


@pytest.mark.parametrize(
    ("given", "arguments"),
    [({}, (0.7, 0.2, 0.25)), ({"limit": 0.5, "stuck_on": 0.1, "stuck_off": 0.3}, (0.5, 0.1, 0.3))],
)
def test_hardening_trains_with_stuck_devices(given, arguments, data):
    """The arguments reach each layer. The hardened weights are limited, but not damaged."""
    torch.manual_seed(0)
    network, part = MLP(hidden_dim=(8,)), data.training[::400]
    both = concatenate([part, part.recolored()])
    expected = copy.deepcopy(network)
    for layer in (expected.phi[1], expected.phi[3]):
        parametrize.register_parametrization(layer, "weight", StuckDevices(*arguments))
    torch.manual_seed(1)
    pseudo_labels = (predict(network, both) > 0).float()
    train(expected, ERM(), dataclasses.replace(both, labels=pseudo_labels), iteration=3)
    torch.manual_seed(1)
    hardened = harden(network, part, iteration=1, **given)
    for index in (1, 3):
        assert torch.equal(hardened.phi[index].weight, expected.phi[index].weight)


def test_a_cnn_can_be_hardened(networks, data):
    hardened = harden(networks["CNN"], data.training[:200], iteration=2, batch_size=16)
    for layer in (hardened.phi[0], hardened.phi[3], hardened.phi[7]):
        assert_limited(layer.weight)
    crossbar = to_crossbar(hardened, images_of(data.training, 50), lrs_proportion=0.1)
    assert predict(crossbar, data.test[:20]).isfinite().all()


def test_a_layer_with_a_single_weight_can_be_hardened(data):
    hardened = harden(MLP(hidden_dim=(4, 1)), data.training[:500], iteration=1)
    assert all(parameter.isfinite().all() for parameter in hardened.parameters())


# The command.

CROSSBAR = ("--no_cuda", "--tile_shape", 64, 16)  # few unused devices, so that it is fast
TRAINING = ("--trainer", "IRM", "--seed", 7, "--iteration", 40, "--batch_size", 256)
TRAINING += ("--hidden_dim", 16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder that contains a small ColoredMNIST, generated with seed 7."""
    path = tmp_path_factory.mktemp("small")
    generate_environments(path, sizes=(1500, 1500, 2000), seed=7)
    return path


@pytest.fixture(scope="module")
def run(in_process, folder):
    """Run memristor.py on the small data, without a warning. Return the lines of its log."""

    def lines(*arguments):
        result = in_process("memristor.py", "--dataset_path", folder, *CROSSBAR, *arguments)
        assert result.returncode == 0 and result.stderr == "", result.stderr
        return result.stdout.splitlines()

    return lines


@pytest.fixture(scope="module")
def models(in_process, folder, tmp_path_factory):
    """Two networks that exp-mnist.py saved."""
    path = tmp_path_factory.mktemp("models")
    arguments = (*TRAINING, "--repetitions", 2, "--save_model", path)
    result = in_process("exp-mnist.py", "--dataset_path", folder, "--no_cuda", *arguments)
    assert result.returncode == 0, result.stderr
    return path


@pytest.fixture(scope="module")
def trained(run, tmp_path_factory):
    """Train with memristor.py. {False: log, True: log with --harden}, and the saved networks."""
    logs, folders = {}, {}
    for hardened in (False, True):
        folders[hardened] = tmp_path_factory.mktemp("trained")
        flags = ("--harden",) if hardened else ()
        arguments = (*TRAINING, "--repetitions", 2, "--save_model", folders[hardened], *flags)
        logs[hardened] = run(*arguments)
    return logs, folders


def values(line):
    return ast.literal_eval(line.split(": ", 1)[1])


def lines_of(log, name):
    return [line for line in log if line.startswith(f"{name}: ")]


def assert_warned(result, *words):
    """Assert that a command succeeded with one warning that has these words."""
    assert result.returncode == 0, result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith("memristor.py: warning: ")
    assert all(word in line for word in words), line


def test_the_log(trained, tmp_path):
    """metric.py reads its Summary, which is the crossbar's."""
    log = trained[0][False]
    repetition = ["Saved", "Test result", "Crossbar test result"]
    assert [line.split(":")[0] for line in log] == [
        *("Arguments", "Device", "Data"),
        *("Repetition 1 of 2", *repetition),
        *("Repetition 2 of 2", *repetition),
        *("Digital", "Summary"),
    ]
    digital = [values(line) for line in lines_of(log, "Test result")]
    on_crossbar = [values(line) for line in lines_of(log, "Crossbar test result")]
    assert values(log[-2]) == summarize(digital)
    assert values(log[-1]) == summarize(on_crossbar)
    assert digital != on_crossbar
    path = tmp_path / "memristor_log.txt"
    path.write_text("\n".join(log))
    row = read_log(str(path))
    assert row.trainer == "IRM" and row.on_crossbar
    assert row.accuracy == values(log[-1])["Accuracy_testmean"]


def test_the_digital_result_is_exp_mnists(trained, in_process, folder):
    arguments = ("--dataset_path", folder, "--no_cuda", *TRAINING, "--repetitions", 2)
    summary = in_process("exp-mnist.py", *arguments).stdout.splitlines()[-1]
    assert values(trained[0][False][-2]) == values(summary)


def test_hardening_changes_both_results(trained):
    plain, hardened = trained[0].values()
    assert plain[-1] != hardened[-1] and plain[-2] != hardened[-2]
    assert [line for line in hardened if line.startswith("Hardening: 120 iterations")]
    before = [values(line) for line in lines_of(hardened, "Before hardening")]
    assert before == [values(line) for line in lines_of(plain, "Test result")]


def test_networks_are_saved_before_hardening(trained, models):
    _, folders = trained
    for name in ("repetition1.pt", "repetition2.pt"):
        plain, hardened, exp_mnist = (
            load_model(path / name)[0] for path in (folders[False], folders[True], models)
        )
        assert same_weights(plain, hardened) and same_weights(plain, exp_mnist)


@pytest.mark.parametrize("hardened", [False, True])
def test_loaded_networks_give_the_results_of_their_training(hardened, trained, models, run):
    """They can be hardened as well. No flag of the training is needed."""
    flags = ("--harden",) if hardened else ()
    log, expected = run("--load_model", models, *flags), trained[0][hardened]
    assert log[-2:] == expected[-2:]
    for name in ("Test result", "Crossbar test result", "Before hardening"):
        assert lines_of(log, name) == lines_of(expected, name)
    assert [line for line in log if line.startswith("Repetition")] == [
        "Repetition 1 of 2",
        "Repetition 2 of 2",
    ]
    arguments, original = values(log[0]), values(expected[0])
    assert arguments.pop("load_model") == str(models) and original.pop("load_model") is None
    assert arguments.pop("save_model") is None and original.pop("save_model")
    assert arguments == original


def test_loaded_networks_are_not_trained_again(models, run, trained, tmp_path):
    """If both files are the same network, both digital results are the same."""
    shutil.copy(models / "repetition2.pt", tmp_path / "repetition1.pt")
    shutil.copy(models / "repetition2.pt", tmp_path / "repetition2.pt")
    log = run("--load_model", tmp_path)
    assert lines_of(log, "Test result") == [lines_of(trained[0][False], "Test result")[1]] * 2


def test_a_home_folder_in_load_model_is_expanded(models, run, monkeypatch):
    monkeypatch.setenv("HOME", str(models.parent))
    log = run(f"--load_model=~/{models.name}")
    assert values(log[0])["load_model"] == str(models)


def test_other_flags_of_training_beside_load_model_have_no_effect(
    models, trained, in_process, folder, tmp_path
):
    """One warning names the flags whose value is not the saved one."""
    other = ("--trainer", "groupDRO", "--seed", 8, "--iteration", 30, "--hidden_dim", 8)
    other += ("--repetitions", 4, "--validation", 0.5, "--save_model", tmp_path / "new")
    arguments = ("--dataset_path", folder, *CROSSBAR, "--load_model", models)
    result = in_process("memristor.py", *arguments, *other)
    assert_warned(result, "--load_model", *other[::2])
    assert result.stdout.splitlines()[-2:] == trained[0][False][-2:]
    used = values(result.stdout.splitlines()[0])
    assert (used["trainer"], used["seed"], used["repetitions"]) == ("IRM", 7, 2)
    assert not (tmp_path / "new").exists()
    same = in_process("memristor.py", *arguments, *TRAINING, "--repetitions", 2)
    assert same.returncode == 0 and same.stderr == "", same.stderr


def test_the_data_and_the_device_are_not_read_from_the_saved_file(
    models, trained, in_process, folder, tmp_path
):
    shutil.copytree(folder / "ColoredMNIST", tmp_path / "ColoredMNIST")
    arguments = ("--load_model", models, "--dataset_path", tmp_path)
    result = in_process("memristor.py", *CROSSBAR, *arguments)
    log = result.stdout.splitlines()
    assert result.stderr == "" and log[2].startswith(f"Data: {tmp_path}/ColoredMNIST, ")
    assert log[-2:] == trained[0][False][-2:]
    result = in_process("memristor.py", *arguments, "--tile_shape", 64, 16)
    assert values(result.stdout.splitlines()[0])["no_cuda"] is False


def test_saved_networks_that_cannot_be_used_are_named(models, in_process, folder, tmp_path):
    """A file is missing, corrupt or of another training."""
    path = tmp_path / "models"

    def assert_line(*words):
        result = in_process("memristor.py", "--dataset_path", folder, "--load_model", path)
        assert_one_line(result, *words)
        assert result.stdout == ""

    assert_line(path / "repetition1.pt", "No such file")
    shutil.copytree(models, path)
    (path / "repetition2.pt").unlink()
    assert_line(path / "repetition2.pt", "No such file")
    other = (*TRAINING, "--iteration", 1, "--save_model", tmp_path / "other")
    in_process("exp-mnist.py", "--dataset_path", folder, "--no_cuda", *other, "--repetitions", 2)
    shutil.copy(tmp_path / "other" / "repetition2.pt", path)
    assert_line(path / "repetition2.pt", path / "repetition1.pt", "other flags", "--save_model")
    (path / "repetition2.pt").write_bytes((models / "repetition2.pt").read_bytes()[:2000])
    assert_line(path / "repetition2.pt", "corrupt", "--save_model")


@pytest.fixture(scope="module")
def model(in_process, folder, tmp_path_factory):
    """One network, in its folder."""
    path = tmp_path_factory.mktemp("model")
    arguments = (*TRAINING, "--repetitions", 1, "--save_model", path)
    result = in_process("exp-mnist.py", "--dataset_path", folder, "--no_cuda", *arguments)
    assert result.returncode == 0, result.stderr
    return path


@pytest.fixture(scope="module")
def summary_of(run, model):
    """Return the Summary of the saved network with these flags."""

    @functools.cache
    def summary(*arguments):
        return values(run("--load_model", model, *arguments)[-1])

    return summary


@pytest.mark.parametrize(
    "arguments",
    [
        ("--lrs_proportion", 0.2),
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
    assert summary_of(*arguments) != summary_of()


def test_each_fault_seed_has_other_stuck_devices(summary_of):
    first, second, again = (
        summary_of("--lrs_proportion", 0.2, "--fault_seed", seed) for seed in (0, 1, 1)
    )
    assert first != second == again


def test_flags_reach_to_crossbar_and_harden(models, folder, run):
    """The two functions give the same results with these arguments."""
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
    assert flags.keys() == arguments_of(to_crossbar, memristor_parser().parse_args([])).keys()
    given = ["--harden"]
    for name, value in flags.items():
        given += [f"--{name}", *(value if isinstance(value, tuple) else (value,))]
    log = run("--load_model", models, *given)
    network, _, args = load_model(models / "repetition2.pt")
    data = load_data(folder, seed=7)
    seed_repetition(args, 2)
    training, _ = data.hold_out(0.2)
    seed_repetition(args, 2)
    hardened = harden(network, training, iteration=40, batch_size=256)
    assert values(lines_of(log, "Test result")[1]) == evaluate(hardened, data.test)
    crossbar = to_crossbar(hardened, calibration_images(training), **flags)
    assert values(lines_of(log, "Crossbar test result")[1]) == evaluate(crossbar, data.test)


def test_the_defaults_are_the_same_as_to_crossbars():
    parameters = inspect.signature(to_crossbar).parameters.values()
    keywords = [each for each in parameters if each.kind is each.KEYWORD_ONLY]
    defaults = {each.name: each.default for each in keywords}
    assert arguments_of(to_crossbar, memristor_parser().parse_args([])) == defaults


def test_a_flag_without_effect_gives_a_warning(in_process, folder):
    arguments = (*TRAINING, "--iteration", 1, "--repetitions", 1, "--trainer", "ERM", "--eta", 1)
    result = in_process("memristor.py", "--dataset_path", folder, *CROSSBAR, *arguments)
    assert_warned(result, "--eta")


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
def test_invalid_arguments_are_refused(arguments, words, in_process):
    assert_refused(in_process("memristor.py", *arguments), *words)


@pytest.mark.parametrize(("r_on", "r_off"), [(1e9, 5e7), (1.4e4, 14000.000001)])
def test_an_r_on_that_is_not_below_r_off_is_refused(r_on, r_off, in_process):
    """The command refuses it before the training."""
    with pytest.raises(UserError, match="--r_on"):
        to_crossbar(MLP(hidden_dim=(4,)), torch.zeros(2, 2, 28, 28), r_on=r_on, r_off=r_off)
    result = in_process("memristor.py", "--r_on", r_on, "--r_off", r_off)
    assert_one_line(result, "--r_on", "--r_off")
    assert result.stdout == ""


def test_help_explains_each_flag(in_process):
    result = in_process("memristor.py", "--help")
    assert result.returncode == 0 and result.stderr == "", result.stderr
    for action in memristor_parser()._actions:
        assert action.help and action.option_strings[-1] in result.stdout


def test_without_memtorch_one_line_gives_the_reason(command, tmp_path, monkeypatch):
    """A MemTorch that was built for another torch fails in this way."""
    hide_memtorch(tmp_path, monkeypatch, "memtorch_bindings.so: undefined symbol: _ZN3c10\nmore")
    result = command("memristor.py")
    reason = "MemTorch cannot be imported (memtorch_bindings.so: undefined symbol: _ZN3c10)"
    assert_one_line(result, reason, "Run ./run.sh")
    assert result.stdout == ""
