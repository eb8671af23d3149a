"""MMVAE: Shi, Siddharth, Paige and Torr, "Variational Mixture-of-Experts Autoencoders for
Multi-Modal Deep Generative Models", NeurIPS 2019.

The posterior is the mean of the modalities' experts, q(z|x) = 1/M Σ_m q_m(z|x_m); the samples are
drawn evenly from the experts, and every density of the posterior is the mixture's own.

    python mmvae.py                                    polydigits, four minutes on two CPU cores
    python mmvae.py --dataset polymnist --beta 2.5     the setting of Sutter et al. 2021
    torchrun --nproc-per-node 8 mmvae.py ...           several GPUs

Expected on polydigits: coherence of the modalities not given 86 to 87 %, however many are given;
joint coherence 56 %; latent accuracy 87 to 90 %.

With w_m^k = p(z_m^k, x) / q(z_m^k|x) and z_m^k ~ q_m, k = 1 … K, `--objective` is one of
    elbo          mean of log w, Eq. (1)
    iwae          1/M Σ_m log 1/K Σ_k w_m^k, Eq. (3), the paper's own, looser bound
    iwae-tight    log of the mean of all M K weights, K in the supplement's Eq. (5)
    dreg          iwae with the doubly reparametrised gradient of Tucker et al. 2019 as published,
                  Eq. (8); biased for M > 1 and K > 1: it leaves out the mixture's scores at samples
                  of q_m, which no longer cancel over m once each expert's weights sum to 1
    dreg-tight    the same for iwae-tight, where samples of each expert leave it biased for M > 1
    dreg-mixture  iwae with the unbiased gradient derived in `doubly_reparametrised`
    elbo-is       elbo with component KLs, M decodings in place of M² (supplement, App. B); its
                  variance is finite only while no expert's scale is √2 (Laplace: 2) times another's
The value is always the bound itself, whatever the gradient. As K grows, iwae-tight rises to
log p(x), but iwae only to 1/M Σ_m log E_q_m[w], which is at most that.
"""

import argparse
import itertools
import math
import time

import torch
from torch import nn
from torch.distributions import Categorical, Independent, Laplace, MixtureSameFamily, Normal
from torch.distributions.kl import kl_divergence

import common
import datasets
import evaluate
from common import UserError, abreast, bounded, decoder, encoder, hide, likelihood, log_mean_exp

# As Sutter et al. 2021 compare it (App. B, B.1): Gaussians and no importance samples. Their code
# has --kl components, and decodes one sample of one expert.
COMPARED = dict(distribution="normal", scales="free", objective="elbo", K=1)
# As in its own paper: Laplace, scales that sum to D, DReG on the looser bound, AMSGrad.
SHI = dict(distribution="laplace", scales="sum", learn_prior=True, objective="dreg", amsgrad=True)
DEFAULTS = datasets.settings(
    dict.fromkeys(datasets.SETTINGS, COMPARED)
    | {
        "mnist-svhn": SHI | dict(K=30),
        # Normal as in the released code, the paper has Laplace; the code's scales are a softplus,
        # the prior's too, where here they are exponentials, and the prior's sum to D.
        "cub": SHI | dict(distribution="normal", scales="free", K=50),
        # Sutter et al. 2021, App. E.2.
        "celeba-text": COMPARED | dict(latent_dim=32, private_dim=32),
    }
)
OBJECTIVES = ("elbo", "iwae", "iwae-tight", "dreg", "dreg-tight", "dreg-mixture", "elbo-is")


def arguments(argv):
    p, model = common.parser(__doc__, DEFAULTS)
    add = model.add_argument
    dimension, about = common.number(int, 0, 65536), "latent dimensions of each modality alone"
    add("--private-dim", type=dimension, default=0, help=about)
    add("--objective", choices=OBJECTIVES, default="iwae", help="bound and gradient, see above")
    about = "samples of each expert; with 1 the looser bound is the ELBO"
    add("--K", type=common.number(int, 1, 10**6), default=30, help=about)
    about = "elbo: the mixture's KL by sampling, or the mean of the experts', which elbo-is has"
    add("--kl", choices=["mixture", "components"], default="mixture", help=about)
    add("--distribution", choices=["laplace", "normal"], default="laplace", help="prior, experts")
    about = "scales that sum to their number by a softmax, or exp of half the network's output"
    add("--scales", choices=["sum", "free"], default="sum", help=about)
    switch = argparse.BooleanOptionalAction
    about = "learn the scales of the prior's shared part, which sum to their number"
    add("--learn-prior", action=switch, default=False, help=about)
    add("--amsgrad", action=switch, default=False, help="Adam with AMSGrad, as in the paper")
    args = common.parse(p, argv, DEFAULTS)
    hooked = args.objective.startswith("dreg") or args.objective == "elbo-is"
    if hooked and torch.__version__ < (2, 13):
        if args.compile is True:
            raise UserError(f"--compile: --objective {args.objective} needs PyTorch 2.13 for it")
        args.compile = False
    return args


# -------------------------------------------------------------------------------------- model


class MMVAE(nn.Module):
    """z = (c, s_1, ..., s_M): a shared latent of latent_dim and, where private_dim > 0, a private
    one for each modality, drawn from its own expert; D = latent_dim + M * private_dim."""

    def __init__(
        self,
        modalities,
        latent_dim,
        private_dim=0,
        beta=1.0,
        objective="iwae",
        K=30,
        kl="mixture",
        distribution="laplace",
        scales="sum",
        learn_prior=False,
    ):
        super().__init__()
        if kl == "components" and objective not in ("elbo", "elbo-is"):
            raise UserError(f"--kl components: belongs to --objective elbo, not {objective}")
        self.modalities, self.names = modalities, [m.name for m in modalities]
        self.latent_dim, self.private_dim = latent_dim, private_dim
        self.beta, self.objective_name, self.K, self.kl = beta, objective, K, kl
        self.distribution = {"laplace": Laplace, "normal": Normal}[distribution]
        self.scales = scales
        width = latent_dim + private_dim
        self.encoders = nn.ModuleList(encoder(m, 2 * width) for m in modalities)
        self.decoders = nn.ModuleList(decoder(m, width) for m in modalities)
        self.prior_logits = nn.Parameter(torch.zeros(latent_dim), requires_grad=learn_prior)
        private = torch.ones(len(modalities) * private_dim)
        self.register_buffer("private_scales", private, persistent=False)

    def independent(self, loc, scale):
        """The distribution of the prior and the experts, with event shape (D,)."""
        return Independent(self.distribution(loc, scale, validate_args=False), 1, False)

    def prior(self):
        """p(z), event shape (D,); its shared scales sum to latent_dim and are 1 unless learnt."""
        scale = torch.cat([scales_that_sum(self.prior_logits), self.private_scales])
        return self.independent(torch.zeros_like(scale), scale)

    def posterior(self, x):
        """q(z|x_S) for the modalities in x: the mixture of their experts; the private latent of an
        absent modality follows its prior."""
        loc, scale = self.experts(x)
        weights = torch.ones_like(loc[..., 0]) / len(loc)
        q = self.independent(loc.movedim(0, 1), scale.movedim(0, 1))
        mix = Categorical(probs=weights.T, validate_args=False)
        return MixtureSameFamily(mix, q, validate_args=False)

    def decode(self, z, names=None):
        """p(x_i|z) for z (..., D): of every modality, or of the named ones."""
        c, *s = z.split([self.latent_dim] + [self.private_dim] * len(self.modalities), -1)
        latents = {
            name: torch.cat([c, s_i], -1)
            for name, s_i in zip(self.names, s, strict=True)
            if names is None or name in names
        }
        decoded = abreast(self.names, self.decoders, latents)
        return {
            m.name: likelihood(m, decoded[m.name]) for m in self.modalities if m.name in decoded
        }

    def experts(self, x, observed=None):
        """Location and scale of the expert q_m(z|x_m) of each modality in x, (M, B, D) each: its
        own shared part, and beside it all private parts, of location 0 and scale 1 where their
        modality is absent."""
        heads = abreast(self.names, self.encoders, x)
        absent = torch.zeros_like(next(iter(heads.values())))
        heads = torch.stack([heads.get(m.name, absent) for m in self.modalities])
        if observed is not None:
            heads = torch.where(observed.T[..., None], heads, 0)
        loc, raw = bounded(*heads.chunk(2, -1))
        parts = [self.latent_dim, self.private_dim]
        (loc, loc_s), raw = loc.split(parts, -1), raw.split(parts, -1)
        free = self.scales == "free"
        scale, scale_s = (torch.exp(0.5 * t) if free else scales_that_sum(t) for t in raw)
        if self.private_dim:
            s = [t.movedim(0, 1).flatten(1).expand(len(loc), -1, -1) for t in (loc_s, scale_s)]
            loc, scale = torch.cat([loc, s[0]], -1), torch.cat([scale, s[1]], -1)
        given = [m.name in x for m in self.modalities]
        return [torch.stack([*itertools.compress(t, given)]) for t in (loc, scale)]

    def objective(self, x, observed=None):
        """The bound that --objective names, per example (B,); of log p(x_observed) where β = 1 and
        all λ = 1. x has all modalities, or one alone: M = 1 below. Terms: the KL and each
        log p(x_i|z), in nats. Every example needs one observed modality."""
        x = hide(x, observed, self.modalities)
        loc, scale = self.experts(x, observed)  # (M, B, D)
        seen = torch.ones_like(loc[..., 0]) if observed is None else observed.T.to(loc)
        pi = seen / seen.sum(0)  # (M, B), the mixture's weights
        if self.objective_name == "elbo-is":
            return self.importance_sampled_elbo(x, loc, scale, seen, pi)
        z = self.independent(loc, scale).rsample((self.K,))  # (K, M, B, D)
        doubly = self.objective_name.startswith("dreg")
        tight = self.objective_name.endswith("tight")
        held = (loc.detach(), scale.detach()) if doubly else (loc, scale)  # q's parameters in log w

        # log w = Σ_i λ_i log p(x_i|z) + β (log p(z) - log q(z|x)), (K, M, B)
        at = z.view_as(z)  # z again: DReG's hook weighs the gradient that comes through it
        modalities = [m for m in self.modalities if m.name in x]
        decoded = self.decode(at, x).items()
        log_p = {name: seen[i] * p.log_prob(x[name]) for i, (name, p) in enumerate(decoded)}
        if self.kl == "components":
            kl = kl_divergence(self.independent(loc, scale), self.prior()).expand(z.shape[:-1])
        else:
            log_q = torch.logsumexp(pi.log()[:, None, None] + self.log_experts(*held, at), 0)
            kl = log_q - self.prior().log_prob(at)
        log_w = sum(m.weight * log_p[m.name] for m in modalities) - self.beta * kl

        if self.objective_name == "elbo":
            value = mixed(log_w, pi)  # Eq. (1)
        elif tight:
            value = torch.logsumexp(pi.log() + log_w, (0, 1)) - math.log(self.K)  # Eq. (5)
        else:
            value = (pi * log_mean_exp(log_w, 0)).sum(0)  # Eq. (3)
        if doubly:
            value = value.detach() + self.doubly_reparametrised(pi, loc, scale, z, at, log_w, tight)
        log_p = {name: mixed(t, pi) for name, t in log_p.items()}
        return value, terms(mixed(kl, pi), log_p, seen)

    forward = objective

    def doubly_reparametrised(self, pi, loc, scale, z, at, log_w, tight):
        """Zeros (B,) with the gradient of "dreg", "dreg-tight" or "dreg-mixture".

        Eq. (8): the decoders and the prior get Σ w̄ ∇ log w, the encoders Σ w̄² ∂log w/∂z ∂z/∂φ
        with the parameters of q held fixed in log w. The second w̄ turns the score term
        -β w̄ ∇_φ log q into a path; for β ≠ 1 it is 1 - β (1 - w̄).

        With several experts that score is of the mixture while z is from its m-th expert. Let
        r_n = π_n q_n / Σ_j π_j q_j: the score is Σ_n r_n ∇ log q_n, of which only the m-th term
        can become a path, of r_m w̄ as a whole; the others stay. That is "dreg-mixture", unbiased:
        [w̄ - β w̄ (1 - w̄) r_m] ∂log w/∂z - β w̄ ∂r_m/∂z along z, -β w̄ r_n ∇ log q_n for n ≠ m.
        """
        if tight:  # normalised over all samples, for iwae over those of each expert
            w = torch.softmax((pi.log() + log_w).detach().flatten(0, 1), 0).view_as(log_w)
        else:
            w = torch.softmax(log_w.detach(), 0)
        weight = w if tight else pi * w
        gradient, r_own = weight * log_w, torch.ones_like(w)
        if self.objective_name == "dreg-mixture":
            log_q = self.log_experts(loc.detach(), scale.detach(), z)
            r = torch.softmax(pi.log()[:, None, None] + log_q, 0)
            along = torch.einsum("mkmb->kmb", r)
            r_own = along.detach()
            others = r.detach() * (1 - torch.eye(len(r), device=r.device))[:, None, :, None]
            score = (others * self.log_experts(loc, scale, z.detach())).sum(0)
            gradient = gradient - self.beta * weight * (along + score)
        if at.requires_grad:
            at.register_hook(lambda g: g * (1 - self.beta * (1 - w) * r_own)[..., None])
        gradient = gradient.sum((0, 1))
        return gradient - gradient.detach()

    def importance_sampled_elbo(self, x, loc, scale, seen, pi):
        """The ELBO with component KLs from one decoding of each modality (supplement, App. B).

        E_{q_i}[log p(x_j|z)] is taken at z_j ~ q_j with the weight q_i(z_j) / q_j(z_j), in which
        z_j and q_j are constants; only the term i = j has a gradient along z_j.
        """
        z = self.independent(loc, scale).rsample((self.K,))
        log_q = self.log_experts(loc, scale, z.detach())  # (N, K, M, B)
        own = torch.einsum("mkmb->kmb", log_q).detach()
        both = seen[:, None, None] * seen  # (N, 1, M, B)
        other = both * (1 - torch.eye(len(loc), device=loc.device))[:, None, :, None] > 0
        ratio = torch.exp(torch.where(other, log_q - own, 0))
        importance = (pi[:, None, None] * ratio).sum(0)  # Σ_i π_i q_i(z_j) / q_j(z_j)
        log_p, reconstruction = {}, 0.0
        for j, m in enumerate(m for m in self.modalities if m.name in x):
            z_j = z[:, j]
            if z_j.requires_grad:
                along = (pi[j] / importance[:, j].detach())[..., None]
                z_j.register_hook(lambda g, along=along: g * along)
            p = self.decode(z_j, [m.name])[m.name]
            log_p[m.name] = (seen[j] * importance[:, j] * p.log_prob(x[m.name])).mean(0)
            reconstruction = reconstruction + m.weight * log_p[m.name]
        kl = (pi * kl_divergence(self.independent(loc, scale), self.prior())).sum(0)
        return reconstruction - self.beta * kl, terms(kl, log_p, seen)

    def log_experts(self, loc, scale, z):
        """log q_n(z_m^k|x_n) for samples z (K, M, B, D) of all experts m, (N, K, M, B)."""
        # One at a time: all at once would take M times the samples' memory, several times over.
        return torch.stack([self.independent(*q).log_prob(z) for q in zip(loc, scale, strict=True)])


def mixed(t, pi):
    """The mean of t (K, M, B) over the samples and, with the weights pi, the experts; (B,)."""
    return (pi * t.mean(0)).sum(0)


def terms(kl, log_p, seen):
    """What is logged: the mean of kl (B,), and of each log p (B,) where its modality was seen."""
    shares = zip(log_p.items(), seen, strict=True)
    means = {f"log_px/{name}": (t.sum() / s.sum().clamp(min=1)).detach() for (name, t), s in shares}
    return {"kl": kl.mean().detach()} | means


def scales_that_sum(logits):
    """Positive scales (..., D) whose sum is D, none so small that its square leaves float32."""
    return (logits.shape[-1] * torch.softmax(logits, -1)).clamp(min=math.exp(-15))


# ----------------------------------------------------------------------------------- training


@common.command
def main(argv=None):
    args = arguments(argv)
    device, rank, world = common.setup(args)
    data = datasets.load(args)
    train = data.train.to(device)
    if args.supervision < 1:
        train = datasets.with_streams(train, args.supervision, args.data_seed)
    steps = len(datasets.epoch_order(train, args.batch_size, args.seed))
    config = dict(
        latent_dim=args.latent_dim,
        private_dim=args.private_dim,
        beta=args.beta,
        objective=args.objective,
        K=args.K,
        kl=args.kl,
        distribution=args.distribution,
        scales=args.scales,
        learn_prior=args.learn_prior,
    )
    model = MMVAE(data.modalities, **config).to(device)
    capturable = common.captures(args, device, world)
    settings = dict(lr=args.lr, amsgrad=args.amsgrad, fused=True, capturable=capturable)
    # Large tensors first: a GPU's fused Adam is faster so.
    weights = sorted(model.parameters(), key=torch.numel, reverse=True)
    optimizer = torch.optim.Adam(weights, **settings)
    streamed = common.Streams(model) if train.streams else model
    fast_model = common.accelerate(streamed, args, device, world)
    batch_size = args.batch_size // world
    names = ["objective", "kl", *(f"log_px/{m.name}" for m in data.modalities)]

    def update(rows):
        x, observed = train.batch(rows)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
            value, terms = fast_model(x, observed)
        loss = -value.sum() / batch_size
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return torch.stack([-loss.detach(), *(terms[name] for name in names[1:])])

    update = common.capture(update, capturable)
    start = common.restore(args, model, optimizer) if args.resume else 0
    run, writer = common.open_run(args, __file__, data.source, start) if rank == 0 else (None, None)
    saved = 0.0

    with common.interruptible(run), common.progress(args, start, steps, rank) as bar:
        for epoch in range(start + 1, args.epochs + 1):
            began = time.monotonic()
            torch.manual_seed(common.seed_of(args.seed, epoch, rank))
            order = datasets.epoch_order(train, args.batch_size, common.seed_of(args.seed, epoch))
            order = order[:, rank::world].contiguous().to(device)
            log = torch.empty(steps, len(names), device=device)
            for step, rows in enumerate(order):
                log[step] = update(rows)
                bar.update(args.batch_size)
            row = common.epoch_row(epoch, names, log, began, steps * args.batch_size)
            bar.set_postfix_str(f"epoch {epoch}, objective {row['objective']:.1f}")
            if rank == 0:
                common.write_row(run, writer, row)
                if args.eval_every and epoch % args.eval_every == 0:
                    evaluate.watch(writer, model, data, args, epoch)
                if epoch == args.epochs or time.monotonic() - saved > args.checkpoint_every:
                    common.save_checkpoint(run, model, optimizer, epoch, config)
                    saved = time.monotonic()

    if world > 1:
        torch.distributed.destroy_process_group()
    if rank == 0:
        if not args.no_eval:
            evaluate.report(run, model, data, args)
        print(f"run: {run}")


if __name__ == "__main__":
    main()
