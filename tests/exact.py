"""A multimodal model whose likelihood and posteriors are known exactly.

p(z) = N(0, I), p(x_i|z) = N(W_i z + b_i, s² I). The columns of W_i are orthogonal, so W_iᵀW_i is
diagonal and so is the posterior: given X its precision is I + Σ_i W_iᵀW_i / s². Experts of
precision T_i = W_iᵀW_i / s² + I / M multiply to that posterior; a smaller subset's product is wider
than it.
"""

import itertools

import pytest
import torch
from torch.distributions import MultivariateNormal, Normal

import common
import evaluate
from common import Modality

SCALE = 0.8
MASKS = list(itertools.product([False, True], repeat=5))[1:]  # of five modalities, one at least


def modalities(M, n=4, scale=SCALE):
    return [Modality(f"x{i}", (n,), "normal", scale, network="linear") for i in range(M)]


def set_decoders(model, seed=1):
    """Random decoders with orthogonal columns; W and b are read from the model."""
    generator = torch.Generator().manual_seed(seed)
    for net in (d.net[0] for d in model.decoders):
        n, D = net.weight.shape
        q = torch.linalg.qr(torch.randn(n, n, generator=generator)).Q[:, :D]
        net.weight.data = q * (0.5 + torch.rand(D, generator=generator))
        net.bias.data = torch.randn(n, generator=generator)


def set_exact_experts(model, widen=1.0, prior_precision=1.0):
    """Experts whose product over all modalities is the exact posterior; the linear encoder gives
    (mean, log-variance). widen multiplies every variance; prior_precision is the experts' share of
    the prior, 0 where the product has an expert for it."""
    M = len(model.modalities)
    for m, encoder, decoder in zip(model.modalities, model.encoders, model.decoders, strict=True):
        W, b = decoder.net[0].weight.data, decoder.net[0].bias.data
        D = W.shape[1]
        T = (W.square().sum(0) / m.scale**2 + prior_precision / M).to(W)
        C = W.T / m.scale**2 / T[:, None]
        encoder[1].weight.data = torch.cat([C, torch.zeros(D, W.shape[0])]).to(W)
        encoder[1].bias.data = torch.cat([-C @ b, -T.log() + torch.tensor(widen).log()]).to(W)


def log_p(model, x):
    """Exact log p(x) of the modalities in x, (B,)."""
    W, b, values, variances = [], [], [], []
    for m, decoder in zip(model.modalities, model.decoders, strict=True):
        if m.name in x:
            W.append(decoder.net[0].weight.data)
            b.append(decoder.net[0].bias.data)
            values.append(x[m.name])
            variances.append(torch.full((W[-1].shape[0],), m.scale**2))
    W, b = torch.cat(W), torch.cat(b)
    covariance = W @ W.T + torch.diag(torch.cat(variances)).to(W)
    return MultivariateNormal(b, covariance).log_prob(torch.cat(values, -1))


def elbo_in_closed_form(model, x, mu, logvar):
    """E_q[Σ log p(x_i|z)] - KL(q || p) for q = N(mu, var) and the linear-Gaussian likelihoods."""
    value = -common.gaussian_kl(mu, logvar)
    for m, decoder in zip(model.modalities, model.decoders, strict=True):
        W, b = decoder.net[0].weight, decoder.net[0].bias
        at_mean = Normal(mu @ W.T + b, m.scale).log_prob(x[m.name]).sum(-1)
        value = value + at_mean - (logvar.exp() @ W.square().sum(0)) / (2 * m.scale**2)
    return value


def sample_x(model, B):
    """x from the model itself, so that bounds are tested where the data lie."""
    z = model.prior().sample((B,))
    return {name: p.sample() for name, p in model.decode(z).items()}


def repeat(x, n):
    """One example n times over, so that the mean over the batch is a Monte-Carlo estimate."""
    return {name: value[:1].expand(n, *value.shape[1:]) for name, value in x.items()}


def mean_and_error(values):
    return values.mean().item(), (values.std() / len(values) ** 0.5).item()


def encoder_parameters(model):
    return [p for e in model.encoders for p in e.parameters()]


def mean_gradient(model, x, chunks=40, size=1000):
    """Gradient of the encoders' parameters, its mean over chunks and its standard error."""
    rows = repeat(x, size)
    found = []
    for _ in range(chunks):
        gradient = torch.autograd.grad(model(rows)[0].mean(), encoder_parameters(model))
        found.append(torch.cat([g.flatten() for g in gradient]))
    found = torch.stack(found)
    return found.mean(0), found.std(0) / chunks**0.5


def distance(one, other):
    """The largest difference of two estimated gradients in standard errors."""
    (a, error_a), (b, error_b) = one, other
    return ((a - b).abs() / (error_a.square() + error_b.square()).sqrt()).max().item()


def assert_equal_with_gradients(model, value, expected):
    """Values (B,) of the same noise, and the gradients of all parameters."""
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    used = [p for p in model.parameters() if p.requires_grad]
    slopes = [torch.autograd.grad(t.sum(), used, retain_graph=True) for t in (value, expected)]
    torch.testing.assert_close(*slopes, rtol=1e-10, atol=1e-10)


def five():
    """Five modalities, of every likelihood, and a batch of six tuples of them."""
    torch.manual_seed(3)
    mods = [
        Modality("a", (3,), "normal", 0.7, 2.0, "linear"),
        Modality("b", (2, 2), "laplace", 0.75, 1.0, "linear"),
        Modality("c", (4,), "bernoulli", weight=0.5, network="linear"),
        Modality("d", (), "categorical", categories=3, network="linear"),
        Modality("e", (2,), "categorical", weight=3.0, categories=4, network="linear"),
    ]
    x = {
        "a": torch.randn(6, 3),
        "b": torch.randn(6, 2, 2),
        "c": torch.rand(6, 4),
        "d": torch.randint(3, (6,)),
        "e": torch.randint(4, (6, 2)),
    }
    return mods, x


def assert_masked_content_is_unread(model, x):
    """NaN, infinity and impossible tokens behind the mask change neither value nor gradient; every
    pattern, mixed within a batch."""
    observed = torch.tensor(MASKS)
    x = {name: value[torch.arange(31) % 6] for name, value in x.items()}
    poison = {"a": torch.nan, "b": torch.inf, "c": -torch.inf, "d": 999, "e": -5}
    spoilt = {name: value.clone() for name, value in x.items()}
    for i, name in enumerate("abcde"):
        spoilt[name][~observed[:, i]] = poison[name]
    found = []
    for batch in (x, spoilt):
        model.zero_grad()
        torch.manual_seed(0)
        value, terms = model(batch, observed)
        value.sum().backward()
        found.append([value, *terms.values(), *(p.grad for p in model.parameters())])
    assert all(t.isfinite().all() for t in found[0] if t is not None)
    for clean, poisoned in zip(*found, strict=True):
        assert clean is poisoned or clean.equal(poisoned)


def assert_streams_are_the_masked_batch(model, x, monkeypatch, decodings):
    """Two complete rows and two of each of five modalities alone, as `common.Streams` takes them,
    have the value, terms and gradients of the masked batch, and so many rows are decoded for one
    row of every stream. The noise of a sample is that of all rows."""

    def noise(shape):
        samples = shape[:1] if len(shape) == 4 else (1,)  # (K, M, B, D), (S, B, D)
        eps = torch.randn(*samples, shape[-1], generator=torch.Generator().manual_seed(5))
        return eps.view(*samples, *[1] * (len(shape) - 2), -1).expand(shape)

    monkeypatch.setattr(torch, "randn_like", lambda t: noise(t.shape))
    monkeypatch.setattr(torch.distributions.normal, "_standard_normal", lambda s, **_: noise(s))
    observed = torch.cat([torch.ones(1, 5), torch.eye(5)]).bool().repeat_interleave(2, 0)
    x, decoded, found = {name: t[torch.arange(12) % 6] for name, t in x.items()}, [], []
    streams = {name: t[observed[:, i]] for i, (name, t) in enumerate(x.items())}
    for d in model.decoders:
        d.register_forward_hook(lambda _, inputs, __: decoded.append(inputs[0][..., 0].numel()))
    for call, *batch in ((model, x, observed), (common.Streams(model), streams)):
        decoded.clear()
        model.zero_grad()
        value, terms = call(*batch)
        value.sum().backward()
        found.append([value, terms, *(p.grad for p in model.parameters() if p.requires_grad)])
    assert [*found[0][1]] == [*found[1][1]]
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)
    assert sum(decoded) == 2 * decodings
    for names, mask in (("ab", None), ("a", observed)):
        with pytest.raises(ValueError, match="takes all modalities, masked .* or one alone"):
            model({name: x[name] for name in names}, mask)


def assert_private_latent_of_an_absent_modality_follows_its_prior(model, x):
    """For three shared dimensions and two private ones of each modality."""
    q = model.posterior({"b": x["b"]})
    absent = torch.ones(13, dtype=torch.bool)
    absent[:3] = absent[5:7] = False
    assert q.mean[:, absent].eq(0).all() and q.variance[:, absent].eq(1).all()
    assert not q.mean[:, ~absent].eq(0).any()


def assert_terms_are_given_all_that_is_observed(model, x, monkeypatch):
    """The logged log p(x_i|z) is the mean over the examples that have x_i, z from the posterior of
    all that an example has; here without noise, every pattern in one batch."""
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    observed = torch.tensor(MASKS)
    x = {name: value[torch.arange(31) % 6] for name, value in x.items()}
    _, terms = model(x, observed)
    for i, name in enumerate("abcde"):
        expected = []
        for row in observed[:, i].nonzero().flatten():
            given = [n for n, seen in zip("abcde", observed[row], strict=True) if seen]
            q = model.posterior({n: x[n][row : row + 1] for n in given})
            q = getattr(q, "component_distribution", q)  # the forms of SVAE
            log_p = model.decode(q.mean, [name])[name].log_prob(x[name][row])
            expected.append(log_p.mean())
        torch.testing.assert_close(terms[f"log_px/{name}"], torch.stack(expected).mean())


def importance_sampled(model, q, x, samples):
    """An estimate of log p(x) with the proposal q, (B,)."""
    log_w = evaluate.log_weights(model, q, x, samples, [(list(x), model.prior())])
    log_mean, _, _ = evaluate.weigh(log_w)
    return log_mean[0]
