from __future__ import annotations

import gzip
import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from compressm.errors import ConfigError
from compressm.lab.config import DataConfig, parse_config
from compressm.lab.data.datasets import BatchOrder, _pooled, load_data, read_cifar_binary, read_cifar_jpeg

REAL = os.environ.get("COMPRESSM_DATA")
needs_mnist = pytest.mark.skipif(not REAL, reason="COMPRESSM_DATA names no directory with MNIST")


def test_digits_are_split_once_and_for_all() -> None:
    data = load_data(DataConfig(name="digits", validation=0.25))
    sizes = [len(split) for split in (data.train, data.validation, data.test)]
    assert sum(sizes) == 1797
    assert [round(size / 1797, 2) for size in sizes] == [0.6, 0.2, 0.2]
    assert (data.channels, data.n_classes, data.train.x.shape[1]) == (1, 10, 64)
    for split in (data.train, data.validation, data.test):
        counts = torch.bincount(split.y, minlength=10) / len(split)
        assert counts.min() > 0.09
        assert counts.max() < 0.11
    again = load_data(DataConfig(name="digits", validation=0.25))
    assert torch.equal(data.validation.x, again.validation.x)
    other = load_data(DataConfig(name="digits", validation=0.1))
    assert torch.equal(data.test.x, other.test.x)


def test_no_digit_is_lost_or_in_two_splits() -> None:
    from sklearn.datasets import load_digits

    data = load_data(DataConfig(name="digits"))
    ours = torch.cat([split.x[:, :, 0] for split in (data.train, data.validation, data.test)]).numpy()
    theirs = load_digits(return_X_y=True)[0].astype(np.uint8)
    assert sorted(map(bytes, ours)) == sorted(map(bytes, theirs))


def test_normalisation_is_that_of_the_training_data() -> None:
    data = load_data(DataConfig(name="digits", validation=0.25))
    x, y = data.batch(data.train, torch.arange(len(data.train)))
    assert x.dtype == torch.float32
    assert x.mean().abs() < 1e-2
    assert (x.std() - 1).abs() < 1e-2
    assert torch.equal(y, data.train.y)


def test_batches_cover_a_split_in_shares() -> None:
    data = load_data(DataConfig(name="digits"))
    for world in (1, 2, 3):
        seen = torch.cat([y for rank in range(world) for _, y in data.batches(data.test, 50, rank, world)])
        assert torch.equal(seen.sort().values, data.test.y.sort().values)


def test_order_is_a_function_of_seed_and_step() -> None:
    order = BatchOrder(23, 5, seed=3)
    assert order.steps_per_epoch == 4
    batches = [order.indices(step).clone() for step in range(12)]
    for epoch in range(3):
        assert len(torch.cat(batches[4 * epoch : 4 * epoch + 4]).unique()) == 20
    assert not torch.equal(batches[0], batches[4])
    resumed = BatchOrder(23, 5, seed=3)  # any step, in any order, from a fresh start
    assert all(torch.equal(resumed.indices(step), batches[step]) for step in (7, 2, 11, 0))
    assert not torch.equal(BatchOrder(23, 5, seed=4).indices(0), batches[0])
    with pytest.raises(ConfigError, match=r"run\.batch_size = 24: more than the 23 training sequences"):
        BatchOrder(23, 24, seed=0)


def test_missing_directories_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COMPRESSM_DATA", raising=False)
    with pytest.raises(
        ConfigError, match=r"data.root: missing, and smnist is read from files; .* train-images-idx3-ubyte.gz"
    ):
        load_data(DataConfig(name="smnist"))
    with pytest.raises(ConfigError, match=r"data.root = '.*nowhere': no such directory"):
        load_data(DataConfig(name="smnist", root=str(tmp_path / "nowhere")))
    with pytest.raises(ConfigError, match=r"data.root: .* lacks train-images-idx3-ubyte.gz, train-labels"):
        load_data(DataConfig(name="psmnist", root=str(tmp_path)))
    with pytest.raises(
        ConfigError, match=r"data.root: neither .* holds cifar-10-binary.tar.gz \(or cifar10_jpg.tar.gz\)"
    ):
        load_data(DataConfig(name="scifar", root=str(tmp_path)))
    monkeypatch.setenv("COMPRESSM_DATA", str(tmp_path / "elsewhere"))
    with pytest.raises(ConfigError, match=r"COMPRESSM_DATA = '.*elsewhere': no such directory"):
        load_data(DataConfig(name="smnist"))


def test_files_that_are_not_the_originals(tmp_path: Path) -> None:
    (tmp_path / "mnist").mkdir()
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        (tmp_path / "mnist" / f"{name}-ubyte.gz").write_bytes(gzip.compress(b"something else"))
    with pytest.raises(ConfigError, match=r"train-images-idx3-ubyte.gz has MD5 .*, the original f68b3c2d"):
        load_data(DataConfig(name="smnist", root=str(tmp_path)))
    (tmp_path / "cifar-10-binary.tar.gz").write_bytes(b"")
    with pytest.raises(ConfigError, match="the original c32a1d4a"):
        load_data(DataConfig(name="scifar", root=str(tmp_path)))


def _archive(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def test_cifar_binary_format() -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (6, 32, 32, 3), np.uint8)
    labels = [3, 1, 4, 1, 5, 9]
    rows = [bytes([label]) + image.transpose(2, 0, 1).tobytes() for label, image in zip(labels, images, strict=True)]
    files = {f"cifar-10-batches-bin/data_batch_{i + 1}.bin": rows[i] for i in range(5)}
    files |= {"cifar-10-batches-bin/test_batch.bin": rows[5], "cifar-10-batches-bin/readme.html": b"text"}
    (x, y), (test_x, test_y) = read_cifar_binary(_archive(files))
    assert y.tolist() == labels[:5]
    assert test_y.tolist() == [9]
    assert np.array_equal(x.numpy(), images[:5].reshape(5, 1024, 3))
    assert np.array_equal(test_x.numpy(), images[5:].reshape(1, 1024, 3))


def test_cifar_jpeg_archive(tmp_path: Path) -> None:
    from PIL import Image

    def jpeg(colour: tuple[int, int, int]) -> bytes:
        buffer = io.BytesIO()
        Image.new("RGB", (32, 32), colour).save(buffer, "JPEG", quality=95)
        return buffer.getvalue()

    red, blue = (200, 30, 30), (30, 30, 200)
    files = {
        "train/truck/0000.jpg": jpeg(blue),
        "train/airplane/0001.jpg": jpeg(red),
        "test/cat/0000.jpg": jpeg(red),
        "README.md": b"text",
    }
    path = tmp_path / "cifar10_jpg.tar.gz"
    path.write_bytes(_archive(files))
    (x, y), (test_x, test_y) = read_cifar_jpeg(path)
    assert y.tolist() == [0, 9]
    assert test_y.tolist() == [3]
    # JPEG is lossy, but a uniform colour comes back within rounding of the YCbCr conversion.
    assert (x[0].int() - torch.tensor(red)).abs().max() <= 3
    assert (x[1].int() - torch.tensor(blue)).abs().max() <= 3
    assert test_x.shape == (1, 1024, 3)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ConfigError, match="is damaged"):
        read_cifar_jpeg(path)
    path.write_bytes(_archive({"README.md": b"text"}))
    with pytest.raises(ConfigError, match="does not hold 32 x 32 images"):
        read_cifar_jpeg(path)


@needs_mnist
def test_real_mnist() -> None:
    assert REAL is not None
    plain = load_data(DataConfig(name="smnist", root=REAL))
    permuted = load_data(DataConfig(name="psmnist", root=REAL))
    assert (len(plain.train) + len(plain.validation), len(plain.test)) == (60_000, 10_000)
    assert plain.train.x.shape[1:] == (784, 1)
    assert plain.test.y[:5].tolist() == [7, 2, 1, 0, 4]
    x = torch.cat([plain.train.x, plain.validation.x]).float()
    assert abs(float(x.mean()) - 33.32) < 0.01
    assert abs(float(x.std()) - 78.57) < 0.01
    order = torch.randperm(784, generator=torch.Generator().manual_seed(0))
    assert torch.equal(permuted.test.x, plain.test.x[:, order])
    assert torch.equal(permuted.train.y, plain.train.y)
    # Rows of an image seen as text: the first test image is a 7, with its bar at the top.
    image = plain.test.x[0, :, 0].view(28, 28)
    assert int((image[7:10] > 0).sum()) > int((image[20:23] > 0).sum())


@pytest.mark.parametrize(("pool", "channels"), [(1, 1), (2, 1), (2, 3), (4, 3)])
def test_pooling_averages_blocks_of_pixels(pool: int, channels: int) -> None:
    images = torch.randint(256, (5, 8, 8, channels), generator=torch.Generator().manual_seed(0))
    pooled = _pooled(images.to(torch.uint8).view(5, 64, channels), pool)
    side = 8 // pool
    assert pooled.shape == (5, side**2, channels)
    assert pooled.dtype == torch.uint8
    for row in range(side):
        for column in range(side):
            block = images[:, row * pool : (row + 1) * pool, column * pool : (column + 1) * pool].double()
            error = pooled[:, row * side + column].double() - block.mean((1, 2))
            assert error.abs().max() <= 0.5


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            {"name": "digits", "pool": 2},
            r"data\.pool = 2: is for images of 28 and 32 pixels a side and fsdd, not for digits",
        ),
        (
            {"name": "smnist", "max_length": 100},
            r"data\.max_length = 100: is for imdb, fsdd, listops, .*, not for smnist",
        ),
        ({"name": "imdb", "examples": 100}, r"data\.examples = 100: is for listops, mackey-glass, mqar, not for imdb"),
    ],
)
def test_options_of_other_data(data: dict[str, object], message: str) -> None:
    tree = {"data": data, "model": {"d_model": 2, "d_state": 2}, "compression": {"states": 1}, "run": {"steps": 10}}
    with pytest.raises(ConfigError, match=message):
        parse_config(tree)


def test_listops_splits_are_different_and_made_anew_alike() -> None:
    config = DataConfig.model_validate({"name": "listops", "max_length": 40, "examples": 300})
    data, again = load_data(config), load_data(config)
    assert torch.equal(data.train.x, again.train.x)
    assert (len(data.train), len(data.validation), len(data.test)) == (300, 2000, 2000)
    rows = [set(map(bytes, split.x[..., 0].numpy())) for split in (data.train, data.validation, data.test)]
    assert len(rows[0] & rows[2]) < 3
    assert not torch.equal(data.validation.x, data.test.x)
    u, _ = data.batch(data.test, torch.arange(5))
    assert u.dtype == torch.int64
    assert int(u.max()) < (data.vocabulary or 0)


@needs_mnist
def test_real_mnist_in_196_steps() -> None:
    data, whole = (load_data(DataConfig(name="smnist", pool=pool)) for pool in (2, 1))
    assert data.label == "sMNIST, 196 steps"
    assert data.train.x.shape == (len(whole.train), 196, 1)
    assert torch.equal(data.train.y, whole.train.y)
    mean = (data.train.x.float().mean() - whole.train.x.float().mean()).abs()
    assert mean < 0.5
