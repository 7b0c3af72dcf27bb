"""The crossbar: equal to MemTorch's own kernel, nothing lost in the move, robust when hardened."""

import ast
import contextlib
import copy
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import Normalized, assert_one_line
from torch import nn
from torch.nn import functional as F

pytest.importorskip("memtorch", reason="MemTorch is not installed (no compiler)")

import memtorch  # noqa: E402
from memtorch.bh.crossbar.Tile import tiled_inference  # noqa: E402
from memtorch.bh.nonideality.DeviceFaults import apply_device_faults  # noqa: E402
from memtorch.mn.Module import patch_model  # noqa: E402

import memristor  # noqa: E402
from dataset import load_dataset  # noqa: E402
from memristor import (  # noqa: E402
    CrossbarLayer,
    Imitation,
    StuckDevices,
    calibration_images,
    harden,
    quantize_currents,
    to_crossbar,
)
from metric import metrics  # noqa: E402
from model import CNN, ERM, MLP, Backdoor, Network  # noqa: E402
from preprocessing import UserError  # noqa: E402
from trainer import evaluate, parse_arguments, predict, train  # noqa: E402


@pytest.fixture(scope="module")
def splits(dataset_path):
    data = load_dataset(dataset_path)
    return data.training, data.test


def images(digits, count):
    """The first images, normalised."""
    return next(digits[torch.arange(count)].chunks()).images


@pytest.fixture(scope="module")
def networks(splits):
    """Trained networks of each kind; short trainings, as only the move is looked at."""
    torch.manual_seed(0)
    kinds = {
        "plain": (MLP(), 100, 1024),
        "bias": (MLP(bias=True), 60, 1024),
        "batchnorm": (Normalized(), 60, 1024),
        "CNN": (CNN(), 40, 128),
    }
    return {
        kind: train(network, Backdoor(), splits[0], None, iteration=count, batch_size=size)
        for kind, (network, count, size) in kinds.items()
    }


@pytest.mark.parametrize("kind", ["plain", "bias", "batchnorm", "CNN"])
def test_nothing_is_lost_in_the_move(networks, splits, kind):
    train_split, test = splits
    if kind == "CNN":
        test = test[torch.arange(2000)]
    network = networks[kind]
    digital, crossbar = predict(network, test), to_crossbar(network, images(train_split, 1000))
    logits = predict(crossbar, test)
    before, after = (metrics(outputs, test.labels) for outputs in (digital, logits))
    assert before["Accuracy"] > 0.6
    for name in ("Accuracy", "AUC"):
        assert abs(after[name] - before[name]) < 0.005
    slope = np.polyfit(digital, logits, 1)[0]
    assert 0.95 < slope < 1.05


def test_logits_do_not_depend_on_the_batch(networks, splits):
    crossbar = to_crossbar(networks["bias"], images(splits[0], 500), lrs_proportion=0.05)
    batch = images(splits[1], 64)
    with torch.no_grad():
        alone = torch.cat([crossbar(image[None]) for image in batch])
        batch[40:] *= 100  # a batch with other samples, very large ones
        together = crossbar(batch)
    close = (alone[:40] - together[:40]).abs() <= 1e-5 * alone.abs().max()
    assert close.sum() >= 38  # the sums are in another order: an ADC's rounding may turn over


def memtorch_layers(network, quick, bits=8, faults=0.0, tile_shape=(128, 128)):
    """The network's layers as MemTorch makes them, in our quick crossbars or in its own."""
    patched = copy.deepcopy(network)
    if quick:
        context = mock.patch.object(memtorch.bh.crossbar.Crossbar, "update")
        device, parameters = memristor.device_factory(1.4e4, 5e7, 0.0, None), {"cell": True}
    else:
        context = contextlib.nullcontext()
        device = memtorch.bh.memristor.VTEAM
        parameters = {"time_series_resolution": 1e-10, "r_off": 5e7, "r_on": 1.4e4}
    with context:
        patch_model(
            patched,
            memristor_model=device,
            memristor_model_params=parameters,
            module_parameters_to_patch=[nn.Linear],
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


def test_quick_crossbars_are_memtorchs():
    """The same conductances and the same stuck devices, from a network small enough for both."""
    torch.manual_seed(0)
    network = Network(nn.Sequential(nn.Linear(50, 20), nn.ReLU(), nn.Linear(20, 9)))
    for faults in (0.0, 0.1):
        quick, own = (
            memtorch_layers(network, quick, faults=faults, tile_shape=(16, 8))
            for quick in (True, False)
        )
        for ours, theirs in zip(quick, own, strict=True):
            for a, b in zip(ours.crossbars, theirs.crossbars, strict=True):
                assert torch.equal(a.conductance_matrix, b.conductance_matrix.float())
                assert torch.equal(a.tiles_map, b.tiles_map)
                assert a.devices.shape == b.devices.shape


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("faults", [0.0, 0.1])
@pytest.mark.parametrize("tile_shape", [(128, 128), (100, 30)])
def test_tiles_compute_what_memtorchs_kernel_does(networks, splits, bits, faults, tile_shape):
    """Every output of every layer, with and without ADC, faults and padding."""
    rounded, outputs = 0, 0
    inputs = images(splits[1], 200)
    for layer in memtorch_layers(networks["plain"], True, bits, faults, tile_shape):
        voltages = 0.3 * inputs / inputs.abs().max()
        quick = CrossbarLayer(layer)
        quick.input_range = layer.max_input_voltage  # inputs are voltages already
        ours = quick.currents(voltages)
        theirs = tiled_inference(voltages, layer, transistor=True)
        deviation = (ours - theirs).abs() / theirs.abs().max()
        at_a_boundary = deviation > 1e-5
        # A current next to the boundary of two ADC levels rounds one step up or down.
        assert deviation.max() < (2.0 ** (2 - bits) if bits else 1e-5)
        rounded, outputs = rounded + at_a_boundary.sum().item(), outputs + ours.numel()
        inputs = torch.relu(layer(inputs))
    assert rounded <= 0.002 * outputs, f"{rounded} of {outputs}"


def test_adc_is_memtorchs():
    torch.manual_seed(0)
    for bits in range(2, 11):
        rows = torch.cat(
            [torch.randn(50, 64) * 1e-5, torch.zeros(1, 64), 2.0 ** -torch.ones(1, 64)]
        )
        rows[-1, 0] = 0.25
        expected = torch.stack(
            [memtorch.bh.Quantize.quantize(row, quant=bits, quant_method="linear") for row in rows]
        )
        assert torch.equal(quantize_currents(rows.clone(), bits), expected)


def test_variable_devices_differ(networks, splits):
    sample = images(splits[0], 300)
    network = MLP(hidden_dim=(8,))
    crossbar = to_crossbar(network, sample, device_variability=0.2, fault_seed=3)
    columns = crossbar.phi[0].layer.crossbars[0]
    devices = columns.devices.ravel()
    r_on = np.array([device.r_on for device in devices])
    assert abs(r_on.mean() / 1.4e4 - 1) < 0.02 and abs(r_on.std() / r_on.mean() - 0.2) < 0.02
    # Each within the limits of its own device: writing it into the device changes nothing.
    columns.update(from_devices=False)
    written = [device.g for device in devices]
    assert np.allclose(written, columns.conductance_matrix.ravel(), rtol=1e-5)
    again = to_crossbar(network, sample, device_variability=0.2, fault_seed=3)
    assert torch.equal(crossbar(sample), again(sample))
    other = to_crossbar(network, sample, device_variability=0.2, fault_seed=4)
    assert not torch.equal(crossbar(sample), other(sample))


def test_finite_states_are_few(splits):
    crossbar = to_crossbar(MLP(hidden_dim=(8,)), images(splits[0], 300), conductance_states=5)
    matrix = crossbar.phi[0].layer.crossbars[1].conductance_matrix
    assert torch.allclose(matrix.unique(), torch.linspace(1 / 5e7, 1 / 1.4e4, 5), rtol=1e-4)


@pytest.mark.parametrize(("on", "off"), [(0.1, 0.2), (0.6, 0.6)])
def test_stuck_devices_are_as_many_as_asked(splits, on, off):
    some = images(splits[0], 300)
    crossbar = to_crossbar(MLP(hidden_dim=(8,)), some, lrs_proportion=on, hrs_proportion=off)
    matrix = crossbar.phi[0].layer.crossbars[0].conductance_matrix
    at_low = (matrix == np.float32(1 / 1.4e4)).float().mean()
    assert on - 0.005 < at_low < on + 0.01  # the largest weight is there too


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


def test_imitation_takes_decisions_for_labels(splits):
    """Also in what the log says of the environments."""
    both = torch.arange(0, 40000, 400)  # 50 of each environment
    batch, teacher = next(splits[0][both].chunks()), MLP()
    decided, logits = (teacher(batch.images) > 0).float(), torch.linspace(-3, 3, 100)
    expected = F.binary_cross_entropy_with_logits(logits, decided)
    assert torch.isclose(Imitation(teacher)(logits, batch), expected)
    assert torch.isclose(Imitation(teacher).risks(logits, batch).mean(), expected)


def test_hardened_network_keeps_its_accuracy_on_broken_hardware(splits):
    """A short training; README.md has the measurements of the whole one."""
    torch.manual_seed(0)
    network = train(MLP(), Backdoor(), splits[0], None, iteration=300)
    weights = copy.deepcopy(network.state_dict())
    hardened = harden(network, splits[0], iteration=200)
    assert all(torch.equal(weights[name], value) for name, value in network.state_dict().items())
    plain, digital = (evaluate(each, splits[1])["Accuracy"] for each in (network, hardened))
    assert plain > 0.75 and digital > plain - 0.015
    # Without hardening it loses ten points and more.
    sample = images(splits[0], 1000)
    for damage in ({"lrs_proportion": 0.2}, {"hrs_proportion": 0.4}, {"conductance_states": 2}):
        crossbar = to_crossbar(hardened, sample, **damage)
        assert evaluate(crossbar, splits[1])["Accuracy"] > digital - 0.03


def test_statistics_of_a_hardened_batch_normalisation_are_of_sound_devices(networks, splits):
    part = splits[0][torch.arange(0, 40000, 20)]
    hardened = harden(networks["batchnorm"], part, iteration=3, batch_size=256)
    both = torch.cat([b.images.clone() for d in (part, part.recolored()) for b in d.chunks()])
    with torch.no_grad():
        outputs = hardened.phi[0](both)
    assert torch.allclose(hardened.phi[1].running_var, outputs.var(0), rtol=0.02)


def test_a_current_that_varies_by_rounding_alone_has_no_gain():
    torch.manual_seed(0)
    network = Network(nn.Sequential(nn.Linear(50, 9, bias=False)))
    constant = torch.rand(1, 50)
    crossbar = to_crossbar(network, constant.repeat(1999, 1), adc_resolution=None)
    assert not crossbar.phi[0].gain.any()
    assert torch.allclose(crossbar.phi[0].offset, network.phi(constant)[0], atol=1e-5)


def test_networks_that_crossbars_cannot_take_are_refused():
    nested = Network(nn.Sequential(nn.ModuleList([nn.Linear(1568, 1)])))
    strided = Network(nn.Sequential(nn.Unflatten(1, (2, 28, 28)), nn.Conv2d(2, 1, 3, stride=2)))
    for network in (nested, strided):
        with pytest.raises(UserError, match="flat nn.Sequential"):
            to_crossbar(network, torch.zeros(2, 1568))


def test_states_of_devices_without_a_range(splits):
    damage = {"r_off": 1.4e5, "device_variability": 0.5, "conductance_states": 8}
    crossbar = to_crossbar(MLP(hidden_dim=(4,)), images(splits[0], 50), **damage)
    assert predict(crossbar, splits[1][torch.arange(50)]).isfinite().all()


def test_a_cnn_can_be_hardened(networks, splits):
    hardened = harden(networks["CNN"], splits[0], iteration=2, batch_size=16)
    crossbar = to_crossbar(hardened, images(splits[0], 50), lrs_proportion=0.1)
    assert predict(crossbar, splits[1][torch.arange(20)]).isfinite().all()


def test_hardening_has_no_weight_decay(networks, splits):
    """Backdoor's training has: its weights grow small, and those of hardened networks may not."""
    part = splits[0][torch.arange(500)]
    weights = []
    for decay in (0.0, 0.5):
        torch.manual_seed(0)
        hardened = harden(networks["plain"], part, iteration=2, weight_decay=decay)
        weights.append(hardened.phi[0].weight)
    assert torch.equal(*weights)


def test_a_layer_of_a_single_weight_can_be_hardened(splits):
    hardened = harden(MLP(hidden_dim=(4, 1)), splits[0], iteration=1)
    assert all(parameter.isfinite().all() for parameter in hardened.parameters())


def test_erm_on_the_crossbar_is_still_erm(splits):
    """A control: the crossbar adds no accuracy of its own."""
    network = train(MLP(), ERM(), splits[0], None, iteration=100)
    crossbar = to_crossbar(network, images(splits[0], 500))
    digital, moved = (evaluate(each, splits[1])["Accuracy"] for each in (network, crossbar))
    assert digital < 0.5 and abs(moved - digital) < 0.005


SHORT = ("--no_cuda", "--iteration", 40, "--repetitions", 1)


def test_command(command, dataset_path):
    result = command("memristor.py", "--dataset_path", dataset_path, *SHORT, "--trainer", "IRM")
    assert result.returncode == 0 and result.stderr == "", result.stderr
    *_, digital, summary = result.stdout.splitlines()
    digital, summary = (ast.literal_eval(line.split(": ", 1)[1]) for line in (digital, summary))
    assert list(digital) == list(summary) and digital["Accuracy_testmean"] > 0.1
    assert abs(digital["AUC_testmean"] - summary["AUC_testmean"]) < 0.005


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--adc_resolution", 0), ("--adc_resolution", "'0'")),
        (("--lrs_proportion", 1.5), ("--lrs_proportion",)),
        (("--hrs_proportion", -0.1), ("--hrs_proportion",)),
        (("--r_off", 0), ("--r_off",)),
        (("--tile_shape", 0, 128), ("--tile_shape",)),
        (("--tile_shape", 128), ("--tile_shape",)),
        (("--max_input_voltage", 0), ("--max_input_voltage",)),
        (("--conductance_states", 1), ("--conductance_states",)),
        (("--device_variability", "nan"), ("--device_variability",)),
        (("--fault_seed", -1), ("--fault_seed",)),
    ],
)
def test_nonsense_is_refused(arguments, words, capsys):
    with pytest.raises(SystemExit) as caught:
        parse_arguments("", [*map(str, arguments)], functions=[to_crossbar])
    assert caught.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert all(word in last for word in words)


def test_contradictions_are_refused_before_training(command, dataset_path):
    result = command("memristor.py", "--dataset_path", dataset_path, "--r_on", 1e9)
    assert_one_line(result, "--r_on", "--r_off")


def test_flags_are_the_signatures(capsys):
    """Defaults of to_crossbar are those of the command line; its help has them all."""
    args = parse_arguments("", [], functions=[to_crossbar], harden="train on")
    assert (args.tile_shape, args.adc_resolution, args.r_on) == ((128, 128), 8, 1.4e4)
    assert args.conductance_states is None and args.harden is False
    given = ["--conductance_states", "4", "--adc_resolution", "6", "--tile_shape", "64", "32"]
    args = parse_arguments("", given, functions=[to_crossbar])
    assert (args.conductance_states, args.adc_resolution, args.tile_shape) == (4, 6, [64, 32])
    with pytest.raises(SystemExit):
        parse_arguments("", ["--help"], functions=[to_crossbar], harden="train on")
    assert capsys.readouterr().out.count("\n  --") <= 40


def test_without_memtorch_it_says_how_to_install_it(command, dataset_path, tmp_path, monkeypatch):
    (tmp_path / "memtorch.py").write_text("raise ImportError('hidden for this test')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    result = command("memristor.py", "--dataset_path", dataset_path)
    assert_one_line(result, "MemTorch is not installed", "run.sh")


def test_the_digital_training_is_the_other_commands(command, dataset_path):
    arguments = ("--dataset_path", dataset_path, *SHORT)
    digital = command("memristor.py", *arguments).stdout.splitlines()[-2]
    summary = command("exp-mnist.py", *arguments).stdout.splitlines()[-1]
    assert digital.removeprefix("Digital: ") == summary.removeprefix("Summary: ")


def test_hardened_networks_are_saved_under_a_name_of_their_own(command, dataset_path, tmp_path):
    arguments = ("--dataset_path", dataset_path, "--save_model", tmp_path, "--harden", *SHORT)
    result = command("memristor.py", *arguments, "--iteration", 2)
    assert result.returncode == 0, result.stderr
    assert [path.name for path in tmp_path.glob("*.pt")] == [
        "ERM_MLP_hardened_seed1234_repetition1.pt"
    ]


def test_calibration_sees_each_digit_in_both_colors(splits):
    both = calibration_images(splits[0]).view(2, 1000, 2, 784)
    assert torch.equal(both[0], both[1].flip(1)) and both[0].std() > 0.5
    few = splits[0][torch.arange(3)]
    assert calibration_images(few).shape == (6, 1568)
