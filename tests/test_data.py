"""The data sets: what a tuple is, what is kept apart, what a damaged file leads to."""

import dataclasses
import hashlib
import importlib
import io
import itertools
import json
import struct
import urllib.error
import urllib.request
import zipfile
from http.client import BadStatusLine
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image
from sklearn.datasets import load_digits

import datasets
import evaluate
import mmvae
import mopoe
import mvae
import svae
import vaevae
from common import Modality, UserError, generated, likelihood


def options(tmp_path, **changed):
    defaults = dict(data_dir=str(tmp_path), cache_dir=str(tmp_path / "cache"), data_seed=0)
    defaults |= dict(backgrounds="", download=False, pairings=20, keep=1.0, weights="")
    return SimpleNamespace(**defaults | changed)


def write_idx(path, array):
    header = struct.pack(f">{1 + array.ndim}i", 2048 + array.ndim, *array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


def make_mnist(folder, n=40, name="MNIST"):
    """A small MNIST: the image of a label has a bar of grey 100 and a row of white dots."""
    raw = folder / name / "raw"
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


def make_svhn(folder, n=30):
    """A small SVHN in the official format: the image of a label is of one colour, its number of
    tens and then its place; a digit 0 has the label 10."""
    (folder / "SVHN").mkdir()
    for part, count in (("train", n), ("test", n // 2)):
        labels = 1 + np.arange(count) % 10
        images = np.zeros((32, 32, 3, count), np.uint8)
        images[:, :, 0] = 20 * labels
        images[:, :, 1] = np.arange(count)
        path = folder / "SVHN" / f"{part}_32x32.mat"
        scipy.io.savemat(path, {"X": images, "y": labels[:, None]}, do_compression=True)
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
    raw, which = datasets.mnist(tmp_path, "MNIST")
    assert which == "files in MNIST's format, not the official (40, 20)"
    assert data.source == f"{which} on scikit-learn's photographs and generated backgrounds"
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


def test_the_pictures_of_a_tuple_show_different_images_of_its_digit(monkeypatch, tmp_path):
    make_mnist(tmp_path)
    flat = [np.full((28, 28, 3), 10 * m, np.uint8) for m in range(5)]
    monkeypatch.setattr(datasets, "sample_backgrounds", lambda: flat)
    x = datasets.polymnist(options(tmp_path)).train.tensors
    digits = [(x[f"m{m}"][:, 0] != 10 * m).flatten(1) for m in range(5)]
    pairs = itertools.combinations(digits, 2)
    same = torch.stack([(a == b).all(1) for a, b in pairs]).double().mean().item()
    # Two random orders of a digit's four images agree in one place, give or take one; there are ten
    # digits and ten pairs of pictures.
    assert abs(same - 1 / 4) < 4 * 1 / 4 / 100**0.5


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
    with pytest.raises(UserError, match=r"d.png is missing, damaged or no picture"):
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
            archive.writestr("MMNIST/examples.png", b"a picture of another name is left out")
        (tmp_path / "PolyMNIST").rename(tmp_path / "elsewhere")
    for _ in range(2):  # decoded, then from the cache
        data = datasets.polymnist(options(tmp_path))
        assert "authors" in data.source
        assert data.train.labels.tolist() == [(i * 7) % 10 for i in range(12)]
        for m in range(5):
            expected = [pixels["test", m, i].transpose(2, 0, 1) for i in range(12)]
            assert data.test.tensors[f"m{m}"].numpy().tolist() == np.stack(expected).tolist()
    assert len(list((tmp_path / "cache").iterdir())) == 1
    if not packed:  # decoded anew when a picture changes
        Image.new("RGB", (28, 28), "white").save(tmp_path / "PolyMNIST" / "test" / "m0" / "0.0.png")
        assert datasets.polymnist(options(tmp_path)).test.tensors["m0"][0].min() == 255


@pytest.mark.parametrize("packed", [False, True])
def test_polymnist_is_read_as_tensors_too(tmp_path, packed):
    folder, images = tmp_path / "MMNIST", {}
    for part in ("train", "test"):
        (folder / part).mkdir(parents=True)
        torch.save(torch.tensor([3, 9, 0]), folder / part / "labels.pt")
        for m in range(5):
            images[part, m] = torch.randint(256, (3, 3, 28, 28), dtype=torch.uint8)
            torch.save(images[part, m].float() / 255, folder / part / f"m{m}.pt")
    if packed:
        with zipfile.ZipFile(tmp_path / "PolyMNIST.zip", "w") as archive:
            for file in folder.rglob("*.pt"):
                archive.write(file, file.relative_to(tmp_path))
            archive.writestr("clf/pretrained_img_to_digit_clf_m0", b"what lies beside is left out")
    data = datasets.polymnist(options(tmp_path))
    for (part, m), x in images.items():
        assert getattr(data, part).tensors[f"m{m}"].equal(x)
        assert getattr(data, part).labels.tolist() == [3, 9, 0]
    if not packed:
        torch.save(images["test", 2].float(), folder / "test" / "m2.pt")
        with pytest.raises(UserError, match=r"m2.pt: is no saved.*floats must lie in 0 … 1"):
            datasets.polymnist(options(tmp_path))
        (folder / "train" / "labels.pt").unlink()
        with pytest.raises(UserError, match=r"nor all of train/m0.pt … labels.pt"):
            datasets.polymnist(options(tmp_path))


def test_faults_of_the_authors_images_are_named(tmp_path, monkeypatch):
    make_authors(tmp_path / "PolyMNIST")
    some = tmp_path / "PolyMNIST" / "train" / "m3" / "1.7.png"
    some.write_bytes(some.read_bytes()[:40])
    with pytest.raises(UserError, match=r"train/m3/1.7.png is missing, damaged or no"):
        datasets.polymnist(options(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(Image, "MAX_IMAGE_PIXELS", 28 * 28 // 3)
        with pytest.raises(UserError, match=r"0.0.png is missing, damaged or no.*exceeds limit"):
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
        files = json.dumps({"files": [file | {"key": "other.zip", "links": {}}, file]})
        replies = {"zip": content, datasets.ZENODO_RECORD: files.encode()}
        monkeypatch.setattr(
            urllib.request, "urlopen", lambda url, timeout: io.BytesIO(replies[url])
        )

    root = tmp_path / "data"
    serve("md5:" + "0" * 32)
    with pytest.raises(UserError, match="differs from its checksum"):
        datasets.polymnist(options(root, download=True))
    assert list(root.iterdir()) == []
    serve("md5:" + md5)
    assert "authors" in datasets.polymnist(options(root, download=True)).source


@pytest.mark.parametrize("fault", [urllib.error.URLError("no network"), ConnectionResetError()])
def test_without_network_the_download_says_what_to_do(fault, monkeypatch, tmp_path):
    def refuse(url, timeout):
        raise fault

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    with pytest.raises(UserError, match=r"cannot be fetched.*put PolyMNIST.zip into"):
        datasets.polymnist(options(tmp_path, download=True))


@pytest.mark.parametrize("reply", ["no JSON", "[]", '{"files": null}', '{"files": [{"key": 1}]}'])
def test_a_record_of_another_form_is_one_line(reply, monkeypatch, tmp_path):
    def serve(url, timeout):
        return io.BytesIO(reply.encode())

    monkeypatch.setattr(urllib.request, "urlopen", serve)
    with pytest.raises(UserError, match=r"cannot be fetched.*put PolyMNIST.zip into"):
        datasets.polymnist(options(tmp_path, download=True))


def test_a_damaged_zip_is_named(tmp_path):
    path = tmp_path / "PolyMNIST.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("train/m0/0.0.png", b"")
    good = path.read_bytes()
    place = good.index(b"PK\x01\x02") + 6  # of the version that the first entry needs
    for content in (good[:30], b"", good[:place] + b"\xb5" + good[place + 1 :]):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"PolyMNIST.zip: is not a zip file"):
            datasets.polymnist(options(tmp_path))


# -------------------------------------------------------------------------------------- files


def test_what_lies_beside_mnists_files_is_not_read(tmp_path):
    """torchvision's class would take these, of its older versions, where they are."""
    processed = make_mnist(tmp_path) / "MNIST" / "processed"
    processed.mkdir()
    for name in ("training.pt", "test.pt"):
        torch.save((torch.zeros(30, 28, 28, dtype=torch.uint8), torch.zeros(30)), processed / name)
    (images, _), (_, labels) = datasets.mnist(tmp_path, "MNIST")[0]
    assert len(images) == 40 and len(labels) == 20
    (tmp_path / "MNIST" / "raw" / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(UserError, match=r"MNIST is not there and cannot be downloaded.*processed"):
        datasets.mnist(tmp_path, "MNIST")


def test_missing_mnist_says_where_to_put_it_and_what_needs_none(monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise RuntimeError("no network")

    monkeypatch.setattr(datasets.torchvision.datasets.MNIST, "download", refuse)
    (tmp_path / "begun" / "MNIST" / "raw").mkdir(
        parents=True
    )  # as a download that failed leaves it
    for folder in ("none", "begun"):
        with pytest.raises(UserError, match=r"MNIST/raw.*--dataset polydigits") as error:
            datasets.polymnist(options(tmp_path / folder))
        assert "\n" not in str(error.value)


def test_truncated_and_mislabelled_files_are_named(tmp_path):
    raw = make_mnist(tmp_path) / "MNIST" / "raw"
    images, labels = raw / "train-images-idx3-ubyte", raw / "train-labels-idx1-ubyte"
    whole = images.read_bytes()
    images.write_bytes(whole[:-5])
    with pytest.raises(UserError, match="raw: train-… are no idx files, or damaged"):
        datasets.polymnist(options(tmp_path))
    images.write_bytes(whole[:6])
    with pytest.raises(UserError, match="raw: train-… are no idx files, or damaged"):
        datasets.polymnist(options(tmp_path))
    images.write_bytes(labels.read_bytes())
    with pytest.raises(UserError, match="raw: train-… are no idx files, or damaged"):
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
    before = sorted((tmp_path / "data").rglob("*"))
    for path in [tmp_path / "data", *before]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    assert len(datasets.polymnist(options(tmp_path / "data")).train) == 40
    assert sorted((tmp_path / "data").rglob("*")) == before  # root may write all the same


def test_polymnist_on_real_mnist(data_dir, tmp_path):
    data = datasets.polymnist(options(data_dir, cache_dir=str(tmp_path)))
    assert len(data.train) == 60_000 and len(data.test) == 10_000
    assert data.source.startswith("MNIST on")  # the official files
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


def test_the_columns_of_a_mask_are_in_the_modalities_order():
    modalities = [Modality("vector", (4,), "normal"), Modality("label", (), "normal")]
    x = {"label": torch.arange(3), "vector": torch.zeros(3, 4)}
    data = datasets.from_tensors((x, [0, 1, 2]), (x, [0, 1, 2]), modalities)
    for split in (data.train, data.test):
        assert [*split.tensors] == [m.name for m in modalities] == ["vector", "label"]


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
    for index, fault in (
        ({"words": [0, 1, 2]}, r"train has \['words'\]"),
        ({"text": [0, 1]}, "train's index of text must have 3 numbers below 3"),
        ({"text": [0, 1, 3]}, "train's index of text must have 3 numbers below 3"),
        ({"text": [0, 1, -1]}, "train's index of text must have 3 numbers below 3"),
    ):
        with pytest.raises(UserError, match=fault):
            datasets.from_tensors((*good, index), good, [m])
    with pytest.raises(UserError, match="test has 0 tuples"):
        datasets.from_tensors(good, ({"text": torch.zeros(0, 2)}, []), [m])


def test_cache_is_whole_or_absent(tmp_path):
    def killed():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        datasets.cached(tmp_path, "x", [1], killed)
    assert list(tmp_path.iterdir()) == []
    built = datasets.cached(tmp_path, "x", [1], lambda: {"a": torch.ones(2)})
    assert datasets.cached(tmp_path, "x", [1], killed)["a"].equal(built["a"])
    assert datasets.cached(tmp_path, "x", [2], lambda: {"a": torch.zeros(1)})["a"].numel() == 1
    packed = io.BytesIO()
    zipfile.ZipFile(packed, "w").close()
    whole = next(tmp_path.iterdir()).read_bytes()
    for damaged in (whole[:100], whole[100:], b"text", bytes(50), b"", packed.getvalue()):
        for file in tmp_path.iterdir():
            file.write_bytes(damaged)
        with pytest.raises(UserError, match="is damaged"):
            datasets.cached(tmp_path, "x", [1], killed)


def test_two_builders_of_one_cache_both_succeed(tmp_path):
    """The second begins and ends while the first still builds."""

    def first():
        datasets.cached(tmp_path, "x", [1], lambda: {"a": torch.ones(2)})
        return {"a": torch.ones(2)}

    assert datasets.cached(tmp_path, "x", [1], first)["a"].sum() == 2
    assert len(list(tmp_path.iterdir())) == 1


def streams(n, M, supervision, seed=0):
    tensors = {f"x{i}": torch.arange(n).float()[:, None] for i in range(M)}
    mods = [Modality(name, (1,), network="linear") for name in tensors]
    data = datasets.from_tensors((tensors, torch.zeros(n)), (tensors, torch.zeros(n)), mods)
    return datasets.with_streams(data.train, supervision, seed)


def test_streams_are_complete_tuples_and_each_modality_alone():
    """Of each modality a batch has B complete rows, then B of its own, and of these of no other."""
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
    complete, *alone = order[0].float().split(8)
    for t, own in zip(x.values(), alone, strict=True):
        assert t.flatten().equal(torch.cat([complete, own]))
    assert observed is None  # nothing of a batch of a stream is missing


def test_weights_are_those_of_the_option(tmp_path):
    def weights(text):
        data = datasets.load(options(tmp_path, dataset="digits-label", weights=text))
        return [m.weight for m in data.modalities]

    assert weights("") == [1.0, 50.0]
    assert weights("label=1") == [1.0, 1.0]
    assert weights("label=0,image=2.5") == [2.5, 0.0]
    for text, fragment in (
        ("text=1", "'text' is none of image, label"),
        ("image:1", "must be NAME=NUMBER"),
        ("label", "must be NAME=NUMBER"),
        ("label=1,image=-1", "at least 0"),
        ("label=nan", "at least 0"),
    ):
        with pytest.raises(UserError, match=f"--weights {text}: .*{fragment}"):
            weights(text)


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
    with pytest.raises(UserError, match="--supervision 0.001: leaves 0 of 50"):
        streams(50, 2, 0.001)


# ---------------------------------------------------- images and their parts, labels or names


@pytest.mark.parametrize("name, rows", [("mnist-split", (14, 14)), ("mnist-split-3", (9, 9, 9))])
def test_strips_are_the_image_from_top_to_bottom(tmp_path, name, rows):
    make_mnist(tmp_path)
    data = datasets.load(options(tmp_path, dataset=name))
    image = datasets.mnist(tmp_path, "MNIST")[0][0][0]
    x, _ = data.train.batch(torch.arange(len(image)))
    assert [x[m.name].shape[1:] for m in data.modalities] == [(1, n, 28) for n in rows]
    whole = torch.cat([x[m.name] for m in data.modalities], -2)[:, 0]
    assert (255 * whole).round().byte().equal(torch.from_numpy(image[:, 28 - sum(rows) :]))


def test_the_row_that_thirds_leave_out_is_black(data_dir):
    assert datasets.mnist(data_dir, "MNIST")[0][0][0][:, 0].any(1).sum() == 2


@pytest.mark.parametrize("name", ["mnist-label", "fashion-label", "digits-label"])
def test_a_label_is_the_images_own(tmp_path, name):
    make_mnist(tmp_path)
    make_mnist(tmp_path, name="FashionMNIST")
    data = datasets.load(options(tmp_path, dataset=name))
    for split in (data.train, data.test):
        assert split.tensors["label"].equal(split.labels)
        if name != "digits-label":
            assert (split.tensors["image"][:, 0, 5].argmax(-1) == split.labels).all()


def test_the_last_10_000_training_images_are_left_to_validation():
    images, labels = np.arange(60_000), np.arange(60_000)
    ((x, y), test), _ = datasets.for_training(((images, labels), "test"), "made")
    assert len(x) == len(y) == 50_000 and test == "test"
    assert x[0] == y[0] == 0 and x[-1] == y[-1] == 49_999


@pytest.mark.parametrize("name", ["mnist-label", "fashion-label", "binary-mnist-label"])
def test_what_is_left_to_validation_does_not_train(name, tmp_path, monkeypatch):
    images, labels = np.zeros((50_002, 28, 28), np.uint8), np.arange(50_002) % 10
    parts = (images, labels), (images[:20], labels[:20])
    monkeypatch.setattr(datasets, "mnist", lambda *_: (parts, "made"))
    assert len(datasets.load(options(tmp_path, dataset=name)).train) == 50_000


def test_small_digits_have_255_greys():
    (images, _), _ = datasets.small_digits()
    assert images.max() == 255
    assert set(np.unique(images)) <= {round(255 / 16 * n) for n in range(17)}


@pytest.mark.parametrize("name", ["mnist-label", "mnist-split", "multimnist"])
def test_the_test_data_are_made_of_test_images(name, monkeypatch, tmp_path):
    parts = [
        (np.full((n, 28, 28), grey, np.uint8), np.arange(n) % 10)
        for n, grey in ((60, 100), (40, 200))
    ]
    monkeypatch.setattr(datasets, "mnist", lambda *_: (parts, "made"))
    data = datasets.load(options(tmp_path, dataset=name))
    for split, n, grey in ((data.train, 60, 100), (data.test, 40, 200)):
        pixels = next(iter(split.tensors.values()))
        assert len(split) == n and grey in pixels and set(pixels.unique().tolist()) <= {0, grey}


@pytest.mark.parametrize("name", ["mnist-svhn", "mnist-svhn-text", "multimnist"])
def test_the_data_seed_decides_what_is_drawn(name, tmp_path):
    make_svhn(make_mnist(tmp_path))
    found = []
    for seed in (0, 0, 1):
        split = datasets.load(options(tmp_path, dataset=name, data_seed=seed)).train
        found.append([t[split.index[n]] for n, t in split.tensors.items()])
    first, *others = found
    same = [all(a.equal(b) for a, b in zip(first, other, strict=True)) for other in others]
    assert same == [True, False]


def test_the_data_seed_decides_what_is_kept(tmp_path):
    first, again, other = (
        datasets.load(options(tmp_path, dataset="digits-label", keep=0.5, data_seed=seed))
        for seed in (0, 0, 1)
    )
    assert first.train.observed.equal(again.train.observed)
    assert not first.train.observed.equal(other.train.observed)


def test_a_fingerprint_is_of_data_labels_and_pairing():
    x, labels = torch.randn(20, 2), torch.zeros(20, dtype=torch.long)
    split = datasets.Split({"x": x}, labels, {"x": torch.arange(20)})
    changes = dict(tensors={"x": x + 1}), dict(labels=labels + 1), dict(drawn=True)
    changes += (dict(index={"x": torch.arange(20).roll(1)}),)
    found = [split, *(dataclasses.replace(split, **change) for change in changes)]
    assert len({one.fingerprint("x") for one in found}) == 5


def test_weights_and_scales_are_the_papers(tmp_path):
    """λ is the papers' or, of what they weigh by dimensions, the ratio of these."""
    make_cub(make_celeba(make_svhn(make_mnist(tmp_path)), size=(64, 64)))
    weights = {
        "multimnist": [1, 10],
        "mnist-label": [1, 50],
        "celeba-attr": [1, 10],
        "celeba-text": [1, 3 * 64 * 64 / 256],
        "cub": [0.002, 1],
    }
    for name, expected in weights.items():
        modalities = datasets.load(options(tmp_path, dataset=name)).modalities
        assert [m.weight for m in modalities] == expected
    assert modalities[0].scale == 0.01  # of the pictures' features
    assert Modality("x", (3, 28, 28)).scale == 0.75  # PolyMNIST, Sutter et al. 2021, released code


def test_settings_are_the_papers():
    """Where they name no batch size the released code's, of MNIST-Split our own, of CUB the code's
    all."""
    settings = {
        name: tuple(
            of.get(key, 1.0) for key in ("epochs", "batch_size", "lr", "latent_dim", "beta")
        )
        for name, of in datasets.SETTINGS.items()
    }
    assert settings["polymnist"] == (300, 256, 1e-3, 512, 2.5)
    assert settings["mnist-svhn-text"] == (150, 256, 1e-3, 20, 5.0)
    assert settings["celeba-text"] == (200, 256, 5e-4, 64, 2.5)
    assert settings["mnist-svhn"] == (30, 128, 1e-3, 20, 1.0)
    assert settings["mnist-split"] == (200, 128, 2e-4, 64, 1.0)
    assert settings["mnist-split-3"] == (50, 128, 2e-4, 64, 1.0)
    for name in ("mnist-label", "binary-mnist-label", "fashion-label"):
        assert settings[name] == (500, 100, 1e-3, 64, 1.0)
    assert settings["multimnist"] == (500, 100, 1e-3, 100, 1.0)
    assert settings["celeba-attr"] == settings["celeba19"] == (100, 100, 1e-4, 100, 1.0)
    assert settings["cub"] == (50, 64, 1e-3, 64, 1.0)


def test_settings_of_a_method_are_its_papers():
    """Kutuzova et al. 2021, App. F; Wu & Goodman 2018, Section 5; Shi et al. 2019, Section 5 and
    code; Sutter et al. 2021, App. E.2."""

    def own(script, name, *keys):
        return tuple(script.DEFAULTS[name][key] for key in keys)

    assert own(svae, "mnist-svhn", "epochs", "lr") == (50, 1e-4)
    assert own(vaevae, "mnist-svhn", "epochs", "lr") == (50, 1e-3)
    assert own(svae, "cub", "epochs", "lr") == own(vaevae, "cub", "epochs", "lr") == (200, 1e-4)
    assert own(mvae, "celeba19", "random_subsets") == (1,)
    kinds = "distribution", "scales", "learn_prior", "amsgrad"
    assert own(mmvae, "mnist-svhn", *kinds) == ("laplace", "sum", True, True)
    assert own(mmvae, "cub", *kinds) == ("normal", "free", True, True)
    for script in (mvae, mmvae, mopoe):
        assert own(script, "celeba-text", "latent_dim", "private_dim") == (32, 32)


def test_binary_pixels_are_drawn_anew_to_train_and_once_to_test(tmp_path):
    make_mnist(tmp_path, n=270)
    first, again, other = (
        datasets.load(options(tmp_path, dataset="binary-mnist-label", data_seed=seed))
        for seed in (0, 0, 1)
    )
    pixels = first.test.tensors["image"]
    assert set(pixels.unique().tolist()) == {0, 255}
    assert pixels.equal(again.test.tensors["image"])
    assert not pixels.equal(other.test.tensors["image"])
    x, x_again = (first.test.batch(torch.arange(len(pixels)))[0]["image"] for _ in range(2))
    assert x.equal(x_again) and x.equal(pixels.float() / 255)

    rows, drawn = torch.arange(len(first.train)), []
    for seed in (0, 1, 0):
        torch.manual_seed(seed)
        drawn.append(first.train.to("cpu").batch(rows)[0]["image"])
    assert drawn[0].equal(drawn[2]) and not drawn[0].equal(drawn[1])
    for x in (*drawn, pixels.float() / 255):
        assert set(x.unique().tolist()) == {0, 1}
        bar = x[:, 0, 3].double()  # brightness 100 of 255
        p = 100 / 255
        assert abs(bar.mean() - p) < 4 * (p * (1 - p) / bar.numel()) ** 0.5
        assert x[:, 0, 4].max() == 0 and x[:, 0, 5].sum(-1).eq(1).all()
    grey = dataclasses.replace(
        first.train, drawn=False
    )  # else a classifier of grey pixels is taken
    assert grey.fingerprint("image") != first.train.fingerprint("image")


@pytest.mark.parametrize("name", ["mnist-svhn", "mnist-svhn-text"])
def test_pairs_are_of_one_digit_and_cost_an_index(tmp_path, name):
    # Four and three of a digit to train, two and one or two to test.
    make_svhn(make_mnist(tmp_path))
    data = datasets.load(options(tmp_path, dataset=name, pairings=7))
    assert len(data.train) == 10 * 3 * 7 and len(data.train.tensors["svhn"]) == 30
    assert len(data.test) == 5 * 2 + 5 * 1  # once
    assert "SVHN's format, not the official (30, 15), 7 pairings" in data.source
    x, _ = data.train.batch(torch.arange(len(data.train)))
    assert (x["mnist"][:, 0, 5].argmax(-1) == data.train.labels).all()
    colour = (255 * x["svhn"][:, 0, 0, 0]).round().long() / 20
    assert (colour % 10 == data.train.labels).all()
    used = torch.stack([data.train.index["mnist"], data.train.index["svhn"]], 1)
    assert used.unique(dim=0).shape[0] > 30  # not the same pairs seven times
    assert data.train.index["svhn"].bincount().eq(7).all()
    if name == "mnist-svhn-text":
        texts = ["".join(datasets.ALPHABET[i] for i in row) for row in x["text"].tolist()]
        names = [datasets.DIGIT_NAMES[digit] for digit in data.train.labels]
        assert [text.strip() for text in texts] == names
        assert {text.index("one") for text in texts if "one" in text} == set(range(6))
    weights = {m.name: m.weight for m in data.modalities}
    sizes = {"mnist": 784, "svhn": 3072, "text": 8}
    assert all(weights[n] == pytest.approx(3072 / sizes[n]) for n in weights)


def test_at_most_10_000_images_of_a_digit_are_paired(monkeypatch, tmp_path):
    labels = np.repeat(np.arange(10), [10_003] + 9 * [2])
    for name, shape in (("mnist", (28, 28)), ("svhn", (3, 32, 32))):
        part = np.zeros((len(labels), *shape), np.uint8), labels
        monkeypatch.setattr(datasets, name, lambda *_, part=part: ((part, part), "a stand-in"))
    data = datasets.load(options(tmp_path, dataset="mnist-svhn", pairings=2))
    for split, pairings in ((data.train, 2), (data.test, 1)):
        for rows in split.index.values():
            assert rows[split.labels == 0].bincount().tolist() == 10_000 * [pairings]


def test_the_alphabet_has_71_symbols():
    assert len(set(datasets.ALPHABET)) == 71


def test_faults_of_svhn_files_are_named(tmp_path, monkeypatch):
    make_svhn(make_mnist(tmp_path))
    path = tmp_path / "SVHN" / "train_32x32.mat"
    good, content = path.read_bytes(), scipy.io.loadmat(path)

    def fails(match):
        with pytest.raises(UserError, match=match):
            datasets.load(options(tmp_path, dataset="mnist-svhn"))

    later = good[:124] + b"\x00\x02" + good[126:]  # MATLAB 7.3, which is HDF5
    for damaged in (good[: len(good) // 2], b"", b"no file of MATLAB", good[:200], later):
        path.write_bytes(damaged)
        fails("train_32x32.mat: is no SVHN file, or damaged")
    scipy.io.savemat(path, {"X": content["X"]})
    fails("train_32x32.mat: is no SVHN file, or damaged")
    scipy.io.savemat(path, {"X": content["X"], "y": content["y"] - 1})
    fails("must have the labels 1 … 10")
    scipy.io.savemat(path, {"X": content["X"], "y": content["y"][:-1]})
    fails(r"has images of \(32, 32, 3, 30\) in uint8 for 29 labels")
    path.unlink()
    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    fails("SVHN is not there and cannot be downloaded.*train_32x32.mat.*polydigits")


@pytest.mark.parametrize("changed", [dict(backgrounds="pictures"), dict(download=True)])
def test_polymnists_options_are_refused_elsewhere(changed, tmp_path):
    (name,) = changed
    with pytest.raises(UserError, match=f"--{name}: belongs to --dataset polymnist, not digits-"):
        datasets.load(options(tmp_path, dataset="digits-label", **changed))
    path = tmp_path / "own.npz"
    np.savez(path, x=np.zeros(1))
    with pytest.raises(UserError, match=f"--{name}: belongs to --dataset polymnist, not .*own.npz"):
        datasets.load(options(tmp_path, dataset=str(path), **changed))
    with pytest.raises(UserError, match="--download: goes without --backgrounds"):
        datasets.load(options(tmp_path, dataset="polymnist", download=True, backgrounds="x"))


@pytest.mark.parametrize("fault", [urllib.error.URLError("no network"), BadStatusLine("?!")])
def test_a_download_that_fails_says_why_and_leaves_no_folder(fault, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise fault

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    mistyped, empty = tmp_path / "mistyped", tmp_path / "empty"
    empty.mkdir()
    for folder in (mistyped, empty):
        for fetch in (lambda root: datasets.mnist(root, "MNIST"), datasets.svhn):
            with pytest.raises(UserError, match=r"(?s)cannot be downloaded \(.+\); put") as error:
                fetch(folder)
            assert fetch is not datasets.svhn or str(fault) in str(error.value)
    assert list(tmp_path.rglob("*")) == [empty]


@pytest.mark.parametrize("stopped", [True, False])
def test_svhn_is_whole_or_not_there(tmp_path, monkeypatch, stopped):
    (tmp_path / "elsewhere").mkdir()
    whole = make_svhn(tmp_path / "elsewhere") / "SVHN"

    def download(url, folder, name, md5):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes((whole / url.rsplit("/")[-1]).read_bytes())
        assert not list(folder.glob("train_32x32.mat")) or "test" in name
        if stopped:
            raise ConnectionResetError

    monkeypatch.setattr(datasets, "download_url", download)
    if stopped:
        with pytest.raises(UserError, match="SVHN is not there and cannot be downloaded"):
            datasets.svhn(tmp_path)
        assert not (tmp_path / "SVHN").exists()
    else:
        assert len(datasets.svhn(tmp_path)[0][0][0]) == 30
        assert len(list((tmp_path / "SVHN").iterdir())) == 2


def no_network(*_, **__):
    raise urllib.error.URLError("no network")


def test_multimnist_is_the_string_of_its_quarters(data_dir):
    data = datasets.load(options(data_dir, dataset="multimnist"))
    n = 4000
    x, number = data.train.tensors, data.train.labels[:n]
    image, text = x["image"][:n, 0], x["text"][:n]
    quarters = (image > 0).view(n, 2, 25, 2, 25).any(4).any(2).view(n, 4)
    assert quarters.sum(1).equal(number)
    assert number.bincount().sub(n / 5).abs().max() < 4 * (n * 0.2 * 0.8) ** 0.5
    assert (text < 10).sum(1).equal(number) and (text[:, 4] == 10).all()
    assert (text[:, :-1].eq(10) <= text[:, 1:].eq(10)).all()  # the end is followed by the end
    # A digit's mean picture is its own, whichever its quarter is.
    digits, labels = map(torch.from_numpy, datasets.mnist(data_dir, "MNIST")[0][0])
    means = torch.stack([digits[labels == d].double().mean(0) for d in range(10)])
    means = means[:, 2:27, 2:27].flatten(1)
    for quarter in range(4):
        row, column = divmod(quarter, 2)
        part = image[:, 25 * row : 25 * row + 25, 25 * column : 25 * column + 25]
        place = quarters[:, :quarter].sum(1)
        symbol = text.gather(1, place[:, None])[:, 0]
        for digit in range(10):
            shown = part[quarters[:, quarter] & (symbol == digit)].double().mean(0).flatten()
            assert (means - shown).square().sum(1).argmin() == digit


# -------------------------------------------------------------------------------------- CelebA


def make_celeba(folder, n=20, size=(178, 218)):
    """A small CelebA in the official layout; a face is a square of its own colour, 148 wide, in the
    middle, on white. The attribute i of a face j is there where j is a multiple of i + 1."""
    pictures = folder / "celeba" / "img_align_celeba"
    pictures.mkdir(parents=True)
    names = [*datasets.ATTRIBUTES.split(), *(f"Other_{i}" for i in range(22))]
    table, parts = [str(n), " ".join(names)], []
    for j in range(n):
        picture = np.full((*size[::-1], 3), 255, np.uint8)
        inside = picture[35:183, 15:163] if size[0] == 178 else picture
        inside[:] = (10 * j, 0, 100)
        file = f"{j + 1:06}.png"  # PNG has the very colours; the loader takes any name
        Image.fromarray(picture).save(pictures / file)
        table.append(f"{file} " + " ".join("1" if j % (i + 1) == 0 else "-1" for i in range(40)))
        parts.append(f"{file} {0 if j < n // 2 else 1 if j < 3 * n // 4 else 2}")
    (folder / "celeba" / "list_attr_celeba.txt").write_text("\n".join(table) + "\n")
    (folder / "celeba" / "list_eval_partition.txt").write_text("\n".join(parts) + "\n")
    return folder


def whiten_upper_rows(folder, size, rows):
    """In place of every picture in the folder one that is black below these rows."""
    pixels = np.zeros((size, size, 3), np.uint8)
    pixels[:rows] = 255
    for file in folder.rglob("*.png"):
        Image.fromarray(pixels).save(file)


def upper_rows_are_white(x, rows):
    return (x[..., :rows, :] == 255).all() and (x[..., rows:, :] == 0).all()


def test_images_stand_upright(tmp_path):
    make_celeba(tmp_path, size=(64, 64))
    whiten_upper_rows(tmp_path / "celeba", 64, 20)
    faces = datasets.load(options(tmp_path, dataset="celeba-attr")).train.tensors["image"]
    assert upper_rows_are_white(faces, 20)
    make_authors(tmp_path / "PolyMNIST")
    whiten_upper_rows(tmp_path / "PolyMNIST", 28, 9)
    assert upper_rows_are_white(datasets.polymnist(options(tmp_path)).train.tensors["m2"], 9)
    make_svhn(tmp_path)
    path = tmp_path / "SVHN" / "train_32x32.mat"
    content = scipy.io.loadmat(path)
    content["X"][:] = 0
    content["X"][:5] = 255
    scipy.io.savemat(path, {"X": content["X"], "y": content["y"]})
    (x, _), _ = datasets.svhn(tmp_path)[0]
    assert upper_rows_are_white(x, 5)


def test_of_celeba_only_what_is_used_is_needed_and_cached(tmp_path):
    folder = make_celeba(tmp_path, size=(64, 64)) / "celeba"
    pictures, parts = folder / "img_align_celeba", folder / "list_eval_partition.txt"
    (pictures / "000012.png").unlink()  # of the validation part
    parts.write_bytes(b"\xef\xbb\xbf" + parts.read_bytes() + b"\n \n")  # as editors leave it
    for _ in range(2):
        data = datasets.load(options(tmp_path, dataset="celeba-attr"))
        assert (len(data.train), len(data.test)) == (10, 5)
        (pictures / ".DS_Store").write_bytes(b"")
        (folder / "list_attr_celeba.txt").touch()
    assert len(list((tmp_path / "cache").iterdir())) == 1
    Image.new("RGB", (64, 64), "white").save(pictures / "000020.png")
    data = datasets.load(options(tmp_path, dataset="celeba-attr"))
    assert data.test.tensors["image"][-1].min() == 255


@pytest.mark.parametrize("size", [(178, 218), (64, 64)])
def test_faces_are_cropped_and_go_with_their_attributes(tmp_path, size):
    make_celeba(tmp_path, size=size)
    sets = {
        name: datasets.load(options(tmp_path, dataset=name))
        for name in ("celeba-text", "celeba-attr", "celeba19")
    }
    for data in sets.values():
        assert (len(data.train), len(data.test)) == (10, 5)
        assert data.source == "files in CelebA's format, not the official (10, 5)"
        faces = data.test.tensors["image"]
        colours = torch.tensor([[10 * j, 0, 100] for j in range(15, 20)], dtype=torch.uint8)
        assert faces[..., 7:-7, 7:-7].equal(colours[..., None, None].expand(5, 3, 50, 50))
        # Of Wu and Goodman's squares of 178 pixels these are the inner 148, of Sutter's all.
        bright = (faces[:, :, :4] == 255).all() and (faces[:, :, -4:] == 255).all()
        assert bright == (size == (178, 218) and data is not sets["celeba-text"])
        there = torch.tensor([[j % (i + 1) == 0 for i in range(40)] for j in range(15, 20)])
        assert data.test.labels.equal(there.long())
    assert sets["celeba-attr"].test.tensors["attributes"].equal(there[:, :18].float())
    names = sets["celeba-attr"].modalities[1].alphabet
    assert len(names) == 18 and names[2] == "black hair"
    assert len(sets["celeba19"].modalities) == 19
    assert sets["celeba19"].modalities[3].alphabet == ("black hair",)
    assert sets["celeba19"].test.tensors["wavy_hair"].equal(there[:, [16]].float())
    text = [
        "".join(datasets.ALPHABET[i] for i in t) for t in sets["celeba-text"].test.tensors["text"]
    ]
    assert [t.strip("*") for t in text][:2] == [
        "bald, black hair, brown hair, smiling",
        "bald, bangs, blond hair, gray hair, straight hair",
    ]
    assert len({len(t) - len(t.lstrip("*")) for t in text}) > 1


def test_a_text_that_is_too_long_loses_its_last_words(tmp_path):
    make_celeba(tmp_path, size=(64, 64))
    data = datasets.load(options(tmp_path, dataset="celeba-text"))
    all_of_them = "".join(datasets.ALPHABET[i] for i in data.train.tensors["text"][0])
    words = all_of_them.strip("*").split(", ")
    names = [n.replace("_", " ").lower() for n in datasets.ATTRIBUTES.split()]
    assert len(all_of_them) == 256 and words[:18] == names and 18 < len(words) < 40
    assert words[-1] == f"other {len(words) - 19}"


def test_faults_of_celeba_files_are_named(tmp_path):
    def fails(match):
        with pytest.raises(UserError, match=match):
            datasets.load(options(tmp_path, dataset="celeba-attr"))

    fails("CelebA is not there.*img_align_celeba is missing.*polydigits")
    folder = make_celeba(tmp_path, size=(64, 64)) / "celeba"
    table, parts = folder / "list_attr_celeba.txt", folder / "list_eval_partition.txt"
    good = table.read_text(), parts.read_text()
    table.write_text(good[0].replace(" -1\n", "\n", 1))
    fails("list_attr_celeba.txt: the row of 000002.png is not 40 times 1 or -1")
    table.write_text(good[0].replace("000003.png 1", "000003.png 7"))
    fails("the row of 000003.png is not 40 times 1 or -1")
    for header in (good[0].replace("Male", "Femme"), "20\n", ""):
        table.write_text(header)
        fails("list_attr_celeba.txt: the second line must name attributes.*among them .*Male")
    table.write_text(good[0].replace("Other_3", "Öther"))
    fails("the second line must name attributes, in ASCII$")
    table.write_bytes(good[0].encode() + b"\xff")
    fails("list_attr_celeba.txt: is no text")
    table.write_text(good[0])
    for damaged in ("000044.png 0", "000004.png", "000004.png 0 0"):
        parts.write_text(good[1].replace("000004.png 0", damaged))
        fails("list_eval_partition.txt: must have each picture of list_attr_celeba.txt")
    parts.write_text(good[1].replace(" 2", " 3"))
    fails("list_eval_partition.txt: the parts must be 0, 1 and 2")
    parts.write_text(good[1])
    face = folder / "img_align_celeba" / "000005.png"
    Image.new("RGB", (63, 64)).save(face)
    fails(r"000005.png is \(63, 64\), must be 178×218 or 64×64")
    face.write_bytes(face.read_bytes()[:60])
    fails("000005.png is missing, damaged or no picture")
    face.unlink()
    with pytest.raises(FileNotFoundError, match=r"000005.png"):
        datasets.load(options(tmp_path, dataset="celeba-attr"))


# ------------------------------------------------------------------------------- CUB-Captions


def make_cub(folder, n=4):
    """A small CUB in the layout of Shi et al.: picture i has the features i, and captions that
    count its wings; a rare word each, of which "often" is there four times."""
    (folder / "cub" / "resnet101_2048").mkdir(parents=True)
    for part, name in (("trainval", "train"), ("test", "test")):
        lines = [f"this bird, has {i} wings{j} ." for i in range(n) for j in range(10)]
        lines[:4] = ["often " * k for k in (1, 1, 2, 40)]
        (folder / "cub" / f"text_{part}classes.txt").write_text("\n".join(lines) + "\n")
        features = torch.arange(n).float()[:, None].expand(n, 2048).contiguous()
        torch.save(features, folder / "cub" / "resnet101_2048" / f"{name}.ft")
    return folder


def test_captions_go_ten_to_a_picture(tmp_path):
    data = datasets.load(options(make_cub(tmp_path), dataset="cub"))
    caption = data.modalities[1]
    words = ("often", "this", "bird", ",", "has", "1", "2", "3", "0", ".")
    assert set(caption.alphabet[:3]) == {"<exc>", "<pad>", "<eos>"}
    assert set(caption.alphabet[3:]) == {*words, *(f"wings{j}" for j in range(4, 10))}
    assert (len(data.train), len(data.test)) == (40, 40)
    x, _ = data.train.batch(torch.tensor([0, 2, 3, 17, 39]))
    assert x["image"][:, 5].tolist() == [0, 0, 0, 1, 3]
    shown = [[caption.alphabet[n] for n in row] for row in x["caption"].tolist()]
    assert shown[0] == ["often", "<eos>"] + ["<pad>"] * 30
    assert shown[2] == ["often"] * 31 + ["<eos>"]
    assert shown[3][:7] == ["this", "bird", ",", "has", "1", "wings7", "."]


def test_padding_counts_for_nothing(float64):
    m = Modality("x", (5,), "categorical", categories=4, padding=1, network="mlp")
    logits = torch.randn(3, 5, 4)
    x = torch.tensor([[0, 2, 1, 1, 1], [3, 3, 3, 2, 0], [1, 1, 1, 1, 1]])
    by_hand = logits.log_softmax(-1).gather(-1, x[..., None])[..., 0] * (x != 1)
    torch.testing.assert_close(likelihood(m, logits).log_prob(x), by_hand.sum(-1))
    assert generated(likelihood(m, logits)).equal(logits.argmax(-1))


def test_faults_of_cub_files_are_named(tmp_path):
    def fails(match):
        with pytest.raises(UserError, match=match):
            datasets.load(options(tmp_path, dataset="cub"))

    fails("CUB is not there.*text_trainvalclasses.txt is missing.*polydigits")
    folder = make_cub(tmp_path) / "cub"
    features = folder / "resnet101_2048" / "train.ft"
    good = features.read_bytes()
    for damaged in (b"", good[:100], good[: len(good) // 2], b"some text"):
        features.write_bytes(damaged)
        fails("train.ft: is no saved tensor, or damaged")
    for content in (torch.zeros(3, 2048), torch.zeros(4, 2047)):
        torch.save(content, features)
        fails(r"train.ft: has .* for 40 captions, ten a picture")
    torch.save({"x": 1}, features)
    fails("train.ft: is no saved tensor, or damaged")
    features.unlink()
    fails("resnet101_2048/train.ft is missing")
    features.write_bytes(good)
    (folder / "text_testclasses.txt").write_bytes(b"\xff\xfe")
    fails("text_testclasses.txt: is no text")


# ------------------------------------------------------------------------------------ own data


def arrays(**changed):
    rng = np.random.default_rng(0)
    content = {}
    for part, n in (("train", 24), ("test", 12)):
        labels = np.arange(n) % 3
        content |= {
            f"{part}/labels": labels,
            f"{part}/photo": rng.integers(256, size=(n, 3, 9, 12), dtype=np.uint8),
            f"{part}/sound": rng.normal(size=(n, 7)).astype(np.float32) + labels[:, None],
            f"{part}/word": rng.integers(5, size=(n, 4)),
        }
    return {key: a for key, a in (content | changed).items() if a is not None}


def test_a_files_arrays_become_modalities(tmp_path):
    path = tmp_path / "own.npz"
    np.savez(path, **arrays())
    data = datasets.load(options(tmp_path, dataset=str(path)))
    kinds = {m.name: (m.likelihood, m.shape, m.categories) for m in data.modalities}
    assert kinds == {
        "photo": ("laplace", (3, 9, 12), 0),
        "sound": ("normal", (7,), 0),
        "word": ("categorical", (4,), 5),
    }
    assert len(data.train) == 24 and len(data.test) == 12
    big = {key: a.astype(a.dtype.newbyteorder(">")) for key, a in arrays().items()}
    np.savez(path, **big)
    assert datasets.load(options(tmp_path, dataset=str(path))).modalities == data.modalities


def test_a_file_is_known_by_its_content(tmp_path):
    def source(path, **changed):
        np.savez(path, **arrays(**changed))
        return datasets.load(options(tmp_path, dataset=str(path))).source

    first, path = source(tmp_path / "own.npz"), tmp_path / "there" / "own.npz"
    path.parent.mkdir()
    assert first.startswith("own.npz, ") and source(path) == first
    assert source(path, **{"test/labels": np.zeros(12, int)}) != first


@pytest.mark.parametrize(
    "changed, match",
    [
        ({"train/labels": None}, "must hold train/NAME and test/NAME of two modalities, train/la"),
        (
            dict.fromkeys(["train/sound", "train/word", "test/sound", "test/word"]),
            "must hold train/NAME and test/NAME of two modalities",
        ),
        ({"test/sound": None}, "test has .'photo', 'word'., not the modalities' names"),
        ({"test/word": np.zeros((12, 5), int)}, r"test/word is \(12, 5\), must be \(12, 4\)"),
        ({"train/sound": np.zeros((23, 7))}, r"train/sound is \(23, 7\), must be \(24, 7\)"),
        ({"train/word": np.full((24, 4), -1)}, "train/word must lie in 0 … 4"),
        ({"train/labels": np.full(24, 10**9)}, "one whole number from 0 to 65535"),
        ({"train/labels": np.full(24, 0.5)}, "labels must be one whole number from"),
        ({"test/labels": np.full(12, -1)}, "labels must be one whole number from"),
        ({"test/labels": np.zeros(0, int)}, "test has 0 tuples, must have at least 2"),
        ({"train/sound": np.full((24, 7), "a")}, "train/sound is <U1, must be numbers"),
        ({"train/a-b": np.zeros((24, 1)), "test/a-b": np.zeros((12, 1))}, "letters, digits and"),
        ({"test/word": np.zeros((12, 4))}, "train/word and test/word differ in type"),
        ({"train/sound": np.zeros(24), "test/sound": np.zeros(12)}, r"must be \(N, …\)"),
        (
            {f"{p}/photo": np.zeros((n, 9, 12, 3)) for p, n in (("train", 24), ("test", 12))},
            r"train/photo is \(24, 9, 12, 3\), images must be \(N, 1 or 3, height, width\)",
        ),
        (
            {f"{p}/photo": np.zeros((n, 9, 9), np.uint8) for p, n in (("train", 24), ("test", 12))},
            r"train/photo is \(24, 9, 9\), images must be \(N, 1 or 3, height, width\)",
        ),
        ({"test/sound": np.full((12, 7), np.nan)}, "test/sound has values that are not finite"),
        ({"train/word": np.full((24, 4), 2**40)}, f"word has {2**40}, categories end at 65535"),
    ],
)
def test_faults_of_a_file_are_named(tmp_path, changed, match):
    path = tmp_path / "own.npz"
    np.savez(path, **arrays(**changed))
    with pytest.raises(UserError, match=match):
        datasets.load(options(tmp_path, dataset=str(path)))


def test_a_file_that_is_none_is_named(tmp_path):
    for content in (None, b"", b"some text", b"PK" + bytes(50), bytes(range(256))):
        path = tmp_path / "own.npz"
        if content is not None:
            path.write_bytes(content)
        said = "there is no such file" if content is None else "is no .npz file of arrays"
        with pytest.raises(UserError, match=f"own.npz: {said}$"):
            datasets.load(options(tmp_path, dataset=str(path)))
    np.savez(path, **{"train/x": np.array([{}])})  # a pickle, which is never loaded
    with pytest.raises(UserError, match=r"is no .npz file of arrays"):
        datasets.load(options(tmp_path, dataset=str(path)))
    np.save(tmp_path / "one.npy", np.zeros(3))
    (tmp_path / "one.npy").rename(path)
    with pytest.raises(UserError, match=r"is no .npz file of arrays"):
        datasets.load(options(tmp_path, dataset=str(path)))


# ----------------------------------------------------------------------------- incomplete data


def gaps(n, M, keep, seed=0):
    tensors = {f"x{i}": torch.arange(n)[:, None] for i in range(M)}
    split = datasets.Split(tensors, torch.zeros(n), dict.fromkeys(tensors, torch.arange(n)))
    return datasets.with_gaps(split, keep, seed)


@pytest.mark.parametrize("keep", [0.001, 0.3, 0.9])
def test_each_modality_is_kept_with_its_probability(keep):
    n, M = 20_000, 4
    kept = gaps(n, M, keep).observed
    for found, share in (
        (kept.double().mean(0), keep),
        (kept.all(1).double().mean(), keep**M),  # independently of one another
        ((~kept).all(1).double().mean(), (1 - keep) ** M),
    ):
        assert (found - share).abs().max() < 4 * (share * (1 - share) / n) ** 0.5 + 1 / n
    assert kept.equal(gaps(n, M, keep).observed)
    assert not kept.equal(gaps(n, M, keep, seed=1).observed)


def test_an_example_of_which_nothing_is_kept_does_not_train():
    split = gaps(400, 3, 0.2)
    some = split.observed.any(1)
    assert 0 < some.sum() < 300
    order = datasets.epoch_order(split, 10, seed=0)
    assert len(order) == some.sum() // 10
    assert some[order].all() and len(order.unique()) == order.numel()
    with pytest.raises(UserError, match=f"must be at most {some.sum()}, the training tuples"):
        datasets.epoch_order(split, 400, seed=0)
    with pytest.raises(UserError, match="--keep 0.0: leaves nothing to train on"):
        gaps(400, 3, 0.0)


def test_a_batch_has_the_mask_of_its_rows():
    split = gaps(50, 3, 0.5)
    rows = torch.tensor([4, 7, 4])
    assert split.batch(rows)[1].equal(split.observed[rows])


def test_streams_of_incomplete_data_are_what_is_there():
    split = datasets.with_streams(gaps(400, 3, 0.6), 0.5, 0)
    whole, *single = split.streams
    assert split.observed[whole].all() and 0 < len(whole) < 200
    for i, rows in enumerate(single):
        assert rows.equal(split.observed[:, i].nonzero()[:, 0])
    order = datasets.epoch_order(split, 50, 0)
    assert order.shape == (8, 200)
    for stream, rows in zip(split.streams, order.split(50, 1), strict=True):
        assert set(rows.flatten().tolist()) == set(stream.tolist())


# -------------------------------------------------------------------------- training on each


@pytest.fixture(scope="module")
def small_files(tmp_path_factory):
    """A data folder with every data set in small, in the official formats."""
    folder = tmp_path_factory.mktemp("data")
    make_mnist(folder)
    make_mnist(folder, name="FashionMNIST")
    make_svhn(folder)
    make_celeba(folder, size=(64, 64))
    make_cub(folder)
    np.savez(folder / "own.npz", **arrays())
    return folder


NAMES = [name for name in datasets.LOADERS if name != "polydigits"]
SOME = ["mnist-label", "mnist-split-3", "mnist-svhn-text"]  # these with every method


@pytest.mark.parametrize(
    "script, name",
    [("mopoe", name) for name in [*NAMES, "own.npz"]]
    + [(script, name) for script in ("mmvae", "mvae", "svae", "vaevae") for name in SOME],
)
def test_an_epoch_on_every_data_set(small_files, tmp_path, script, name):
    dataset = str(small_files / name) if name.endswith(".npz") else name
    argv = f"--dataset {dataset} --data-dir {small_files} --cache-dir {tmp_path} --no-eval"
    argv += f" --runs-dir {tmp_path} --epochs 1 --latent-dim 4 --pairings 1"
    argv += f" --batch-size {500 if 'digits' in name else 10}"
    importlib.import_module(script).main([*argv.split(), *(["--K", "2"] * (script == "mmvae"))])
    (run,) = tmp_path.glob(f"{Path(name).stem}__{script}__0__*")
    model, modalities, args = evaluate.load_run(run)
    data = datasets.load(args)
    assert modalities == data.modalities
    if name == "mnist-svhn-text":
        evaluate.draw_samples(run / "samples", model, data)
        assert (run / "samples" / "from_text.png").is_file()
