"""The image data of the MDEQ example: files in their official formats, subsets, averages, random changes."""

import doctest
import gzip
import io
import os
import pickle
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from implicit_core.examples.mdeq.data import NAMES, Images, augment, cifar10, fashion_mnist, load, normalized, sets
from implicit_core.examples.mdeq.data.imagenet import ImageFolder, central_view, random_box, random_view
from implicit_core.examples.mdeq.data.pixels import pooled
from implicit_core.examples.mdeq.data.sets import balanced
from implicit_core.examples.program import TrainingError

Array = np.ndarray[Any, Any]


def random_bytes(*shape: int) -> Array:
    return np.random.default_rng(len(shape)).integers(256, size=shape, dtype=np.uint8)


def write_idx(path: Path, array: Array) -> None:
    lengths = b"".join(n.to_bytes(4, "big") for n in array.shape)
    content = bytes([0, 0, 8, array.ndim]) + lengths + array.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def fashion(folder: Path, ending: str = "", train: int = 12, test: int = 5) -> tuple[Array, Array]:
    """Write Fashion-MNIST with few images, and return all images; labels count up from 0."""
    images = random_bytes(train + test, 28, 28)
    for part, pixels in (("train", images[:train]), ("t10k", images[train:])):
        write_idx(folder / f"{part}-images-idx3-ubyte{ending}", pixels)
        write_idx(folder / f"{part}-labels-idx1-ubyte{ending}", np.arange(len(pixels), dtype=np.uint8) % 10)
    return images[:train], images[train:]


def python_2(data: Array, labels: list[int]) -> bytes:
    """A batch as Python 2 pickled it, which wrote the published files: protocol 2, and NumPy's names of that time."""

    def text(content: bytes) -> bytes:
        return b"U" + bytes([len(content)]) + content

    def number(value: int) -> bytes:
        return b"J" + value.to_bytes(4, "little", signed=True)

    kind = b"cnumpy\ndtype\n" + text(b"u1") + number(0) + number(1) + b"\x87R"
    kind += b"(" + number(3) + text(b"|") + b"NNN" + number(-1) + number(-1) + number(0) + b"tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n" + number(0) + b"\x85" + text(b"b") + b"\x87R"
    array += b"(" + number(1) + number(data.shape[0]) + number(data.shape[1]) + b"\x86" + kind
    array += b"\x89T" + len(data.tobytes()).to_bytes(4, "little") + data.tobytes() + b"tb"
    listed = b"](" + b"".join(map(number, labels)) + b"e"
    items = [text(b"batch_label"), text(b"batch 1 of 5"), text(b"labels"), listed, text(b"data"), array]
    return b"\x80\x02}(" + b"".join(items) + b"u."


def python_3(data: object, labels: list[Any]) -> bytes:
    return pickle.dumps({b"batch_label": b"batch", b"labels": labels, b"data": data, b"filenames": [b"a.png"]}, 4)


@pytest.fixture
def cifar(tmp_path: Path) -> tuple[Path, Array]:
    """A folder with CIFAR-10 in batches of four images, and all rows; image i has the label i modulo 10."""
    rows = random_bytes(24, 3072)
    folder = tmp_path / cifar10.FOLDER
    folder.mkdir()
    for i, name in enumerate(cifar10.BATCHES):
        write = python_3 if i % 2 else python_2
        where = slice(4 * i, 4 * i + 4)
        (folder / name).write_bytes(write(rows[where], [j % 10 for j in range(24)][where]))
    return tmp_path, rows


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_fashion_mnist_is_read_exactly(tmp_path: Path, ending: str) -> None:
    train, test = fashion(tmp_path, ending)
    for read, images in zip(fashion_mnist.read(tmp_path), (train, test), strict=True):
        assert read.pixels.dtype == torch.uint8
        assert np.array_equal(read.pixels, images[:, None])
        assert read.labels.dtype == torch.int64
        assert read.labels.tolist() == [i % 10 for i in range(len(images))]


def test_cifar_10_is_read_exactly(cifar: tuple[Path, Array]) -> None:
    """The folder, the folder in it, and the archive, in another order than the batches."""
    folder, rows = cifar
    archived = folder / "archived"
    archived.mkdir()
    with tarfile.open(archived / cifar10.ARCHIVE, "w:gz") as archive:
        for path in sorted((folder / cifar10.FOLDER).iterdir(), reverse=True):
            archive.add(path, f"{cifar10.FOLDER}/{path.name}")
    for place in (folder, folder / cifar10.FOLDER, archived):
        train, test = cifar10.read(place)
        assert np.array_equal(train.pixels, rows[:20].reshape(20, 3, 32, 32))
        assert np.array_equal(test.pixels, rows[20:].reshape(4, 3, 32, 32))
        assert train.labels.tolist() == [*range(10), *range(10)]
        assert test.labels.tolist() == [0, 1, 2, 3]
        assert train.pixels.dtype == torch.uint8
    green = rows[7, 1024:2048].reshape(32, 32)
    assert cifar10.read(folder)[0].pixels[7, 1, 3, 5] == green[3, 5]


class Call:
    """Pickled, it is a call of a function."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


@pytest.mark.parametrize("call", [(os.mkdir,), (getattr, "name"), (np.load,), (eval, "1"), (np.ndarray, (3,))])
def test_a_pickle_that_calls_something_is_refused(tmp_path: Path, call: tuple[Any, ...]) -> None:
    function, *arguments = call
    content = pickle.dumps({b"data": Call(function, *(arguments or [str(tmp_path / "made")])), b"labels": []})
    with pytest.raises(TrainingError, match=r"batch is not a batch of CIFAR-10"):
        cifar10.read_batch(tmp_path / "batch", content)
    assert not list(tmp_path.iterdir())


GOOD = random_bytes(2, 3072)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (python_3(GOOD, [0, 1])[:-900], r"batch is not a batch .*truncated"),
        (python_2(GOOD, [0, 1])[:5000], r"batch is not a batch .*truncated"),
        (b"<html>404</html>", r"batch is not a batch of CIFAR-10, or is damaged \("),
        (b"", r"batch is not a batch of CIFAR-10, or is damaged \("),
        (pickle.dumps([1, 2]), r"batch is not a batch of CIFAR-10"),
        (pickle.dumps({b"data": GOOD}, 4), r"batch is not a batch .*KeyError\(b'labels'\)"),
        (python_3(GOOD.astype(np.float32), [0, 1]), r"it has an array of 'f4', not of 'u1'"),
        (python_3(GOOD[:, :3000], [0, 1]), r"batch has data of shape \(2, 3000\), not \(n, 3072\)\.$"),
        (python_3(GOOD[0], [0, 1]), r"batch has data of shape \(3072,\), not \(n, 3072\)\.$"),
        (python_3(b"bytes", [0, 1]), r"batch has data of shape None, not \(n, 3072\)\.$"),
        (python_3(GOOD, [0]), r"batch has 1 labels, and there are 2 images\.$"),
        (python_3(GOOD[:0], []), r"batch has 0 labels, and there are 0 images\.$"),
        (python_3(GOOD, [0, 10]), r"batch has the label 10, which is not in 0\.\.9\.$"),
        (python_3(GOOD, [-1, 1]), r"batch has the label -1, which is not in 0\.\.9\.$"),
        (python_3(GOOD, [0, 0.5]), r"batch is not a batch .*'float' object"),
    ],
)
def test_a_damaged_batch_is_named(content: bytes, sentence: str) -> None:
    with pytest.raises(TrainingError, match=sentence):
        cifar10.read_batch(Path("batch"), content)


def test_missing_files_of_cifar_10_are_named(cifar: tuple[Path, Array], tmp_path: Path) -> None:
    how = "get the Python version from https://www.cs.toronto.edu/~kriz/cifar.html, cifar-10-python.tar.gz, unpacked."
    folder = cifar[0] / cifar10.FOLDER
    (folder / "data_batch_3").unlink()
    empty = tmp_path / "empty"
    empty.mkdir()
    for place, start in {
        None: "CIFAR-10 needs --data-dir, the folder that has cifar-10-batches-py; ",
        folder: f"CIFAR-10 is incomplete: there is no data_batch_3 in {folder}; ",
        empty: f"CIFAR-10 is missing: there is no data_batch_1 in {empty / cifar10.FOLDER} or {empty}; ",
    }.items():
        with pytest.raises(TrainingError) as error:
            load("cifar10", place)
        assert str(error.value) == start + how
    with tarfile.open(empty / cifar10.ARCHIVE, "w:gz") as archive:
        archive.add(folder, cifar10.FOLDER)
    with pytest.raises(TrainingError, match=r"there is no data_batch_3 in .*cifar-10-python\.tar\.gz/cifar-10-batches"):
        load("cifar10", empty)
    for content in ((empty / cifar10.ARCHIVE).read_bytes()[:-5000], b"no archive"):
        (empty / cifar10.ARCHIVE).write_bytes(content)
        with pytest.raises(TrainingError, match=r"cifar-10-python\.tar\.gz is damaged \("):
            load("cifar10", empty)


def test_missing_files_of_fashion_mnist_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By default in Debian's folder."""
    monkeypatch.setattr(fashion_mnist, "DEBIAN", tmp_path)
    fashion(tmp_path)
    assert load("fashion-mnist").train.pixels.shape == (12, 1, 32, 32)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(TrainingError) as error:
        load("fashion-mnist")
    assert str(error.value) == (
        f"Fashion-MNIST is missing: there is no t10k-labels-idx1-ubyte or t10k-labels-idx1-ubyte.gz in {tmp_path}; "
        "install Debian's package dataset-fashion-mnist, or get the IDX files of "
        "https://github.com/zalandoresearch/fashion-mnist."
    )
    (tmp_path / "t10k-labels-idx1-ubyte").mkdir()
    with pytest.raises(TrainingError, match=r"t10k-labels-idx1-ubyte can't be read: Is a directory\.$"):
        load("fashion-mnist")


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        (
            "train-images-idx3-ubyte",
            lambda x: x[:-1],
            r"damaged: an array of shape \(12, 28, 28\) takes 9424 bytes, not 94",
        ),
        ("train-images-idx3-ubyte", lambda x: x + b"\0", r"takes 9424 bytes, not 9425\.$"),
        ("train-images-idx3-ubyte", lambda x: x[:10], r"images-idx3-ubyte is damaged: .* takes \d+ bytes, not 10\.$"),
        ("train-images-idx3-ubyte", lambda x: gzip.compress(x)[:-30], r"images-idx3-ubyte is damaged: gzip can't"),
        ("train-images-idx3-ubyte", lambda _: b"", r"train-images-idx3-ubyte is not an IDX file of bytes on 3 axes"),
        (
            "train-labels-idx1-ubyte",
            lambda x: b"\0\0\x0d" + x[3:],
            r"labels.* begins with 00 00 0d 01, not 00 00 08 01\.",
        ),
        ("train-labels-idx1-ubyte", lambda x: x[:-1] + b"\x0a", r"labels-idx1-ubyte has the label 10, which is not in"),
        ("train-labels-idx1-ubyte", lambda x: x[:7] + b"\x0b" + x[8:-1], r"has 11 labels, and there are 12 images\.$"),
    ],
)
def test_a_damaged_idx_file_is_named(
    tmp_path: Path, name: str, change: Callable[[bytes], bytes], sentence: str
) -> None:
    fashion(tmp_path)
    (tmp_path / name).write_bytes(change((tmp_path / name).read_bytes()))
    with pytest.raises(TrainingError, match=sentence) as error:
        load("fashion-mnist", tmp_path)
    assert str(tmp_path / name) in str(error.value)


def test_images_of_another_size_are_refused(tmp_path: Path) -> None:
    fashion(tmp_path)
    write_idx(tmp_path / "t10k-images-idx3-ubyte", random_bytes(5, 27, 28))
    with pytest.raises(TrainingError, match=r"has an array of shape \(5, 27, 28\), not images of 28 x 28\.$"):
        load("fashion-mnist", tmp_path)


@pytest.mark.parametrize("size", [None, 32, 16, 8])
def test_fashion_mnist_gets_a_border_and_is_averaged(tmp_path: Path, size: int | None) -> None:
    images, _ = fashion(tmp_path)
    data = load("fashion-mnist", tmp_path, size=size)
    side = size or 32
    factor = 32 // side
    expected = np.zeros((12, 1, side, side))
    for n, row, column in np.ndindex(images.shape):
        expected[n, 0, (row + 2) // factor, (column + 2) // factor] += images[n, row, column] / factor**2
    assert data.train.pixels.dtype == (torch.uint8 if side == 32 else torch.float32)
    pixels = data.train.pixels.double() / (255 if side == 32 else 1)
    assert np.allclose(pixels, expected / 255, rtol=0, atol=1e-6)
    assert data.mean.item() == pytest.approx(expected.mean() / 255, rel=1e-5)
    assert data.std.item() == pytest.approx(expected.std() / 255, rel=1e-5)


def test_averages_are_of_all_images() -> None:
    """They are computed in parts."""
    pixels = torch.arange(5000, dtype=torch.float32)[:, None, None, None].expand(-1, 1, 16, 16)
    assert torch.equal(pooled(pixels, 8), pixels[..., :8, :8])


@pytest.mark.parametrize(("name", "size", "sizes"), [("digits", 4, "8"), ("cifar10", 20, "32 or 16 or 8")])
def test_other_sizes_are_refused(cifar: tuple[Path, Array], name: str, size: int, sizes: str) -> None:
    with pytest.raises(TrainingError, match=rf"^The images of {name} can have the size {sizes}, not {size}\.$"):
        load(name, cifar[0], size=size)


def test_smaller_images_stay_as_they_are() -> None:
    assert torch.equal(load("digits", size=16).test.pixels, load("digits").test.pixels)


def test_statistics(cifar: tuple[Path, Array]) -> None:
    """Constants for CIFAR-10, otherwise those of the images that are trained on."""
    data = load("cifar10", cifar[0], size=16, train=10)
    assert data.mean.tolist() == pytest.approx([0.4914, 0.4822, 0.4465])
    assert data.std.tolist() == pytest.approx([0.2023, 0.1994, 0.2010])
    digits = load("digits", train=50, test=20)
    pixels = digits.train.pixels
    assert pixels.shape == (50, 1, 8, 8)
    assert digits.mean.item() == pytest.approx(pixels.mean().item())
    changed = normalized(pixels, digits.mean, digits.std)
    assert changed.mean().item() == pytest.approx(0.0, abs=1e-6)
    assert changed.var(correction=0).item() == pytest.approx(1.0, rel=1e-5)


def test_each_channel_is_normalized_by_its_own_numbers() -> None:
    pixels = torch.tensor([[51, 102, 255]], dtype=torch.uint8)[:, :, None, None].expand(2, 3, 4, 5)
    changed = normalized(pixels, torch.tensor([0.1, 0.2, 0.3]), torch.tensor([1.0, 2.0, 0.5]))
    assert changed.dtype == torch.float32
    expected = torch.tensor([0.1, 0.1, 1.4])[:, None, None].expand(2, 3, 4, 5)
    assert torch.allclose(changed, expected, rtol=1e-6)
    assert torch.equal(normalized(pixels / 255, torch.tensor([0.1, 0.2, 0.3]), torch.tensor([1.0, 2.0, 0.5])), changed)


def test_subsets_are_balanced() -> None:
    labels = torch.tensor([0] * 40 + [1] * 30 + [2] * 5)[torch.randperm(75, generator=torch.Generator().manual_seed(1))]
    for count, expected in {3: {1}, 15: {5}, 16: {5, 6}, 75: {40, 30, 5}}.items():
        rows = balanced(labels, count)
        assert len({*rows.tolist()}) == count
        assert rows.tolist() == sorted(rows.tolist())
        assert {*Counter(labels[rows].tolist()).values()} == expected
    assert sorted(Counter(labels[balanced(labels, 45)].tolist()).values()) == [5, 20, 20]
    assert {*balanced(labels, 10).tolist()} < {*balanced(labels, 20).tolist()}


def test_the_example_of_a_subset() -> None:
    assert doctest.testmod(sets) == (0, 4)


def test_subsets_are_the_same_on_all_machines() -> None:
    assert balanced(torch.arange(100) % 10, 10).tolist() == [5, 8, 9, 20, 36, 37, 81, 82, 93, 94]


def test_subsets_do_not_depend_on_seeds(tmp_path: Path) -> None:
    train, test = fashion(tmp_path, train=60, test=40)
    torch.manual_seed(1)
    first = load("fashion-mnist", tmp_path, train=20, test=10, seed=1)
    torch.manual_seed(2)
    second = load("fashion-mnist", tmp_path, train=20, test=10, seed=2)
    for ours, others, official in zip(first[:2], second[:2], (train, test), strict=True):
        assert torch.equal(ours.pixels, others.pixels)
        assert {*Counter(ours.labels.tolist()).values()} == {len(ours.labels) // 10}
        assert in_part(ours, official)
    assert first.train.labels.shape == (20,)
    assert first.test.labels.shape == (10,)


def in_part(images: Images, official: Array) -> bool:
    """Whether each image, with its label, is in the part of the files, where image i has the label i modulo 10."""
    known = {image.tobytes(): i % 10 for i, image in enumerate(official)}
    inner = images.pixels[:, 0, 2:-2, 2:-2]
    return [known.get(x.numpy().tobytes()) for x in inner] == images.labels.tolist()


def test_more_images_than_there_are(cifar: tuple[Path, Array]) -> None:
    data = load("cifar10", cifar[0], train=21, test=5)
    assert (len(data.train.labels), len(data.test.labels)) == (20, 4)


@pytest.mark.parametrize("kind", ["train", "test"])
def test_no_images(kind: str) -> None:
    with pytest.raises(ValueError, match=rf"^{kind} must be at least 1, got 0$"):
        load("digits", **{kind: 0})  # type: ignore[arg-type]


def test_the_digits_are_split_by_class_and_apart() -> None:
    data, other = load("digits"), load("digits", seed=1)
    assert (len(data.train.labels), len(data.test.labels)) == (1437, 360)
    assert {*Counter(data.test.labels.tolist()).values()} <= {35, 36, 37}
    assert data.train.pixels.max() == 1
    train, test = ({x.numpy().tobytes() for x in images.pixels} for images in data[:2])
    assert not train & test
    assert not torch.equal(data.test.pixels, other.test.pixels)


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^name is 'mnist', expected one of digits, fashion-mnist, cifar10$"):
        load("mnist")
    assert NAMES == ("digits", "fashion-mnist", "cifar10")


def views(image: Tensor, border: int) -> dict[bytes, tuple[int, int, bool]]:
    """All that ``augment`` may make of an image (channels, height, height), by loops: their shifts, and if mirrored."""
    channels, height, width = image.shape
    found = {}
    for top in range(-border, border + 1):
        for left in range(-border, border + 1):
            view = torch.zeros_like(image)
            for c, i, j in np.ndindex(channels, height, width):
                if 0 <= i + top < height and 0 <= j + left < width:
                    view[c, i, j] = image[c, i + top, j + left]
            found[view.numpy().tobytes()] = top, left, False
            found[view.flip(-1).numpy().tobytes()] = top, left, True
    return found


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_augmented_images_are_shifted_and_mirrored(dtype: torch.dtype) -> None:
    """All shifts and both orientations occur equally often: 3 x 3 x 2 views of images of 8 x 8."""
    image = torch.from_numpy(random_bytes(3, 8, 8)).to(dtype)
    batch = image.expand(3600, 3, 8, 8)
    made = augment(batch, torch.Generator().manual_seed(0))
    assert made.dtype == dtype
    known = views(image, 1)
    counts = Counter(known[x.numpy().tobytes()] for x in made)
    assert len(counts) == len(known) == 18
    assert all(140 < count < 260 for count in counts.values())  # 200 ± 4.4 standard deviations
    assert torch.equal(augment(batch, torch.Generator().manual_seed(0)), made)
    assert not torch.equal(augment(batch, torch.Generator().manual_seed(1)), made)


def test_each_image_is_changed_by_itself() -> None:
    """By up to 4 pixels of 32, as in the published trainings."""
    image = torch.arange(1.0, 1025.0).reshape(1, 32, 32)
    images = image.repeat(2000, 1, 1, 1)
    made = augment(images, torch.Generator().manual_seed(3))
    assert torch.equal(images, image.expand_as(images))
    mirrored = made[:, 0, 16, 15] > made[:, 0, 16, 16]
    straight = torch.where(mirrored[:, None, None, None], made.flip(-1), made)
    shift = straight[:, 0, 16, 16].int() - image[0, 16, 16].int()  # 32 rows + columns
    rows, columns = (shift + 16) // 32, (shift + 16) % 32 - 16
    assert len({*zip(rows.tolist(), columns.tolist(), mirrored.tolist(), strict=True)}) == 9 * 9 * 2
    assert ({*rows.tolist()}, {*columns.tolist()}) == ({*range(-4, 5)}, {*range(-4, 5)})
    assert torch.equal((straight[:, 0] == 0).sum((1, 2)), 1024 - (32 - rows.abs()) * (32 - columns.abs()))


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Two classes with three images each to train on, and one each to test on, of one color each."""
    for split, count in (("train", 3), ("val", 1)):
        for label, name in enumerate(("n01", "n02")):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                ending = ("JPEG", "png", "jpg")[i]
                Image.new("RGB", (40, 30), (100 * label, 50 * i, 200)).save(folder / f"image_{i}.{ending}")
            (folder / "list.txt").write_text("no image")
    (tmp_path / "val" / "list.txt").write_text("no class")
    return tmp_path


def test_an_image_folder(folders: Path) -> None:
    train = ImageFolder(folders, "train", random_view)
    assert len(train) == 6
    assert train.classes == ["n01", "n02"]
    for i in range(6):
        pixels, label = train[i]
        assert label == i // 3
        assert pixels.shape == (3, 224, 224)
        assert pixels.dtype == torch.uint8
        color = torch.tensor([100 * label, 50 * (i % 3), 200])[:, None, None]
        assert (pixels.int() - color).abs().max() <= 3  # JPEG
    test = ImageFolder(folders, "val", central_view)
    assert [test[i][1] for i in range(len(test))] == [0, 1]


def test_labels_follow_the_alphabet(tmp_path: Path) -> None:
    """In whichever order the operating system lists folders."""
    names = [f"n{number:02}" for number in np.random.default_rng(0).permutation(30)]
    for path in (tmp_path / split / name for split in ("train", "val") for name in names):
        path.mkdir(parents=True)
        (path / "image.PNG").touch()
    data = ImageFolder(tmp_path, "val", central_view)
    assert data.classes == sorted(names)
    assert data.labels.tolist() == [*range(30)]


def test_random_views_follow_the_generator_of_pytorch(folders: Path) -> None:
    """A loader seeds it in its workers, and here it is that of this process."""
    noise = Image.fromarray(random_bytes(30, 40, 3))
    for path in (folders / "train").rglob("*.png"):
        noise.save(path)
    data = ImageFolder(folders, "train", random_view)

    def images(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return torch.cat([pixels for pixels, _ in DataLoader(data, 2)])

    first = images(0)
    assert torch.equal(images(0), first)
    assert not torch.equal(images(1), first)


def test_broken_folders_are_named(folders: Path) -> None:
    layout = r"train/<class>/\*\.JPEG and val/<class>/\*\.JPEG\.$"
    with pytest.raises(ValueError, match=r"^split is 'test', expected one of train, val$"):
        ImageFolder(folders, "test", central_view)
    with pytest.raises(TrainingError, match=rf"none/train can't be read \(No such file or directory\); .*{layout}"):
        ImageFolder(folders / "none", "val", central_view)
    (folders / "val" / "n03").mkdir()
    with pytest.raises(TrainingError, match=rf"has the class n03 in only one of train and val; .*{layout}"):
        ImageFolder(folders, "train", central_view)
    (folders / "train" / "n03").mkdir()
    (folders / "val" / "n03").rmdir()
    with pytest.raises(TrainingError, match=r"has the class n03 in only one of train and val; "):
        ImageFolder(folders, "train", central_view)
    (folders / "val" / "n03").mkdir()
    with pytest.raises(TrainingError, match=rf"^There is no image in .*/val/n03; .*{layout}"):
        ImageFolder(folders, "val", central_view)
    (folders / "train" / "n03" / "train").mkdir()
    with pytest.raises(TrainingError, match=r"^There is no folder of a class in .*n03/train; "):
        ImageFolder(folders / "train" / "n03", "train", central_view)


def test_an_unreadable_image_is_named(folders: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(random_bytes(30, 40, 3)).save(buffer, "JPEG")
    path = folders / "train" / "n01" / "image_0.JPEG"
    for content in (buffer.getvalue()[:-400], b"no image", b""):
        path.write_bytes(content)
        with pytest.raises(TrainingError, match=rf"{path} can't be read as an image \("):
            ImageFolder(folders, "train", central_view)[0]


def test_gray_images_get_three_channels(folders: Path) -> None:
    path = folders / "val" / "n01" / "image_0.JPEG"
    Image.new("L", (300, 300), 90).save(path)
    assert torch.equal(
        ImageFolder(folders, "val", central_view)[0][0], torch.full((3, 224, 224), 90, dtype=torch.uint8)
    )


def test_images_of_more_than_8_bits_are_refused(folders: Path) -> None:
    """Pillow would make them white."""
    path = folders / "val" / "n01" / "image_0.JPEG"
    Image.fromarray(np.full((30, 40), 1000, dtype=np.uint16)).save(path, "PNG")
    with pytest.raises(TrainingError, match=rf"^{path} can't be read .*its mode is I.*, expected 8 bits per channel"):
        ImageFolder(folders, "val", central_view)[0]


@pytest.mark.parametrize(("width", "height"), [(512, 768), (1024, 512), (256, 256)])
def test_the_central_view_is_cut_from_a_shorter_side_of_256(width: int, height: int) -> None:
    """Sizes that scale to whole pixels."""
    image = Image.fromarray(random_bytes(height, width, 3))
    factor = min(width, height) // 256
    scaled = image.resize((width // factor, height // factor), Image.Resampling.BILINEAR)
    left, top = ((side - 224) // 2 for side in scaled.size)
    expected = np.array(scaled.crop((left, top, left + 224, top + 224))).transpose(2, 0, 1)
    assert np.array_equal(central_view(image), expected)


def test_random_boxes() -> None:
    """Inside the image, of areas from 0.1 to 1 and aspect ratios from 0.8 to 1.25, anywhere."""
    torch.manual_seed(0)
    boxes = np.array([random_box(500, 400) for _ in range(2000)])
    left, top, right, bottom = boxes.T
    width, height = right - left, bottom - top
    assert boxes.min() == left.min() == top.min() == 0
    assert (right.max(), bottom.max()) == (500, 400)
    area, aspect = width * height / 200_000, width / height
    assert 0.099 < area.min() < 0.11
    assert 0.9 < area.max() <= 1
    assert 0.79 < aspect.min() < 0.81
    assert 1.24 < aspect.max() < 1.26
    small = area < 0.5  # these always fit
    assert abs(np.log(aspect[small]).mean()) < 0.012  # uniform in the logarithm; the mean of a uniform one is 0.0165
    assert abs(area[small].mean() - 0.3) < 0.01  # uniform
    places = left[small] / (500 - width[small]), top[small] / (400 - height[small])
    assert np.allclose([place.mean() for place in places], 0.5, atol=0.03)
    assert abs(np.corrcoef(*places)[0, 1]) < 0.1


@pytest.mark.parametrize(
    ("width", "height", "box"),
    [(1000, 20, (487, 0, 512, 20)), (20, 1000, (0, 487, 20, 512)), (1, 900, (0, 449, 1, 450))],
)
def test_a_long_image_is_cut_in_the_center(width: int, height: int, box: tuple[int, ...]) -> None:
    assert random_box(width, height) == box


def test_half_of_the_random_views_are_mirrored() -> None:
    gradient = np.zeros((64, 64, 3), dtype=np.uint8)
    gradient[...] = np.arange(0, 256, 4, dtype=np.uint8)[None, :, None]
    torch.manual_seed(0)
    rising = [
        bool(view[0, 0, -1] > view[0, 0, 0]) for view in (random_view(Image.fromarray(gradient), 8) for _ in range(400))
    ]
    assert 160 < sum(rising) < 240
