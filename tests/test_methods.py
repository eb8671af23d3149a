"""What the five methods have in common, where a fault in one would look like the method."""

import exact
import pytest
import torch

from mmvae import MMVAE
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
