"""The evaluation: which subsets, what the oracle sees, what tables and figures show."""

import contextlib
import dataclasses
import importlib
import inspect
import itertools
import json
import re
import subprocess
import sys
from operator import itemgetter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import ROOT
from exact import SCALE, log_p, modalities, sample_x, set_decoders, set_exact_experts
from torch import nn
from torch.distributions import (
    Categorical,
    Independent,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    OneHotCategorical,
)

import datasets
import evaluate
from common import Modality, UserError, likelihood
from mmvae import MMVAE
from mopoe import MoPoE
from mvae import MVAE
from svae import SVAE
from vaevae import VAEVAE


def vectors(M):
    return [Modality(f"x{i}", (2,), "normal", network="linear") for i in range(M)]


def test_all_subsets_of_up_to_eight_modalities_else_the_small_and_the_large():
    assert evaluate.subsets_of(vectors(2)) == [["x0"], ["x1"], ["x0", "x1"]]
    assert len(evaluate.subsets_of(vectors(8))) == 255
    names = [m.name for m in vectors(9)]
    found = evaluate.subsets_of(vectors(9))
    assert [len(subset) for subset in found] == [1] * 9 + [8] * 9 + [9]
    assert len({tuple(subset) for subset in found}) == 19 and found[-1] == names
    assert [set(names) - set(subset) for subset in found[9:18]] == [{name} for name in names]


def test_more_subsets_than_fit_are_refused():
    assert len(MoPoE(vectors(10), 2).masks) == 1023
    with pytest.raises(UserError, match="--subsets all: 11 modalities have 2,047 subsets"):
        MoPoE(vectors(11), 2)
    assert len(MoPoE(vectors(11), 2, subsets="singletons").masks) == 11


class Copy:
    """A model by hand: z is the pixels of the halves, and 0 for those that are not given."""

    def __init__(self, modalities):
        self.modalities = modalities

    def prior(self):
        return Independent(Normal(torch.zeros(64), torch.ones(64)), 1)

    def posterior(self, x):
        given = next(iter(x.values()))
        z = torch.cat(
            [x.get(m.name, torch.zeros_like(given)).flatten(1) for m in self.modalities], 1
        )
        return Independent(Normal(z, torch.zeros_like(z), validate_args=False), 1)

    def decode(self, z, names=None):
        halves = z.unflatten(-1, (2, 1, 4, 8)).unbind(-4)
        return {
            m.name: Independent(Normal(half, torch.ones_like(half)), 3)
            for m, half in zip(self.modalities, halves, strict=True)
        }


def test_the_oracle_names_the_image_that_its_halves_make_up(monkeypatch, tmp_path):
    data = datasets.digits_split(None)
    assert data.strips
    parts = data.train, data.test, data.modalities
    monkeypatch.setattr(evaluate.train_classifier, "__defaults__", (120, 64))
    results = evaluate.class_metrics(Copy(data.modalities), *parts[:2], True, tmp_path)
    named, accuracy = evaluate.classifiers(*parts, True, tmp_path)  # from the cache
    assert len(list(tmp_path.iterdir())) == 3
    assert accuracy["whole"] > 0.8  # 0.89 to 0.93 over four seeds; chance is 0.1
    assert accuracy == {n: results[f"classifier_accuracy/{n}"] for n in ("top", "bottom", "whole")}
    assert results["oracle_accuracy/top+bottom"] == pytest.approx(accuracy["whole"])
    images, labels = datasets.small_digits()[1]
    images = torch.from_numpy(images[:, None]) / 255
    images[:, :, 4:] = 0
    with torch.no_grad():
        classes = named["whole"]({"image": images}).argmax(-1)
    by_hand = (classes == torch.from_numpy(labels)).double().mean().item()
    assert results["oracle_accuracy/top"] == pytest.approx(by_hand) != accuracy["whole"]
    assert "coherence/top/whole" not in results
    shown = evaluate.numbers(results)["class of the whole image, by the oracle, %"]
    assert shown["top"] == pytest.approx(100 * by_hand)


def test_classifiers_learn_from_images_moved_by_up_to_a_pixel():
    image = torch.arange(64.0).view(1, 8, 8)
    part = {"image": image.repeat(4, 1, 1, 1)}, torch.zeros(4)
    data = datasets.from_tensors(part, part, [Modality("image", (1, 8, 8), network="linear")])
    net, seen = nn.Sequential(nn.Flatten(), nn.Linear(64, 2)), set()
    net[0].register_forward_pre_hook(lambda _, x: seen.add(x[0][0, 0, 3, 3].item()))
    evaluate.train_classifier(net, itemgetter("image"), data.train, steps=200, batch_size=2)
    assert seen == {
        image[0, 3 + down, 3 + right].item() for down in (-1, 0, 1) for right in (-1, 0, 1)
    }


def test_attributes_have_average_precisions(tmp_path, monkeypatch):
    """Those of labels (N, A)."""
    monkeypatch.setattr(evaluate.train_classifier, "__defaults__", (2000, 64))
    torch.manual_seed(0)
    parts = []
    for n in (600, 200):
        labels = torch.randint(2, (n, 3))
        labels[:, 2] = 0  # nobody has it
        x0 = 8.0 * labels[:, :2] - 4 + 0.1 * torch.randn(n, 2)
        parts.append(({"x0": x0, "x1": torch.randn(n, 2)}, labels))
    data = datasets.from_tensors(*parts, vectors(2))
    model = MoPoE(data.modalities, 2)
    args = SimpleNamespace(amp=False, cache_dir=tmp_path)
    results = evaluate.evaluate(model, data, args)
    assert not any("accuracy" in key or "coherence" in key for key in results)
    assert results["classifier_precision/x0"] > 0.95
    assert results["latent_precision/x0"] > 0.9
    assert 0.4 < results["latent_precision/x1"] < 0.65
    assert {"precision/x0/x1", "precision_by_inputs/1/without_inputs"} <= results.keys()
    shown = evaluate.numbers(results)
    assert list(shown["mean average precision from a subset to a target, %"]) == [
        "x0 → x1",
        "x1 → x0",
    ]
    assert "latent accuracy, %" not in shown and evaluate.CLASSIFIERS not in shown
    single = [dataclasses.replace(data.modalities[0], shape=(1,)), data.modalities[1]]
    assert list(evaluate.classifiers(data.train, data.test, single, False, tmp_path)[1]) == ["x1"]
    x, labels = evaluate.examples(data.test, 12)
    assert labels.shape == (12, 3)
    assert [t.shape for t in x.values()] == [(12, 2)] * 2


def test_agreement_with_attributes_is_their_mean_average_precision():
    labels = torch.tensor([[1, 0, 0], [0, 1, 0], [1, 1, 0], [0, 0, 0]])
    logits = torch.tensor([[3.0, 0, 1], [2, 1, 1], [1, 2, 1], [0, -1, 1]])
    # By rank 1 and 3 of the first; 1 and 2 of the second; the third is nowhere and does not count.
    assert evaluate.agreement(logits, labels) == pytest.approx(((1 + 2 / 3) / 2 + 1) / 2)


class Spelled:
    """A model by hand that generates the same text and marks whatever is given."""

    def __init__(self, text, marks):
        kinds = dict(likelihood="categorical", categories=5, network="mlp")
        self.modalities = [
            *vectors(1),
            Modality("text", (4,), padding=4, **kinds),
            Modality("label", (), **kinds),
            Modality("marks", (2,), "bernoulli", network="mlp"),
        ]
        label = torch.full((len(text),), 3)
        self.made = {"text": text, "label": label, "marks": marks}

    def posterior(self, x):
        zeros = torch.zeros(len(next(iter(x.values()))), 1)
        return Independent(Normal(zeros, 1.0), 1)

    def decode(self, z, names=None):
        found = {}
        for m in self.modalities:
            if m.name in names:
                t = self.made[m.name][: len(z)]
                t = t * 8.0 - 4 if m.name == "marks" else 9.0 * F.one_hot(t, 5)
                found[m.name] = likelihood(m, t)
        return found


@pytest.mark.parametrize("n", [5, 12, 77, 100, 200])
def test_examples_are_of_all_classes_evenly(n):
    labels = torch.arange(100) % 5
    split = datasets.Split({"x0": labels}, labels, {"x0": torch.arange(100)})
    x, shown = evaluate.examples(split, n)
    assert x["x0"].equal(shown) and len(shown) == min(n, 100)
    counts = shown.bincount(minlength=5)
    assert counts.max() - counts.min() <= 1


class Birds:
    """By hand: z is a class of eight, as a one-hot vector; pictures are the class's features, and
    captions have its words, or those of any class."""

    def __init__(self, any_class=False):
        words = ("<exc>", "<pad>", "<eos>", *(f"word{i}" for i in range(40)))
        kind = dict(categories=len(words), alphabet=words, padding=1, network="cub-caption")
        self.modalities = [
            Modality("image", (20,), "normal", network="linear"),
            Modality("caption", (32,), "categorical", **kind),
        ]
        self.any_class = any_class
        generator = torch.Generator().manual_seed(0)
        self.features = torch.randn(8, 20, generator=generator)

    def show(self, k, noise=0.1):
        """Features and captions of the classes k: three of four words of its own, and others."""
        image = self.features[k] + noise * torch.randn(len(k), 20)
        if self.any_class:
            k = torch.randint(8, (len(k),))
        own = 3 + 4 * k[:, None] + torch.rand(len(k), 4).argsort(1)[:, :3]
        text = torch.cat([own, torch.randint(35, 43, (len(k), 2)), torch.full_like(own, 2)], 1)
        return {"image": image, "caption": F.pad(text, (0, 24), value=1)}

    def prior(self):
        return OneHotCategorical(torch.full((8,), 1 / 8))

    def posterior(self, x):
        if "image" in x:
            k = (x["image"][:, None] - self.features).square().sum(-1).argmin(1)
        else:
            k = (x["caption"][:, 0] - 3) // 4
        return Independent(Normal(F.one_hot(k, 8).float(), 1e-6), 1)

    def decode(self, z, names=None):
        x = self.show(z.argmax(-1))
        behind = x["caption"] == 1  # never scored, so a trained decoder has any word there
        x["caption"] = torch.where(behind, torch.randint(43, behind.shape), x["caption"])
        x["caption"] = 9.0 * F.one_hot(x["caption"], 43)
        return {m.name: likelihood(m, x[m.name]) for m in self.modalities}


def test_pictures_and_captions_correlate_where_they_belong_together():
    torch.manual_seed(0)
    parts = [(Birds().show(torch.arange(n) % 8), torch.zeros(n)) for n in (1600, 400)]
    data = datasets.from_tensors(*parts, Birds().modalities)
    model, given = Birds(), []
    posterior = model.posterior
    model.posterior = lambda x: given.append([*x]) or posterior(x)
    found = evaluate.correlation(model, data.train, data.test)
    assert given == [["image"], ["caption"]] * 2  # for each of the two chunks
    keys = ["correlation/data", "correlation/joint", "correlation/image/caption"]
    assert set(found) == {*keys, "correlation/caption/image"}
    assert found["correlation/data"] > 0.3
    for value in found.values():
        assert value == pytest.approx(found["correlation/data"], abs=0.05)
    wrong = evaluate.correlation(Birds(any_class=True), data.train, data.test)
    assert wrong["correlation/data"] == found["correlation/data"]
    assert abs(wrong["correlation/joint"]) < 0.1 > abs(wrong["correlation/image/caption"])
    attributes = Modality("x", (2,), "bernoulli", network="mlp", alphabet=("male", "bald"))
    for others in (Told().modalities, [Modality("y", (3, 8, 8)), attributes]):
        assert evaluate.correlation(SimpleNamespace(modalities=others), None, None) == {}


def test_symbols_are_right_one_by_one_and_as_a_whole():
    text = torch.tensor([[0, 1, 2, 3], [0, 1, 4, 4], [1, 1, 1, 1]])
    marks = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    x = {"x0": torch.zeros(3, 2), "text": text.clone(), "label": torch.tensor([3, 3, 1])}
    x["text"][1, 0] = 3  # one of two is wrong, padding apart
    x["text"][2, 3] = 4  # a shorter text: what is generated behind it does not count
    x["marks"] = marks * torch.tensor([0.0, 1.0])
    split = datasets.Split(x, torch.zeros(3), dict.fromkeys(x, torch.arange(3)))
    model, given = Spelled(text, marks), []
    posterior = model.posterior
    model.posterior = lambda x: given.append([*x]) or posterior(x)
    found = evaluate.symbol_metrics(model, split)
    spelled = {"text", "label", "marks"}
    subsets = evaluate.subsets_of(model.modalities)
    assert given == [s for s in subsets if not spelled <= set(s)]  # never the target itself
    assert (
        found["exact_match/x0/text"] == found["exact_match/x0+label/text"] == pytest.approx(2 / 3)
    )
    assert found["symbol_accuracy/x0/text"] == pytest.approx((4 + 1 + 3) / (4 + 2 + 3))
    assert found["exact_match/x0/label"] == pytest.approx(2 / 3)
    assert found["exact_match/text/marks"] == pytest.approx(1 / 3)
    assert found["symbol_accuracy/text/marks"] == pytest.approx((1 + 1 + 2) / 6)
    assert {key.split("/")[1] for key in found if key.endswith("/text")} == {
        "+".join(s) for s in (["x0"], ["label"], ["marks"], ["x0", "label"], ["x0", "marks"])
    } | {"label+marks", "x0+label+marks"}
    assert not any(key.startswith("symbol_accuracy") for key in found if key.endswith("label"))


def test_blanks_are_no_symbols_that_count():
    """Of MultiMNIST's strings the digits, as in Wu & Goodman 2018, supplement, Table 5."""
    model = Spelled(torch.tensor([[1, 4, 4, 4], [2, 3, 4, 4], [4, 4, 4, 4]]), torch.zeros(3, 2))
    model.modalities[1] = dataclasses.replace(model.modalities[1], padding=None, alphabet="abcd ")
    truth = torch.tensor([[1, 2, 4, 4], [2, 3, 4, 4], [0, 4, 4, 4]])
    x = {"x0": torch.zeros(3, 2), "text": truth, "label": truth[:, 0], "marks": torch.zeros(3, 2)}
    split = datasets.Split(x, torch.zeros(3), dict.fromkeys(x, torch.arange(3)))
    found = evaluate.symbol_metrics(model, split)
    assert found["symbol_accuracy/x0/text"] == pytest.approx(3 / 5)
    assert found["exact_match/x0/text"] == pytest.approx(1 / 3)


def test_what_is_no_picture_is_shown_in_words():
    there, shown = torch.tensor([0.9, 0.2, 0.6]), evaluate.in_words
    attributes = Modality("a", (3,), "bernoulli", network="mlp", alphabet=("male", "bald", "young"))
    assert shown(attributes, there) == "male, young"
    assert shown(Modality("x", (3,), "normal", network="mlp"), there) == "0.90 0.20 0.60"
    kind = dict(likelihood="categorical", categories=12, network="mlp")
    assert shown(Modality("label", (), **kind), torch.tensor([11])) == "11"
    assert shown(Modality("t", (4,), alphabet="abc *", **kind), torch.tensor([4, 1, 0, 4])) == "ba"
    words = Modality("w", (3,), alphabet=("<pad>", "a", "bird"), padding=0, **kind)
    assert shown(words, torch.tensor([1, 2, 0])) == "a bird"
    words = Modality("w", (4,), alphabet=("<eos>", "<pad>", "a", "bird"), padding=1, **kind)
    assert shown(words, torch.tensor([2, 3, 0, 2])) == "a bird"


def test_without_classes_there_are_no_metrics_of_them(tmp_path):
    x = {"x0": torch.randn(20, 2), "x1": torch.randn(20, 2)}
    split = datasets.from_tensors((x, torch.zeros(20)), (x, torch.zeros(20)), vectors(2)).test
    assert evaluate.class_metrics(None, split, split, False, tmp_path) == {}


def test_classifiers_judge_in_float32(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate.train_classifier, "__defaults__", (2, 8))
    x, labels = {f"x{i}": torch.randn(20, 2) for i in range(2)}, torch.randint(2, (20, 3))
    data = datasets.from_tensors((x, labels), (x, labels), vectors(2))
    named, _ = evaluate.classifiers(data.train, data.test, data.modalities, False, tmp_path)
    with torch.autocast("cpu", torch.bfloat16):
        assert named["x0"](x).dtype == torch.float32


def small_data(M=2, sizes=(20, 20)):
    """Training and test data of M vectors and three classes."""
    parts = [({m.name: torch.randn(n, 2) for m in vectors(M)}, torch.arange(n) % 3) for n in sizes]
    return datasets.from_tensors(*parts, vectors(M))


def test_classifiers_learn_from_the_training_data_alone(tmp_path, monkeypatch):
    taught, data = [], small_data()

    def teach(net, seen, split):
        taught.append(split)
        return net.state_dict()

    monkeypatch.setattr(evaluate, "train_classifier", teach)
    evaluate.classifiers(data.train, data.test, data.modalities, False, tmp_path)
    assert len(taught) == 2 and all(split is data.train for split in taught)


def test_a_classifier_sees_its_own_modality_only(tmp_path, monkeypatch):
    taught, data = [], small_data()

    def teach(net, seen, split):
        taught.append((net, seen(split.tensors)))
        return {key: weights + len(taught) for key, weights in net.state_dict().items()}

    monkeypatch.setattr(evaluate, "train_classifier", teach)
    named, _ = evaluate.classifiers(data.train, data.test, data.modalities, False, tmp_path)
    x = data.test.tensors
    for (name, classify), (net, t) in zip(named.items(), taught, strict=True):
        assert t is data.train.tensors[name]
        assert classify(x).equal(net(x[name]))


def test_a_classifier_is_the_same_whatever_ran_before(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate.train_classifier, "__defaults__", (2, 8))
    data, found = small_data(), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        args = data.modalities, False, tmp_path / str(seed)
        named, _ = evaluate.classifiers(data.train, data.test, *args)
        found.append(named["x0"](data.test.tensors))
    assert found[0].equal(found[1])


def test_metrics_are_of_the_test_data(monkeypatch):
    """And what they learn from is the training data."""
    data, sizes = small_data(sizes=(5, 7)), {}

    def standing_in(name):
        def metric(model, *args):
            sizes[name] = [len(a) for a in args if isinstance(a, datasets.Split)]
            return {}

        return metric

    for name in ("class_metrics", "symbol_metrics", "correlation", "log_likelihood"):
        monkeypatch.setattr(evaluate, name, standing_in(name))
    args = SimpleNamespace(amp=False, cache_dir="")
    evaluate.evaluate(MoPoE(data.modalities, 2), data, args)
    assert sizes["class_metrics"] == sizes["correlation"] == [5, 7]
    assert sizes["symbol_metrics"] == sizes["log_likelihood"] == [7]


def test_pictures_are_of_the_test_data(tmp_path, monkeypatch):
    data, drawn, rows_from = small_data(sizes=(40, 30)), [], evaluate.rows_from

    def watched(model, x, modality):
        drawn.append(x)
        return rows_from(model, x, modality)

    monkeypatch.setattr(evaluate, "draw_grid", lambda *_, **__: None)
    monkeypatch.setattr(evaluate, "rows_from", watched)
    evaluate.draw_samples(tmp_path, MoPoE(data.modalities, 2), data)
    known = {tuple(row) for row in data.test.tensors["x0"].tolist()}
    assert drawn and all(tuple(row) in known for x in drawn for row in x["x0"].tolist())


def test_what_is_generated_is_given_what_its_title_says():
    model, given = MoPoE(vectors(3), 2), []
    posterior = model.posterior
    model.posterior = lambda x: given.append([*x]) or posterior(x)
    x = {m.name: torch.randn(4, 2) for m in model.modalities}
    with torch.no_grad():
        evaluate.rows_from(model, x, model.modalities[1])
    assert given == [["x1"]]


def test_the_protocol_is_that_of_sutter_et_al():
    assert evaluate.LATENT_TRAIN == 500 and evaluate.IMPORTANCE_SAMPLES == 15
    assert evaluate.JOINT_SAMPLES == 10_000 and evaluate.WATCHED == 1000


def test_of_a_mixture_the_representation_is_one_components_mean():
    torch.manual_seed(0)
    means = torch.tensor([[-1.0], [1.0]]).expand(1000, 2, 1)
    experts = Independent(Normal(means, 0.1), 1)
    z = evaluate.representation(MixtureSameFamily(Categorical(torch.ones(1000, 2)), experts))
    assert set(z.flatten().tolist()) == {-1.0, 1.0}
    assert abs(z.mean().item()) < 4 / 1000**0.5


def test_classifiers_do_not_depend_on_likelihood_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate.train_classifier, "__defaults__", (2, 8))
    data = small_data()
    for weight in (1.0, 9.0):
        modalities = [dataclasses.replace(m, weight=weight) for m in data.modalities]
        evaluate.classifiers(data.train, data.test, modalities, False, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2  # one of each modality


def test_a_classifier_is_kept_under_all_that_it_depends_on(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "train_classifier", lambda net, seen, split: net.state_dict())
    modalities = [Modality(name, (1, 4, 8), network="linear") for name in ("top", "bottom")]

    def tuples(seed):
        x = torch.rand(2, 20, 1, 4, 8, generator=torch.Generator().manual_seed(seed))
        return dict(zip(("top", "bottom"), x, strict=True)), torch.arange(20) % 3

    data = [datasets.from_tensors(tuples(seed), tuples(2), modalities) for seed in (0, 1)]

    def files(data, modalities=modalities):
        evaluate.classifiers(data.train, data.test, modalities, True, tmp_path)
        return len(list(tmp_path.iterdir()))

    assert files(data[0]) == files(data[0]) == 3  # of each modality, and of the whole image
    assert files(data[1]) == 6
    assert files(data[0], [dataclasses.replace(m, network="mlp") for m in modalities]) == 8
    source = inspect.getsource
    for changed in (evaluate.train_classifier, evaluate.whole, evaluate.resnet18):
        before = files(data[0])
        with monkeypatch.context() as patch:
            other = lambda thing, changed=changed: source(thing) + "#" * (thing is changed)
            patch.setattr(inspect, "getsource", other)
            now = files(data[0])
        assert now == before + (3 if changed is evaluate.train_classifier else 1)
    for library, more in ((torch, 3), (torchvision, 1)):
        before = files(data[0])
        with monkeypatch.context() as patch:
            patch.setattr(library, "__version__", "0")
            assert files(data[0]) == before + more


# --------------------------------------------------------------------- by hand and by closed form


class Told:
    """A model by hand: z is the class that the given modalities show, as a one-hot vector, and
    `shown` makes of z (..., 5) what every modality shows, of four classes (z itself: perfect)."""

    def __init__(self, shown=lambda z, i: z):
        self.modalities, self.shown = vectors(3), shown

    def prior(self):
        return Independent(OneHotCategorical(torch.full((5,), 0.2)), 0)

    def posterior(self, x):
        mean = torch.stack(list(x.values())).mean(0)
        return Independent(Normal(mean, torch.full_like(mean, 1e-6)), 1)

    def decode(self, z, names=None):
        shown = {m.name: self.shown(z, i) for i, m in enumerate(self.modalities)}
        return {name: Independent(Normal(t, 1.0), 1) for name, t in shown.items()}


def told(n=3000, seed=0):
    """Tuples of three modalities that show their class of five as a one-hot vector, and functions
    that give its logits."""
    labels = torch.randint(5, (n,), generator=torch.Generator().manual_seed(seed))
    tensors = {f"x{i}": torch.eye(5)[labels] for i in range(3)}
    index = dict.fromkeys(tensors, torch.arange(n))
    named = {name: itemgetter(name) for name in tensors}
    return datasets.Split(tensors, labels, index), named


def error(p, n):
    return (p * (1 - p) / n) ** 0.5


def test_a_perfect_model_has_all_of_every_metric():
    split, named = told()
    coherence = evaluate.conditional_coherence(Told(), named, split)
    assert len(coherence) == 7
    for targets in coherence.values():
        assert list(targets.values()) == pytest.approx([1.0] * 3)
    means = evaluate.coherence_by_inputs(coherence)
    assert list(means.values()) == pytest.approx([1.0] * 5)
    assert evaluate.joint_coherence(Told(), named) == 1.0
    assert set(evaluate.latent_accuracy(Told(), split, split).values()) == {1.0}


def test_of_a_mixture_the_latents_are_those_of_one_component():
    """One of two shows the class and the other nothing, which is worth half; in their mean the
    class would be as plain as in the first."""
    split, _ = told(300)
    model = Told()

    def posterior(x):
        mean = next(iter(x.values()))
        parts = Independent(Normal(torch.stack([mean, 0 * mean], 1), 1e-6), 1)
        return MixtureSameFamily(Categorical(torch.ones(len(mean), 2)), parts)

    model.posterior = posterior
    share = 0.5 + 0.5 / 5  # of the other half those of one class, about a fifth
    allowed = 4 * (error(share, 300) + 0.5 * error(0.2, 300))
    for found in evaluate.latent_accuracy(model, split, split).values():
        assert found == pytest.approx(share, abs=allowed)


def test_both_conventions_of_coherence():
    """Over the targets that were not given, and over all."""
    coherence = {
        "x0": {"x0": 1.0, "x1": 0.2},
        "x1": {"x0": 0.4, "x1": 0.8},
        "x0+x1": {"x0": 0.9, "x1": 0.7},
    }
    means = {"1/without_inputs": 0.3, "1/with_inputs": 0.6, "2/with_inputs": 0.8}
    assert evaluate.coherence_by_inputs(coherence) == pytest.approx(means)


def test_coherence_is_of_samples_of_the_posterior_from_a_seed_of_its_own():
    split, named = told()
    model, exact_posterior = Told(), Told().posterior
    model.posterior = lambda x: Independent(Normal(exact_posterior(x).mean, 1.0), 1)
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        found.append(evaluate.conditional_coherence(model, named, split))
    assert found[0] == found[1]
    for targets in found[0].values():  # the mean would give 1, noise alone 0.2
        assert all(0.25 < share < 0.9 for share in targets.values())


def test_a_model_that_always_shows_one_class_has_that_classs_share():
    split, named = told()
    model = Told(lambda z, i: torch.eye(5)[2].expand_as(z))
    share = (split.labels == 2).double().mean().item()
    for targets in evaluate.conditional_coherence(model, named, split).values():
        assert list(targets.values()) == pytest.approx([share] * 3)
    assert evaluate.joint_coherence(model, named) == 1.0


def test_a_model_of_chance_has_chance():
    split, named = told()
    model = Told(lambda z, i: torch.eye(5)[torch.randint(5, z.shape[:-1])])
    for targets in evaluate.conditional_coherence(model, named, split).values():
        assert all(abs(v - 0.2) < 4.5 * error(0.2, 3000) for v in targets.values())
    joint = evaluate.joint_coherence(model, named)
    assert abs(joint - 1 / 25) < 4 * error(1 / 25, evaluate.JOINT_SAMPLES)


class Places:
    """A model by hand whose text has its one symbol, the class, in any of three places: at each the
    space, symbol 5, is the most likely."""

    modalities = (
        Modality("text", (3,), "categorical", network="text", categories=6),
        Modality("label", (), "categorical", network="linear", categories=5),
    )

    def prior(self):
        return Independent(OneHotCategorical(torch.full((5,), 0.2)), 0)

    def posterior(self, x):
        return Independent(OneHotCategorical(F.one_hot(x["label"], 5).double()), 0)

    def decode(self, z, names=None):
        text = torch.cat([z / 3, torch.full_like(z[:, :1], 2 / 3)], -1).log()[:, None]
        logits = {"text": text.expand(-1, 3, 6), "label": z.log()}
        return {m.name: likelihood(m, logits[m.name]) for m in self.modalities}


def test_a_texts_classifier_is_shown_probabilities_and_a_labels_the_label(monkeypatch):
    monkeypatch.setattr(evaluate, "subsets_of", lambda _: [["label"]])
    x = {"text": torch.full((7, 3), 5), "label": torch.arange(7) % 5}
    split = datasets.Split(x, x["label"], dict.fromkeys(x, torch.arange(7)))
    named = {
        "text": lambda x: x["text"].sum(1)[:, :5],
        "label": lambda x: F.one_hot(x["label"], 5),
    }
    found = evaluate.conditional_coherence(Places(), named, split)
    assert found == {"label": {"text": 1.0, "label": 1.0}}
    assert evaluate.joint_coherence(Places(), named) == 1.0


def test_permuted_labels_give_chance():
    split, named = told()
    order = torch.randperm(3000, generator=torch.Generator().manual_seed(1))
    permuted = dataclasses.replace(split, labels=split.labels[order])
    agree = (split.labels == permuted.labels).double().mean().item()
    for targets in evaluate.conditional_coherence(Told(), named, permuted).values():
        assert list(targets.values()) == pytest.approx([agree] * 3)
    # What 500 permuted labels teach are at most five classes' majorities, by chance.
    for accuracy in evaluate.latent_accuracy(Told(), permuted, permuted).values():
        assert abs(accuracy - 0.2) < 0.1


def test_of_one_class_alone_a_latent_says_that_class():
    split, _ = told()
    rare = dataclasses.replace(split, labels=(torch.arange(3000) == 7).long())
    assert set(evaluate.latent_accuracy(Told(), rare, rare, 10).values()) == {2999 / 3000}


def linear_gaussian(M=3, widen=1.3, scale=SCALE):
    """A model whose likelihoods are known, and 200 tuples of its own."""
    torch.manual_seed(0)
    model = MoPoE(modalities(M, scale=scale), 2)
    set_decoders(model)
    set_exact_experts(model, widen)
    x = sample_x(model, 200)
    index = dict.fromkeys(x, torch.arange(200))
    return model, datasets.Split(x, torch.zeros(200), index), x


def test_log_likelihoods_are_the_exact_ones_from_every_subset(float64):
    """Joint, marginal and conditional, from posteriors wider than any p(z|x_S). With n effective
    samples an estimate errs by 1 / √n and is 1 / 2n too low; there are 200 of them."""
    model, split, x = linear_gaussian(widen=3.0)
    names = list(x)
    found = evaluate.log_likelihood(model, split, samples=2000)
    joint = log_p(model, x).mean().item()
    for subset in evaluate.subsets_of(model.modalities):
        key = "+".join(subset)
        error = {}
        for target in (f"log_likelihood/{key}", *(f"marginal/{key}/{name}" for name in names)):
            n = found[f"effective_samples/{target}"]
            assert 100 < n < 2000
            error[target] = 1 / n + 4 / (200 * n) ** 0.5
        target = f"log_likelihood/{key}"
        assert found[target] == pytest.approx(joint, abs=error[target])
        for name in names:
            target = f"marginal/{key}/{name}"
            exact = log_p(model, {name: x[name]}).mean().item()
            assert found[target] == pytest.approx(exact, abs=error[target])
            others = log_p(model, {n: t for n, t in x.items() if n != name}).mean().item()
            close = pytest.approx(joint - others, abs=2 * max(error.values()))
            assert found[f"conditional/{key}/{name}"] == close


@pytest.mark.parametrize("M", [2, 3])
def test_a_conditional_is_right_where_the_joint_posterior_is_narrow(float64, M):
    """Its samples miss much of p(z|others), so p(others) is estimated by those of its own."""
    model, split, x = linear_gaussian(M, widen=1.0, scale=0.2)
    found = evaluate.log_likelihood(model, split, samples=50)
    key = "+".join(x)
    for name in x:
        others = {n: t for n, t in x.items() if n != name}
        exact = (log_p(model, x) - log_p(model, others)).mean().item()
        q, target = model.posterior(others), [(list(others), model.prior())]
        _, effective, _ = evaluate.weigh(evaluate.log_weights(model, q, others, 50, target))
        n = effective.mean().item()
        error = 1 / n + 4 / (200 * n) ** 0.5
        assert error < 0.1
        assert found[f"conditional/{key}/{name}"] == pytest.approx(exact, abs=error)


def test_on_a_gpu_chunks_are_larger_and_have_fewer_importance_samples_at_a_time(monkeypatch):
    model, _, _ = linear_gaussian(2)
    assert [evaluate.chunk_on(torch.device(name)) for name in ("cpu", "cuda")] == [200, 1000]
    decoded, decode = [], model.decode
    monkeypatch.setattr(model, "decode", lambda z, x: decoded.append(len(z)) or decode(z, x))
    for tuples in (60, 200, 1000):
        x = {m.name: torch.zeros(tuples, *m.shape) for m in model.modalities}
        target = [(list(x), model.prior())]
        log_w = evaluate.log_weights(model, model.posterior(x), x, 17, target)
        assert log_w.shape == (17, 1, tuples)
    assert decoded == [15, 2, 15, 2, 3, 3, 3, 3, 3, 2]


def test_ten_thousand_samples_come_as_close_as_they_should(float64):
    model, _, x = linear_gaussian(2)
    q = model.posterior({"x0": x["x0"]})
    exact = log_p(model, x)
    for samples in (100, 1000, 10_000):
        prior = [(list(x), model.prior())]
        value, effective, _ = evaluate.weigh(evaluate.log_weights(model, q, x, samples, prior))
        # A weight's relative variance is samples / effective - 1; the log's error is its root over
        # the root of the samples, each of 200 tuples beyond three such errors with p = 0.003.
        z = (value[0] - exact) / (1 / effective[0] - 1 / samples).sqrt()
        assert (z.abs() > 3).sum() <= 6 and 0.8 < z.std() < 1.2


def test_the_standard_error_covers_the_truth_as_often_as_it_should(float64):
    """The model's expected log p(x) is minus the entropy of a Gaussian; of two standard errors
    about a mean over 50 tuples 94.9 % have it (Student's t of 49 degrees)."""
    model, _, _ = linear_gaussian(2, widen=1.0)
    decoders = [decoder.net[0] for decoder in model.decoders]
    W = torch.cat([net.weight for net in decoders])
    covariance = W @ W.T + model.modalities[0].scale ** 2 * torch.eye(len(W))
    truth = -MultivariateNormal(torch.zeros(len(W)), covariance).entropy().item()
    covered = 0
    for _ in range(300):
        x = sample_x(model, 50)
        split = datasets.Split(x, torch.zeros(50), dict.fromkeys(x, torch.arange(50)))
        state = torch.get_rng_state()
        found = evaluate.log_likelihood(model, split, samples=1)  # from all it is exact
        torch.set_rng_state(state)
        distance = found["log_likelihood/x0+x1"] - truth
        covered += abs(distance) < 2 * found["standard_error/log_likelihood/x0+x1"]
    assert abs(covered / 300 - 0.949) < 4 * error(0.949, 300)


def test_mixed_log_likelihoods_average_over_different_tuples(float64):
    """Rows of sample-major weights, as the released code of MoPoE takes them, of tuples in random
    order. The posterior given all is exact, so that each weight is its tuple's p(x)."""
    model, split, x = linear_gaussian(2, widen=1.0)
    found = evaluate.log_likelihood(model, split, samples=15)
    exact = log_p(model, x)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    rows = exact[order].repeat(15).split(15)
    by_hand = sum(row.exp().mean().log().item() for row in rows) / 200
    assert found["mixed_log_likelihood/x0+x1"] == pytest.approx(by_hand, rel=1e-12)
    assert by_hand > exact.mean().item() + 0.5
    assert found["log_likelihood/x0+x1"] == pytest.approx(exact.mean().item(), rel=1e-12)


def test_effective_samples_and_variance_of_log_weights(float64):
    log_w = 3 * torch.randn(31, 2, 7) - 700
    value, effective, variance = evaluate.weigh(log_w)
    w = torch.exp(log_w + 700)
    torch.testing.assert_close(value, w.mean(0).log() - 700)
    torch.testing.assert_close(effective, w.sum(0).square() / w.square().sum(0))
    torch.testing.assert_close(variance, log_w.var(0))


def test_variances_of_the_log_weights_are_those_of_the_paper(float64):
    """Of p(x_0|x_1) with q(z|x_1) in place of p(z|x_1), Wu & Goodman 2018, supplement, Table 2."""
    model, split, x = linear_gaussian(2)
    found = evaluate.log_likelihood(model, split)
    torch.manual_seed(0)
    q, prior = model.posterior(x), model.prior()
    z = q.sample((evaluate.IMPORTANCE_SAMPLES,))
    log_p = {name: p.log_prob(x[name]) for name, p in model.decode(z).items()}
    ratio = prior.log_prob(z) - q.log_prob(z)
    by_hand = {
        "log_likelihood/x0+x1": log_p["x0"] + log_p["x1"] + ratio,
        "marginal/x0+x1/x0": log_p["x0"] + ratio,
        "conditional/x0+x1/x0": log_p["x0"]
        + model.posterior({"x1": x["x1"]}).log_prob(z)
        - q.log_prob(z),
    }
    for key, log_w in by_hand.items():
        assert found[f"log_weight_variance/{key}"] == pytest.approx(log_w.var(0).mean().item())


def test_of_many_modalities_marginals_only_given_all(float64):
    model, split, _ = linear_gaussian(4)
    found = evaluate.log_likelihood(model, split, samples=2)
    assert {key.split("/")[1] for key in found if key.startswith("marginal")} == {"x0+x1+x2+x3"}


@pytest.mark.parametrize("method", [MVAE, MMVAE, MoPoE, SVAE, VAEVAE])
def test_an_encoder_sees_each_test_tuple_once(method, tmp_path, monkeypatch):
    """In a whole evaluation; no number is moved by it."""
    monkeypatch.setattr(evaluate.train_classifier, "__defaults__", (1, 64))
    monkeypatch.setattr(evaluate, "CHUNK", 4)
    torch.manual_seed(0)
    parts = [({f"x{i}": torch.randn(n, 2) for i in range(3)}, torch.arange(n) % 2) for n in (5, 7)]
    data = datasets.from_tensors(*parts, vectors(3))
    model, args = method(data.modalities, 2), SimpleNamespace(amp=False, cache_dir=tmp_path)
    encoders = [net for net in model.modules() if hasattr(net, "encodes")]
    seen = {net: [] for net in encoders}
    for net in encoders:
        layer = next(part for part in net.modules() if not list(part.children()))
        layer.register_forward_hook(lambda _, x, __, net=net: seen[net].append(len(x[0])))
    results = evaluate.evaluate(model, data, args)
    assert len(encoders) >= 3
    for sizes in seen.values():  # training tuples come five at a time
        assert sorted(n for n in sizes if n != 5) == [3, 4]
    monkeypatch.setattr(evaluate, "encoding_once", lambda *_: contextlib.nullcontext())
    assert evaluate.evaluate(model, data, args) == results
    assert all(sizes.count(4) > 2 for sizes in seen.values())


# ------------------------------------------------------------------------------- several runs


def test_cells_of_a_table():
    assert evaluate.plus_minus(None) == "–"
    assert evaluate.plus_minus(-2300.44, 5.66) == "-2300.4 ± 5.7"
    assert evaluate.plus_minus(1.306e24) == "1.3e+24"


def made(script="mopoe", seed=0, accuracy=0.5, M=2, source="here", **options):
    """The results of a run, all metrics equal to `accuracy`."""
    subsets = ["+".join(s) for s in evaluate.subsets_of(vectors(M))]
    metrics = [f"{kind}/{s}" for s in subsets for kind in ("latent_accuracy", "log_likelihood")]
    metrics += [f"coherence/{s}/x{i}" for s in subsets for i in range(M)]
    metrics += [f"coherence_by_inputs/{n}/without_inputs" for n in range(1, M)]
    facts = dict(script=script, dataset="polymnist", source=source, epochs=7, seed=seed)
    options = dict(beta=1.0, supervision=1.0, keep=1.0) | options
    return facts | {"options": options} | dict.fromkeys(metrics, accuracy)


def write(folder, *runs):
    paths = [folder / f"{i}.json" for i in range(len(runs))]
    for path, results in zip(paths, runs, strict=True):
        path.write_text(json.dumps(results))
    return [str(path) for path in paths]


def test_a_row_is_the_mean_and_deviation_of_seeds_of_equal_settings():
    runs = [made(seed=s, accuracy=a) for s, a in enumerate((0.2, 0.4, 0.9))]
    runs += [made(beta=2.5), made("mvae", seed=3, anneal_epochs=10)]
    found = evaluate.statistics(runs)
    rows = found["latent accuracy, %"]
    assert list(rows) == ["mopoe.py --beta 1.0", "mopoe.py --beta 2.5", "mvae.py"]
    assert list(rows["mvae.py"]) == ["x0", "x1", "x0+x1"]
    assert rows["mopoe.py --beta 1.0"]["x0+x1"] == pytest.approx((50, np.std([20, 40, 90], ddof=1)))
    assert rows["mvae.py"]["x0"] == (50, None)
    assert found["log p(X), nats"]["mvae.py"]["x0"] == (0.5, None)
    targets = found["coherence from a subset to a target, %"]["mvae.py"]
    assert list(targets) == ["x0 → x1", "x1 → x0"]


def test_runs_of_another_protocol_are_no_seeds_of_the_same_setting():
    runs = [made() | {"importance_samples": k} for k in (15, 1000)]
    labels = ["mopoe.py (15 importance samples)", "mopoe.py (1000 importance samples)"]
    assert list(evaluate.groups(runs)) == labels
    del (more := made(seed=1))["log_likelihood/x0"]
    found = evaluate.statistics([made(), more])
    assert "log p(X), nats" not in found and "latent accuracy, %" in found


def test_a_table_says_where_classifiers_differ():
    runs = [made(seed=s) | {"classifier_accuracy/x0": 0.98 + 0.01 * s} for s in (0, 1)]
    assert "by classifiers of different accuracy" in evaluate.comparison(runs)
    assert "by classifiers of different accuracy" not in evaluate.comparison(runs[:1])


def test_a_switch_names_a_row_where_it_is_on():
    labels = evaluate.groups([made(amp=True, beta=2.0), made(amp=False, beta=2.0)])
    assert list(labels) == ["mopoe.py --amp", "mopoe.py"]


def test_an_option_that_is_not_set_is_as_one_that_a_former_version_lacks():
    runs = [made(weights=""), made(seed=1), made(weights="x0=2")]
    found = {label: len(members) for label, members in evaluate.groups(runs).items()}
    assert found == {"mopoe.py": 2, "mopoe.py --weights x0=2": 1}


def test_more_than_three_modalities_are_shown_by_the_number_given():
    results = made(M=4)
    for subset in ("x0", "x1"):
        results[f"latent_accuracy/{subset}"] = 0.9
    found = evaluate.numbers(results)
    assert found["latent accuracy, %"] == pytest.approx({"1": 70, "2": 50, "3": 50, "4": 50})
    assert "coherence from a subset to a target, %" not in found


def test_of_more_than_three_modalities_all_are_called_so():
    results = made(M=4) | {"marginal/x0+x1+x2+x3/x1": -3.0}
    assert evaluate.numbers(results)["log p(x) of one, nats"] == {"all → x1": -3.0}


def test_log_likelihoods_given_all_stand_beside_those_of_every_subset():
    """Of a run that was evaluated with --proposals full."""
    fewer = made(M=4, beta=5.0)
    for subset in evaluate.subsets_of(vectors(4))[:-1]:
        del fewer[f"log_likelihood/{'+'.join(subset)}"]
    assert evaluate.numbers(fewer)["latent accuracy, %"] == dict.fromkeys("1234", 50)
    runs, metric = [fewer, made(M=4)], "coherence of the modalities not given, %"
    for ordered in (runs, runs[::-1]):
        table = evaluate.comparison(ordered).split("log p(X), nats")[1].splitlines()
        rows = {tuple(cells[:3]): cells[3:7] for cells in map(str.split, table[:3])}
        assert rows["mopoe.py", "--beta", "5.0"] == ["–", "–", "–", "0.5"]
        assert rows["mopoe.py", "--beta", "1.0"] == ["0.5"] * 4
        (points,) = evaluate.curves(ordered, "beta")[metric].values()
        assert points == [(0.5, 50, None, "1"), (0.5, 50, None, "5")]
    with pytest.raises(UserError, match="--against beta: seeds of mopoe.py differ in --proposals"):
        evaluate.curves([fewer, made(M=4, seed=1, beta=5.0)], "beta")


def test_tables_state_source_epochs_seeds_and_the_papers_number(tmp_path, capsys):
    mopoe = dict(M=4, beta=2.5, subsets="all")
    runs = [made(**mopoe), made(**mopoe, seed=1), made("mvae", M=4, source="elsewhere")]
    evaluate.main(write(tmp_path, *runs))
    first, second = capsys.readouterr().out.split("polymnist: ")[1:]
    assert first.startswith("here\n") and second.startswith("elsewhere\n")
    lines = [line.split() for line in first.splitlines()]
    assert ["mopoe.py", *["50.0", "±", "0.0"] * 3, "7", "0,", "1"] in lines
    paper = ["66.0", "77.0", "81.0", "300", "5"]
    assert next(line for line in lines if line[-5:] == paper)[:3] == ["Sutter", "et", "al."]
    assert "mopoe.py" not in second
    evaluate.main(write(tmp_path, made(M=4, beta=1.0, subsets="all")))
    assert "Sutter" not in capsys.readouterr().out  # they have β = 2.5
    assert "errors bound" not in first
    runs[0] |= {"classifier_accuracy/x0": 0.98, "classifier_accuracy/x1": 0.96}
    evaluate.main(write(tmp_path, runs[0]))
    assert "Below 97 % a classifier's errors bound the coherence: x1." in capsys.readouterr().out
    evaluate.main([*write(tmp_path, *runs[1:], made(**mopoe)), "--markdown"])
    assert "| mopoe.py | 50.0 ± 0.0 |" in capsys.readouterr().out
    evaluate.main([*write(tmp_path, *runs[1:]), "--json"])
    here, elsewhere = json.loads(capsys.readouterr().out)
    assert here["source"] == "here" and elsewhere["latent accuracy, %"]["mvae.py"]["1"] == [
        50,
        None,
    ]


def test_a_papers_number_stands_below_the_runs_of_its_method():
    on_svhn = dict(dataset="mnist-svhn", joint_coherence=0.5)
    kinds = ("dreg", "iwae-tight", "elbo")
    runs = [made("mmvae", objective=o, distribution="laplace") | on_svhn for o in kinds]
    runs += [made("mmvae", objective="dreg", distribution="normal") | on_svhn]
    (table,) = [t for t in evaluate.comparison(runs).split("\n\n") if t.startswith("joint")]
    found = [re.findall(r"elbo|iwae-tight|dreg|Shi|\d+\.\d", line) for line in table.splitlines()]
    loose, tight = ["Shi", "42.1"], ["Shi", "24.2"]
    ours = [[kind, "50.0"] for kind in kinds]
    assert found[1:] == [ours[0], loose, ours[1], tight, ours[2], ["dreg", "50.0"]]
    runs = [made(M=4, beta=2.5, subsets=s) for s in ("singletons", "full")]
    assert "Sutter" not in evaluate.comparison(runs)


@pytest.mark.parametrize("beta, shown", [(5.0, True), (1.0, False)])
def test_mixed_log_likelihoods_are_shown_beside_a_papers_only(beta, shown):
    on_text = {"dataset": "mnist-svhn-text", "mixed_log_likelihood/mnist": -2000.0}
    runs = [made("mvae", beta=beta) | on_text]
    table = evaluate.comparison(runs)
    assert (evaluate.MIXED in table) == ("Table 4" in table) == shown
    assert evaluate.MIXED in evaluate.statistics(runs)


def test_the_papers_numbers_are_of_what_there_is():
    for name, scripts in json.loads(evaluate.PAPERS.read_text()).items():
        assert name in datasets.LOADERS
        for script, metrics in scripts.items():
            options = vars(importlib.import_module(script).arguments(["--dataset", name]))
            assert metrics.keys() <= evaluate.METRICS.keys()
            for paper in itertools.chain(*metrics.values()):
                assert paper.keys() == {"source", "epochs", "seeds", "options", "columns"}
                assert paper["options"].keys() <= options.keys()


def test_curves_are_over_the_inputs_or_an_option(tmp_path):
    runs = [made(M=4, seed=s, accuracy=a, supervision=x) for s, a, x in ((0, 0.1, 1), (1, 0.3, 1))]
    runs += [made(M=4, supervision=0.1), made("mvae", M=4, supervision=0.1)]
    panels = evaluate.curves(runs, "supervision")
    assert list(panels) == [f"coherence of the modalities not given, %\ngiven {n}" for n in "123"]
    for lines in panels.values():
        assert list(lines) == ["mopoe.py", "mvae.py"]
        few, all_of_them = lines["mopoe.py"]
        assert few == lines["mvae.py"][0] == (0.1, 50, None, "")
        assert all_of_them[:3] == pytest.approx((1, 20, np.std([10, 30], ddof=1)))
    panels = evaluate.curves(runs[:2], "inputs")
    assert [point[0] for point in panels["latent accuracy, %"]["mopoe.py"]] == [1, 2, 3, 4]
    runs += [made(M=4, beta=0.2, supervision=0.1, accuracy=0.75)]
    runs += [made("mvae", M=4, beta=0.2, supervision=0.1)]  # of the same log p(X)
    runs = [results | {"joint_coherence": 0.3} for results in runs]
    lines, joint = evaluate.curves(runs, "beta").values()
    shares = "mopoe.py --supervision 1", "mopoe.py --supervision 0.1", "mvae.py --supervision 0.1"
    assert tuple(lines) == shares
    points = [(0.75, 75, None, "0.2"), (0.5, 50, None, "1")]
    assert lines[shares[1]] == points
    assert joint[shares[2]] == [(0.5, 30, None, "0.2"), (0.5, 30, None, "1")]
    paths = write(tmp_path, *runs)
    for against in ("inputs", "supervision", "beta"):
        figure = tmp_path / f"{against}.png"
        evaluate.main([*paths, "--figure", str(figure), "--against", against])
        assert figure.read_bytes().startswith(b"\x89PNG")


def test_curves_of_two_modalities_are_each_from_the_other_and_joint():
    runs = [made(supervision=x) | {"joint_coherence": 0.3} for x in (1, 0.1)]
    cross, joint = "coherence from a subset to a target, %", "joint coherence, %"
    panels = evaluate.curves(runs, "supervision")
    assert list(panels) == [f"{cross}\nx0 → x1", f"{cross}\nx1 → x0", f"{joint}\n"]
    assert panels[f"{joint}\n"]["mopoe.py"] == [(0.1, 30, None, ""), (1, 30, None, "")]
    # Of parts of an image only the whole has a class.
    whole, oracle = "class of the whole image, by the oracle, %", {"oracle_accuracy/x0+x1": 0.9}
    panels = evaluate.curves([results | oracle for results in runs], "supervision")
    assert list(panels) == [f"{whole}\ngiven x0+x1"]


def test_mistakes_in_a_comparison_are_one_line(tmp_path, capsys):
    def fails(argv, fragment):
        with pytest.raises(SystemExit) as stop:
            evaluate.main(argv)
        error = capsys.readouterr().err.strip()
        assert stop.value.code == 2 and fragment in error and "\n" not in error

    no_options, no_number = made(), made() | {"log_likelihood/x0": None}
    no_options["options"] = []
    no_metrics = {key: value for key, value in made().items() if "/" not in key}
    damaged = map(json.dumps, (no_options, no_number, no_metrics))
    for content in ("", "[]", "{}", '{"epochs": 3}', "\udcff", *damaged):
        (tmp_path / "x.json").write_bytes(content.encode(errors="surrogateescape"))
        fails([str(tmp_path / "x.json")], "x.json: is not a run's results.json")
    fails([str(tmp_path / "none.json")], "none.json: No such file")
    figure = ["--figure", str(tmp_path / "x.png")]
    fails([*write(tmp_path, made(), made(source="there")), *figure], "needs runs of one data set")
    old = made()
    del old["options"]["keep"]
    fails([*write(tmp_path, old), *figure, "--against", "keep"], "--against keep")
    fails([str(tmp_path / "0.json"), "--side-by-side", "x.png"], "is no folder of a run")
    fails([str(tmp_path / "0.json"), "--given", "x0"], "--given x0: needs --side-by-side")
    fails([str(tmp_path / "0.json"), "--against", "beta"], "--against beta: needs --figure")
    for option in ("--figure", "--side-by-side"):
        for wrong in ("x.jpg", "", str(tmp_path / "nowhere" / "x.png")):
            fails([str(tmp_path / "0.json"), option, wrong], f"{option}: {wrong!r} is not")
    for option, value in dict(latent_train=10, importance_samples=1, proposals="full").items():
        argv = [str(tmp_path / "0.json"), f"--{option.replace('_', '-')}", str(value)]
        fails(argv, f"{argv[1]} {value}: needs the folder of a run")


def test_what_is_of_the_data_tells_runs_of_different_scripts_apart():
    few = made("svae", supervision=0.2, beta=0.5)
    labels = ["mopoe.py --supervision 1.0", "svae.py --supervision 0.2"]
    assert [*evaluate.groups([made(), few])] == labels
    assert [*evaluate.groups([made(), few], ["supervision"])] == ["mopoe.py", "svae.py"]


def test_a_run_that_is_named_twice_counts_once(tmp_path, capsys):
    evaluate.main(2 * write(tmp_path, made()))
    assert "±" not in capsys.readouterr().out


def test_what_is_missing_is_named_before_anything_is_evaluated(tmp_path, monkeypatch, capsys):
    facts = {"source": "there", "options": {"dataset": "polymnist", "beta": 1.0}}
    monkeypatch.setattr(evaluate, "load_run", lambda path: 3 * [None])
    monkeypatch.setattr(evaluate, "read_facts", lambda path: facts)
    figure = [*write(tmp_path, made()), "--figure", str(tmp_path / "x.png")]
    for argv, fragment in (
        ([str(tmp_path / "none.json")], "none.json"),
        (figure, "needs runs of one data set"),
        ([*figure, "--against", "keep"], "--against keep: run does not say"),
    ):
        with pytest.raises(SystemExit) as stop:
            evaluate.main(["run", *argv])
        assert stop.value.code == 2 and fragment in capsys.readouterr().err


def test_latents_are_drawn_alike_each_time(tmp_path):
    """Of more than 500 dimensions the principal components are found by random projections."""
    wide = [Modality(f"x{i}", (600,), "normal", network="linear") for i in range(2)]
    torch.manual_seed(0)
    part = {m.name: torch.randn(300, 600) for m in wide}, torch.arange(300) % 3
    test, model = datasets.from_tensors(part, part, wide).test, MoPoE(wide, 600)
    pictures = []
    for seed in (1, 2):
        np.random.seed(seed)  # scikit-learn's, where it is given none
        with torch.no_grad():
            evaluate.draw_latents(tmp_path, model, test)
        pictures.append((tmp_path / "latents.png").read_bytes())
    assert pictures[0] == pictures[1]


def test_the_picture_of_latents_has_the_kl_to_the_prior(tmp_path, monkeypatch):
    second, kl_divergence = [], evaluate.kl_divergence

    def watched(q, p):
        second.append(p)
        return kl_divergence(q, p)

    monkeypatch.setattr(evaluate, "kl_divergence", watched)
    data = small_data()
    with torch.no_grad():
        evaluate.draw_latents(tmp_path, MoPoE(data.modalities, 2), data.test)
    # Of each modality to the prior, which has no batch, and between the two, both ways.
    assert [p.mean.ndim for p in second] == [1, 1, 2, 2]


def test_what_is_watched_in_training_is_the_same_each_time(monkeypatch):
    """Pixels that are drawn included."""
    data, seen, flushed = datasets.digits_label(None), [], []
    writer = SimpleNamespace(flush=lambda: flushed.append(1))
    data = dataclasses.replace(data, train=dataclasses.replace(data.train, drawn=True))
    shown = lambda model, data, args: seen.append(data.test.batch(torch.arange(50))[0]) or {}
    monkeypatch.setattr(evaluate, "evaluate", shown)
    for seed in (1, 2):
        torch.manual_seed(seed)
        evaluate.watch(writer, nn.Identity(), data, None, 1)
    assert seen[0]["image"].equal(seen[1]["image"])
    assert flushed == [1, 1]  # a program may end right after


def test_who_stops_reading_a_table_sees_no_error():
    """As `| head` does."""
    files = sorted(map(str, (ROOT / "results").glob("polydigits__m*.json")))
    command = [sys.executable, str(ROOT / "evaluate.py"), *files]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 1
