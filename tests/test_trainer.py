"""Training: the assignment's protocol, the flags, the log, saved networks, and the accuracies."""

import argparse
import ast
import importlib
import inspect
import itertools
import math
import os
import re

import numpy as np
import pytest
import torch
from conftest import ROOT, assert_one_line, assert_refused, same
from torch import nn
from torchvision.transforms import Compose, Normalize, ToTensor

import preprocessing
import register
import trainer
from dataset import MEAN, STD, ColoredMNIST, Samples, load_data
from metric import group_accuracies, metrics
from model import CNN, ERM, IRM, MLP, Backdoor, GroupDRO, Loss, Network
from preprocessing import UserError
from trainer import (
    arguments_of,
    evaluate,
    load_model,
    predict,
    seed_repetition,
    summarize,
    train,
    train_repetition,
    train_repetitions,
    training_parser,
)

TRAINERS = (ERM, GroupDRO, IRM, Backdoor)
SUMMARY = re.compile(
    r"Summary: \{'Accuracy_testmean': _, 'Accuracy_teststd': _, 'AUC_testmean': _, "
    r"'AUC_teststd': _, 'F1_macro_testmean': _, 'F1_macro_teststd': _\}".replace(
        ": _", r": \d\.[\de-]+"
    )
)


def summary(result):
    """Return the Summary of a log after checking its format."""
    assert result.returncode == 0, result.stderr
    last = result.stdout.splitlines()[-1]
    assert SUMMARY.fullmatch(last), last
    return ast.literal_eval(last.removeprefix("Summary: "))


def parse(*arguments):
    return training_parser().parse_args([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def small(small_files):
    """120 training samples and 60 test samples."""
    return load_data(small_files.parent, seed=3)


@pytest.fixture(scope="module")
def quick(in_process, small_files):
    """Run exp-mnist.py on the small data for 30 steps, with a high learning rate."""

    def run(*arguments):
        flags = ("--dataset_path", small_files.parent, "--no_cuda", "--repetitions", 1)
        flags += ("--seed", 3, "--iteration", 30, "--batch_size", 40, "--learning_rate", 0.01)
        return in_process("exp-mnist.py", *flags, *arguments)

    return run


# Samples and minibatches.


@pytest.mark.parametrize("make", [MLP, CNN, lambda: MLP(grayscale=True)])
def test_networks_see_the_assignments_images(dataset_path, data, make):
    """(value / 255 - mean) / std, bit for bit the same as torchvision's RGB without blue."""
    normalize = Compose([ToTensor(), Normalize((MEAN, MEAN, 0), (STD, STD, STD))])
    items = ColoredMNIST(dataset_path, "all_train", normalize)
    positions = [0, 5, 19999, 20000, 39999]
    images = torch.stack([items[i][0] for i in positions])
    samples = data.training[torch.tensor(positions)]
    batch = samples.batch()
    assert torch.equal(images[:, :2], batch.images)
    assert torch.allclose(batch.images, (samples.images / 255 - 0.1307) / 0.3081, atol=1e-6)
    assert [field.dtype for field in batch] == [torch.float32] * 2 + [torch.int64] * 2
    assert [items[i][1] for i in positions] == batch.labels.tolist()
    assert [items[i][2] for i in positions] == batch.colors.tolist()
    network = make().eval()
    assert torch.equal(network(images), network(batch.images))


def test_recolored_samples_change_the_colour_only(data):
    samples = data.training[19950:20050]
    recolored = samples.recolored()
    assert torch.equal(recolored.images[:, 0], samples.images[:, 1])
    assert torch.equal(recolored.images[:, 1], samples.images[:, 0])
    assert torch.equal(recolored.colors, 1 - samples.colors)
    assert torch.equal(recolored.labels, samples.labels)
    assert same(recolored.recolored(), samples)


def numbered(count):
    """Return samples whose labels are 0, 1, ..."""
    zeros = torch.zeros(count, dtype=torch.int64)
    images = torch.zeros(count, 2, 28, 28, dtype=torch.uint8)
    return Samples(images, torch.arange(count).float(), zeros, zeros)


def test_samples_are_selected_by_slice_positions_or_mask():
    for index, expected in (
        (slice(2, 5), [2, 3, 4]),
        (torch.tensor([7, 0, 7]), [7, 0, 7]),
        (torch.arange(10) % 2 == 0, [0, 2, 4, 6, 8]),
    ):
        part = numbered(10)[index]
        assert part.labels.tolist() == expected and len(part) == len(expected)
        assert len(part.images) == len(part.colors) == len(part.envs) == len(expected)


def test_chunks_are_all_samples_in_order():
    for count in (1, 2000, 2001, 4001):
        labels = [batch.labels for batch in numbered(count).chunks()]
        assert torch.cat(labels).tolist() == list(range(count))
        assert max(map(len, labels)) <= 2000


def test_an_epoch_is_shuffled_and_its_last_minibatch_is_smaller():
    """32,000 of 40,000 samples are trained on. An epoch has each of them once."""
    torch.manual_seed(0)
    batches = numbered(32000).minibatches(1024)
    orders = []
    for _ in range(2):
        epoch = [next(batches).labels for _ in range(32)]
        assert [len(labels) for labels in epoch] == [1024] * 31 + [256]
        orders.append(torch.cat(epoch))
        assert torch.equal(orders[-1].sort()[0], torch.arange(32000.0))
        assert not torch.equal(orders[-1], torch.arange(32000.0))
    assert not torch.equal(*orders)
    assert len(next(numbered(50).minibatches(1024)).labels) == 50


def test_minibatches_mix_the_environments(data):
    torch.manual_seed(0)
    for batch in itertools.islice(data.training.minibatches(1024), 5):
        assert 400 < batch.envs.sum() < 624


def test_held_out_samples_are_not_trained_on(data):
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
    few = data._replace(training=numbered(4))
    assert [len(part) for part in few.hold_out(0.9)] == [1, 3]  # one remains on either side
    assert [len(part) for part in few.hold_out(0.01)] == [3, 1]


# train().


def trained(samples, loss=ERM, network=MLP, **settings):
    torch.manual_seed(0)
    return train(network(), loss(), samples, **settings)


def by_hand(network, loss, samples, iteration, batch_size=1024, **settings):
    """Train in the usual loop of epochs, with all defaults of Adam written out."""
    adam = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0} | settings
    optimizer = torch.optim.Adam(network.phi.parameters(), **adam)
    done = 0
    while done < iteration:
        for index in torch.randperm(len(samples)).split(batch_size)[: iteration - done]:
            optimizer.zero_grad()
            loss(network, samples[index].batch()).backward()
            optimizer.step()
            done += 1
    return network


def assert_equal(ours, theirs):
    """Assert that two networks have the same weights, bit for bit."""
    ours, theirs = ours.state_dict(), theirs.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.dtype == torch.float32 and torch.equal(value, theirs[name]), name


def test_defaults_of_train_are_the_assignments_protocol(small):
    """400 minibatches, Adam with torch's defaults, float32, the weights after the last step."""
    ours = trained(small.training, IRM, lambda: MLP((8,)))
    torch.manual_seed(0)
    assert_equal(ours, by_hand(MLP((8,)), IRM(), small.training, 400))
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize(
    ("loss", "make"), [(ERM, MLP), (GroupDRO, MLP), (IRM, CNN), (Backdoor, MLP)]
)
def test_training_is_adam_on_minibatches(data, loss, make):
    """With 400 samples and minibatches of 120, every fourth minibatch has 40 samples."""
    samples = data.training[19800:20200]
    settings = {"learning_rate": 3e-3, "weight_decay": 0.1}
    ours = trained(samples, loss, make, iteration=7, batch_size=120, **settings)
    torch.manual_seed(0)
    assert_equal(ours, by_hand(make(), loss(), samples, 7, 120, lr=3e-3, weight_decay=0.1))


@pytest.mark.parametrize("loss", TRAINERS)
def test_output_layer_stays_one(small, loss):
    """The optimizer never gets it, although it has a gradient."""
    network = trained(small.training, loss, iteration=8, weight_decay=0.5)
    assert network.output_layer == 1 and network.output_layer.requires_grad
    network.zero_grad()
    IRM()(network, small.training.batch()).backward()
    assert network.output_layer.grad.abs() > 0


def test_report_is_called_after_the_update_and_changes_nothing(small, capsys):
    """With dropout, used random numbers or evaluation mode would change the training."""

    def train_with_dropout(iteration, evaluation_steps=100, replace_report=False):
        torch.manual_seed(0)
        network, loss, reports = MLP(drop_rate=0.3).eval(), GroupDRO().eval(), []

        def report(step):
            evaluate(network, small.test)
            reports.append((step, network.phi[1].weight.detach().clone()))

        train(
            network,
            loss,
            small.training,
            small.test,
            iteration=iteration,
            batch_size=40,
            evaluation_steps=evaluation_steps,
            report=report if replace_report else None,
        )
        assert not network.training and not loss.training and loss.q.tolist() != [0.5, 0.5]
        return network, reports

    plain, _ = train_with_dropout(7)
    assert capsys.readouterr().out == ""
    assert_equal(train_with_dropout(7, 2)[0], plain)
    assert len(capsys.readouterr().out.splitlines()) == 3  # after 2, 4 and 6 steps
    reported, reports = train_with_dropout(7, 3, replace_report=True)
    assert capsys.readouterr().out == ""
    assert_equal(reported, plain)
    assert [step for step, _ in reports] == [3, 6]
    after_six, _ = train_with_dropout(6)
    assert torch.equal(reports[1][1], after_six.phi[1].weight)


def test_a_log_line_reports_the_minibatch_and_the_validation_samples(small, capsys):
    network, loss = MLP(drop_rate=0.5), IRM(3.0)
    samples = small.training  # all samples are one minibatch
    settings = {"iteration": 2, "evaluation_steps": 2, "learning_rate": 1e-30}
    train(network, loss, samples, small.test, **settings)
    batch = samples.batch()
    train1, train2 = loss.risks(network(batch.images), batch).tolist()
    line = capsys.readouterr().out
    pattern = r"Iteration 2: objective (\S+); loss of train1 (\S+), train2 (\S+); validation (.*)\n"
    objective, *risks, validation = re.fullmatch(pattern, line).groups()
    assert risks == [f"{train1:.4f}", f"{train2:.4f}"]
    assert validation == str(evaluate(network, small.test))
    assert float(objective) == pytest.approx(loss(network, batch).item(), abs=0.1)  # with dropout


@pytest.mark.parametrize("env", [0, 1])
@pytest.mark.parametrize("loss", TRAINERS)
def test_a_log_line_shows_a_dash_for_a_missing_environment(small, capsys, env, loss):
    samples = small.training[small.training.envs == env]
    network = train(MLP(), loss(), samples, iteration=1, evaluation_steps=1)
    risk = ERM()(network, samples.batch())
    shown = [f"{risk:.4f}", "–"] if env == 0 else ["–", f"{risk:.4f}"]
    line = capsys.readouterr().out
    assert line.endswith("; loss of train1 {}, train2 {}\n".format(*shown))


def test_predictions_are_of_all_samples_in_order(data):
    network = MLP(drop_rate=0.5).train()
    samples = data.test[:4001]
    logits = predict(network, samples)
    assert logits.shape == (4001,) and not logits.requires_grad and not network.training
    with torch.no_grad():
        expected = network(samples.batch().images)
    assert torch.allclose(logits, expected, atol=1e-5)
    assert evaluate(network, samples) == metrics(logits, samples.labels)


@pytest.mark.parametrize("loss", TRAINERS)
def test_divergence_is_reported(small, loss):
    with pytest.raises(UserError, match="diverged at iteration [23].*Lower --learning_rate"):
        train(MLP(), loss(), small.training, iteration=9, learning_rate=1e30)
    # The last step's divergence shows in the predictions only.
    network = train(MLP(), loss(), small.training, iteration=1, learning_rate=1e30)
    with pytest.raises(UserError, match="logits are not finite"):
        predict(network, small.test)


def test_divergence_is_one_line_of_the_command(quick):
    assert_one_line(quick("--trainer", "IRM", "--learning_rate", 1e9), "exp-mnist.py: ", "diverged")


def test_losses_of_the_wrong_kind_are_refused(small):
    class Vector(ERM):
        def forward(self, network, batch):
            return self.risks(network(batch.images), batch)

    class Trainable(ERM):
        def __init__(self):
            super().__init__()
            self.critic = nn.Linear(1, 1)

    with pytest.raises(UserError, match=r"must return a scalar, not shape \(2,\)"):
        train(MLP(), Vector(), small.training, iteration=1)
    with pytest.raises(UserError, match="cannot have trainable parameters"):
        train(MLP(), Trainable(), small.training, iteration=1)


# Repetitions.


def test_a_repetition_by_hand(small):
    """Its seed gives the hold-out, then the initial weights, then the minibatches."""
    args = parse("--seed", 7, "--trainer", "groupDRO", "--iteration", 5, "--batch_size", 40)
    args.evaluation_steps, steps = 2, []
    ours, loss, training, validation = train_repetition(args, small, 2, report=steps.append)
    torch.manual_seed(7001)
    order = torch.randperm(120)
    assert same(validation, small.training[order[:24]])
    assert same(training, small.training[order[24:]])
    assert_equal(ours, by_hand(MLP(), GroupDRO(), training, 5, 40))
    assert isinstance(loss, GroupDRO) and loss.q.tolist() != [0.5, 0.5] and steps == [2, 4]


def test_repetitions_are_independent_and_can_be_repeated(small):
    """No two repetitions of two seeds have the same hold-out or weights."""
    weights, held_out = set(), set()
    for seed in (5, 6):
        args = parse("--seed", seed, "--iteration", 2, "--drop_rate", 0.3)
        runs = list(train_repetitions(args, small))
        assert [number for number, _, _ in runs] == [1, 2, 3]
        for number, network, training in runs:
            alone, _, _, validation = train_repetition(args, small, number)
            assert_equal(network, alone)
            assert len(training) == 96 and len(validation) == 24
            weights.add(network.phi[1].weight[0, 0].item())
            held_out.add(validation.images.sum().item())
    assert len(weights) == len(held_out) == 6


def test_summary_is_mean_and_population_deviation_in_plain_floats():
    results = [{"Accuracy": np.float64(value), "AUC": 0.25} for value in (0.25, 0.75)]
    expected = {"Accuracy_testmean": 0.5, "Accuracy_teststd": 0.25}
    expected |= {"AUC_testmean": 0.25, "AUC_teststd": 0.0}
    assert str(summarize(results)) == str(expected)
    assert summarize(results[:1])["Accuracy_teststd"] == 0


def test_summary_of_nan_is_nan():
    one_label = metrics(torch.tensor([1.0, -1.0]), torch.tensor([1, 1]))
    both_labels = metrics(torch.tensor([1.0, -1.0]), torch.tensor([1, 0]))
    result = summarize([one_label, both_labels])
    assert math.isnan(result["AUC_testmean"]) and math.isnan(result["AUC_teststd"])
    assert result["Accuracy_testmean"] == 0.75 and result["Accuracy_teststd"] == 0.25


# The command and its log.


def test_log_and_saved_networks(quick, small, tmp_path):
    """The log can be computed from the saved networks, and a second run gives the same log."""
    arguments = ("--trainer", "IRM", "--repetitions", 2, "--evaluation_steps", 15)
    folder = tmp_path / "a" / "b"
    result = quick(*arguments, "--save_model", folder)
    expected = summary(result)
    assert result.stderr == ""
    head, *each = re.split(r"^Repetition \d of 2\n", result.stdout, flags=re.M)
    first, device, described = head.splitlines()
    assert ast.literal_eval(first.removeprefix("Arguments: "))["trainer"] == "IRM"
    threads = torch.get_num_threads()
    assert device == f"Device: CPU, threads: {threads}, torch: {torch.__version__}"
    assert described.startswith(f"Data: {small.folder}, p_f 0.2, p_e ")
    results = []
    for i, lines in enumerate(map(str.splitlines, each), 1):
        assert len(lines) == (5 if i == 1 else 6)  # the last is followed by the Summary
        line = r"Iteration {}: objective -?[\d.]+; loss of train1 [\d.]+, train2 [\d.]+; "
        line += r"validation \{{'Accuracy': [\d.]+, 'AUC': [\d.]+, 'F1_macro': [\d.]+\}}"
        for shown, iteration in zip(lines[:2], (15, 30), strict=True):
            assert re.fullmatch(line.format(iteration), shown)
        path = folder / f"repetition{i}.pt"
        assert lines[2] == f"Saved: {path}"
        network, _, args = load_model(path)
        logits = predict(network, small.test)
        results.append(metrics(logits, small.test.labels))
        groups = group_accuracies(logits, small.test.labels, small.test.colors)
        assert lines[3:5] == [f"Test result: {results[-1]}", f"Group accuracy: {groups}"]
        seed_repetition(args, i)
        _, validation = small.hold_out(args.validation)
        assert lines[1].endswith(f"validation {evaluate(network, validation)}")
    for name in ("Accuracy", "AUC", "F1_macro"):
        values = [one[name] for one in results]
        assert expected[f"{name}_testmean"] == pytest.approx(np.mean(values))
        assert expected[f"{name}_teststd"] == pytest.approx(np.std(values))

    unsaved = [line for line in result.stdout.splitlines() if not line.startswith("Saved: ")]
    assert quick(*arguments).stdout.splitlines()[1:] == unsaved[1:]  # all but the arguments


PROTOCOL = {"ERM": (0.45, 0.58), "groupDRO": (0.62, 0.75), "IRM": (0.58, 0.75)}
PROTOCOL["Backdoor"] = (0.72, 0.80)


@pytest.mark.parametrize("name", PROTOCOL)
def test_accuracy_with_default_hyperparameters(in_process, dataset_path, data, tmp_path, name):
    flags = ("--no_cuda", "--repetitions", 1, "--dataset_path", dataset_path, "--seed", 7)
    result = in_process("exp-mnist.py", *flags, "--trainer", name, "--save_model", tmp_path)
    low, high = PROTOCOL[name]
    assert low < summary(result)["Accuracy_testmean"] < high
    assert result.stderr == ""
    assert len(re.findall(r"^Iteration [1-4]00: ", result.stdout, re.M)) == 4
    if name == "Backdoor":
        # P(y = 1 | do(x)) > 1/2 and Φ(x) > 0 nearly always predict the same, with the same AUC.
        network, loss, _ = load_model(tmp_path / "repetition1.pt")
        assert loss.counts.sum() == 4 + 12 * 32000 + 16 * 1024  # 400 minibatches are 12.5 epochs
        logits = predict(network, data.test)
        probability = loss.probability(logits)
        assert 0 < probability.min() < probability.max() < 1
        assert ((logits > 0) != (probability > 0.5)).sum() < 400
        assert (probability[logits.argsort()].diff() > -1e-6).all()


@pytest.fixture(scope="module")
def small_summaries(quick):
    return {name: summary(quick("--trainer", name)) for name in register.TRAINERS}


@pytest.mark.parametrize(
    ("trainer", "changed"),
    [
        ("ERM", ("--hidden_dim", 64, 16, 8)),
        ("ERM", ("--bias",)),
        ("ERM", ("--drop_rate", 0.5)),
        ("ERM", ("--weight_decay", 1)),
        ("ERM", ("--grayscale",)),
        ("ERM", ("--learning_rate", 0.003)),
        ("ERM", ("--batch_size", 20)),
        ("ERM", ("--iteration", 20)),
        ("ERM", ("--validation", 0.5)),
        ("ERM", ("--validation", 0)),
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


@pytest.mark.parametrize(
    ("used", "unused", "shown"),
    [
        (("--trainer", "ERM"), ("--eta", 1), "--eta"),
        (("--trainer", "groupDRO"), ("--reg_lambda", 7), "--reg_lambda"),
        (("--trainer", "IRM"), ("--adjustment", "weights", "--eta", 0), "--eta, --adjustment"),
        (("--trainer", "Backdoor", "--bias"), ("--eta", 1), "--eta"),
        (("--network", "CNN", "--iteration", 2), ("--hidden_dim", 8), "--hidden_dim"),
    ],
)
def test_a_flag_of_another_trainer_or_network_gives_a_warning(quick, used, unused, shown):
    """The warning is one line on standard error. The flag changes nothing."""
    result = quick(*used, *unused)
    assert_one_line(result, f"exp-mnist.py: warning: {shown}: no effect, ", status=(0,))
    plain = quick(*used)
    assert plain.stderr == "" and summary(plain) == summary(result)
    assert quick(*used, "--eta", 0.05).stderr == ""  # the default


def test_the_first_run_generates_the_data_with_its_seed(quick, mnist, tmp_path, monkeypatch):
    images, digits = (part[:180].numpy() for part in mnist)
    np.savez(tmp_path / "mnist.npz", x_train=images, y_train=digits)
    monkeypatch.setattr(preprocessing, "DATA", tmp_path)
    first, second = (quick("--dataset_path", tmp_path, "--seed", 5) for _ in range(2))
    assert first.stdout == second.stdout and ", seed 5\n" in first.stdout
    summary(first)
    assert first.stderr == second.stderr == ""


def test_data_of_another_seed_give_a_warning(quick, small_files):
    result = quick("--seed", 4)
    summary(result)
    warning = "were generated with seed 3, not with seed 4. Pass --seed 3, or delete"
    assert_one_line(result, warning, f"{small_files} to generate new data.", status=(0,))
    assert quick("--seed", 3).stderr == ""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--trainer", "DRO"), ("'DRO'", "groupDRO")),
        (("--batch_size", 0), ("--batch_size", "'0'")),
        (("--batch_size", "1.5"), ("--batch_size", "whole number")),
        (("--iteration", -1), ("--iteration",)),
        (("--hidden_dim", 64, 0), ("--hidden_dim",)),
        (("--learning_rate", "nan"), ("--learning_rate", "nan")),
        (("--drop_rate", 1), ("--drop_rate", "from 0 to 0.99")),
        (("--eta", "inf"), ("--eta",)),
        (("--validation", 1), ("--validation", "from 0 to 0.9")),
        (("--seed", -1), ("--seed",)),
        (("--adjustment", "none"), ("--adjustment",)),
        (("--unknown", 1), ("--unknown",)),
        (("--iter", 1), ("--iter",)),  # an abbreviation, which a new flag can make ambiguous
    ],
)
def test_invalid_arguments_are_refused(quick, arguments, words):
    assert_refused(quick(*arguments), *words)


def test_the_limits_of_the_flags_are_accepted(quick):
    flags = ("--seed", 3, "--validation", 0.9, "--eta", 0, "--weight_decay", 0)
    summary(quick("--trainer", "groupDRO", "--drop_rate", 0.99, "--batch_size", 100000, *flags))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--save_model", "README.md"), ("cannot write", "README.md")),
        (("--save_model", "README.md/x"), ("cannot write", "README.md/x")),
        (("--save_model", "long" * 80), ("cannot write", "long")),
        (("--dataset_path", "README.md"), ("README.md",)),
        (("--dataset_path", "/proc/none"), ("cannot write", "/proc/none")),
    ],
)
def test_unusable_folders_are_refused_before_the_training(quick, monkeypatch, arguments, words):
    monkeypatch.chdir(ROOT)
    result = quick(*arguments)
    assert_one_line(result, *words)
    assert "Repetition" not in result.stdout


def test_paths_of_the_home_folder(quick, small_files, tmp_path, monkeypatch):
    """bash does not expand ~ in --dataset_path=~/course."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "course").symlink_to(small_files.parent)
    result = quick("--dataset_path=~/course", "--save_model=~/models")
    summary(result)
    assert f"\nData: {tmp_path / 'course' / 'ColoredMNIST'}, " in result.stdout
    assert (tmp_path / "models" / "repetition1.pt").exists()


def test_help_explains_each_flag(in_process):
    result = in_process("exp-mnist.py", "--help")
    assert result.returncode == 0 and result.stderr == ""
    blocks = re.split(r"\n  (?=-)", result.stdout)[1:]
    assert len(blocks) == 1 + len(vars(parse()))  # --help itself
    for block in blocks[1:]:
        explanation = re.split(r"\s{2,}", block, maxsplit=1)[1]
        assert "(default:" in explanation, block
        assert len(explanation[: explanation.index("(default:")].split()) > 1, block


def test_a_process_on_an_ascii_terminal(command, quick, small_files):
    """A character that the terminal lacks is printed as a question mark, with the same results."""
    flags = ("--trainer", "Backdoor", "--batch_size", 1, "--evaluation_steps", 10)
    expected = quick(*flags)
    assert not expected.stdout.isascii()
    arguments = ("--dataset_path", small_files.parent, "--no_cuda", "--repetitions", 1, "--seed", 3)
    arguments += ("--iteration", 30, "--learning_rate", 0.01, *flags)
    ascii_only = os.environ | {"PYTHONIOENCODING": "ascii"}
    result = command("exp-mnist.py", *arguments, env=ascii_only)
    assert result.stderr == ""
    assert result.stdout == expected.stdout.replace("–", "?")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_a_user_id_without_a_name(command, small_files):
    """torch asks for the user's name, for example in a container run with --user 12345.

    The effective user stays root, so that the process can read the project. With the last of the
    variables, which earlier trainings in this process set, torch does not ask.
    """
    names = {"USER", "LOGNAME", "LNAME", "USERNAME", "TORCHINDUCTOR_CACHE_DIR"}
    nameless = {name: value for name, value in os.environ.items() if name not in names}
    arguments = ("--dataset_path", small_files.parent, "--no_cuda", "--seed", 3, "--iteration", 1)
    result = command(
        "exp-mnist.py", *arguments, env=nameless, preexec_fn=lambda: os.setreuid(12345, 0)
    )
    assert result.stderr == ""
    summary(result)


@pytest.mark.skipif(
    torch.cuda.is_available() or not torch.backends.cuda.is_built(),
    reason="needs a torch for GPUs on a machine without one",
)
def test_an_unusable_gpu_is_one_line(in_process, small_files, monkeypatch):
    """torch can see a GPU that is too old for it, or full."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    result = in_process("exp-mnist.py", "--dataset_path", small_files.parent, "--seed", 3)
    assert_one_line(result, "The GPU cannot be used", "Add --no_cuda.")


# Flags and parameters.


def test_arguments_of_functions_and_classes():
    def function(samples, seed, *, eta, beta=1):
        pass

    class Class:
        def __init__(self, samples, seed=0, *, eta=1, beta=1):
            pass

    args = argparse.Namespace(seed=3, eta=0.5, samples=2, other=1)
    assert arguments_of(function, args) == {"eta": 0.5}
    assert arguments_of(Class, args) == {"samples": 2, "seed": 3, "eta": 0.5}


def test_defaults_of_the_command_line_are_the_same_as_in_the_code():
    args, compared = vars(parse()), set()
    functions = (*register.TRAINERS.values(), *register.NETWORKS.values(), train, load_data)
    for function in functions:
        for name, parameter in inspect.signature(function).parameters.items():
            default = parameter.default
            required = default is parameter.empty
            if name in args and not required and name != "validation":  # samples in `train`
                default = list(default) if isinstance(default, tuple) else default
                assert args[name] == default, name
                compared.add(name)
    others = {"trainer": "ERM", "network": "MLP", "repetitions": 3, "validation": 0.2}
    others |= {"no_cuda": False, "save_model": None}
    assert compared == args.keys() - others.keys()
    assert {name: args[name] for name in others} == others


@pytest.fixture
def new_flag(monkeypatch):
    """Add a flag to the command line, in the way that a user adds it to `training_parser`."""

    def add(name, default):
        def with_flag(description=""):
            parser = training_parser(description)
            parser.add_argument(name, type=type(default), default=default, help="new")
            return parser

        monkeypatch.setattr(trainer, "training_parser", with_flag)
        monkeypatch.setattr(importlib.import_module("exp-mnist"), "training_parser", with_flag)

    return add


class VREx(Loss):
    """Risk extrapolation (Krueger et al. 2021, arXiv:2003.00688): mean + β · variance."""

    def __init__(self, beta: float = 10.0):
        super().__init__()
        self.beta = beta

    def forward(self, network, batch):
        risks = self.risks(network(batch.images), batch)
        return risks.mean() + self.beta * risks.var(unbiased=False)


def test_a_new_loss_with_a_new_flag(quick, new_flag, tmp_path, monkeypatch):
    """It can be trained, saved and loaded."""
    monkeypatch.setitem(register.TRAINERS, "VREx", VREx)
    new_flag("--beta", 10.0)
    plain = quick("--trainer", "VREx")
    result = quick("--trainer", "VREx", "--beta", 1000, "--save_model", tmp_path)
    assert summary(result) != summary(plain) and result.stderr == plain.stderr == ""
    _, loss, args = load_model(tmp_path / "repetition1.pt")
    assert isinstance(loss, VREx) and loss.beta == args.beta == 1000


def test_a_misspelt_new_flag_gives_a_warning(quick, new_flag, monkeypatch):
    """Otherwise it would be in the log and have no effect."""
    monkeypatch.setitem(register.TRAINERS, "VREx", VREx)
    new_flag("--betta", 10.0)
    result = quick("--trainer", "VREx", "--betta", 5)
    assert_one_line(result, "warning: --betta: no effect, ", status=(0,))


class Linear(Network):
    """A new network, without the flags of the others."""

    def __init__(self, bias: bool = False):
        super().__init__(nn.Sequential(nn.Flatten(), nn.Linear(1568, 1, bias)))


def test_a_new_network(quick, monkeypatch):
    monkeypatch.setitem(register.NETWORKS, "Linear", Linear)
    plain, biased = quick("--network", "Linear"), quick("--network", "Linear", "--bias")
    assert summary(plain) != summary(biased) and plain.stderr == biased.stderr == ""
    result = quick("--network", "Linear", "--drop_rate", 0.5, "--grayscale")
    assert_one_line(result, "warning: --grayscale, --drop_rate: no effect, ", status=(0,))


# Saved networks.


@pytest.mark.parametrize(
    ("make", "arguments"),
    [
        (Backdoor, {"trainer": "Backdoor", "adjustment": "weights", "validation": 0.1}),
        (GroupDRO, {"trainer": "groupDRO", "eta": 0.5, "hidden_dim": [5, 4], "drop_rate": 0.1}),
        (ERM, {"trainer": "ERM", "network": "CNN", "iteration": 2, "weight_decay": 0.1}),
        (IRM, {"trainer": "IRM", "reg_lambda": 3.0, "evaluation_steps": 9, "repetitions": 2}),
    ],
)
def test_a_saved_network_is_loaded_with_its_loss_and_arguments(
    quick, small, tmp_path, make, arguments
):
    flags = []
    for name, value in arguments.items():
        flags += [f"--{name}", *(value if isinstance(value, list) else [value])]
    result = quick(*flags, "--bias", "--grayscale", "--save_model", tmp_path)
    number = arguments.get("repetitions", 1)
    network, loss, args = load_model(tmp_path / f"repetition{number}.pt")
    shown = re.findall(r"^Test result: (.*)", result.stdout, re.M)[-1]
    assert evaluate(network, small.test) == ast.literal_eval(shown)
    assert type(loss) is make and not loss.training
    before = make().state_dict()
    assert loss.state_dict().keys() == before.keys()
    assert not any(torch.equal(value, before[name]) for name, value in loss.state_dict().items())
    trained = {"seed": 3, "iteration": 30, "batch_size": 40, "learning_rate": 0.01, "bias": True}
    trained |= {"grayscale": True, "repetitions": 1} | arguments
    if "network" in arguments:
        del trained["bias"]  # the CNN does not take it
    defaults = vars(parse())  # for the paths and --no_cuda as well
    assert vars(args) == defaults | trained


@pytest.fixture(scope="module")
def saved_path(quick, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    assert quick("--save_model", folder).returncode == 0
    return folder / "repetition1.pt"


def test_other_names_in_a_saved_network_are_not_read(saved_path, tmp_path):
    """A file from a stranger cannot choose paths or devices."""
    saved = torch.load(saved_path, weights_only=True)
    names = {"dataset_path": "/", "save_model": "/", "no_cuda": True, "eta": 9.0, "new": 1}
    saved["arguments"] |= names
    torch.save(saved, tmp_path / "model.pt")
    assert load_model(tmp_path / "model.pt")[2] == load_model(saved_path)[2]


class RunsCode:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def change(saved, key, name, value):
    return saved | {key: saved[key] | {name: value}}


def test_corrupt_and_other_files_are_refused_with_one_message(saved_path, small_files, tmp_path):
    """Nothing in them is run."""
    whole, saved = saved_path.read_bytes(), torch.load(saved_path, weights_only=True)
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1  # in a weight, so only the checksum can tell
    bad_bytes = {
        "empty": b"",
        "text": b"Summary: {}",
        "truncated": whole[:-100],
        "checksum": flipped,
        "environment": (small_files / "test.pt").read_bytes(),
    }
    bad_records = {
        "code": RunsCode(tmp_path / "ran"),
        "code beside": saved | {"more": RunsCode(tmp_path / "ran")},
        "list": [1, 2],
        "other dict": {"arguments": {}},
        "trainer": change(saved, "arguments", "trainer", "DRO"),
        "seed": change(saved, "arguments", "seed", "many"),
        "layers": change(saved, "arguments", "hidden_dim", [3]),
        "weights": saved | {"network": {}},
        "state": saved | {"loss": {"q": torch.ones(2)}},
        "fewer arguments": saved | {"arguments": {"trainer": "ERM", "network": "MLP"}},
    }
    paths = [tmp_path / f"{name}.pt" for name in (*bad_bytes, *bad_records)]
    for path, content in zip(paths, (*bad_bytes.values(), *bad_records.values()), strict=True):
        if path.stem in bad_bytes:
            path.write_bytes(content)
        else:
            torch.save(content, path)
        with pytest.raises(UserError) as caught:
            load_model(path)
        assert str(caught.value) == (
            f"{path} is corrupt, or it is not a network that this version saved. "
            "Train it again with --save_model."
        )
    assert not (tmp_path / "ran").exists()


def test_a_missing_saved_network_is_named(tmp_path):
    for path in (tmp_path / "none.pt", tmp_path):
        with pytest.raises(UserError, match=f"^cannot read {re.escape(str(path))}: "):
            load_model(path)


# On a GPU.

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@gpu
@pytest.mark.parametrize("trainer", TRAINERS)
def test_training_on_a_gpu(data, trainer):
    """Everything is on the GPU. A CPU gives nearly the same predictions."""
    samples, test = data.training[18000:22000].to("cuda"), data.test[:2000]
    for index in (slice(5), torch.arange(4), torch.arange(4, device="cuda"), samples.envs == 1):
        assert all(value.is_cuda for value in samples[index].batch())
    network, loss = MLP(), trainer()
    train(network, loss, samples, test.to("cuda"), iteration=30, evaluation_steps=10)
    tensors = [*network.state_dict().values(), *loss.state_dict().values()]
    assert all(value.is_cuda for value in tensors)
    logits = predict(network, test.to("cuda"))
    assert logits.is_cuda
    assert torch.allclose(predict(network, test), logits, atol=1e-4)  # samples on the CPU
    if trainer is Backdoor:
        assert loss.counts.sum() == 4 + 7 * 4000 + 2 * 1024  # 30 minibatches, 4 in an epoch
        assert loss.probability(logits).is_cuda
    on_cpu = predict(network.cpu(), test)
    assert torch.allclose(on_cpu, logits.cpu(), atol=1e-2)
    assert ((on_cpu > 0) == (logits.cpu() > 0)).float().mean() > 0.99


@gpu
@pytest.mark.parametrize("arguments", [("--trainer", "Backdoor"), ("--network", "CNN")])
def test_a_network_trained_on_a_gpu_is_loaded_on_the_cpu(
    in_process, small_files, small, tmp_path, arguments
):
    short = ("--dataset_path", small_files.parent, "--iteration", 30, "--repetitions", 1)
    result = in_process("exp-mnist.py", *short, *arguments, "--save_model", tmp_path)
    assert f"Device: {torch.cuda.get_device_name()}" in result.stdout
    network, loss, _ = load_model(tmp_path / "repetition1.pt")
    assert not any(value.is_cuda for value in (*network.parameters(), *loss.buffers()))
    accuracy = evaluate(network, small.test)["Accuracy"]
    assert accuracy == pytest.approx(summary(result)["Accuracy_testmean"], abs=0.05)


@gpu
@pytest.mark.parametrize("network", ["MLP", "CNN"])
def test_a_gpu_gives_the_same_summary_each_time(in_process, dataset_path, network):
    arguments = ("--dataset_path", dataset_path, "--seed", 7, "--network", network)
    arguments += ("--iteration", 100, "--repetitions", 2)
    first, second = (summary(in_process("exp-mnist.py", *arguments)) for _ in range(2))
    assert first == second
