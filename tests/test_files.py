"""Foreign, damaged and hostile files; interrupted and concurrent runs."""

import io
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
import zipfile

import pytest
import torch
from conftest import ROOT, assert_one_line
from PIL import Image

import preprocessing
from preprocessing import MEAN, STD, UserError, load_dataset, read_environment

NAMES = ("train1", "train2", "test")


def load(folder):
    return load_dataset(folder.parent)


@pytest.fixture
def folder(small_files, tmp_path):
    """A copy of the small files, to be harmed."""
    return shutil.copytree(small_files, tmp_path / "ColoredMNIST")


@pytest.fixture(scope="session")
def course_project_form(small_files, tmp_path_factory):
    """The same digits as lists of (PIL image, label, colour), the last environment shorter."""
    folder = tmp_path_factory.mktemp("project") / "ColoredMNIST"
    folder.mkdir()
    for name in NAMES:
        record = torch.load(small_files / f"{name}.pt", weights_only=True)
        rgb = record["images"].permute(0, 2, 3, 1).numpy()
        labels, colors = record["labels"].tolist(), record["colors"].bool().tolist()
        tuples = zip(map(Image.fromarray, rgb), labels, colors, strict=True)
        torch.save(list(tuples)[: 40 if name == "test" else None], folder / f"{name}.pt")
    return folder


@pytest.fixture(scope="session")
def framework_form(small_files, tmp_path_factory):
    """The same digits as normalised tensors with a split of their own."""
    folder = tmp_path_factory.mktemp("framework") / "ColoredMNIST"
    folder.mkdir()
    records = [torch.load(small_files / f"{name}.pt", weights_only=True) for name in NAMES]
    mean, std = torch.tensor([MEAN, MEAN, 0.0]), torch.tensor(STD)
    images = [
        ((record["images"] / 255 - mean.view(3, 1, 1)) / std).flatten(1) for record in records
    ]
    labels = [record["labels"].float() for record in records]
    train, train_labels = torch.cat(images[:2]), torch.cat(labels[:2])
    envs = torch.arange(2).repeat_interleave(60)
    for name, part in (("train", slice(0, 120, 2)), ("val", slice(1, 120, 2))):
        torch.save([train[part], train_labels[part], envs[part]], folder / f"{name}.pt")
    torch.save([images[2], labels[2]], folder / "test.pt")
    return folder


def test_course_project_form(course_project_form, small_files):
    ours, theirs = load(small_files), load(course_project_form)
    assert "course project's form" in theirs.description and len(theirs.test.labels) == 40
    assert all(torch.equal(a, b) for a, b in zip(ours.train, theirs.train, strict=True))
    assert all(torch.equal(a[:40], b) for a, b in zip(ours.test, theirs.test, strict=True))


def test_framework_form(framework_form, small_files):
    ours, theirs = load(small_files), load(framework_form)
    assert "course framework's form" in theirs.description
    assert all(torch.equal(a[::2], b) for a, b in zip(ours.train, theirs.train, strict=True))
    assert all(torch.equal(a[1::2], b) for a, b in zip(ours.train, theirs.validation, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(ours.test, theirs.test, strict=True))


def test_results_from_foreign_files_are_the_same(
    command, course_project_form, framework_form, small_files, tmp_path
):
    """Bit for bit where the split is the user's own; the framework's split is used as it is."""
    same_length = shutil.copytree(course_project_form, tmp_path / "ColoredMNIST")
    for name in NAMES:
        record = torch.load(small_files / f"{name}.pt", weights_only=True)
        torch.save(
            {key: field[:40] if torch.is_tensor(field) else field for key, field in record.items()},
            tmp_path / f"{name}.pt",
        )
    (tmp_path / "ours" / "ColoredMNIST").mkdir(parents=True)
    shutil.copy(tmp_path / "test.pt", tmp_path / "ours" / "ColoredMNIST")
    for name in ("train1", "train2"):
        shutil.copy(small_files / f"{name}.pt", tmp_path / "ours" / "ColoredMNIST")
    short = ("--no_cuda", "--iteration", 5, "--repetitions", 1, "--batch_size", 30)

    def log(path):
        result = command("exp-mnist.py", "--dataset_path", path, *short)
        assert result.returncode == 0, result.stderr
        return result.stdout

    theirs, ours = log(same_length.parent), log(tmp_path / "ours")
    assert theirs.splitlines()[-1] == ours.splitlines()[-1]
    assert "normalised tensors" in log(framework_form.parent)


def test_every_truncation_and_bit_flip_is_refused(folder):
    """Hundreds of random ones; each in one line that names the file and the remedy."""
    chosen, path = random.Random(0), folder / "test.pt"
    whole = path.read_bytes()
    cases = [whole[: chosen.randrange(len(whole))] for _ in range(150)]
    cases += [whole[:-1], whole[:1], b"", whole + b"x"]
    frame = [position for position in range(len(whole)) if in_frame(whole, position)]
    for position in chosen.sample(frame, 400) + [chosen.randrange(len(whole)) for _ in range(200)]:
        damaged = bytearray(whole)
        damaged[position] ^= 1 << chosen.randrange(8)
        cases.append(bytes(damaged))
    for damaged in cases:
        path.write_bytes(damaged)
        with pytest.raises(UserError) as caught:
            load(folder)
        message = str(caught.value)
        assert "test.pt cannot be used" in message and "replace it, or delete" in message
        assert "\n" not in message
    path.write_bytes(whole)
    load(folder)


def in_frame(data, position):
    """Whether a byte belongs to no member of the archive, so that no checksum covers it."""
    if not hasattr(in_frame, "covered"):
        covered = set()
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for member in archive.infolist():
                with archive.open(member) as file:
                    start = file._orig_compress_start
                covered.update(range(start, start + member.file_size))
        in_frame.covered = covered
    return position not in in_frame.covered


def test_swapped_members_are_refused(folder):
    path = folder / "test.pt"
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    names = list(members)
    for i in range(len(names)):
        for j in range(i):
            swapped = members | {names[i]: members[names[j]], names[j]: members[names[i]]}
            if swapped == members:
                continue
            with zipfile.ZipFile(path, "w") as archive:
                for name, data in swapped.items():
                    archive.writestr(name, data)
            with pytest.raises(UserError, match="test.pt cannot be used"):
                load(folder)


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_code_in_a_file_is_not_run(folder, tmp_path, command):
    trap = tmp_path / "trapped"
    torch.save([(Hostile(trap), 1, True)], folder / "train1.pt")
    assert_one_line(command("exp-mnist.py", "--dataset_path", tmp_path), "train1.pt", "replace it")
    (folder / "train1.pt").write_bytes(pickle.dumps(Hostile(trap)))
    assert_one_line(command("exp-mnist.py", "--dataset_path", tmp_path), "train1.pt", "replace it")
    assert not trap.exists()


def image(mode="RGB", size=(28, 28)):
    return Image.new(mode, size)


def own(**changed):
    record = {
        "images": torch.zeros(4, 3, 28, 28, dtype=torch.uint8),
        "labels": torch.tensor([0, 1, 0, 1], dtype=torch.uint8),
        "colors": torch.tensor([0, 1, 0, 1], dtype=torch.uint8),
    }
    return record | changed


BLUE = torch.zeros(4, 3, 28, 28, dtype=torch.uint8)
BLUE[1, 2, 5, 5] = 9
WRONG_COLOR = torch.zeros(4, 3, 28, 28, dtype=torch.uint8)
WRONG_COLOR[1, 1, 5, 5] = 9


@pytest.mark.parametrize(
    "content",
    [
        own(labels=torch.tensor([0, 1, 2, 1])),
        own(labels=torch.tensor([0.0, 1.0, float("nan"), 1.0])),
        own(labels=torch.tensor([0, 1, 1])),
        own(labels=[0, 1, 1, 1]),
        own(colors=torch.tensor([[0, 1, 0, 1]])),
        own(images=torch.zeros(4, 3, 28, 28)),
        own(images=torch.zeros(4, 3, 28, 27, dtype=torch.uint8)),
        own(images=torch.zeros(4, 784, dtype=torch.uint8)),
        own(images="none"),
        own(images=BLUE),
        own(images=WRONG_COLOR),
        own(p_e=torch.tensor([0.1, 0.4, 0.9])),
        {"images": 1},
        {},
        [],
        None,
        torch.zeros(3),
        [(image(), 1)],
        [(image(), 1, 1)] * 3,
        [(image(), "1", True)] * 3,
        [(image("L"), 1, True)] * 3,
        [(image(size=(27, 28)), 1, True)] * 3,
        [(image(), 7, True)] * 3,
        [(torch.zeros(3), 1, True)] * 3,
        [(image(), 1, True), 5],
    ],
)
def test_other_contents_are_refused(folder, content):
    torch.save(content, folder / "train2.pt")
    with pytest.raises(UserError, match="train2.pt cannot be used"):
        load(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda images, labels, envs: [images, labels],
        lambda images, labels, envs: [images[:, :2351], labels, envs],
        lambda images, labels, envs: [images.long(), labels, envs],
        lambda images, labels, envs: [images + 0.01, labels, envs],
        lambda images, labels, envs: [images * float("nan"), labels, envs],
        lambda images, labels, envs: [images, labels + 1, envs],
        lambda images, labels, envs: [images, labels, envs + 5],
        lambda images, labels, envs: [images, labels, envs[:-1]],
        lambda images, labels, envs: [images, labels[:, None], envs],
        lambda images, labels, envs: [images.flip(1), labels, envs],
    ],
)
def test_other_normalised_contents_are_refused(framework_form, tmp_path, change):
    folder = shutil.copytree(framework_form, tmp_path / "ColoredMNIST")
    torch.save(change(*torch.load(folder / "val.pt", weights_only=True)), folder / "val.pt")
    with pytest.raises(UserError, match="val.pt cannot be used"):
        load(folder)


def test_a_test_file_with_environments_is_refused(framework_form, tmp_path):
    folder = shutil.copytree(framework_form, tmp_path / "ColoredMNIST")
    images, labels = torch.load(folder / "test.pt", weights_only=True)
    torch.save([images, labels, labels.long()], folder / "test.pt")
    with pytest.raises(UserError, match="test.pt cannot be used .*list of 2 tensors"):
        load(folder)


def test_missing_files_are_named(folder):
    (folder / "train2.pt").unlink()
    with pytest.raises(UserError, match="lacks train2.pt"):
        load(folder)


def test_other_draws_than_asked_are_refused(command, folder):
    path = ("--dataset_path", folder.parent)
    for arguments, words in (
        (("--p_f", 0.25), ("p_f 0.2,", "0.25")),
        (("--p_e", 0.2, 0.1, 0.9), ("p_e [0.1, 0.4, 0.9]", "[0.2, 0.1, 0.9]")),
        (("--data_seed", 4), ("seed 3", "4")),
    ):
        assert_one_line(command("exp-mnist.py", *path, *arguments), *words, "delete it")
    record = torch.load(folder / "test.pt", weights_only=True)
    torch.save(record | {"seed": 99}, folder / "test.pt")
    with pytest.raises(UserError, match="different draws"):
        load(folder)


def files(path):
    return {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()}


WHOLE = {".lock", *(f"ColoredMNIST/{name}.pt" for name in NAMES)}


def start(*arguments):
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell that runs the tests in the background has them ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def drawing(path):
    make = f"preprocessing.make_dataset(Path({str(path)!r}))"
    return start("-c", f"from pathlib import Path; import preprocessing; {make}")


def test_killed_while_drawing(tmp_path):
    """SIGKILL at many moments; the next run draws whole files and clears the leftovers away."""
    states = set()
    for wait in range(12):
        path = tmp_path / str(wait)
        process = drawing(path)
        while process.poll() is None and not (path / ".lock").exists():
            time.sleep(0.002)
        time.sleep(wait * 0.04)
        process.kill()
        process.communicate()
        assert not (path / "ColoredMNIST").exists() or files(path) == WHOLE
        states.add(frozenset(files(path)))
        preprocessing.make_dataset(path)
        assert files(path) == WHOLE
        read_environment(path / "ColoredMNIST" / "test.pt", 2)
    assert len(states) > 1, "the kills hit different moments"


def test_concurrent_first_runs_read_the_same_data(tmp_path):
    short = ("--no_cuda", "--iteration", 3, "--repetitions", 1, "--dataset_path", tmp_path)
    runs = [start("exp-mnist.py", *short, "--seed", seed) for seed in (5, 5, 6)]
    outputs = [run.communicate() for run in runs]
    assert [run.returncode for run in runs] == [0, 0, 0], outputs
    assert files(tmp_path) == WHOLE
    data = [[line for line in out.splitlines() if "drawn with" in line] for out, _ in outputs]
    assert data[0] == data[1] == data[2] and len(data[0]) == 1
    assert outputs[0][0].splitlines()[-1] == outputs[1][0].splitlines()[-1]


@pytest.mark.parametrize("script", ["exp-mnist.py", "preprocessing.py"])
def test_interrupt_ends_in_one_line(dataset_path, script, tmp_path):
    path = dataset_path if script == "exp-mnist.py" else tmp_path
    process = start(script, "--dataset_path", path)
    if script == "exp-mnist.py":
        while "Repetition" not in process.stdout.readline():
            pass
    else:
        while not (tmp_path / ".lock").exists():
            time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate()
    assert process.returncode == 130 and error.strip() == f"{script}: interrupted"
    assert files(tmp_path) <= {".lock"}


def test_killed_while_saving_a_model(command, small_files, tmp_path):
    """A leftover of an earlier run is replaced; the model is whole or absent."""
    leftover = tmp_path / ".ERM_MLP_seed1234_repetition1.pt.partial"
    leftover.write_bytes(b"half")
    arguments = ("--dataset_path", small_files.parent, "--iteration", 2, "--batch_size", 20)
    result = command("exp-mnist.py", *arguments, "--repetitions", 1, "--save_model", tmp_path)
    assert result.returncode == 0, result.stderr
    assert files(tmp_path) == {".lock", "ERM_MLP_seed1234_repetition1.pt"}


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs the device that is always full")
def test_full_disk(command, small_files):
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [
                sys.executable,
                "exp-mnist.py",
                "--dataset_path",
                small_files.parent,
                "--iteration",
                "2",
            ],
            cwd=ROOT,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert_one_line(result, "exp-mnist.py", "No space left")


def test_reader_that_leaves(small_files):
    process = start("exp-mnist.py", "--dataset_path", small_files.parent, "--iteration", "2")
    process.stdout.close()
    error = process.stderr.read()
    assert process.wait() != 0 and "Traceback" not in error


@pytest.mark.parametrize("trainer", ["ERM", "groupDRO", "IRM", "Backdoor"])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_tiny_minibatches(command, small_files, trainer, size):
    arguments = ("--dataset_path", small_files.parent, "--iteration", 30, "--batch_size", size)
    result = command("exp-mnist.py", *arguments, "--trainer", trainer, "--repetitions", 1)
    assert result.returncode == 0, result.stderr
    assert "nan" not in result.stdout.splitlines()[-1]
