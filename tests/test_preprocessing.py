import gzip
import hashlib
import http.server
import struct
import threading

import numpy as np
import pytest
import torch
from conftest import ROOT, assert_one_line

import preprocessing
from preprocessing import ColoredMNIST, UserError, color_digits, load_dataset, load_mnist


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


def test_drawn_once_and_anew_when_deleted(tmp_path):
    first = load_dataset(tmp_path, seed=1)
    assert torch.equal(load_dataset(tmp_path, seed=2).test.labels, first.test.labels)
    preprocessing.remove(tmp_path / "ColoredMNIST")
    again = load_dataset(tmp_path, seed=2)
    assert not torch.equal(again.test.labels, first.test.labels)
    assert torch.equal(again.test.pixels, first.test.pixels)


def test_sizes_of_the_environments(command, tmp_path):
    asked = ("--dataset_path", tmp_path, "--sizes", 30, 20, 10)
    assert command("preprocessing.py", *asked).returncode == 0
    data = load_dataset(tmp_path, sizes=(30, 20, 10))
    assert data.train.envs.bincount().tolist() == [30, 20] and len(data.test.labels) == 10
    digits = torch.cat([data.train.pixels, data.test.pixels])
    assert torch.equal(digits, load_mnist(tmp_path)[0][:60])
    assert_one_line(command("preprocessing.py", *asked[:-1], 11), "[30, 20, 10]", "[30, 20, 11]")
    too_many = command("preprocessing.py", "--dataset_path", tmp_path / "new", *asked[2:-1], 60000)
    assert_one_line(too_many, "--sizes", "60050")
    assert not (tmp_path / "new").exists()


def test_shuffled_digits(command, tmp_path):
    asked = ("--dataset_path", tmp_path, "--sizes", 40, 30, 10)
    assert "shuffle_digits True" in command("preprocessing.py", *asked, "--shuffle_digits").stdout
    data, images = load_dataset(tmp_path), load_mnist(tmp_path)[0]
    assert not torch.equal(data.train.pixels, images[:70])
    of_image = (data.train.pixels.unsqueeze(1) == images[:70]).flatten(2).all(2)
    assert of_image.sum(0).eq(1).all()  # each of the first 70 digits, once
    assert of_image[:40, 40:].any()  # and some of them in the other environment
    assert torch.equal(data.test.pixels, images[70:80])
    assert_one_line(command("preprocessing.py", *asked), "shuffle_digits True", "False")
    other = load_dataset(tmp_path / "other", seed=5, sizes=(40, 30, 10), shuffle_digits=True)
    assert not torch.equal(other.train.pixels, data.train.pixels)


def test_files_that_do_not_say_whether_digits_are_shuffled(small_files):
    folder = small_files
    assert "shuffle_digits False" in load_dataset(folder.parent, shuffle_digits=False).description
    with pytest.raises(UserError, match="shuffle_digits False"):
        load_dataset(folder.parent, shuffle_digits=True)


def test_dataset_interface(dataset_path):
    dataset = ColoredMNIST(root=dataset_path, env="train2")
    image, target, color = dataset[5]
    assert len(dataset) == 20000 and image.mode == "RGB" and image.size == (28, 28)
    pixels = np.asarray(image)
    assert pixels[..., 1 - color].any() and not pixels[..., color].any()
    from torchvision.transforms import ToTensor

    changed = ColoredMNIST(dataset_path, "train2", ToTensor(), target_transform=lambda y: 10 + y)
    tensor, changed_target, _ = changed[5]
    assert tensor.shape == (3, 28, 28) and changed_target == 10 + target
    assert len(ColoredMNIST(dataset_path, "all_train")) == 40000
    with pytest.raises(ValueError, match="all_train"):
        ColoredMNIST(dataset_path, "train3")


def test_command_draws_and_shows_samples(command, tmp_path):
    asked = ("--p_f", "0.25", "--p_e", "0.2", "0.1", "0.9", "--seed", "5")
    result = command("preprocessing.py", "--dataset_path", tmp_path, *asked)
    assert result.returncode == 0 and result.stderr == ""
    assert "seed 5" in result.stdout
    assert (tmp_path / "samples.png").read_bytes().startswith(b"\x89PNG")
    assert len(ColoredMNIST(tmp_path, "test")) == 20000  # whatever it was drawn with
    other = command("preprocessing.py", "--dataset_path", tmp_path, *asked[:-1], "6")
    assert_one_line(other, "seed 5", "6")


def idx(array):
    """An array of bytes in the format of MNIST's files."""
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def server(tmp_path, monkeypatch, mnist):
    """MNIST on a local HTTP server, and torchvision told to download from there."""
    from torchvision.datasets import MNIST

    files = {}
    for part, count in (("train", 60000), ("t10k", 10)):
        files[f"{part}-images-idx3-ubyte.gz"] = idx(mnist[0][:count].numpy())
        files[f"{part}-labels-idx1-ubyte.gz"] = idx(mnist[1][:count].numpy())
    files = {name: gzip.compress(data, 1) for name, data in files.items()}

    class Handler(http.server.BaseHTTPRequestHandler):
        failing = False

        def do_GET(self):
            data = files.get(self.path.strip("/"))
            if self.failing or data is None:
                return self.send_error(403)
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        monkeypatch.setattr(MNIST, "mirrors", [f"http://127.0.0.1:{httpd.server_port}/"])
        sums = [(name, hashlib.md5(data).hexdigest()) for name, data in files.items()]
        monkeypatch.setattr(MNIST, "resources", sums)
        monkeypatch.setattr(preprocessing, "BUNDLED_MNIST", tmp_path / "absent.npz")
        yield Handler
        httpd.shutdown()


def test_download_where_no_digits_are_bundled(server, tmp_path, mnist):
    images, digits = load_mnist(tmp_path)
    assert torch.equal(images, mnist[0]) and torch.equal(digits, mnist[1])
    server.failing = True  # kept, so not needed again
    assert torch.equal(load_mnist(tmp_path)[1], digits)
    assert {path.name for path in tmp_path.iterdir()} <= {"mnist.npz", ".lock"}


def test_failing_download_says_what_to_put_where(server, tmp_path):
    server.failing = True
    with pytest.raises(UserError) as caught:
        load_dataset(tmp_path)
    message = str(caught.value)
    assert "\n" not in message
    for word in ("mnist.npz", "train1.pt", "test.pt", str(tmp_path / "ColoredMNIST")):
        assert word in message
    assert {path.name for path in tmp_path.iterdir()} <= {".lock"}


def test_damaged_digits_are_named(tmp_path):
    whole = (ROOT / "data" / "mnist.npz").read_bytes()
    (tmp_path / "mnist.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="mnist.npz is damaged"):
        load_dataset(tmp_path)
