"""Readers of data sets, on small files made here; and what they refuse."""

from __future__ import annotations

import gzip
import io
import lzma
import pickle
import struct

import numpy as np
import pytest
import torch

from sparse_engine.errors import FileFormatError, SparseEngineError
from sparse_engine.train.data import ArrayData, as_array_data, augmented, load_data, read_compact, read_idx
from sparse_engine.train.source import BatchSource


def idx(array: np.ndarray) -> bytes:
    return b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_mnist(folder, compress=lambda raw: raw, suffix=""):
    rng = np.random.default_rng(0)
    for stem, n in (("train", 12), ("t10k", 5)):
        images = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        (folder / f"{stem}-images-idx3-ubyte{suffix}").write_bytes(compress(idx(images)))
        (folder / f"{stem}-labels-idx1-ubyte{suffix}").write_bytes(compress(idx(np.arange(n, dtype=np.uint8) % 10)))


@pytest.mark.parametrize("compress, suffix", [(lambda raw: raw, ""), (gzip.compress, ".gz"), (lzma.compress, ".xz")])
def test_mnist_in_every_wrapping(tmp_path, compress, suffix):
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    write_mnist(folder, compress, suffix)
    train, test = load_data(tmp_path)
    assert (len(train), len(test), train.shape) == (12, 5, (1, 28, 28))
    raw = read_idx(folder / f"train-images-idx3-ubyte{suffix}")
    batch = train.batch(torch.tensor([3, 1]))
    want = (torch.from_numpy(raw[[3, 1]].copy()).float() / 255 - 0.1307) / 0.3081
    torch.testing.assert_close(batch.inputs[:, 0], want)
    assert batch.targets.tolist() == [3, 1]
    assert batch.indices.tolist() == [3, 1]


def test_damaged_idx_files(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(idx(np.zeros((3, 4), np.uint8))[:-1])
    with pytest.raises(FileFormatError, match=r"\(3, 4\) but holds 11 bytes"):
        read_idx(path)
    path.write_bytes(b"GIF89a")
    with pytest.raises(FileFormatError, match="not an idx file"):
        read_idx(path)
    (tmp_path / "y.xz").write_bytes(b"nothing")
    with pytest.raises(FileFormatError, match="decompressed"):
        read_idx(tmp_path / "y.xz")


def test_cifar_pickles_are_read(tmp_path):
    rng = np.random.default_rng(1)
    for name, n in (("data_batch_1", 6), ("data_batch_2", 6), ("test_batch", 4)):
        content = {b"data": rng.integers(0, 256, (n, 3072), dtype=np.uint8), b"labels": [i % 10 for i in range(n)]}
        (tmp_path / name).write_bytes(pickle.dumps(content, protocol=2))
    train, test = load_data(tmp_path, augment=True)
    assert (len(train), len(test), train.classes, train.augment) == (12, 4, 10, "flip_crop")
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    for name in ("train", "test"):
        content = {b"data": rng.integers(0, 256, (3, 3072), dtype=np.uint8), b"fine_labels": [0, 99, 5]}
        (folder / name).write_bytes(pickle.dumps(content))
    assert load_data(folder)[0].classes == 100


def test_a_pickle_that_wants_to_run_something_is_not_read(tmp_path):
    class Evil:
        def __reduce__(self):
            return print, ("run",)

    (tmp_path / "data_batch_1").write_bytes(pickle.dumps({b"data": Evil()}))
    with pytest.raises(FileFormatError, match=r"builtins\.print"):
        load_data(tmp_path)
    (tmp_path / "data_batch_1").write_bytes(b"garbage")
    with pytest.raises(FileFormatError, match="not a readable"):
        load_data(tmp_path)


def compact(images: np.ndarray) -> bytes:
    """The encoder of the compact form, pixel by pixel."""
    n, height, width, _ = images.shape
    red, green, blue = (images[..., c].astype(np.int16) for c in range(3))
    planes = [green, red - green, blue - green]
    zigzag = np.zeros((3, n, height, width), np.uint8)
    for c, plane in enumerate(planes):
        for i in range(height):
            for j in range(width):
                if i and j:
                    a, b, d = plane[:, i - 1, j], plane[:, i, j - 1], plane[:, i - 1, j - 1]
                    guess = np.where(
                        d >= np.maximum(a, b),
                        np.minimum(a, b),
                        np.where(d <= np.minimum(a, b), np.maximum(a, b), a + b - d),
                    )
                else:
                    guess = plane[:, i - 1, j] if i else plane[:, i, j - 1] if j else np.zeros(n, np.int16)
                residual = (plane[:, i, j] - guess + 128) % 256 - 128
                zigzag[c, :, i, j] = np.where(residual >= 0, 2 * residual, -2 * residual - 1)
    return lzma.compress(zigzag.tobytes())


def test_compact_files_are_lossless(tmp_path):
    images = np.random.default_rng(2).integers(0, 256, (5, 6, 7, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    payload = np.frombuffer(compact(images), np.uint8)
    np.savez(buffer, payload=payload, shape=np.array(images.shape), labels=np.arange(5))
    (tmp_path / "c.npz").write_bytes(buffer.getvalue())
    decoded, labels = read_compact(tmp_path / "c.npz")
    assert np.array_equal(decoded, images.transpose(0, 3, 1, 2))
    assert labels.tolist() == [0, 1, 2, 3, 4]
    (tmp_path / "c.npz").write_bytes(buffer.getvalue()[:50])
    with pytest.raises(FileFormatError):
        read_compact(tmp_path / "c.npz")


def test_image_folders(tmp_path):
    image = pytest.importorskip("PIL.Image")
    for part in ("train", "val"):
        for label, name in enumerate(("cat", "dog")):
            folder = tmp_path / part / name
            folder.mkdir(parents=True)
            for i in range(2):
                image.new("RGB", (10 + 2 * i, 8), (100 * label, 50, 0)).save(folder / f"{i}.png")
    train, test = load_data(tmp_path)
    assert (len(train), len(test), train.classes, train.shape) == (4, 4, 2, (3, 8, 8))
    assert train.labels.tolist() == [0, 0, 1, 1]
    assert (train.images[2][0] == 100).all()


def test_digits_and_limits():
    train, test = load_data("digits", limit=50)
    assert (len(train), len(test), train.classes, train.shape) == (50, 50, 10, (1, 8, 8))
    x, y, index = train[7]
    assert x.shape == (1, 8, 8)
    assert isinstance(y, int)
    assert index == 7


def test_folders_without_data_say_what_was_looked_for(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(SparseEngineError, match=r"looked for train-images-idx3-ubyte.*found notes.txt"):
        load_data(tmp_path)
    with pytest.raises(SparseEngineError, match="does not exist"):
        load_data(tmp_path / "nowhere")
    write_mnist(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(SparseEngineError, match="lacks t10k-labels"):
        load_data(tmp_path)


def test_wrong_labels_are_refused():
    images = torch.zeros(3, 1, 2, 2)
    with pytest.raises(SparseEngineError, match="labels run from 0 to 10, but there are 10 classes"):
        ArrayData("x", images, torch.tensor([0, 10, 3]), 10)
    with pytest.raises(SparseEngineError, match="do not fit"):
        ArrayData("x", images, torch.tensor([0, 1]), 10)


def test_any_dataset_becomes_arrays():
    data = as_array_data([(torch.ones(5) * i, i % 2) for i in range(4)])
    assert (data.shape, data.classes) == ((1, 1, 5), 2)
    assert as_array_data((torch.zeros(3, 2, 4, 4), torch.tensor([0, 1, 2]))).shape == (2, 4, 4)
    with pytest.raises(SparseEngineError, match="samples have to be"):
        as_array_data([("a", "b")])


def test_augmentation_repeats_and_stays_within_its_reach():
    x = torch.rand(6, 3, 32, 32)
    a = augmented(x, "flip_crop", torch.Generator().manual_seed(1))
    b = augmented(x, "flip_crop", torch.Generator().manual_seed(1))
    assert torch.equal(a, b)
    assert a.shape == x.shape
    for i in range(6):
        candidates = []
        padded = torch.nn.functional.pad(x[i], (4, 4, 4, 4))
        for top in range(9):
            for left in range(9):
                crop = padded[:, top : top + 32, left : left + 32]
                candidates += [crop, crop.flip(2)]
        assert any(torch.equal(a[i], c) for c in candidates)


def source(**options):
    train, _ = load_data("digits", limit=53)
    return BatchSource(train, batch_size=8, seed=4, **options)


def test_epochs_visit_everything_once_and_repeat_by_number():
    batches = list(source(needs={"pairs", "second_view"}).epoch(2))
    seen = torch.cat([b.indices for b in batches])
    assert seen.sort().values.tolist() == list(range(53))
    again = list(source(needs={"pairs", "second_view"}).epoch(2))
    assert all(torch.equal(a.pair_inputs, b.pair_inputs) for a, b in zip(batches, again, strict=True))
    other = torch.cat([b.indices for b in source().epoch(3)])
    assert not torch.equal(seen, other)


def test_ranks_share_each_batch():
    whole = list(source(needs={"pairs"}).epoch(0))
    sources = [source(needs={"pairs"}, rank=r, world=2) for r in (0, 1)]
    for batch, parts in zip(whole, zip(*(s.epoch(0) for s in sources), strict=True), strict=True):
        assert sum(len(p) for p in parts) == len(batch)
        assert torch.equal(torch.cat([p.indices for p in parts]).sort().values, batch.indices.sort().values)
        assert sum(s.share(p) for s, p in zip(sources, parts, strict=True)) == pytest.approx(2)
        torch.testing.assert_close(parts[1].pair_inputs, batch.pair_inputs[1::2])
