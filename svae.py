"""SVAE: Kutuzova, Krause, McCloskey, Nielsen and Igel, "Multimodal Variational Autoencoders for
Semi-Supervised Learning: In Defense of Product-of-Experts", 2021.

The posterior is a product of Gaussian experts, one for each modality, without the prior. The expert
of a missing modality is replaced by one that another modality's encoder supplies, so M modalities
have M² encoders: e_k^f(z|x_f) is expert k as computed from modality f. With two, Eq. (3) - (5),

    q(z|x1,x2) ∝ q1(z|x1) q2(z|x2),  q(z|x1) ∝ q1(z|x1) q2*(z|x1),  q(z|x2) ∝ q2(z|x2) q1*(z|x2).

    python svae.py                                     polydigits, some 20 minutes on one CPU core
    python svae.py --dataset polymnist --beta 2.5      β and D of Sutter et al. 2021
    torchrun --nproc-per-node 8 svae.py ...            several GPUs

Expected on polydigits: coherence of the modalities not given, given 1, 2, 3, 4: 79, 82, 84, 85 %;
joint coherence 9 %; latent accuracy given all 97 %.

A step takes a batch of complete tuples (of which `--supervision` leaves a share) and a batch of
each modality alone. The latter are drawn from all tuples, not from unpaired data as in the paper,
so with the objective `svae` the modalities of a complete tuple have their ELBOs twice. With two
modalities `--objective` is one of
    svae      Eq. (7) - (10), p(z|x_i) replaced by q(z|x_i): for a complete tuple
              E_q(z|x1,x2)[log p(x1|z) + log p(x2|z)]
              - KL(q(z|x1,x2) || q(z|x1)) - KL(q(z|x1,x2) || q(z|x2)) and the ELBOs of its
              modalities; for a modality alone its ELBO
    vaevae    without the ELBOs of a complete tuple's modalities ("SVAE*")

With more modalities (App. D) one given modality, the filler f, supplies all missing experts, and a
subset S has a form for every f in S (the whole set has one form):

    q^f(z|x_S) ∝ Π_{j in S} e_j^j(z|x_j) Π_{k not in S} e_k^f(z|x_f).

One filler for all missing experts is, when M > 3, this project's reading. Every S with |S| >= 2
adds E_q(z|x_S)[Σ_{i in S} log p(x_i|z)] - Σ_{i in S} KL(q(z|x_S) || q(z|x_S without x_i)), and all
but the whole also - KL(q(z|x_S) || p(z)), each summed over the forms of the posteriors in it. Of
(D.29) this leaves out the KL to the absent modality's posterior; (D.31) is taken as a sum over
unordered pairs. `svae` adds the ELBOs of a complete tuple's modalities here, too, as do Eq. (7) and
the released code; (D.30) has those of unpaired data only, and so has `vaevae`. With five
modalities that is 220 decodings of a complete tuple. With `--expectation stratified` it has, of the
S with 1 < |S| < M, the terms of one random S only, times the inverse of that S's share of the
batch: the same in expectation, at 18 decodings.
"""

import itertools
import time

import torch
from torch import nn
from torch.distributions import Categorical, MixtureSameFamily

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
)

DEFAULTS = datasets.settings(
    {
        # Each of the many posteriors is held to those of the smaller sets and to the prior; with
        # β = 1 and a batch of 64, coherence was 21 to 24 % after six epochs.
        "polydigits": dict(epochs=8, batch_size=16, lr=1e-3, beta=0.5),
        # App. F, which names no batch sizes: those of datasets.SETTINGS stay.
        "cub": dict(epochs=200, lr=1e-4),
        "mnist-svhn": dict(epochs=50, lr=1e-4),
    }
)
MOST_MODALITIES = 6  # the terms more than double with each


def arguments(argv):
    p, model = common.parser(__doc__, DEFAULTS)
    add = model.add_argument
    about = "the complete tuples' terms, see above"
    add("--objective", choices=["svae", "vaevae"], default="svae", help=about)
    about = "every S between one and all modalities, or one a tuple, evenly over the batch"
    add("--expectation", choices=["all", "stratified"], default="all", help=about)
    return common.parse(p, argv, DEFAULTS)


# -------------------------------------------------------------------------------------- model


class SVAE(nn.Module):
    """A subset S is a tuple of names, in the order of the modalities; the latent z has D
    = latent_dim dimensions."""

    def __init__(self, modalities, latent_dim, beta=1.0, objective="svae", expectation="all"):
        super().__init__()
        M, names = len(modalities), [m.name for m in modalities]
        if M > MOST_MODALITIES:
            cost = f"{M * 2 ** (M - 1) - M + 1} posteriors and {M**2} encoders"
            raise UserError(f"{M} modalities: {cost}; svae.py takes at most {MOST_MODALITIES}")
        self.modalities, self.latent_dim, self.names = modalities, latent_dim, names
        self.beta, self.objective_name, self.expectation = beta, objective, expectation
        # e_k^f is encoders[f][k].
        self.encoders = nn.ModuleList(
            nn.ModuleList(encoder(m, 2 * latent_dim) for _ in modalities) for m in modalities
        )
        self.decoders = nn.ModuleList(decoder(m, latent_dim) for m in modalities)
        # Eq. (3) - (5), (D.32) - (D.36): the forms of each subset, a form's experts as the pairs
        # (k, f) of their names.
        self.forms = {}
        for S in (S for n in range(1, M + 1) for S in itertools.combinations(names, n)):
            missing = [k for k in names if k not in S]
            forms = [[(j, j) for j in S] + [(k, f) for k in missing] for f in S]
            self.forms[S] = forms if missing else forms[:1]
        self.experts_of_all = list(itertools.product(names, names))
        masks = [
            [e in form for e in self.experts_of_all] for F in self.forms.values() for form in F
        ]
        self.register_buffer("masks", torch.tensor(masks), persistent=False)
        self.register_buffer("zeros", torch.zeros(latent_dim), persistent=False)

    def prior(self):
        """p(z) = N(0, I), event shape (D,)."""
        return gaussian(self.zeros, self.zeros)

    def posterior(self, x):
        """q(z|x_S) for the modalities in x; where S has several forms, their mixture, which is this
        project's reading."""
        S = tuple(m.name for m in self.modalities if m.name in x)
        forms = [product_of_gaussians(*self.experts(x, form)) for form in self.forms[S]]
        mu, logvar = (torch.stack(t, 1) for t in zip(*forms, strict=True))  # (B, F, D)
        if len(forms) == 1:
            return gaussian(mu[:, 0], logvar[:, 0])
        mix = Categorical(logits=torch.zeros_like(mu[..., 0]), validate_args=False)
        return MixtureSameFamily(mix, gaussian(mu, logvar), validate_args=False)

    def decode(self, z, names=None):
        """p(x_i|z) for z (..., D): of every modality, or of the named ones."""
        latents = {name: z for name in self.names if names is None or name in names}
        decoded = abreast(self.names, self.decoders, latents)
        return {
            m.name: likelihood(m, decoded[m.name]) for m in self.modalities if m.name in decoded
        }

    def experts(self, x, pairs):
        """Mean and log-variance of e_k^f(z|x_f) for pairs (k, f) of names, (len(pairs), B, D)."""
        at = {name: i for i, name in enumerate(self.names)}
        encoders = [self.encoders[at[f]][at[k]] for k, f in pairs]
        heads = abreast(pairs, encoders, {(k, f): x[f] for k, f in pairs})
        return bounded(*torch.stack([*heads.values()]).chunk(2, -1))

    def posteriors(self, x):
        """{S: (mean, log-variance)}, (F, B, D) each, of the F forms of q(z|x_S) for every subset S
        of the modalities in x, which are all or one."""
        if len(x) < len(self.modalities):
            (name,) = x
            mu, logvar = product_of_gaussians(*self.experts(x, self.forms[(name,)][0]))
            return {(name,): (mu[None], logvar[None])}
        products = product_of_gaussians(*self.experts(x, self.experts_of_all), self.masks)
        sizes = [len(forms) for forms in self.forms.values()]
        of_each = zip(*(t.split(sizes) for t in products), strict=True)
        return dict(zip(self.forms, of_each, strict=True))

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
            mu, logvar = (t[:, rows[S]] for t in q[S])
            z[S] = mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)  # (F, B or fewer, D)
        subsets_with = {name: [S for S in subsets if name in S] for name in self.names}
        latents = {
            name: torch.cat([z[S].flatten(0, 1) for S in those])
            for name, those in subsets_with.items()
            if those
        }
        decoded = abreast(self.names, self.decoders, latents)
        for m in (m for m in self.modalities if m.name in decoded):
            parts = decoded[m.name].split([z[S].shape[:2].numel() for S in subsets_with[m.name]])
            for S, part in zip(subsets_with[m.name], parts, strict=True):
                p = likelihood(m, part.unflatten(0, z[S].shape[:2]))
                log_p[S, m.name] = p.log_prob(x[m.name][rows[S]])

        if observed is None:
            observed = torch.ones(B, len(names), dtype=torch.bool, device=device)
        seen, n = dict(zip(names, observed.T, strict=True)), observed.sum(1)
        value, total_kl = torch.zeros(B, device=device), torch.zeros(B, device=device)
        log_px = {name: torch.zeros(B, device=device) for name in names}
        for S in subsets:
            counts = torch.stack([seen[name] for name in S]).all(0)
            q_S = [t[:, None, rows[S]] for t in q[S]]
            to_prior = gaussian_kl(*q_S).sum((0, 1))
            if len(S) == 1:
                kl = to_prior  # (D.30), and of a complete tuple as in Eq. (7)
                counts = counts & ((n == 1) | (self.objective_name == "svae"))
            else:
                kl = torch.where(n[rows[S]] > len(S), to_prior, 0)  # (D.29), not in (D.28)
                for name in S:
                    rest = tuple(other for other in S if other != name)
                    kl = kl + gaussian_kl(*q_S, *(t[:, rows[S]] for t in q[rest])).sum((0, 1))
            weighted = [m.weight * log_p[S, m.name].sum(0) for m in self.modalities if m.name in S]
            weight = times[S] * counts[rows[S]]
            value[rows[S]] += weight * (sum(weighted) - self.beta * kl)
            total_kl[rows[S]] += weight * kl
            for name in S:
                log_px[name][rows[S]] += weight * (n[rows[S]] == len(S)) * log_p[S, name].mean(0)
        log_px = {
            f"log_px/{k}": (t.sum() / seen[k].sum().clamp(min=1)).detach()
            for k, t in log_px.items()
        }
        return value, {"kl": total_kl.detach().mean()} | log_px

    forward = objective


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
        objective=args.objective,
        expectation=args.expectation,
    )
    model = SVAE(data.modalities, **config).to(device)
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
