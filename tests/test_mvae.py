"""mvae.py against exact log-likelihoods, hand-written objectives and counting."""

import math

import exact
import pytest
import torch
from exact import (
    MASKS,
    log_p,
    mean_and_error,
    modalities,
    repeat,
    sample_x,
    set_decoders,
    set_exact_experts,
)
from test_run import resume, run
from torch.distributions import Normal, kl_divergence

import mvae
from common import UserError
from mopoe import MoPoE
from mvae import MVAE


def five(**kwargs):
    mods, x = exact.five()
    return MVAE(mods, 3, **kwargs), x


def exact_mvae(M=3, D=2, **kwargs):
    """With the universal expert, whose precision is 1, the experts' own make up the rest."""
    model = MVAE(modalities(M), D, **kwargs)
    set_decoders(model)
    set_exact_experts(model, prior_precision=0.0)
    return model


# ------------------------------------------------------------------------------------- bounds


def test_joint_elbo_with_exact_posteriors_is_log_p(float64):
    """The experts W_iᵀW_i / s² times the universal expert are the exact posterior of every subset,
    and so every term of the objective is the log-likelihood of its subset."""
    model = exact_mvae()
    x = repeat(sample_x(model, 1), 20_000)
    subsets = [(0, 1, 2), (0,), (1,), (2,), (0, 2)]
    elbos, *_ = model.elbos(x, subsets)
    for elbo, S in zip(elbos, subsets, strict=True):
        mean, error = mean_and_error(elbo.detach())
        exact = log_p(model, {f"x{i}": x[f"x{i}"] for i in S})[0].item()
        assert mean == pytest.approx(exact, abs=4 * error)


@pytest.mark.parametrize("product", ["universal", "quotient"])
@pytest.mark.parametrize("private_dim", [0, 2])
def test_every_elbo_is_a_lower_bound_of_exact_log_p(float64, product, private_dim):
    """With decoders that ignore the private latents the exact log p(x) is the same."""
    model = MVAE(modalities(3), 2, private_dim, product=product)
    set_decoders(model)
    for d in model.decoders:
        d.net[0].weight.data[:, 2:] = 0
    x = repeat(sample_x(model, 1), 20_000)
    subsets = [(0, 1, 2), (0,), (1, 2)]
    for elbo, S in zip(model.elbos(x, subsets)[0], subsets, strict=True):
        mean, error = mean_and_error(elbo.detach())
        assert mean <= log_p(model, {f"x{i}": x[f"x{i}"] for i in S})[0].item() + 4 * error


# ------------------------------------------------------------------------- written out by hand


def by_hand(model, x, subsets, noise):
    """The ELBO of each subset: the universal expert, the weights λ and β; (S, B)."""
    values = []
    for s, S in enumerate(subsets):
        T, weighted = torch.ones(6, 3), torch.zeros(6, 3)
        for i in S:
            mu, logvar = model.encoders[i](x["abcde"[i]]).chunk(2, -1)
            T, weighted = T + torch.exp(-logvar), weighted + torch.exp(-logvar) * mu
        q = Normal(weighted / T, T**-0.5)
        decoded = model.decode(q.mean + q.stddev * noise[s])
        value = -model.beta * kl_divergence(q, Normal(0.0, 1.0)).sum(-1)
        for i in S:
            m = model.modalities[i]
            value = value + m.weight * decoded[m.name].log_prob(x[m.name])
        values.append(value)
    return torch.stack(values)


def test_objective_is_the_sum_of_joint_unimodal_and_random_elbos(float64, fixed_noise, monkeypatch):
    """Fault 14: likelihood weights belong to the unimodal ELBOs too. A subset that is drawn twice
    counts twice."""
    model, x = five(beta=1.7, random_subsets=3)
    drawn = [(1, 3), (0, 1, 2, 4), (1, 3)]
    left = iter(drawn)
    monkeypatch.setattr(mvae, "random_subset", lambda M: next(left))
    value, terms = model(x)
    subsets = [(0, 1, 2, 3, 4), *((i,) for i in range(5)), *drawn]
    noise = torch.randn_like(torch.empty(9, 6, 3))
    expected = by_hand(model, x, subsets, noise)
    exact.assert_equal_with_gradients(model, value, expected.sum(0))
    assert list(terms) == ["kl", *(f"log_px/{name}" for name in "abcde")]


def test_value_is_the_same_in_training_and_evaluation(float64):
    """Fault 9: what is reported is what is optimised: weights, samples, β and all."""
    model, x = five(beta=1.7)
    torch.manual_seed(0)
    trained, trained_terms = model.train()(x)
    with torch.no_grad():
        torch.manual_seed(0)
        value, terms = model.eval()(x)
    assert value.equal(trained) and terms == trained_terms


def test_mopoe_with_the_full_set_and_the_prior_expert_is_the_joint_elbo(float64, fixed_noise):
    model, x = five(beta=1.7)
    other = MoPoE(model.modalities, 3, beta=1.7, subsets="full", prior_expert=True)
    other.load_state_dict(model.state_dict())
    joint, *_ = model.elbos(x, [(0, 1, 2, 3, 4)])
    torch.testing.assert_close(joint[0], other(x)[0], rtol=1e-12, atol=1e-12)


def test_annealing_scales_the_kl(float64):
    model, x = five(beta=2.0)
    subsets, found = [(0, 1, 2, 3, 4), (2,)], []
    for annealing in (0.0, 0.5, 1.0):
        model.annealing.fill_(annealing)
        torch.manual_seed(0)
        elbos, kl, *_ = model.elbos(x, subsets)
        found.append(elbos + 2.0 * annealing * kl)
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[0], found[2])


def test_annealing_is_as_long_as_the_papers():
    """Wu & Goodman 2018, supplement, Section 1."""
    found = {name: of.get("anneal_epochs", 0) for name, of in mvae.DEFAULTS.items()}
    of_mnist = "mnist-label", "binary-mnist-label", "fashion-label", "multimnist"
    assert {found[name] for name in of_mnist} == {200}
    assert found["celeba-attr"] == found["celeba19"] == 20


def test_annealing_rises_linearly_from_zero_and_goes_on_when_resumed(tmp_path, monkeypatch):
    seen, objective = [], MVAE.objective

    def recorded(model, x, observed=None):
        seen.append(model.annealing.item())
        return objective(model, x, observed)

    monkeypatch.setattr(MVAE, "forward", recorded)
    path = run("mvae", tmp_path, "--anneal-epochs", "2", "--epochs", "1", "--no-eval")
    resume("mvae", path, "--epochs", "3")
    steps = 200 // 16
    expected = [min(1.0, step / (2 * steps)) for step in range(3 * steps)]
    assert seen == pytest.approx(expected, abs=1e-6)


def test_a_run_shorter_than_the_annealing_says_so(tmp_path, capsys):
    run("mvae", tmp_path, "--anneal-epochs", "8", "--epochs", "2", "--no-eval")
    assert "--anneal-epochs 8: β ends at 0.25 times --beta" in capsys.readouterr().out
    run("mvae", tmp_path, "--anneal-epochs", "2", "--epochs", "2", "--no-eval")
    assert "--anneal-epochs" not in capsys.readouterr().out


# ---------------------------------------------------------------- products without the prior


def test_quotient_multiplies_experts_and_divides_by_the_prior(float64):
    """q(z|x_S) ∝ Π q(z|x_i) / p(z)^(|S| - 1), as densities over a grid, up to a factor."""
    model = MVAE(modalities(3), 1, product="quotient")
    x = {name: t.double() for name, t in sample_x(model, 1).items()}
    grid = torch.linspace(-4, 4, 101)[:, None, None]
    for S in ([0], [0, 2], [0, 1, 2]):
        log_q = -(len(S) - 1) * model.prior().log_prob(grid)
        for i in S:
            raw = model.encoders[i](x[f"x{i}"])
            scale = (1.5 * torch.sigmoid(raw[:, 1:])).sqrt()  # V = M / (M - 1) sigmoid(.)
            log_q = log_q + Normal(raw[:, :1], scale).log_prob(grid).squeeze(-1)
        q = model.posterior({f"x{i}": x[f"x{i}"] for i in S})
        difference = q.log_prob(grid) - log_q
        torch.testing.assert_close(difference, difference[:1].expand_as(difference))


@pytest.mark.parametrize("M", [2, 5, 19])
def test_the_quotient_is_right_in_float32(M):
    """Given all, the precision is Σ 1/V_i - (M - 1) = (M - 1)/M Σ exp(-c_i), of terms that nearly
    cancel for large outputs c_i; they end at 10."""
    model = MVAE(modalities(M), 1, product="quotient")
    x = sample_x(model, 1)
    for c in (-20.0, 0.0, 5.0, 10.0, 13.0, 30.0, 1e9):
        for e in model.encoders:
            e[1].weight.data.zero_()
            e[1].bias.data = torch.tensor([0.5, c])
        q, end = model.posterior(x), math.exp(-min(c, 10.0))
        assert q.variance.item() == pytest.approx(1 / ((M - 1) * end), rel=2e-3)
        assert q.mean.item() == pytest.approx(0.5 * (1 + end) / end, rel=2e-3)


def test_constrained_variances_always_leave_a_density(float64):
    """However the encoders' outputs are, the quotient has a positive, finite variance."""
    model = MVAE(modalities(4), 2, product="quotient")
    x = sample_x(model, 50)
    for e in model.encoders:
        e[1].weight.data *= 100
    _, logvar = model.encode(x)
    assert logvar.max().item() <= math.log(4 / 3)
    for S in ([0], [1, 3], [0, 1, 2, 3]):
        q = model.posterior({f"x{i}": x[f"x{i}"] for i in S})
        assert q.variance.isfinite().all() and (q.variance > 0).all()
    value, _ = model(x)
    value.sum().backward()
    assert value.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters())


# ------------------------------------------------------------------------------ random subsets


def test_random_subsets_have_uniform_sizes_and_members():
    torch.manual_seed(0)
    drawn = [mvae.random_subset(5) for _ in range(12_000)]
    assert all(len(set(S)) == len(S) and tuple(sorted(S)) == S for S in drawn)
    for size, subsets in ((2, 10), (3, 10), (4, 5)):
        chosen = [S for S in drawn if len(S) == size]
        error = (12_000 * (1 / 3) * (2 / 3)) ** 0.5
        assert abs(len(chosen) - 4000) < 4 * error
        counts = torch.tensor([chosen.count(S) for S in set(chosen)])
        assert len(counts) == subsets
        expected = len(chosen) / subsets
        assert (counts - expected).abs().max() < 4.5 * expected**0.5


def test_nineteen_modalities_run_only_what_a_term_needs(float64, monkeypatch):
    """Each modality is encoded once; its decoder sees the terms it belongs to; no 2^19 subsets."""
    model = MVAE(modalities(19), 2, random_subsets=2)
    x = sample_x(model, 4)
    drawn = [(2, 5, 11), (5, 18)]
    left = iter(drawn)
    monkeypatch.setattr(mvae, "random_subset", lambda M: next(left))
    encoded, decoded = [], {}
    for i, (e, d) in enumerate(zip(model.encoders, model.decoders, strict=True)):
        e.register_forward_hook(lambda *_, i=i: encoded.append(i))
        d.register_forward_hook(lambda _, inputs, __, i=i: decoded.update({i: inputs[0].shape}))
    value, _ = model(x)
    value.sum().backward()
    assert encoded == list(range(19))
    terms = {i: 2 + sum(i in S for S in drawn) for i in range(19)}
    assert {i: tuple(shape) for i, shape in decoded.items()} == {
        i: (n, 4, 2) for i, n in terms.items()
    }


def test_random_subsets_of_two_modalities_are_refused():
    with pytest.raises(UserError, match="--random-subsets 1"):
        MVAE(modalities(2), 2, random_subsets=1)


def test_random_subsets_are_not_compiled():
    options = ["--random-subsets", "1"]
    assert mvae.arguments(options).compile is False
    with pytest.raises(UserError, match="--compile"):
        mvae.arguments([*options, "--compile"])


# ------------------------------------------------------------------------ missing modalities


@pytest.mark.parametrize("product", ["universal", "quotient"])
@pytest.mark.parametrize("private_dim", [0, 2])
def test_masked_value_is_that_of_the_model_without_them(float64, product, private_dim, monkeypatch):
    """All 31 masks: as if the masked modalities did not exist, and no subset counts twice. The
    bound of the variances stays that of five modalities."""
    model, x = five(product=product, private_dim=private_dim)
    noise = torch.randn(6, 6, 3 + 5 * private_dim)
    for mask in MASKS:
        kept = [i for i, given in enumerate(mask) if given]
        small = MVAE([model.modalities[i] for i in kept], 3, private_dim, product=product)
        for i, k in enumerate(kept):
            small.encoders[i], small.decoders[i] = model.encoders[k], model.decoders[k]
        latents = torch.tensor([True] * 3 + [m for m in mask for _ in range(private_dim)])
        terms = noise[[0, *(1 + i for i in kept)]][..., latents]
        if product == "quotient":
            small.encode = lambda x, kept=kept: [t[kept] for t in model.encode(x)]
        found = []
        for m, rows, observed in (
            (small, terms, None),
            (model, noise, torch.tensor(mask).expand(6, 5)),
        ):
            monkeypatch.setattr(torch, "randn_like", lambda t, rows=rows: rows)
            found.append(m({k.name: x[k.name] for k in m.modalities}, observed))
        torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-12, atol=1e-12)
        for name, value in found[0][1].items():
            torch.testing.assert_close(found[1][1][name], value)


@pytest.mark.parametrize("product", ["universal", "quotient"])
@pytest.mark.parametrize("private_dim", [0, 2])
def test_masked_content_changes_neither_value_nor_gradient(float64, product, private_dim):
    settings = dict(product=product, private_dim=private_dim, random_subsets=3)
    exact.assert_masked_content_is_unread(*five(**settings))


@pytest.mark.parametrize("product", ["universal", "quotient"])
@pytest.mark.parametrize("private_dim", [0, 2])
def test_streams_are_the_masked_batch(float64, monkeypatch, product, private_dim):
    """A complete tuple is decoded given all and given each, a modality alone once."""
    model, x = five(product=product, private_dim=private_dim)
    exact.assert_streams_are_the_masked_batch(model, x, monkeypatch, 2 * 5 + 5)


def test_terms_are_given_all_that_is_observed(float64, monkeypatch):
    exact.assert_terms_are_given_all_that_is_observed(*five(), monkeypatch)


def test_a_random_subset_counts_where_what_is_left_of_it_is_new(float64, fixed_noise, monkeypatch):
    """Not where one modality or all that an example has is left, whose ELBOs are there already."""
    model, x = five(random_subsets=1)
    monkeypatch.setattr(mvae, "random_subset", lambda M: (0, 1, 3))
    for mask, left in (
        ([1, 1, 1, 1, 1], (0, 1, 3)),
        ([1, 1, 1, 0, 0], (0, 1)),
        ([1, 0, 1, 0, 1], None),
        ([0, 0, 1, 0, 1], None),
        ([1, 1, 0, 0, 0], None),
    ):
        observed = torch.tensor(mask).bool().expand(6, 5)
        O = tuple(i for i, seen in enumerate(mask) if seen)
        subsets = [O, *((i,) for i in range(5)), left or O]
        counted = [0, *(1 + i for i in O), *([6] if left else [])]
        noise = torch.randn_like(torch.empty(7, 6, 3))
        expected = by_hand(model, x, subsets, noise)[counted].sum(0)
        torch.testing.assert_close(model(x, observed)[0], expected, rtol=1e-12, atol=1e-12)


def test_private_latent_of_an_absent_modality_follows_its_prior(float64):
    exact.assert_private_latent_of_an_absent_modality_follows_its_prior(*five(private_dim=2))


def test_posterior_is_the_training_posterior(float64):
    """Of every subset, private latents and all: the objective's KL is that of `posterior`."""
    for product in ("universal", "quotient"):
        model, x = five(private_dim=2, product=product)
        subsets = [(0, 1, 2, 3, 4), (3,), (0, 4)]
        _, kl, *_ = model.elbos(x, subsets)
        for value, S in zip(kl, subsets, strict=True):
            q = model.posterior({"abcde"[i]: x["abcde"[i]] for i in S})
            torch.testing.assert_close(value, kl_divergence(q, model.prior().expand((6,))))
