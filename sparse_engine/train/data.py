"""Data sets that need no download code: MNIST and Fashion-MNIST (idx), CIFAR (python pickles, compact npz), image
folders, scikit-learn's digits.

Example::

    train, test = load_data("digits")
    train, test = load_data("path/to/cifar-10-batches-py", augment=True)
    inputs, target, index = train[3]
"""

from __future__ import annotations

import gzip
import io
import lzma
import pickle
import struct
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparse_engine.distill.batch import Batch
from sparse_engine.errors import FileFormatError, SparseEngineError

#: Channel means and standard deviations by data set (of pixels in 0..1).
STATISTICS = {
    "mnist": ((0.1307,), (0.3081,)),
    "fashion_mnist": ((0.2860,), (0.3530,)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "digits": ((0.3053,), (0.3764,)),
}


@dataclass(frozen=True)
class ArrayData:
    """Images in memory with their labels; samples know their index, batches are made without per-sample Python.

    Example::

        data = ArrayData("toy", images, labels, classes=10)     # uint8 [N, C, H, W], int64 [N]
        data.batch(torch.tensor([0, 5, 7])).inputs.shape        # (3, C, H, W)

    Args:
        name: for messages and logs.
        images: uint8 [N, C, H, W] or float32 [N, C, H, W] (already scaled).
        labels: int64 [N], 0 to classes − 1.
        classes: number of classes.
        mean, std: per channel, applied to pixels in 0..1.
        augment: None, ``"flip_crop"`` (mirror and 4-pixel shifts with zero padding) or ``"shift"`` (shifts of 2
            pixels).
        indices: positions in the full data set, when this is a part of it.
    """

    name: str
    images: Tensor
    labels: Tensor
    classes: int
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    augment: str | None = None
    indices: Tensor | None = field(default=None)

    def __post_init__(self) -> None:
        if self.images.dim() != 4 or len(self.images) != len(self.labels):
            raise SparseEngineError(
                f"{self.name}: images {tuple(self.images.shape)} and labels {tuple(self.labels.shape)} do not "
                "fit; expected [N, C, H, W] and [N]"
            )
        if len(self.labels) and not (int(self.labels.min()) >= 0 and int(self.labels.max()) < self.classes):
            raise SparseEngineError(
                f"{self.name}: labels run from {int(self.labels.min())} to {int(self.labels.max())}, but there "
                f"are {self.classes} classes (0 to {self.classes - 1})"
            )
        if self.augment not in (None, "flip_crop", "shift"):
            raise SparseEngineError(
                f"{self.name}: augment is {self.augment!r}; known are None, 'flip_crop' and 'shift'"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, position: int) -> tuple[Tensor, int, int]:
        if not -len(self) <= position < len(self):
            raise IndexError(position)
        batch = self.batch(torch.tensor([position % len(self)]))
        return batch.inputs[0], int(batch.targets[0]), int(batch.indices[0])  # type: ignore[index]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of a sample."""
        return tuple(self.images.shape[1:])  # type: ignore[return-value]

    def batch(
        self, positions: Tensor, *, generator: torch.Generator | None = None, augment: bool | None = None
    ) -> Batch:
        """The samples at ``positions`` as one batch, normalised, augmented when the data set says so.

        ``batch.indices`` are positions *in this data set* (0 to len − 1), which is what tables and scores are indexed
        by.
        """
        x = self.images[positions]
        x = x.float().div_(255) if x.dtype == torch.uint8 else x.clone()
        mean = torch.tensor(self.mean).view(1, -1, 1, 1)
        std = torch.tensor(self.std).view(1, -1, 1, 1)
        x = (x - mean) / std
        if self.augment and augment is not False:
            x = augmented(x, self.augment, generator, fill=(-mean / std))
        return Batch(x, self.labels[positions], positions.clone())

    def subset(self, positions: Tensor | Sequence[int]) -> ArrayData:
        """The samples at ``positions``; ``indices`` remembers where they came from."""
        positions = torch.as_tensor(positions, dtype=torch.long)
        origin = positions if self.indices is None else self.indices[positions]
        return replace(self, images=self.images[positions], labels=self.labels[positions], indices=origin)

    def with_labels(self, labels: Tensor) -> ArrayData:
        """The same images with other labels (label-noise experiments)."""
        return replace(self, labels=labels)

    def without_augmentation(self) -> ArrayData:
        """The same data, never augmented."""
        return replace(self, augment=None)


def augmented(x: Tensor, kind: str, generator: torch.Generator | None = None, fill: Tensor | float = 0.0) -> Tensor:
    """Random shifts (and, for ``"flip_crop"``, mirror images) of a batch, per sample, from one generator.

    Args:
        x: [N, C, H, W].
        kind: ``"flip_crop"`` (up to an eighth of the side) or ``"shift"`` (up to a 14th, at least one pixel).
        generator: of the random numbers.
        fill: value of what is shifted in, broadcastable to [1, C, 1, 1].
    """
    n, _, height, width = x.shape
    reach = max(1, height // 8) if kind == "flip_crop" else max(1, height // 14)
    fill = torch.as_tensor(fill, dtype=x.dtype)
    padded = torch.nn.functional.pad(x - fill, (reach,) * 4) + fill
    offsets = torch.randint(0, 2 * reach + 1, (2, n), generator=generator)
    rows = offsets[0][:, None] + torch.arange(height)
    columns = offsets[1][:, None] + torch.arange(width)
    if kind == "flip_crop":
        mirrored = torch.rand(n, generator=generator) < 0.5
        columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    samples = torch.arange(n)
    return (
        padded.permute(0, 2, 3, 1)[samples[:, None, None], rows[:, :, None], columns[:, None, :]]
        .permute(0, 3, 1, 2)
        .contiguous()
    )


def load_data(
    source: str | Path, *, augment: bool | str | None = None, limit: int | None = None
) -> tuple[ArrayData, ArrayData]:
    """The training and test parts of a data set.

    Example::

        train, test = load_data("digits")
        train, test = load_data("data/MNIST")

    Args:
        source: ``"digits"`` (scikit-learn's 8×8 digits: every fifth sample is a test sample), or a folder, recognised
            by its files: idx files (``train-images-idx3-ubyte``, plain, .gz or .xz, also below ``raw/`` or
                ``MNIST/raw/``), ``cifar-10-batches-py`` or
            ``cifar-100-python``, compact ``cifar10_*.npz`` / ``cifar100_*.npz``, or an image folder
            ``train/CLASS/*.png`` with ``test/`` or ``val/``.
        augment: for the training part; True = the usual one of the data set.
        limit: use only the first so many training and test samples (quick runs).

    Returns:
        (train, test).

    Raises:
        SparseEngineError: when the folder does not hold what is needed; the message lists the files looked for.
    """
    if str(source) == "digits":
        train, test = _digits()
    else:
        folder = Path(source).expanduser()
        if not folder.is_dir():
            raise SparseEngineError(
                f"data folder {str(source)!r} does not exist; give a folder, or 'digits' for scikit-learn's digits"
            )
        train, test = _from_folder(folder)
    if augment:
        usual = "flip_crop" if train.name.startswith(("cifar", "images")) else "shift"
        train = replace(train, augment=usual if augment is True else augment)
    if limit is not None:
        train, test = (part.subset(torch.arange(min(limit, len(part)))) for part in (train, test))
    return train, test


def as_array_data(dataset: Any, classes: int | None = None, name: str = "dataset") -> ArrayData:
    """Any map-style dataset of (image tensor, label, …) read into memory.

    Raises:
        SparseEngineError: when a sample is not (tensor, integer).
    """
    if isinstance(dataset, ArrayData):
        return dataset
    if isinstance(dataset, tuple) and len(dataset) == 2 and all(isinstance(part, Tensor) for part in dataset):
        images, labels = dataset
    else:
        try:
            samples = [dataset[i] for i in range(len(dataset))]
            images = torch.stack([torch.as_tensor(sample[0]) for sample in samples])
            labels = torch.tensor([int(sample[1]) for sample in samples])
        except (TypeError, ValueError, RuntimeError, IndexError) as error:
            raise SparseEngineError(
                f"{name}: samples have to be (tensor of one shape, integer label): {error}"
            ) from None
    while images.dim() < 4:  # vectors become 1×1×K images, matrices one channel
        images = images.unsqueeze(1)
    images = images if images.dtype == torch.uint8 else images.float()
    return ArrayData(name, images, labels.long(), classes or int(labels.max()) + 1)


# --- the formats ------------------------------------------------------------------------------------------------------


def _digits() -> tuple[ArrayData, ArrayData]:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise SparseEngineError(
            "the digits data come with scikit-learn, which is not installed: pip install scikit-learn"
        ) from None
    bunch = load_digits()
    images = torch.from_numpy(bunch.images).float().div(16).unsqueeze(1)
    labels = torch.from_numpy(bunch.target).long()
    held_out = torch.arange(len(labels)) % 5 == 4
    mean, std = STATISTICS["digits"]
    return tuple(ArrayData("digits", images[part], labels[part], 10, mean, std) for part in (~held_out, held_out))  # type: ignore[return-value]


def _from_folder(folder: Path) -> tuple[ArrayData, ArrayData]:
    for place in (folder, folder / "raw", folder / "MNIST" / "raw", folder / "FashionMNIST" / "raw"):
        if _idx_file(place, "train-images-idx3-ubyte"):
            return _idx(place)
    for place in (folder, folder / "cifar-10-batches-py"):
        if (place / "data_batch_1").exists():
            return _cifar10_pickles(place)
    for place in (folder, folder / "cifar-100-python"):
        if (place / "train").is_file():
            return _cifar100_pickles(place)
    for place in (folder, folder / "cifar10"):
        if (place / "cifar10_data_batch_1.npz").exists():
            return _compact(
                place, "cifar10", [f"cifar10_data_batch_{i}.npz" for i in range(1, 6)], "cifar10_test_batch.npz", 10
            )
    for place in (folder, folder / "cifar100"):
        if (place / "cifar100_train_1.npz").exists():
            return _compact(
                place, "cifar100", [f"cifar100_train_{i}.npz" for i in range(1, 6)], "cifar100_test.npz", 100
            )
    if (folder / "train").is_dir() and ((folder / "test").is_dir() or (folder / "val").is_dir()):
        return _image_folder(folder)
    held = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
    raise SparseEngineError(
        f"{folder} holds no data set that is known: looked for train-images-idx3-ubyte[.gz|.xz] (MNIST), "
        "data_batch_1 (CIFAR-10), train and test "
        f"(CIFAR-100), cifar10_data_batch_1.npz, and train/CLASS/*.png with test/ or val/; found {held}"
    )


def _idx_file(folder: Path, stem: str) -> Path | None:
    return next((path for suffix in ("", ".gz", ".xz") if (path := folder / (stem + suffix)).is_file()), None)


def read_idx(path: Path) -> np.ndarray:
    """An idx file (plain, gzip or xz) as an array.

    Raises:
        FileFormatError: when the header or the length is wrong.
    """
    raw = path.read_bytes()
    try:
        raw = gzip.decompress(raw) if path.suffix == ".gz" else lzma.decompress(raw) if path.suffix == ".xz" else raw
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise FileFormatError(f"{path} cannot be decompressed: {error}") from None
    if len(raw) < 4 or raw[:3] != b"\0\0\x08":
        raise FileFormatError(f"{path} is not an idx file of bytes (it starts with {raw[:4].hex()})")
    dimensions = raw[3]
    header = 4 + 4 * dimensions
    shape = struct.unpack(f">{dimensions}I", raw[4:header]) if len(raw) >= header else ()
    if len(shape) != dimensions or len(raw) - header != int(np.prod(shape, dtype=np.int64)):
        raise FileFormatError(f"{path} announces shape {shape} but holds {max(0, len(raw) - header)} bytes of data")
    return np.frombuffer(raw, np.uint8, offset=header).reshape(shape)


def _idx(folder: Path) -> tuple[ArrayData, ArrayData]:
    name = "fashion_mnist" if "fashion" in str(folder).lower() else "mnist"
    mean, std = STATISTICS[name]
    parts = []
    for stem in ("train", "t10k"):
        files = {}
        for kind in ("images-idx3", "labels-idx1"):
            path = _idx_file(folder, f"{stem}-{kind}-ubyte")
            if path is None:
                raise SparseEngineError(f"{folder} lacks {stem}-{kind}-ubyte (plain, .gz or .xz)")
            files[kind] = torch.from_numpy(read_idx(path).copy())
        images = files["images-idx3"]
        if images.dim() != 3:
            raise FileFormatError(f"{folder}: {stem} images have shape {tuple(images.shape)}, expected [N, H, W]")
        parts.append(ArrayData(name, images.unsqueeze(1), files["labels-idx1"].long(), 10, mean, std))
    return parts[0], parts[1]


class _PlainUnpickler(pickle.Unpickler):
    """Reads containers, strings, numbers and numpy arrays, and nothing that could run code."""

    _ALLOWED = {
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("_codecs", "encode"),
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ALLOWED:
            raise FileFormatError(f"the pickle asks for {module}.{name}, which a CIFAR file never does; it is not read")
        if name == "_reconstruct":
            return np._core.multiarray._reconstruct
        return super().find_class(module, name)


def _safe_pickle(path: Path) -> dict[Any, Any]:
    try:
        content = _PlainUnpickler(io.BytesIO(path.read_bytes()), encoding="latin1").load()
    except FileFormatError as error:
        raise FileFormatError(f"{path}: {error}") from None
    except FileNotFoundError:
        raise SparseEngineError(f"{path} is missing") from None
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise FileFormatError(f"{path} is not a readable CIFAR file: {error}") from None
    if not isinstance(content, dict):
        raise FileFormatError(f"{path} holds a {type(content).__name__}, expected a dict")
    return {key.decode() if isinstance(key, bytes) else key: value for key, value in content.items()}


def _cifar_part(name: str, paths: list[Path], label_key: str, classes: int) -> ArrayData:
    images, labels = [], []
    for path in paths:
        content = _safe_pickle(path)
        data = content.get("data")
        if not isinstance(data, np.ndarray) or data.ndim != 2 or data.shape[1] != 3072 or label_key not in content:
            raise FileFormatError(f"{path} lacks 'data' of shape [N, 3072] or {label_key!r}")
        images.append(torch.from_numpy(np.ascontiguousarray(data, dtype=np.uint8)).view(-1, 3, 32, 32))
        labels.append(torch.tensor(list(content[label_key]), dtype=torch.long))
    mean, std = STATISTICS[name]
    return ArrayData(name, torch.cat(images), torch.cat(labels), classes, mean, std)


def _cifar10_pickles(folder: Path) -> tuple[ArrayData, ArrayData]:
    batches = [folder / f"data_batch_{i}" for i in range(1, 6) if (folder / f"data_batch_{i}").exists()]
    return _cifar_part("cifar10", batches, "labels", 10), _cifar_part("cifar10", [folder / "test_batch"], "labels", 10)


def _cifar100_pickles(folder: Path) -> tuple[ArrayData, ArrayData]:
    train, test = (_cifar_part("cifar100", [folder / part], "fine_labels", 100) for part in ("train", "test"))
    return train, test


def read_compact(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [N, 3, H, W] and labels of a compact CIFAR file.

    The file holds the green plane and the differences of red and blue to it, each predicted from the neighbours above,
    to the left and above left (median edge detector); the residuals are zigzag-coded and xz-compressed.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            labels = file["labels"].astype(np.int64)
            n, height, width, channels = (int(size) for size in file["shape"])
            raw = lzma.decompress(file["payload"].tobytes())
    except FileNotFoundError:
        raise SparseEngineError(f"{path} is missing") from None
    except (KeyError, ValueError, OSError, zipfile.BadZipFile, lzma.LZMAError) as error:
        raise FileFormatError(f"{path} is not a compact CIFAR file: {error}") from None
    if channels != 3 or len(raw) != 3 * n * height * width or len(labels) != n:
        raise FileFormatError(
            f"{path} announces {n} images of {height}×{width}×{channels} but holds {len(raw)} bytes and "
            f"{len(labels)} labels"
        )
    zigzag = np.frombuffer(raw, np.uint8).reshape(3, n, height, width)
    residual = (zigzag >> 1).astype(np.int16)
    np.negative(residual + 1, out=residual, where=(zigzag & 1).astype(bool))
    residual = np.ascontiguousarray(residual.transpose(2, 3, 0, 1))
    planes = np.zeros((height, width, 3, n), np.int16)
    for row in range(height):
        for column in range(width):
            if row and column:
                north, west, corner = planes[row - 1, column], planes[row, column - 1], planes[row - 1, column - 1]
                guess = np.clip(north + west - corner, np.minimum(north, west), np.maximum(north, west))
            else:
                guess = (
                    planes[row - 1, column]
                    if row
                    else planes[row, column - 1]
                    if column
                    else np.zeros_like(planes[0, 0])
                )
            value = guess + residual[row, column]
            green = value[0] & 255
            planes[row, column, 0] = green
            planes[row, column, 1:] = ((value[1:] + green) & 255) - green
    green = planes[:, :, 0]
    rgb = np.stack([planes[:, :, 1] + green, green, planes[:, :, 2] + green], 2)
    return np.ascontiguousarray(rgb.transpose(3, 2, 0, 1)).astype(np.uint8), labels


def _compact(folder: Path, name: str, train: list[str], test: str, classes: int) -> tuple[ArrayData, ArrayData]:
    mean, std = STATISTICS[name]
    out = []
    for files in ([part for part in train if (folder / part).exists()], [test]):
        pieces = [read_compact(folder / file) for file in files]
        images = torch.from_numpy(np.concatenate([piece[0] for piece in pieces]))
        labels = torch.from_numpy(np.concatenate([piece[1] for piece in pieces]))
        out.append(ArrayData(name, images, labels, classes, mean, std))
    return out[0], out[1]


def _image_folder(folder: Path, size: int | None = None) -> tuple[ArrayData, ArrayData]:
    try:
        from PIL import Image
    except ImportError:
        raise SparseEngineError(
            "reading an image folder needs pillow, which is not installed: pip install pillow"
        ) from None
    held_out = "test" if (folder / "test").is_dir() else "val"
    names = sorted(entry.name for entry in (folder / "train").iterdir() if entry.is_dir())
    if not names:
        raise SparseEngineError(f"{folder / 'train'} has no class folders")
    parts = []
    for part in ("train", held_out):
        images, labels = [], []
        for label, name in enumerate(names):
            for path in sorted((folder / part / name).glob("*")):
                if path.suffix.lower() not in (".png", ".jpg", ".jpeg", ".bmp"):
                    continue
                with Image.open(path) as image:
                    image = image.convert("RGB")
                    size = size or min(image.size)
                    images.append(torch.from_numpy(np.array(_square(image, size))).permute(2, 0, 1))
                labels.append(label)
        if not images:
            raise SparseEngineError(f"{folder / part} holds no images for the classes {', '.join(names[:5])}")
        parts.append(
            ArrayData("images", torch.stack(images), torch.tensor(labels), len(names), *STATISTICS["imagenet"])
        )
    return parts[0], parts[1]


def _square(image: Any, size: int) -> Any:
    """The largest centred square, resized to ``size``."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side)).resize((size, size))


Transform = Callable[[Tensor], Tensor]
