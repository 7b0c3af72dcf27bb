"""Foreign, damaged and hostile files; interrupted and concurrent runs."""

import contextlib
import io
import itertools
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
import zipfile

import numpy as np
import pytest
import torch
from conftest import ROOT, assert_one_line, same
from PIL import Image

import preprocessing
from dataset import MEAN, STD, ColoredMNIST, load_dataset, read_file
from preprocessing import UserError, written_whole
from trainer import load_model

NAMES = ("train1", "train2", "test")
SHORT = ("--no_cuda", "--iteration", 3, "--repetitions", 1, "--batch_size", 20)
OWN_SEED = ("--seed", 3)  # that of the small files: no warning that they are of another


def load(folder):
    return load_dataset(folder.parent)


@pytest.fixture
def folder(small_files, tmp_path):
    """A copy of the small files, to be harmed."""
    return shutil.copytree(small_files, tmp_path / "ColoredMNIST")


def tuples(record, label=int, color=bool):
    """A record of the project's own form as the course project's (PIL image, label, colour)."""
    pixels = record["images"].permute(0, 2, 3, 1).numpy()
    labels, colors = map(label, record["labels"].tolist()), map(color, record["colors"].tolist())
    return list(zip(map(Image.fromarray, pixels), labels, colors, strict=True))


@pytest.fixture(scope="session")
def course_project_form(small_files, tmp_path_factory):
    """The same digits as lists of (PIL image, label, colour), the last environment shorter."""
    folder = tmp_path_factory.mktemp("project") / "ColoredMNIST"
    folder.mkdir()
    for name in NAMES:
        record = torch.load(small_files / f"{name}.pt", weights_only=True)
        torch.save(tuples(record)[: 40 if name == "test" else None], folder / f"{name}.pt")
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
    assert "tuples of (image, label, colour)" in theirs.description and len(theirs.test) == 40
    assert theirs.seed is None
    assert same(ours.training, theirs.training)
    assert same(ours.test[torch.arange(40)], theirs.test)


@pytest.mark.parametrize(
    ("parts", "form"),
    [
        (lambda image, label, color: (image, label), "(image, label)"),
        (lambda image, label, color: [image, label], "(image, label)"),
        (lambda image, label, color: (image, label, color, 7), "(image, label, colour, digit)"),
        (lambda image, label, color: (image, label, "red", 7), "(image, label, colour, digit)"),
    ],
)
def test_tuples_of_other_generators(small_files, tmp_path, parts, form):
    """Of them the image alone says the colour: the channel that isn't black."""
    folder = tmp_path / "ColoredMNIST"
    folder.mkdir()
    for name in NAMES:
        record = torch.load(small_files / f"{name}.pt", weights_only=True)
        torch.save([parts(*entry) for entry in tuples(record)], folder / f"{name}.pt")
    ours, theirs = load(small_files), load(folder)
    assert f"tuples of {form}" in theirs.description
    assert same(ours.training, theirs.training) and same(ours.test, theirs.test)


def test_images_that_were_read_from_png_files(small_files, tmp_path):
    """Pillow pickles them as of another class."""
    record = torch.load(small_files / "test.pt", weights_only=True)
    content = []
    for image, label, color in tuples(record):
        file = io.BytesIO()
        image.save(file, "PNG")
        content.append((Image.open(file), label, color))
    torch.save(content, tmp_path / "test.pt")
    assert same(read_file(tmp_path / "test.pt", 2)[0], read_file(small_files / "test.pt", 2)[0])


def test_whole_files_of_other_things_are_not_called_damaged(folder):
    for content in ([np.zeros(3)] * 3, {"images": io.BytesIO()}, io.StringIO()):
        torch.save(content, folder / "train2.pt")
        with pytest.raises(UserError) as error:
            load(folder)
        assert "more than tensors, numbers and images" in str(error.value)
        assert "damaged" not in str(error.value)
    whole = (folder / "train1.pt").read_bytes()
    for content in (b"x" + whole, whole[:-1], b"mine", b"hello", b""):
        (folder / "train2.pt").write_bytes(content)
        with pytest.raises(UserError, match="damaged"):
            load(folder)


def test_framework_form(framework_form, small_files):
    ours, theirs = load(small_files), load(framework_form)
    assert "course framework's form" in theirs.description
    assert same(ours.training[torch.arange(0, 120, 2)], theirs.training)
    assert same(ours.training[torch.arange(1, 120, 2)], theirs.validation)
    assert same(ours.test, theirs.test)
    training, validation = theirs.hold_out(0.5)  # the split of the files stays
    assert same(training, theirs.training) and same(validation, theirs.validation)
    assert len(ColoredMNIST(framework_form.parent, "all_train")) == 120
    assert len(ColoredMNIST(framework_form.parent, "train2")) == 60


def test_framework_files_with_one_training_environment_are_refused(framework_form, tmp_path):
    """groupDRO and IRM have nothing to compare there."""
    folder = shutil.copytree(framework_form, tmp_path / "ColoredMNIST")
    for name in ("train", "val"):
        images, labels, envs = torch.load(folder / f"{name}.pt", weights_only=True)
        torch.save([images, labels, torch.zeros_like(envs)], folder / f"{name}.pt")
    with pytest.raises(UserError, match="one training environment, and two are needed"):
        load(folder)


def test_results_from_foreign_files_are_the_same(
    in_process, course_project_form, framework_form, folder
):
    """Bit for bit where the split is the user's own; the framework's split is used as it is."""
    for name in NAMES:
        record = torch.load(folder / f"{name}.pt", weights_only=True) | {"sizes": [60, 60, 40]}
        if name == "test":
            record |= {key: record[key][:40] for key in ("images", "labels", "colors")}
        torch.save(record, folder / f"{name}.pt")

    def log(path):
        result = in_process("exp-mnist.py", "--dataset_path", path, *SHORT)
        assert result.returncode == 0, result.stderr
        return result.stdout

    theirs, ours = log(course_project_form.parent), log(folder.parent)
    assert theirs.splitlines()[-1] == ours.splitlines()[-1]
    assert "normalised tensors" in log(framework_form.parent)


@pytest.mark.parametrize("label", [int, float, np.int64, np.int32, np.uint8])
@pytest.mark.parametrize("color", [bool, int, np.bool_])
def test_numbers_of_python_and_numpy_are_read(small_files, tmp_path, label, color):
    record = torch.load(small_files / "train2.pt", weights_only=True)
    torch.save(tuples(record, label, color), tmp_path / "train2.pt")
    samples, form, _ = read_file(tmp_path / "train2.pt", 1)
    assert same(samples, read_file(small_files / "train2.pt", 1)[0])
    assert form == "tuples of (image, label, colour)"


@pytest.mark.parametrize("label", [np.float32, str])
def test_other_numbers_are_refused(small_files, tmp_path, label):
    record = torch.load(small_files / "train2.pt", weights_only=True)
    torch.save(tuples(record, label, np.bool_), tmp_path / "train2.pt")
    with pytest.raises(UserError, match="train2.pt cannot be used"):
        read_file(tmp_path / "train2.pt", 1)


def rezip(path, method, change=lambda members: members):
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in change(members).items():
            archive.writestr(name, content)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_files_zipped_again_are_read(folder, small_files, method):
    for name in NAMES:
        rezip(folder / f"{name}.pt", method)
    ours, theirs = load(small_files), load(folder)
    assert same(ours.training, theirs.training) and same(ours.test, theirs.test)


def test_old_format_of_torch_is_read(folder, small_files, course_project_form):
    """It has no checksums, which the log says."""
    for name in NAMES:
        record = torch.load(small_files / f"{name}.pt", weights_only=True)
        torch.save(record, folder / f"{name}.pt", _use_new_zipfile_serialization=False)
    ours, theirs = load(small_files), load(folder)
    assert same(ours.training, theirs.training) and same(ours.test, theirs.test)
    assert "no checksums" in theirs.description and "no checksums" not in ours.description
    torch.save(
        tuples(record, np.int64, np.bool_),
        folder / "test.pt",
        _use_new_zipfile_serialization=False,
    )
    assert same(read_file(folder / "test.pt", 2)[0], ours.test)


def test_the_format_is_told_as_torch_tells_it(folder, small_files):
    """By the first bytes: what zipfile.is_zipfile says differs between releases of Python."""
    path = folder / "test.pt"
    record = torch.load(path, weights_only=True)
    torch.save(record, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes() + b"PK\x05\x06" + bytes(18))  # the end of an empty ZIP
    samples, form, seed = read_file(path, 2)
    ours, own_form, _ = read_file(small_files / "test.pt", 2)
    assert same(samples, ours) and seed == 3
    assert form == own_form + ", in torch's old format, which has no checksums"
    for source in (*ROOT.glob("*.py"), *ROOT.glob("benchmarks/*.py")):
        assert "is_zipfile" not in source.read_text(), source


def harmed(whole):
    """Truncations and flips of one bit: everywhere, and all over the archive's frame."""
    chosen = random.Random(0)
    yield from (whole[:-1], whole[:1], b"", whole + b"x", b"x" + whole)
    for _ in range(150):
        yield whole[: chosen.randrange(len(whole))]
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        largest = max(archive.infolist(), key=lambda member: member.file_size)
    inside = range(largest.header_offset + 200, largest.header_offset + largest.file_size - 200)
    frame = [position for position in range(len(whole)) if position not in inside]
    everywhere = [chosen.randrange(len(whole)) for _ in range(200)]
    for position in chosen.sample(frame, 500) + everywhere:
        damaged = bytearray(whole)
        damaged[position] ^= 1 << chosen.randrange(8)
        yield bytes(damaged)


def test_damage_is_refused_or_without_effect(folder):
    """Each in one line that names the file and the remedy, or read as exactly the same data."""
    path = folder / "test.pt"
    whole, (samples, *others) = path.read_bytes(), read_file(path, 2)
    refused = 0
    for damaged in harmed(whole):
        path.write_bytes(damaged)
        try:
            samples_read, *others_read = read_file(path, 2)
        except UserError as error:
            refused += 1
            message = str(error)
            assert "test.pt cannot be used" in message and "replace it, or move" in message
            assert "\n" not in message
        else:
            assert same(samples_read, samples) and others_read == others
    assert refused > 300
    path.write_bytes(whole)
    load(folder)


def test_swapped_members_are_not_read_as_other_data(folder):
    path = folder / "test.pt"
    whole, (samples, *_) = path.read_bytes(), read_file(path, 2)
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    for i in range(len(names)):
        for j in range(i):
            a, b = names[i], names[j]
            rezip(path, zipfile.ZIP_STORED, lambda m, a=a, b=b: m | {a: m[b], b: m[a]})
            with contextlib.suppress(UserError):
                assert same(read_file(path, 2)[0], samples), (a, b)
            path.write_bytes(whole)


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_code_in_a_file_is_not_run(folder, tmp_path, in_process):
    trap, path = tmp_path / "trapped", folder / "train1.pt"
    contents = []
    for content in (Hostile(trap), [(Hostile(trap), 1, True)], {"images": Hostile(trap)}):
        for zipped in (True, False):
            torch.save(content, path, _use_new_zipfile_serialization=zipped)
            contents.append(path.read_bytes())
    for content in (*contents, pickle.dumps(Hostile(trap))):
        path.write_bytes(content)
        with warnings.catch_warnings(record=True) as shown:
            with pytest.raises(UserError, match="train1.pt cannot be used"):
                load(folder)
            assert not shown
    refused = in_process("exp-mnist.py", "--dataset_path", tmp_path)
    assert_one_line(refused, "train1.pt", "replace it")
    assert not trap.exists()


class Forged:
    """A number as no NumPy writes it: NumPy's own constructor of scalars would crash."""

    def __init__(self, *arguments):
        self.arguments = arguments

    def __reduce__(self):
        return np.int64(1).__reduce__()[0], self.arguments


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
        own(environment="test"),
        own(sizes=[4, 5, 4]),
        own(sizes=3),
        {"images": 1},
        {},
        [],
        None,
        torch.zeros(3),
        [(image(), 1)],  # one is too few
        [(image(), 2)] * 3,
        [(image(), 1, True, 7, 7)] * 3,
        [(image(), 1, True), (image(), 1)],
        [(Image.new("RGB", (28, 28), (9, 9, 0)), 1)] * 3,
        [(image(), 0.5, True)] * 3,
        [(image(), "1", True)] * 3,
        [(image("L"), 1, True)] * 3,
        [(image(size=(27, 28)), 1, True)] * 3,
        [(image(), 7, True)] * 3,
        [(torch.zeros(3), 1, True)] * 3,
        [(image(), 1, True), 5],
        [Forged(np.dtype([("a", "O")]))],
        [(image(), Forged(np.dtype("O")), True)] * 3,
        [(image(), Forged(np.dtype([("a", "O")]), b"\1" * 8), True)] * 3,
    ],
)
def test_other_contents_are_refused(folder, content):
    torch.save(content, folder / "train2.pt")
    with pytest.raises(UserError, match="train2.pt cannot be used"):
        load(folder)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ({"pictures": 1, "labels": 2}, "a dict of 2 entries, the first a str"),
        ([], "a list of 0 entries"),
        ([1, 2, 3], "a list of 3 entries, the first a int"),
        ([(image(), 1, True, 7, 7)] * 3, "a list of 3 entries, the first a tuple of 5"),
        ((torch.zeros(3),), "a tuple of 1 entries, the first a Tensor"),
        (None, "a NoneType"),
    ],
)
def test_what_is_whole_and_unknown_is_not_called_damaged(folder, content, what):
    torch.save(content, folder / "train2.pt")
    with pytest.raises(UserError) as error:
        load(folder)
    message = str(error.value)
    assert f"whole, but of no known form: {what})" in message and "damaged" not in message
    assert str(folder / "train2.pt") in message and "replace it" in message


@pytest.mark.parametrize(
    "change",
    [
        lambda images, labels, envs: [images, labels],
        lambda images, labels, envs: [images[:, :2351], labels, envs],
        lambda images, labels, envs: [images.long(), labels, envs],
        lambda images, labels, envs: [images + 0.01, labels, envs],
        lambda images, labels, envs: [images + 0.003, labels, envs],  # a quarter of a grey level
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
    with pytest.raises(UserError, match="test.pt cannot be used"):
        load(folder)


def test_missing_files_are_named(folder):
    (folder / "train2.pt").unlink()
    with pytest.raises(UserError, match="lacks train2.pt"):
        load(folder)
    (folder / "train1.pt").unlink()
    (folder / "test.pt").rename(folder / "notes.txt")
    with pytest.raises(UserError, match="lacks train1.pt, train2.pt, test.pt"):
        load(folder)


def test_files_of_different_draws_are_refused(folder):
    record = torch.load(folder / "test.pt", weights_only=True)
    torch.save(record | {"seed": 99}, folder / "test.pt")
    with pytest.raises(UserError, match="different draws or forms"):
        load(folder)


def test_files_of_other_sizes_are_refused(folder, tmp_path):
    """Of the same seed: three quarters of these test digits would have been trained on."""
    preprocessing.draw_environments(tmp_path / "other", sizes=(90, 60, 60), seed=3)
    shutil.copy(tmp_path / "other" / "ColoredMNIST" / "train1.pt", folder)
    with pytest.raises(UserError, match="different draws or forms"):
        load(folder)


def test_an_environment_under_anothers_name_is_refused(folder, course_project_form, tmp_path):
    """Its digits are those that were trained on, or its colours not those of its name."""
    shutil.copy(folder / "train1.pt", folder / "test.pt")
    with pytest.raises(UserError, match="test.pt cannot be used.*holds the environment train1"):
        load(folder)
    foreign = shutil.copytree(course_project_form, tmp_path / "foreign" / "ColoredMNIST")
    shutil.copy(foreign / "train1.pt", foreign / "test.pt")
    with pytest.raises(UserError, match="the same images as train1 and as test"):
        load(foreign)


@pytest.mark.parametrize("more", ["train3", "test2", "val", "train"])
def test_other_environments_are_refused_by_name(folder, more):
    shutil.copy(folder / "train1.pt", folder / f"{more}.pt")
    with pytest.raises(UserError, match=f"has {more}.pt beside train1, train2, test"):
        load(folder)
    (folder / f"{more}.pt").rename(folder / f".{more}.pt")  # hidden, it has no part in it
    load(folder)
    (folder / f".{more}.pt").rename(folder / f"{more}.txt")
    load(folder)


def test_one_label_is_refused(folder):
    record = torch.load(folder / "test.pt", weights_only=True)
    torch.save(record | {"labels": torch.ones_like(record["labels"])}, folder / "test.pt")
    with pytest.raises(UserError, match="one label only"):
        load(folder)


def files(path):
    return {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()}


DRAWN = {f"ColoredMNIST/{name}.pt" for name in NAMES}


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


@pytest.fixture(scope="module")
def processes():
    """Copies of this process, which saves the seconds of their start."""
    return multiprocessing.get_context("fork")


def draw(path):
    torch.set_num_threads(1)  # those of the process that was copied are not in the copy
    preprocessing.draw_environments(path)


def test_killed_while_drawing(processes, tmp_path):
    """SIGKILL at many moments; the next run draws whole files and clears the leftovers away."""
    states = set()
    for count in (0, 0, 1, 2, 3, 4, 4):  # files that are there: the lock, and those drawn so far
        path = tmp_path / str(len(os.listdir(tmp_path)))
        process = processes.Process(target=draw, args=(path,))
        process.start()
        while process.is_alive():
            with contextlib.suppress(FileNotFoundError):  # a folder that was just renamed
                if len(files(path)) >= count:
                    break
            time.sleep(0.002)
        process.kill()
        process.join()
        left = files(path)
        assert not (path / "ColoredMNIST").exists() or left - {".lock"} == DRAWN
        states.add(frozenset(left))
        preprocessing.draw_environments(path, sizes=(20, 20, 20))
        assert files(path) - {".lock"} == DRAWN
        load_dataset(path)
    assert len(states) > 1, "the kills hit different moments"


def test_concurrent_first_runs_read_the_same_data(tmp_path):
    """Each prepared to draw with a seed of its own."""
    arguments = (*SHORT, "--dataset_path", tmp_path)
    runs = [start("exp-mnist.py", *arguments, "--seed", seed) for seed in (5, 6)]
    outputs = [run.communicate() for run in runs]
    assert [run.returncode for run in runs] == [0, 0], outputs
    # One drew them; the other says that they are of another seed.
    assert sorted(error.count("\n") for _, error in outputs) == [0, 1]
    assert files(tmp_path) - {".lock"} == DRAWN
    (drew,) = [out for out, _ in outputs if "drawn now with" in out]
    (read,) = [out for out, _ in outputs if "drawn with" in out]
    (line,) = [line for line in drew.splitlines() if "drawn now with" in line]
    assert line.replace("drawn now", "drawn") in read.splitlines()


@pytest.mark.parametrize("script", ["exp-mnist.py", "preprocessing.py"])
def test_interrupt_ends_in_one_line(dataset_path, script, tmp_path):
    path = dataset_path if script == "exp-mnist.py" else tmp_path
    process = start(script, "--dataset_path", path, "--seed", 7)
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


def write_slowly(path, begun):
    with written_whole(path) as partial:
        partial.write_bytes(b"half")
        begun.set()
        time.sleep(60)


def write_often(path, content):
    for _ in range(75):
        with written_whole(path) as partial:
            torch.save(torch.full((1000,), content), partial)


def test_leftovers_of_killed_runs_go_and_those_of_running_ones_stay(processes, tmp_path):
    path, begun = tmp_path / "network.pt", processes.Event()
    process = processes.Process(target=write_slowly, args=(path, begun))
    process.start()
    assert begun.wait(60)
    (running,) = tmp_path.iterdir()
    with written_whole(path) as partial:
        partial.write_bytes(b"whole")
    assert set(tmp_path.iterdir()) == {path, running}
    process.kill()
    process.join()
    elsewhere = running.with_name(running.name.replace(socket.gethostname(), "another-host", 1))
    shutil.copy(running, elsewhere)  # whether it runs there, nobody here knows
    other = running.with_name(running.name.replace("network", "another", 1))
    shutil.copy(running, other)
    with written_whole(path) as partial:
        partial.write_bytes(b"again")
    assert set(tmp_path.iterdir()) == {path, elsewhere, other} and path.read_bytes() == b"again"


def test_processes_save_one_name_at_once(processes, tmp_path):
    path = tmp_path / "network.pt"
    writers = [processes.Process(target=write_often, args=(path, i)) for i in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0] * 4
    assert list(tmp_path.iterdir()) == [path]
    content = torch.load(path, weights_only=True)
    assert content.shape == (1000,) and content.unique().numel() == 1


@pytest.mark.parametrize("error", [OSError("no"), RuntimeError("no"), KeyboardInterrupt()])
def test_what_fails_while_writing_leaves_nothing(tmp_path, error):
    (tmp_path / "file").write_text("before")
    with pytest.raises(UserError if isinstance(error, Exception) else KeyboardInterrupt):  # noqa: SIM117
        with written_whole(tmp_path / "file") as partial:
            partial.write_text("half")
            raise error
    assert contents(tmp_path) == {tmp_path / "file": b"before"}


@pytest.fixture(scope="module")
def saved(in_process, small_files, tmp_path_factory):
    """A file of --save_model."""
    folder = tmp_path_factory.mktemp("models")
    arguments = ("--dataset_path", small_files.parent, *SHORT, *OWN_SEED, "--save_model", folder)
    result = in_process("exp-mnist.py", *arguments, "--hidden_dim", 4, "--trainer", "groupDRO")
    assert result.returncode == 0, result.stderr
    (path,) = folder.iterdir()
    return path


def test_damaged_models_are_refused_or_without_effect(saved, tmp_path):
    """A flipped bit in a weight as well, which torch.load would not notice."""
    expected, path, refused = load_model(saved), tmp_path / "model.pt", 0
    for damaged in itertools.islice(harmed(saved.read_bytes()), None, None, 3):
        path.write_bytes(damaged)
        with warnings.catch_warnings(record=True) as shown:
            try:
                loaded = load_model(path)
            except UserError as error:
                refused += 1
                assert str(path) in str(error) and "\n" not in str(error)
            else:
                for ours, theirs in zip(loaded, expected, strict=True):
                    assert_same_state(ours, theirs)
        assert not shown
    assert refused > 100


def assert_same_state(ours, theirs):
    ours, theirs = ours.state_dict(), theirs.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_hostile_and_other_models_run_nothing(saved, small_files, tmp_path):
    trap, path = tmp_path / "trapped", tmp_path / "model.pt"
    record = torch.load(saved, weights_only=True)
    others = [{}, None, [1], record | {"arguments": {"trainer": "DRO"}}, record | {"loss": {}}]
    others += [record | {"network": {}}, record | {"arguments": None}]
    hostile = [Hostile(trap), {"arguments": Hostile(trap)}, record | {"loss": Hostile(trap)}]
    for content in (*others, *hostile):
        torch.save(content, path)
        with pytest.raises(UserError, match="model.pt") as error:
            load_model(path)
        assert "\n" not in str(error.value) and "cannot read" not in str(error.value)
    with pytest.raises(UserError, match="no network that --save_model wrote"):
        load_model(small_files / "test.pt")
    arguments = record["arguments"]
    weights = {name: torch.full_like(value, np.nan) for name, value in record["network"].items()}
    for changed, message in (
        ({"arguments": arguments | {"trainer": "VREx"}}, "register.py has no VREx"),
        ({"arguments": arguments | {"hidden_dim": [4, 5]}}, "does not fit groupDRO and MLP"),
        ({"arguments": arguments | {"hidden_dim": 4}}, "does not fit groupDRO and MLP"),
        ({"arguments": arguments | {"seed": "x"}}, "no network that --save_model wrote"),
        ({"arguments": arguments | {"dataset_path": 5}}, "no network that --save_model wrote"),
        ({"arguments": arguments | {"trainer": ["IRM"]}}, "no network that --save_model wrote"),
        ({"repetition": "1"}, "no network that --save_model wrote"),
        ({"network": weights}, "nan or infinite"),
    ):
        torch.save(record | changed, path)
        with pytest.raises(UserError, match=message):
            load_model(path)
    for absent in (tmp_path / "none.pt", tmp_path):
        with pytest.raises(UserError, match="cannot read"):
            load_model(absent)
    assert not trap.exists()


def contents(path):
    return {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}


@contextlib.contextmanager
def files_no_larger_than(size):
    """A disk that fills up, as far as this process can tell."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)


def test_full_disk_while_drawing_or_saving(in_process, small_files, tmp_path):
    """One line that says what could not be written, and no half of it is left."""
    with files_no_larger_than(100_000):
        drawn = in_process("preprocessing.py", "--dataset_path", tmp_path / "new")
        folder = tmp_path / "models"
        arguments = ("--dataset_path", small_files.parent, *SHORT, *OWN_SEED)
        arguments += ("--save_model", folder)
        saved = in_process("exp-mnist.py", *arguments)
    assert_one_line(drawn, "preprocessing.py: cannot write", tmp_path / "new" / "ColoredMNIST")
    assert_one_line(saved, "exp-mnist.py: cannot write", folder)
    assert files(tmp_path) <= {"new/.lock"}


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs the device that is always full")
def test_full_disk_under_the_log(command, small_files):
    with open("/dev/full", "w") as full:
        arguments = ("--dataset_path", small_files.parent, *SHORT, *OWN_SEED)
        streams = {"capture_output": False, "stdout": full, "stderr": subprocess.PIPE}
        result = command("exp-mnist.py", *arguments, **streams)
    assert_one_line(result, "exp-mnist.py", "No space left")


def test_reader_that_leaves(small_files):
    arguments = ("--dataset_path", small_files.parent, *SHORT, *OWN_SEED)
    process = start("exp-mnist.py", *arguments)
    process.stdout.close()
    error = process.stderr.read()
    assert process.wait() != 0 and "Traceback" not in error and error.count("\n") <= 1


def test_first_run_draws_and_the_log_says_what_is_read(in_process, tmp_path, dataset_path):
    """The assignment's probabilities, drawn with the run's seed, and read again afterwards."""
    arguments = ("--dataset_path", tmp_path, *SHORT)
    first = in_process("exp-mnist.py", *arguments, "--seed", 11)
    assert first.returncode == 0 and files(tmp_path) - {".lock"} == DRAWN
    settings = "p_f 0.2, p_e [0.1, 0.4, 0.9], sizes [20000, 20000, 20000], shuffle_digits false"
    folder = f"Data: {tmp_path / 'ColoredMNIST'}"
    assert f"{folder}, drawn now with {settings}, seed 11\n" in first.stdout
    before = contents(tmp_path)
    second = in_process("exp-mnist.py", *arguments, "--seed", 12)
    assert f"{folder}, drawn with {settings}, seed 11\n" in second.stdout
    assert contents(tmp_path) == before


@pytest.mark.parametrize("trainer", ["ERM", "groupDRO", "IRM", "Backdoor"])
@pytest.mark.parametrize("size", [1, 2])
def test_tiny_minibatches(in_process, small_files, trainer, size):
    arguments = ("--dataset_path", small_files.parent, "--iteration", 30, "--batch_size", size)
    result = in_process("exp-mnist.py", *arguments, "--trainer", trainer, "--repetitions", 1)
    assert result.returncode == 0, result.stderr
    assert "nan" not in result.stdout.splitlines()[-1]
