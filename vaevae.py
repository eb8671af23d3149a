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
stratified` each S with 1 < |S| < M has its terms on random tuples of the batch, as many as any
other and none of another's, times the inverse of their share of the batch: the same in expectation,
at 8 decodings.
"""

import itertools
import math
import time

import torch
from torch import nn

import common
import datasets
import evaluate
from common import (
    UserError,
    abreast,
    architecture,
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
        # For each size n, `members` are a subset's modalities, `having` the subsets that have a
        # modality, and `rests` what is left of a subset without one modality.
        self.of_size = {n: [*itertools.combinations(names, n)] for n in range(1, M + 1)}
        for n, subsets in self.of_size.items():
            smaller = self.of_size.get(n - 1, [])
            tables = {
                "members": [[names.index(name) for name in S] for S in subsets],
                "having": [[i for i, S in enumerate(subsets) if name in S] for name in names],
                "rests": [[i for i, T in enumerate(smaller) if {*T} < {*S}] for S in subsets],
            }
            for name, table in tables.items():
                self.register_buffer(f"{name}_{n}", torch.tensor(table), persistent=False)
        self.register_buffer("zeros", torch.zeros(latent_dim), persistent=False)

    def prior(self):
        """p(z) = N(0, I), event shape (D,)."""
        return gaussian(self.zeros, self.zeros)

    def posterior(self, x):
        """q(z|x_S) for the modalities in x."""
        S = tuple(m.name for m in self.modalities if m.name in x)
        if len(S) > 1 and self.joint == "network":
            return gaussian(*self.joint_networks(x, [S])[0].chunk(2, -1))
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

    def joint_networks(self, x, subsets):
        """The mean and log-variance of q(z|x_S) side by side, (len(subsets), B, 2D)."""
        nets = [self.joint_encoders["+".join(S)] for S in subsets]
        inputs = {(S, name): x[name] for S in subsets for name in S}
        features = abreast(inputs, [e for net in nets for e in net.encoders], inputs)
        features = {S: torch.cat([features[S, name] for name in S], -1) for S in subsets}
        heads = abreast(subsets, [net.join for net in nets], features)
        return torch.stack([*heads.values()])

    def posteriors(self, x, complete):
        """{n: (mean, log-variance)}, (F, B, D) each, of q(z|x_S) for the F subsets S of n
        modalities: of one modality for every row of x, of more for the first `complete`."""
        mu, logvar = self.experts(x)
        q = {1: (mu, logvar)}
        if complete and self.joint == "network":
            x = {name: t[:complete] for name, t in x.items()}
            larger = bounded(*self.joint_networks(x, self.larger).chunk(2, -1))
        elif complete:
            larger = product_of_gaussians(mu[:, :complete], logvar[:, :complete], self.masks)
        if complete:
            sizes = [len(subsets) for n, subsets in self.of_size.items() if n > 1]
            q |= enumerate(zip(*(t.split(sizes) for t in larger), strict=True), start=2)
        return q

    def allotted(self, B, stratified):
        """{n: the rows (F, R) that have the terms of the F subsets of n modalities} and {n: the
        factor by which these count}. If stratified, every S with 1 < |S| < M has as many random
        rows, and a row one such S at most; else, or where such S are more than the B rows, every S
        has all rows."""
        device, M = self.zeros.device, len(self.modalities)
        everyone = torch.arange(B, device=device)
        rows = {n: everyone.expand(len(subsets), -1) for n, subsets in self.of_size.items()}
        times = dict.fromkeys(rows, 1.0)
        between = 2**M - M - 2
        if stratified and 0 < between <= B:
            share = B // between
            drawn = torch.randperm(B, device=device)[: between * share].view(between, share)
            drawn = drawn.split([math.comb(M, n) for n in range(2, M)])
            rows |= enumerate(drawn, start=2)
            times |= dict.fromkeys(range(2, M), B / share)
        return rows, times

    def objective(self, x, observed=None, complete=None):
        """The objective of the docstring above, per example (B,), over what is observed of it;
        where only one modality is, its ELBO. x has all modalities, or one alone. Terms: the KLs'
        sum and each log p(x_i|z) given all that is observed, in nats. Every example needs one
        observed modality.

        With `complete`, so many rows of x are tuples, and those behind are examples of each
        modality alone, whose values follow the tuples', modality by modality."""
        # `main` passes no mask, since what is missing comes as streams: the mask is for the
        # interface that all objectives share.
        x, masked = hide(x, observed, self.modalities), observed is not None
        names = [m.name for m in self.modalities if m.name in x]
        n_rows, device = len(x[names[0]]), self.zeros.device
        B = complete if complete is not None else n_rows * (len(names) > 1)
        alone = n_rows - B
        q = self.posteriors(x, B)
        rows, times = self.allotted(B, self.expectation == "stratified" and not masked)
        # Tuples have terms of single modalities with `svae`, and masked where no more is observed.
        first = 0 if masked or self.objective_name == "svae" else B
        rows[1] = torch.arange(first, n_rows, device=device).expand(len(names), -1)
        sizes = [n for n in q if rows[n].numel()]
        # The example that a term is of: those of a modality alone come after the tuples.
        behind = alone * torch.arange(len(names), device=device)[:, None]
        examples = rows | {1: rows[1] + torch.where(rows[1] < B, 0, behind)}
        tuples = torch.arange(B + alone * len(names), device=device) < B
        n_observed = observed.sum(1) if masked else torch.where(tuples, len(names), 1)

        z, weights, given_all, total_kl = {}, {}, {}, 0.0
        value = torch.zeros(len(n_observed), device=device)
        for n in sizes:
            subsets = torch.arange(len(rows[n]), device=device)[:, None]
            mu, logvar = (t[subsets, rows[n]] for t in q[n])  # (F, R, D)
            z[n] = mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)
            kl = gaussian_kl(mu, logvar)  # (D.30), and of a tuple as in Eq. (7)
            if n > 1:
                kl = torch.where(n_observed[rows[n]] > n, kl, 0)  # (D.29), not in (D.28)
                rests = self.get_buffer(f"rests_{n}")[..., None], rows[n][:, None]
                smaller = (t[rests] for t in q[n - 1])  # (F, P, R, D)
                kl = kl + gaussian_kl(mu[:, None], logvar[:, None], *smaller).sum(1)
            weights[n] = torch.full_like(kl, times[n])
            if masked:
                members = self.get_buffer(f"members_{n}")[:, None]
                weights[n] *= observed[rows[n][..., None], members].all(-1)
                if n == 1 and self.objective_name == "vaevae":
                    weights[n] *= n_observed[rows[n]] == 1
            given_all[n] = weights[n] * (n_observed[examples[n]] == n)
            total_kl = total_kl + (weights[n] * kl).sum()
            weighted = -self.beta * weights[n] * kl
            value = value.index_add(0, examples[n].flatten(), weighted.flatten())

        def having(name, t):
            """Of t[n] (F, R, ...) those of the subsets with this modality, (T, ...) for all n."""
            k = names.index(name)
            own = {n: self.get_buffer(f"having_{n}")[k] for n in sizes} | {1: slice(k, k + 1)}
            return torch.cat([t[n][own[n]].flatten(0, 1) for n in sizes])

        decoded = abreast(self.names, self.decoders, {name: having(name, z) for name in names})
        terms = {"kl": total_kl.detach() / len(value)}
        for i, m in enumerate(m for m in self.modalities if m.name in names):
            p = likelihood(m, decoded[m.name])
            log_p = p.log_prob(x[m.name][having(m.name, rows)])
            weighted = m.weight * having(m.name, weights) * log_p
            value = value.index_add(0, having(m.name, examples), weighted)
            total = (having(m.name, given_all) * log_p).sum().detach()
            seen = observed[:, i].sum().clamp(min=1) if masked else n_rows
            terms[f"log_px/{m.name}"] = total / seen
        return value, terms

    def streams(self, x):
        """The objective of the streams of a batch, see `common.Streams`, all in one pass."""
        return self.objective(x, complete=len(x[self.names[0]]) // 2)

    forward = objective


class JointEncoder(nn.Module):
    """q(z|x_S) of a subset, with encoders of its own: their features side by side, a layer, and the
    parameters. App. F has the layer of each modality, the released code on MNIST-Split the one
    behind; here are both."""

    def __init__(self, modalities, out_dim, hidden=512):
        super().__init__()
        self.encoders = nn.ModuleList(encoder(m, hidden, hidden) for m in modalities)
        join = nn.Linear(hidden * len(modalities), hidden)
        self.join = nn.Sequential(nn.ReLU(), join, nn.ReLU(), nn.Linear(hidden, out_dim))
        self.join.architecture = architecture(self.join)


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
