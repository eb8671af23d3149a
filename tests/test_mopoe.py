"""mopoe.py against exact log-likelihoods, hand-written objectives and counting."""

import math

import exact
import numpy as np
import pytest
import torch
from exact import (
    MASKS,
    SCALE,
    elbo_in_closed_form,
    importance_sampled,
    log_p,
    mean_and_error,
    modalities,
    repeat,
    sample_x,
    set_decoders,
    set_exact_experts,
)
from torch.distributions import Normal, kl_divergence

import evaluate
import mopoe
from common import (
    LeadingDimensions,
    Modality,
    UserError,
    gaussian_kl,
    likelihood,
    product_of_gaussians,
    subset_masks,
)
from mopoe import MoPoE


def exact_mopoe(M=3, D=2, widen=1.0, **kwargs):
    model = MoPoE(modalities(M), D, **kwargs)
    set_decoders(model)
    set_exact_experts(model, widen)
    return model


def five(**kwargs):
    mods, x = exact.five()
    return MoPoE(mods, 3, **kwargs), x


# ------------------------------------------------------------------------------------- bounds


@pytest.mark.parametrize("subsets", ["all", "singletons", "full"])
@pytest.mark.parametrize("expectation", ["stratified", "all"])
@pytest.mark.parametrize("kl", ["components", "mixture"])
def test_every_objective_is_a_lower_bound_of_exact_log_p(float64, subsets, expectation, kl):
    model = exact_mopoe(subsets=subsets, expectation=expectation, kl=kl)
    x = repeat(sample_x(model, 1), 20_000)
    mean, error = mean_and_error(model(x)[0])
    assert mean <= log_p(model, x)[0].item() + 4 * error + 1e-9


@pytest.mark.parametrize("kl", ["components", "mixture"])
def test_bound_is_tight_with_the_exact_posterior(float64, kl):
    model = exact_mopoe(subsets="full", kl=kl)
    x = repeat(sample_x(model, 1), 20_000)
    mean, error = mean_and_error(model(x)[0])
    assert mean == pytest.approx(log_p(model, x)[0].item(), abs=4 * error + 1e-9)


@pytest.mark.parametrize("expectation", ["stratified", "all"])
def test_component_objective_is_the_mean_of_the_subsets_elbos_in_closed_form(float64, expectation):
    model = exact_mopoe(expectation=expectation, widen=1.3)
    x = sample_x(model, 1)
    subsets = product_of_gaussians(*model.encode(x), subset_masks(3))
    elbos = torch.stack([elbo_in_closed_form(model, x, *q) for q in zip(*subsets, strict=True)])
    mean, error = mean_and_error(model(repeat(x, 50_000))[0])
    assert mean == pytest.approx(elbos.mean().item(), abs=4 * error + 1e-9)


@pytest.mark.parametrize("subsets", ["all", "singletons"])
@pytest.mark.parametrize("expectation", ["stratified", "all"])
@pytest.mark.parametrize("kl", ["components", "mixture"])
def test_value_and_gradient_are_those_of_the_integral(float64, subsets, expectation, kl):
    """Eq. (6) integrated over z, and with singletons and the mixture's KL Eq. (9)."""
    model = exact_mopoe(D=1, widen=1.6, subsets=subsets, expectation=expectation, kl=kl)
    x = sample_x(model, 1)
    grid = torch.linspace(-12, 12, 2401)[:, None]
    masks = subset_masks(3)[: 3 if subsets == "singletons" else 7]
    mu, logvar = product_of_gaussians(*model.encode(x), masks)  # (S, 1, 1)
    log_q = Normal(mu, torch.exp(0.5 * logvar)).log_prob(grid)[..., 0]  # (S, G)
    log_mixture = torch.logsumexp(log_q, 0) - math.log(len(masks))
    log_p = sum(p.log_prob(x[name]) for name, p in model.decode(grid).items())
    ratio = model.prior().log_prob(grid) - (log_q if kl == "components" else log_mixture)
    value = torch.trapezoid(log_q.exp() * (log_p + ratio), grid[:, 0]).mean()
    gradient = torch.autograd.grad(value, exact.encoder_parameters(model))
    gradient = torch.cat([g.flatten() for g in gradient])

    mean, error = mean_and_error(model(repeat(x, 40_000))[0])
    assert mean == pytest.approx(value.item(), abs=4 * error)
    found = exact.mean_gradient(model, x)
    assert exact.distance(found, (gradient, torch.zeros(()))) < 4.5


def test_mixture_kl_is_tighter_and_component_kl_is_eq_5(float64, fixed_noise):
    """Lemma 3. On shared samples of every subset: Eq. (6) with the component KLs is Eq. (5) to
    rounding; with the mixture's KL it is larger, here in expectation."""
    model = exact_mopoe(expectation="all")
    x = repeat(sample_x(model, 1), 20_000)
    eq_6 = model(x)[0]

    mu, logvar = product_of_gaussians(*model.encode(x), subset_masks(3))
    z = mu + (0.5 * logvar).exp() * torch.randn_like(mu)
    eq_5 = 0.0
    for s in range(7):  # the mean over S of E_q(z|x_S)[Σ_i log p(x_i|z)] - KL(q(z|x_S) || p(z))
        for name, p in model.decode(z[s]).items():
            eq_5 = eq_5 + p.log_prob(x[name]) / 7
        eq_5 = eq_5 - gaussian_kl(mu[s], logvar[s]) / 7
    torch.testing.assert_close(eq_6, eq_5, rtol=1e-12, atol=1e-12)

    model.kl = "mixture"
    mean, error = mean_and_error(model(x)[0] - eq_6)
    assert mean > 4 * error


@pytest.mark.parametrize("subset", [["x0"], ["x1", "x2"], ["x0", "x1", "x2"]])
def test_importance_sampling_converges_as_theory_says(float64, subset):
    """log p̂ with K samples errs by sd(w) / √K, w the weights over their mean: four times the
    samples halve the error, whose size the weights themselves foretell."""
    model = exact_mopoe()
    x = repeat(sample_x(model, 1), 2000)
    q = model.posterior({name: x[name] for name in subset})
    exact = log_p(model, x)[0]
    many = [importance_sampled(model, q, x, 1) for _ in range(100)]
    one = torch.exp(torch.cat(many) - exact)
    for samples in (240, 960):
        estimates = importance_sampled(model, q, x, samples) - exact
        expected = one.std().item() / samples**0.5
        # 2,000 estimates know their own spread to 2 %; the logarithm bends it by as much.
        assert estimates.std().item() == pytest.approx(expected, rel=0.1, abs=1e-9)
        assert abs(estimates.mean().item()) < expected**2 + 4 * expected / 2000**0.5 + 1e-9


def test_importance_sampling_decodes_a_bounded_number_at_a_time(float64):
    """Memory does not grow with the number of importance samples."""
    model, decoded = exact_mopoe(), []
    decode, x = model.decode, sample_x(model, 3)
    model.decode = lambda z, names=None: decoded.append(len(z)) or decode(z, names)
    importance_sampled(model, model.posterior(x), x, 1000)
    assert sum(decoded) == 1000 and max(decoded) <= evaluate.IMPORTANCE_SAMPLES


@pytest.mark.parametrize("subset", [["x0"], ["x1", "x2"], ["x0", "x1", "x2"]])
def test_importance_sampling_is_unbiased_for_p_of_x(float64, subset):
    """E[p̂(x) / p(x)] = 1 whatever the number of samples; each example has its own estimate."""
    model = exact_mopoe()
    x = repeat(sample_x(model, 1), 20_000)
    q = model.posterior({name: x[name] for name in subset})
    for samples in (1, 15):
        ratio = torch.exp(importance_sampled(model, q, x, samples) - log_p(model, x))
        mean, error = mean_and_error(ratio)
        assert mean == pytest.approx(1.0, abs=4 * error + 1e-12)


# ------------------------------------------------------------------------------- special cases


def by_hand(model, x, masks, z_noise):
    """The ELBO of the mixture over `masks`, component KLs, all written out; subset by subset."""
    value = 0.0
    experts = {}
    for m, encoder in zip(model.modalities, model.encoders, strict=True):
        mu, logvar = encoder(x[m.name]).chunk(2, -1)
        experts[m.name] = Normal(mu, (0.5 * logvar).exp())
    for s, mask in enumerate(masks):
        chosen = [experts[m.name] for m, given in zip(model.modalities, mask, strict=True) if given]
        T = sum(1 / q.variance for q in chosen)
        mean, std = sum(q.mean / q.variance for q in chosen) / T, T**-0.5
        z = mean + std * z_noise[s]
        elbo = -model.beta * kl_divergence(Normal(mean, std), Normal(0.0, 1.0)).sum(-1)
        for m in model.modalities:
            elbo = elbo + m.weight * model.decode(z)[m.name].log_prob(x[m.name])
        value = value + elbo / len(masks)
    return value


@pytest.mark.parametrize("subsets", ["all", "singletons", "full"])
def test_special_cases_written_out_by_hand(float64, fixed_noise, subsets):
    """Section 3.5: the full set is the PoE objective, Eq. (7); singletons are the MoE's, Eq. (9),
    but for the components' KLs in place of the mixture's."""
    model, x = five(subsets=subsets, expectation="all", beta=1.7)
    masks = {"all": subset_masks(5), "singletons": torch.eye(5), "full": torch.ones(1, 5)}
    masks = masks[subsets].bool().tolist()
    noise = torch.randn_like(torch.empty(len(masks), 6, 3))
    expected = by_hand(model, x, masks, noise)
    exact.assert_equal_with_gradients(model, model(x)[0], expected)


def test_prior_expert_joins_the_full_set_only(float64):
    model, x = five(prior_expert=True)
    plain, _ = five()
    plain.load_state_dict(model.state_dict())
    some = {"a": x["a"], "b": x["b"]}
    torch.testing.assert_close(model.posterior(some).mean, plain.posterior(some).mean)
    mu, logvar = model.encode(x)
    expected = product_of_gaussians(mu, logvar, prior_expert=True)
    torch.testing.assert_close(model.posterior(x).mean, expected[0])
    torch.testing.assert_close(model.posterior(x).variance, expected[1].exp())


def test_prior_expert_needs_the_full_set():
    with pytest.raises(
        UserError, match="--prior-expert: is for the full set, which --subsets sing"
    ):
        MoPoE(modalities(2), 2, subsets="singletons", prior_expert=True)


def test_posterior_is_the_product_of_the_given(float64):
    model, x = five()
    mu, logvar = model.encode(x)
    some = {"e": x["e"], "b": x["b"]}
    expected = product_of_gaussians(mu[[1, 4]], logvar[[1, 4]])
    q = model.posterior(some)
    assert q.batch_shape == (6,) and q.event_shape == (3,)
    torch.testing.assert_close(q.mean, expected[0])
    torch.testing.assert_close(q.variance, expected[1].exp())


def test_decode_keeps_leading_dimensions_and_decodes_what_is_named(float64):
    model, x = five(private_dim=2)
    z = model.prior().sample((7, 4))
    assert z.shape == (7, 4, 3 + 5 * 2)
    for name, p in model.decode(z).items():
        assert p.batch_shape == (7, 4) and p.event_shape == x[name].shape[1:]
    assert list(model.decode(z, ["b", "d"])) == ["b", "d"]


def test_decoding_many_rows_in_parts_changes_nothing(float64, monkeypatch):
    model, x = five()
    z = model.prior().sample((7, 6)).requires_grad_()

    def values_and_gradient():
        values = sum(p.log_prob(x[name]) for name, p in model.decode(z).items())
        return values, *torch.autograd.grad(values.sum(), [z, *model.decoders.parameters()])

    whole, rows = values_and_gradient(), []
    model.decoders[0].net.register_forward_hook(lambda net, given, out: rows.append(len(out)))
    monkeypatch.setattr(LeadingDimensions, "ROWS", 20)
    torch.testing.assert_close(values_and_gradient(), whole)
    assert rows == [20, 20, 2]


# ------------------------------------------------------------------------ missing modalities


@pytest.mark.parametrize("subsets", ["all", "singletons", "full"])
@pytest.mark.parametrize("kl", ["components", "mixture"])
@pytest.mark.parametrize("private_dim", [0, 2])
def test_masked_value_is_that_of_the_model_without_them(float64, subsets, kl, private_dim):
    """All 31 masks: as if the masked modalities did not exist."""
    model, x = five(private_dim=private_dim, subsets=subsets, kl=kl, expectation="all")
    for mask in MASKS:
        kept = [i for i, given in enumerate(mask) if given]
        given = [model.modalities[i] for i in kept]
        small = MoPoE(given, 3, private_dim, 1.0, subsets, "all", kl)
        for i, k in enumerate(kept):
            small.encoders[i], small.decoders[i] = model.encoders[k], model.decoders[k]

        # The components that are left come in the same order; they and their latents see the
        # same noise.
        observed = torch.tensor(mask).expand(6, 5)
        components = model.components(x, observed)[2][:, 0] > 0
        latents = torch.tensor([True] * 3 + [m for m in mask for _ in range(private_dim)])
        whole = torch.randn(len(components), 6, 3 + 5 * private_dim)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "randn_like", lambda t, whole=whole: whole)
            value, terms = model(x, observed)
            part = whole[components][..., latents]
            patch.setattr(torch, "randn_like", lambda t, part=part: part)
            expected, expected_terms = small({m.name: x[m.name] for m in given})
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
        for name in expected_terms:
            torch.testing.assert_close(terms[name], expected_terms[name])


@pytest.mark.parametrize(
    "kwargs", [{}, {"kl": "mixture"}, {"expectation": "all"}, {"subsets": "full"}]
)
@pytest.mark.parametrize("private_dim", [0, 2])
def test_masked_content_changes_neither_value_nor_gradient(float64, kwargs, private_dim):
    exact.assert_masked_content_is_unread(*five(private_dim=private_dim, **kwargs))


@pytest.mark.parametrize("subsets, S", [("all", 31), ("singletons", 5), ("full", 1)])
@pytest.mark.parametrize("kl", ["components", "mixture"])
@pytest.mark.parametrize("private_dim", [0, 2])
def test_streams_are_the_masked_batch(float64, monkeypatch, subsets, S, kl, private_dim):
    """A complete tuple is decoded given each of S subsets, a modality alone once."""
    model, x = five(private_dim=private_dim, subsets=subsets, kl=kl, expectation="all")
    exact.assert_streams_are_the_masked_batch(model, x, monkeypatch, 5 * S + 5)


def test_all_observed_is_the_same_as_no_mask(float64, fixed_noise):
    for subsets in ("all", "singletons", "full"):
        prior_expert = subsets != "singletons"
        model, x = five(subsets=subsets, expectation="all", prior_expert=prior_expert)
        value = model(x, torch.ones(6, 5, dtype=torch.bool))[0]
        torch.testing.assert_close(value, model(x)[0], rtol=1e-12, atol=1e-12)


# --------------------------------------------------------------------------- private latents


def test_private_latents_are_eq_34_by_hand(float64, fixed_noise):
    model, x = five(private_dim=2, expectation="all", beta=2.0)
    mu, logvar = model.encode(x)
    c = product_of_gaussians(mu[..., :3], logvar[..., :3], subset_masks(5))
    noise = torch.randn_like(torch.empty(31, 6, 3 + 5 * 2))
    expected = 0.0
    for s in range(31):
        z_c = c[0][s] + (0.5 * c[1][s]).exp() * noise[s, :, :3]
        expected = expected - 2.0 * gaussian_kl(c[0][s], c[1][s]) / 31
        for i, m in enumerate(model.modalities):
            part = slice(3 + 2 * i, 5 + 2 * i)
            mu_s, logvar_s = mu[i, :, 3:], logvar[i, :, 3:]
            z_s = mu_s + (0.5 * logvar_s).exp() * noise[s, :, part]
            p = torch.cat([z_c, z_s], -1)
            own = mopoe.likelihood(m, model.decoders[i](p)).log_prob(x[m.name])
            expected = expected + (m.weight * own - 2.0 * gaussian_kl(mu_s, logvar_s)) / 31
    exact.assert_equal_with_gradients(model, model(x)[0], expected)


def test_private_latent_of_an_absent_modality_follows_its_prior(float64):
    exact.assert_private_latent_of_an_absent_modality_follows_its_prior(*five(private_dim=2))


# --------------------------------------------------------------------------------- mixture(x)


def test_mixture_density_integrates_to_one_and_samples_follow_it(float64):
    model = MoPoE(modalities(3, n=1), 1)
    x = {m.name: torch.randn(1, 1) for m in model.modalities}
    q = model.mixture(x)
    assert q.batch_shape == (1,) and q.event_shape == (1,)
    grid = torch.linspace(-12, 12, 20_001)
    density = q.log_prob(grid[:, None, None]).exp()[:, 0]
    cdf = torch.cumulative_trapezoid(density, grid)
    assert cdf[-1].item() == pytest.approx(1.0, abs=1e-6)
    n = 100_000
    samples = q.sample((n,)).flatten().sort().values
    at = torch.searchsorted(grid, samples).clamp(max=len(cdf)) - 1
    distance = (cdf[at] - torch.arange(n) / n).abs().max().item()
    assert distance < 1.95 / n**0.5  # Kolmogorov-Smirnov at 0.1 %


def test_mixture_components_are_the_available_subsets(float64):
    model, x = five()
    observed = torch.tensor([True, False, True, False, False]).expand(6, 5)
    weights = model.mixture(x, observed).mixture_distribution.probs
    assert (weights > 0).sum(1).eq(3).all()
    torch.testing.assert_close(weights.max(1).values, torch.full((6,), 1 / 3))


@pytest.mark.parametrize("B", [256, 16, 7])
def test_each_subset_gets_its_share_of_a_batch(B):
    weights = torch.full((31, B), 1 / 31)
    torch.manual_seed(0)
    draws = torch.stack([mopoe.stratified(weights) for _ in range(4000)])
    counts = torch.stack([(draws == k).sum(1) for k in range(31)], 1)  # (draws, subsets)
    assert counts.min() >= B // 31 and counts.max() <= -(-B // 31)
    # Every subset is as likely as any other, at every place of the batch: binomial counts.
    for share, n in ((counts.sum(0), 4000 * B), *((torch.bincount(d), 4000) for d in draws.T[:3])):
        error = (n * (1 / 31) * (30 / 31)) ** 0.5
        assert (share - n / 31).abs().max() < 4.5 * error


def test_unequal_weights_get_their_shares_of_a_batch():
    """As a fork may have them; the examples differ in what they weigh."""
    weights = torch.tensor([[0.5, 0.0], [0.125, 0.75], [0.375, 0.25]]).repeat(1, 8)
    torch.manual_seed(0)
    draws = torch.stack([mopoe.stratified(weights) for _ in range(4000)])
    for half in (0, 1):
        counts = torch.stack([(draws[:, half::2] == k).sum(1) for k in range(3)], 1)
        shares = weights[:, half]
        error = (8 * 4000 * shares * (1 - shares)) ** 0.5
        assert ((counts.sum(0) - 8 * 4000 * shares).abs() <= 4.5 * error).all()
    same = torch.stack([mopoe.stratified(weights[:, ::2]) for _ in range(100)])
    assert all((same == k).sum(1).eq(8 * weights[k, 0]).all() for k in range(3))


def test_stratified_draws_available_components_only():
    torch.manual_seed(0)
    available = torch.rand(31, 64) < 0.2
    available[:, 0] = torch.arange(31) == 30  # the last alone
    available[:, 1] = torch.arange(31) == 0  # the first alone
    available[7] |= ~available.any(0)
    for _ in range(200):
        k = mopoe.stratified(available / available.sum(0))
        assert available[k, torch.arange(64)].all()


def test_released_assignment_by_position_gives_the_full_set_too_much():
    """Fault 2: B // S examples for each subset in turn, the rest for the last, the full set."""

    def released(S, B):
        k = torch.arange(S).repeat_interleave(B // S)
        return torch.cat([k, torch.full((B - len(k),), S - 1)])

    model = MoPoE(exact.modalities(5), latent_dim=5)
    decode, seen = model.decode, []

    def narrow_experts(x):  # with means so far apart that z tells its subset
        mu = torch.eye(5)[:, None].expand(5, len(x["x0"]), 5)
        return mu, torch.full_like(mu, -20.0)

    def recording(z, names=None):
        seen.append(((z - 1 / 5).abs().amax(-1) < 0.01).float().mean().item())
        return decode(z, names)

    model.encode, model.decode = narrow_experts, recording
    for B, share in ((256, 16 / 256), (16, 1.0)):
        assert (released(31, B) == 30).float().mean().item() == pytest.approx(share)
        torch.manual_seed(0)
        x, seen = sample_x(model, B), []
        for _ in range(500):
            model.objective(x)
        # Evenly over each batch, so it is B / 31 rounded down or up.
        assert {round(s * B) for s in seen} <= {B // 31, B // 31 + 1}
        assert np.mean(seen) == pytest.approx(1 / 31, abs=4 * 0.5 / B / 500**0.5)


# ---------------------------------------------------------------------- faults not inherited


def test_released_log_likelihood_averages_over_different_examples(float64):
    """Fault 1: samples laid out sample-major, reduced with view(batch, samples)."""
    model = exact_mopoe()
    x = sample_x(model, 200)
    q = model.posterior(x)
    exact = log_p(model, x)
    ours = importance_sampled(model, q, x, 300)
    torch.testing.assert_close(ours, exact)  # the exact posterior: every weight is p(x)

    z = q.sample((300,))
    log_w = model.prior().log_prob(z) - q.log_prob(z)
    log_w = log_w + sum(p.log_prob(x[name]) for name, p in model.decode(z).items())
    released = torch.logsumexp(log_w.reshape(-1).view(200, 300), 1) - torch.tensor(300.0).log()
    assert (released.mean() - exact.mean()).abs() > 0.5


def test_text_log_likelihood_is_that_of_log_softmax(float64):
    """Fault 13: log-softmax values passed as probabilities score a sure symbol at about -10."""
    m = Modality("text", (1,), "categorical", network="linear", categories=71)
    logits = torch.zeros(1, 1, 71)
    logits[..., 5] = 8.2
    expected = torch.log_softmax(logits, -1)[0, 0, 5]
    assert expected > -0.03
    torch.testing.assert_close(likelihood(m, logits).log_prob(torch.tensor([[5]]))[0], expected)
    released = torch.distributions.OneHotCategorical(
        probs=torch.log_softmax(logits, -1), validate_args=False
    )
    one_hot = torch.nn.functional.one_hot(torch.tensor([[5]]), 71).to(logits)
    assert released.log_prob(one_hot).item() < expected - 5


def test_likelihood_weights_enter_the_objective_but_not_the_terms(float64, fixed_noise):
    def model_with(weight):
        torch.manual_seed(0)
        return MoPoE([Modality("x", (2,), "normal", SCALE, weight, "linear")], 2)

    x = {"x": torch.randn(4, 2)}
    (one, terms), (three, same) = model_with(1.0)(x), model_with(3.0)(x)
    assert terms["log_px/x"].equal(same["log_px/x"])
    torch.testing.assert_close((three - one).mean(), 2 * terms["log_px/x"])
