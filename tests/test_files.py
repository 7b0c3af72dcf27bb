"""Foreign, damaged and hostile files; interrupted and concurrent runs."""

import contextlib
import io
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import signal
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
from dataset import MEAN, STD, load_dataset, read_file
from preprocessing import UserError

NAMES = ("train1", "train2", "test")
SHORT = ("--no_cuda", "--iteration", 3, "--repetitions", 1, "--batch_size", 20)


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
    assert "course project's form" in theirs.description and len(theirs.test) == 40
    assert same(ours.training, theirs.training)
    assert same(ours.test[torch.arange(40)], theirs.test)


def test_framework_form(framework_form, small_files):
    ours, theirs = load(small_files), load(framework_form)
    assert "course framework's form" in theirs.description
    assert same(ours.training[torch.arange(0, 120, 2)], theirs.training)
    assert same(ours.training[torch.arange(1, 120, 2)], theirs.validation)
    assert same(ours.test, theirs.test)
    training, validation = theirs.hold_out(0.5)  # the split of the files stays
    assert same(training, theirs.training) and same(validation, theirs.validation)


def test_results_from_foreign_files_are_the_same(
    in_process, course_project_form, framework_form, folder
):
    """Bit for bit where the split is the user's own; the framework's split is used as it is."""
    record = torch.load(folder / "test.pt", weights_only=True)
    short = {key: field[:40] if torch.is_tensor(field) else field for key, field in record.items()}
    torch.save(short, folder / "test.pt")

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
    digits, form = read_file(tmp_path / "train2.pt", 1)
    assert same(digits, read_file(small_files / "train2.pt", 1)[0])
    assert "course project's form" in form


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
    whole, (digits, form) = path.read_bytes(), read_file(path, 2)
    refused = 0
    for damaged in harmed(whole):
        path.write_bytes(damaged)
        try:
            digits_read, form_read = read_file(path, 2)
        except UserError as error:
            refused += 1
            message = str(error)
            assert "test.pt cannot be used" in message and "replace it, or delete" in message
            assert "\n" not in message
        else:
            assert same(digits_read, digits) and form_read == form
    assert refused > 300
    path.write_bytes(whole)
    load(folder)


def test_swapped_members_are_not_read_as_other_data(folder):
    path = folder / "test.pt"
    whole, (digits, _) = path.read_bytes(), read_file(path, 2)
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    for i in range(len(names)):
        for j in range(i):
            a, b = names[i], names[j]
            rezip(path, zipfile.ZIP_STORED, lambda m, a=a, b=b: m | {a: m[b], b: m[a]})
            with contextlib.suppress(UserError):
                assert same(read_file(path, 2)[0], digits), (a, b)
            path.write_bytes(whole)


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_code_in_a_file_is_not_run(folder, tmp_path, command):
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
    assert_one_line(command("exp-mnist.py", "--dataset_path", tmp_path), "train1.pt", "replace it")
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
        {"images": 1},
        {},
        [],
        None,
        torch.zeros(3),
        [(image(), 1)],
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


def test_killed_while_drawing(tmp_path):
    """SIGKILL at many moments; the next run draws whole files and clears the leftovers away."""
    context, states = multiprocessing.get_context("forkserver"), set()
    context.set_forkserver_preload(["preprocessing"])
    for wait in range(8):
        path = tmp_path / str(wait)
        process = context.Process(target=preprocessing.draw_environments, args=(path,))
        process.start()
        while process.is_alive() and not (path / ".lock").exists():
            time.sleep(0.002)
        time.sleep(wait * 0.06)
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
    assert [(run.returncode, output[1]) for run, output in zip(runs, outputs, strict=True)] == [
        (0, ""),
        (0, ""),
    ]
    assert files(tmp_path) - {".lock"} == DRAWN
    data = [[line for line in out.splitlines() if "drawn with" in line] for out, _ in outputs]
    assert data[0] == data[1] and len(data[0]) == 1


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


def test_killed_while_saving_a_model(in_process, small_files, tmp_path):
    """A leftover of an earlier run is replaced; the model is whole or absent."""
    leftover = tmp_path / ".ERM_MLP_seed1234_repetition1.pt.partial"
    leftover.write_bytes(b"half")
    arguments = ("--dataset_path", small_files.parent, *SHORT, "--save_model", tmp_path)
    result = in_process("exp-mnist.py", *arguments)
    assert result.returncode == 0, result.stderr
    assert files(tmp_path) - {".lock"} == {"ERM_MLP_seed1234_repetition1.pt"}


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
        arguments = ("--dataset_path", small_files.parent, *SHORT, "--save_model", folder)
        saved = in_process("exp-mnist.py", *arguments)
    assert_one_line(drawn, "preprocessing.py: cannot write", tmp_path / "new" / "ColoredMNIST")
    assert_one_line(saved, "exp-mnist.py: cannot write", folder)
    assert files(tmp_path) <= {"new/.lock", "models/.lock"}


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs the device that is always full")
def test_full_disk_under_the_log(command, small_files):
    with open("/dev/full", "w") as full:
        arguments = ("--dataset_path", small_files.parent, *SHORT)
        streams = {"capture_output": False, "stdout": full, "stderr": subprocess.PIPE}
        result = command("exp-mnist.py", *arguments, **streams)
    assert_one_line(result, "exp-mnist.py", "No space left")


def test_reader_that_leaves(small_files):
    process = start("exp-mnist.py", "--dataset_path", small_files.parent, *SHORT)
    process.stdout.close()
    error = process.stderr.read()
    assert process.wait() != 0 and "Traceback" not in error and error.count("\n") <= 1


def test_first_run_draws_and_the_log_says_what_is_read(in_process, tmp_path, dataset_path):
    """The assignment's probabilities, drawn with the run's seed, and read again afterwards."""
    arguments = ("--dataset_path", tmp_path, *SHORT)
    first = in_process("exp-mnist.py", *arguments, "--seed", 11)
    assert first.returncode == 0 and files(tmp_path) - {".lock"} == DRAWN
    drawn = f"Data: {tmp_path / 'ColoredMNIST'}, drawn with p_f 0.2, p_e [0.1, 0.4, 0.9]"
    line = f"{drawn}, shuffle_digits false, seed 11\n"
    assert line in first.stdout
    before = contents(tmp_path)
    assert line in in_process("exp-mnist.py", *arguments, "--seed", 12).stdout
    assert contents(tmp_path) == before


@pytest.mark.parametrize("trainer", ["ERM", "groupDRO", "IRM", "Backdoor"])
@pytest.mark.parametrize("size", [1, 2])
def test_tiny_minibatches(in_process, small_files, trainer, size):
    arguments = ("--dataset_path", small_files.parent, "--iteration", 30, "--batch_size", size)
    result = in_process("exp-mnist.py", *arguments, "--trainer", trainer, "--repetitions", 1)
    assert result.returncode == 0, result.stderr
    assert "nan" not in result.stdout.splitlines()[-1]
