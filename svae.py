"""SVAE: Kutuzova, Krause, McCloskey, Nielsen and Igel, "Multimodal Variational Autoencoders for
Semi-Supervised Learning: In Defense of Product-of-Experts", 2021.

The posterior is a product of Gaussian experts, one for each modality, without the prior. The expert
of a missing modality is replaced by one that another modality's encoder supplies, so M modalities
have M² encoders: e_k^f(z|x_f) is expert k as computed from modality f. With two, Eq. (3) - (5),

    q(z|x1,x2) ∝ q1(z|x1) q2(z|x2),  q(z|x1) ∝ q1(z|x1) q2*(z|x1),  q(z|x2) ∝ q2(z|x2) q1*(z|x2).

    python svae.py                                     polydigits, some 15 minutes on one CPU core
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
modalities that is 220 decodings of a complete tuple. With `--expectation stratified` each S with
1 < |S| < M has its terms on random tuples of the batch, as many as any other and none of another's,
times the inverse of their share of the batch: the same in expectation, at 18 decodings.
"""

import itertools
import math
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
        larger = [form for S, forms in self.forms.items() for form in forms if len(S) > 1]
        masks = [[e in form for e in self.experts_of_all] for form in larger]
        self.register_buffer("masks", torch.tensor(masks, dtype=torch.bool), persistent=False)
        # The subset of each form, those of n modalities apart. For each n, `members` are a form's
        # modalities, `having` the forms that have a modality, and `rests` all forms of what is left
        # of a form's subset without one modality.
        self.of_size = {n: [] for n in range(1, M + 1)}
        for S, forms in self.forms.items():
            self.of_size[len(S)] += [S] * len(forms)
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

    def posteriors(self, x, complete):
        """{n: (mean, log-variance)}, (F, B, D) each, of the forms of q(z|x_S) for all subsets S of
        n modalities: of one modality for every row of x, of more for the first `complete`."""
        mu, logvar = self.experts(x, [(k, f) for k, f in self.experts_of_all if f in x])
        # Eq. (4), (5), (D.36): one modality f alone has the product over k of what it supplies.
        q = {1: product_of_gaussians(*(t.unflatten(0, (-1, len(x))) for t in (mu, logvar)))}
        if complete:
            mu, logvar = mu[:, :complete], logvar[:, :complete]
            products = product_of_gaussians(mu, logvar, self.masks)
            sizes = [len(subsets) for n, subsets in self.of_size.items() if n > 1]
            q |= enumerate(zip(*(t.split(sizes) for t in products), strict=True), start=2)
        return q

    def allotted(self, B, stratified):
        """{n: the rows (F, R) that have the terms of the F forms of n modalities} and {n: the
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
            rows |= {n: t.repeat_interleave(n, 0) for n, t in enumerate(drawn, start=2)}
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
            forms = torch.arange(len(rows[n]), device=device)[:, None]
            mu, logvar = (t[forms, rows[n]] for t in q[n])  # (F, R, D)
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
            given_all[n] /= len(self.forms[self.of_size[n][0]])
            total_kl = total_kl + (weights[n] * kl).sum()
            weighted = -self.beta * weights[n] * kl
            value = value.index_add(0, examples[n].flatten(), weighted.flatten())

        def having(name, t):
            """Of t[n] (F, R, ...) those of the forms with this modality, (T, ...) for all n."""
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
