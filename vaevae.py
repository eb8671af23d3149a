"""VAEVAE: Wu and Goodman, "Multimodal Generative Models for Compositional Representation Learning",
2019, as Kutuzova, Krause, McCloskey, Nielsen and Igel, "Multimodal Variational Autoencoders for
Semi-Supervised Learning: In Defense of Product-of-Experts", 2021, state and measure it.

Every subset of the modalities has a posterior of its own. For two or more modalities it is a joint
network with its own encoders, variant (b) as the 2021 paper calls it; `--joint poe` is variant (a),
the product of the q(z|x_i).

    python vaevae.py                                   polydigits, some six minutes on two CPU cores
    python vaevae.py --dataset polymnist --beta 2.5    β and D of Sutter et al. 2021
    torchrun --nproc-per-node 8 vaevae.py ...          several GPUs

Expected on polydigits, there with `--joint poe`: coherence of the modalities not given, given 1, 2,
3, 4: 53, 70, 79, 83 %; joint coherence 3 %; latent accuracy given all 98 %.

A step takes a batch of complete tuples (of which `--supervision` leaves a share) and a batch of
each modality alone. The latter are drawn from all tuples, not from unpaired data as in the paper,
so with the objective `svae` the modalities of a complete tuple have their ELBOs twice. With two
modalities `--objective` is one of
    vaevae    E_q(z|x1,x2)[log p(x1|z) + log p(x2|z)] - KL(q(z|x1,x2) || q(z|x1))
              - KL(q(z|x1,x2) || q(z|x2)) for a complete tuple, the ELBO for a modality alone
    svae      Eq. (7) - (10): a complete tuple has the ELBOs of its modalities too ("VAEVAE*")

With more modalities, Eq. (D.28) - (D.31), every subset S of a complete tuple with |S| >= 2 adds
E_q(z|x_S)[Σ_{i in S} log p(x_i|z)] - Σ_{i in S} KL(q(z|x_S) || q(z|x_S without x_i)), and all but
the whole also - KL(q(z|x_S) || p(z)). Of (D.29) this leaves out the KL to the absent modality's
posterior; (D.31) is taken as a sum over unordered pairs. `svae` adds the ELBOs of a complete
tuple's modalities here, too, as the released code of VAEVAE* does; (D.30) has the ELBOs of unpaired
data only. With five modalities that is 75 decodings of a complete tuple. With `--expectation
stratified` it has, of the S with 1 < |S| < M, the terms of one random S only, times the inverse of
that S's share of the batch: the same in expectation, at 8 decodings.
"""

import itertools
import time

import torch
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
    subset_masks,
)

DEFAULTS = datasets.settings(
    {
        # Each of the many posteriors is held to those of the smaller sets and to the prior.
        "polydigits": dict(epochs=10, batch_size=16, lr=1e-3, beta=0.5, joint="poe"),
        # App. F, which names no batch sizes: those of datasets.SETTINGS stay.
        "cub": dict(epochs=200, lr=1e-4),
        "mnist-svhn": dict(epochs=50),
    }
)
MOST_MODALITIES = 6  # the terms, and the joint networks, double with each


def arguments(argv):
    p, model = common.parser(__doc__, DEFAULTS)
    add = model.add_argument
    about = "q(z|x_S) of two and more: a network for each S, or the product of the experts"
    add("--joint", choices=["network", "poe"], default="network", help=about)
    about = "the complete tuples' terms, see above"
    add("--objective", choices=["vaevae", "svae"], default="vaevae", help=about)
    about = "every S between one and all modalities, or one a tuple, evenly over the batch"
    add("--expectation", choices=["all", "stratified"], default="all", help=about)
    return common.parse(p, argv, DEFAULTS)


# -------------------------------------------------------------------------------------- model


class VAEVAE(nn.Module):
    """A subset S is a tuple of names, in the order of the modalities; the latent z has D
    = latent_dim dimensions."""

    def __init__(
        self,
        modalities,
        latent_dim,
        beta=1.0,
        joint="network",
        objective="vaevae",
        expectation="all",
    ):
        super().__init__()
        M, names = len(modalities), [m.name for m in modalities]
        if M > MOST_MODALITIES:
            cost = f"{2**M - 1} posteriors and {M * 2 ** (M - 1)} decodings a tuple"
            if joint == "network":
                cost += f", {2**M - M - 1} joint networks with {M * 2 ** (M - 1) - M} encoders"
            raise UserError(f"{M} modalities: {cost}; vaevae.py takes at most {MOST_MODALITIES}")
        self.modalities, self.latent_dim, self.names = modalities, latent_dim, names
        self.beta, self.joint = beta, joint
        self.objective_name, self.expectation = objective, expectation
        self.encoders = nn.ModuleList(encoder(m, 2 * latent_dim) for m in modalities)
        self.decoders = nn.ModuleList(decoder(m, latent_dim) for m in modalities)
        self.larger = [S for n in range(2, M + 1) for S in itertools.combinations(names, n)]
        self.joint_encoders = nn.ModuleDict()
        for S in self.larger if joint == "network" else ():
            members = [m for m in modalities if m.name in S]
            self.joint_encoders["+".join(S)] = JointEncoder(members, 2 * latent_dim)
        self.register_buffer("masks", subset_masks(M)[M:], persistent=False)
        self.register_buffer("zeros", torch.zeros(latent_dim), persistent=False)

    def prior(self):
        """p(z) = N(0, I), event shape (D,)."""
        return gaussian(self.zeros, self.zeros)

    def posterior(self, x):
        """q(z|x_S) for the modalities in x."""
        S = tuple(m.name for m in self.modalities if m.name in x)
        if len(S) > 1 and self.joint == "network":
            return gaussian(*self.joint_encoders["+".join(S)](x).chunk(2, -1))
        return gaussian(*product_of_gaussians(*self.experts(x)))

    def decode(self, z, names=None):
        """p(x_i|z) for z (..., D): of every modality, or of the named ones."""
        latents = {name: z for name in self.names if names is None or name in names}
        decoded = abreast(self.names, self.decoders, latents)
        return {
            m.name: likelihood(m, decoded[m.name]) for m in self.modalities if m.name in decoded
        }

    def experts(self, x):
        """Mean and log-variance of q(z|x_i) for each modality in x, (len(x), B, D)."""
        heads = abreast(self.names, self.encoders, x)
        return bounded(*torch.stack([*heads.values()]).chunk(2, -1))

    def posteriors(self, x):
        """{S: (mean, log-variance)}, (B, D) each, of q(z|x_S) for every subset S of the modalities
        in x, which are all or one."""
        mu, logvar = self.experts(x)
        singles = [(m.name,) for m in self.modalities if m.name in x]
        q = dict(zip(singles, zip(mu, logvar, strict=True), strict=True))
        if len(q) > 1 and self.joint == "network":
            for S in self.larger:
                q[S] = bounded(*self.joint_encoders["+".join(S)](x).chunk(2, -1))
        elif len(q) > 1:
            products = product_of_gaussians(mu, logvar, self.masks)
            q |= dict(zip(self.larger, zip(*products, strict=True), strict=True))
        return q

    def allotted(self, subsets, B, complete):
        """{S: the rows on which S's terms are computed} and {S: the factor by which these count}.
        With --expectation stratified each complete tuple has one random S with 1 < |S| < M, and
        the B rows are divided evenly among such S; else, or where there are more such S than rows,
        every S has all rows."""
        rows, times = dict.fromkeys(subsets, slice(None)), dict.fromkeys(subsets, 1.0)
        between = [S for S in subsets if 1 < len(S) < len(self.modalities)]
        if self.expectation == "stratified" and complete and 0 < len(between) <= B:
            parts = torch.randperm(B, device=self.zeros.device).tensor_split(len(between))
            rows |= zip(between, parts, strict=True)
            times |= {S: B / len(rows[S]) for S in between}
        return rows, times

    def objective(self, x, observed=None):
        """The objective of the docstring above, per example (B,), over what is observed of it;
        where only one modality is, its ELBO. x has all modalities, or one alone. Terms: the KLs'
        sum and each log p(x_i|z) given all that is observed, in nats. Every example needs one
        observed modality."""
        # `main` passes no mask, since what is missing comes as streams: the mask is for the
        # interface that all objectives share.
        x = hide(x, observed, self.modalities)
        q = self.posteriors(x)
        names = [m.name for m in self.modalities if m.name in x]
        B, device = len(x[names[0]]), self.zeros.device
        rows, times = self.allotted(q, B, complete=observed is None)
        # Whether any example has terms of single modalities.
        single = self.objective_name == "svae" or len(x) == 1 or observed is not None
        subsets = [S for S in q if len(S) > 1 or single]
        z, log_p = {}, {}
        for S in subsets:
            mu, logvar = (t[rows[S]] for t in q[S])
            z[S] = mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)  # (B or fewer, D)
        subsets_with = {name: [S for S in subsets if name in S] for name in self.names}
        latents = {
            n: torch.cat([z[S] for S in those]) for n, those in subsets_with.items() if those
        }
        decoded = abreast(self.names, self.decoders, latents)
        for m in (m for m in self.modalities if m.name in decoded):
            parts = decoded[m.name].split([len(z[S]) for S in subsets_with[m.name]])
            for S, part in zip(subsets_with[m.name], parts, strict=True):
                log_p[S, m.name] = likelihood(m, part).log_prob(x[m.name][rows[S]])

        if observed is None:
            observed = torch.ones(B, len(names), dtype=torch.bool, device=device)
        seen, n = dict(zip(names, observed.T, strict=True)), observed.sum(1)
        value, total_kl = torch.zeros(B, device=device), torch.zeros(B, device=device)
        log_px = {name: torch.zeros(B, device=device) for name in names}
        for S in subsets:
            counts = torch.stack([seen[name] for name in S]).all(0)
            q_S = [t[rows[S]] for t in q[S]]
            to_prior = gaussian_kl(*q_S)
            if len(S) == 1:
                kl = to_prior  # (D.30), and of a complete tuple as in Eq. (7)
                counts = counts & ((n == 1) | (self.objective_name == "svae"))
            else:
                kl = torch.where(n[rows[S]] > len(S), to_prior, 0)  # (D.29), not in (D.28)
                for name in S:
                    rest = tuple(other for other in S if other != name)
                    kl = kl + gaussian_kl(*q_S, *(t[rows[S]] for t in q[rest]))
            weighted = [m.weight * log_p[S, m.name] for m in self.modalities if m.name in S]
            weight = times[S] * counts[rows[S]]
            value[rows[S]] += weight * (sum(weighted) - self.beta * kl)
            total_kl[rows[S]] += weight * kl
            for name in S:
                log_px[name][rows[S]] += weight * (n[rows[S]] == len(S)) * log_p[S, name]
        log_px = {
            f"log_px/{k}": (t.sum() / seen[k].sum().clamp(min=1)).detach()
            for k, t in log_px.items()
        }
        return value, {"kl": total_kl.detach().mean()} | log_px

    forward = objective


class JointEncoder(nn.Module):
    """q(z|x_S) of a subset, with encoders of its own: their features side by side, a layer, and the
    parameters. App. F has the layer of each modality, the released code on MNIST-Split the one
    behind; here are both."""

    def __init__(self, modalities, out_dim, hidden=512):
        super().__init__()
        self.names = [m.name for m in modalities]
        self.encoders = nn.ModuleList(encoder(m, hidden, hidden) for m in modalities)
        join = nn.Linear(hidden * len(modalities), hidden)
        self.join = nn.Sequential(nn.ReLU(), join, nn.ReLU(), nn.Linear(hidden, out_dim))

    def forward(self, x):
        features = abreast(self.names, self.encoders, x)
        return self.join(torch.cat([*features.values()], -1))


# ----------------------------------------------------------------------------------- training


@common.command
def main(argv=None):
    args = arguments(argv)
    device, rank, world = common.setup(args)
    data = datasets.load(args)
    train = datasets.with_streams(data.train.to(device), args.supervision, args.data_seed)
    steps = len(datasets.epoch_order(train, args.batch_size, args.seed))
    between = 2 ** len(data.modalities) - len(data.modalities) - 2
    if args.expectation == "stratified" and args.batch_size < between * world:
        raise UserError(f"--expectation stratified: needs --batch-size {between * world} at least")
    config = dict(
        latent_dim=args.latent_dim,
        beta=args.beta,
        joint=args.joint,
        objective=args.objective,
        expectation=args.expectation,
    )
    model = VAEVAE(data.modalities, **config).to(device)
    capturable = common.captures(args, device, world)
    # Large tensors first: a GPU's fused Adam is faster so.
    weights = sorted(model.parameters(), key=torch.numel, reverse=True)
    optimizer = torch.optim.Adam(weights, lr=args.lr, fused=True, capturable=capturable)
    # Algorithm 1: a step has a batch of complete tuples and one of each modality alone.
    fast_model = common.accelerate(common.Streams(model), args, device, world)
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
