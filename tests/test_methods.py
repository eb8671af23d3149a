"""What the five methods have in common, where a fault in one would look like the method."""

import re

import exact
import pytest
import torch
from conftest import ROOT

from mmvae import MMVAE, OBJECTIVES
from mopoe import MoPoE
from mvae import MVAE
from svae import SVAE
from vaevae import VAEVAE


@pytest.mark.parametrize(
    "method, settings",
    [
        (MVAE, dict(random_subsets=2)),
        (MMVAE, dict(objective="elbo", K=2)),
        (MoPoE, {}),
        (MoPoE, dict(kl="mixture")),
        (SVAE, {}),
        (SVAE, dict(expectation="stratified")),
        (VAEVAE, {}),
        (VAEVAE, dict(joint="poe", expectation="stratified")),
    ],
)
def test_the_logged_kl_is_what_beta_weighs(float64, method, settings):
    modalities, x = exact.five()
    x = {name: t[torch.arange(30) % 6] for name, t in x.items()}
    model, values = method(modalities, 3, **settings), []
    for model.beta in (0.0, 2.5):
        torch.manual_seed(0)
        value, terms = model(x)
        values.append(value.mean())
    torch.testing.assert_close(values[0] - values[1], 2.5 * terms["kl"])


@pytest.mark.parametrize("method", [MVAE, MMVAE, MoPoE])
def test_a_decoder_sees_the_shared_and_its_own_private_latent(float64, method):
    modalities, x = exact.five()
    z = torch.randn(6, 3 + 5 * 2, requires_grad=True)
    for i, (name, p) in enumerate(method(modalities, 3, private_dim=2).decode(z).items()):
        (slope,) = torch.autograd.grad(p.log_prob(x[name]).sum(), z)
        assert slope.ne(0).any(0).nonzero()[:, 0].tolist() == [0, 1, 2, 3 + 2 * i, 4 + 2 * i]


@pytest.mark.parametrize(
    "method, settings",
    [(method, {}) for method in (MVAE, MoPoE, SVAE, VAEVAE)]
    + [(MMVAE, dict(objective=name, K=2)) for name in OBJECTIVES],
)
def test_an_objective_is_the_same_without_gradients(float64, method, settings):
    modalities, x = exact.five()
    model, values = method(modalities, 3, **settings), []
    for enabled in (True, False):
        torch.manual_seed(0)
        with torch.set_grad_enabled(enabled):
            values.append(model(x)[0])
    assert values[0].requires_grad and not values[1].requires_grad
    torch.testing.assert_close(*values)


@pytest.mark.parametrize("method", [MVAE, MMVAE, MoPoE, SVAE, VAEVAE])
def test_decode_has_all_modalities_or_the_named_ones(float64, method):
    modalities, _ = exact.five()
    model, z = method(modalities, 3), torch.randn(2, 6, 3)
    all_of_them = model.decode(z)
    assert list(all_of_them) == [m.name for m in modalities]
    for name, p in all_of_them.items():
        assert p.batch_shape == (2, 6)
        (only,) = model.decode(z, [name]).values()
        torch.manual_seed(0)
        sample = p.sample()
        torch.testing.assert_close(only.log_prob(sample), p.log_prob(sample))


# ---------------------------------------------------------------------------- the scripts' text

SCRIPTS = ["mopoe", "mmvae", "mvae", "svae", "vaevae"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_training_loops_are_one_text(script):
    loops = []
    for name in ("mopoe", script):
        _, loop = (ROOT / f"{name}.py").read_text().split("    def update(rows):")
        lines = loop.splitlines()
        # What MVAE has more: β is annealed, and it says where that ends.
        loops.append([line for line in lines if not re.search("anneal|share", line)])
    assert loops[0] == loops[1]


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_script_needs_another(script):
    text = (ROOT / f"{script}.py").read_text()
    assert not re.search(rf"^(import|from) ({'|'.join(SCRIPTS)})\b", text, re.MULTILINE)
