"""The evaluation: which subsets, and what it does where there are no classes."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.distributions import Independent, Normal

import datasets
import evaluate
from common import Modality, UserError
from mopoe import MoPoE


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
    monkeypatch.setattr(evaluate.train_classifier, "__defaults__", (60, 64))
    results = evaluate.class_metrics(Copy(data.modalities), *parts[:2], True, tmp_path)
    named, accuracy = evaluate.classifiers(*parts, True, tmp_path)  # from the cache
    assert len(list(tmp_path.iterdir())) == 3
    assert accuracy["whole"] > 0.8
    assert accuracy == {n: results[f"classifier_accuracy/{n}"] for n in ("top", "bottom", "whole")}
    assert results["oracle_accuracy/top+bottom"] == pytest.approx(accuracy["whole"])
    images, labels = datasets.small_digits()[1]
    images = torch.from_numpy(images[:, None]) / 255
    images[:, :, 4:] = 0
    by_hand = (named["whole"]({"image": images}) == torch.from_numpy(labels)).double().mean()
    assert results["oracle_accuracy/top"] == pytest.approx(by_hand.item()) != accuracy["whole"]
    assert "coherence/top/whole" not in results
    assert "oracle on the whole image, given top" in evaluate.table(
        results | {f"log_likelihood/{s}": 0.0 for s in ("top", "bottom", "top+bottom")}
    )


def test_attributes_are_no_class():
    """Of labels (N, A) there is the log-likelihood, and its table and pictures."""
    parts = [
        ({f"x{i}": torch.randn(30, 2) for i in range(2)}, torch.randint(2, (30, 3)))
        for _ in range(2)
    ]
    data = datasets.from_tensors(*parts, vectors(2))
    torch.manual_seed(0)
    model = MoPoE(data.modalities, 2)
    results = evaluate.evaluate(model, data, SimpleNamespace(amp=False))
    assert results.keys() == {f"log_likelihood/{s}" for s in ("x0", "x1", "x0+x1")}
    one = np.mean([results["log_likelihood/x0"], results["log_likelihood/x1"]])
    lines = [line.split() for line in evaluate.table(results).splitlines()]
    assert lines[1:] == [["1", f"{one:.1f}"], ["2", f"{results['log_likelihood/x0+x1']:.1f}"]]
    x = evaluate.examples(data.test, 12, seed=0)
    assert [t.shape for t in x.values()] == [(12, 2)] * 2
