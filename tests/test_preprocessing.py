"""Generating the data: the environments, the command, and runs that end early or run at once."""

import argparse
import gzip
import hashlib
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import ROOT, assert_one_line, assert_refused, same
from torchvision.datasets import MNIST

import preprocessing
from dataset import ColoredMNIST, load_data
from preprocessing import (
    ENVIRONMENTS,
    UserError,
    color_digits,
    generate_environments,
    load_mnist,
    number,
    replacing,
)


@pytest.fixture(scope="session")
def small_mnist(tmp_path_factory):
    """A folder with an mnist.npz of 300 training digits and 300 test digits."""
    folder = tmp_path_factory.mktemp("mnist")
    with np.load(ROOT / "data" / "mnist.npz") as archive:
        np.savez(folder / "mnist.npz", **{key: archive[key][:300] for key in archive})
    return folder


@pytest.fixture
def few_digits(small_mnist, monkeypatch):
    """Generate data in this process from 300 digits, so that each environment has 100."""
    monkeypatch.setattr(preprocessing, "DATA", small_mnist)


def grey(samples):
    """Return the grey levels of the digits."""
    return samples.images.amax(1)


def contents(path):
    """Return the content of each file in a folder, locks excepted."""
    files = [file for file in path.rglob("*") if file.is_file() and file.suffix != ".lock"]
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in files}


# The environments.


def test_environments_follow_the_assignment(dataset_path, mnist):
    images, digits = mnist
    for e, (name, p_e) in enumerate(zip(ENVIRONMENTS, (0.1, 0.4, 0.9), strict=True)):
        record = torch.load(dataset_path / "ColoredMNIST" / f"{name}.pt", weights_only=True)
        part = slice(20000 * e, 20000 * (e + 1))
        labels, colors, rgb = (record[key] for key in ("labels", "colors", "images"))
        assert rgb.shape == (20000, 3, 28, 28)
        assert rgb.dtype == labels.dtype == colors.dtype == torch.uint8
        # Three standard deviations of a fraction of 20,000 samples are at most 0.011.
        assert abs((labels != (digits[part] >= 5)).float().mean() - 0.2) < 0.011
        assert abs((colors != labels).float().mean() - p_e) < 0.011
        red = colors == 1
        assert torch.equal(rgb[red, 0], images[part][red]) and not rgb[red, 1:].any()
        assert torch.equal(rgb[~red, 1], images[part][~red])
        assert not rgb[~red, 0].any() and not rgb[~red, 2].any()


@pytest.mark.parametrize(("p_f", "p_e"), [(0, 0), (1, 0), (0, 1)])
def test_certain_flips(p_f, p_e):
    images, digits = torch.ones(10, 28, 28, dtype=torch.uint8), torch.arange(10)
    record = color_digits(images, digits, p_f, p_e, torch.Generator())
    labels = (digits >= 5) ^ bool(p_f)
    assert torch.equal(record["labels"].bool(), labels)
    assert torch.equal(record["colors"].bool(), labels ^ bool(p_e))


@pytest.mark.parametrize("shuffle_digits", [False, True])
def test_a_seed_always_gives_the_same_files(few_digits, tmp_path, shuffle_digits):
    for name, seed in (("first", 4), ("second", 4), ("other", 5)):
        generate_environments(tmp_path / name, seed=seed, shuffle_digits=shuffle_digits)
    first, second, other = (contents(tmp_path / name) for name in ("first", "second", "other"))
    assert first == second and len(first) == 3
    assert all(first[name] != other[name] for name in first)


def test_digits_are_in_the_order_of_mnist(few_digits, tmp_path):
    images, _ = load_mnist()
    for sizes, expected in ((None, (100, 100, 100)), ((30, 20, 10), (30, 20, 10))):
        path = tmp_path / str(sizes)
        generate_environments(path, sizes=sizes)
        data = load_data(path)
        assert (*data.training.envs.bincount().tolist(), len(data.test)) == expected
        digits = torch.cat([grey(data.training), grey(data.test)])
        assert torch.equal(digits, images[: sum(expected)])


def test_shuffled_digits_are_divided_between_both_training_environments(few_digits, tmp_path):
    images, _ = load_mnist()
    generate_environments(tmp_path, sizes=(40, 30, 10), shuffle_digits=True)
    data = load_data(tmp_path)
    is_digit = (grey(data.training).unsqueeze(1) == images[:70]).flatten(2).all(2)
    assert is_digit.sum(0).eq(1).all()  # each of the first 70 digits, once
    assert is_digit[:40, 40:].any()
    assert torch.equal(grey(data.test), images[70:80])


def test_data_are_generated_once_and_again_when_deleted(few_digits, tmp_path):
    first = load_data(tmp_path, seed=1)
    folder = tmp_path / "ColoredMNIST"
    settings = f"{folder}, p_f 0.2, p_e [0.1, 0.4, 0.9], seed 1"
    assert first.seed == 1 and first.description == settings
    again = load_data(tmp_path, seed=2)
    assert same(again.training, first.training) and same(again.test, first.test)
    assert again.seed == 1 and again.description == settings
    for file in folder.iterdir():
        file.unlink()
    other = load_data(tmp_path, seed=2)  # an empty folder counts as absent
    assert other.seed == 2 and not torch.equal(other.test.labels, first.test.labels)


# The command.


def test_the_command_generates_with_its_flags(few_digits, in_process, tmp_path):
    flags = ("--p_f", 1, "--p_e", 0, 1, 0, "--seed", 5)
    result = in_process("preprocessing.py", "--dataset_path", tmp_path, *flags)
    assert result.returncode == 0 and result.stderr == ""
    assert result.stdout == f"Generated: {tmp_path / 'ColoredMNIST'}\n"
    data = load_data(tmp_path)
    assert data.description.endswith(", p_f 1.0, p_e [0.0, 1.0, 0.0], seed 5")
    digits = load_mnist()[1]
    assert torch.equal(data.training.labels, (digits[:200] < 5).float())
    assert torch.equal(data.training.colors != data.training.labels, torch.arange(200) >= 100)
    assert torch.equal(data.test.colors, data.test.labels.long())


def test_the_command_has_the_defaults_of_the_function(few_digits, in_process, tmp_path):
    assert in_process("preprocessing.py", "--dataset_path", tmp_path / "a").returncode == 0
    assert generate_environments(tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_the_command_refuses_an_existing_folder(in_process, tmp_path):
    folder = tmp_path / "ColoredMNIST"
    folder.mkdir()
    (folder / "train1.pt").write_text("a file of the user")
    result = in_process("preprocessing.py", "--dataset_path", tmp_path)
    assert_one_line(result, f"{folder} exists. Delete it, or use another --dataset_path.")
    assert contents(folder) == {"train1.pt": b"a file of the user"}


def test_help_of_the_command(in_process):
    result = in_process("preprocessing.py", "--help")
    assert result.returncode == 0 and result.stderr == ""
    for flag in ("--dataset_path", "--p_f", "--p_e", "--seed"):
        assert flag in result.stdout
    assert "--sizes" not in result.stdout and "(default: (0.1, 0.4, 0.9))" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--p_f", 1.1), ("--p_f", "from 0 to 1")),
        (("--p_e", 0.1, 0.4), ("--p_e",)),
        (("--p_e", 0.1, 0.4, "nan"), ("--p_e", "'nan'")),
        (("--seed", -1), ("--seed",)),
        (("--seed", "x"), ("--seed", "'x'")),
        (("--trainer", "IRM"), ("--trainer",)),
    ],
)
def test_invalid_arguments_are_refused(in_process, tmp_path, arguments, words):
    result = in_process("preprocessing.py", "--dataset_path", tmp_path / "new", *arguments)
    assert_refused(result, *words)
    assert not (tmp_path / "new").exists()


def test_ranges_of_numbers():
    for parse, accepted, refused in (
        (number(int, 2, 5), ("2", "5"), ("1", "6", "2.0", "1e0", "x", "")),
        (number(int, 0), ("0", "1000000000"), ("-1", "1000000001")),
        (number(float, 0, 0.9), ("0", "9e-1", ".5"), ("-0.1", "0.91", "nan", "inf", "x")),
    ):
        for text in accepted:
            assert parse(text) == float(text)
        for text in refused:
            with pytest.raises(argparse.ArgumentTypeError, match=f"'{text}' is not a .*number"):
                parse(text)
    assert type(number(int, 0)("3")) is int and type(number(float, 0)("3")) is float


# The folder.


@pytest.mark.parametrize("script", ["preprocessing.py", "exp-mnist.py"])
def test_the_folder_itself_is_refused(in_process, small_files, script):
    """Otherwise other data would be generated inside it."""
    before = contents(small_files)
    result = in_process(script, "--dataset_path", small_files)
    fix = f"Pass the folder that contains it: --dataset_path {small_files.parent}"
    assert_one_line(result, f"{small_files} is the folder ColoredMNIST itself. {fix}")
    assert contents(small_files) == before


def test_the_surrounding_folder_may_be_called_coloredmnist(few_digits, tmp_path):
    """For example, a clone of the project may have this name."""
    assert generate_environments(tmp_path / "ColoredMNIST")
    assert len(load_data(tmp_path / "ColoredMNIST").test) == 100


def test_paths_of_the_home_folder(few_digits, in_process, tmp_path, monkeypatch):
    """bash does not expand ~ in --dataset_path=~/course."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    result = in_process("preprocessing.py", "--dataset_path=~/course")
    folder = tmp_path / "course" / "ColoredMNIST"
    assert result.stdout == f"Generated: {folder}\n" and len(contents(folder)) == 3
    assert not generate_environments("~/course")
    assert len(ColoredMNIST("~/course", "test")) == len(load_data("~/course").test) == 100


def test_a_folder_with_other_files_is_refused(in_process, tmp_path):
    folder = tmp_path / "ColoredMNIST"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    result = in_process("exp-mnist.py", "--dataset_path", tmp_path)
    assert_one_line(result, f"{folder} must have", f"Delete {folder} to generate the data again")
    assert contents(folder) == {"notes.txt": b"mine"}


@pytest.mark.parametrize("script", ["preprocessing.py", "exp-mnist.py"])
def test_a_file_in_place_of_the_folder_is_one_line(in_process, tmp_path, script):
    (tmp_path / "ColoredMNIST").write_text("mine")
    assert_one_line(in_process(script, "--dataset_path", tmp_path), tmp_path / "ColoredMNIST")
    assert contents(tmp_path) == {"ColoredMNIST": b"mine"}


def test_existing_data_are_read_without_writing(small_files, tmp_path):
    """They can be in a read-only folder. The test also works for root, who could write there."""
    (tmp_path / "ColoredMNIST").symlink_to(small_files)
    tmp_path.chmod(0o500)
    assert len(load_data(tmp_path).test) == 60
    assert [file.name for file in tmp_path.iterdir()] == ["ColoredMNIST"]


# Runs that are killed, interrupted, or at the same time.


def start(*arguments):
    """Start Python in the project's folder."""
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Processes of a shell's background job ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def generate_until(count, path):
    """Start preprocessing.py and return its process when it has begun `count` files."""
    process = start("preprocessing.py", "--dataset_path", path)
    partial = path / "ColoredMNIST.tmp"
    while process.poll() is None:
        if partial.exists() and len([*partial.glob("*.pt")]) >= count:
            break
        time.sleep(0.001)
    return process


def test_a_killed_run_leaves_complete_data_or_none(few_digits, tmp_path):
    leftovers = 0
    for count in (1, 2, 3):
        path = tmp_path / str(count)
        process = generate_until(count, path)
        process.kill()
        process.communicate()
        leftovers += (path / "ColoredMNIST.tmp").exists()
        data = load_data(path, seed=7)  # complete, or generated now from 300 digits
        assert len(data.test) == (100 if data.seed == 7 else 20000)
        assert not (path / "ColoredMNIST.tmp").exists()
    assert leftovers > 0


def test_ctrl_c_is_one_line(tmp_path):
    process = generate_until(0, tmp_path)
    process.send_signal(signal.SIGINT)
    output = process.communicate()
    assert process.returncode == 130 and output == ("", "preprocessing.py: interrupted\n")
    assert not (tmp_path / "ColoredMNIST").exists()


def test_two_runs_at_once_generate_once(tmp_path):
    code = "import dataset; print(dataset.load_data({!r}, seed={}).description)"
    runs = [start("-c", code.format(str(tmp_path), seed)) for seed in (5, 6)]
    outputs = [run.communicate() for run in runs]
    assert [run.returncode for run in runs] == [0, 0], outputs
    assert outputs[0] == outputs[1] and "seed" in outputs[0][0] and not outputs[0][1]
    assert len(contents(tmp_path)) == 3


def test_leftovers_of_killed_runs_are_overwritten(tmp_path):
    (tmp_path / "file.tmp").mkdir()
    (tmp_path / "file.tmp" / "half").write_text("half")
    with replacing(tmp_path / "file") as partial:
        partial.write_text("whole")
    (tmp_path / "folder.tmp").write_text("half")
    with replacing(tmp_path / "folder") as partial:
        partial.mkdir()
        (partial / "file").write_text("whole")
    assert contents(tmp_path) == {"file": b"whole", "folder/file": b"whole"}


@pytest.mark.parametrize("error", [OSError("no"), ValueError("no"), KeyboardInterrupt()])
def test_an_error_while_writing_keeps_the_old_file(tmp_path, error):
    (tmp_path / "file").write_text("before")
    expected = UserError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected), replacing(tmp_path / "file") as partial:
        partial.write_text("half")
        raise error
    assert (tmp_path / "file").read_text() == "before"


def test_a_file_with_many_writers_is_complete_at_any_time(tmp_path):
    def write_and_read(content):
        with replacing(tmp_path / "file") as partial, open(partial, "a") as file:
            for _ in range(3):
                print(content, file=file, flush=True)
                time.sleep(0.01)

        return (tmp_path / "file").read_text()

    with ThreadPoolExecutor(4) as threads:
        for content in threads.map(write_and_read, range(8)):
            assert content in [f"{i}\n" * 3 for i in range(8)]


def test_a_full_disk_is_one_line(command, tmp_path):
    """Here, a limit on the size of files stands for the full disk."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    result = command("preprocessing.py", "--dataset_path", tmp_path, preexec_fn=limit)
    assert_one_line(result, f"cannot write {tmp_path / 'ColoredMNIST'}: File too large")
    assert not (tmp_path / "ColoredMNIST").exists()


def test_a_standard_output_that_cannot_be_written_is_one_line(command, tmp_path):
    buffered = os.environ | {"PYTHONUNBUFFERED": ""}
    with open("/dev/full", "w") as full:
        options = {"capture_output": False, "stdout": full, "stderr": subprocess.PIPE}
        options |= {"env": buffered}
        result = command("preprocessing.py", "--dataset_path", tmp_path, **options)
    assert_one_line(result, "preprocessing.py: cannot write its output: No space left on device")


# MNIST.


def test_both_parts_of_mnist(mnist):
    with np.load(ROOT / "data" / "mnist.npz") as archive:
        for part, count, loaded in (
            ("train", 60000, mnist),
            ("test", 10000, load_mnist("test")),
        ):
            images, digits = loaded
            assert images.shape == (count, 28, 28) and digits.shape == (count,)
            assert images.dtype == digits.dtype == torch.uint8
            assert np.array_equal(images.numpy(), archive[f"x_{part}"])
            assert np.array_equal(digits.numpy(), archive[f"y_{part}"])


def test_a_corrupt_mnist_is_one_line(in_process, small_mnist, tmp_path, monkeypatch):
    monkeypatch.setattr(preprocessing, "DATA", tmp_path)
    whole = (small_mnist / "mnist.npz").read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 4] ^= 1
    for content in (whole[: len(whole) // 2], flipped, b"", b"hello"):
        (tmp_path / "mnist.npz").write_bytes(content)
        result = in_process("preprocessing.py", "--dataset_path", tmp_path)
        assert_one_line(result, f"{tmp_path / 'mnist.npz'} is corrupt. Get it again")
    assert not (tmp_path / "ColoredMNIST").exists()


RAW = {
    "train-images-idx3-ubyte": "x_train",
    "train-labels-idx1-ubyte": "y_train",
    "t10k-images-idx3-ubyte": "x_test",
    "t10k-labels-idx1-ubyte": "y_test",
}


@pytest.fixture(scope="session")
def raw_files(small_mnist, tmp_path_factory):
    """MNIST as it is published, in four files, here of 300 digits and compressed by gzip."""
    folder = tmp_path_factory.mktemp("raw")
    with np.load(small_mnist / "mnist.npz") as archive:
        for name, key in RAW.items():
            values = archive[key]
            header = bytes([0, 0, 8, values.ndim])  # 8 stands for bytes
            header += b"".join(size.to_bytes(4, "big") for size in values.shape)
            (folder / f"{name}.gz").write_bytes(gzip.compress(header + values.tobytes(), 1))
    return folder


@pytest.fixture
def without_npz(raw_files, tmp_path, monkeypatch):
    """A project's folder data that does not exist yet, and torchvision without a network."""
    monkeypatch.setattr(preprocessing, "DATA", tmp_path / "data")
    sums = [(path.name, hashlib.md5(path.read_bytes()).hexdigest()) for path in raw_files.iterdir()]
    monkeypatch.setattr(MNIST, "resources", sums)
    monkeypatch.setattr(MNIST, "mirrors", ["file:///nowhere/"])
    return tmp_path / "data"


@pytest.mark.parametrize("unpacked", [True, False])
def test_mnists_four_files_are_read_if_mnist_npz_is_missing(
    without_npz, raw_files, small_mnist, unpacked
):
    raw = without_npz / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for file in raw_files.iterdir():
        if unpacked:
            (raw / file.stem).write_bytes(gzip.decompress(file.read_bytes()))
        else:
            shutil.copy(file, raw)
    with np.load(small_mnist / "mnist.npz") as archive:
        for part in ("train", "test"):
            images, digits = load_mnist(part)
            assert images.dtype == digits.dtype == torch.uint8
            assert np.array_equal(images.numpy(), archive[f"x_{part}"])
            assert np.array_equal(digits.numpy(), archive[f"y_{part}"])


def test_without_mnist_one_line_says_how_to_get_it(without_npz, raw_files, in_process, tmp_path):
    raw = without_npz / "MNIST" / "raw"
    raw.mkdir(parents=True)
    path, fix = tmp_path / "new", f"Put mnist.npz into {without_npz}, or MNIST's four files into"

    def assert_explained():
        result = in_process("exp-mnist.py", "--dataset_path", path, "--no_cuda")
        assert_one_line(result, f"{without_npz / 'mnist.npz'} is missing", f"{fix} {raw}")
        assert not (path / "ColoredMNIST").exists()

    assert_explained()
    for file in raw_files.iterdir():
        (raw / file.stem).write_bytes(gzip.decompress(file.read_bytes()))
    images = raw / "train-images-idx3-ubyte"
    for corrupt in (images.read_bytes()[:1000], b"", b"\7" * 1000):
        images.write_bytes(corrupt)
        assert_explained()
    images.unlink()
    assert_explained()


def test_a_torchvision_that_cannot_be_imported_is_one_line(without_npz, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    with pytest.raises(UserError, match="torchvision failed .* Put mnist.npz") as error:
        load_mnist()
    assert "\n" not in str(error.value)


def test_ready_files_need_no_mnist(without_npz, small_files):
    assert len(load_data(small_files.parent).test) == 60
    assert not without_npz.exists()
