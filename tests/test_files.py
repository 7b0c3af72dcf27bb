"""The three file formats, the samples read from them, and files that are refused."""

import os
import pickle
import random
import shutil

import numpy as np
import pytest
import torch
from conftest import assert_one_line, same
from PIL import Image

from dataset import MEAN, STD, ColoredMNIST, load_data, unseen_samples
from preprocessing import ENVIRONMENTS, UserError, color_digits, load_mnist


@pytest.fixture
def folder(small_files, tmp_path):
    """A copy of the small files, to be changed."""
    return shutil.copytree(small_files, tmp_path / "ColoredMNIST")


def read(folder, name):
    return torch.load(folder / f"{name}.pt", weights_only=True)


def pil_images(record):
    """Return a record of the project's format as a list of (PIL image, label, colour is red)."""
    images = map(Image.fromarray, record["images"].permute(0, 2, 3, 1).numpy())
    labels, colors = record["labels"].tolist(), map(bool, record["colors"].tolist())
    return list(zip(images, labels, colors, strict=True))


@pytest.fixture(scope="session")
def course_project(small_files, tmp_path_factory):
    """The small files in the course project's format."""
    folder = tmp_path_factory.mktemp("project") / "ColoredMNIST"
    folder.mkdir()
    for name in ENVIRONMENTS:
        torch.save(pil_images(read(small_files, name)), folder / f"{name}.pt")
    return folder


@pytest.fixture(scope="session")
def download(small_files, tmp_path_factory):
    """The small files in the format of the assignment's download, every other one in val.pt."""
    folder = tmp_path_factory.mktemp("download") / "ColoredMNIST"
    folder.mkdir()
    records = [read(small_files, name) for name in ENVIRONMENTS]
    mean = torch.tensor([MEAN, MEAN, 0]).view(3, 1, 1)
    images = [((record["images"] / 255 - mean) / STD).flatten(1) for record in records]
    labels = [record["labels"].float() for record in records]
    training = [torch.cat(images[:2]), torch.cat(labels[:2]), torch.arange(120) // 60]
    torch.save([tensor[::2] for tensor in training], folder / "train.pt")
    torch.save([tensor[1::2] for tensor in training], folder / "val.pt")
    torch.save([images[2], labels[2]], folder / "test.pt")
    return folder


# The formats.


def test_the_projects_format(small_files, mnist):
    data = load_data(small_files.parent)
    assert data.description == f"{small_files}, p_f 0.2, p_e [0.1, 0.4, 0.9], seed 3"
    assert data.seed == 3 and data.folder == small_files and data.validation is None
    samples = data.training
    assert samples.images.shape == (120, 2, 28, 28) and samples.images.dtype == torch.uint8
    assert samples.labels.dtype == torch.float32
    assert samples.colors.dtype == samples.envs.dtype == torch.int64
    assert samples.envs.tolist() == [0] * 60 + [1] * 60 and data.test.envs.tolist() == [2] * 60
    digits = torch.cat([samples.images, data.test.images])
    assert torch.equal(digits.amax(1), mnist[0][:180])
    records = [read(small_files, name) for name in ENVIRONMENTS]
    for e, part in enumerate((samples[:60], samples[60:], data.test)):
        assert torch.equal(part.images, records[e]["images"][:, :2])
        assert torch.equal(part.labels, records[e]["labels"].float())
        assert torch.equal(part.colors, records[e]["colors"].long())


def test_folders_of_earlier_versions(folder, small_files):
    """Their files have two more keys."""
    for name in ENVIRONMENTS:
        record = read(folder, name) | {"sizes": [60, 60, 60], "shuffle_digits": False}
        torch.save(record, folder / f"{name}.pt")
    ours, theirs = load_data(small_files.parent), load_data(folder.parent)
    assert same(ours.training, theirs.training) and same(ours.test, theirs.test)
    assert theirs.seed == 3


def test_the_course_projects_format(course_project, small_files):
    ours, theirs = load_data(small_files.parent), load_data(course_project.parent)
    assert theirs.description == f"{course_project}, the course project's PIL images"
    assert theirs.seed is None and theirs.validation is None
    assert same(ours.training, theirs.training) and same(ours.test, theirs.test)


def test_the_assignments_download(download, small_files):
    """val.pt has the validation samples, so nothing is held out."""
    ours, theirs = load_data(small_files.parent), load_data(download.parent)
    assert theirs.description == f"{download}, the course's normalised tensors"
    assert theirs.seed is None and same(ours.test, theirs.test)
    for fraction in (0, 0.5):
        training, validation = theirs.hold_out(fraction)
        assert same(training, ours.training[torch.arange(0, 120, 2)])
        assert same(validation, ours.training[torch.arange(1, 120, 2)])


@pytest.mark.parametrize("fixture", ["course_project", "download"])
def test_a_log_names_the_format(request, in_process, fixture):
    folder = request.getfixturevalue(fixture)
    flags = ("--no_cuda", "--iteration", 2, "--evaluation_steps", 1, "--repetitions", 1)
    result = in_process("exp-mnist.py", "--dataset_path", folder.parent, *flags)
    assert result.returncode == 0 and result.stderr == ""
    assert f"\nData: {load_data(folder.parent).description}\n" in result.stdout
    assert result.stdout.splitlines()[-1].startswith("Summary: ")


def test_the_interface_of_torchvisions_datasets(small_files, download):
    train2, record = ColoredMNIST(small_files.parent, "train2"), read(small_files, "train2")
    assert len(train2) == 60 and train2.targets.dtype == torch.int64
    assert torch.equal(train2.targets, record["labels"].long())
    for index in (0, 5, 59):
        image, label, color = train2[index]
        assert image.mode == "RGB" and image.size == (28, 28)
        assert np.array_equal(np.asarray(image), record["images"][index].movedim(0, 2).numpy())
        assert (label, color) == (record["labels"][index], record["colors"][index])
        assert type(label) is type(color) is int
    changed = ColoredMNIST(small_files.parent, "train2", np.asarray, lambda label: 10 + label)
    assert np.array_equal(changed[59][0], np.asarray(image)) and changed[59][1] == 10 + label
    for path in (small_files.parent, download.parent):
        lengths = [len(ColoredMNIST(path, env)) for env in ("train1", "train2", "test")]
        assert lengths == [60, 60, 60]
        assert ColoredMNIST(path, "all_train").targets.shape == (120,)
    with pytest.raises(ValueError, match="'train3'. Use train1, train2, test or all_train"):
        ColoredMNIST(small_files.parent, "train3")


# Files that are refused.


def assert_file_refused(folder, name):
    """Assert that the data are refused with a message that names the file and the fix."""
    with pytest.raises(UserError) as error:
        load_data(folder.parent)
    assert str(error.value) == (
        f"{folder / name} is corrupt, or it is not an environment in one of the three known "
        f"formats. Delete {folder} to generate the data again."
    )


def test_a_refused_file_is_one_line_of_the_command(in_process, folder):
    (folder / "test.pt").write_bytes(b"mine")
    result = in_process("exp-mnist.py", "--dataset_path", folder.parent)
    assert_one_line(result, folder / "test.pt", f"Delete {folder} to generate the data again")


def test_truncated_and_unrelated_files_are_refused(folder, small_files):
    whole = (small_files / "train1.pt").read_bytes()
    chosen = random.Random(0)
    cuts = [whole[: chosen.randrange(len(whole))] for _ in range(10)]
    for content in (whole[:-1], b"x" + whole, b"hello", b"", *cuts):
        (folder / "train1.pt").write_bytes(content)
        assert_file_refused(folder, "train1.pt")


def test_a_flipped_bit_is_refused_or_without_effect(folder):
    """Not every bit matters, for example in the dates of the archive."""
    expected, path = load_data(folder.parent).test, folder / "test.pt"
    whole, chosen, refused = path.read_bytes(), random.Random(0), 0
    for _ in range(60):
        flipped = bytearray(whole)
        flipped[chosen.randrange(len(whole))] ^= 1 << chosen.randrange(8)
        path.write_bytes(flipped)
        try:
            assert same(load_data(folder.parent).test, expected)
        except UserError:
            refused += 1
            assert_file_refused(folder, "test.pt")
    assert refused > 50  # most of the bytes are pixels


class Hostile:
    """An object whose pickle creates a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("write", [torch.save, lambda content, path: path.write_bytes(content)])
def test_code_in_a_file_is_not_run(folder, tmp_path, write):
    trap = tmp_path / "trapped"
    for content in (Hostile(trap), [(Hostile(trap), 1, True)] * 3, {"images": Hostile(trap)}):
        content = content if write is torch.save else pickle.dumps(content)
        write(content, folder / "train1.pt")
        assert_file_refused(folder, "train1.pt")
    assert not trap.exists()


def test_torchs_format_without_zip_is_refused(folder):
    """It has no checksums."""
    record = read(folder, "test")
    torch.save(record, folder / "test.pt", _use_new_zipfile_serialization=False)
    assert_file_refused(folder, "test.pt")


def test_a_file_that_cannot_be_read(folder):
    (folder / "test.pt").unlink()
    (folder / "test.pt").mkdir()
    with pytest.raises(UserError, match=f"cannot read {folder / 'test.pt'}: Is a directory"):
        load_data(folder.parent)


def test_a_file_of_another_environment_is_refused(folder):
    """Otherwise the test environment would have training digits."""
    shutil.copy(folder / "train1.pt", folder / "test.pt")
    assert_file_refused(folder, "test.pt")


def test_missing_and_additional_files_are_refused(in_process, folder, download):
    def assert_names_refused():
        result = in_process("exp-mnist.py", "--dataset_path", folder.parent)
        files = "must have train1.pt, train2.pt and test.pt, or train.pt, val.pt and test.pt"
        assert_one_line(result, f"{folder} {files}", f"Delete {folder} to generate")

    shutil.copy(folder / "train1.pt", folder / "train3.pt")
    assert_names_refused()
    (folder / "train3.pt").rename(folder / "notes.txt")
    load_data(folder.parent)
    (folder / "train2.pt").unlink()
    assert_names_refused()
    shutil.copy(download / "train.pt", folder)
    shutil.copy(download / "val.pt", folder)
    assert_names_refused()
    (folder / "train1.pt").unlink()
    load_data(folder.parent)


def test_one_training_environment_is_refused(download, tmp_path):
    """groupDRO and IRM need two."""
    folder = shutil.copytree(download, tmp_path / "ColoredMNIST")
    images, labels, envs = read(folder, "train")
    torch.save([images, labels, torch.zeros_like(envs)], folder / "train.pt")
    with pytest.raises(UserError, match="has one training environment, .* Delete .* to generate"):
        load_data(folder.parent)


BLACK = torch.zeros(4, 3, 28, 28, dtype=torch.uint8)
GREEN = BLACK.clone()
GREEN[1, 1, 5, 5] = 9
BLUE = BLACK.clone()
BLUE[1, 2, 5, 5] = 9


def record(**changed):
    """Return a record of the project's format with four samples, the second one red."""
    bits = torch.tensor([0, 1, 0, 1], dtype=torch.uint8)
    settings = {"environment": "train2", "p_f": 0.2, "p_e": [0.1, 0.4, 0.9], "seed": 3}
    return {"images": BLACK, "labels": bits, "colors": bits} | settings | changed


def image(mode="RGB", size=(28, 28), color=0):
    return Image.new(mode, size, color)


def test_the_unchanged_records_are_accepted(folder):
    for content in (record(), [(image(), 0, False), (image(color=(9, 0, 0)), 1, True)] * 2):
        torch.save(content, folder / "train2.pt")
        assert len(load_data(folder.parent).training) == 64


@pytest.mark.parametrize(
    "content",
    [
        record(labels=torch.tensor([0, 1, 2, 1])),
        record(labels=torch.tensor([0, 1, torch.nan, 1])),
        record(labels=torch.tensor([0, 1, 1])),
        record(labels=[0, 1, 0, 1]),
        record(colors=torch.tensor([0, 1, 2, 1])),
        record(colors=torch.tensor([[0, 1, 0, 1]])),
        record(colors=torch.tensor([0])),
        record(images=BLACK.float()),
        record(images=BLACK[..., :27]),
        record(images=BLACK.flatten(1)),
        record(images=GREEN),  # a digit in the channel of the other colour
        record(images=BLUE),
        record(images="none"),
        record(environment="test"),
        {"images": BLACK},
        {},
        [],
        [1, 2, 3],
        None,
        torch.zeros(3),
        np.zeros(3),
        [torch.zeros(4, 2352), torch.zeros(4), torch.zeros(4)],  # the format of another set
        [(image(), 1, True)],
        [(image(), 1)] * 3,
        [(image(), 1, True, 7)] * 3,
        [(image(), 1, True), (image(), 1)],
        [(image(), 1, True), (image(), 1, True, 7)],
        [(image(color=(0, 9, 0)), 1, True)] * 3,
        [(image(color=(9, 9, 0)), 1, True)] * 3,
        [(image(), 7, True)] * 3,
        [(image(), 1, 2)] * 3,
        [(image(), 0.5, True)] * 3,
        [(image(), "1", True)] * 3,
        [(image("L"), 1, True)] * 3,
        [(image("HSV"), 1, True)] * 3,
        [(image(size=(14, 56)), 1, True)] * 3,
        [(torch.zeros(3), 1, True)] * 3,
        [(image(), 1, True), 5],
    ],
)
def test_invalid_contents_are_refused(folder, content):
    torch.save(content, folder / "train2.pt")
    assert_file_refused(folder, "train2.pt")


@pytest.mark.parametrize(
    "change",
    [
        lambda images, labels, envs: [images, labels],
        lambda images, labels, envs: [images[:, :2351], labels, envs],
        lambda images, labels, envs: [images + 0.003, labels, envs],  # a quarter of a grey level
        lambda images, labels, envs: [images * torch.nan, labels, envs],
        lambda images, labels, envs: [images * 2, labels, envs],
        lambda images, labels, envs: [images, labels + 1, envs],
        lambda images, labels, envs: [images, labels[:, None], envs],
        lambda images, labels, envs: [images, labels, envs + 2],
        lambda images, labels, envs: [images, labels, envs[:-1]],
        lambda images, labels, envs: [images.flip(1), labels, envs],
    ],
)
def test_invalid_normalised_contents_are_refused(download, tmp_path, change):
    folder = shutil.copytree(download, tmp_path / "ColoredMNIST")
    torch.save(change(*read(folder, "val")), folder / "val.pt")
    assert_file_refused(folder, "val.pt")


# Unseen digits.


def test_unseen_samples_are_a_test_environment_of_mnists_test_digits():
    unseen = unseen_samples()
    images, digits = load_mnist("test")
    assert torch.equal(unseen.images.amax(1), images) and unseen.envs.eq(2).all()
    # Three standard deviations of a fraction of 10,000 samples are at most 0.015.
    assert abs((unseen.labels != (digits >= 5)).float().mean() - 0.2) < 0.015
    assert abs((unseen.colors != unseen.labels).float().mean() - 0.9) < 0.015
    assert same(unseen_samples(), unseen)
    # The published results are of this seed, the first one that is no student ID.
    expected = color_digits(images, digits, 0.2, 0.9, torch.Generator().manual_seed(10000))
    assert torch.equal(unseen.labels, expected["labels"].float())
    assert torch.equal(unseen.colors, expected["colors"].long())


def test_unseen_samples_with_other_probabilities():
    unseen = unseen_samples(p_f=0, p_e=0)
    assert torch.equal(unseen.labels, (load_mnist("test")[1] >= 5).float())
    assert torch.equal(unseen.labels, unseen.colors.float())
