"""Every data set, as tensors ready to sit on the device.

`load` returns a `Data`: two `Split`s, the modalities, and one sentence on where the data came from.
A split stays as it was read (uint8 images, integer tokens, float features); a batch is an index
into it, converted to float on the device. Own data are one more entry in LOADERS.
"""

import dataclasses
import hashlib
import io
import json
import math
import struct
import urllib.error
import urllib.request
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image, UnidentifiedImageError
from sklearn.datasets import load_digits, load_sample_images
from sklearn.model_selection import train_test_split

from common import Modality, UserError, replace


@dataclass(frozen=True)
class Split:
    """Tuples of all modalities: tensors[name] (n, *shape), labels (N,), and for each modality the
    row of tensors[name] that belongs to each tuple, index[name] (N,). Where there are streams (see
    `with_streams`), a batch is an equal number of rows of each."""

    tensors: dict[str, torch.Tensor]
    labels: torch.Tensor
    index: dict[str, torch.Tensor]
    streams: tuple[torch.Tensor, ...] = ()

    def __len__(self):
        return len(self.labels)

    def to(self, device):
        tensors = {name: t.to(device) for name, t in self.tensors.items()}
        index = {name: t.to(device) for name, t in self.index.items()}
        return Split(tensors, self.labels.to(device), index, self.streams)

    def fingerprint(self, name):
        """A hash of one modality's data and the labels, for what is cached of them."""
        parts = self.tensors[name], self.index[name], self.labels
        digest = hashlib.blake2b(digest_size=16)
        for t in parts:
            digest.update(t.cpu().contiguous().numpy())
        return digest.hexdigest()

    def batch(self, rows):
        """The tuples `rows` (B,) as (x, observed): x[name] (B, *shape), images in [0, 1]; observed
        is None, or with streams a (B, M) mask, the modalities in the order of `tensors`."""
        x = {name: t[self.index[name][rows]] for name, t in self.tensors.items()}
        x = {name: t.float() / 255 if t.dtype == torch.uint8 else t for name, t in x.items()}
        if not self.streams:
            return x, None
        one = torch.eye(len(x), dtype=torch.bool, device=rows.device)
        observed = torch.cat([torch.ones_like(one[:1]), one])  # of each stream
        return x, observed.repeat_interleave(len(rows) // len(observed), 0)


@dataclass(frozen=True)
class Data:
    train: Split
    test: Split
    modalities: list[Modality]
    source: str


def from_tensors(train, test, modalities, source="tensors"):
    """Data from two pairs (tensors, labels): a dict of tensors (N, *shape), one row a tuple, and
    integer labels (N,) from 0 on. Raises UserError where they do not fit the modalities."""
    splits = []
    for part, (tensors, labels) in (("train", train), ("test", test)):
        labels = torch.as_tensor(labels).long()
        if tensors.keys() != {m.name for m in modalities}:
            raise UserError(f"{source}: {part} has {sorted(tensors)}, not the modalities' names")
        tensors = {m.name: torch.as_tensor(tensors[m.name]).contiguous() for m in modalities}
        for m in modalities:
            t, expected = tensors[m.name], (len(labels), *m.shape)
            if tuple(t.shape) != expected:
                raise UserError(
                    f"{source}: {part}/{m.name} is {tuple(t.shape)}, must be {expected}"
                )
            if m.likelihood == "categorical":
                tensors[m.name] = t = t.long()
                if t.min() < 0 or t.max() >= m.categories:
                    raise UserError(f"{source}: {part}/{m.name} must lie in 0 … {m.categories - 1}")
            elif t.dtype != torch.uint8:
                tensors[m.name] = t.float()
        index = dict.fromkeys(tensors, torch.arange(len(labels)))
        splits.append(Split(tensors, labels, index))
    return Data(*splits, list(modalities), source)


def load(args):
    """The Data that the options dataset, data_dir, cache_dir, data_seed, backgrounds and download
    name. Raises UserError in one line where something is missing or damaged."""
    return LOADERS[args.dataset](args)


def with_streams(split, supervision, seed):
    """The split as the streams of weak supervision (Kutuzova et al. 2021, Algorithm 1): one of
    complete tuples, a share `supervision` of all, chosen by the seed, and for each modality one of
    all its examples, of which the other modalities count as missing."""
    chosen = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))
    complete = chosen[: round(supervision * len(split))]
    if not len(complete):
        raise UserError(f"--supervision {supervision}: leaves none of {len(split)} tuples complete")
    single = [torch.arange(len(split))] * len(split.tensors)
    return dataclasses.replace(split, streams=(complete, *single))


def epoch_order(split, batch_size, seed):
    """Rows (steps, batch_size) of one pass in random order, without the trailing partial batch.

    With streams (steps, (1 + M) batch_size): batch_size complete tuples, then as many of each
    modality; an epoch is one pass of the modalities' streams, and that of the complete tuples, if
    shorter, begins again when it ends.
    """
    n, generator = len(split), torch.Generator().manual_seed(seed)
    if batch_size > n:
        raise UserError(f"--batch-size {batch_size}: must be at most {n}, the training tuples")
    order = []
    for rows in split.streams or [torch.arange(n)]:
        passes = [
            rows[torch.randperm(len(rows), generator=generator)]
            for _ in range(math.ceil(n / len(rows)))
        ]
        order.append(torch.cat(passes)[: n - n % batch_size].view(-1, batch_size))
    return torch.cat(order, 1)


def cached(cache_dir, name, key, build):
    """build(), a dict of tensors, kept in a file of cache_dir under all that it depends on (key).

    The file is written under another name and renamed, so a file that is there is whole, and two
    builders of it both succeed.
    """
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    path = Path(cache_dir) / f"{name}-{digest}.pt"
    if path.is_file():
        try:
            return torch.load(path, weights_only=True)
        except (RuntimeError, EOFError) as error:
            raise UserError(f"{path}: is damaged ({error}); delete it to build it anew") from None
    content = build()
    buffer = io.BytesIO()
    torch.save(content, buffer)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace(path, buffer.getbuffer())
    return content


# ------------------------------------------------------------- digits on coloured backgrounds


def sample_backgrounds():
    """Five pictures (H, W, 3) in uint8 that look nothing alike: scikit-learn's two photographs, and
    bright waves, dark discs and red clouds made from a fixed seed. The generated ones stay clear
    of middle grey, on which an inverted digit cannot be seen."""
    rng = np.random.default_rng(2021)
    size = 256
    row, column = np.mgrid[:size, :size] / size
    phase = 60 * column + 8 * np.sin(9 * row) + 5 * np.sin(14 * (row + column))
    waves = 0.78 + 0.2 * np.sin(phase[..., None] + np.array([0.0, 0.9, 2.6]))

    discs = np.full((size, size, 3), 0.05)
    for _ in range(260):
        center, radius, color = (
            rng.uniform(0, 1, 2),
            rng.uniform(0.01, 0.05),
            rng.uniform(0, 0.5, 3),
        )
        discs[(row - center[0]) ** 2 + (column - center[1]) ** 2 < radius**2] = color

    clouds = np.zeros((size, size, 3))
    for octave in range(2, 7):
        cells = rng.uniform(0, 255, (2**octave, 2**octave, 3)).astype(np.uint8)
        smooth = Image.fromarray(cells).resize((size, size), Image.Resampling.BICUBIC)
        clouds += np.asarray(smooth) / 255 / 2 ** (octave - 1)
    clouds = (clouds - clouds.min()) / (clouds.max() - clouds.min()) * [0.5, 0.15, 0.35]

    china, flower = load_sample_images().images
    return [china, flower] + [(255 * image).astype(np.uint8) for image in (waves, discs, clouds)]


def folder_backgrounds(folder, size):
    """The pictures of a folder by name, (H, W, 3) uint8 each; one modality a picture."""
    try:
        files = sorted(p for p in Path(folder).iterdir() if not p.name.startswith("."))
    except OSError as error:
        raise UserError(f"--backgrounds {folder}: {error.strerror}") from None
    if not 2 <= len(files) <= 10:
        raise UserError(f"--backgrounds {folder}: must hold 2 to 10 pictures, has {len(files)}")
    pictures = []
    for file in files:
        try:
            pictures.append(np.asarray(Image.open(file).convert("RGB")))
        except (UnidentifiedImageError, OSError):
            raise UserError(f"--backgrounds: {file} is not a picture") from None
        if min(pictures[-1].shape[:2]) < size:
            raise UserError(f"--backgrounds: {file} is smaller than {size}×{size} pixels")
    return pictures


def on_background(digits, background, rng):
    """Boolean digits (N, h, w) as inverted pixels of random crops of a background (H, W, 3), each
    crop of the digit's size; (N, 3, h, w) uint8 (Sutter et al. 2021, App. D.1)."""
    windows = np.lib.stride_tricks.sliding_window_view(background, digits.shape[1:], axis=(0, 1))
    top = rng.integers(windows.shape[0], size=len(digits))
    left = rng.integers(windows.shape[1], size=len(digits))
    crops = windows[top, left]
    return np.where(digits[:, None], 255 - crops, crops)


def poly_tuples(digits, labels, backgrounds, copies, rng):
    """Tuples of one picture per background, all of one digit: each modality shows every image of
    `digits` (N, h, w) `copies` times, paired at random within a digit. Returns tensors, labels."""
    labels = np.tile(labels, copies)
    tensors = {}
    for m, background in enumerate(backgrounds):
        drawn = np.empty(len(labels), dtype=np.int64)
        for digit in range(10):
            rows = np.flatnonzero(labels == digit)
            drawn[rows] = rng.permutation(rows)
        tensors[f"m{m}"] = on_background(digits[drawn % len(digits)], background, rng)
    return tensors, labels


def poly_data(parts, backgrounds, seed, source):
    """Data from the training and the test part (digits, labels, copies), no digit in both."""
    splits = [
        poly_tuples(digits, labels, backgrounds, copies, np.random.default_rng((seed, part)))
        for part, (digits, labels, copies) in enumerate(parts)
    ]
    shape = (3, *parts[0][0].shape[1:])
    modalities = [Modality(f"m{m}", shape) for m in range(len(backgrounds))]
    return from_tensors(*splits, modalities, source)


def polydigits(args):
    """PolyMNIST in small, with no download: scikit-learn's digits of 8×8 pixels, enlarged to 16×16,
    on five backgrounds. 300 digits test, on two crops each, the others train, on four."""
    images, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(images).view(-1, 1, 8, 8)
    large = torch.nn.functional.interpolate(images, size=(16, 16), mode="bilinear")
    digits = large[:, 0].numpy() > 6
    # A few digits are alike once they are black and white; each shape is kept once, so that none
    # is in both splits.
    once = np.sort(np.unique(digits.reshape(len(digits), -1), axis=0, return_index=True)[1])
    digits, labels = digits[once], labels[once]
    fixed = np.random.RandomState(0)
    parts = train_test_split(digits, labels, test_size=300, stratify=labels, random_state=fixed)
    train, test, train_labels, test_labels = parts
    source = "scikit-learn's digits on scikit-learn's photographs and generated backgrounds"
    parts = ((train, train_labels, 4), (test, test_labels, 2))
    return poly_data(parts, sample_backgrounds(), args.data_seed, source)


def polymnist(args):
    """PolyMNIST (Sutter et al. 2021, App. D.1): the authors' images where the data folder has them,
    else made in the same way from MNIST."""
    root = Path(args.data_dir)
    if args.download:
        download_polymnist(root)
    for place in (root / "PolyMNIST", root / "MMNIST", root / "PolyMNIST.zip"):
        if place.exists() and not args.backgrounds:
            return authors_polymnist(place, args.cache_dir)
    if args.backgrounds:
        backgrounds = folder_backgrounds(args.backgrounds, 28)
        source = f"MNIST on the {len(backgrounds)} pictures of {args.backgrounds}"
    else:
        backgrounds = sample_backgrounds()
        source = "MNIST on scikit-learn's photographs and generated backgrounds"
    parts = [(images > 128, labels, 1) for images, labels in mnist(root, "MNIST")]
    return poly_data(parts, backgrounds, args.data_seed, source)


def authors_polymnist(place, cache_dir):
    """The authors' PolyMNIST, a folder or its zip with train/m0 … m4/<index>.<digit>.png inside and
    test likewise; the zip is read where it lies. Decoded once, then cached."""
    if place.is_dir():
        names = sorted(p.relative_to(place).as_posix() for p in place.rglob("*.png"))

        def read(name):
            return (place / name).read_bytes()

    else:
        try:
            archive = zipfile.ZipFile(place)
        except zipfile.BadZipFile:
            raise UserError(f"{place}: is not a zip file") from None
        names = sorted(n for n in archive.namelist() if n.endswith(".png"))
        read = archive.read
    found = {}  # (part, modality) -> {(index, digit): name}
    for name in names:
        *_, part, modality, file = ("", "", *name.split("/"))
        try:
            index, digit, _ = file.split(".")
            found.setdefault((part, modality), {})[int(index), int(digit)] = name
        except ValueError:
            raise UserError(f"{place}: {name} is not named <index>.<digit>.png") from None
    expected = [(part, f"m{m}") for part in ("train", "test") for m in range(5)]
    for part, modality in expected:
        if (part, modality) not in found:
            raise UserError(f"{place}: has no {part}/{modality}/<index>.<digit>.png")
        if found[part, modality].keys() != found[part, "m0"].keys():
            raise UserError(f"{place}: {part}/{modality} and {part}/m0 hold different tuples")

    def picture(name):
        try:
            pixels = np.asarray(Image.open(io.BytesIO(read(name))).convert("RGB"))
        except (UnidentifiedImageError, OSError, zipfile.BadZipFile):
            raise UserError(f"{place}: {name} is damaged") from None
        if pixels.shape != (28, 28, 3):
            raise UserError(f"{place}: {name} is {pixels.shape[:2]}, must be 28×28")
        return pixels.transpose(2, 0, 1)

    def decode():
        content = {}
        for part, modality in expected:
            tuples = sorted(found[part, modality].items())
            stack = np.stack([picture(name) for _, name in tuples])
            content[f"{part}/{modality}"] = torch.from_numpy(stack)
            content[f"{part}/labels"] = torch.tensor([digit for (_, digit), _ in tuples])
        return content

    status = place.stat()
    key = [str(place.resolve()), status.st_size, status.st_mtime, len(names)]
    content = cached(cache_dir, "polymnist", key, decode)
    splits = [
        ({f"m{m}": content[f"{part}/m{m}"] for m in range(5)}, content[f"{part}/labels"])
        for part in ("train", "test")
    ]
    modalities = [Modality(f"m{m}", (3, 28, 28)) for m in range(5)]
    return from_tensors(*splits, modalities, f"the authors' PolyMNIST ({place.name})")


ZENODO_RECORD = "https://zenodo.org/api/records/4899160"


def download_polymnist(root):
    """Fetch PolyMNIST.zip of the Zenodo record into root, checked against the record's own MD5."""
    target = root / "PolyMNIST.zip"
    if target.exists():
        return
    try:
        with urllib.request.urlopen(ZENODO_RECORD, timeout=60) as reply:
            files = json.load(reply)["files"]
        entry = next(file for file in files if file["key"].endswith(".zip"))
        md5, temporary = hashlib.md5(), target.with_name(".PolyMNIST.zip.part")
        root.mkdir(parents=True, exist_ok=True)
        try:
            with (
                urllib.request.urlopen(entry["links"]["self"], timeout=60) as reply,
                open(temporary, "wb") as file,
            ):
                while block := reply.read(1 << 20):
                    md5.update(block)
                    file.write(block)
            if f"md5:{md5.hexdigest()}" != entry["checksum"]:
                raise UserError(f"--download: {target.name} differs from its checksum, discarded")
            temporary.rename(target)
        finally:
            temporary.unlink(missing_ok=True)
    except (urllib.error.URLError, TimeoutError, KeyError, StopIteration) as error:
        raise UserError(
            f"--download: {ZENODO_RECORD} cannot be read ({error}); put PolyMNIST.zip into {root} "
            "by hand, or leave --download out"
        ) from None


# --------------------------------------------------------------------------------------- MNIST


def mnist(root, name):
    """((train images, labels), (test images, labels)) of MNIST or FashionMNIST as uint8 and int64
    arrays; downloaded by torchvision, which checks the MD5 sums, where the files are absent."""
    dataset = getattr(torchvision.datasets, name)
    raw = root / name / "raw"
    if not raw.is_dir():
        try:
            dataset(root, download=True)
        except (RuntimeError, OSError):
            raise UserError(
                f"--data-dir {root}: {name} is not there and cannot be downloaded; put its four "
                f"idx files into {raw}, or try --dataset polydigits, which needs no files"
            ) from None
    parts = []
    for part, train in (("train", True), ("t10k", False)):
        images = read_idx_header(raw / f"{part}-images-idx3-ubyte", 2051)
        labels = read_idx_header(raw / f"{part}-labels-idx1-ubyte", 2049)
        if images[1:] != (28, 28) or images[0] != labels[0]:
            raise UserError(f"{raw}: {part} has images of {images} for {labels} labels")
        split = dataset(root, train=train)
        if split.targets.max() > 9:
            raise UserError(f"{raw}/{part}-labels-idx1-ubyte: has a label above 9")
        parts.append((split.data.numpy(), split.targets.numpy()))
    return parts


def read_idx_header(path, magic):
    """The dimensions of an uncompressed idx file of bytes, checked against its length."""
    try:
        with open(path, "rb") as file:
            header = file.read(4 * (1 + magic % 256))
        found, *dimensions = struct.unpack(f">{len(header) // 4}i", header)
        if found != magic:
            raise UserError(f"{path}: begins with {found}, must begin with {magic}")
        expected = len(header) + int(np.prod(dimensions))
        if path.stat().st_size != expected:
            raise UserError(f"{path}: has {path.stat().st_size} bytes, its header says {expected}")
    except (struct.error, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: has no idx header") from None
    return tuple(dimensions)


# Own data are one more entry: a function of the options that returns a Data.
LOADERS = {"polydigits": polydigits, "polymnist": polymnist}
