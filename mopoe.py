"""MoPoE-VAE: Sutter, Daunhawer and Vogt, "Generalized Multimodal ELBO", ICLR 2021.

The posterior is a mixture over all 2^M - 1 non-empty subsets of the modalities, each component the
product of the Gaussian experts in the subset (Definition 1, which counts the empty one, too); the
objective is its ELBO, Eq. (6), by default with an upper bound of the KL.

    python mopoe.py                                    polydigits, two minutes on two CPU cores
    python mopoe.py --dataset polymnist --beta 2.5     the paper's PolyMNIST setting
    torchrun --nproc-per-node 8 mopoe.py ...           several GPUs

Expected on polydigits: coherence of the modalities not given, given 1, 2, 3, 4: 76, 87, 90, 91 %;
joint coherence 29 %; latent accuracy given all 99 %.

The upper bound, which the released code uses too, is the mean of the components' KLs. With it Eq.
(6) is the mean of the subsets' ELBOs (Lemma 1; Table 7 calls it Eq. (5)): `--expectation all`
computes that mean, the default samples it with one subset an example. `--kl mixture` gives Lemma
3's tighter bound of log p(X); with it, `--subsets singletons` is the MoE objective, Eq. (9).
`--subsets full` is the PoE's, Eq. (7). These options change training only: given several
modalities, `posterior` is the product of their experts in any case (given all, with
`--prior-expert`, and the prior).
"""

import time

import torch
from torch import nn
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

import common
import datasets
import evaluate
from common import (
    UserError,
    abreast,
    bounded,
    decoder,
    encoder,
    gaussian,
    gaussian_kl,
    hide,
    likelihood,
    product_of_gaussians,
    subset_masks,
)

DEFAULTS = datasets.settings(
    {
        "celeba-text": dict(latent_dim=32, private_dim=32),  # App. E.2
        "celeba19": dict(subsets="singletons"),  # all 2^19 - 1 are too many
    }
)


def arguments(argv):
    p, model = common.parser(__doc__, DEFAULTS)
    add = model.add_argument
    dimension, about = common.number(int, 0, 65536), "latent dimensions of each modality alone"
    add("--private-dim", type=dimension, default=0, help=about)
    about = "components of the mixture: all subsets, the single modalities, or the full set"
    add("--subsets", choices=["all", "singletons", "full"], default="all", help=about)
    about = "sample one subset an example, evenly over the batch, or every subset, Lemma 1"
    add("--expectation", choices=["stratified", "all"], default="stratified", help=about)
    about = "mean of the components' KLs in closed form, or the mixture's own by sampling"
    add("--kl", choices=["components", "mixture"], default="components", help=about)
    about = "the full set's product has the prior in it, as in the released code"
    add("--prior-expert", action="store_true", help=about)
    return common.parse(p, argv, DEFAULTS)


# -------------------------------------------------------------------------------------- model


class MoPoE(nn.Module):
    """z = (c, s_1, ..., s_M): a shared latent of latent_dim and, where private_dim > 0, a private
    one for each modality (Eq. 34); D = latent_dim + M * private_dim."""

    def __init__(
        self,
        modalities,
        latent_dim,
        private_dim=0,
        beta=1.0,
        subsets="all",
        expectation="stratified",
        kl="components",
        prior_expert=False,
    ):
        super().__init__()
        self.modalities, self.names = modalities, [m.name for m in modalities]
        self.latent_dim, self.private_dim = latent_dim, private_dim
        self.beta, self.subsets, self.expectation, self.kl = beta, subsets, expectation, kl
        self.prior_expert = prior_expert
        width, M = latent_dim + private_dim, len(modalities)
        self.encoders = nn.ModuleList(encoder(m, 2 * width) for m in modalities)
        self.decoders = nn.ModuleList(decoder(m, width) for m in modalities)
        if prior_expert and subsets == "singletons":
            raise UserError("--prior-expert: is for the full set, which --subsets singletons lacks")
        if subsets == "all" and M > 10:
            raise UserError(
                f"--subsets all: {M} modalities have {2**M - 1:,} subsets, each with a posterior "
                "of its own; at most 10 modalities, or --subsets singletons or full"
            )
        self.register_buffer("singletons", torch.eye(M).bool(), persistent=False)
        masks = {"singletons": self.singletons, "full": torch.ones(1, M).bool()}
        masks = subset_masks(M) if subsets == "all" else masks[subsets]
        self.register_buffer("masks", masks, persistent=False)  # (S, M)
        self.register_buffer("zeros", torch.zeros(latent_dim + M * private_dim), persistent=False)

    def prior(self):
        """p(z) = N(0, I), event shape (D,)."""
        return gaussian(self.zeros, self.zeros)

    def posterior(self, x):
        """q(z|x_S) for the modalities in x: the product of their experts (Definition 1.1); the
        private latent of an absent modality follows its prior."""
        given = torch.tensor([m.name in x for m in self.modalities], device=self.zeros.device)
        mu, logvar = self.product(*self.encode(x), given[None])
        return gaussian(mu[0], logvar[0])

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

    def encode(self, x):
        """Mean and log-variance of the experts q(c, s_i|x_i), (M, B, latent_dim + private_dim)
        each; zeros stand for a modality that is not in x."""
        heads = abreast(self.names, self.encoders, x)
        absent = torch.zeros_like(next(iter(heads.values())))
        heads = torch.stack([heads.get(m.name, absent) for m in self.modalities])
        return bounded(*heads.chunk(2, -1))

    def product(self, mu, logvar, masks):
        """Mean and log-variance of q(z|x_S) for the subsets of masks, (S, M) or (S, M, B): the
        product of the shared parts, beside it all private parts; (S, B, D) each."""
        parts = [self.latent_dim, self.private_dim]
        (mu, mu_s), (logvar, logvar_s) = mu.split(parts, -1), logvar.split(parts, -1)
        if self.prior_expert:
            mu, logvar = (torch.cat([t, torch.zeros_like(t[:1])]) for t in (mu, logvar))
            masks = torch.cat([masks, masks.all(1, keepdim=True)], 1)
        mu, logvar = product_of_gaussians(mu, logvar, masks)
        if self.private_dim:
            s = [t.movedim(0, 1).flatten(1).expand(len(mu), -1, -1) for t in (mu_s, logvar_s)]
            mu, logvar = torch.cat([mu, s[0]], -1), torch.cat([logvar, s[1]], -1)
        return mu, logvar

    def components(self, x, observed):
        """The mixture of Definition 1.2: mean and log-variance (S, B, D) of its components and
        their weights (S, B), equal for the subsets of what is observed and 0 for the others."""
        mu, logvar = self.encode(x)
        masks = self.masks
        if len(x) == 1:
            (i,) = (i for i, m in enumerate(self.modalities) if m.name in x)
            masks = self.singletons[i][None]
        available = torch.ones_like(mu[0, :, 0]).expand(len(masks), -1)
        if observed is not None:
            mu, logvar = (torch.where(observed.T[..., None], t, 0) for t in (mu, logvar))
            if self.subsets == "full":
                masks = observed.T[None]  # the largest observed subset, example by example
            else:
                available = (masks[:, None] <= observed).all(-1).to(mu)  # S within the observed
        mu, logvar = self.product(mu, logvar, masks)
        return mu, logvar, available / available.sum(0)

    def mixture(self, x, observed=None):
        """q(z|X), the training posterior (Definition 1.2), batch shape (B,)."""
        x = hide(x, observed, self.modalities)
        return mixture_of(*self.components(x, observed))

    def objective(self, x, observed=None):
        """Eq. (6), or Eq. (34) with private latents: per example (B,) a lower bound of
        log p(x_observed), where β = 1 and all λ = 1. x has all modalities, or one alone. Terms:
        the KL and each log p(x_i|z), in nats. Every example needs one observed modality."""
        x = hide(x, observed, self.modalities)
        mu, logvar, weights = self.components(x, observed)
        if self.expectation == "stratified":
            k, b = stratified(weights), torch.arange(mu.shape[1], device=mu.device)
            means, logvars, share = mu[k, b][None], logvar[k, b][None], torch.ones_like(weights[:1])
        else:
            means, logvars, share = mu, logvar, weights
        z = means + torch.exp(0.5 * logvars) * torch.randn_like(means)  # (1 or S, B, D)

        # Eq. (6): E_q(z|X)[Σ_i λ_i log p(x_i|z)]
        reconstruction, log_px = 0.0, {}
        given = [m for m in self.modalities if m.name in x]
        for i, (m, p) in enumerate(zip(given, self.decode(z, x).values(), strict=True)):
            seen = torch.ones_like(share[0]) if observed is None else observed[:, i].to(share)
            log_p = seen * (share * p.log_prob(x[m.name])).sum(0)
            reconstruction = reconstruction + m.weight * log_p
            log_px[f"log_px/{m.name}"] = log_p.detach().sum() / seen.sum().clamp(min=1)

        # - β KL(q(z|X) || p(z)), or the mean of KL(q(z|x_S) || p(z)): an upper bound by convexity
        if self.kl == "components":
            kl = (weights * gaussian_kl(mu, logvar)).sum(0)
        else:
            log_q = mixture_of(mu, logvar, weights).log_prob(z)
            kl = (share * (log_q - self.prior().log_prob(z))).sum(0)
        return reconstruction - self.beta * kl, {"kl": kl.detach().mean()} | log_px

    forward = objective


def mixture_of(mu, logvar, weights):
    """The mixture of diagonal Gaussians with means (S, B, D) and weights (S, B)."""
    q = Normal(mu.movedim(0, 1), torch.exp(0.5 * logvar).movedim(0, 1), validate_args=False)
    mix = Categorical(logits=weights.log().T, validate_args=False)
    return MixtureSameFamily(mix, Independent(q, 1, validate_args=False), validate_args=False)


def stratified(weights):
    """A component for each example, (B,) from weights (S, B): drawn evenly over the batch, so that
    where all have the same weights each component gets its share of the B examples but for
    rounding, at random places."""
    B = weights.shape[1]
    place = torch.randperm(B, device=weights.device) + torch.rand((), device=weights.device)
    upper = weights.cumsum(0)  # an example draws the first component whose bound is above its place
    return (upper <= upper[-1] * (place / B).clamp(max=1 - 1e-6)).sum(0)


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
        subsets=args.subsets,
        expectation=args.expectation,
        kl=args.kl,
        prior_expert=args.prior_expert,
    )
    model = MoPoE(data.modalities, **config).to(device)
    capturable = common.captures(args, device, world)
    # Large tensors first: a GPU's fused Adam is faster so.
    weights = sorted(model.parameters(), key=torch.numel, reverse=True)
    optimizer = torch.optim.Adam(weights, lr=args.lr, fused=True, capturable=capturable)
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
