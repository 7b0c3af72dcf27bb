"""Training and its two promises: the log's form, and the accuracies of the assignment."""

import ast
import collections
import itertools
import re

import numpy as np
import pytest
import torch
from conftest import ROOT, assert_one_line
from sklearn.metrics import accuracy_score, f1_score, roc_auc_score

from dataset import Batch, Split, minibatches, move
from metric import metrics
from model import ERM, IRM, MLP, Backdoor, GroupDRO
from preprocessing import MEAN, STD, UserError, load_dataset
from trainer import Run, predict, summarize, train

CPU = torch.device("cpu")
SHORT = ("--no_cuda", "--iteration", 40, "--repetitions", 2)
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
    assert np.isnan(metrics(torch.ones(3), torch.ones(3))["AUC"])


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


@pytest.mark.parametrize("raw", [False, True])
def test_networks_see_the_assignments_images(dataset_path, raw):
    """RGB, normalised as the assignment says, less the blue channel, which is 0."""
    images = []
    for e, name in ((0, "train1"), (1, "train2")):
        record = torch.load(dataset_path / "ColoredMNIST" / f"{name}.pt", weights_only=True)
        images.append(record["images"][[3, 8 + e]])
    rgb = torch.cat(images)[:, :2] / 255
    expected = (rgb if raw else (rgb - MEAN) / STD).flatten(1)
    split = Split(load_dataset(dataset_path).train, CPU, raw_pixels=raw)
    batch = next(split.part(torch.tensor([3, 8, 20003, 20009])).chunks())
    network = MLP(raw_pixels=raw)
    assert torch.allclose(network.paint(batch.images, batch.colors), expected, atol=1e-6)
    recolored = network.paint(batch.images, 1 - batch.colors).view(4, 2, 784)
    assert torch.allclose(recolored.flip(1).flatten(1), expected, atol=1e-6)
    gray = MLP(784, channels=1, raw_pixels=raw).paint(batch.images, batch.colors)
    brighter = expected.view(4, 2, 784).amax(1)
    assert torch.allclose(gray, brighter, atol=1e-6)


def test_in_both_colors_each_digit_comes_twice(dataset_path):
    split = Split(load_dataset(dataset_path).train, CPU).part(torch.arange(5, 105))
    twice = split.in_both_colors()
    parts = [twice.part(torch.arange(start, start + 100)) for start in (0, 100)]
    once, again, expected = (next(part.chunks()) for part in (*parts, split))
    assert len(twice) == 200 and torch.equal(again.colors, 1 - expected.colors)
    assert torch.equal(once.colors, expected.colors)
    for name in ("images", "labels", "envs"):
        for batch in (once, again):
            assert torch.equal(getattr(batch, name), getattr(expected, name))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_minibatches_cover_the_data_once_a_pass(dataset_path):
    everything = Split(load_dataset(dataset_path).train, CPU)
    everything.images[:, 0] = torch.arange(40000) % 251  # tells samples apart, nearly
    splits = [everything.hold_out(0.2, generator(seed)) for seed in (0, 1)]
    for split, held_out in splits:
        assert len(split) == 32000 and len(held_out) == 8000
        assert set(split.index.tolist()) | set(held_out.index.tolist()) == set(range(40000))
    parts = [split for split, _ in splits]
    batches = minibatches(parts, 3200, [generator(), generator()])
    first_pass = [next(batches) for _ in range(10)]
    batches = minibatches(parts, 3200, [generator(), generator()])
    first_pixels = torch.cat([next(batches).images[..., 0].clone() for _ in range(10)], 1)
    for part, pixels in zip(parts, first_pixels, strict=True):
        once = torch.cat([batch.images[:, 0].clone() for batch in part.chunks()])
        assert torch.equal(pixels.sort()[0], once.sort()[0])
    assert all(set(batch.envs.flatten().tolist()) == {0, 1} for batch in first_pass)
    assert all((batch.colors.diff(dim=1) <= 0).all() for batch in first_pass)  # red first
    assert not torch.equal(*first_pixels)


def test_images_are_moved(dataset_path):
    split = Split(load_dataset(dataset_path).train, CPU)
    pixels = split.images.view(-1, 28, 28)  # nothing at the edges, so nothing is lost there
    pixels[:, :2], pixels[:, -2:], pixels[:, :, :2], pixels[:, :, -2:] = 0, 0, 0, 0
    still = next(minibatches([split], 500, [generator()]))
    moved = next(minibatches([split], 500, [generator()], shift=2))
    assert torch.equal(still.labels, moved.labels)
    images, moved_images = still.images.view(500, 28, 28), moved.images.view(500, 28, 28)
    moves = collections.Counter()
    for image, moved_image in zip(images, moved_images, strict=True):
        (by,) = [
            (down, right)
            for down in range(-3, 4)
            for right in range(-3, 4)
            if torch.equal(image.roll((down, right), (0, 1)), moved_image)
        ]
        moves[by] += 1
    assert set(moves) == set(itertools.product(range(-2, 3), repeat=2))
    assert max(moves.values()) < 60
    # Without empty edges: rows run on, and no pixel comes from another image.
    full = torch.arange(1, 19, dtype=torch.uint8).view(2, 9).repeat(20, 1)
    for image, moved_image in zip(full, move(full, 1, [generator(0), generator(1)]), strict=True):
        padded = torch.nn.functional.pad(image, (4, 4)).unfold(0, 9, 1)
        assert any(torch.equal(window, moved_image) for window in padded)


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("recolored", [False, True])
def test_sorted_by_color_logits_and_gradients_are_the_same(dataset_path, raw, recolored):
    split = Split(load_dataset(dataset_path).train, CPU, raw_pixels=raw)
    batch = Batch(*(field[0] for field in next(minibatches([split], 1024, [generator()]))))
    colors = 1 - batch.colors if recolored else batch.colors
    assert 0 < colors.sum() < 1024
    mixed = next(split.part(torch.arange(1024)).chunks())
    results = []
    for known in (False, True):
        torch.manual_seed(0)
        network = MLP(bias=True, raw_pixels=raw)

        def logits(images, colors, network=network, known=known):
            return network(images, colors) if known else network(network.paint(images, colors))

        of_batch, of_mixed = logits(batch.images, colors), logits(mixed.images, mixed.colors)
        ERM()(of_batch, batch).backward()
        gradients = [parameter.grad for parameter in network.phi.parameters()]
        results.append([of_batch.detach(), of_mixed.detach(), *gradients])
    for plain, by_color in zip(*results, strict=True):
        assert torch.allclose(plain, by_color, atol=1e-5)


def trained(split, seeds=(0,), loss=ERM, **settings):
    """One network per seed, trained together; their first layers' weights."""
    runs = []
    for seed in seeds:
        torch.manual_seed(seed)
        runs.append(Run(seed, MLP(), split, None, generator(seed)))
    train(runs, loss(), **settings)
    return [run.network.phi[0].weight for run in runs]


def test_training_is_adam(dataset_path):
    """Against torch.optim.Adam and clip_grad_norm_, step by step."""
    split = Split(load_dataset(dataset_path).train, CPU)
    torch.manual_seed(0)
    network = MLP()
    optimizer = torch.optim.Adam(network.parameters(), 3e-3, eps=1e-3, weight_decay=0.1)
    batches = minibatches([split], 512, [generator()])
    for _ in range(5):
        batch = Batch(*(field[0] for field in next(batches)))
        optimizer.zero_grad()
        ERM()(network(batch.images, batch.colors), batch).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 0.1)
        optimizer.step()
    settings = {"learning_rate": 3e-3, "epsilon": 1e-3, "weight_decay": 0.1}
    (weight,) = trained(split, iteration=5, batch_size=512, max_gradient_norm=0.1, **settings)
    assert torch.allclose(weight, network.phi[0].weight, atol=1e-5)


def test_repetitions_in_lockstep_are_those_alone(dataset_path):
    split = Split(load_dataset(dataset_path).train, CPU)
    for loss in (GroupDRO, lambda: IRM(penalty="unbiased"), lambda: Backdoor("offset")):
        settings = {"iteration": 3, "loss": loss, "average_last": 0.67, "max_gradient_norm": 0.1}
        together = trained(split, (0, 1, 2), **settings)
        for seed, weight in enumerate(together):
            assert torch.allclose(weight, *trained(split, (seed,), **settings), atol=1e-5)


def test_averaging_gives_the_mean_of_the_last_weights(dataset_path):
    split = Split(load_dataset(dataset_path).train, CPU)

    def weights(iteration, average_last):
        return trained(split, iteration=iteration, average_last=average_last)[0]

    expected = (weights(3, 0) + weights(4, 0) + weights(5, 0)) / 3
    assert torch.allclose(weights(5, 0.6), expected, atol=1e-7)
    assert torch.equal(weights(5, 0.2), weights(5, 0))


def test_a_loss_that_mixes_repetitions_is_refused(dataset_path):
    class Mixing(ERM):
        def __call__(self, logits, batch):
            return super().__call__(logits, batch).mean()

    split = Split(load_dataset(dataset_path).train, CPU)
    with pytest.raises(UserError, match="Mixing .* last dimension"):
        trained(split, (0, 1), loss=Mixing, iteration=1)


def test_log(command, dataset_path):
    result = command("exp-mnist.py", "--trainer", "irm", "--dataset_path", dataset_path, *SHORT)
    summary(result)
    assert result.stderr == ""
    log = result.stdout
    for words in ("'trainer': 'IRM'", "'seed': 1234", "Device: CPU", "drawn with p_f 0.2"):
        assert words in log
    for iteration in (20, 40):
        for number in (1, 2):
            line = rf"^Repetition {number}, iteration {iteration}: loss of train1 [\d.]+, "
            line += r"train2 [\d.]+; validation \{'Accuracy': "
            assert len(re.findall(line, log, re.M)) == 1
    assert len(re.findall(r"^Test result: \{'Accuracy': [\d.]+, 'AUC': ", log, re.M)) == 2
    assert log.index("Mean flip rate: ") < log.index("Summary: ")


def test_same_command_same_summary(command, dataset_path):
    def run(seed):
        arguments = ("--trainer", "groupDRO", "--dataset_path", dataset_path, "--seed", seed)
        return command("exp-mnist.py", *arguments, "--drop_rate", 0.1, *SHORT).stdout

    assert run(5) == run(5)
    assert run(5).splitlines()[-1] != run(6).splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "low", "high"),
    [
        (("--trainer", "ERM"), 0.45, 0.55),
        (("--trainer", "groupDRO"), 0.67, 0.75),
        (("--trainer", "IRM"), 0.65, 0.75),
        (("--trainer", "Backdoor"), 0.76, 0.80),
        (("--trainer", "ERM", "--grayscale"), 0.765, 0.80),
    ],
)
def test_accuracy_with_default_hyperparameters(command, dataset_path, arguments, low, high):
    result = command("exp-mnist.py", "--no_cuda", "--dataset_path", dataset_path, *arguments)
    assert low < summary(result)["Accuracy_testmean"] < high
    flips = float(re.search(r"Mean flip rate: (\S+)", result.stdout)[1])
    if "--grayscale" in arguments:
        assert flips == 0
    elif "ERM" in arguments:
        assert flips > 0.25
    elif "Backdoor" in arguments:
        assert flips < 0.08


@pytest.mark.parametrize(
    "arguments",
    [
        ("--bias", "--batchnorm", "--drop_rate", 0.2, "--hidden_dim", 32, 16, 8),
        ("--network", "cnn", "--batch_size", 64),
        ("--grayscale", "--raw_pixels", "--image_size", 14, "--validation", 0, "--average_last", 0),
        ("--penalty", "plain", "--anneal_iterations", 2, "--weight_decay", 0.001, "--shift", 1),
    ],
)
def test_options_train(command, dataset_path, arguments):
    short = ("--iteration", 4, "--evaluation_steps", 2, "--repetitions", 1)
    everything = ("--trainer", "IRM", "--dataset_path", dataset_path, "--no_cuda", *short)
    summary(command("exp-mnist.py", *everything, *arguments))


def test_saved_model_gives_the_same_result(command, dataset_path, tmp_path):
    result = command(
        "exp-mnist.py", "--dataset_path", dataset_path, "--save_model", tmp_path / "a" / "b", *SHORT
    )
    expected = summary(result)["Accuracy_testmean"]
    test, scores = Split(load_dataset(dataset_path).test, CPU), []
    for path in sorted((tmp_path / "a" / "b").glob("*.pt")):
        saved = torch.load(path, weights_only=True)
        network = MLP()
        network.load_state_dict(saved["state_dict"])
        assert path.stat().st_size < 1.1 * 4 * sum(p.numel() for p in network.parameters())
        scores.append(metrics(predict(network, test), test.labels)["Accuracy"])
        assert saved["arguments"]["seed"] == 1234
    assert len(scores) == 2 and np.mean(scores) == expected


def test_a_loss_of_ones_own_takes_ten_lines(command, dataset_path, tmp_path):
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[1]
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    (tmp_path / "vrex.py").write_text(code)
    plugin = ("--plugin", tmp_path / "vrex.py", "--trainer", "vrex", "--reg_lambda", 1000)
    arguments = ("--dataset_path", dataset_path, "--no_cuda", "--repetitions", 1)
    accuracy = summary(command("exp-mnist.py", *plugin, *arguments))["Accuracy_testmean"]
    assert accuracy > 0.6  # ERM is at 0.5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--trainer", "DRO"), ("'DRO'", "ERM, groupDRO, IRM")),
        (("--network", "RNN"), ("'RNN'", "MLP")),
        (("--batch_size", 0), ("--batch_size", "'0'")),
        (("--batch_size", "1.5"), ("--batch_size", "whole number")),
        (("--iteration", -1), ("--iteration",)),
        (("--repetitions", 0), ("--repetitions",)),
        (("--evaluation_steps", 0), ("--evaluation_steps",)),
        (("--hidden_dim", 64, 0), ("--hidden_dim",)),
        (("--learning_rate", "nan"), ("--learning_rate", "nan")),
        (("--learning_rate", 0), ("--learning_rate",)),
        (("--epsilon", 0), ("--epsilon",)),
        (("--shift", 14), ("--shift", "13")),
        (("--weight_decay", -1), ("--weight_decay",)),
        (("--drop_rate", 1), ("--drop_rate",)),
        (("--eta", "inf"), ("--eta",)),
        (("--reg_lambda", "many"), ("--reg_lambda", "'many'")),
        (("--average_last", -1), ("--average_last",)),
        (("--anneal_iterations", -1), ("--anneal_iterations",)),
        (("--validation", 1), ("--validation",)),
        (("--seed", -1), ("--seed",)),
        (("--data_seed", "x"), ("--data_seed",)),
        (("--p_f", 1.1), ("--p_f",)),
        (("--p_e", 0.1, 0.4), ("--p_e",)),
        (("--sizes", 100, 100, 100), ("[20000, 20000, 20000]", "[100, 100, 100]")),
        (("--image_size", 27), ("--image_size",)),
        (("--penalty", "none"), ("--penalty",)),
        (("--network", "CNN", "--image_size", 14), ("CNN", "28")),
        (("--plugin", "no/such/file.py"), ("--plugin", "file.py")),
        (("--save_model", "README.md"), ("folder", "README.md")),
        (("--dataset_path", "README.md"), ("README.md",)),
        (("--dataset_path", "/proc/none"), ("/proc/none",)),
        (("--unknown", 1), ("--unknown",)),
    ],
)
def test_nonsense_is_refused_in_one_line(command, dataset_path, arguments, words):
    given = () if "--dataset_path" in arguments else ("--dataset_path", dataset_path)
    assert_one_line(command("exp-mnist.py", *given, *arguments), *words)


def test_divergence_is_reported(command, dataset_path):
    arguments = ("--dataset_path", dataset_path, "--learning_rate", 1e30, "--trainer", "IRM")
    assert_one_line(command("exp-mnist.py", *arguments), "diverged", "iteration", "--learning_rate")
    with pytest.raises(UserError, match="a weight is nan or infinite at iteration 1"):
        split = Split(load_dataset(dataset_path).train, CPU)
        trained(split, iteration=1, learning_rate=1e39)


def test_help_explains_every_flag(command):
    text = command("exp-mnist.py", "--help").stdout
    blocks = re.split(r"\n  (?=-)", text)[1:]
    assert len(blocks) > 25
    for block in blocks:
        assert len(block.split("  ")) > 1, f"no explanation: {block}"


def test_run_script_grades(tmp_path):
    """The table of run.sh, from logs with known summaries."""
    import subprocess

    script = (ROOT / "run.sh").read_text()
    row = script[script.index("row() {") : script.index("\nset_up\n")]
    logs = {"groupDRO": 0.6, "IRM": 0.5999, "ERM": 0.7, "low": 0.1}
    for name, accuracy in logs.items():
        (tmp_path / name).write_text(
            f"Summary: {{'Accuracy_testmean': {accuracy}, 'Accuracy_teststd': 0.01, 'AUC_testm"
            "ean': 1.0}\n"
        )
    table = "; ".join(f"row {name} {tmp_path / name}" for name in ("groupDRO", "IRM", "ERM"))
    printed = subprocess.run(
        ["bash", "-c", f"{row}\n{table}"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert [line.split()[-1] for line in printed] == ["15", "10", "-"]
    assert "60.00 % ±  1.00" in printed[0]
