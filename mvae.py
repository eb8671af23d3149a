"""MVAE: Wu and Goodman, "Multimodal Generative Models for Scalable Weakly-Supervised Learning",
NeurIPS 2018.

The posterior is a product of Gaussian experts, one for each modality and the prior p(z) as one
more, q(z|x_S) ∝ p(z) Π_{i in S} q~(z|x_i), so that any subset of the modalities will do.

    python mvae.py                                     polydigits, three minutes on two CPU cores
    python mvae.py --dataset polymnist --beta 2.5      Sutter et al. 2021, but with annealed β
    torchrun --nproc-per-node 8 mvae.py ...            several GPUs

Expected on polydigits: coherence of the modalities not given, given 1, 2, 3, 4: 42, 52, 57, 61 %;
joint coherence 5 %; latent accuracy given all 95 %.

The objective is a sum of ELBOs: of all modalities, of each alone, and with `--random-subsets k` of
k subsets drawn anew in every step, so that a hundred modalities need no 2^100 terms. A modality is
encoded once a step, and decoded for the terms it belongs to. `--anneal-epochs` raises β from 0.

`--product quotient` is Eq. (3), without the universal expert (supplement, Section 3),
q(z|x_S) ∝ Π_{i in S} q(z|x_i) / p(z)^(|S| - 1), a density where all variances are below M/(M - 1).
"""

import math
import time

import torch
import torch.nn.functional as F
from torch import nn

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
    quotient_of_gaussians,
)

DEFAULTS = datasets.settings(
    {
        "polydigits": dict(anneal_epochs=10),
        # Not in Sutter et al. 2021; without, the experts' log-variances run up to their clamp,
        # where there is no gradient, within twenty steps.
        "polymnist": dict(anneal_epochs=5),
        # Supplement, Section 1.
        "mnist-label": dict(anneal_epochs=200),
        "binary-mnist-label": dict(anneal_epochs=200),
        "fashion-label": dict(anneal_epochs=200),
        "multimnist": dict(anneal_epochs=200),
        "celeba-attr": dict(anneal_epochs=20),
        "celeba19": dict(anneal_epochs=20, random_subsets=1),
        # Sutter et al. 2021, App. E.2.
        "celeba-text": dict(latent_dim=32, private_dim=32),
    }
)


def arguments(argv):
    p, model = common.parser(__doc__, DEFAULTS)
    add = model.add_argument
    dimension, about = common.number(int, 0, 65536), "latent dimensions of each modality alone"
    add("--private-dim", type=dimension, default=0, help=about)
    count, about = common.number(int, 0, 1000), "ELBOs of random subsets in every step"
    add("--random-subsets", metavar="K", type=count, default=0, help=about)
    count, about = common.number(int, 0, 10**6), "epochs in which β rises linearly from 0"
    add("--anneal-epochs", metavar="N", type=count, default=0, help=about)
    about = "product with the prior as an expert, or of q(z|x_i) over powers of the prior"
    add("--product", choices=["universal", "quotient"], default="universal", help=about)
    args = common.parse(p, argv, DEFAULTS)
    if args.random_subsets and args.compile is True:
        raise UserError(
            "--compile: a graph is fixed, with --random-subsets no step is like another"
        )
    args.compile = args.compile if not args.random_subsets else False
    return args


# -------------------------------------------------------------------------------------- model


class MVAE(nn.Module):
    """z = (c, s_1, ..., s_M): a shared latent of latent_dim and, where private_dim > 0, a private
    one for each modality, its expert's alone; D = latent_dim + M * private_dim."""

    def __init__(
        self,
        modalities,
        latent_dim,
        private_dim=0,
        beta=1.0,
        random_subsets=0,
        product="universal",
    ):
        super().__init__()
        if random_subsets and len(modalities) < 3:
            raise UserError(f"--random-subsets {random_subsets}: two modalities have no others")
        self.modalities, self.names = modalities, [m.name for m in modalities]
        self.latent_dim, self.private_dim = latent_dim, private_dim
        self.beta, self.random_subsets, self.quotient = beta, random_subsets, product == "quotient"
        width, M = latent_dim + private_dim, len(modalities)
        self.encoders = nn.ModuleList(encoder(m, 2 * width) for m in modalities)
        self.decoders = nn.ModuleList(decoder(m, width) for m in modalities)
        self.register_buffer("singletons", torch.eye(M).bool(), persistent=False)
        self.register_buffer("zeros", torch.zeros(latent_dim + M * private_dim), persistent=False)
        self.register_buffer("annealing", torch.ones(()), persistent=False)

    def prior(self):
        """p(z) = N(0, I), event shape (D,)."""
        return gaussian(self.zeros, self.zeros)

    def posterior(self, x):
        """q(z|x_S) for the modalities in x: the product of their experts; the private latent of an
        absent modality follows its prior."""
        given = torch.tensor([m.name in x for m in self.modalities], device=self.zeros.device)
        mu, logvar = self.product(*self.encode(x), given[None, :, None])
        return gaussian(mu[0], logvar[0])

    def decode(self, z, names=None):
        """p(x_i|z) for z (..., D): of every modality, or of the named ones."""
        return self.decode_each({n: z for n in self.names if names is None or n in names})

    def decode_each(self, z):
        """p(x_i|z_i) for the modalities i in z, {name: z_i (..., D)}."""
        parts, latents = [self.latent_dim] + [self.private_dim] * len(self.modalities), {}
        for i, name in enumerate(self.names):
            if name in z:
                c, *s = z[name].split(parts, -1)
                latents[name] = torch.cat([c, s[i]], -1)
        decoded = abreast(self.names, self.decoders, latents)
        return {
            m.name: likelihood(m, decoded[m.name]) for m in self.modalities if m.name in decoded
        }

    def encode(self, x):
        """Mean and log-variance of the experts q~(c, s_i|x_i), (M, B, latent_dim + private_dim)
        each; zeros stand for a modality that is not in x."""
        heads = abreast(self.names, self.encoders, x)
        absent = torch.zeros_like(next(iter(heads.values())))
        heads = torch.stack([heads.get(m.name, absent) for m in self.modalities])
        mu, logvar = bounded(*heads.chunk(2, -1))
        M = len(self.modalities)
        if self.quotient and M > 1:  # V = M / (M - 1) * sigmoid(.), supplement, Section 3
            raw, s = logvar.split([self.latent_dim, self.private_dim], -1)
            # At 10 V is all but its bound; beyond, float32 loses what the division by p(z) leaves.
            logvar = math.log(M / (M - 1)) + F.logsigmoid(raw.clamp(max=10.0))
            logvar = torch.cat([logvar, s], -1)
        return mu, logvar

    def product(self, mu, logvar, masks):
        """Mean and log-variance (S, B, D) of q(z|x_S) for the subsets of masks, (S, M, B): the
        product of the shared parts, beside it the private parts of the subset."""
        masks = masks.expand(-1, -1, mu.shape[1])
        parts = [self.latent_dim, self.private_dim]
        (mu, mu_s), (logvar, logvar_s) = mu.split(parts, -1), logvar.split(parts, -1)
        # Supplement, Lemma 2.1.
        mu, logvar = product_of_gaussians(mu, logvar, masks, prior_expert=not self.quotient)
        if self.quotient:  # Eq. (3) and Lemma 3.1; p(z)^(|S| - 1) has the precision |S| - 1
            excess = masks.sum(1)[..., None] - 1
            mu, logvar = quotient_of_gaussians(mu, logvar, torch.zeros_like(mu), -excess.log())
        if self.private_dim:
            s = [
                torch.where(masks[..., None], t, 0).transpose(1, 2).flatten(2)
                for t in (mu_s, logvar_s)
            ]
            mu, logvar = torch.cat([mu, s[0]], -1), torch.cat([logvar, s[1]], -1)
        return mu, logvar

    def elbos(self, x, subsets, observed=None):
        """ELBO(S) = E_q(z|x_S)[Σ_{i in S} λ_i log p(x_i|z)] - β KL(q(z|x_S) || p(z)), β annealed,
        for each of the subsets, lists of indices, the first of which has all modalities in x: the
        ELBOs, the KLs and the subsets' sizes, (S, B) each, and {i: log p(x_i|z) given all, (B,)}.
        Where an example lacks modalities, S is replaced by its observed part, or by all that is
        observed if that part is empty."""
        # From a buffer, since a captured step cannot copy from the host.
        masks = [torch.stack([self.singletons[i] for i in S]).any(0) for S in subsets]
        present = torch.stack(masks)[..., None]  # (S, M, 1)
        if observed is not None:
            rest = present & observed.T
            present = torch.where(rest.any(1, keepdim=True), rest, observed.T)  # (S, M, B)
        mu, logvar = self.product(*self.encode(x), present)
        z = mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)  # (S, B, D)
        reconstruction, log_px = [0.0] * len(subsets), {}
        subsets_with = {i: [s for s, S in enumerate(subsets) if i in S] for i in subsets[0]}
        p = self.decode_each(
            {self.names[i]: torch.stack([z[s] for s in those]) for i, those in subsets_with.items()}
        )
        for i in subsets[0]:
            m = self.modalities[i]
            for s, log_p in zip(subsets_with[i], p[m.name].log_prob(x[m.name]), strict=True):
                log_p = torch.where(present[s, i], log_p, 0)
                reconstruction[s] = reconstruction[s] + m.weight * log_p
                log_px.setdefault(i, log_p)  # of the first subset
        kl = gaussian_kl(mu, logvar)
        elbos = torch.stack(reconstruction) - self.beta * self.annealing * kl
        return elbos, kl, present.sum(1).expand_as(kl), log_px

    def objective(self, x, observed=None):
        """ELBO(all) + Σ_i ELBO({i}) + Σ_k ELBO(S_k), per example (B,), over what is
        observed of it; each ELBO a lower bound of log p(x_S), where β = 1, annealing included, and
        all λ = 1. x has all modalities, or one alone. Terms: the KLs' sum and each log p(x_i|z)
        given all, in nats. Every example needs one observed modality."""
        x = hide(x, observed, self.modalities)
        M, whole = len(x), [i for i, m in enumerate(self.modalities) if m.name in x]
        subsets = [whole]
        if M > 1:
            subsets += [[i] for i in whole]
            subsets += [random_subset(M) for _ in range(self.random_subsets)]
        elbos, kl, sizes, log_p = self.elbos(x, subsets, observed)
        # What an example has of a subset may be the whole or one modality, which count already.
        counts = sizes < sizes[0]
        counts[0] = True
        counts[1 + M :] &= sizes[1 + M :] > 1
        log_px = {}
        for i in whole:
            seen = torch.ones_like(kl[0]) if observed is None else observed[:, i]
            mean = log_p[i].detach().sum() / seen.sum().clamp(min=1)
            log_px[f"log_px/{self.modalities[i].name}"] = mean
        total_kl = (counts * kl).sum(0).detach().mean()
        return (counts * elbos).sum(0), {"kl": total_kl} | log_px

    forward = objective


def random_subset(M):
    """A tuple of 2 to M - 1 of M indices: a size drawn uniformly, then a subset of that size."""
    size = int(torch.randint(2, M, ()))
    return tuple(sorted(torch.randperm(M)[:size].tolist()))


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
        random_subsets=args.random_subsets,
        product=args.product,
    )
    model = MVAE(data.modalities, **config).to(device)
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
    if rank == 0 and args.anneal_epochs > args.epochs:
        share = args.epochs / args.anneal_epochs
        print(f"--anneal-epochs {args.anneal_epochs}: β ends at {share:.2g} times --beta")

    with common.interruptible(run), common.progress(args, start, steps, rank) as bar:
        for epoch in range(start + 1, args.epochs + 1):
            began = time.monotonic()
            torch.manual_seed(common.seed_of(args.seed, epoch, rank))
            order = datasets.epoch_order(train, args.batch_size, common.seed_of(args.seed, epoch))
            order = order[:, rank::world].contiguous().to(device)
            log = torch.empty(steps, len(names), device=device)
            for step, rows in enumerate(order):
                if args.anneal_epochs:
                    model.annealing.fill_(min(1.0, (epoch - 1 + step / steps) / args.anneal_epochs))
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
