"""The evaluation: which subsets, and what it does where there are no classes."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

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
