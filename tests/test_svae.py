"""svae.py and vaevae.py against the papers' expressions by hand and against exact posteriors."""

import itertools

import exact
import pytest
import torch
from exact import (
    MASKS,
    importance_sampled,
    log_p,
    mean_and_error,
    modalities,
    repeat,
    sample_x,
    set_decoders,
)
from torch.distributions import Independent, MixtureSameFamily, Normal, kl_divergence

from common import Streams, UserError, product_of_gaussians
from svae import SVAE
from vaevae import VAEVAE

MODELS = [
    pytest.param(lambda mods, D, **o: SVAE(mods, D, **o), id="svae"),
    pytest.param(lambda mods, D, **o: VAEVAE(mods, D, joint="network", **o), id="vaevae"),
    pytest.param(lambda mods, D, **o: VAEVAE(mods, D, joint="poe", **o), id="vaevae-poe"),
]
every_model = pytest.mark.parametrize("make", MODELS)
every_objective = pytest.mark.parametrize("objective", ["svae", "vaevae"])
PRIOR = Independent(Normal(torch.zeros(3).double(), torch.ones(3).double()), 1)


def five(M=5):
    mods, x = exact.five()
    names = [m.name for m in mods[:M]]
    return mods[:M], {name: x[name] for name in names}


def diagonal(head):
    mu, logvar = head.chunk(2, -1)
    return Independent(Normal(mu, torch.exp(0.5 * logvar)), 1)


def product(*experts):
    """The product of diagonal Gaussians by its formula."""
    T = sum(1 / q.variance for q in experts)
    mean = sum(q.mean / q.variance for q in experts) / T
    return Independent(Normal(mean, T**-0.5), 1)


def seeded_noise(mean):
    """Noise (..., D) that depends on a posterior's mean alone, row by row, so that a posterior gets
    the same wherever it is sampled."""
    rows = mean.detach().reshape(-1, mean.shape[-1])
    seeds = (rows.abs().sum(-1) * 1e6).long() % 2**31
    generator, noise = torch.Generator(), []
    for seed in seeds.tolist():
        noise.append(torch.randn(rows.shape[1:], generator=generator.manual_seed(seed)))
    return torch.stack(noise).view(mean.shape)


@pytest.fixture
def noise(monkeypatch):
    monkeypatch.setattr(torch, "randn_like", seeded_noise)
    return seeded_noise


def likelihoods(model, q, x, names, noise):
    """Σ over names of λ log p(x_i|z) at the one sample of q."""
    z = q.mean + q.stddev * noise(q.mean)
    p = model.decode(z)
    weight = {m.name: m.weight for m in model.modalities}
    return sum(weight[name] * p[name].log_prob(x[name]) for name in names)


def posteriors(model, x):
    """{S: (mean, log-variance)}, (F, B, D) each, of the F forms of q(z|x_S)."""
    found = {}
    for n, (mu, logvar) in model.posteriors(x, len(x["a"])).items():
        for S in dict.fromkeys(model.of_size[n]):
            forms = [i for i, other in enumerate(model.of_size[n]) if other == S]
            found[S] = mu[forms], logvar[forms]
    return found


def kl(q, p=PRIOR):
    return kl_divergence(q, p.expand(q.batch_shape))


# --------------------------------------------------------------------- two modalities, Eq. (3)-(10)


def two_by_hand(model, x, objective, joint, q1, q2, noise):
    """Eq. (7) for complete tuples, or Wu and Goodman's without the unimodal ELBOs; β = 1.3."""
    value = likelihoods(model, joint, x, "ab", noise) - 1.3 * (kl(joint, q1) + kl(joint, q2))
    if objective == "svae":
        value = value + likelihoods(model, q1, x, "a", noise) - 1.3 * kl(q1)
        value = value + likelihoods(model, q2, x, "b", noise) - 1.3 * kl(q2)
    return value


@every_objective
def test_svae_of_two_modalities_by_hand(float64, noise, objective):
    """Fault 14: the SVAE paper's code swaps the two objectives against its own README."""
    mods, x = five(2)
    model = SVAE(mods, 3, beta=1.3, objective=objective)
    e = [[diagonal(model.encoders[f][k](x["ab"[f]])) for f in range(2)] for k in range(2)]
    joint = product(e[0][0], e[1][1])  # Eq. (3)
    q1 = product(e[0][0], e[1][0])  # Eq. (4): the second is q2*(z|x1)
    q2 = product(e[1][1], e[0][1])  # Eq. (5)
    expected = two_by_hand(model, x, objective, joint, q1, q2, noise)
    exact.assert_equal_with_gradients(model, model(x)[0], expected)
    for given, q in (("ab", joint), ("a", q1), ("b", q2)):
        torch.testing.assert_close(model.posterior({n: x[n] for n in given}).mean, q.mean)
        torch.testing.assert_close(model.posterior({n: x[n] for n in given}).stddev, q.stddev)


@every_objective
@pytest.mark.parametrize("joint", ["network", "poe"])
def test_vaevae_of_two_modalities_by_hand(float64, noise, objective, joint):
    mods, x = five(2)
    model = VAEVAE(mods, 3, beta=1.3, joint=joint, objective=objective)
    q1, q2 = (diagonal(model.encoders[i](x["ab"[i]])) for i in range(2))
    both = product(q1, q2)  # variant (a)
    if joint == "network":
        network = model.joint_encoders["a+b"]
        features = torch.cat([network.encoders[i](x["ab"[i]]) for i in range(2)], -1).relu()
        hidden = network.join[1](features).relu()
        both = diagonal(network.join[3](hidden))
        own = {id(p) for p in network.parameters()}
        assert not own & {id(p) for e in model.encoders for p in e.parameters()}
    expected = two_by_hand(model, x, objective, both, q1, q2, noise)
    exact.assert_equal_with_gradients(model, model(x)[0], expected)
    q = model.posterior(x)
    torch.testing.assert_close(q.mean, both.mean)
    torch.testing.assert_close(q.stddev, both.stddev)


@every_objective
def test_svae_with_flat_starred_experts_is_vaevae_with_a_product(float64, monkeypatch, objective):
    """A starred expert of log-variance 30 leaves a product as it is, but for 1e-13."""
    mods, x = five(2)
    svae = SVAE(mods, 3, objective=objective)
    vaevae = VAEVAE(mods, 3, joint="poe", objective=objective)
    vaevae.decoders = svae.decoders
    for i in range(2):
        vaevae.encoders[i] = svae.encoders[i][i]
        starred = svae.encoders[i][1 - i][1]
        starred.weight.data.zero_()
        starred.bias.data = torch.tensor([0.0] * 3 + [30.0] * 3)
    standard = torch.randn(6, 3)
    monkeypatch.setattr(torch, "randn_like", lambda t: standard.expand(t.shape))
    torch.testing.assert_close(svae(x)[0], vaevae(x)[0], rtol=1e-11, atol=1e-11)


# ---------------------------------------------------------------------- three modalities, App. D


@every_objective
def test_svae_of_three_modalities_by_hand(float64, noise, objective):
    """(D.28)-(D.36) in the reading of the docstring: f(q(z|x_i,x_j)) = f(q^i) + f(q^j)."""
    mods, x = five(3)
    model = SVAE(mods, 3, beta=1.3, objective=objective)
    e = [[diagonal(model.encoders[f][k](x["abc"[f]])) for f in range(3)] for k in range(3)]
    whole = product(e[0][0], e[1][1], e[2][2])  # (D.32)
    pairs, singles = {}, []
    for i, j, k in ((0, 1, 2), (0, 2, 1), (1, 2, 0)):
        pairs[i, j] = [product(e[i][i], e[j][j], e[k][f]) for f in (i, j)]  # (D.34), (D.35)
    for i in range(3):
        singles.append(product(e[0][i], e[1][i], e[2][i]))  # (D.36)

    value = likelihoods(model, whole, x, "abc", noise)  # (D.28)
    for forms in pairs.values():
        value = value - 1.3 * sum(kl(whole, q) for q in forms)
    for (i, j), forms in pairs.items():  # (D.29)
        for q in forms:
            value = value + likelihoods(model, q, x, ["abc"[i], "abc"[j]], noise)
            value = value - 1.3 * (kl(q, singles[i]) + kl(q, singles[j]) + kl(q))
    if objective == "svae":
        for i, q in enumerate(singles):  # as in Eq. (7)
            value = value + likelihoods(model, q, x, "abc"[i], noise) - 1.3 * kl(q)
    exact.assert_equal_with_gradients(model, model(x)[0], value)


@every_objective
@pytest.mark.parametrize("joint", ["network", "poe"])
def test_vaevae_of_three_modalities_by_hand(float64, noise, objective, joint):
    mods, x = five(3)
    model = VAEVAE(mods, 3, beta=1.3, joint=joint, objective=objective)
    q = {name: diagonal(e(x[name])) for name, e in zip("abc", model.encoders, strict=True)}
    for S in ("ab", "ac", "bc", "abc"):
        if joint == "network":
            network = model.joint_encoders["+".join(S)]
            features = [e(x[name]) for e, name in zip(network.encoders, S, strict=True)]
            q[S] = diagonal(network.join(torch.cat(features, -1)))
        else:
            q[S] = product(*(q[name] for name in S))
    value = likelihoods(model, q["abc"], x, "abc", noise)  # (D.28)
    value = value - 1.3 * sum(kl(q["abc"], q[S]) for S in ("ab", "ac", "bc"))
    for S in ("ab", "ac", "bc"):  # (D.29)
        value = value + likelihoods(model, q[S], x, S, noise)
        value = value - 1.3 * (kl(q[S], q[S[0]]) + kl(q[S], q[S[1]]) + kl(q[S]))
    if objective == "svae":
        for name in "abc":  # as in Eq. (7)
            value = value + likelihoods(model, q[name], x, name, noise) - 1.3 * kl(q[name])
    exact.assert_equal_with_gradients(model, model(x)[0], value)


def test_forms_of_more_than_three_modalities(float64):
    """One filler for all missing experts; the whole has one form, every other subset |S|."""
    mods, x = five(5)
    model = SVAE(mods, 3)
    mu, logvar = posteriors(model, x)["b", "d"]
    assert mu.shape == (2, 6, 3)
    for form, filler in enumerate((1, 3)):
        experts = [diagonal(model.encoders[i][i](x["abcde"[i]])) for i in (1, 3)]
        experts += [diagonal(model.encoders[filler][k](x["abcde"[filler]])) for k in (0, 2, 4)]
        q = product(*experts)
        torch.testing.assert_close(mu[form], q.mean)
        torch.testing.assert_close(logvar[form], q.variance.log())
    shapes = {S: len(q[0]) for S, q in posteriors(model, x).items()}
    assert shapes == {S: 1 if len(S) == 5 else len(S) for S in shapes} and len(shapes) == 31


# ------------------------------------------------------------------------- exact posteriors


def exact_posterior(model, x, S):
    """Mean and log-variance of the exact p(z|x_S) of the linear-Gaussian model."""
    T, weighted = torch.ones(2), torch.zeros(len(x["x0"]), 2)
    for m, d in zip(model.modalities, model.decoders, strict=True):
        if m.name in S:
            W, b = d.net[0].weight.data, d.net[0].bias.data
            T = T + W.square().sum(0) / m.scale**2
            weighted = weighted + (x[m.name] - b) @ W / m.scale**2
    return weighted / T, (-T.log()).expand_as(weighted)


def with_exact_posteriors(make, M, shift=0.0, **kwargs):
    """A model whose posteriors are exact, all but those of one modality displaced by shift."""
    model = make(modalities(M), 2, **kwargs)
    set_decoders(model)

    def posteriors(x, complete):
        q = {}
        for n in range(1, len(x) + 1):
            found = [exact_posterior(model, x, S) for S in itertools.combinations(x, n)]
            q[n] = tuple(torch.stack(t) for t in zip(*found, strict=True))
            q[n] = q[n][0] + shift * (n > 1), q[n][1]
        return q

    model.posteriors = posteriors
    if isinstance(model, SVAE):  # each S has one form
        one_form = VAEVAE(modalities(M), 2, joint="poe")
        model.of_size = one_form.of_size
        for name, table in one_form.named_buffers():
            setattr(model, name, table)
    return model


@every_model
@pytest.mark.parametrize("M", [2, 3])
def test_exact_posteriors_make_the_terms_exact(float64, make, M):
    """E_q[log p(x_i|z)] - KL(q(z|x_S) || q(z|x_S without x_i)) = log p(x_i|x_S without x_i), where
    the posteriors are exact; for two modalities all terms together are 2 log p(x1,x2)."""
    model = with_exact_posteriors(make, M, objective="svae")
    x = repeat(sample_x(model, 1), 20_000)
    one = {name: t[:1] for name, t in x.items()}
    exact, expected = {(): 0.0}, 0.0
    for n in range(1, M + 1):
        for S in itertools.combinations(x, n):
            exact[S] = log_p(model, {name: one[name] for name in S}).item()
            expected += sum(exact[S] - exact[rest] for rest in itertools.combinations(S, n - 1))
            if 1 < n < M:
                q = diagonal(torch.cat(exact_posterior(model, one, S), -1))
                expected -= kl(q, model.prior()).item()
    if M == 2:
        assert expected == pytest.approx(2 * exact["x0", "x1"])
    mean, error = mean_and_error(model(x)[0].detach())
    assert mean == pytest.approx(expected, abs=4 * error)


@every_model
def test_objective_of_two_modalities_bounds_twice_log_p(float64, make):
    """Eq. (7) bounds 2 log p(x1,x2) where q(z|x_i) is exact, whatever q(z|x1,x2) is."""
    model = with_exact_posteriors(make, 2, shift=0.4, objective="svae")
    x = repeat(sample_x(model, 1), 20_000)
    mean, error = mean_and_error(model(x)[0])
    assert mean + 4 * error < 2 * log_p(model, x)[0].item()


@every_model
def test_one_modality_alone_has_its_elbo(float64, make):
    model = with_exact_posteriors(make, 3)
    x = repeat(sample_x(model, 1), 20_000)
    observed = torch.tensor([False, True, False]).expand(20_000, 3)
    mean, error = mean_and_error(model(x, observed)[0])
    exact = log_p(model, {"x1": x["x1"]})[0].item()
    assert mean == pytest.approx(exact, abs=4 * error + 1e-9)


# ------------------------------------------------------------ one subset of each tuple, for all


@every_model
@every_objective
def test_stratified_terms_are_all_terms_in_expectation(float64, monkeypatch, make, objective):
    """Every subset once with each of 27 tuples: over these draws the mean of value, gradients and
    terms is that of the whole objective, also where 25 subsets share the tuples unevenly."""
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    mods, x = five()
    x = {name: t[torch.arange(27) % 6] for name, t in x.items()}
    model, found = make(mods, 3, beta=1.3, objective=objective), []
    for expectation, draws in (("all", 1), ("stratified", 27)):
        sums = [0.0] * (7 + len(list(model.parameters())))
        for draw in range(draws):
            monkeypatch.setattr(
                torch, "randperm", lambda n, device, k=draw: torch.arange(n).roll(k)
            )
            model.expectation = expectation
            model.zero_grad()
            value, terms = model(x)
            value.sum().backward()
            got = value.detach(), *terms.values(), *(p.grad for p in model.parameters())
            sums = [a + b / draws for a, b in zip(sums, got, strict=True)]
        found.append(sums)
    for whole, mean in zip(*found, strict=True):
        torch.testing.assert_close(whole, mean, rtol=1e-10, atol=1e-10)


@every_model
def test_stratified_decodes_each_subset_for_its_share_of_the_batch(float64, make):
    """50 tuples, two for each of the 25 subsets between."""
    mods, x = five()
    model, decoded = make(mods, 3, objective="svae", expectation="stratified"), []
    for d in model.decoders:
        d.register_forward_hook(lambda _, inputs, __: decoded.append(inputs[0][..., 0].numel()))
    Streams(model)({name: t[torch.arange(100) % 6] for name, t in x.items()})
    forms = [len(S) ** (2 if isinstance(model, SVAE) else 1) for S in between(5)]
    assert sum(decoded) == 50 * (5 + 5 + 5) + 2 * sum(forms)


def between(M):
    return [S for n in range(2, M) for S in itertools.combinations(range(M), n)]


@every_model
def test_stratified_takes_every_subset_of_masked_or_few_tuples(float64, noise, make):
    mods, x = five()
    many = {name: t[torch.arange(30) % 6] for name, t in x.items()}
    masked = torch.tensor([True, True, False, True, True]).expand(30, 5)
    model = make(mods, 3)
    for batch in ((x,), (many, masked)):
        found = []
        for model.expectation in ("all", "stratified"):
            found.append(model(*batch)[0])
        assert found[0].equal(found[1])


# ------------------------------------------------------------- masks, streams, other posteriors


@every_model
@every_objective
def test_streams_are_the_masked_batch(float64, monkeypatch, make, objective):
    """A complete tuple is decoded given every form of every subset with terms, a modality alone
    once."""
    mods, x = five()
    model = make(mods, 3, objective=objective)
    sizes = [len(S) for n in range(1, 6) for S in itertools.combinations(range(5), n)]
    per_tuple = sum(
        n * (n if isinstance(model, SVAE) and n < 5 else 1)
        for n in sizes
        if n > 1 or objective == "svae"
    )
    exact.assert_streams_are_the_masked_batch(model, x, monkeypatch, per_tuple + 5)


@every_model
@every_objective
def test_masked_content_changes_neither_value_nor_gradient(float64, make, objective):
    mods, x = five()
    exact.assert_masked_content_is_unread(make(mods, 3, objective=objective), x)


@every_model
@every_objective
def test_terms_are_given_all_that_is_observed(float64, make, objective, monkeypatch):
    mods, x = five()
    model = make(mods, 3, objective=objective)
    exact.assert_terms_are_given_all_that_is_observed(model, x, monkeypatch)


@every_objective
@pytest.mark.parametrize("joint", ["network", "poe"])
def test_masked_value_of_vaevae_is_that_of_the_model_without_them(float64, noise, joint, objective):
    """All 15 masks of four modalities: as if the masked ones did not exist."""
    mods, x = five(4)
    model = VAEVAE(mods, 3, joint=joint, objective=objective)
    for mask in itertools.product([False, True], repeat=4):
        if not any(mask):
            continue
        kept = [i for i, given in enumerate(mask) if given]
        small = VAEVAE([mods[i] for i in kept], 3, joint=joint, objective=objective)
        for i, k in enumerate(kept):
            small.encoders[i], small.decoders[i] = model.encoders[k], model.decoders[k]
        for name in small.joint_encoders:
            small.joint_encoders[name] = model.joint_encoders[name]
        value, terms = model(x, torch.tensor(mask).expand(6, 4))
        expected, expected_terms = small({m.name: x[m.name] for m in small.modalities})
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
        for name, term in expected_terms.items():
            torch.testing.assert_close(terms[name], term)


@every_objective
def test_masked_value_of_svae_has_the_terms_of_the_observed_subsets(float64, noise, objective):
    """All 31 masks. Fillers stand in for masked modalities, as at test time, so the subsets' forms
    are those of the whole model; the terms are the observed modalities'."""
    mods, x = five()
    model = SVAE(mods, 3, objective=objective)
    q = {
        S: [diagonal(torch.cat(form, -1)) for form in zip(*forms, strict=True)]
        for S, forms in posteriors(model, x).items()
    }
    for mask in MASKS:
        O = [name for name, given in zip("abcde", mask, strict=True) if given]
        expected = 0.0
        for n in range(1, len(O) + 1):
            if n == 1 and objective == "vaevae" and len(O) > 1:
                continue
            for S in itertools.combinations(O, n):
                for form in q[S]:
                    expected = expected + likelihoods(model, form, x, S, noise)
                    if n == 1 or n < len(O):
                        expected = expected - kl(form)
                    for rest in itertools.combinations(S, n - 1) if n > 1 else ():
                        expected = expected - sum(kl(form, other) for other in q[rest])
        value, _ = model(x, torch.tensor(mask).expand(6, 5))
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)


@every_model
def test_posterior_is_that_of_training(float64, make):
    """Of every subset; where SVAE has several forms, their mixture."""
    mods, x = five()
    model = make(mods, 3)
    for S, (mu, logvar) in posteriors(model, x).items():
        q = model.posterior({name: x[name] for name in reversed(S)})
        assert q.batch_shape == (6,) and q.event_shape == (3,)
        if mu.ndim == 2 or len(mu) == 1:
            torch.testing.assert_close(q.mean, mu.view(6, 3))
            torch.testing.assert_close(q.variance, logvar.view(6, 3).exp())
        else:
            assert isinstance(q, MixtureSameFamily)
            z = torch.randn(6, 3)
            forms = Independent(Normal(mu, torch.exp(0.5 * logvar)), 1).log_prob(z)
            expected = torch.logsumexp(forms, 0) - torch.tensor(float(len(mu))).log()
            torch.testing.assert_close(q.log_prob(z), expected)


@every_model
def test_importance_weights_are_divided_by_their_number(float64, make):
    """Fault 6: without the division 1,000 samples add 6.91 nats."""
    model = make(modalities(2), 2)
    set_decoders(model)
    for p in model.parameters():
        p.data *= 0.5
    x = repeat(sample_x(model, 1), 2000)
    ratio = torch.exp(importance_sampled(model, model.posterior(x), x, 60) - log_p(model, x))
    mean, error = mean_and_error(ratio)
    assert mean == pytest.approx(1.0, abs=4 * error)


def test_products_are_those_of_the_formula():
    """Fault 7: the released code takes 1/σ for the precision and adds a unit expert to every
    product. Of N(0, 4) and N(3, 1) the product is N(2.4, 0.8)."""
    mu, logvar = torch.tensor([[0.0], [3.0]]), torch.tensor([[4.0], [1.0]]).log()
    mean, log_variance = product_of_gaussians(mu, logvar)
    assert mean.item() == pytest.approx(2.4) and log_variance.exp().item() == pytest.approx(0.8)
    released = torch.tensor([1 / 2, 1.0, 1.0])  # precisions, the unit expert's the last
    assert 3.0 * released[1] / released.sum() == pytest.approx(1.2)


# ---------------------------------------------------------------------------- what it costs


def test_too_many_modalities_are_refused_with_count_and_cost():
    many = modalities(7)
    for make, fragments in (
        (lambda: VAEVAE(many, 2), ["127 posteriors", "120 joint networks", "441 encoders"]),
        (lambda: VAEVAE(many, 2, joint="poe"), ["127 posteriors", "448 decodings", "at most 6"]),
        (lambda: SVAE(many, 2), ["442 posteriors", "49 encoders", "at most 6"]),
    ):
        with pytest.raises(UserError) as error:
            make()
        assert all(fragment in str(error.value) for fragment in fragments)
    for n, count in ((6, 57), (2, 1)):
        assert len(VAEVAE(modalities(n), 2).joint_encoders) == count
        assert sum(len(j.encoders) for j in VAEVAE(modalities(n), 2).joint_encoders.values()) == (
            n * (2 ** (n - 1) - 1)
        )
    assert sum(map(len, SVAE(modalities(6), 2).of_size.values())) == 6 * 2**5 - 6 + 1
