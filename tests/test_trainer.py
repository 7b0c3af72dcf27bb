"""Training: the assignment's protocol, the flags, the log, saved networks, and the accuracies."""

import ast
import copy
import inspect
import itertools
import math
import os
import re
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import ROOT, Normalized, assert_one_line, assert_refused, same
from torch import nn
from torchvision.transforms import Compose, Normalize, ToTensor

import register
import trainer
from dataset import MEAN, STD, ColoredMNIST, Samples, concatenate, load_dataset
from metric import metrics
from model import CNN, ERM, IRM, MLP, Backdoor, GroupDRO, Loss, Network
from preprocessing import UserError, draw_environments
from trainer import (
    Watched,
    build,
    evaluate,
    file_name,
    load,
    load_model,
    load_saved,
    parse_arguments,
    predict,
    repetitions,
    train,
    training_parser,
    training_settings,
)

SHORT = ("--no_cuda", "--iteration", 40, "--repetitions", 2, "--evaluation_steps", 20)
SUMMARY = re.compile(
    r"Summary: \{'Accuracy_testmean': _, 'Accuracy_teststd': _, 'AUC_testmean': _, "
    r"'AUC_teststd': _, 'F1_macro_testmean': _, 'F1_macro_teststd': _\}".replace(
        ": _", r": \d\.[\de-]+"
    )
)


def summary(result):
    assert result.returncode == 0, result.stderr
    last = result.stdout.splitlines()[-1]
    assert SUMMARY.fullmatch(last), last
    return ast.literal_eval(last.removeprefix("Summary: "))


@pytest.fixture(scope="module")
def small(small_files):
    """120 samples to train on and 60 to test on, and the flags that make short trainings of them.

    Seed 3 is that of the files, so that nothing is warned of.
    """
    return load_dataset(small_files.parent)


@pytest.fixture(scope="module")
def quick(in_process, small_files):
    """exp-mnist.py on the small files: 30 steps, with a learning rate that makes them count."""

    def run(*arguments):
        flags = ("--dataset_path", small_files.parent, "--no_cuda", "--repetitions", 1)
        flags += ("--seed", 3, "--iteration", 30, "--batch_size", 40, "--learning_rate", 0.01)
        return in_process("exp-mnist.py", *flags, *arguments)

    return run


def test_networks_see_the_assignments_images(dataset_path, data):
    """RGB, normalised as the assignment says, less the blue channel, which is 0."""
    images = []
    for e, name in ((0, "train1"), (1, "train2")):
        record = torch.load(dataset_path / "ColoredMNIST" / f"{name}.pt", weights_only=True)
        images.append(record["images"][[3, 8 + e]])
    expected = (torch.cat(images)[:, :2] / 255 - 0.1307) / 0.3081
    samples = data.training[torch.tensor([3, 8, 20003, 20009])]
    batch = samples.batch()
    assert torch.allclose(batch.images, expected, atol=1e-6)
    types = [torch.float32, torch.float32, torch.int64, torch.int64]
    assert [field.dtype for field in batch] == types
    assert torch.equal(batch.labels, samples.labels) and torch.equal(batch.envs, samples.envs)
    recolored = samples.recolored().batch()
    assert torch.allclose(recolored.images.flip(1), expected, atol=1e-6)
    assert torch.equal(recolored.colors, 1 - samples.colors)
    assert torch.equal(recolored.labels, samples.labels)


@pytest.mark.parametrize("make", [MLP, CNN, lambda: MLP(grayscale=True)])
def test_rgb_by_torchvision_gives_the_same_logits(dataset_path, data, make):
    """Bit for bit: a loop of one's own trains the same networks on the same images."""
    normalize = Compose([ToTensor(), Normalize((MEAN, MEAN, 0), (STD, STD, STD))])
    items = ColoredMNIST(dataset_path, "all_train", normalize)
    positions = [0, 5, 19999, 20000, 39999]
    images = torch.stack([items[i][0] for i in positions])
    assert images.shape == (5, 3, 28, 28)
    batch = data.training[torch.tensor(positions)].batch()
    assert torch.equal(images[:, :2], batch.images)
    network = make().eval()
    assert torch.equal(network(images), network(batch.images))
    assert [items[i][1] for i in positions] == batch.labels.tolist()
    assert [items[i][2] for i in positions] == batch.colors.tolist()


def numbered(count):
    """Samples that tell which they are: by their labels, 0, 1, ..."""
    zeros = torch.zeros(count, dtype=torch.int64)
    images = torch.zeros(count, 2, 28, 28, dtype=torch.uint8)
    return Samples(images, torch.arange(count).float(), zeros, zeros)


def test_samples_can_be_indexed():
    samples = numbered(10)
    even = torch.arange(10) % 2 == 0
    for index, expected in (
        (3, [3]),
        (-1, [9]),
        (torch.tensor(3), [3]),
        (np.int64(3), [3]),
        (slice(2, 5), [2, 3, 4]),
        (slice(None, None, 4), [0, 4, 8]),
        (torch.tensor([7, 0, 7]), [7, 0, 7]),
        (even, [0, 2, 4, 6, 8]),
    ):
        part = samples[index]
        assert part.labels.tolist() == expected and len(part) == len(expected)
        assert part.images.shape == (len(expected), 2, 28, 28)
        assert part.colors.shape == part.envs.shape == (len(expected),)
    for index in (10, -11, torch.tensor([10])):
        with pytest.raises(IndexError):
            samples[index]
    assert [sample.labels.item() for sample in samples] == list(range(10))


def test_no_batch_overwrites_anothers_images(data):
    samples = data.training[:300]
    batches = samples.minibatches(100)
    first = next(batches)
    before = first.images.clone()
    next(batches)
    assert torch.equal(first.images, before)
    bytes_before = samples.images.clone()
    samples[:100].batch().images.zero_()
    assert torch.equal(samples.images, bytes_before)


def test_in_both_colors_each_digit_comes_twice(data):
    samples = data.training[5:105]
    twice = concatenate([samples, samples.recolored()])
    once, again = twice[:100], twice[100:]
    assert len(twice) == 200 and same(once, samples) and same(again.recolored(), samples)
    assert torch.equal(again.labels, samples.labels) and torch.equal(again.envs, samples.envs)
    assert same(concatenate(part for part in (samples,)), samples)


def test_chunks_are_all_samples_in_order():
    for count in (1, 1999, 2000, 2001, 4001):
        sizes, labels = [], []
        for batch in numbered(count).chunks():
            sizes.append(len(batch.labels))
            labels += batch.labels.tolist()
        assert labels == list(range(count)) and max(sizes) <= 2000
        assert len(sizes) == math.ceil(count / 2000) and max(sizes) - min(sizes) < len(sizes)


def test_passes_are_shuffled_and_have_32_minibatches_the_last_of_256():
    """Of the 32,000 samples that remain of 40,000; each of them once a pass."""
    torch.manual_seed(0)
    batches = numbered(32000).minibatches(1024)
    orders = []
    for _ in range(2):
        one = [next(batches).labels for _ in range(32)]
        assert [len(labels) for labels in one] == [1024] * 31 + [256]
        orders.append(torch.cat(one))
        assert torch.equal(orders[-1].sort()[0], torch.arange(32000.0))
        assert not torch.equal(orders[-1], torch.arange(32000.0))
    assert not torch.equal(*orders)
    assert len(next(numbered(50).minibatches(1024)).labels) == 50


def test_minibatches_mix_the_environments(data):
    torch.manual_seed(0)
    for batch in itertools.islice(data.training.minibatches(1024), 10):
        assert 400 < batch.envs.sum() < 624
        assert batch.images.shape == (1024, 2, 28, 28) and batch.images.dtype == torch.float32


def test_what_is_held_out_is_not_trained_on(data):
    parts = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        parts.append(data._replace(training=numbered(40000)).hold_out(0.2))
    for training, held_out in parts:
        assert len(training) == 32000 and len(held_out) == 8000
        both = torch.cat([training.labels, held_out.labels])
        assert torch.equal(both.sort()[0], torch.arange(40000).float())
    assert same(parts[0][1], parts[1][1]) and not same(parts[0][1], parts[2][1])
    training, held_out = data.hold_out(0)
    assert same(training, data.training) and held_out is None


def trained(samples, loss=ERM, network=MLP, **settings):
    torch.manual_seed(0)
    return train(network(), loss(), samples, None, **settings)


def by_hand(network, loss, samples, iteration, batch_size=1024, norm=None, **settings):
    """The loop that everyone writes, with shuffled passes; yields the network after each step."""
    adam = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0} | settings
    optimizer = torch.optim.Adam(network.phi.parameters(), **adam)
    done = 0
    while done < iteration:
        for index in torch.randperm(len(samples)).split(batch_size)[: iteration - done]:
            optimizer.zero_grad()
            loss(network, samples[index].batch()).backward()
            if norm is not None:
                nn.utils.clip_grad_norm_(network.phi.parameters(), norm)
            optimizer.step()
            done += 1
            yield network


def assert_close(ours, theirs, **tolerance):
    pairs = zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True)
    for (name, value), other in pairs:
        assert value.dtype == torch.float32
        assert torch.allclose(value, other, **tolerance), name


EXACTLY = {"rtol": 0, "atol": 0}


@pytest.mark.parametrize(
    ("loss", "asked"),
    [(IRM, {}), *((loss, {"iteration": 20}) for loss in (ERM, GroupDRO, Backdoor))],
)
def test_defaults_of_train_are_the_assignments_protocol(small, loss, asked):
    """400 minibatches of 1024, Adam as torch has it, the weights after the last step.

    Against a loop by hand, bit for bit; of few samples, with which a pass is one minibatch.
    """
    ours = trained(small.training, loss, **asked)
    torch.manual_seed(0)
    *_, network = by_hand(MLP(), loss(), small.training, asked.get("iteration", 400))
    assert_close(ours, network, **EXACTLY)
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize("make", [MLP, CNN])
def test_training_is_adam_on_minibatches(data, make):
    """With whichever settings, the smaller last minibatch of a pass included."""
    samples = data.training[19800:20200]
    settings = {"learning_rate": 3e-3, "weight_decay": 0.1}
    ours = trained(samples, IRM, make, iteration=7, batch_size=120, **settings)
    torch.manual_seed(0)
    *_, network = by_hand(make(), IRM(), samples, 7, 120, lr=3e-3, weight_decay=0.1)
    assert_close(ours, network, **EXACTLY)
    assert not ours.training


@pytest.mark.parametrize("loss", [ERM, GroupDRO, IRM, Backdoor])
@pytest.mark.parametrize("steady", [False, True])
def test_output_layer_stays_one(small, loss, steady):
    """Whatever gradient it gets, the optimizer never has it."""
    network = trained(small.training, loss, iteration=8, weight_decay=0.5, steady=steady)
    assert network.output_layer == 1 and network.output_layer.requires_grad
    network.zero_grad()
    IRM()(network, small.training.batch()).backward()
    assert network.output_layer.grad.abs() > 0


@pytest.mark.parametrize("iteration", [1, 4, 5, 10, 16])
def test_steady_averages_the_last_quarter_and_clips_gradients(data, iteration):
    """Against a loop by hand: the mean of the weights after each of the last steps."""
    samples = data.training[19000:21000]
    settings = {"batch_size": 512, "learning_rate": 1e-2}
    ours = trained(samples, IRM, steady=True, iteration=iteration, **settings)
    torch.manual_seed(0)
    steps = by_hand(MLP(), IRM(), samples, iteration, 512, norm=0.1, lr=1e-2)
    networks = [copy.deepcopy(network) for network in steps]
    last = networks[-math.ceil(iteration / 4) :]
    for i in (1, 3, 5):
        expected = torch.stack([network.phi[i].weight for network in last]).mean(0)
        assert torch.allclose(ours.phi[i].weight, expected, atol=1e-6)
    if iteration > 1:
        plain = trained(samples, IRM, iteration=iteration, **settings)
        assert not torch.allclose(plain.phi[1].weight, ours.phi[1].weight, atol=1e-4)


class Filters(Network):
    """A network of a user's own, with batch normalisation between its convolutions."""

    def __init__(self, maps: int = 4):
        super().__init__(
            nn.Sequential(
                nn.Conv2d(2, maps, 5, stride=4),
                nn.BatchNorm2d(maps),
                nn.ReLU(),
                nn.Conv2d(maps, 1, 6),
                nn.Flatten(),
            )
        )


@pytest.mark.parametrize("network", [Filters, Normalized])
@pytest.mark.parametrize("count", [2001, 4000])
def test_batch_normalisation_fits_the_averaged_weights(data, network, count):
    """Its statistics are those of what the averaged layers make of the training images."""
    samples = data.training[19000 : 19000 + count]
    ours = trained(samples, network=network, iteration=10, steady=True, learning_rate=1e-2)
    (index,) = [i for i, layer in enumerate(ours.phi) if hasattr(layer, "running_mean")]
    with torch.no_grad():
        outputs = torch.cat([ours.phi[:index](batch.images) for batch in samples.chunks()])
    outputs = outputs.transpose(0, 1).flatten(1)  # a row for each unit or map
    assert torch.allclose(ours.phi[index].running_mean, outputs.mean(1), atol=1e-3)
    assert torch.allclose(ours.phi[index].running_var, outputs.var(1), rtol=0.02)


def test_evaluation_does_not_change_training(data):
    """Whatever the log reports on, and how often."""
    weights = []
    for validation, steps in ((None, 1000), (data.test[:100], 1)):
        torch.manual_seed(0)
        network = Normalized(drop_rate=0.3)
        settings = {"iteration": 4, "batch_size": 100, "evaluation_steps": steps}
        weights.append(train(network, ERM(), data.training[:1000], validation, **settings))
    assert_equal(*weights)


def assert_equal(ours, theirs):
    ours, theirs = ours.state_dict(), theirs.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_training_goes_on_in_training_mode_and_ends_in_evaluation_mode(small):
    seen = []

    class Seen(ERM):
        def forward(self, network, batch):
            seen.append((network.training, self.training))
            return super().forward(network, batch)

    network, loss = Normalized(0.5).eval(), Seen().eval()
    train(network, loss, small.training, small.test, iteration=3, evaluation_steps=1)
    assert seen == [(True, True)] * 3 and not network.training and not loss.training


def test_watched_training_is_the_same(small):
    """`note` sees the network as it is after 0, 3, 6, ... steps."""
    notes = []
    torch.manual_seed(0)
    network, loss = Normalized(0.3), GroupDRO()

    def note(steps):
        evaluate(network, small.test)
        notes.append((steps, network.phi[1].weight.detach().clone()))

    train(network, Watched(loss, 3, note), small.training, small.test, iteration=7)
    plain = trained(small.training, GroupDRO, lambda: Normalized(0.3), iteration=7)
    assert [steps for steps, _ in notes] == [0, 3, 6]
    assert_equal(network, plain)
    after_six = trained(small.training, GroupDRO, lambda: Normalized(0.3), iteration=6)
    assert torch.equal(notes[2][1], after_six.phi[1].weight)
    assert loss.q.tolist() != [0.5, 0.5]


def test_a_log_line_reports_the_minibatch_and_the_validation_samples(small, capsys):
    network, loss = MLP(), IRM(3.0)
    samples = small.training  # one minibatch is all of them
    torch.manual_seed(0)
    settings = {"iteration": 2, "evaluation_steps": 2, "learning_rate": 1e-30}
    train(network, loss, samples, small.test, **settings)
    batch = samples.batch()
    train1, train2 = loss.risks(network(batch.images), batch).tolist()
    figures = [f"{value:.4f}" for value in (loss(network, batch).item(), train1, train2)]
    line = "Iteration 2: objective {}; loss of train1 {}, train2 {}; ".format(*figures)
    assert capsys.readouterr().out == line + f"validation {evaluate(network, small.test)}\n"


@pytest.mark.parametrize("env", [0, 1])
@pytest.mark.parametrize("loss", [ERM, GroupDRO, IRM, Backdoor])
def test_a_log_line_says_which_environment_a_minibatch_lacks(small, capsys, env, loss):
    samples = small.training[small.training.envs == env]
    network = train(MLP(), loss(), samples, None, iteration=1, evaluation_steps=1)
    risk = ERM()(network, samples.batch())
    shown = [f"{risk:.4f}", "–"] if env == 0 else ["–", f"{risk:.4f}"]
    line = capsys.readouterr().out
    assert re.fullmatch(r"Iteration 1: objective [\d.]+; loss of .*\n", line)
    assert "loss of train1 {}, train2 {}\n".format(*shown) in line


def test_predictions_are_in_order_and_of_all_samples(data):
    network = Normalized(0.5)
    samples = data.test[:4001]
    logits = predict(network, samples)
    assert logits.shape == (4001,) and not logits.requires_grad and not network.training
    with torch.no_grad():
        expected = network(samples.batch().images)
    assert torch.allclose(logits, expected, atol=1e-5)
    assert evaluate(network, samples) == metrics(logits, samples.labels)


def test_each_repetition_has_its_own_draws(small):
    """Of what is held out and of the weights; of two seeds none is the same."""

    def drawn(seed):
        args = parse_arguments("", ["--seed", str(seed), "--trainer", "groupDRO"])
        runs = []
        for number, network, loss, training, validation in repetitions(args, small):
            assert len(training) == 96 and len(validation) == 24
            assert isinstance(network, MLP) and loss.q.tolist() == [0.5, 0.5]
            runs.append((number, network.phi[1].weight[0, 0].item(), validation.images.sum()))
        assert [number for number, _, _ in runs] == [1, 2, 3]
        return [weight for _, weight, _ in runs], [images.item() for _, _, images in runs]

    assert drawn(5) == drawn(5)
    weights, held_out = (a + b for a, b in zip(drawn(5), drawn(6), strict=True))
    assert len(set(weights)) == len(set(held_out)) == 6


def test_dropout_does_not_depend_on_how_many_repetitions_follow(quick):
    def results(repetitions):
        result = quick("--drop_rate", 0.3, "--repetitions", repetitions)
        summary(result)
        return re.findall(r"^Test result: .*", result.stdout, re.M)

    one, three = results(1), results(3)
    assert one[0] == three[0] and len(three) == len(set(three)) == 3


def test_runs_that_save_into_one_folder_at_once(small_files, tmp_path, capsys):
    """What is tried before the training does not disturb another run that tries it, too."""
    path = ["--dataset_path", str(small_files.parent), "--save_model", str(tmp_path / "new")]
    args = parse_arguments("", [*path, "--no_cuda"])
    with ThreadPoolExecutor(8) as runs:
        assert len([*runs.map(load, [args] * 200)]) == 200
    assert not any((tmp_path / "new").iterdir())


def test_log_and_saved_models(in_process, dataset_path, data, tmp_path):
    """Run twice: the log's form, networks that give the log's result, and the same Summary."""
    folder = tmp_path / "a" / "b"
    arguments = ("exp-mnist.py", "--trainer", "IRM", "--dataset_path", dataset_path, *SHORT)
    arguments += ("--seed", 7)
    result = in_process(*arguments, "--save_model", folder)
    expected = summary(result)
    assert result.stderr == ""
    log = result.stdout
    for words in ("'trainer': 'IRM'", "'seed': 7", ", drawn with p_f 0.2"):
        assert words in log
    threads = torch.get_num_threads()
    assert f"\nDevice: CPU, threads: {threads}, torch: {torch.__version__}\n" in log
    parts = re.split(r"^Repetition \d of 2\n", log, flags=re.M)
    head, *each = [part.splitlines() for part in parts]
    assert [line.split(":")[0] for line in head] == ["Arguments", "Device", "Data"]
    each[-1], tail = each[-1][:-2], each[-1][-2:]
    assert [line.split(":")[0] for line in tail] == ["Mean flip rate", "Summary"]
    flip_rates, results = [], []
    for i, lines in enumerate(each, 1):
        line = r"Iteration {}: objective -?[\d.]+; loss of train1 [\d.]+, train2 [\d.]+; "
        line += r"validation \{{'Accuracy': [\d.]+, 'AUC': [\d.]+, 'F1_macro': [\d.]+\}}"
        for shown, iteration in zip(lines[:2], (20, 40), strict=True):
            assert re.fullmatch(line.format(iteration), shown)
        names = ["Test result", "Group accuracy", "Worst group", "Flip rate", "Saved"]
        assert [line.split(": ")[0] for line in lines[2:]] == names
        values = [ast.literal_eval(line.split(": ", 1)[1]) for line in lines[2:6]]
        args = parse_arguments("", [str(a) for a in arguments[1:]])
        path = folder / file_name(args, i, data.form)
        assert lines[6] == f"Saved: {path}"
        network, loss = load_model(path)
        assert isinstance(loss, IRM) and not network.training and not loss.training
        assert path.stat().st_size < 1.1 * 4 * sum(p.numel() for p in network.parameters())
        logits = predict(network, data.test)
        assert values[0] == metrics(logits, data.test.labels)
        flips = (logits > 0) != (predict(network, data.test.recolored()) > 0)
        assert values[3] == pytest.approx(flips.double().mean().item(), abs=1e-12)
        groups = values[1]
        assert len(groups) == 4 and values[2] == min(groups.values())
        red_ones = (data.test.labels == 1) & (data.test.colors == 1)
        assert groups["y=1 red"] == pytest.approx((logits[red_ones] > 0).double().mean().item())
        flip_rates.append(values[3])
        results.append(values[0])
    assert float(tail[0].split(": ")[1]) == pytest.approx(np.mean(flip_rates))
    for name in ("Accuracy", "AUC", "F1_macro"):
        values = [one[name] for one in results]
        assert expected[f"{name}_testmean"] == pytest.approx(np.mean(values))
        assert expected[f"{name}_teststd"] == pytest.approx(np.std(values))
    assert len(list(folder.iterdir())) == 2

    again = in_process(*arguments)
    unsaved = [line for line in log.splitlines() if not line.startswith("Saved: ")]
    assert again.stdout.splitlines()[1:] == unsaved[1:]  # all but the arguments


PROTOCOL = {
    "ERM": ("--trainer", "ERM"),
    "groupDRO": ("--trainer", "groupDRO"),
    "IRM": ("--trainer", "IRM"),
    "Backdoor": ("--trainer", "Backdoor"),
    "grayscale": ("--trainer", "ERM", "--grayscale"),
}


@pytest.fixture(scope="module")
def by_protocol(in_process, dataset_path, data, tmp_path_factory):
    """One training by the assignment's protocol: its log and its network, made once."""
    folder, runs = tmp_path_factory.mktemp("protocol"), {}

    def run(name):
        if name not in runs:
            short = ("--no_cuda", "--repetitions", 1, "--dataset_path", dataset_path, "--seed", 7)
            arguments = (*short, *PROTOCOL[name])
            result = in_process("exp-mnist.py", *arguments, "--save_model", folder)
            args = parse_arguments("", [str(argument) for argument in arguments])
            runs[name] = result, folder / file_name(args, 1, data.form)
        return runs[name]

    return run


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("ERM", 0.45, 0.58),
        ("groupDRO", 0.62, 0.75),
        ("IRM", 0.58, 0.75),
        ("Backdoor", 0.72, 0.80),
        ("grayscale", 0.75, 0.80),
    ],
)
def test_accuracy_with_default_hyperparameters(by_protocol, name, low, high):
    result, _ = by_protocol(name)
    assert low < summary(result)["Accuracy_testmean"] < high
    assert result.stderr == ""
    flips = float(re.search(r"Mean flip rate: (\S+)", result.stdout)[1])
    if name == "grayscale":
        assert flips == 0
    elif name == "ERM":
        assert flips > 0.25
    elif name == "Backdoor":
        assert flips < 0.12
    assert len(re.findall(r"^Iteration [1-4]00: ", result.stdout, re.M)) == 4


def test_decisions_by_the_formula_are_those_of_the_logit(by_protocol, data):
    """Backdoor's P(y = 1 | do(x)) > ½ and Φ(x) > 0, of the 20,000 test images."""
    network, loss = load_model(by_protocol("Backdoor")[1])
    assert loss.counts.sum() == 4 + sum([1024 * 31 + 256] * 12) + 16 * 1024
    logits = predict(network, data.test)
    probability = loss.probability(logits)
    assert probability.shape == logits.shape and 0 < probability.min() < probability.max() < 1
    assert ((logits > 0) != (probability > 0.5)).sum() < 400
    order = logits.argsort()
    assert (probability[order].diff() > -1e-6).all()  # so that AUC is the same


@pytest.mark.parametrize(
    "arguments",
    [
        ("--bias", "--drop_rate", 0.2, "--hidden_dim", 32, 16, 8),
        ("--network", "CNN", "--batch_size", 64, "--iteration", 4),
        ("--grayscale", "--validation", 0),
        ("--grayscale", "--network", "CNN", "--batch_size", 64, "--iteration", 4, "--steady"),
        ("--weight_decay", 0.001, "--steady", "--validation", 0.9),
        ("--trainer", "Backdoor", "--adjustment", "weights", "--steady"),
        ("--batch_size", 1),
        ("--batch_size", 100000),
    ],
)
def test_options_train(quick, arguments):
    result = quick("--trainer", "IRM", "--evaluation_steps", 2, *arguments)
    summary(result)
    lines = [line for line in result.stdout.splitlines() if line.startswith("Iteration ")]
    assert len(lines) == (2 if "CNN" in arguments else 15)
    validated = ["; validation {" in line for line in lines]
    assert all(validated) or (not any(validated) and arguments[-1] == 0)


@pytest.mark.parametrize(
    ("trainer", "changed"),
    [
        ("ERM", ("--hidden_dim", 8)),
        ("ERM", ("--hidden_dim", 64, 16, 8)),
        ("ERM", ("--bias",)),
        ("ERM", ("--drop_rate", 0.5)),
        ("ERM", ("--steady",)),
        ("ERM", ("--weight_decay", 1)),
        ("ERM", ("--grayscale",)),
        ("ERM", ("--learning_rate", 0.003)),
        ("ERM", ("--batch_size", 20)),
        ("ERM", ("--iteration", 20)),
        ("ERM", ("--validation", 0.5)),
        ("ERM", ("--seed", 4)),
        ("ERM", ("--repetitions", 2)),
        ("ERM", ("--network", "CNN")),
        ("ERM", ("--trainer", "groupDRO")),
        ("ERM", ("--trainer", "IRM")),
        ("ERM", ("--trainer", "Backdoor")),
        ("groupDRO", ("--eta", 5)),
        ("IRM", ("--reg_lambda", 5)),
        ("Backdoor", ("--adjustment", "weights")),
    ],
)
def test_a_changed_flag_changes_the_summary(quick, small_summaries, trainer, changed):
    result = quick("--trainer", trainer, *changed)
    assert summary(result) != small_summaries[trainer]
    arguments = ast.literal_eval(re.match(r"Arguments: (.*)", result.stdout)[1])
    name, *values = changed
    given = arguments[name.removeprefix("--")]
    assert given == (values if isinstance(given, list) else values[0] if values else True)


@pytest.fixture(scope="module")
def small_summaries(quick):
    return {name: summary(quick("--trainer", name)) for name in register.TRAINERS}


@pytest.mark.parametrize(
    ("arguments", "unused"),
    [
        (("--trainer", "ERM", "--eta", 1), "--eta"),
        (("--trainer", "groupDRO", "--reg_lambda", 7), "--reg_lambda"),
        (("--trainer", "IRM", "--adjustment", "weights", "--eta", 0), "--adjustment, --eta"),
        (("--trainer", "Backdoor", "--eta", 1, "--bias"), "--eta"),
        (("--network", "CNN", "--bias", "--iteration", 2), "--bias"),
        (("--network", "CNN", "--hidden_dim", 8, "--iteration", 2), "--hidden_dim"),
    ],
)
def test_a_flag_of_another_trainer_or_network_is_warned_of(quick, arguments, unused):
    """In one line on standard error; it changes nothing."""
    result = quick(*arguments)
    line, *others = result.stderr.splitlines()
    assert line.startswith("exp-mnist.py: warning: " + unused + ": ")
    used = tuple(a for a in arguments if a not in unused.split(", "))
    for name, value in zip(arguments, arguments[1:], strict=False):
        if name in unused.split(", ") and not str(value).startswith("--"):
            used = tuple(a for a in used if a is not value)
    plain = quick(*used)
    assert plain.stderr.splitlines() == others and summary(plain) == summary(result)


@pytest.mark.parametrize("arguments", [("--eta", "0.05"), ("--hidden_dim", "64", "16")])
def test_a_flag_given_as_its_default_is_not_warned_of(capsys, arguments):
    parse_arguments("", ["--network", "CNN", *arguments])
    assert capsys.readouterr().err == ""


def test_data_of_another_seed_are_pointed_out(in_process, tmp_path):
    """What the line says to do can be pasted, whatever the path: it deletes that folder alone."""
    around = tmp_path / "my data; echo 'x'"
    draw_environments(around, sizes=(60, 60, 60), seed=5)
    draw_environments(tmp_path / "my", sizes=(60, 60, 60), seed=5)
    short = ("--no_cuda", "--iteration", 2, "--repetitions", 1, "--dataset_path", around)
    result = in_process("exp-mnist.py", *short, "--seed", 6)
    summary(result)
    (line,) = result.stderr.splitlines()
    assert line.startswith("exp-mnist.py: warning: seed 6 trains on the data of seed 5")
    assert in_process("exp-mnist.py", *short, "--seed", 5).stderr == ""
    command = line[line.index("rm -r ") :]
    assert shlex.split(command) == ["rm", "-r", str(around / "ColoredMNIST")]
    subprocess.run(["bash", "-c", command], cwd=tmp_path, check=True)
    assert not (around / "ColoredMNIST").exists() and (tmp_path / "my" / "ColoredMNIST").exists()


def test_a_relative_path_is_shown_whole(in_process, small_files, monkeypatch):
    monkeypatch.chdir(small_files.parent.parent)
    short = ("--no_cuda", "--iteration", 2, "--repetitions", 1)
    result = in_process("exp-mnist.py", *short, "--dataset_path", small_files.parent.name)
    assert result.stderr.endswith(f"rm -r {small_files}\n")


@pytest.mark.parametrize("trainer", ["ERM", "groupDRO", "IRM", "Backdoor"])
def test_divergence_is_reported(quick, trainer):
    result = quick("--trainer", trainer, "--learning_rate", 1e30)
    assert_one_line(result, "diverged at iteration ", "--learning_rate", "--reg_lambda, --eta")


def test_a_loss_that_is_no_number_is_refused(small):
    class Each(ERM):
        def forward(self, network, batch):
            return self.risks(network(batch.images), batch)

    with pytest.raises(UserError, match=r"a loss is one number, and this one is \(2,\)"):
        train(MLP(), Each(), small.training, iteration=1)


def test_a_loss_with_weights_of_its_own_is_refused(small):
    """They would stay as they are, without anybody's noticing."""

    class Learned(ERM):
        def __init__(self):
            super().__init__()
            self.critic = torch.nn.Linear(1, 1)

    with pytest.raises(UserError, match="weights of its own"):
        train(MLP(), Learned(), small.training, iteration=1)


def test_divergence_that_shows_after_the_training_is_reported(quick, small):
    result = quick("--trainer", "IRM", "--learning_rate", 1e20, "--iteration", 1)
    assert_one_line(result, "a logit is nan or infinite", "--learning_rate")
    network = MLP()
    network.phi[1].weight.data[0, 0] = math.nan
    with pytest.raises(UserError, match="a logit is nan or infinite"):  # as the weights are
        predict(network, small.test)


def test_a_constant_predictor_is_pointed_out(quick):
    result = quick("--bias", "--learning_rate", 3)
    summary(result)
    (line,) = result.stderr.splitlines()
    assert line.startswith("exp-mnist.py: warning: repetition 1 predicts the same label")
    assert quick("--bias").stderr == ""


def name_of(line, repetition=1):
    """The name that a network gets which was trained on data drawn with its seed."""
    args = parse_arguments("", line)
    form = "drawn with p_f 0.2, p_e [0.1, 0.4, 0.9], sizes [20000, 20000, 20000], "
    return file_name(args, repetition, f"{form}shuffle_digits false, seed {args.seed}")


def test_saved_networks_of_different_settings_have_different_names():
    """Whatever tells networks apart is in the name of the file, if it is not the default."""
    lines = [
        [],
        ["--trainer", "IRM"],
        ["--network", "CNN"],
        ["--seed", "5"],
        ["--validation", "0.1"],
        ["--iteration", "3"],
        ["--batch_size", "9"],
        ["--learning_rate", "0.1"],
        ["--weight_decay", "0.1"],
        ["--steady"],
        ["--grayscale"],
        ["--hidden_dim", "64"],
        ["--hidden_dim", "6", "416"],
        ["--bias"],
        ["--drop_rate", "0.1"],
        ["--trainer", "groupDRO", "--eta", "0.1"],
        ["--trainer", "groupDRO"],
        ["--trainer", "IRM", "--reg_lambda", "5"],
        ["--trainer", "Backdoor"],
        ["--trainer", "Backdoor", "--adjustment", "weights"],
    ]
    names = [name_of(line, i) for line in lines for i in (1, 2)]
    assert len(set(names)) == 2 * len(lines)
    assert names[0] == "ERM_MLP_seed1234_repetition1.pt"
    asked = {flag for line in lines for flag in line if flag.startswith("--")}
    known = {option for option in training_parser()._option_string_actions if option[2:]}
    same_network = {"--help", "--repetitions", "--no_cuda", "--save_model", "--evaluation_steps"}
    assert known - asked >= same_network | {"--dataset_path"}  # and flags of a user's own losses
    for more in (["--no_cuda"], ["--evaluation_steps", "7"], ["--repetitions", "9"]):
        assert name_of(more) == names[0]


def test_networks_of_different_data_have_different_names(in_process, tmp_path):
    """Also where the data are drawn anew in the same place, and where they are a stranger's."""
    models, path = tmp_path / "models", tmp_path / "data"
    for seed in (1, 2):
        shutil.rmtree(path, ignore_errors=True)
        draw_environments(path, sizes=(60, 60, 60), seed=seed)
        flags = ("--dataset_path", path, "--no_cuda", "--repetitions", 1, "--iteration", 1)
        assert in_process("exp-mnist.py", *flags, "--save_model", models).returncode == 0
    first, second = models.glob("ERM_MLP_iteration-1_data-*_seed1234_repetition1.pt")
    assert load_saved(first)[2]["data"] != load_saved(second)[2]["data"]
    args = parse_arguments("", [])
    assert file_name(args, 1, "tuples of (image, label)") != name_of([])


def test_unused_flags_are_in_no_name(capsys):
    assert name_of(["--trainer", "ERM", "--eta", "1"]) == "ERM_MLP_seed1234_repetition1.pt"


@pytest.mark.parametrize(
    ("make", "lines"),
    [
        (Backdoor, [(), ("--adjustment", "weights"), ("--grayscale",), ("--steady",)]),
        (GroupDRO, [("--bias", "--hidden_dim", 5, 4), ("--network", "CNN", "--iteration", 2)]),
    ],
)
def test_saved_networks_are_loaded_with_their_losses(quick, small, tmp_path, make, lines):
    """In one folder, none over another; logits, probability and state are those of before."""
    name = "Backdoor" if make is Backdoor else "groupDRO"
    seen = {}
    for line in lines:
        before = set(tmp_path.iterdir())
        result = quick("--trainer", name, "--save_model", tmp_path, *line)
        assert summary(result) and "no such setting" not in result.stderr
        (path,) = set(tmp_path.iterdir()) - before
        network, loss = load_model(path)
        shown = ast.literal_eval(re.search(r"^Test result: (.*)", result.stdout, re.M)[1])
        logits = predict(network, small.test)
        assert metrics(logits, small.test.labels) == shown
        assert isinstance(loss, make) and not network.training and not loss.training
        seen[path] = logits
    assert len(seen) == len(set(tmp_path.iterdir())) == len(lines)
    for path, logits in seen.items():
        network, loss = load_model(path)
        assert torch.equal(predict(network, small.test), logits)
        saved = torch.load(path, weights_only=True)
        again, trained_loss = build(parse_arguments("", ["--trainer", name]))
        assert set(saved) == {"arguments", "repetition", "data", "network", "loss"}
        assert saved["repetition"] == 1 and saved["arguments"]["seed"] == 3
        assert saved["data"].startswith("drawn with p_f 0.2")
        assert saved["loss"].keys() == trained_loss.state_dict().keys()
        for key, value in saved["loss"].items():
            assert torch.equal(loss.state_dict()[key], value)
            assert not torch.equal(trained_loss.state_dict()[key], value)  # it was trained
        if make is Backdoor:
            fitted = torch.sigmoid(logits[:, None] + loss.offsets)
            expected = (fitted * loss.counts.sum(1) / loss.counts.sum()).sum(1)
            assert torch.allclose(loss.probability(logits), expected)


def test_what_is_held_out_can_be_had_again(quick, small, tmp_path):
    """By the arguments in the file: what was trained on and what was not."""
    result = quick("--save_model", tmp_path, "--repetitions", 2, "--evaluation_steps", 30)
    second = sorted(tmp_path.iterdir())[1]
    saved = torch.load(second, weights_only=True)
    args = parse_arguments("", [])
    vars(args).update(saved["arguments"])
    *_, (_, _, _, _, validation) = repetitions(args, small)
    shown = re.findall(r"validation (\{.*\})", result.stdout)[-1]
    assert evaluate(load_model(second)[0], validation) == ast.literal_eval(shown)


@pytest.mark.parametrize("sizes", [(2, 2, 4), (2, 2, 2000)])
def test_what_is_held_out_leaves_something_to_train_on(in_process, tmp_path, sizes):
    for seed in range(20):  # until both labels are among so few
        draw_environments(tmp_path / str(seed), sizes=sizes, seed=seed)
        try:
            data = load_dataset(tmp_path / str(seed))
        except UserError:
            continue
        break
    training, held_out = data.hold_out(0.9)
    assert (len(training), len(held_out)) == (1, 3)
    training, held_out = data.hold_out(0.01)
    assert (len(training), len(held_out)) == (3, 1)
    short = ("--iteration", 2, "--repetitions", 1, "--no_cuda", "--validation", 0.9)
    summary(in_process("exp-mnist.py", "--dataset_path", tmp_path / str(seed), *short))


def test_defaults_in_code_are_those_of_the_command_line():
    """Of each flag that a constructor, `train` or `load_dataset` takes as well."""
    args, compared = parse_arguments("", []), set()
    for function in (*register.TRAINERS.values(), *register.NETWORKS.values(), train):
        for name, parameter in inspect.signature(function).parameters.items():
            default = parameter.default
            if default is parameter.empty or name == "validation":  # `train` has samples so called
                continue
            if not hasattr(args, name):  # of a user's own loss, say
                continue
            shown = getattr(args, name)
            assert shown == (list(default) if isinstance(default, tuple) else default), name
            compared.add(name)
    assert compared >= {
        "eta", "reg_lambda", "adjustment", "hidden_dim", "bias", "drop_rate", "grayscale",
        "iteration", "batch_size", "learning_rate", "weight_decay", "steady", "evaluation_steps",
    }  # fmt: skip
    for name in ("dataset_path", "seed"):
        default = inspect.signature(load_dataset).parameters[name].default
        assert getattr(args, name) == default
    assert training_settings(args) == {
        name: parameter.default
        for name, parameter in inspect.signature(train).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    # And what the assignment has beside: 20 % held out, three repetitions, ERM of an MLP.
    rest = (args.validation, args.repetitions, args.trainer, args.network)
    assert rest == (0.2, 3, "ERM", "MLP")


def test_flags_reach_the_training():
    given = ["--iteration", "3", "--batch_size", "7", "--learning_rate", "0.5", "--steady"]
    given += ["--weight_decay", "0.25", "--evaluation_steps", "2"]
    assert training_settings(parse_arguments("", given)) == {
        "iteration": 3,
        "batch_size": 7,
        "learning_rate": 0.5,
        "weight_decay": 0.25,
        "steady": True,
        "evaluation_steps": 2,
    }


VREX = '''
class VREx(Loss):
    """Risk extrapolation (after Krueger et al. 2021, arXiv:2003.00688): mean + β · variance."""

    def __init__(self, beta: float = 10.0):
        super().__init__()
        self.beta = beta

    def forward(self, network, batch):
        risks = self.risks(network(batch.images), batch)
        return risks.mean() + self.beta * risks.var(unbiased=False)
'''
CORAL = '''
class CORAL(Loss):
    """After Deep CORAL (Sun & Saenko 2016, arXiv:1607.01719), with means aligned as well."""

    def __init__(self, gamma: float = 1.0):
        super().__init__()
        self.gamma = gamma

    def forward(self, network, batch):
        features = network.phi[:-1](network.channels(batch.images))  # (N, 16) of the MLP
        logits = network.phi[-1](features).squeeze(-1)
        first, second = features[batch.envs == 0], features[batch.envs == 1]
        means = (first.mean(0) - second.mean(0)).square().sum()
        covariances = (first.T.cov() - second.T.cov()).square().sum()
        return self.risks(logits, batch).mean() + self.gamma * (means + covariances)
'''


def example(name, instead):
    """The class of this name in a block of code of the README; the test's own while it has none."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    blocks = [block for block in blocks if f"class {name}" in block and "forward(self" in block]
    code = blocks[0] if blocks else instead
    names = {"torch": torch, "Loss": Loss}
    exec(code, names)
    return names[name]


@pytest.mark.parametrize("name", ["VREx", "CORAL"])
def test_losses_of_ones_own_train(in_process, dataset_path, data, monkeypatch, name):
    """The README's examples, registered as it says, for 100 steps; and by their formulas."""
    monkeypatch.setitem(register.TRAINERS, name, None)  # undone, whoever sets it
    made = register.TRAINERS[name] = example(name, VREX if name == "VREx" else CORAL)
    short = ("--dataset_path", dataset_path, "--seed", 7, "--no_cuda", "--repetitions", 1)
    result = in_process("exp-mnist.py", *short, "--trainer", name, "--iteration", 100)
    summary(result)
    assert result.stderr == "" and "Iteration 100: objective" in result.stdout

    torch.manual_seed(0)
    network, batch, loss = MLP(), data.training[19900:20200].batch(), made()
    (strength,) = [value for value in vars(loss).values() if isinstance(value, float)]
    logits = network(batch.images)
    risks = ERM().risks(logits, batch).detach().double().numpy()
    if name == "VREx":
        expected = risks.mean() + strength * risks.var()
    else:
        features = network.phi[:-1](batch.images).detach().double().numpy()
        parts = [features[batch.envs.numpy() == e] for e in (0, 1)]
        means, covariances = ([f(part) for part in parts] for f in (
            lambda part: part.mean(0), lambda part: np.cov(part, rowvar=False)
        ))  # fmt: skip
        gap = sum(((one - other) ** 2).sum() for one, other in (means, covariances))
        expected = risks.mean() + strength * gap
        assert gap > 1e-4
    assert loss(network, batch).item() == pytest.approx(expected, rel=1e-4)


class Line(Network):
    """A network of one's own, without the flags of the others."""

    def __init__(self, bias: bool = False):
        super().__init__(nn.Sequential(nn.Flatten(), nn.Linear(1568, 1, bias)))


def test_a_network_of_ones_own_trains(quick, monkeypatch):
    monkeypatch.setitem(register.NETWORKS, "Line", Line)
    plain, biased = quick("--network", "Line"), quick("--network", "Line", "--bias")
    assert summary(plain) != summary(biased) and plain.stderr == biased.stderr == ""
    (line,) = quick("--network", "Line", "--drop_rate", 0.5, "--grayscale").stderr.splitlines()
    assert "--drop_rate, --grayscale" in line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--trainer", "DRO"), ("'DRO'", "groupDRO")),
        (("--network", "RNN"), ("'RNN'", "MLP")),
        (("--batch_size", 0), ("--batch_size", "'0'")),
        (("--batch_size", "1.5"), ("--batch_size", "whole number")),
        (("--iteration", -1), ("--iteration",)),
        (("--repetitions", 0), ("--repetitions",)),
        (("--evaluation_steps", 0), ("--evaluation_steps",)),
        (("--hidden_dim", 64, 0), ("--hidden_dim",)),
        (("--learning_rate", "nan"), ("--learning_rate", "nan")),
        (("--learning_rate", 0), ("--learning_rate", "above 0")),
        (("--weight_decay", -1), ("--weight_decay",)),
        (("--drop_rate", 1), ("--drop_rate", "from 0 to 0.99")),
        (("--eta", "inf"), ("--eta",)),
        (("--learning_rate", 1e39), ("--learning_rate", "1e+30")),  # beyond torch's float32
        (("--weight_decay", 1e39), ("--weight_decay", "from 0 to 1e+30")),
        (("--batch_size", 10**30), ("--batch_size", "1000000000")),  # beyond its int64
        (("--hidden_dim", 10**12), ("--hidden_dim", "from 1 to 10000")),  # beyond any memory
        (("--reg_lambda", "many"), ("--reg_lambda", "'many'")),
        (("--validation", 1), ("--validation",)),
        (("--seed", -1), ("--seed",)),
        (("--seed", 2**32), ("--seed", "from 0 to 4294967295")),
        (("--adjustment", "none"), ("--adjustment",)),
        (("--unknown", 1), ("--unknown",)),
        (("--iter", 1), ("--iter",)),  # no abbreviations, which a new flag would make ambiguous
        (("--p_f", 0.1), ("--p_f",)),  # what preprocessing.py draws with
        (("--plugin", "x.py"), ("--plugin",)),  # what there was
        (("--average_last", 0.25), ("--average_last",)),
    ],
)
def test_nonsense_is_refused(in_process, dataset_path, arguments, words):
    result = in_process("exp-mnist.py", "--dataset_path", dataset_path, *arguments)
    assert_refused(result, *words)


@pytest.mark.parametrize(
    "arguments",
    [
        ("--seed", 0, "--validation", 0.9, "--eta", 0, "--weight_decay", 0),
        ("--seed", 2**32 - 1, "--validation", 0, "--drop_rate", 0.99, "--reg_lambda", 0),
    ],
)
def test_the_ends_of_the_ranges_are_in_them(arguments):
    parse_arguments("", [str(argument) for argument in arguments])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--save_model", "README.md", "--iteration", 1), ("cannot write", "README.md")),
        (("--save_model", "README.md/x"), ("cannot write", "README.md/x")),
        (("--save_model", "/proc"), ("cannot write", "/proc/ERM_MLP")),  # before it trains
        (("--save_model", "long" * 80), ("cannot write", "long")),
        (("--dataset_path", "README.md"), ("README.md",)),
        (("--dataset_path", "/proc/none"), ("/proc/none",)),
    ],
)
def test_files_that_cannot_be_are_refused_in_one_line(
    in_process, small_files, monkeypatch, arguments, words
):
    monkeypatch.chdir(ROOT)
    given = () if "--dataset_path" in arguments else ("--dataset_path", small_files.parent)
    result = in_process("exp-mnist.py", *given, *arguments, "--seed", 3, "--no_cuda")
    assert_one_line(result, *words)
    assert "Repetition" not in result.stdout


def test_a_name_that_is_too_long_is_refused_before_the_training(in_process, small_files, tmp_path):
    """Of the file that a network will be saved in: it has the settings."""
    arguments = ("--dataset_path", small_files.parent, "--seed", 3, "--no_cuda", "--iteration", 2)
    arguments += ("--hidden_dim", *[100] * 80)
    result = in_process("exp-mnist.py", *arguments, "--save_model", tmp_path / "models")
    assert_one_line(result, "cannot write", tmp_path / "models")
    assert "Repetition" not in result.stdout


def test_help_explains_every_flag(in_process):
    result = in_process("exp-mnist.py", "--help")
    assert result.returncode == 0 and result.stderr == ""
    blocks = re.split(r"\n  (?=-)", result.stdout)[1:]
    assert len(blocks) == 1 + len(vars(parse_arguments("", [])))  # --help itself
    for block in blocks:
        explanation = re.split(r"\s{2,}", block, maxsplit=1)[1]
        flag = block.split()[0]
        words = re.sub(r"\(default: .*?\)", "", explanation).split()
        assert len(words) > 1, block
        if flag not in ("-h,", "--help"):
            assert "(default:" in explanation, block
    text = " ".join(result.stdout.split())
    assert "from a few hundred up" in text  # of λ, whose penalty outweighs the risks then


def test_help_on_a_terminal_without_greek(command):
    """Where standard output can't take η and λ, a question mark stands for them."""
    result = command("exp-mnist.py", "--help", env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert result.returncode == 0 and result.stderr == ""
    assert "step size ? of the weights q" in result.stdout


def test_script_as_a_process(command, in_process, small_files):
    """A real run: nothing on standard error, Summary last, and what it gives in this process."""
    arguments = ("exp-mnist.py", "--dataset_path", small_files.parent, "--trainer", "Backdoor")
    short = ("--no_cuda", "--iteration", 5, "--repetitions", 1, "--batch_size", 20, "--seed", 3)
    real = command(*arguments, *short)
    summary(real)
    assert real.stderr == ""
    assert real.stdout == in_process(*arguments, *short).stdout


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@gpu
@pytest.mark.parametrize("trainer", [ERM, GroupDRO, IRM, Backdoor])
def test_training_on_a_gpu(data, trainer):
    """Samples, network and the loss's state are there; decisions on a CPU are the same, nearly."""
    samples, test = data.training[18000:22000].to("cuda"), data.test[:2000]
    assert all(value.is_cuda for value in vars(samples).values())
    for index in (3, slice(5), torch.arange(4), torch.arange(4, device="cuda"), samples.envs == 1):
        assert samples[index].images.is_cuda and samples[index].batch().images.is_cuda
    network, loss = MLP(), trainer()
    train(network, loss, samples, test.to("cuda"), iteration=30, evaluation_steps=10)
    tensors = [*network.state_dict().values(), *loss.state_dict().values()]
    assert all(value.is_cuda for value in tensors)
    logits = predict(network, test.to("cuda"))
    assert logits.is_cuda
    assert torch.allclose(predict(network, test), logits, atol=1e-4)  # wherever the samples are
    if trainer is Backdoor:
        assert loss.counts.sum() == 4 + 7 * 4000 + 2 * 1024  # of 30 minibatches, 4 a pass
        assert loss.probability(logits).is_cuda
    evaluate(network, test.to("cuda"))
    on_cpu = predict(network.cpu(), test)
    assert torch.allclose(on_cpu, logits.cpu(), atol=1e-2)
    assert ((on_cpu > 0) == (logits.cpu() > 0)).float().mean() > 0.99


@gpu
@pytest.mark.parametrize("arguments", [("--trainer", "Backdoor"), ("--network", "CNN")])
def test_a_network_of_a_gpu_is_loaded_on_a_cpu(in_process, small_files, small, tmp_path, arguments):
    short = ("--dataset_path", small_files.parent, "--iteration", 30, "--repetitions", 1)
    result = in_process("exp-mnist.py", *short, *arguments, "--save_model", tmp_path)
    assert f"Device: {torch.cuda.get_device_name()}" in result.stdout
    (path,) = tmp_path.iterdir()
    network, loss = load_model(path)
    assert not any(value.is_cuda for value in (*network.parameters(), *loss.buffers()))
    accuracy = metrics(predict(network, small.test), small.test.labels)["Accuracy"]
    assert accuracy == pytest.approx(summary(result)["Accuracy_testmean"], abs=0.05)


@gpu
@pytest.mark.parametrize("network", ["MLP", "CNN"])
def test_a_gpu_gives_the_same_summary_each_time(in_process, dataset_path, network):
    arguments = ("--dataset_path", dataset_path, "--seed", 7, "--network", network)
    arguments += ("--iteration", 100, "--repetitions", 2)
    first, second = (summary(in_process("exp-mnist.py", *arguments)) for _ in range(2))
    assert first == second


def test_a_flag_that_no_class_has_is_refused(in_process, small_files, monkeypatch):
    """A misspelt flag for a loss of one's own would be in the log, and without any effect."""
    parser = trainer.training_parser

    def misspelt(description=""):
        made = parser(description)
        made.add_argument("--gama", type=float, default=1.0)
        return made

    monkeypatch.setattr(trainer, "training_parser", misspelt)
    result = in_process("exp-mnist.py", "--dataset_path", small_files.parent, "--gama", 5)
    assert_one_line(result, "--gama", "no effect")


def test_both_commands_take_a_path_for_the_same_folder(tmp_path):
    """A .. after a link leads to the parent of where the link leads."""
    (tmp_path / "far" / "away").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "far" / "away")
    draw_environments(tmp_path / "far" / "data", sizes=(30, 30, 30), seed=1)
    args = parse_arguments("", ["--dataset_path", f"{tmp_path}/link/../data/"])
    assert len(load_dataset(args.dataset_path).test) == 30
    assert parse_arguments("", ["--dataset_path", "./data/"]).dataset_path == "data"


def test_a_loss_may_take_what_the_training_takes(quick, tmp_path, monkeypatch):
    """A schedule needs the number of iterations: other trainers still have it, and say so."""

    class Annealed(ERM):
        def __init__(self, iteration=400, seed=1234):
            super().__init__()

    monkeypatch.setitem(register.TRAINERS, "Annealed", Annealed)
    for name in ("Annealed", "ERM"):
        for iteration in (2, 3):
            arguments = ("--trainer", name, "--iteration", iteration, "--save_model", tmp_path)
            result = quick(*arguments)
            assert result.returncode == 0 and result.stderr == "", result.stderr
            assert len(list(tmp_path.glob(f"{name}_MLP_iteration-{iteration}_*.pt"))) == 1


def test_a_network_of_a_flag_with_a_whole_default_is_loaded(quick, tmp_path, monkeypatch):
    """Its value is a float where the default is not, as argparse reads it."""
    parser = trainer.training_parser

    class Scaled(ERM):
        def __init__(self, scale=10):
            super().__init__()

    def with_scale(description=""):
        made = parser(description)
        made.add_argument("--scale", type=float, default=10)
        return made

    monkeypatch.setattr(trainer, "training_parser", with_scale)
    monkeypatch.setitem(register.TRAINERS, "Scaled", Scaled)
    result = quick("--trainer", "Scaled", "--scale", 30, "--save_model", tmp_path)
    assert result.returncode == 0, result.stderr
    (path,) = tmp_path.glob("Scaled_*scale-30.0_*.pt")
    assert isinstance(load_model(path)[1], Scaled)
