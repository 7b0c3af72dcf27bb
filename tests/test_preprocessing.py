"""The environments that are drawn, and where their digits come from."""

import numpy as np
import pytest
import torch
from conftest import ROOT, assert_one_line, assert_refused, same

import preprocessing
from dataset import ColoredMNIST, load_dataset
from preprocessing import UserError, color_digits, draw_environments, load_mnist


def test_environments_follow_the_assignment(dataset_path, mnist):
    images, digits = mnist
    for e, (name, p_e) in enumerate(
        zip(("train1", "train2", "test"), (0.1, 0.4, 0.9), strict=True)
    ):
        record = torch.load(dataset_path / "ColoredMNIST" / f"{name}.pt", weights_only=True)
        part = slice(20000 * e, 20000 * (e + 1))
        labels, colors, rgb = (record[key] for key in ("labels", "colors", "images"))
        assert rgb.shape == (20000, 3, 28, 28) and rgb.dtype == torch.uint8
        # Three standard deviations of a proportion among 20,000 are 0.011 at most.
        assert abs((labels != (digits[part] >= 5)).float().mean() - 0.2) < 0.011
        assert abs((colors != labels).float().mean() - p_e) < 0.011
        assert torch.equal(rgb.sum(1, dtype=torch.uint8), images[part])
        red = colors == 1
        assert torch.equal(rgb[red, 0], images[part][red]) and not rgb[red, 1:].any()
        assert torch.equal(rgb[~red, 1], images[part][~red]) and not rgb[~red, 0].any()


@pytest.mark.parametrize(("p_f", "p_e"), [(0, 0), (1, 0), (0, 1)])
def test_certain_flips(p_f, p_e):
    record = color_digits(
        torch.ones(10, 28, 28, dtype=torch.uint8), torch.arange(10), p_f, p_e, torch.Generator()
    )
    expected = (torch.arange(10) >= 5) ^ bool(p_f)
    assert torch.equal(record["labels"].bool(), expected)
    assert torch.equal(record["colors"].bool(), expected ^ bool(p_e))


def grey(digits):
    return digits.images.amax(1)


def test_drawn_once_and_anew_when_deleted(tmp_path):
    first = load_dataset(tmp_path, seed=1)
    assert same(load_dataset(tmp_path, seed=2).test, first.test)
    preprocessing.remove(tmp_path / "ColoredMNIST")
    again = load_dataset(tmp_path, seed=2)
    assert not torch.equal(again.test.labels, first.test.labels)
    assert torch.equal(grey(again.test), grey(first.test))


def test_same_seed_same_files(tmp_path):
    folders = [tmp_path / name for name in ("first", "second", "third")]
    for folder, seed in zip(folders, (4, 4, 5), strict=True):
        draw_environments(folder, sizes=(30, 20, 10), seed=seed)
    files = [(folder / "ColoredMNIST" / "train1.pt").read_bytes() for folder in folders]
    assert files[0] == files[1] != files[2]


def test_sizes_of_the_environments(in_process, tmp_path):
    asked = ("--dataset_path", tmp_path, "--sizes", 30, 20, 10)
    assert in_process("preprocessing.py", *asked).returncode == 0
    data = load_dataset(tmp_path)
    assert data.training.envs.bincount().tolist() == [30, 20] and len(data.test) == 10
    digits = torch.cat([grey(data.training), grey(data.test)])
    assert torch.equal(digits, load_mnist()[0][:60])
    too_many = in_process("preprocessing.py", "--dataset_path", tmp_path / "new", *asked[2:-1], 6e4)
    assert_refused(too_many, "--sizes")
    too_many = in_process(
        "preprocessing.py", "--dataset_path", tmp_path / "new", *asked[2:-1], 60000
    )
    assert_one_line(too_many, "--sizes", "60050")
    assert not (tmp_path / "new").exists()


def test_shuffled_digits(in_process, tmp_path):
    asked = ("--dataset_path", tmp_path, "--sizes", 40, 30, 10)
    assert in_process("preprocessing.py", *asked, "--shuffle_digits").returncode == 0
    data, images = load_dataset(tmp_path), load_mnist()[0]
    assert "shuffle_digits true" in data.description
    assert not torch.equal(grey(data.training), images[:70])
    of_image = (grey(data.training).unsqueeze(1) == images[:70]).flatten(2).all(2)
    assert of_image.sum(0).eq(1).all()  # each of the first 70 digits, once
    assert of_image[:40, 40:].any()  # and some of them in the other environment
    assert torch.equal(grey(data.test), images[70:80])
    draw_environments(tmp_path / "other", seed=5, sizes=(40, 30, 10), shuffle_digits=True)
    assert not torch.equal(grey(load_dataset(tmp_path / "other").training), grey(data.training))


def test_command_draws_what_it_is_asked_for(in_process, tmp_path):
    asked = ("--p_f", 0.25, "--p_e", 0.2, 0.1, 0.9, "--seed", 5, "--sizes", 2000, 2000, 2000)
    result = in_process("preprocessing.py", "--dataset_path", tmp_path, *asked)
    assert result.returncode == 0 and result.stderr == ""
    assert str(tmp_path / "ColoredMNIST") in result.stdout
    data = load_dataset(tmp_path)
    assert "p_f 0.25, p_e [0.2, 0.1, 0.9], shuffle_digits false, seed 5" in data.description
    # Three standard deviations of a proportion among 2000 are 0.034 at most.
    agree = (data.training.colors == data.training.labels).float().split(2000)
    assert abs(agree[0].mean() - 0.8) < 0.034 and abs(agree[1].mean() - 0.9) < 0.034
    assert len(ColoredMNIST(tmp_path, "test")) == 2000  # whatever it was drawn with


def test_command_refuses_to_draw_where_data_are(in_process, tmp_path):
    asked = ("--dataset_path", tmp_path, "--sizes", 30, 20, 10)
    assert in_process("preprocessing.py", *asked).returncode == 0
    folder = tmp_path / "ColoredMNIST"
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert_one_line(in_process("preprocessing.py", *asked), folder, "is there", "delete it")
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    for path in folder.iterdir():  # one file of a user's own is enough
        path.unlink()
    (folder / "train1.pt").write_bytes(b"mine")
    assert_one_line(in_process("preprocessing.py", *asked), folder, "delete it")
    assert [path.read_bytes() for path in folder.iterdir()] == [b"mine"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--p_f", 1.1), ("--p_f", "from 0 to 1")),
        (("--p_e", 0.1, 0.4), ("--p_e",)),
        (("--p_e", 0.1, 0.4, "nan"), ("--p_e", "'nan'")),
        (("--sizes", 1, 20, 20), ("--sizes", "whole number from 2")),
        (("--seed", -1), ("--seed",)),
        (("--seed", "x"), ("--seed", "'x'")),
        (("--trainer", "IRM"), ("--trainer",)),
    ],
)
def test_nonsense_is_refused(in_process, tmp_path, arguments, words):
    result = in_process("preprocessing.py", "--dataset_path", tmp_path / "new", *arguments)
    assert_refused(result, *words)
    assert not (tmp_path / "new").exists()


def test_dataset_interface(dataset_path):
    dataset = ColoredMNIST(root=dataset_path, env="train2")
    image, target, color = dataset[5]
    assert len(dataset) == 20000 and image.mode == "RGB" and image.size == (28, 28)
    pixels = np.asarray(image)
    assert pixels[..., 1 - color].any() and not pixels[..., color].any()
    record = torch.load(dataset_path / "ColoredMNIST" / "train2.pt", weights_only=True)
    assert np.array_equal(pixels, record["images"][5].movedim(0, 2).numpy())
    assert (target, color) == (int(record["labels"][5]), int(record["colors"][5]))
    from torchvision.transforms import ToTensor

    changed = ColoredMNIST(dataset_path, "train2", ToTensor(), target_transform=lambda y: 10 + y)
    tensor, changed_target, _ = changed[5]
    assert tensor.shape == (3, 28, 28) and changed_target == 10 + target
    assert len(ColoredMNIST(dataset_path, "all_train")) == 40000
    with pytest.raises(ValueError, match="all_train"):
        ColoredMNIST(dataset_path, "train3")


def test_both_parts_of_mnist(mnist, tmp_path):
    images, digits = mnist
    assert images.shape == (60000, 28, 28) and digits.bincount().min() > 5000
    unseen, unseen_digits = load_mnist("test")
    assert unseen.shape == (10000, 28, 28) and unseen.dtype == torch.uint8
    assert unseen_digits.shape == (10000,) and unseen_digits.bincount().min() > 800
    with np.load(ROOT / "data" / "mnist.npz") as archive:
        assert np.array_equal(unseen.numpy(), archive["x_test"])


def test_digits_that_are_missing_or_damaged_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(preprocessing, "MNIST", tmp_path / "mnist.npz")
    with pytest.raises(UserError, match="mnist.npz is missing or damaged"):
        load_dataset(tmp_path)
    whole = preprocessing.Path(ROOT / "data" / "mnist.npz").read_bytes()
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 1
    for content in (whole[: len(whole) // 2], damaged):
        (tmp_path / "mnist.npz").write_bytes(content)
        with pytest.raises(UserError, match="mnist.npz is missing or damaged"):
            load_dataset(tmp_path)
    assert not (tmp_path / "ColoredMNIST").exists()


def test_the_folder_around_may_have_the_same_name(tmp_path):
    """Such as a clone of the project into a folder ColoredMNIST."""
    around = tmp_path / "ColoredMNIST"
    assert draw_environments(around, sizes=(60, 60, 60))
    assert len(load_dataset(around).test) == 60


@pytest.mark.parametrize("script", ["preprocessing.py", "exp-mnist.py"])
def test_the_folder_around_is_wanted(in_process, dataset_path, script):
    """Not ColoredMNIST itself, in which other data would be drawn, and read in silence."""
    result = in_process(script, "--dataset_path", dataset_path / "ColoredMNIST")
    assert_one_line(result, "--dataset_path is the folder around ColoredMNIST")
    assert not (dataset_path / "ColoredMNIST" / "ColoredMNIST").exists()
