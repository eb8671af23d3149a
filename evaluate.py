"""Every metric of the papers, for any method and data set.

    python evaluate.py RUN...            repeat the evaluation that ended each run
    python evaluate.py RESULTS.json...   only compare what the runs gave, side by side

Of a model it calls prior, posterior and decode only, and lets each encoder run once a tuple. The
protocol is that of Sutter et al. 2021, App. B; where this or the released code differs from it, the
metric's docstring or comment says so.
"""

import argparse
import dataclasses
import functools
import importlib
import inspect
import itertools
import json
import math
import re
import sys
import textwrap
from collections import defaultdict
from contextlib import contextmanager, redirect_stdout
from operator import itemgetter
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from sklearn.cross_decomposition import CCA
from sklearn.decomposition import PCA, TruncatedSVD
from sklearn.dummy import DummyClassifier
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score
from sklearn.pipeline import make_pipeline
from torch.distributions import Categorical, MixtureSameFamily, kl_divergence
from tqdm import tqdm

import datasets
from common import (
    Help,
    Modality,
    UserError,
    capture,
    command,
    damaged,
    encoder,
    fail,
    generated,
    load_checkpoint,
    log_mean_exp,
    number,
    parse_device,
    read_facts,
    replace,
    subset_masks,
    tune_cpu,
)

# Tuples that are encoded, decoded and sampled together, on a GPU ON_GPU times as many. Noise is
# drawn chunk by chunk from a seed of the metric's own, so the size is part of the protocol: it
# changes the results' last digits.
CHUNK, ON_GPU = 200, 5
LATENT_TRAIN = 500  # tuples, App. B
IMPORTANCE_SAMPLES = 15  # App. B; the released code has 12
JOINT_SAMPLES = 10_000  # the released code has as many as there are test data
TRUSTED = 97  # per cent on test data, from which a classifier's verdict is taken
WATCHED = 1000  # training tuples that --eval-every looks at
WHOLE = "whole"  # beside the modalities, the image that they make up as its strips


def subsets_of(modalities):
    """The names of the modalities in every non-empty subset, singletons first; of more than eight
    modalities in those of one, of all but one, and of all."""
    names = [m.name for m in modalities]
    if len(names) > 8:
        others = [[n for n in names if n != name] for name in names]
        return [*([name] for name in names), *others, names]
    return [list(itertools.compress(names, mask)) for mask in subset_masks(len(names)).tolist()]


def chunk_on(device):
    return CHUNK * ON_GPU if device.type == "cuda" else CHUNK


@functools.lru_cache(maxsize=1)
def chunks(split):
    """The x of a split in its order, the same tensors each time."""
    order = torch.arange(len(split), device=split.labels.device)
    return [split.batch(rows)[0] for rows in order.split(chunk_on(order.device))]


@contextmanager
def encoding_once(model, split):
    """Within this context an encoder runs once for each chunk of the split; what it gives is kept
    for every subset, form and metric that asks for it again."""
    of_split = {t for x in chunks(split) for t in x.values()}  # a tensor's hash is its identity

    def remembering(encode):
        kept = functools.cache(encode)
        return lambda t: kept(t) if t in of_split else encode(t)

    encoders = [net for net in model.modules() if hasattr(net, "encodes")]
    for net in encoders:
        net.forward = remembering(net.forward)
    try:
        yield
    finally:
        for net in encoders:
            del net.forward
        chunks.cache_clear()


def representation(q):
    """The latent representation (B, D): the posterior's mean, for a mixture the mean of one
    component drawn for each example."""
    if not isinstance(q, MixtureSameFamily):
        return q.mean
    k = q.mixture_distribution.sample()
    return q.component_distribution.mean[torch.arange(len(k), device=k.device), k]


# ------------------------------------------------------------------------------------ metrics


def agreement(logits, labels):
    """How well logits (N, C) name the labels: of classes (N,) the accuracy, of attributes (N, C)
    the mean over them of the average precision, by scores and over all N; the released code has it
    batch by batch and, for the latents, of 0 and 1 in place of scores, which are other numbers."""
    if labels.ndim == 1:
        return (logits.argmax(-1) == labels).double().mean().item()
    there = labels.any(0)
    return float(average_precision_score(labels[:, there].cpu(), logits[:, there].cpu()))


def train_classifier(net, seen, split, steps=2000, batch_size=128):
    """Teach net to name the class, or the attributes, of what the function `seen` takes from a
    batch x (App. B); returns its weights. Images are moved by up to a pixel each way, a batch at a
    time: on polydigits that and the schedule take a network from 96 to 98 % of the test data."""
    device = split.labels.device
    on_gpu = device.type == "cuda"
    optimizer = torch.optim.Adam(net.parameters(), fused=on_gpu)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)

    def gradients(rows):
        x, labels = seen(split.batch(rows)[0]), split.labels[rows]
        if x.ndim == 4:
            height, width = (torch.arange(n, device=device) for n in x.shape[-2:])
            top, left = torch.randint(3, (2,), device=device)
            x = F.pad(x, (1, 1, 1, 1), mode="replicate")
            x = x[..., top + height[:, None], left + width]
        logits = net(x)
        if labels.ndim == 1:
            loss = F.cross_entropy(logits, labels)
        else:
            loss = F.binary_cross_entropy_with_logits(logits, labels.float())
        optimizer.zero_grad()
        loss.backward()

    net.train()
    gradients = capture(gradients, on_gpu)
    for _ in range(steps):
        gradients(torch.randint(len(split), (batch_size,), device=device))
        optimizer.step()
        schedule.step()
    return {k: v.cpu() for k, v in net.state_dict().items()}


def resnet18(channels, classes):
    """torchvision's, for images of any number of channels."""
    net = torchvision.models.resnet18(num_classes=classes)
    net.conv1 = torch.nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False)
    return net


def whole(x):
    """The image that modalities make up as its strips, (B, channels, height, width)."""
    return torch.cat(list(x.values()), -2)


def classifiers(train, test, modalities, strips, cache_dir):
    """A classifier for each modality, a network of its own encoder family, and where the modalities
    are `strips` of an image one for the whole, a ResNet-18, the oracle of Kutuzova et al. 2021;
    trained, or from the cache. Returns {name: x to logits} and {name: agreement with the
    labels of the test data}."""
    device, accuracy = train.labels.device, {}
    classes = train.labels.shape[1] if train.labels.ndim == 2 else int(train.labels.max()) + 1
    # One attribute alone does not tell the others; `symbol_metrics` says whether it is right.
    judged = [[m] for m in modalities if train.labels.ndim == 1 or m.shape != (1,)]
    named = {}
    for used in tqdm(judged + [modalities] * strips, "classifiers", leave=False, disable=None):
        torch.manual_seed(0)
        if len(used) == 1:
            name, net = used[0].name, encoder(used[0], classes)
            seen = itemgetter(name)
        else:
            name, net, seen = WHOLE, resnet18(used[0].shape[0], classes), whole
        net.to(device)
        own = {type(m) for m in net.modules() if not type(m).__module__.startswith("torch")}
        code = [inspect.getsource(train_classifier), *sorted(map(inspect.getsource, own))]
        key = [[train.fingerprint(m.name) for m in used], repr(net), code, torch.__version__]
        if name == WHOLE:
            key += [*map(inspect.getsource, (resnet18, whole)), torchvision.__version__]
        build = functools.partial(train_classifier, net, seen, train)
        net.load_state_dict(datasets.cached(cache_dir, "classifier", key, build))
        net.eval()
        # Whatever the model's networks run in, a verdict is one in float32.
        exact = torch.autocast(device.type, enabled=False)
        named[name] = exact(lambda x, net=net, seen=seen: net(seen(x)))
        with torch.no_grad():
            logits = torch.cat([named[name](x) for x in chunks(test)])
        accuracy[name] = agreement(logits, test.labels)
    return named, accuracy


def latent_accuracy(model, train, test, tuples=LATENT_TRAIN):
    """Accuracy of a linear classifier of every subset's latent representation, learnt from so many
    training tuples; of attributes the mean of their average precisions, as in `agreement`. Private
    latents are part of it, in the released code they are not."""
    rng = np.random.default_rng(0)
    rows = torch.from_numpy(rng.choice(len(train), min(tuples, len(train)), replace=False))
    rows = rows.to(train.labels.device)
    labels, accuracy = train.labels[rows].cpu().numpy(), {}

    def latents(subset, batches):
        parts = (representation(model.posterior({n: x[n] for n in subset})) for x in batches)
        return torch.cat([part.double().cpu() for part in parts]).numpy()

    for subset in subsets_of(model.modalities):
        torch.manual_seed(0)
        known = latents(subset, (train.batch(part)[0] for part in rows.split(LATENT_TRAIN)))
        unseen = latents(subset, chunks(test))
        linear, truth = LogisticRegression(max_iter=1000), test.labels.cpu().numpy()
        if labels.ndim == 1:
            if (labels == labels[0]).all():  # so few tuples may be of one class
                linear = DummyClassifier()
            accuracy["+".join(subset)] = linear.fit(known, labels).score(unseen, truth)
            continue
        shares = [
            average_precision_score(there, linear.fit(known, y).decision_function(unseen))
            for y, there in zip(labels.T, truth.T, strict=True)
            if 0 < y.sum() < len(y) and there.any()
        ]
        accuracy["+".join(subset)] = float(np.mean(shares))
    return accuracy


def shown(p):
    """What a classifier is shown of a generated modality: of a text its symbols' probabilities at
    its places, (B, L, categories), as in the released code of Sutter et al. 2021, since the most
    likely ones, each place for itself, often spell nothing; else what stands for the likelihood."""
    text = isinstance(p.base_dist, Categorical) and p.event_shape
    return p.base_dist.probs if text else generated(p)


def conditional_coherence(model, named, test):
    """How often a modality generated from a sample of a subset's posterior shows the tuple's class:
    {subset: {target: share}}, given modalities counting as targets too; of attributes the mean of
    their average precisions. named as `classifiers` has it, of each modality and maybe of the image
    that they make up. The released code draws all private latents from the prior; here those of
    what is given are its own."""
    coherence = {}
    for subset in subsets_of(model.modalities):
        torch.manual_seed(0)
        logits = defaultdict(list)
        for x in chunks(test):
            z = model.posterior({name: x[name] for name in subset}).sample()
            made = {name: shown(p) for name, p in model.decode(z).items()}
            for name, classify in named.items():
                logits[name].append(classify(made))
        coherence["+".join(subset)] = {
            name: agreement(torch.cat(parts), test.labels) for name, parts in logits.items()
        }
    return coherence


def coherence_by_inputs(coherence):
    """Mean coherence by the number of given modalities, in both conventions: over the targets that
    were not given (the papers' figures), and over all, as the released code counts them."""
    shares = defaultdict(list)
    for subset, targets in coherence.items():
        given = subset.split("+")
        for target, share in targets.items():
            shares[f"{len(given)}/with_inputs"].append(share)
            if target not in given:
                shares[f"{len(given)}/without_inputs"].append(share)
    return {key: float(np.mean(values)) for key, values in shares.items()}


def joint_coherence(model, named):
    """How often all modalities decoded from one sample of the prior are of one class."""
    torch.manual_seed(0)
    alike = 0
    for n in torch.arange(JOINT_SAMPLES).split(CHUNK):
        z = model.prior().sample((len(n),))
        made = {name: shown(p) for name, p in model.decode(z).items()}
        classes = torch.stack([named[name](made).argmax(-1) for name in made])
        alike += (classes == classes[0]).all(0).sum().item()
    return alike / JOINT_SAMPLES


def log_weights(model, q, x, samples, targets):
    """Log importance weights with the proposal q: for z ~ q log p(x_T|z) p(z) / q(z), (samples,
    targets, B), a target being the names T and the density p(z). Without likelihood weights."""
    tuples = len(next(iter(x.values())))
    size = max(1, IMPORTANCE_SAMPLES * CHUNK // max(tuples, CHUNK))
    blocks = []  # of z, since what is decoded from it is large
    for k in torch.arange(samples).split(size):
        z = q.sample((len(k),))
        log_q = q.log_prob(z)
        log_p = {name: p.log_prob(x[name]) for name, p in model.decode(z, list(x)).items()}
        rows = [sum(log_p[name] for name in T) + p_z.log_prob(z) - log_q for T, p_z in targets]
        blocks.append(torch.stack(rows, 1).double())
    return torch.cat(blocks)


def weigh(log_w):
    """Of log weights (samples, ...): the log of their mean, their effective number (Σ w)² / Σ w²
    and the variance of the logs, (...) each."""
    effective = torch.exp(2 * log_w.logsumexp(0) - (2 * log_w).logsumexp(0))
    return log_mean_exp(log_w, 0), effective, log_w.var(0, correction=min(1, len(log_w) - 1))


def mixed_over_tuples(log_w):
    """Of log weights (samples, tuples) the log of means over as many tuples, one sample of each, in
    place of each tuple's own samples, (tuples,): the released code of MoPoE takes rows of weights
    that are sample-major as if they were tuple-major. The tuples are shuffled, as there."""
    order = torch.randperm(log_w.shape[1], generator=torch.Generator().manual_seed(0))
    return log_mean_exp(log_w[:, order].reshape(log_w.shape[::-1]), 1)


def log_likelihood(model, test, samples=IMPORTANCE_SAMPLES, proposals="all"):
    """log p(X) in nats per tuple, by importance sampling with each subset's posterior as the
    proposal, as a flat dict, with the standard error over the tuples, the effective number of
    samples and the variance of the log weights. proposals "full" leaves only the full set's.

    With up to three modalities, or given all, also log p(x_i) and log p(x_i|the others). The latter
    is log p(X) less log p(the others), by samples of the others' own posterior, since q(z|x_S) may
    miss much of theirs; with proposals "full" there is none. Its variance is that of the log of
    p(x_i|z) q(z|others) / q(z|x_S) (Wu & Goodman 2018, Section 5 and supplement, Tables 1 and 2).

    Beside log p(X) stands what the released code of MoPoE makes of the same weights, by
    `mixed_over_tuples`, to compare with published numbers; it is no estimate of log p(X).
    """
    names, subsets = [m.name for m in model.modalities], subsets_of(model.modalities)
    subsets = [names] if proposals == "full" else subsets
    results, own, conditionals = {}, {}, []

    def put(metric, value, variance, effective=None):
        results[metric] = value.mean().item()
        results[f"standard_error/{metric}"] = (value.std() / len(value) ** 0.5).item()
        results[f"log_weight_variance/{metric}"] = variance.mean().item()
        if effective is not None:
            results[f"effective_samples/{metric}"] = effective.mean().item()

    for subset in tqdm(subsets, "log-likelihood", leave=False, disable=None):
        torch.manual_seed(0)
        key = "+".join(subset)
        joint = f"log_likelihood/{key}"
        single = names if len(names) <= 3 or subset == names else []
        others = {name: tuple(n for n in names if n != name) for name in single}
        found, joint_weights = [], []
        for x in chunks(test):
            prior, q = model.prior(), model.posterior({name: x[name] for name in subset})
            targets = {joint: (names, prior), "own": (subset, prior)}
            for i in single:
                given = model.posterior({name: x[name] for name in others[i]})
                targets[f"marginal/{key}/{i}"] = [i], prior
                targets[f"conditional/{key}/{i}"] = [i], given
            log_w = log_weights(model, q, x, samples, list(targets.values()))
            found.append(torch.stack(weigh(log_w), 1))
            joint_weights.append(log_w[:, 0].clone())  # a view would keep them all
        estimates = dict(zip(targets, torch.cat(found, -1), strict=True))  # (3, tuples) each
        own[tuple(subset)], *_ = estimates.pop("own")
        for metric, (value, effective, variance) in estimates.items():
            if metric.startswith("conditional/"):
                rest = others[metric.rpartition("/")[-1]]
                conditionals.append((metric, rest, estimates[joint][0], variance))
            else:
                put(metric, value, variance, effective)
        results[f"mixed_{joint}"] = mixed_over_tuples(torch.cat(joint_weights, 1)).mean().item()
    for metric, rest, value, variance in conditionals:
        if rest in own:
            put(metric, value - own[rest], variance)
    return results


@torch.no_grad()
def evaluate(
    model, data, args, latent_train=LATENT_TRAIN, samples=IMPORTANCE_SAMPLES, proposals="all"
):
    """All metrics of a model as one flat dict, the content of results.json. With --amp the networks
    run in bfloat16 here as they did in training; densities stay in float32. A metric draws noise of
    its own, so what one decodes is of no use to the next."""
    model.eval()
    device = next(model.parameters()).device
    train, test = data.train.to(device), data.test.to(device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.amp)
    with autocast, encoding_once(model, test):
        results = class_metrics(model, train, test, data.strips, args.cache_dir, latent_train)
        results |= symbol_metrics(model, test) | correlation(model, train, test)
        return results | log_likelihood(model, test, samples, proposals)


def class_metrics(model, train, test, strips, cache_dir, latent_train=LATENT_TRAIN):
    """What asks for the class that a latent or a generated modality shows, as a flat dict; empty
    where all labels are the same."""
    if (train.labels == train.labels[0]).all():
        return {}
    with torch.enable_grad(), torch.autocast(train.labels.device.type, enabled=False):
        named, accuracy = classifiers(train, test, model.modalities, strips, cache_dir)
    results = {f"classifier_accuracy/{name}": value for name, value in accuracy.items()}
    for subset, value in latent_accuracy(model, train, test, latent_train).items():
        results[f"latent_accuracy/{subset}"] = value
    coherence = conditional_coherence(model, named, test)
    for subset, targets in coherence.items():
        if strips:
            results[f"oracle_accuracy/{subset}"] = targets.pop(WHOLE)
        for target, value in targets.items():
            results[f"coherence/{subset}/{target}"] = value
    for key, value in coherence_by_inputs(coherence).items():
        results[f"coherence_by_inputs/{key}"] = value
    if test.labels.ndim == 1:
        results["joint_coherence"] = joint_coherence(model, named)
        return results
    return {re.sub("accuracy|coherence", "precision", key): v for key, v in results.items()}


def symbol_metrics(model, test):
    """How often a label, a text or attributes, generated from a sample of the posterior given other
    modalities, are the tuple's own: as a whole, and of the symbols but for blanks and stars; a flat
    dict (Wu & Goodman 2018, supplement, Tables 4 and 5)."""

    def symbolic(m):
        return m.likelihood == "categorical" or (m.likelihood == "bernoulli" and len(m.shape) == 1)

    kinds = [m for m in model.modalities if symbolic(m)]
    results, symbols = defaultdict(float), defaultdict(int)
    for subset in subsets_of(model.modalities):
        targets = [m for m in kinds if m.name not in subset]
        if not targets:
            continue
        torch.manual_seed(0)
        for x in chunks(test):
            z = model.posterior({name: x[name] for name in subset}).sample()
            made = model.decode(z, [m.name for m in targets])
            for m in targets:
                truth = x[m.name].view(len(z), -1)
                right = generated(made[m.name]).round().view(len(z), -1) == truth
                counts = truth != (-1 if m.padding is None else m.padding)
                key = f"{'+'.join(subset)}/{m.name}"
                exact = (right | ~counts).all(1).sum().item()
                results[f"exact_match/{key}"] += exact / len(test)
                if m.shape:
                    for symbol in set(m.alphabet) & set(" *"):
                        counts &= truth != m.alphabet.index(symbol)
                    symbols[key] += counts.sum().item()
                    results[f"symbol_accuracy/{key}"] += (right & counts).sum().item()
    for key, n in symbols.items():
        results[f"symbol_accuracy/{key}"] /= max(n, 1)
    return results


def symbols_of(modality, text):
    """The symbols of a text (L,) without padding, of a caption those before its "<eos>": behind it
    nothing that is generated was ever scored."""
    symbols = [modality.alphabet[int(n)] for n in text if n != modality.padding]
    return symbols[: symbols.index("<eos>")] if "<eos>" in symbols else symbols


def correlation(model, train, test):
    """The correlation of pictures' features with captions after a canonical correlation analysis of
    training pairs, as a flat dict: of test pairs, of what is generated from 1,000 samples of the
    prior, and of one given with the other generated from it (Kutuzova et al. 2021, Section 4).

    A caption's vector has 300 dimensions, centred, by latent semantic analysis of the training
    captions in place of FastText; features are reduced to as many principal components, and 5,000
    pairs train. Empty where there are no such modalities.
    """
    texts = [m for m in model.modalities if m.likelihood == "categorical"]
    captions = [m for m in texts if isinstance(m.alphabet, tuple)]
    features = [m for m in model.modalities if m not in texts and len(m.shape) == 1]
    if len(model.modalities) != 2 or not (features and captions):
        return {}
    (image,), (caption,) = features, captions
    rows = np.random.default_rng(0).permutation(len(train))[:5000]
    known = train.batch(torch.from_numpy(rows).to(train.labels.device))[0]

    def words(x):
        return [symbols_of(caption, text) for text in x[caption.name].tolist()]

    weighted = TfidfVectorizer(analyzer=list).fit(words(known))
    size = min(300, len(weighted.vocabulary_) - 1, *image.shape, len(rows))
    meaning = make_pipeline(weighted, TruncatedSVD(size, random_state=0)).fit(words(known))
    axes = PCA(size, random_state=0).fit(known[image.name].cpu())

    def vectors(x):
        return axes.transform(x[image.name].float().cpu()), meaning.transform(words(x))

    analysis = CCA(min(40, size), max_iter=5000).fit(*vectors(known))

    def cosines(x):
        sides = analysis.transform(*vectors(x))
        u, v = (side / np.linalg.norm(side, axis=1, keepdims=True) for side in sides)
        return (u * v).sum(1)

    torch.manual_seed(0)
    z = model.prior().sample((1000,))
    found = {"joint": [cosines({name: generated(p) for name, p in model.decode(z).items()})]}
    for x in chunks(test):
        found.setdefault("data", []).append(cosines(x))
        for given, target in ((image.name, caption.name), (caption.name, image.name)):
            made = x | {target: generate(model, x, [given])[target]}
            found.setdefault(f"{given}/{target}", []).append(cosines(made))
    return {f"correlation/{key}": np.concatenate(v).mean().item() for key, v in found.items()}


def watch(writer, model, data, args, epoch):
    """While a model trains: all metrics on 1,000 training tuples, the same each time and never of
    the test data, to TensorBoard as train/…; the 500 that teach the latents' classifier may be
    among them."""
    rng = np.random.default_rng(0)
    rows = torch.from_numpy(rng.permutation(len(data.train))[:WATCHED])
    index = {name: i[rows] for name, i in data.train.index.items()}
    labels = data.train.labels[rows]
    part = dataclasses.replace(data.train, labels=labels, index=index, observed=None)
    torch.manual_seed(0)  # for pixels that are drawn
    for name, value in evaluate(model, dataclasses.replace(data, test=part), args).items():
        writer.add_scalar(f"train/{name}", value, epoch)
    writer.flush()
    model.train()


# ----------------------------------------------------------------------------------- pictures


def in_words(modality, example):
    """An example (n,) that is no picture as a line: a text's symbols, the names of the attributes
    that are likelier there than not, else the first eight numbers."""
    alphabet, categorical = modality.alphabet, modality.likelihood == "categorical"
    if not alphabet:
        return " ".join(f"{n:g}" if categorical else f"{n:.2f}" for n in example[:8].tolist())
    if not categorical:
        return ", ".join(itertools.compress(alphabet, example > 0.5))
    between = "" if isinstance(alphabet, str) else " "
    return between.join(symbols_of(modality, example)).strip(" *")


def draw_row(axis, modality, x, title):
    """One row of a grid: the examples x (n, *shape) of a modality side by side."""
    axis.set(xticks=[], yticks=[])
    axis.set_ylabel(title, rotation=0, ha="right", va="center")
    x = x.float().cpu()
    if len(modality.shape) == 3:
        picture = torchvision.utils.make_grid(x.clamp(0, 1), nrow=len(x), pad_value=1.0)
        axis.imshow(picture.permute(1, 2, 0).numpy(), aspect="auto", interpolation="nearest")
    else:
        axis.set_xlim(0, len(x))
        for i, example in enumerate(x.reshape(len(x), -1)):
            text, size = in_words(modality, example), 7
            if len(text) > 12:
                text, size = textwrap.fill(text, 18, max_lines=9), 3.5
            axis.text(i + 0.5, 0.5, text, ha="center", va="center", fontsize=size, parse_math=False)


def draw_grid(path, columns, scale=0.7):
    """A PNG of columns {title: rows}, whose rows (modality, x (n, *shape), label) are alike; scale
    is an example's inches."""
    first = next(iter(columns.values()))
    size = scale * len(first[0][1]) * len(columns) + 1.2, scale * len(first) + 0.5
    figure, axes = plt.subplots(len(first), len(columns), figsize=size, squeeze=False)
    for i, (title, rows) in enumerate(columns.items()):
        axes[0, i].set_title(title)
        for axis, (modality, x, label) in zip(axes[:, i], rows, strict=True):
            draw_row(axis, modality, x, "" if i else label)
    figure.tight_layout(h_pad=0.05, w_pad=0.3)
    figure.savefig(path, dpi=100, format="png")
    plt.close(figure)


def examples(test, n):
    """n test tuples, their classes spread evenly: a dict of tensors, and the labels."""
    rng = np.random.default_rng(0)
    first = test.labels.view(len(test), -1)[:, 0]  # of several attributes
    by_class = np.argsort(first.cpu().numpy() + rng.uniform(0, 0.5, len(test)))
    even = np.linspace(0, len(test) - 1, min(n, len(test))).round().astype(int)
    rows = torch.from_numpy(by_class[even]).to(first.device)
    return test.batch(rows)[0], test.labels[rows]


def generate(model, x, given):
    """All modalities from one sample of the posterior of the given ones."""
    z = model.posterior({name: x[name] for name in given}).sample()
    return {name: generated(p) for name, p in model.decode(z).items()}


def rows_from(model, x, given):
    """Rows of a grid: the examples of the modality `given`, and all that is generated from it."""
    made = generate(model, x, [given.name])
    made = [(m, made[m.name], "→ " + m.name) for m in model.modalities]
    return [(given, x[given.name], given.name), *made]


@torch.no_grad()
def draw_samples(folder, model, data):
    """reconstructions.png, from_<name>.png for every single modality, and joint.png."""
    folder.mkdir(exist_ok=True)
    x, _ = examples(data.test.to(next(model.parameters()).device), 12)
    modalities = model.modalities
    torch.manual_seed(0)

    made, grid = generate(model, x, list(x)), []
    for m in modalities:
        grid += [(m, x[m.name], m.name), (m, made[m.name], "→ " + m.name)]
    draw_grid(folder / "reconstructions.png", {"given all: input and reconstruction": grid})
    for given in modalities:
        grid = {f"given {given.name} alone": rows_from(model, x, given)}
        draw_grid(folder / f"from_{given.name}.png", grid)
    made = {name: generated(p) for name, p in model.decode(model.prior().sample((12,))).items()}
    grid = [(m, made[m.name], m.name) for m in modalities]
    draw_grid(folder / "joint.png", {"from the prior": grid})


@torch.no_grad()
def draw_latents(folder, model, test):
    """latents.png: the KL of each latent dimension between the posteriors given one modality and
    the prior, and between two of them, both ways and in the mean over the pairs; beside it the
    representations given all on their two main axes. traverse_<name>.png: what the three
    dimensions that differ most from the prior show, from a mean given one modality five of the
    prior's standard deviations down and up, with up to eight modalities (Shi et al. 2019, Figure
    5)."""
    x, labels = examples(test, 500)
    torch.manual_seed(0)
    given = {m.name: model.posterior({m.name: x[m.name]}) for m in model.modalities}
    factors, prior = {name: factors_of(q) for name, q in given.items()}, model.prior().base_dist
    to_prior = {name: kl_divergence(q, prior).mean(0).cpu() for name, q in factors.items()}
    pairs = itertools.permutations(factors.values(), 2)
    between = 2 * torch.stack([kl_divergence(*pair).mean(0) for pair in pairs]).mean(0).cpu()
    order = sum(to_prior.values()).argsort(descending=True)

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name, kl in to_prior.items():
        left.plot(kl[order], label=f"given {name}, to the prior")
    left.plot(between[order], "k:", label="between two, both ways")
    left.set_yscale("symlog", linthresh=0.1)
    left.set(xlabel="latent dimension, the most used first", ylabel="KL, nats")
    left.legend(fontsize=8)
    axes = PCA(2, random_state=0).fit_transform(representation(model.posterior(x)).float().cpu())
    points = right.scatter(*axes.T, c=labels.view(len(axes), -1)[:, 0].cpu(), cmap="tab10", s=8)
    beside = dict(loc="center left", bbox_to_anchor=(1, 0.5))
    right.legend(*points.legend_elements(), fontsize=8, title="class", **beside)
    right.set_title("mean given all", fontsize=10)
    right.set(xlabel="first principal component", ylabel="second")
    figure.savefig(folder / "latents.png", dpi=100)
    plt.close(figure)

    if len(factors) > 8:
        return
    for name, q in factors.items():
        grid = []
        for d in order[:3].tolist():
            z = q.mean[:1].repeat(11, 1)
            z[:, d] += torch.linspace(-5, 5, 11).to(z) * prior.stddev[d]
            made = model.decode(z)
            grid += [(m, generated(made[m.name]), f"z{d}, {m.name}") for m in model.modalities]
        title = f"given {name}, a dimension from -5 to 5 standard deviations"
        draw_grid(folder / f"traverse_{name}.png", {title: grid})


def factors_of(q):
    """The univariate densities (B, D) of a posterior, of a mixture those of its first component,
    the only one where one modality is given."""
    if not isinstance(q, MixtureSameFamily):
        return q.base_dist
    p = q.component_distribution.base_dist
    return type(p)(p.loc[:, 0], p.scale[:, 0], validate_args=False)


# ------------------------------------------------------------------------- tables and figures

# What tables and figures show of the results: a metric, and the keys with its columns.
ORACLE, JOINT = "class of the whole image, by the oracle, %", "joint coherence, %"
CROSS = "coherence from a subset to a target, %"
MIXED = "log p(X), weights mixed as in MoPoE's code, nats"
CLASSIFIERS = "the classifiers' accuracy on test data, %"
METRICS = {
    ORACLE: r"oracle_accuracy/(.+)",
    "coherence of the modalities not given, %": r"coherence_by_inputs/(\d+)/without_inputs",
    "coherence of all modalities, %": r"coherence_by_inputs/(\d+)/with_inputs",
    CROSS: r"coherence/(.+/.+)",
    JOINT: r"(joint)_coherence",
    "latent accuracy, %": r"latent_accuracy/(.+)",
    "mean average precision of the latents, %": r"latent_precision/(.+)",
    "mean average precision from a subset to a target, %": r"precision/(.+/.+)",
    "labels and texts generated as they are, %": r"exact_match/(.+/.+)",
    "their symbols, %": r"symbol_accuracy/(.+/.+)",
    "100 × correlation of pictures and captions, %": r"correlation/(.+)",
    "log p(X), nats": r"log_likelihood/(.+)",
    MIXED: r"mixed_log_likelihood/(.+)",
    "log p(x) of one, nats": r"marginal/(.+/.+)",
    "log p(x) of one given the others, nats": r"conditional/(.+/.+)",
    "variance of log w, log p(X)": r"log_weight_variance/log_likelihood/(.+)",
    "variance of log w, log p(x) of one": r"log_weight_variance/marginal/(.+/.+)",
    "variance of log w, one given the others": r"log_weight_variance/conditional/(.+/.+)",
    CLASSIFIERS: r"classifier_accuracy/(.+)",
}
OF_LIKELIHOODS = ("marginal/", "conditional/", "log_weight_variance/")
BY_SUBSET = ("latent_", "log_likelihood/", "mixed_", "log_weight_variance/log_likelihood/")
PAPERS = Path(__file__).parent / "results" / "papers.json"
# Options of the data, by which runs of different scripts are told apart, too.
OF_DATA = ("supervision", "keep", "pairings", "data_seed", "weights")
# Options that are not among a result's "options": where and how a run ran, and what stands beside.
CIRCUMSTANCES = {"cache_dir", "checkpoint_every", "compile", "data_dir", "device", "download"}
CIRCUMSTANCES |= {"eval_every", "no_eval", "resume", "runs_dir", "dataset", "epochs", "seed"}


def numbers(results):
    """A run's results as {metric: {column: value}}. A column is a subset of the modalities, of more
    than three the number of those given and a mean over its subsets; targets are shown of up to
    three, where they were not given."""
    shown = {}
    sizes = [key.count("+") + 1 for key in results if key.startswith("log_likelihood/")]
    by_number = max(sizes, default=0) > 3
    for metric, pattern in METRICS.items():
        columns = defaultdict(list)
        keys = {key: match[1] for key in results if (match := re.fullmatch(pattern, key))}
        for key, column in keys.items():
            given, _, target = column.partition("/")
            own = target in given.split("+")
            if target and (by_number or own) and not key.startswith(OF_LIKELIHOODS):
                continue
            if by_number and target and given.count("+") + 1 == max(sizes):
                given = "all"
            column = f"{given} → {target}" if target else given
            if by_number and key.startswith(BY_SUBSET):
                column = str(given.count("+") + 1)
            columns[column].append(100 * results[key] if metric.endswith("%") else results[key])
        if columns:
            shown[metric] = {column: float(np.mean(values)) for column, values in columns.items()}
    return shown


PROTOCOL = ("latent_train", "importance_samples")


def settings_of(results):
    """All options that are set, and the protocol. Runs of a script in which these are equal are
    seeds of one experiment."""
    options = {name: value for name, value in results["options"].items() if value != ""}
    return options | {name: results.get(name) for name in ("epochs", *PROTOCOL)}


def groups(runs, apart=()):
    """{label: the results of runs of equal settings}, the label being the script and those of its
    settings, but for the options `apart`, in which its runs differ, of the data all runs."""
    settings, by_label = [(r["script"], settings_of(r)) for r in runs], defaultdict(list)
    for results, (script, own) in zip(runs, settings, strict=True):
        differ = {
            k
            for other, theirs in settings
            for k in own
            if (k in OF_DATA or other == script) and theirs.get(k) != own[k]
        }
        label = [f"{script}.py"]
        for k in sorted(differ.difference(apart)):
            option = f"--{k.replace('_', '-')}"
            if own[k] is None or own[k] is False:
                continue
            if k in PROTOCOL:
                label.append(f"({own[k]} {k.replace('_', ' ')})")
            else:
                label.append(option if own[k] is True else f"{option} {own[k]}")
        by_label[" ".join(label)].append(results)
    return by_label


def statistics(runs):
    """{metric: {label: {column: (mean, standard deviation)}}} over the seeds; of one seed the
    deviation is None."""
    found = defaultdict(dict)
    for label, members in groups(runs).items():
        shown = [numbers(results) for results in members]
        for metric, columns in shown[0].items():
            if not all(columns.keys() == n.get(metric, {}).keys() for n in shown):
                continue  # not in all of the members
            values = {column: [n[metric][column] for n in shown] for column in columns}
            found[metric][label] = {
                column: (float(np.mean(v)), float(np.std(v, ddof=1)) if len(v) > 1 else None)
                for column, v in values.items()
            }
    return found


def comparison(runs, markdown=False):
    """Tables of runs of one data set, one for each metric, a row for each setting and below it,
    where results/papers.json has them for these options, the paper's numbers."""
    papers = json.loads(PAPERS.read_text()) if PAPERS.is_file() else {}
    papers = papers.get(runs[0]["dataset"], {})
    members, lines = groups(runs), []
    found = statistics(runs)
    for metric, rows in found.items():
        columns = list(max(rows.values(), key=len))
        titles = [f"{column} given" if column.isdecimal() else column for column in columns]
        cells = [[metric, *titles, "epochs", "seeds"]]
        for label, row in rows.items():
            seeds = sorted(results["seed"] for results in members[label])
            tail = [str(members[label][0]["epochs"]), ", ".join(map(str, seeds))]
            ours = [plus_minus(*row.get(column, [None])) for column in columns]
            cells.append([label, *ours, *tail])
            options = members[label][0]["options"]
            for paper in papers.get(members[label][0]["script"], {}).get(metric, []):
                if any(options.get(o) not in allowed for o, allowed in paper["options"].items()):
                    continue
                theirs = [plus_minus(*paper["columns"].get(column, [None])) for column in columns]
                cells.append([paper["source"], *theirs, str(paper["epochs"]), str(paper["seeds"])])
        if metric == MIXED and len(cells) == 1 + len(rows):
            continue  # of use beside a paper's numbers only
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        if markdown:
            cells.insert(1, ["---"] * len(widths))
            lines += ["| " + " | ".join(row) + " |" for row in cells]
        else:
            lines += ["  ".join(map(str.ljust, row, widths)).rstrip() for row in cells]
        lines.append("")
    verdicts = defaultdict(set)
    for results in runs:
        for name, accuracy in numbers(results).get(CLASSIFIERS, {}).items():
            verdicts[name].add(accuracy)
    if doubtful := ", ".join(n for n, seen in sorted(verdicts.items()) if min(seen) < TRUSTED):
        lines.append(f"Below {TRUSTED} % a classifier's errors bound the coherence: {doubtful}.\n")
    if any(len(seen) > 1 for seen in verdicts.values()):
        lines.append("The runs' coherences are by classifiers of different accuracy.\n")
    return "\n".join(lines)


def plus_minus(mean, deviation=None):
    """A cell of a table."""
    if mean is None:
        return "–"
    cell = f"{mean:.1f}" if abs(mean) < 1e7 else f"{mean:.1e}"
    return cell + (f" ± {deviation:.1f}" if deviation is not None else "")


def curves(runs, against):
    """{panel: {label: points (x, mean, standard deviation, note)}}: the metrics against the number
    of given modalities ("inputs"); coherence against an option, between modalities and joint, or of
    an image in parts that of the whole, a panel for each column; for "beta" the mean of the first
    of METRICS and the joint coherence against log p(X) given all, a point for each β, its note."""
    panels = defaultdict(lambda: defaultdict(list))
    if against == "inputs":
        for metric, rows in statistics(runs).items():
            for label, row in rows.items():
                if all(map(str.isdecimal, row)):
                    panels[metric][label] = [(int(n), *value, "") for n, value in row.items()]
        return panels
    for label, members in groups(runs, [against]).items():
        for x in sorted({results["options"][against] for results in members}):
            found = statistics([r for r in members if r["options"][against] == x])
            rows = {metric: next(iter(row.values())) for metric, row in found.items()}
            first = next(iter(rows))
            if against != "beta":
                between = [CROSS if CROSS in rows else first, JOINT]
                for metric in [ORACLE] if ORACLE in rows else between:
                    for column, value in rows.get(metric, {}).items():
                        title = {CROSS: column, JOINT: ""}.get(metric, f"given {column}")
                        panels[f"{metric}\n{title}"][label].append((x, *value, ""))
                continue
            if "log p(X), nats" not in rows:
                raise UserError(f"--against beta: seeds of {label} differ in --proposals")
            *_, (given_all, _) = rows["log p(X), nats"].values()
            for metric in [metric for metric in rows if metric in (first, JOINT)]:
                mean = float(np.mean([mean for mean, _ in rows[metric].values()]))
                panels[metric][label].append((given_all, mean, None, f"{x:g}"))
    return panels


def draw_curves(path, runs, against):
    """A PNG of `curves`: a panel each, a line for each label, a band of one standard deviation."""
    panels = curves(runs, against)
    if not panels:
        raise UserError("--against inputs: no metric of these runs is by the number of inputs")
    width = min(len(panels), 2 if len(panels) == 4 else 3)
    height = math.ceil(len(panels) / width)
    size = max(3.6 * width, 5), 3.2 * height
    shares = against in ("supervision", "keep")  # what the panels show, in per cent
    options = dict(figsize=size, squeeze=False, sharey=shares, layout="constrained")
    figure, axes = plt.subplots(height, width, **options)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    names = {
        "inputs": "modalities given",
        "beta": "log p(X) given all, nats; beside the points β",
        "supervision": "share of complete tuples",
        "keep": "chance of each modality to be there",
    }
    for axis, (title, lines) in zip(axes.flat, panels.items(), strict=False):
        for label, points in lines.items():
            x, mean, deviations, notes = zip(*points, strict=True)
            mean, band = np.array(mean), np.array([deviation or 0 for deviation in deviations])
            axis.plot(x, mean, marker="o", label=label)
            axis.fill_between(x, mean - band, mean + band, alpha=0.2)
            for i, (note, *point) in enumerate(zip(notes, x, mean, strict=True)):
                offset = (4, 4 - 14 * (i % 2))  # by turns above and below, where points are close
                axis.annotate(note, point, offset, textcoords="offset points")
        if against == "inputs":
            axis.set_xticks(x)
        if against == "beta":
            axis.margins(0.1)
            axis.locator_params(axis="x", nbins=4)
        if shares:
            axis.set_xscale("log")
            ticks = sorted({x for points in lines.values() for x, *_ in points})
            axis.set_xticks(ticks, [f"{x:g}" for x in ticks])
            axis.minorticks_off()
        axis.set_xlabel(names[against])
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
    if shares:
        axes[0, 0].set_ylim(0, 1.04 * axes[0, 0].get_ylim()[1])
    handles, labels = axes[0, 0].get_legend_handles_labels()
    fitting = int(size[0] / (0.5 + 0.08 * max(map(len, labels))))  # an entry's inches, about
    figure.legend(handles, labels, loc="outside lower center", ncols=max(1, fitting))
    figure.savefig(path, dpi=100, format="png")
    plt.close(figure)


# ------------------------------------------------------------------------------------- a run


def report(
    run, model, data, args, latent_train=LATENT_TRAIN, samples=IMPORTANCE_SAMPLES, proposals="all"
):
    """Evaluate the model: results.json and samples/ into the run's folder, the table to the
    terminal."""
    facts = read_facts(run)
    results = {
        "script": Path(inspect.getfile(type(model))).stem,
        "dataset": Path(args.dataset).name,
        "source": data.source,
        "epochs": args.epochs,
        "seed": args.seed,
        "options": {k: v for k, v in vars(args).items() if k not in CIRCUMSTANCES},
        "trained_with": {k: facts.get(k) for k in ("git", "versions", "threads", "device")},
        "latent_train": min(latent_train, len(data.train)),
        "importance_samples": samples,
        "proposals": proposals,
    } | evaluate(model, data, args, latent_train, samples, proposals)
    replace(run / "results.json", (json.dumps(results, indent=2) + "\n").encode())
    draw_samples(run / "samples", model, data)
    draw_latents(run / "samples", model, data.test.to(next(model.parameters()).device))
    print(f"{len(data.test):,} test tuples, {data.source}\n\n{comparison([results])}")
    return results


def read_results(path):
    """The content of a results.json."""
    try:
        results = json.loads(Path(path).read_text())
        facts = results.keys() >= {"script", "dataset", "source", "epochs", "seed", "options"}
        if facts and settings_of(results) and numbers(results):
            return results
    except (ValueError, TypeError, AttributeError):
        pass
    raise UserError(f"{path}: is not a run's results.json")


def load_run(path):
    """(model, modalities, args) of a run's folder, its epochs those of the checkpoint, which names
    script and class; only a plain module beside this file that defines the class is imported."""
    state, args = load_checkpoint(path), argparse.Namespace(**read_facts(path)["options"])
    args.epochs = state["epoch"]
    script, name = state["script"], state["class"]
    if not (str(script).isidentifier() and (Path(__file__).parent / f"{script}.py").is_file()):
        raise UserError(f"{path}: its script {script!r} is not a file beside evaluate.py")
    module = importlib.import_module(script)
    method = getattr(module, str(name), None)
    own = inspect.isclass(method) and method.__module__ == script
    if not (own and hasattr(module, "arguments")):
        raise UserError(f"{path}: {script}.py is no script that defines the class {name!r}")
    if missing := vars(module.arguments([])).keys() - vars(args).keys():
        names = ", ".join(sorted(missing))
        raise UserError(f"{path}: is of another version of {script}.py, its options lack {names}")
    try:
        modalities = [Modality(**fields) for fields in state["modalities"]]
        model = method(modalities, **state["kwargs"])
    except TypeError as error:
        raise UserError(f"{path}: does not fit {script}.py: {error}") from None
    with damaged(f"{path}: does not fit {script}.py"):
        model.load_state_dict(state["model"])
    return model, modalities, args


def png_path(text):
    """A `type` for argparse: where a PNG can be written."""
    path = Path(text)
    if path.suffix != ".png" or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is not a FILE.png in a folder that exists")
    return path


@command
def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=Help, allow_abbrev=False)
    add = p.add_argument
    about = "folder of a run, or its results.json to be read only"
    add("runs", metavar="RUN", nargs="+", help=about)
    add("--markdown", action="store_true", help="tables of several runs in Markdown")
    about = "instead print the tables' numbers as JSON, and all else to standard error"
    add("--json", action="store_true", help=about)
    about = "draw the runs' metrics as a PNG (default: no picture)"
    add("--figure", metavar="FILE", type=png_path, help=about)
    against = ["inputs", "supervision", "keep", "beta"]
    about = "horizontal axis of --figure: the number of inputs, an option or, for beta, log p(X)"
    add("--against", choices=against, default="inputs", help=about)

    def tuples(text):
        return sys.maxsize if text == "all" else number(int, 10)(text)

    about = "training tuples the latents' classifier learns from, or all"
    add("--latent-train", metavar="N", type=tuples, default=LATENT_TRAIN, help=about)
    count, about = number(int, 1), "samples of each log-likelihood"
    add("--importance-samples", metavar="K", type=count, default=IMPORTANCE_SAMPLES, help=about)
    about = "log p(X) by samples of every subset's posterior or only of that given all modalities, "
    about += "with five 1/31 of the work"
    add("--proposals", choices=["all", "full"], default="all", help=about)
    add("--data-dir", metavar="DIR", help="folder of the data (default: the run's)")
    add("--cache-dir", metavar="DIR", help="folder of the cache (default: the run's)")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to run")
    about = "do not evaluate, draw what the runs, all of one data set, generate from --given "
    about += "(default: evaluate)"
    add("--side-by-side", metavar="FILE", type=png_path, help=about)
    add("--given", metavar="NAME", help="modality (default: the first)")
    p.error = fail
    options = p.parse_args(argv)
    if options.given and not options.side_by_side:
        raise UserError(f"--given {options.given}: needs --side-by-side FILE")
    if options.against != "inputs" and not options.figure:
        raise UserError(f"--against {options.against}: needs --figure FILE")
    if options.side_by_side or all(run.endswith(".json") for run in options.runs):
        for name in ("latent_train", "importance_samples", "proposals"):
            if (value := getattr(options, name)) != p.get_default(name):
                option = f"--{name.replace('_', '-')} {value}"
                raise UserError(f"{option}: needs the folder of a run, which is then evaluated")
    tune_cpu()
    if options.side_by_side:
        draw_side_by_side(options)
        return
    protocol = options.latent_train, options.importance_samples, options.proposals
    # All files, and whether they go together, before one is evaluated, which takes long.
    files = {r: read_results(r) if r.endswith(".json") else load_run(r) for r in options.runs}
    require_alike(files, options)
    for run, content in files.items():
        if not run.endswith(".json"):
            model, data, args = with_data(run, *content, options)
            with redirect_stdout(sys.stderr if options.json else sys.stdout):
                print(f"{args.dataset}: {data.source}")
                files[run] = report(Path(run), model, data, args, *protocol)
    compare(list(files.values()), options)


def require_alike(files, options):
    """Raises UserError where the runs cannot share a --figure, or do not have what it is against;
    files has the content of a results.json or what `load_run` gives."""
    of_one = set()
    for run, content in files.items():
        facts = content if isinstance(content, dict) else read_facts(run)
        dataset = facts.get("dataset") or Path(facts["options"]["dataset"]).name
        of_one.add((dataset, facts["source"]))
        if options.against not in ("inputs", *facts["options"]):
            raise UserError(f"--against {options.against}: {run} does not say what it had there")
    if options.figure and len(of_one) > 1:
        raise UserError(f"--figure {options.figure}: needs runs of one data set")


def with_data(run, model, modalities, args, options):
    """(model, data, args) of a loaded run, model and folders being where the options have them."""
    args.data_dir = options.data_dir or args.data_dir
    if options.data_dir and args.dataset.endswith(".npz"):
        args.dataset = str(Path(options.data_dir) / Path(args.dataset).name)
    args.cache_dir = options.cache_dir or args.cache_dir
    data = datasets.load(args)
    if data.modalities != modalities:
        raise UserError(f"{run}: was trained on other modalities than those of {data.source}")
    if (trained_on := read_facts(run)["source"]) != data.source:
        print(f"{run} was trained on {trained_on}", file=sys.stderr)
    return model.to(parse_device(options.device)), data, args


@torch.no_grad()
def draw_side_by_side(options):
    """A PNG with a column of panels for each run: the same test examples of the modality --given,
    and every modality generated from it. The more runs, the fewer examples: the picture's width
    stays, so that they can be told apart on a page."""
    columns, seen = {}, set()
    runs = list(dict.fromkeys(options.runs))
    for run in runs:
        model, data, _ = with_data(run, *load_run(run), options)
        names = [m.name for m in data.modalities]
        given = options.given or names[0]
        if given not in names:
            raise UserError(f"--given {given}: {run} has {', '.join(names)}")
        seen.add((*names, data.test.fingerprint(given)))
        if len(seen) > 1:
            raise UserError(f"--side-by-side: {run} is of other data than the first run")
        device = next(model.parameters()).device
        x, _ = examples(data.test.to(device), max(4, 24 // len(runs)))
        torch.manual_seed(0)
        title, script = type(model).__name__, Path(inspect.getfile(type(model))).stem
        title = title if title.lower() == script else script
        title = f"{title}, {run}" if title in columns else title
        columns[title] = rows_from(model.eval(), x, data.modalities[names.index(given)])
    draw_grid(options.side_by_side, columns, scale=0.5)


def compare(runs, options):
    """Print the tables of runs, each data set's for itself, and draw their figure."""
    by_data = defaultdict(list)
    for results in runs:
        by_data[results["dataset"], results["source"]].append(results)
    if options.figure:  # before a reader of the tables goes away
        draw_curves(options.figure, runs, options.against)
    if options.json:
        names = ("dataset", "source")
        found = [dict(zip(names, key)) | statistics(members) for key, members in by_data.items()]
        print(json.dumps(found, indent=2))
    elif len(runs) > 1 or options.markdown or options.runs[0].endswith(".json"):
        for (dataset, source), members in by_data.items():
            print(f"{dataset}: {source}\n\n{comparison(members, options.markdown)}")


if __name__ == "__main__":
    main()
