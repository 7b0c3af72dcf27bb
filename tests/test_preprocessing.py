"""The environments that are drawn, and where their digits come from."""

import ast
import functools
import gzip
import hashlib
import http.server
import inspect
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import ROOT, assert_one_line, assert_refused, same
from torchvision.datasets import MNIST

import dataset
import preprocessing
from dataset import ColoredMNIST, load_dataset, unseen_samples
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
    for color, image in zip(record["colors"].tolist(), record["images"], strict=True):
        assert image[1 - color].all() and not image[color].any() and not image[2].any()


def grey(samples):
    return samples.images.amax(1)


def test_drawn_once_and_anew_when_deleted(tmp_path):
    first = load_dataset(tmp_path, seed=1)
    assert same(load_dataset(tmp_path, seed=2).test, first.test)
    preprocessing.remove(tmp_path / "ColoredMNIST")
    again = load_dataset(tmp_path, seed=2)
    assert not torch.equal(again.test.labels, first.test.labels)
    assert torch.equal(grey(again.test), grey(first.test))


@pytest.mark.parametrize("shuffle_digits", [False, True])
def test_same_seed_same_files(tmp_path, shuffle_digits):
    folders = [tmp_path / name for name in ("first", "second", "third")]
    for folder, seed in zip(folders, (4, 4, 5), strict=True):
        draw_environments(folder, sizes=(30, 20, 10), seed=seed, shuffle_digits=shuffle_digits)
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
    drawn = "drawn with p_f 0.25, p_e [0.2, 0.1, 0.9], sizes [2000, 2000, 2000], "
    assert f"{drawn}shuffle_digits false, seed 5" in data.description
    flipped = (data.training.labels != (load_mnist()[1][:4000] >= 5)).float().mean()
    assert abs(flipped - 0.25) < 0.03
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
    train2 = ColoredMNIST(root=dataset_path, env="train2")
    image, target, color = train2[5]
    assert len(train2) == 20000 and image.mode == "RGB" and image.size == (28, 28)
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


def test_damaged_digits_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(preprocessing, "DATA", tmp_path)
    whole = (ROOT / "data" / "mnist.npz").read_bytes()
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 1
    for content in (whole[: len(whole) // 2], damaged, b""):
        (tmp_path / "mnist.npz").write_bytes(content)
        with pytest.raises(UserError, match="mnist.npz is damaged"):
            load_dataset(tmp_path)
    assert not (tmp_path / "ColoredMNIST").exists()


RAW = {
    "train-images-idx3-ubyte": ("x_train", 300),
    "train-labels-idx1-ubyte": ("y_train", 300),
    "t10k-images-idx3-ubyte": ("x_test", 200),
    "t10k-labels-idx1-ubyte": ("y_test", 200),
}


@pytest.fixture(scope="session")
def raw_files(tmp_path_factory):
    """MNIST as it is published, in four files, of a few hundred digits, and packed by gzip."""
    folder = tmp_path_factory.mktemp("raw")
    with np.load(ROOT / "data" / "mnist.npz") as archive:
        for name, (key, count) in RAW.items():
            values = archive[key][:count]
            header = bytes([0, 0, 8, values.ndim])  # 8 is for bytes
            header += b"".join(size.to_bytes(4, "big") for size in values.shape)
            (folder / name).write_bytes(header + values.tobytes())
            (folder / f"{name}.gz").write_bytes(gzip.compress(header + values.tobytes(), 1))
    return folder


@pytest.fixture
def without_npz(tmp_path, monkeypatch):
    """The project's folder data without mnist.npz, on a machine without a network."""
    monkeypatch.setattr(preprocessing, "DATA", tmp_path / "data")
    monkeypatch.setattr(MNIST, "mirrors", [(tmp_path / "nowhere").as_uri() + "/"])
    return tmp_path / "data"


def assert_same_digits(part, key, count):
    images, digits = load_mnist(part)
    with np.load(ROOT / "data" / "mnist.npz") as archive:
        assert np.array_equal(images.numpy(), archive[f"x_{key}"][:count])
        assert np.array_equal(digits.numpy(), archive[f"y_{key}"][:count])
    assert images.dtype == digits.dtype == torch.uint8


def put(folder, raw_files, names=tuple(RAW)):
    (folder / "MNIST" / "raw").mkdir(parents=True)
    for name in names:
        shutil.copy(raw_files / name, folder / "MNIST" / "raw")


def test_mnists_own_files_are_read(without_npz, raw_files, in_process, tmp_path):
    """Where there is no mnist.npz; the environments are the same, bit for bit."""
    put(without_npz, raw_files)
    assert_same_digits("train", "train", 300)
    assert_same_digits("test", "test", 200)
    asked = ("--sizes", 100, 100, 100, "--seed", 5)
    assert in_process("preprocessing.py", "--dataset_path", tmp_path, *asked).returncode == 0
    (without_npz / "mnist.npz").symlink_to(ROOT / "data" / "mnist.npz")
    draw_environments(tmp_path / "again", sizes=(100, 100, 100), seed=5)
    for name in ("train1.pt", "train2.pt", "test.pt"):
        ours, theirs = tmp_path / "ColoredMNIST" / name, tmp_path / "again" / "ColoredMNIST" / name
        assert ours.read_bytes() == theirs.read_bytes()


@pytest.fixture
def mirror(raw_files, monkeypatch):
    """A server on this machine that has them, as torchvision's mirrors do."""

    class Silent(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_): ...

    handler = functools.partial(Silent, directory=raw_files)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def test_mnist_is_downloaded(without_npz, raw_files, mirror, monkeypatch, capsys):
    """Once: into data/MNIST/raw, where it is read from then on."""
    monkeypatch.setattr(MNIST, "mirrors", [mirror])
    packed = [(f"{name}.gz", (raw_files / f"{name}.gz").read_bytes()) for name in RAW]
    sums = [(name, hashlib.md5(content).hexdigest()) for name, content in packed]
    monkeypatch.setattr(MNIST, "resources", sums)
    assert_same_digits("test", "test", 200)
    assert "Downloading MNIST" in capsys.readouterr().err
    monkeypatch.setattr(MNIST, "mirrors", [])
    assert_same_digits("train", "train", 300)
    assert "Downloading" not in capsys.readouterr().err
    raw = without_npz / "MNIST" / "raw"
    assert {path.name.removesuffix(".gz") for path in raw.iterdir()} == set(RAW)
    assert [path.name for path in raw.parent.iterdir()] == ["raw"]


@pytest.mark.parametrize("there", [(), tuple(RAW)[:3], tuple(RAW)[1:]])
def test_without_digits_one_line_says_what_to_do(
    without_npz, raw_files, in_process, tmp_path, there
):
    if there:
        put(without_npz, raw_files, there)
    result = in_process("exp-mnist.py", "--dataset_path", tmp_path / "new", "--no_cuda")
    assert result.returncode == 1
    *progress, line = result.stderr.splitlines()
    assert progress == ["Downloading MNIST"]
    for words in (without_npz / "mnist.npz", without_npz / "MNIST" / "raw", "put mnist.npz", ".pt"):
        assert str(words) in line
    assert not (tmp_path / "new" / "ColoredMNIST").exists()
    left = [path.name for path in without_npz.rglob("*") if path.is_file()]
    assert sorted(left) == sorted(there)


def test_a_download_that_breaks_off_is_not_called_a_full_disk(without_npz, monkeypatch, tmp_path):
    class Reset(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.connection.close()

        def log_message(self, *_): ...

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Reset) as server:
        threading.Thread(target=server.serve_forever).start()
        monkeypatch.setattr(MNIST, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
        with pytest.raises(UserError, match="downloaded") as error:
            load_mnist()
        server.shutdown()
    assert "cannot write" not in str(error.value)


def test_a_file_in_the_folders_place_stays(tmp_path):
    (tmp_path / "ColoredMNIST").write_text("mine")
    with pytest.raises(UserError, match="ColoredMNIST is a file"):
        draw_environments(tmp_path, sizes=(30, 20, 10), seed=1)
    assert [path.name for path in tmp_path.iterdir() if path.name != ".lock"] == ["ColoredMNIST"]
    assert (tmp_path / "ColoredMNIST").read_text() == "mine"


def test_damaged_files_of_mnist_are_named(without_npz, raw_files, tmp_path):
    put(without_npz, raw_files)
    path = without_npz / "MNIST" / "raw" / "train-images-idx3-ubyte"
    whole = path.read_bytes()
    for damaged in (whole[:1000], b"", b"\7" * 1000):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="put mnist.npz") as error:
            load_dataset(tmp_path / "new")
        assert "\n" not in str(error.value) and str(path.parent) in str(error.value)


def test_ready_files_need_no_mnist(without_npz, small_files):
    assert len(load_dataset(small_files.parent).test) == 60


@pytest.mark.parametrize("module", [preprocessing, dataset])
def test_torchvision_is_imported_only_where_it_is_needed(module):
    """A training with mnist.npz or ready files starts half a second sooner."""
    at_the_top = [node for node in ast.parse(inspect.getsource(module)).body]
    imports = [ast.unparse(node) for node in at_the_top if "import" in type(node).__name__.lower()]
    assert len(imports) > 5 and not [line for line in imports if "torchvision" in line]


def test_hidden_files_are_no_data(tmp_path):
    """Such as the one that keeps an empty folder in a repository; it stays."""
    folder = tmp_path / "ColoredMNIST"
    folder.mkdir()
    for name in (".gitkeep", ".DS_Store", "._train1.pt"):
        (folder / name).write_bytes(b"hidden")
    assert draw_environments(tmp_path, sizes=(60, 60, 60))
    assert (folder / ".gitkeep").read_bytes() == b"hidden"
    assert len(load_dataset(tmp_path).test) == 60
    assert not draw_environments(tmp_path, sizes=(60, 60, 60))
    assert {path.name for path in tmp_path.iterdir()} == {"ColoredMNIST", ".lock"}


def test_drawn_now_is_said_once(tmp_path):
    draw_environments(tmp_path / "other", sizes=(60, 60, 60), seed=1)
    assert "drawn with" in load_dataset(tmp_path / "other").description
    data = load_dataset(tmp_path, seed=9)
    drawn = "p_f 0.2, p_e [0.1, 0.4, 0.9], sizes [20000, 20000, 20000], shuffle_digits false"
    folder = tmp_path / "ColoredMNIST"
    assert data.description == f"{folder}, drawn now with {drawn}, seed 9"
    assert data.seed == 9
    again = load_dataset(tmp_path, seed=10)
    assert again.description == f"{folder}, drawn with {drawn}, seed 9" and again.seed == 9


def test_unseen_samples_are_of_the_test_environment(data):
    """MNIST's own test digits, coloured as those of `test` are, always the same."""
    unseen = unseen_samples()
    images, digits = load_mnist("test")
    assert torch.equal(grey(unseen), images) and unseen.envs.eq(2).all() and len(unseen) == 10000
    assert [unseen.images.dtype, unseen.labels.dtype] == [torch.uint8, torch.float32]
    # Three standard deviations of a proportion among 10,000 are 0.015 at most.
    assert abs((unseen.labels != (digits >= 5)).float().mean() - 0.2) < 0.015
    assert abs((unseen.colors != unseen.labels).float().mean() - 0.9) < 0.015
    other_color = unseen.images[torch.arange(10000), unseen.colors]
    assert not other_color.any()
    assert same(unseen_samples(), unseen)
    # With the first seed that is no student number, so that figures can be had again.
    drawn = color_digits(images, digits, 0.2, 0.9, torch.Generator().manual_seed(10000))
    assert torch.equal(unseen.labels, drawn["labels"].float())
    assert torch.equal(unseen.colors, drawn["colors"].long())


def test_partial_files_have_names_of_their_own(tmp_path):
    """Of many threads that write one name at once none fails, and the file is one of theirs."""

    def write(content):
        with preprocessing.written_whole(tmp_path / "file") as partial:
            partial.write_text(content)

    with ThreadPoolExecutor(8) as threads:
        assert len([*threads.map(write, map(str, range(300)))]) == 300
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert int((tmp_path / "file").read_text()) in range(300)


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


def test_hidden_files_stay_where_they_were(tmp_path):
    """Also where the folder is a link to a folder elsewhere."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / ".gitkeep").write_text("kept")
    (tmp_path / "data").mkdir()
    folder = tmp_path / "data" / "ColoredMNIST"
    folder.symlink_to(elsewhere)
    assert draw_environments(tmp_path / "data", sizes=(20, 20, 20))
    assert folder.is_symlink() and (elsewhere / ".gitkeep").read_text() == "kept"
    assert {path.name for path in elsewhere.iterdir()} == {
        ".gitkeep",
        "train1.pt",
        "train2.pt",
        "test.pt",
    }
    left = {path.name for path in tmp_path.iterdir()} | {p.name for p in folder.parent.iterdir()}
    assert left == {"data", "elsewhere", "ColoredMNIST", ".lock"}
