"""The shared mathematics of common.py against closed forms, integration and brute force."""

import math

import pytest
import torch
from torch.distributions import Bernoulli, Categorical, Laplace, Normal, kl_divergence

from common import (
    Modality,
    gaussian,
    gaussian_kl,
    likelihood,
    log_mean_exp,
    product_of_gaussians,
    quotient_of_gaussians,
    subset_masks,
)

GRID = torch.linspace(-40, 40, 400_001, dtype=torch.float64)


def moments(log_density):
    """Mean and variance of an unnormalised density on GRID, by the trapezoidal rule; the grid is
    2e-4 fine, its error for these smooth densities is below 1e-9."""
    p = torch.exp(log_density - log_density.max())
    p = p / torch.trapezoid(p, GRID)
    mean = torch.trapezoid(p * GRID, GRID)
    return mean.item(), torch.trapezoid(p * (GRID - mean) ** 2, GRID).item()


def log_normal(mu, logvar):
    return Normal(mu, math.exp(0.5 * logvar)).log_prob(GRID)


def test_subset_masks_are_all_subsets_singletons_first_full_last():
    for M in (1, 2, 5):
        masks = subset_masks(M)
        assert masks.shape == (2**M - 1, M) and masks.dtype == torch.bool
        assert len({tuple(mask) for mask in masks.tolist()}) == 2**M - 1
        assert masks[:M].equal(torch.eye(M, dtype=torch.bool))
        assert masks[-1].all() and (masks.sum(1).diff() >= 0).all()


@pytest.mark.parametrize("prior_expert", [False, True])
def test_product_of_gaussians_by_integration(float64, prior_expert):
    mu, logvar = torch.tensor([[0.3], [-1.2], [2.0]]), torch.tensor([[0.1], [-1.0], [1.5]])
    masks = subset_masks(3)
    mean, log_variance = product_of_gaussians(mu, logvar, masks, prior_expert)
    for s, mask in enumerate(masks):
        density = sum(log_normal(mu[i].item(), logvar[i].item()) for i in mask.nonzero().flatten())
        if prior_expert:
            density = density + log_normal(0.0, 0.0)
        expected = moments(density)
        assert mean[s].item() == pytest.approx(expected[0], abs=1e-8)
        assert log_variance[s].exp().item() == pytest.approx(expected[1], abs=1e-8)


def test_quotient_of_gaussians_by_integration(float64):
    p, q = (0.7, -1.0), (-0.4, 0.8)
    mean, log_variance = quotient_of_gaussians(*(torch.tensor([v]) for v in (*p, *q)))
    expected = moments(log_normal(*p) - log_normal(*q))
    assert mean.item() == pytest.approx(expected[0], abs=1e-8)
    assert log_variance.exp().item() == pytest.approx(expected[1], abs=1e-8)


def test_quotient_undoes_product(float64):
    mu, logvar = torch.randn(2, 7, 3), torch.randn(2, 7, 3)
    product = product_of_gaussians(mu, logvar)
    torch.testing.assert_close(quotient_of_gaussians(*product, mu[1], logvar[1])[0], mu[0])


def test_product_shapes_and_masks_agree(float64):
    mu, logvar = torch.randn(3, 6, 2), torch.randn(3, 6, 2)
    masks = subset_masks(3)
    mean, log_variance = product_of_gaussians(mu, logvar, masks)
    assert mean.shape == log_variance.shape == (7, 6, 2)
    full = product_of_gaussians(mu, logvar)
    torch.testing.assert_close((mean[-1], log_variance[-1]), full)
    by_example = product_of_gaussians(mu, logvar, masks[..., None].expand(7, 3, 6))
    torch.testing.assert_close((mean, log_variance), by_example)
    torch.testing.assert_close(mean[:3], mu)  # the product of one expert is the expert


def test_gaussian_kl_is_that_of_torch(float64):
    mu, logvar, mu_p, logvar_p = torch.randn(4, 5, 3)
    q = Normal(mu, (0.5 * logvar).exp())
    p = Normal(mu_p, (0.5 * logvar_p).exp())
    expected = kl_divergence(q, p).sum(-1)
    torch.testing.assert_close(gaussian_kl(mu, logvar, mu_p, logvar_p), expected)
    standard = kl_divergence(q, Normal(torch.zeros(3), torch.ones(3))).sum(-1)
    torch.testing.assert_close(gaussian_kl(mu, logvar), standard)


def test_log_mean_exp(float64):
    x = torch.randn(6, 4)
    torch.testing.assert_close(log_mean_exp(x, 0), x.exp().mean(0).log())
    torch.testing.assert_close(log_mean_exp(x + 5000, 1), x.exp().mean(1).log() + 5000)


def test_gradients_by_finite_differences(float64):
    masks, four = subset_masks(3), tuple(torch.randn(2, 3, requires_grad=True) for _ in range(4))
    experts = tuple(torch.randn(3, 2, 2, requires_grad=True) for _ in range(2))
    check = torch.autograd.gradcheck
    assert check(lambda mu, logvar: product_of_gaussians(mu, logvar, masks), experts)
    assert check(lambda mu, logvar: product_of_gaussians(mu, logvar, masks, True), experts)
    assert check(gaussian_kl, four)
    narrow = (four[0], four[1] - 6, four[2], four[3])  # p narrower than q
    assert check(quotient_of_gaussians, narrow)


EXTREMES = [0.0, 1.0, -1.0, 31.0, -31.0, 89.0, -89.0, 1e4, -1e4, 3e38, -3e38]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_values_and_gradients_are_finite_for_any_finite_input(dtype):
    grid = torch.tensor(EXTREMES, dtype=dtype)
    pairs = torch.cartesian_prod(grid, grid)  # every mean with every log-variance
    other = pairs.roll(7, 0).flip(0)
    leaves = [t.clone().requires_grad_() for t in (*pairs.T, *other.T)]
    mu, logvar = torch.stack(leaves[::2]), torch.stack(leaves[1::2])  # (2 experts, D)
    outputs = [
        *product_of_gaussians(mu, logvar, subset_masks(2)),
        *product_of_gaussians(mu, logvar, prior_expert=True),
        *quotient_of_gaussians(mu[0], logvar[0], mu[1], logvar[1]),
        gaussian_kl(mu, logvar),
        gaussian_kl(mu[0], logvar[0], mu[1], logvar[1]),
        gaussian_kl(*product_of_gaussians(mu, logvar)),
    ]
    for output in outputs:
        assert output.isfinite().all()
        for gradient in torch.autograd.grad(
            output.sum(), leaves, retain_graph=True, allow_unused=True
        ):
            assert gradient is None or gradient.isfinite().all()


def test_released_product_of_experts_overflows_where_ours_does_not():
    """Fault 11: exp of an unclamped log-variance past 88 is inf in float32, its gradient NaN."""

    def released(mu, logvar):
        T = 1.0 / (torch.exp(logvar) + 1e-8)
        return (mu * T).sum(0) / T.sum(0), torch.log(1.0 / T.sum(0))

    for product, finite in ((released, False), (product_of_gaussians, True)):
        mu = torch.ones(2, 1, requires_grad=True)
        logvar = torch.tensor([[90.0], [0.0]], requires_grad=True)
        gaussian_kl(*product(mu, logvar)).sum().backward()
        assert logvar.grad.isfinite().all().item() is finite


def test_no_epsilon_is_added_to_variances(float64):
    """A product of two experts of variance 1e-10 has variance 5e-11, to rounding."""
    logvar = torch.full((2, 1), math.log(1e-10))
    _, product = product_of_gaussians(torch.zeros(2, 1), logvar)
    assert product.exp().item() == pytest.approx(5e-11, rel=1e-12)


def test_products_stay_float32_under_autocast():
    mu, logvar = torch.randn(3, 8, 4), torch.randn(3, 8, 4)
    expected = product_of_gaussians(mu, logvar, subset_masks(3))
    with torch.autocast("cpu", torch.bfloat16):
        found = product_of_gaussians(mu, logvar, subset_masks(3))
    assert found[0].dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_in_bfloat16_all_is_computed_in_float32():
    """As the networks leave it with --amp."""
    half = torch.randn(2, 3, 4, 5).bfloat16()
    for function in (
        product_of_gaussians,
        lambda mu, logvar: quotient_of_gaussians(mu, logvar, mu, 2 * logvar),
        lambda mu, logvar: (gaussian_kl(mu, logvar), gaussian_kl(mu, logvar, mu, 2 * logvar)),
        lambda mu, logvar: (gaussian(mu, logvar).mean, gaussian(mu, logvar).stddev),
    ):
        for found, expected in zip(function(*half), function(*half.float()), strict=True):
            assert found.dtype == torch.float32 and found.equal(expected)


def test_likelihoods_are_those_of_torch(float64):
    t, x = torch.randn(7, 2), torch.rand(7, 2).round()
    for kind, p in (
        ("laplace", Laplace(t, 0.5)),
        ("normal", Normal(t, 0.5)),
        ("bernoulli", Bernoulli(logits=t)),
    ):
        modality = Modality("x", (2,), kind, scale=0.5, network="linear")
        found = likelihood(modality, t).log_prob(x)
        torch.testing.assert_close(found, p.log_prob(x).sum(-1))
    logits, x = torch.randn(7, 2, 5), torch.randint(5, (7, 2))
    modality = Modality("x", (2,), "categorical", network="linear", categories=5)
    found = likelihood(modality, logits).log_prob(x)
    torch.testing.assert_close(found, Categorical(logits=logits).log_prob(x).sum(-1))
