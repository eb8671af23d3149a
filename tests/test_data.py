"""The data sets: what a tuple is, what is kept apart, what a damaged file leads to."""

import hashlib
import io
import json
import struct
import urllib.error
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

import datasets
from common import Modality, UserError


def options(tmp_path, **changed):
    defaults = dict(data_dir=str(tmp_path), cache_dir=str(tmp_path / "cache"), data_seed=0)
    return SimpleNamespace(**defaults | {"backgrounds": "", "download": False} | changed)


def write_idx(path, array):
    header = struct.pack(f">{1 + array.ndim}i", 2048 + array.ndim, *array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


def make_mnist(folder, n=40):
    """A small MNIST: the image of a label has a bar of grey 100 and a row of white dots."""
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", n), ("t10k", n // 2)):
        labels = np.arange(count) % 10
        images = np.zeros((count, 28, 28), np.uint8)
        images[:, 3] = 100
        images[np.arange(count), 5, labels] = 255
        images[np.arange(count), 7, np.arange(count) // 10] = 129 if part == "train" else 200
        write_idx(raw / f"{part}-images-idx3-ubyte", images)
        write_idx(raw / f"{part}-labels-idx1-ubyte", labels)
    return folder


# --------------------------------------------------------------------------------- polydigits


def test_polydigits_holds_digits_out(monkeypatch, tmp_path):
    """No image of a digit is in both splits; each is there once."""
    held = {}
    monkeypatch.setattr(datasets, "poly_data", lambda parts, *_: held.update(enumerate(parts)))
    datasets.polydigits(options(tmp_path))
    shapes = [digit.tobytes() for digits, _, _ in held.values() for digit in digits]
    assert len(shapes) == len(set(shapes)) == len(held[0][0]) + 300
    assert len(load_digits().data) - 10 < len(shapes)


def test_polydigits_is_what_it_says(tmp_path):
    data = datasets.polydigits(options(tmp_path))
    assert len(data.train) > 4 * 1480 and len(data.test) == 2 * 300
    assert [m.name for m in data.modalities] == ["m0", "m1", "m2", "m3", "m4"]
    x, observed = data.train.batch(torch.tensor([3, 5, 3]))
    assert observed is None
    for m in data.modalities:
        assert x[m.name].shape == (3, 3, 16, 16) and x[m.name].dtype == torch.float32
        assert 0 <= x[m.name].min() and x[m.name].max() <= 1
        assert x[m.name][0].equal(x[m.name][2])


def test_the_data_seed_decides_pairings_and_crops_but_not_the_split(tmp_path):
    first, again, other = (datasets.polydigits(options(tmp_path, data_seed=s)) for s in (0, 0, 1))
    assert first.train.tensors["m2"].equal(again.train.tensors["m2"])
    assert not first.train.tensors["m2"].equal(other.train.tensors["m2"])
    assert first.test.labels.equal(other.test.labels)


def test_backgrounds_look_nothing_alike():
    pictures = datasets.sample_backgrounds()
    means = [picture.mean((0, 1)) for picture in pictures]
    assert len(pictures) == 5
    for i in range(5):
        for j in range(i):
            assert np.abs(means[i] - means[j]).max() > 20


# ---------------------------------------------------------------------------------- polymnist


def test_polymnist_inverts_the_crop_on_the_digit_and_pairs_within_a_digit(monkeypatch, tmp_path):
    make_mnist(tmp_path)
    flat = [np.full((40, 50, 3), [10 * m, 20 * m, 30], np.uint8) for m in range(5)]
    monkeypatch.setattr(datasets, "sample_backgrounds", lambda: flat)
    data = datasets.polymnist(options(tmp_path))
    assert len(data.train) == 40 and len(data.test) == 20
    raw = datasets.mnist(tmp_path, "MNIST")
    for split, (images, labels) in zip((data.train, data.test), raw, strict=True):
        for m in range(5):
            made = split.tensors[f"m{m}"].numpy()
            color = np.array([10 * m, 20 * m, 30])[:, None, None]
            digits = (made == 255 - color).all(1)
            assert ((made == color).all(1) | digits).all()
            # Every digit once, beside its own label; grey 100 is background, 129 is digit.
            expected = sorted(zip(labels, (images > 128).reshape(len(labels), -1).tolist()))
            found = sorted(zip(split.labels.tolist(), digits.reshape(len(labels), -1).tolist()))
            assert found == expected


def test_crops_are_contiguous_pieces_of_the_background():
    background = np.arange(20 * 31 * 3, dtype=np.uint8).reshape(20, 31, 3)
    blank = np.zeros((50, 8, 9), bool)
    for crop in datasets.on_background(blank, background, np.random.default_rng(0)):
        windows = np.lib.stride_tricks.sliding_window_view(background, (8, 9), axis=(0, 1))
        assert (windows == crop).all((2, 3, 4)).any()


def test_own_backgrounds_make_as_many_modalities(tmp_path):
    make_mnist(tmp_path)
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in ("b.png", "a.png", "c.jpg"):
        Image.new("RGB", (30, 40), "red").save(folder / name)
    data = datasets.polymnist(options(tmp_path, backgrounds=str(folder)))
    assert [m.name for m in data.modalities] == ["m0", "m1", "m2"]
    assert str(folder) in data.source
    Image.new("RGB", (27, 40)).save(folder / "d.png")
    with pytest.raises(UserError, match=r"d.png is smaller than 28×28"):
        datasets.polymnist(options(tmp_path, backgrounds=str(folder)))
    (folder / "d.png").write_text("no picture")
    with pytest.raises(UserError, match=r"d.png is not a picture"):
        datasets.polymnist(options(tmp_path, backgrounds=str(folder)))


def make_authors(folder, n=3):
    pixels = {}
    for part in ("train", "test"):
        for m in range(5):
            place = folder / part / f"m{m}"
            place.mkdir(parents=True)
            for i in range(n):
                pixels[part, m, i] = np.full((28, 28, 3), 50 * m + i + len(part), np.uint8)
                Image.fromarray(pixels[part, m, i]).save(place / f"{i}.{(i * 7) % 10}.png")
    return pixels


@pytest.mark.parametrize("packed", [False, True])
def test_the_authors_images_are_used_where_they_are(tmp_path, packed):
    pixels = make_authors(tmp_path / "PolyMNIST", 12)
    if packed:
        with zipfile.ZipFile(tmp_path / "PolyMNIST.zip", "w") as archive:
            for file in sorted((tmp_path / "PolyMNIST").rglob("*.png"), reverse=True):
                archive.write(file, f"MMNIST/{file.relative_to(tmp_path / 'PolyMNIST')}")
        (tmp_path / "PolyMNIST").rename(tmp_path / "elsewhere")
    for _ in range(2):  # decoded, then from the cache
        data = datasets.polymnist(options(tmp_path))
        assert "authors" in data.source
        assert data.train.labels.tolist() == [(i * 7) % 10 for i in range(12)]
        for m in range(5):
            expected = [pixels["test", m, i].transpose(2, 0, 1) for i in range(12)]
            assert data.test.tensors[f"m{m}"].numpy().tolist() == np.stack(expected).tolist()
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_faults_of_the_authors_images_are_named(tmp_path):
    make_authors(tmp_path / "PolyMNIST")
    some = tmp_path / "PolyMNIST" / "train" / "m3" / "1.7.png"
    some.write_bytes(some.read_bytes()[:40])
    with pytest.raises(UserError, match=r"train/m3/1.7.png is damaged"):
        datasets.polymnist(options(tmp_path))
    Image.new("RGB", (28, 27)).save(some)
    with pytest.raises(UserError, match=r"1.7.png is \(27, 28\), must be 28×28"):
        datasets.polymnist(options(tmp_path))
    some.unlink()
    with pytest.raises(UserError, match=r"train/m3 and train/m0 hold different tuples"):
        datasets.polymnist(options(tmp_path))
    assert not (tmp_path / "cache").exists()


def test_download_is_checked_against_the_records_md5(monkeypatch, tmp_path):
    make_authors(tmp_path / "made" / "MMNIST")
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for file in (tmp_path / "made").rglob("*.png"):
            archive.write(file, file.relative_to(tmp_path / "made"))
    content, md5 = packed.getvalue(), hashlib.md5(packed.getvalue()).hexdigest()

    def serve(checksum):
        file = {"key": "PolyMNIST.zip", "links": {"self": "zip"}, "checksum": checksum}
        replies = {"zip": content, datasets.ZENODO_RECORD: json.dumps({"files": [file]}).encode()}
        monkeypatch.setattr(
            datasets.urllib.request, "urlopen", lambda url, timeout: io.BytesIO(replies[url])
        )

    root = tmp_path / "data"
    serve("md5:" + "0" * 32)
    with pytest.raises(UserError, match="differs from its checksum"):
        datasets.polymnist(options(root, download=True))
    assert list(root.iterdir()) == []
    serve("md5:" + md5)
    assert "authors" in datasets.polymnist(options(root, download=True)).source


def test_without_network_the_download_says_what_to_do(monkeypatch, tmp_path):
    def refuse(url, timeout):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(datasets.urllib.request, "urlopen", refuse)
    with pytest.raises(UserError, match=r"cannot be read.*put PolyMNIST.zip into"):
        datasets.polymnist(options(tmp_path, download=True))


# -------------------------------------------------------------------------------------- files


def test_missing_mnist_says_where_to_put_it_and_what_needs_none(monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise RuntimeError("no network")

    monkeypatch.setattr(datasets.torchvision.datasets.MNIST, "download", refuse)
    with pytest.raises(UserError, match=r"MNIST/raw.*--dataset polydigits") as error:
        datasets.polymnist(options(tmp_path / "none"))
    assert "\n" not in str(error.value)


def test_truncated_and_mislabelled_files_are_named(tmp_path):
    raw = make_mnist(tmp_path) / "MNIST" / "raw"
    images, labels = raw / "train-images-idx3-ubyte", raw / "train-labels-idx1-ubyte"
    whole = images.read_bytes()
    images.write_bytes(whole[:-5])
    with pytest.raises(UserError, match=r"train-images-idx3-ubyte: has 31371 bytes.*31376"):
        datasets.polymnist(options(tmp_path))
    images.write_bytes(whole[:6])
    with pytest.raises(UserError, match="train-images-idx3-ubyte: has no idx header"):
        datasets.polymnist(options(tmp_path))
    images.write_bytes(labels.read_bytes())
    with pytest.raises(UserError, match="begins with 2049, must begin with 2051"):
        datasets.polymnist(options(tmp_path))
    images.write_bytes(whole)
    write_idx(labels, np.full(40, 10))
    with pytest.raises(UserError, match="train-labels-idx1-ubyte: has a label above 9"):
        datasets.polymnist(options(tmp_path))
    write_idx(labels, np.zeros(39))
    with pytest.raises(UserError, match="train has images of"):
        datasets.polymnist(options(tmp_path))


def test_a_data_folder_may_be_read_only(tmp_path):
    make_mnist(tmp_path / "data")
    for path in (tmp_path / "data").rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    assert len(datasets.polymnist(options(tmp_path / "data")).train) == 40


def test_polymnist_on_real_mnist(data_dir, tmp_path):
    data = datasets.polymnist(options(data_dir, cache_dir=str(tmp_path)))
    assert len(data.train) == 60_000 and len(data.test) == 10_000
    assert torch.bincount(data.test.labels).tolist()[:3] == [980, 1135, 1032]
    assert all(t.shape[1:] == (3, 28, 28) for t in data.train.tensors.values())


# ------------------------------------------------------------------------- splits and batches


def test_epoch_order_is_a_permutation_without_the_partial_batch():
    split = datasets.Split({}, torch.zeros(103), {})
    order = datasets.epoch_order(split, 10, seed=7)
    assert order.shape == (10, 10)
    assert order.unique().numel() == 100
    assert order.equal(datasets.epoch_order(split, 10, seed=7))
    assert not order.equal(datasets.epoch_order(split, 10, seed=8))
    with pytest.raises(UserError, match="--batch-size 104: must be at most 103"):
        datasets.epoch_order(split, 104, seed=0)


def test_an_index_pairs_without_copies():
    tensors = {"a": torch.arange(4.0), "b": torch.arange(40, 43)}
    index = {"a": torch.tensor([0, 0, 3, 1]), "b": torch.tensor([2, 1, 0, 2])}
    split = datasets.Split(tensors, torch.zeros(4).long(), index)
    x, _ = split.batch(torch.tensor([2, 0]))
    assert x["a"].tolist() == [3.0, 0.0] and x["b"].tolist() == [40, 42]


def test_from_tensors_names_what_does_not_fit():
    m = Modality("text", (2,), "categorical", network="linear", categories=5)
    good = ({"text": torch.zeros(3, 2).int()}, [0, 1, 2])
    assert len(datasets.from_tensors(good, good, [m]).train) == 3
    for tensors, fault in (
        ({"words": torch.zeros(3, 2)}, r"train has \['words'\]"),
        ({"text": torch.zeros(3, 4)}, r"train/text is \(3, 4\), must be \(3, 2\)"),
        ({"text": torch.full((3, 2), 5)}, r"train/text must lie in 0 … 4"),
    ):
        with pytest.raises(UserError, match=fault):
            datasets.from_tensors((tensors, [0, 1, 2]), good, [m])


def test_cache_is_whole_or_absent(tmp_path):
    def killed():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        datasets.cached(tmp_path, "x", [1], killed)
    assert list(tmp_path.iterdir()) == []
    built = datasets.cached(tmp_path, "x", [1], lambda: {"a": torch.ones(2)})
    assert datasets.cached(tmp_path, "x", [1], killed)["a"].equal(built["a"])
    assert datasets.cached(tmp_path, "x", [2], lambda: {"a": torch.zeros(1)})["a"].numel() == 1
    for file in tmp_path.iterdir():
        file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match="is damaged"):
        datasets.cached(tmp_path, "x", [1], killed)


def streams(n, M, supervision, seed=0):
    tensors = {f"x{i}": torch.arange(n).float()[:, None] for i in range(M)}
    mods = [Modality(name, (1,), network="linear") for name in tensors]
    data = datasets.from_tensors((tensors, torch.zeros(n)), (tensors, torch.zeros(n)), mods)
    return datasets.with_streams(data.train, supervision, seed)


def test_streams_are_complete_tuples_and_each_modality_alone():
    """A batch: B complete rows, then B of each modality with the others masked."""
    split = streams(50, 3, 0.2)
    order = datasets.epoch_order(split, 8, seed=4)
    assert order.shape == (6, 4 * 8)
    for m in range(1, 4):  # one pass over all the data, each in an order of its own
        rows = order[:, 8 * m : 8 * (m + 1)].flatten()
        assert len(set(rows.tolist())) == 48
        assert not rows.equal(order[:, 8 * (m % 3 + 1) : 8 * (m % 3 + 2)].flatten())
    # The ten complete tuples begin again when they end: 48 rows, none seen oftener than five times.
    counts = torch.bincount(order[:, :8].flatten(), minlength=50)
    assert (counts > 0).sum() == 10 and counts.max() == 5 and counts.sum() == 48

    x, observed = split.batch(order[0])
    assert x["x1"].flatten().equal(order[0].float())
    expected = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 1, 0], [0, 0, 1]]).bool()
    assert observed.equal(expected.repeat_interleave(8, 0))


def test_the_complete_tuples_are_the_data_seeds_choice():
    complete = [set(streams(50, 2, 0.2, seed).streams[0].tolist()) for seed in (0, 0, 1)]
    assert complete[0] == complete[1] != complete[2]
    more = set(streams(50, 2, 0.5, 0).streams[0].tolist())
    assert complete[0] < more and len(more) == 25
    assert len(streams(50, 2, 1.0).streams[0]) == 50


def test_every_process_gets_its_part_of_every_stream():
    order = datasets.epoch_order(streams(40, 2, 0.5), 8, seed=4)
    for rank in range(4):
        part = order[:, rank::4]
        assert part.shape == (5, 3 * 2)
        for stream in range(3):
            whole = order[:, 8 * stream : 8 * (stream + 1)]
            assert torch.isin(part[:, 2 * stream : 2 * (stream + 1)], whole).all()


def test_no_complete_tuple_is_a_mistake():
    with pytest.raises(UserError, match="--supervision 0.001: leaves none of 50"):
        streams(50, 2, 0.001)
