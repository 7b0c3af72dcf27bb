"""Training and its two promises: the log's form, and the accuracies of the assignment."""

import argparse
import ast
import collections
import copy
import itertools
import math
import re
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import ROOT, Normalized, assert_one_line, assert_refused, same
from sklearn.metrics import accuracy_score, f1_score, roc_auc_score
from torch import nn
from torch.nn import functional as F

from dataset import MEAN, STD, Digits, concatenate, load_dataset
from metric import metrics, summarize
from model import CNN, ERM, IRM, MLP, Network
from preprocessing import UserError, draw_environments
from trainer import arguments_of, build, load, parse_arguments, predict, train

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


def test_metrics_are_sklearns():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        logits = torch.randn(50, generator=generator).round(decimals=1)  # with ties, and zeros
        labels = torch.randint(2, (50,), generator=generator).float()
        assert metrics(logits, labels) == pytest.approx(
            {
                "Accuracy": accuracy_score(labels, logits > 0),
                "AUC": roc_auc_score(labels, logits),
                "F1_macro": f1_score(labels, logits > 0, average="macro"),
            }
        )


@pytest.mark.parametrize("label", [0, 1])
@pytest.mark.parametrize("logit", [-1, 1])
def test_auc_of_one_label_is_nan_without_a_warning(label, logit):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = metrics(torch.full((3,), float(logit)), torch.full((3,), float(label)))
    assert math.isnan(scores["AUC"])
    assert scores["Accuracy"] == scores["F1_macro"] == float((logit > 0) == label)


def test_summary_is_mean_and_population_deviation():
    results = [{"Accuracy": 0.5, "AUC": 0.25}, {"Accuracy": 0.7, "AUC": 0.25}]
    expected = {
        "Accuracy_testmean": 0.6,
        "Accuracy_teststd": 0.1,
        "AUC_testmean": 0.25,
        "AUC_teststd": 0.0,
    }
    assert summarize(results) == pytest.approx(expected)
    assert list(summarize(results)) == list(expected)


def test_networks_see_the_assignments_images(dataset_path, data):
    """RGB, normalised as the assignment says, less the blue channel, which is 0."""
    images = []
    for e, name in ((0, "train1"), (1, "train2")):
        record = torch.load(dataset_path / "ColoredMNIST" / f"{name}.pt", weights_only=True)
        images.append(record["images"][[3, 8 + e]])
    expected = ((torch.cat(images)[:, :2] / 255 - MEAN) / STD).flatten(1)
    digits = data.training[torch.tensor([3, 8, 20003, 20009])]
    assert torch.allclose(next(digits.chunks()).images, expected, atol=1e-6)
    recolored = next(digits.recolored().chunks())
    assert torch.allclose(recolored.images.view(4, 2, 784).flip(1).flatten(1), expected, atol=1e-6)
    assert torch.equal(recolored.colors, 1 - digits.colors)
    gray = next(digits.grayscale().chunks())
    assert torch.allclose(gray.images, expected.view(4, 2, 784).amax(1), atol=1e-6)
    assert torch.equal(next(digits.recolored().grayscale().chunks()).images, gray.images)


def test_in_both_colors_each_digit_comes_twice(data):
    digits = data.training[torch.arange(5, 105)]
    twice = concatenate([digits, digits.recolored()])
    once, again = twice[torch.arange(100)], twice[torch.arange(100, 200)]
    assert len(twice) == 200 and same(once, digits) and same(again.recolored(), digits)
    assert torch.equal(again.labels, digits.labels) and torch.equal(again.envs, digits.envs)


def numbered(count):
    """Digits that tell which they are: by their labels, 0, 1, ..."""
    zeros = torch.zeros(count, dtype=torch.int64)
    images = torch.zeros(count, 2, 28, 28, dtype=torch.uint8)
    return Digits(images, torch.arange(count).float(), zeros, zeros)


def test_minibatches_cover_the_data_once_a_pass():
    torch.manual_seed(0)
    batches = numbered(1000).minibatches(100)
    passes = [torch.cat([next(batches).labels for _ in range(10)]) for _ in range(2)]
    for one in passes:
        assert torch.equal(one.sort()[0], torch.arange(1000).float())
    assert not torch.equal(*passes)
    batches = numbered(1000).minibatches(300)  # what is left of a pass is dropped
    one = torch.cat([next(batches).labels for _ in range(3)])
    assert len(one.unique()) == 900
    assert len(next(numbered(50).minibatches(300)).labels) == 50


def test_minibatches_mix_the_environments(data):
    torch.manual_seed(0)
    for _, batch in zip(range(10), data.training.minibatches(1024), strict=False):
        assert 400 < batch.envs.sum() < 624
        assert batch.images.shape == (1024, 1568) and batch.images.dtype == torch.float32


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


def test_images_are_moved(data):
    digits = data.training[torch.arange(40)]
    digits.images[:, :, :3], digits.images[:, :, -3:] = 0, 0  # so nothing is lost at the edges
    digits.images[..., :2], digits.images[..., -2:] = 0, 0
    digits.labels = torch.arange(40.0)
    still = next(digits.chunks()).images.clone().view(40, 2, 28, 28)
    torch.manual_seed(0)
    moves = collections.Counter()
    for _, batch in zip(range(500), digits.minibatches(40, shift=2), strict=False):
        expected, moved = still[batch.labels.long()], batch.images.view(40, 2, 28, 28)
        (by,) = [
            by
            for by in itertools.product(range(-3, 4), repeat=2)
            if torch.equal(expected.roll(by, (2, 3)), moved)
        ]
        moves[by] += 1
    assert set(moves) == set(itertools.product(range(-2, 3), repeat=2))
    assert max(moves.values()) < 60


def trained(digits, loss=ERM, network=MLP, **settings):
    torch.manual_seed(0)
    return train(network(), loss(), digits, None, **settings)


def by_hand(network, loss, digits, iteration, batch_size, learning_rate, **settings):
    """The loop that everyone writes; yields the network after each of its steps."""
    limit = settings.pop("max_gradient_norm", 0.1)
    optimizer = torch.optim.Adam(network.parameters(), learning_rate, eps=1e-4, **settings)
    for _, batch in zip(range(iteration), digits.minibatches(batch_size, shift=1), strict=False):
        optimizer.zero_grad()
        torch.set_float32_matmul_precision("medium")
        loss(network(batch.images), batch).backward()
        torch.set_float32_matmul_precision("highest")
        if limit:
            torch.nn.utils.clip_grad_norm_(network.parameters(), limit)
        optimizer.step()
        yield network


def assert_close(ours, theirs, **tolerance):
    pairs = zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True)
    for (name, value), other in pairs:
        assert torch.allclose(value, other, **tolerance), name


@pytest.mark.parametrize("limit", [0.01, 0.1, 0])
def test_training_is_adam(data, limit):
    """Against a loop with torch.optim.Adam and clip_grad_norm_."""
    settings = {"learning_rate": 3e-3, "weight_decay": 0.1, "max_gradient_norm": limit}
    short = {"iteration": 5, "batch_size": 512, "average_last": 0, "shift": 1}
    ours = trained(data.training, IRM, **short, **settings)
    torch.manual_seed(0)
    *_, network = by_hand(MLP(), IRM(), data.training, 5, 512, **settings)
    assert_close(ours, network, atol=1e-5)
    assert not ours.training


class Precise(ERM):
    """Notes the precision of the products that a step is made of, and fails if told to."""

    def __init__(self, factor=1.0):
        self.factor, self.noted = factor, set()

    def __call__(self, logits, batch):
        self.noted.add(torch.get_float32_matmul_precision())
        return self.factor * super().__call__(logits, batch)


@pytest.mark.parametrize("before", ["highest", "high"])
def test_only_training_multiplies_fast(data, before):
    """Whatever a caller had set is there again, also after a training that failed."""
    digits, loss = data.training[torch.arange(200)], Precise()
    torch.set_float32_matmul_precision(before)
    try:
        train(MLP(), loss, digits, None, iteration=2)
        assert loss.noted == {"medium"} and torch.get_float32_matmul_precision() == before
        with pytest.raises(UserError, match="diverged"):
            train(MLP(), Precise(float("nan")), digits, None, iteration=2)
        with pytest.raises(ZeroDivisionError):
            train(MLP(), lambda *_: 1 / 0, digits, None, iteration=2)
        assert torch.get_float32_matmul_precision() == before
    finally:
        torch.set_float32_matmul_precision("highest")


def test_averaging_gives_the_mean_of_the_last_weights(data):
    torch.manual_seed(0)
    steps = by_hand(MLP(), ERM(), data.training, 5, 512, 1e-3)
    weights = [copy.deepcopy(network.phi[0].weight.data) for network in steps]
    for average_last, last in ((0, 1), (0.2, 1), (0.6, 3), (1, 5)):
        ours = trained(data.training, iteration=5, batch_size=512, average_last=average_last)
        expected = sum(weights[-last:]) / last
        assert torch.allclose(ours.phi[0].weight, expected, atol=1e-5)


class Filters(Network):
    """A network of a user's own, with batch normalisation between its convolutions."""

    def __init__(self, channels: int = 2, maps: int = 4):
        super().__init__(
            nn.Sequential(
                nn.Unflatten(1, (channels, 28, 28)),
                nn.Conv2d(channels, maps, 5, stride=4),
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
    digits = data.training[torch.arange(19000, 19000 + count)]
    ours = trained(digits, network=network, iteration=10, average_last=0.5, learning_rate=1e-2)
    (index,) = [i for i, layer in enumerate(ours.phi) if hasattr(layer, "running_mean")]
    with torch.no_grad():
        outputs = torch.cat([ours.phi[:index](batch.images) for batch in digits.chunks()])
    outputs = outputs.transpose(0, 1).flatten(1)  # a row for each unit or map
    assert torch.allclose(ours.phi[index].running_mean, outputs.mean(1), atol=1e-3)
    assert torch.allclose(ours.phi[index].running_var, outputs.var(1), rtol=0.02)


def test_evaluation_does_not_change_training(data):
    """Whatever the log reports on, and how often."""
    weights = []
    for validation, steps in ((None, 1000), (data.test[torch.arange(100)], 1)):
        torch.manual_seed(0)
        network = Normalized(drop_rate=0.3)
        settings = {"iteration": 4, "batch_size": 100, "evaluation_steps": steps}
        weights.append(train(network, ERM(), data.training, validation, **settings))
    assert_close(*weights, rtol=0, atol=0)


def test_dropout_does_not_depend_on_how_many_repetitions_follow(in_process, dataset_path):
    def results(repetitions):
        arguments = ("--seed", 5, "--drop_rate", 0.3, "--iteration", 20, "--no_cuda")
        everything = (*arguments, "--dataset_path", dataset_path, "--repetitions", repetitions)
        result = in_process("exp-mnist.py", *everything)
        assert result.returncode == 0, result.stderr
        return re.findall(r"^Test result: .*", result.stdout, re.M)

    one, three = results(1), results(3)
    assert one[0] == three[0] and len(set(three)) == 3


def test_runs_that_save_into_one_folder_at_once(small_files, tmp_path, capsys):
    """What is tried before the training does not disturb another run that tries it, too."""
    path = ["--dataset_path", str(small_files.parent), "--save_model", str(tmp_path / "new")]
    args = parse_arguments("", path)
    with ThreadPoolExecutor(8) as runs:
        assert len([*runs.map(load, [args] * 200)]) == 200


def test_log_and_saved_models(in_process, dataset_path, data, tmp_path):
    """Run twice: the log's form, networks that give the log's result, and the same Summary."""
    folder = tmp_path / "a" / "b"
    arguments = ("exp-mnist.py", "--trainer", "IRM", "--dataset_path", dataset_path, *SHORT)
    result = in_process(*arguments, "--save_model", folder)
    expected = summary(result)["Accuracy_testmean"]
    assert result.stderr == ""
    log = result.stdout
    for words in ("'trainer': 'IRM'", "'seed': 1234", "Device: CPU", "drawn with p_f 0.2"):
        assert words in log
    line = r"^Iteration {}: objective -?[\d.]+; loss of train1 [\d.]+, train2 [\d.]+; "
    line += r"validation \{{'Accuracy': [\d.]+, 'AUC': "
    repetitions = re.split(r"^Repetition \d of 2\n", log, flags=re.M)
    assert len(repetitions) == 3
    for repetition in repetitions[1:]:
        for iteration in (20, 40):
            assert len(re.findall(line.format(iteration), repetition, re.M)) == 1
        assert len(re.findall(r"^Test result: \{'Accuracy': [\d.]+, ", repetition, re.M)) == 1
        assert len(re.findall(r"^Flip rate: [\d.]+$", repetition, re.M)) == 1
    assert log.index("Mean flip rate: ") < log.index("Summary: ")

    scores = []
    for path in sorted(folder.glob("*.pt")):
        saved = torch.load(path, weights_only=True)
        network, _ = build(argparse.Namespace(**saved["arguments"]))
        network.load_state_dict(saved["state_dict"])
        assert path.stat().st_size < 1.1 * 4 * sum(p.numel() for p in network.parameters())
        scores.append(metrics(predict(network, data.test), data.test.labels)["Accuracy"])
        assert saved["arguments"]["seed"] == 1234
    assert len(scores) == 2 and np.mean(scores) == expected

    again = in_process(*arguments)
    assert again.stdout.splitlines()[1:] == log.splitlines()[1:]  # all but the arguments
    other = in_process(*arguments, "--seed", 6)
    assert other.stdout.splitlines()[-1] != log.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "low", "high"),
    [
        (("--trainer", "ERM"), 0.45, 0.58),
        (("--trainer", "groupDRO"), 0.67, 0.75),
        (("--trainer", "IRM"), 0.65, 0.75),
        (("--trainer", "Backdoor"), 0.76, 0.80),
        (("--trainer", "ERM", "--grayscale"), 0.765, 0.80),
    ],
)
def test_accuracy_with_default_hyperparameters(in_process, dataset_path, arguments, low, high):
    short = ("--no_cuda", "--repetitions", 1, "--dataset_path", dataset_path)
    result = in_process("exp-mnist.py", *short, *arguments)
    assert low < summary(result)["Accuracy_testmean"] < high
    flips = float(re.search(r"Mean flip rate: (\S+)", result.stdout)[1])
    if "--grayscale" in arguments:
        assert flips == 0
    elif "ERM" in arguments:
        assert flips > 0.25
    elif "Backdoor" in arguments:
        assert flips < 0.08


def test_decisions_by_the_formula_are_those_of_the_logit(data):
    """Backdoor's P(y = 1 | do(x)) > ½ and Φ(x) > 0, of the 20,000 test images."""
    args = parse_arguments("", ["--trainer", "Backdoor", "--iteration", "100"])
    torch.manual_seed(0)
    network, loss = build(args)
    network = train(network, loss, data.training, None, **arguments_of(train, args))
    logits = predict(network, data.test)
    probability = loss.probability(logits)
    assert probability.shape == logits.shape and 0 < probability.min() < probability.max() < 1
    assert ((logits > 0) != (probability > 0.5)).sum() < 200
    order = logits.argsort()
    assert (probability[order].diff() > -1e-6).all()  # so that AUC is the same


@pytest.mark.parametrize(
    "arguments",
    [
        ("--bias", "--drop_rate", 0.2, "--hidden_dim", 32, 16, 8),
        ("--network", "CNN", "--batch_size", 64, "--bias"),
        ("--grayscale", "--validation", 0, "--average_last", 0),
        ("--grayscale", "--network", "CNN", "--batch_size", 64, "--drop_rate", 0),
        ("--max_gradient_norm", 0, "--weight_decay", 0.001, "--shift", 2),
        ("--trainer", "Backdoor", "--adjustment", "weights"),
    ],
)
def test_options_train(in_process, small_files, arguments):
    short = ("--iteration", 4, "--evaluation_steps", 2, "--repetitions", 1, "--no_cuda")
    everything = ("--trainer", "IRM", "--dataset_path", small_files.parent, *short)
    summary(in_process("exp-mnist.py", *everything, *arguments))


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
    short = ("--iteration", 2, "--repetitions", 1, "--no_cuda", "--validation", 0.9)
    summary(in_process("exp-mnist.py", "--dataset_path", tmp_path / str(seed), *short))


VREX = """\
from model import Loss
from register import TRAINERS

class VREx(Loss):
    def __init__(self, beta: float = 10.0):
        self.beta = beta
    def __call__(self, logits, batch):
        risks = self.risks(logits, batch)
        return risks.mean() + self.beta * risks.var(unbiased=False)
TRAINERS["VREx"] = VREx
"""


def readme_plugin():
    """The example of the README, or one like it while that has no flag of its own."""
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[1]
    return code if "beta:" in code else VREX


def test_a_loss_of_ones_own_takes_ten_lines(in_process, dataset_path, tmp_path, capsys):
    code = readme_plugin()
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    (tmp_path / "vrex.py").write_text(code)
    plugin = ("--plugin", str(tmp_path / "vrex.py"))
    assert parse_arguments("", [*plugin, "--trainer", "VREx"]).beta == 10
    with pytest.raises(SystemExit):
        parse_arguments("", [*plugin, "--help"])
    assert "--beta BETA" in capsys.readouterr().out  # also where it is not the one chosen
    arguments = ("--dataset_path", dataset_path, "--no_cuda", "--repetitions", 1)
    flags = ("--trainer", "VREx", "--beta", "3e1")
    accuracy = summary(in_process("exp-mnist.py", *plugin, *flags, *arguments))["Accuracy_testmean"]
    assert accuracy > 0.6  # ERM is at 0.5


def plugin(tmp_path, code, more=""):
    path = tmp_path / "plugin.py"
    path.write_text(code.replace("MORE", more))
    return "--plugin", str(path)


OWN = """
from __future__ import annotations
from model import ERM, Network
from register import NETWORKS, TRAINERS
from torch import nn

class Own(ERM):
    '''A loss.

    Args:
        strength: how much of it,
            100 % at most
    '''
    defaults = {"iteration": 7}
    def __init__(self, strength: float = 1.0, MORE):
        pass

class Line(Network):
    def __init__(self, channels: int = 2, bias: bool = False):
        super().__init__(nn.Sequential(nn.Linear(channels * 784, 1, bias)))

TRAINERS["Own"], NETWORKS["Line"] = Own, Line
"""


def test_arguments_of_a_plugin_are_flags(in_process, small_files, tmp_path):
    given = plugin(tmp_path, OWN, 'kind: str = "soft", often: float = 2')
    result = in_process("exp-mnist.py", *given, "--trainer", "Own", "--help")
    text = " ".join(result.stdout.split())
    assert "--strength STRENGTH how much of it, 100 % at most (default: 1.0)" in text
    assert "Own: 'iteration': 7" in text
    args = parse_arguments("", [*given, "--trainer", "Own", "--strength", "2", "--often", "1.5"])
    assert (args.strength, args.kind, args.often, args.iteration) == (2.0, "soft", 1.5, 7)
    explicit = ("--iteration", "3")
    assert parse_arguments("", [*given, "--trainer", "Own", *explicit]).iteration == 3
    short = ("--dataset_path", small_files.parent, "--no_cuda", "--repetitions", 1)
    for more in ((), ("--grayscale", "--bias")):
        arguments = (*given, "--trainer", "Own", "--network", "Line", *short, *more)
        summary(in_process("exp-mnist.py", *arguments))


@pytest.mark.parametrize("name", ["learning_rate", "seed", "drop_rate"])
def test_a_plugin_that_takes_a_name_that_is_taken_is_refused(in_process, tmp_path, name):
    """Rather than given what the flag is for: the optimizer, the run, the network."""
    given = plugin(tmp_path, OWN, f"{name}: float = 0.5")
    result = in_process("exp-mnist.py", *given, "--trainer", "Own")
    assert_refused(result, "rename", f" {name}")


def test_a_plugin_may_share_a_name_with_a_loss_that_is_not_trained(tmp_path):
    given = plugin(tmp_path, OWN, "reg_lambda: float = 0.5")
    args = parse_arguments("", [*given, "--trainer", "Own"])
    assert args.reg_lambda == 0.5
    assert parse_arguments("", [*given, "--trainer", "IRM"]).reg_lambda == 50


def test_a_fault_in_a_plugin_is_the_plugins(in_process, tmp_path):
    """A file that it misses is not one that could not be written."""
    given = plugin(tmp_path, "open('its/own/table.csv')")
    with pytest.raises(FileNotFoundError, match="table.csv"):
        in_process("exp-mnist.py", *given)
    given = plugin(tmp_path, "import no_such_module")
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        in_process("exp-mnist.py", *given)


def test_a_plugin_runs_once_in_a_process(tmp_path):
    """What it wraps is not wrapped again by a sweep that parses arguments for every job."""
    runs = tmp_path / "runs"
    given = plugin(tmp_path, f"open({str(runs)!r}, 'a').write('x')")
    for _ in range(2):
        parse_arguments("", [str(word) for word in given])
    assert runs.read_text() == "x"


def test_what_trainers_and_networks_set_differently():
    """A network's wish comes before a trainer's, the user's before both."""
    names = ("weight_decay", "iteration", "batch_size")

    def defaults(*arguments):
        return tuple(vars(parse_arguments("", list(arguments)))[name] for name in names)

    assert defaults() == defaults("--trainer", "IRM") == (0, 400, 1024)
    assert defaults("--trainer", "Backdoor") == (1e-3, 800, 1024)
    assert defaults("--trainer", "Backdoor", "--iteration", "9") == (1e-3, 9, 1024)
    assert defaults("--network", "CNN") == (0, 800, 384)
    assert defaults("--trainer", "Backdoor", "--network", "CNN") == (0, 800, 384)
    given = parse_arguments("", ["--trainer", "IRM", "--shift", "3", "--network", "CNN"])
    assert (given.shift, given.batch_size) == (3, CNN.defaults["batch_size"])


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
        (("--learning_rate", 0), ("--learning_rate",)),
        (("--shift", 14), ("--shift", "13")),
        (("--weight_decay", -1), ("--weight_decay",)),
        (("--max_gradient_norm", -1), ("--max_gradient_norm",)),
        (("--drop_rate", 1), ("--drop_rate",)),
        (("--eta", "inf"), ("--eta",)),
        (("--reg_lambda", "many"), ("--reg_lambda", "'many'")),
        (("--average_last", -1), ("--average_last",)),
        (("--validation", 1), ("--validation",)),
        (("--seed", -1), ("--seed",)),
        (("--adjustment", "none"), ("--adjustment",)),
        (("--unknown", 1), ("--unknown",)),
        (("--iter", 1), ("--iter",)),  # no abbreviations, which a new flag would make ambiguous
        (("--p_f", 0.1), ("--p_f",)),  # what preprocessing.py draws with
    ],
)
def test_nonsense_is_refused(in_process, dataset_path, arguments, words):
    result = in_process("exp-mnist.py", "--dataset_path", dataset_path, *arguments)
    assert_refused(result, *words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--plugin", "no/such/file.py"), ("--plugin", "file.py")),
        (("--save_model", "README.md", "--iteration", 1), ("cannot write", "README.md")),
        (("--save_model", "README.md/x"), ("cannot write", "README.md/x")),
        (("--save_model", "/proc"), ("cannot write", "/proc/network")),  # before it trains
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
    assert_one_line(in_process("exp-mnist.py", *given, *arguments), *words)


def test_divergence_is_reported(in_process, small_files, data):
    arguments = ("--dataset_path", small_files.parent, "--learning_rate", 1e30, "--trainer", "IRM")
    result = in_process("exp-mnist.py", *arguments)
    assert_one_line(result, "diverged", "iteration", "--learning_rate")
    # Weights that are finite, and too large for a logit.
    result = in_process("exp-mnist.py", *arguments[:3], 1e20, "--iteration", 1)
    assert_one_line(result, "a logit is nan or infinite", "--learning_rate")
    network = trained(data.training, iteration=1, learning_rate=1e39)
    with pytest.raises(UserError, match="a logit is nan or infinite"):  # as the weights are
        predict(network, data.test)


def test_help_explains_every_flag(in_process):
    result = in_process("exp-mnist.py", "--help")
    assert result.returncode == 0 and result.stderr == ""
    flags, epilog = result.stdout.split("Defaults of their own (a network's count):")
    blocks = re.split(r"\n  (?=-)", flags)[1:]
    assert 20 < len(blocks) <= 1 + 28  # and --help itself
    for block in blocks:
        explanation = re.split(r"\s{2,}", block.split("\n\n")[0], maxsplit=1)[1]
        assert len(re.sub(r"\(default: .*?\)", "", explanation).split()) > 2, block
    for name in ("CNN: 'batch_size': 384", "Backdoor: 'iteration': 800"):
        assert name in " ".join(epilog.split())


def test_script_as_a_process(command, in_process, small_files):
    """A real run: nothing on standard error, Summary last, and what it gives in this process."""
    arguments = ("exp-mnist.py", "--dataset_path", small_files.parent, "--trainer", "Backdoor")
    short = ("--no_cuda", "--iteration", 5, "--repetitions", 1, "--batch_size", 20)
    real = command(*arguments, *short)
    summary(real)
    assert real.stderr == ""
    assert real.stdout == in_process(*arguments, *short).stdout


def test_loss_of_a_batch_is_cross_entropy(data):
    batch = next(data.training.chunks())
    logits = torch.randn(len(batch.labels))
    expected = F.binary_cross_entropy_with_logits(logits, batch.labels)
    assert torch.allclose(ERM().losses(logits, batch).mean(), expected)
