"""Small helpers shared by the five scripts: nothing here is what a method is about.

In this order: modalities, Gaussian algebra, likelihoods, the chores of a run, networks.

Notation: M modalities, B examples, D latent dimensions; in shapes S is a number of subsets of
modalities, elsewhere one subset. A batch is `(x, observed)`: x maps each modality's name to a
tensor (B, *shape), observed is a (B, M) boolean mask, or None where everything is observed.
"""

import argparse
import contextlib
import csv
import ctypes
import dataclasses
import datetime
import functools
import inspect
import io
import itertools
import json
import math
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
import warnings
import zipfile
from pathlib import Path

import numpy as np
import sklearn
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Bernoulli, Categorical, Independent, Laplace, Normal
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

# ---------------------------------------------------------------------------------- modalities


class UserError(ValueError):
    """A mistake of the person at the keyboard; `command` turns it into one line, exit code 2."""


LIKELIHOODS = ("laplace", "normal", "bernoulli", "categorical")


@dataclasses.dataclass(frozen=True)
class Modality:
    """One kind of data: what it looks like, how it is scored, which networks read and write it.

    shape is the shape of one example as `encoder` receives it; a categorical modality holds
    integers below `categories` (a class label has shape (), a text of 8 symbols shape (8,)).
    scale is the fixed scale of a Laplace or Normal likelihood, weight the factor λ of the
    log-likelihood in every objective (never in a reported log-likelihood), network a key of
    NETWORKS at the end of this file. alphabet has the symbols of a text as a str, its words as a
    tuple, or the names of attributes; padding is the filler symbol, whose positions do not count.
    """

    name: str
    shape: tuple[int, ...]
    likelihood: str = "laplace"
    scale: float = 0.75
    weight: float = 1.0
    network: str = "conv"
    categories: int = 0
    alphabet: str | tuple[str, ...] = ""
    padding: int | None = None

    def __post_init__(self):
        def require(holds, field, allowed):
            if not holds:
                value = getattr(self, field)
                raise UserError(f"modality {self.name!r}: {field} is {value!r}, must be {allowed}")

        object.__setattr__(self, "shape", tuple(self.shape))
        # Result keys join names by "+" and "/", so a name is a plain word.
        require(str(self.name).isidentifier(), "name", "letters, digits and underscores")
        require(all(isinstance(n, int) and n > 0 for n in self.shape), "shape", "positive integers")
        require(self.likelihood in LIKELIHOODS, "likelihood", "one of " + ", ".join(LIKELIHOODS))
        require(0 < self.scale < math.inf, "scale", "positive")
        require(0 <= self.weight < math.inf, "weight", "at least 0")
        require(self.network in NETWORKS, "network", "one of " + ", ".join(NETWORKS))
        if self.likelihood == "categorical":
            require(self.categories > 1, "categories", "at least 2 for a categorical likelihood")

    @property
    def parameter_shape(self):
        """Shape of the likelihood's parameters: the logits have one more dimension."""
        categorical = self.likelihood == "categorical"
        return self.shape + (self.categories,) if categorical else self.shape


# ---------------------------------------------------------------------------- Gaussian algebra

# exp(30) and its square stay far inside float32, and so do the products of the two bounds that
# the functions below form; without them a log-variance past 88 ends in inf and then in NaN.
MAX_LOGVAR = 30.0
MAX_MEAN = 1e10


def bounded(mu, logvar):
    """mu and logvar in float32 at least, clamped to where exp, squares and sums stay finite."""
    dtype = torch.promote_types(mu.dtype, torch.float32)
    # hardtanh is clamp, but its gradient goes through memory once, that of clamp several times.
    mu = F.hardtanh(mu.to(dtype), -MAX_MEAN, MAX_MEAN)
    return mu, F.hardtanh(logvar.to(dtype), -MAX_LOGVAR, MAX_LOGVAR)


def subset_masks(M):
    """All non-empty subsets of M modalities as a (2^M - 1, M) mask, by size, the full set last."""
    subsets = [s for size in range(1, M + 1) for s in itertools.combinations(range(M), size)]
    return torch.tensor([[i in subset for i in range(M)] for subset in subsets])


def product_of_gaussians(mu, logvar, mask=None, prior_expert=False):
    """Product of diagonal Gaussian experts, for all subsets in one matrix product.

    T_i = 1 / var_i, T = sum T_i, mean sum T_i mu_i / T, variance 1 / T
    (Wu & Goodman 2018, Section 2; Sutter et al. 2021, Definition 1).

    mu, logvar: (M, ..., D). mask: (S, M) for S subsets, or (S, M, B) where the subset differs from
    example to example and the experts are (M, B, D); None is the full set. prior_expert adds the
    universal expert N(0, I). Returns mean and log-variance, (S, ..., D) each, without mask
    (..., D). Every subset needs at least one expert.
    """
    mu, logvar = bounded(mu, logvar)
    with torch.autocast(mu.device.type, enabled=False):
        precision = torch.exp(-logvar)
        if mask is None:
            total, weighted = precision.sum(0), (precision * mu).sum(0)
        else:
            equation = "sm,m...->s..." if mask.ndim == 2 else "smb,mbd->sbd"
            mask = mask.to(precision)
            total = torch.einsum(equation, mask, precision)
            weighted = torch.einsum(equation, mask, precision * mu)
        if prior_expert:
            total = total + 1.0
        return weighted / total, -torch.log(total)


def quotient_of_gaussians(mu_p, logvar_p, mu_q, logvar_q):
    """Quotient p / q of diagonal Gaussians, (..., D) each: mean and log-variance.

    T = T_p - T_q, mean (T_p mu_p - T_q mu_q) / T (Wu & Goodman 2018, supplement, Section 3).
    It is a density only where p is narrower than q; elsewhere T is clamped to exp(-30).
    """
    (mu_p, logvar_p), (mu_q, logvar_q) = bounded(mu_p, logvar_p), bounded(mu_q, logvar_q)
    T_p, T_q = torch.exp(-logvar_p), torch.exp(-logvar_q)
    T = (T_p - T_q).clamp(min=math.exp(-MAX_LOGVAR))
    return (T_p * mu_p - T_q * mu_q) / T, -torch.log(T)


def gaussian_kl(mu, logvar, mu_p=None, logvar_p=None):
    """KL(N(mu, var) || N(mu_p, var_p)) in nats, summed over the last dimension; p is N(0, I) if
    not given. mu, logvar: (..., D), result (...)."""
    # Term by term: the sums are small, whereas every intermediate of the elements' own size (for
    # all subsets at once) would go through memory.
    mu, logvar = bounded(mu, logvar)
    if mu_p is None:
        return 0.5 * (logvar.exp().sum(-1) + mu.square().sum(-1) - logvar.sum(-1) - mu.shape[-1])
    mu_p, logvar_p = bounded(mu_p, logvar_p)
    ratio = logvar - logvar_p
    distance = (mu - mu_p).square() * torch.exp(-logvar_p)
    return 0.5 * (ratio.exp().sum(-1) + distance.sum(-1) - ratio.sum(-1) - mu.shape[-1])


def log_mean_exp(x, dim):
    """log of the mean of exp(x) over dim, without overflow."""
    return torch.logsumexp(x, dim) - math.log(x.shape[dim])


def gaussian(mu, logvar):
    """The diagonal Gaussian with event shape (D,)."""
    mu, logvar = bounded(mu, logvar)
    return Independent(Normal(mu, torch.exp(0.5 * logvar), validate_args=False), 1, False)


# --------------------------------------------------------------------------------- likelihoods


def likelihood(modality, parameters):
    """p(x_i|z) from a decoder's output (..., *parameter_shape), with event shape modality.shape."""
    parameters = parameters.to(torch.promote_types(parameters.dtype, torch.float32))
    if modality.likelihood in ("laplace", "normal"):
        # A number would be copied to a GPU at each call, and the host would wait for it.
        scale = torch.full((), modality.scale, dtype=parameters.dtype, device=parameters.device)
        family = Laplace if modality.likelihood == "laplace" else Normal
        p = family(parameters, scale, validate_args=False)
    elif modality.likelihood == "bernoulli":
        p = Bernoulli(logits=parameters, validate_args=False)
    elif modality.padding is None:
        p = Categorical(logits=parameters, validate_args=False)
    else:
        p = Padded(parameters, modality.padding)
    return Independent(p, len(modality.shape), validate_args=False)


class Padded(Categorical):
    """A Categorical whose log_prob is 0 wherever the scored symbol is padding."""

    def __init__(self, logits, padding):
        super().__init__(logits=logits, validate_args=False)
        self.padding = padding

    def log_prob(self, value):
        return torch.where(value == self.padding, 0, super().log_prob(value))


def generated(p):
    """The x that stands for a likelihood: its mean, the mode of a Categorical."""
    return p.base_dist.mode if isinstance(p.base_dist, Categorical) else p.mean


def hide(x, observed, modalities):
    """An objective's x with zeros in place of what is not observed, so that it (NaN included) is
    never read. Raises ValueError where x has neither all modalities nor one alone, unmasked."""
    if len(x) < len(modalities) and (len(x) > 1 or observed is not None):
        raise ValueError(
            f"an objective takes all modalities, masked where they are missing, or one alone, "
            f"unmasked; there are {', '.join(x)} of {', '.join(m.name for m in modalities)}"
        )
    if observed is None:
        return x
    seen = {m.name: observed[:, i].view(-1, *[1] * len(m.shape)) for i, m in enumerate(modalities)}
    return {name: torch.where(seen[name], x[name], 0) for name in x}


# ------------------------------------------------------------------------------------- a run

STOPPED = "training stops, earlier checkpoints are kept; a lower --lr may help"


def fail(message):
    """End the program with one line on standard error and exit code 2."""
    print(f"{Path(sys.argv[0]).name}: error: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(2)


@contextlib.contextmanager
def damaged(fault):
    """Turns any exception inside, since damaged bytes end in any, into a UserError; but memory that
    is full is no damage."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # noqa: BLE001
        reason = str(error).split(". ")[0]  # not PyTorch's advice to trust the file
        raise UserError(f"{fault} ({reason or type(error).__name__:.200})") from None


def command(main):
    """Decorate a script's main: a user's mistake or a file's fault is one line and exit code 2,
    Ctrl-C exit code 130, neither with a traceback; a closed output pipe ends it silently."""

    @functools.wraps(main)
    def guarded(argv=None):
        try:
            main(argv)
            sys.stdout.flush()
        except UserError as error:
            fail(error)
        except torch.OutOfMemoryError:
            fail("the GPU's memory is full; training needs less with a smaller --batch-size")
        except (RuntimeError, MemoryError) as error:
            # PyTorch's for a CPU has no class of its own.
            if isinstance(error, RuntimeError) and "can't allocate memory" not in str(error):
                raise
            fail(f"the memory is full; a smaller batch or model needs less: {error}")
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
            raise SystemExit(1) from None
        except OSError as error:
            fail(f"{error.filename or 'input/output'}: {error.strerror or error}")
        except KeyboardInterrupt:
            raise SystemExit(130) from None

    return guarded


def number(kind, low, high=10**9):
    """A `type` for argparse: an int or float in [low, high]."""
    wanted = f"{'a whole number' if kind is int else 'a number'} from {low} to {high:,.10g}"

    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
        return value

    return convert


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Prints the docstring as written, and an option's default unless its help names it."""

    def _get_help_string(self, action):
        return action.help if "(default" in action.help else super()._get_help_string(action)


def parser(description, defaults):
    """The options that every script has; defaults maps data sets to settings. Returns the parser
    and its group of model options, to which a script adds its own."""
    p = argparse.ArgumentParser(
        description=description, formatter_class=Help, allow_abbrev=False, add_help=False
    )
    p.error = fail
    add = p.add_argument_group("data").add_argument
    about = "one of " + ", ".join(defaults) + ", or own data as FILE.npz"
    first = next(iter(defaults))
    add("--dataset", metavar="NAME", default=first, help=about)
    folder = os.environ.get("MULTIMODAL_DATA", "data")
    about = "folder of the data, may be read-only (default: $MULTIMODAL_DATA, else data)"
    add("--data-dir", metavar="DIR", default=folder, help=about)
    add("--cache-dir", metavar="DIR", default="cache", help="folder for what is slow to build")
    seed = number(int, 0, 2**32 - 1)
    add("--data-seed", type=seed, default=0, help="seed of pairings, crops and what is missing")
    about = "polymnist: folder of 2 to 10 background pictures, one a modality (default: two "
    about += "photographs that scikit-learn has and three generated pictures)"
    add("--backgrounds", metavar="DIR", default="", help=about)
    about = "share of complete tuples; below 1, and in svae.py and vaevae.py always, a step also "
    about += "takes a batch of each modality alone"
    add("--supervision", type=number(float, 0, 1), default=1.0, help=about)
    about = "chance of each modality of a training example to be there"
    add("--keep", type=number(float, 0, 1), default=1.0, help=about)
    about = "mnist-svhn, mnist-svhn-text: how often an image is paired"
    add("--pairings", type=number(int, 1, 1000), default=20, help=about)
    add("--download", action="store_true", help="polymnist: fetch the authors' images from Zenodo")

    model = p.add_argument_group("model")
    add = model.add_argument
    count = number(int, 2, 65536)  # from 2 on, for the picture of their principal components
    add("--latent-dim", type=count, default=64, help="shared latent dimensions")
    add("--beta", type=number(float, 0, 1e6), default=1.0, help="weight β of the KL term")
    about = "likelihood weights λ, as image=1,label=50 (default: the data set's)"
    add("--weights", metavar="NAME=λ,…", default="", help=about)

    add = p.add_argument_group("training").add_argument
    add("--epochs", type=number(int, 1, 10**6), default=100, help="passes over the training data")
    count, about = number(int, 1, 10**7), "tuples a step, all processes"
    add("--batch-size", type=count, default=256, help=about)
    add("--lr", type=number(float, 0, 100), default=1e-3, help="learning rate of Adam")
    add("--seed", type=seed, default=0, help="seed of weights, order and noise")
    add("--amp", action="store_true", help="networks in bfloat16, in the evaluation too")
    about = "torch.compile, and on a GPU one CUDA graph a step; auto is on a GPU only"
    add("--compile", action=argparse.BooleanOptionalAction, default="auto", help=about)

    add = p.add_argument_group("run").add_argument
    add("-h", "--help", action="help", help="show this page, with the defaults of --dataset")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto prefers cuda")
    add("--runs-dir", metavar="DIR", default="runs", help="where the run's own folder is made")
    about = "go on with this run; only --epochs, --device, --data-dir, --cache-dir and --no-eval"
    about += " may differ (default: a new run)"
    add("--resume", metavar="RUN", default="", help=about)
    seconds, about = number(float, 0, 1e9), "least time between checkpoints; the last epoch has one"
    add("--checkpoint-every", metavar="SECONDS", type=seconds, default=60.0, help=about)
    about = "evaluate every N epochs on 1,000 training tuples, for TensorBoard; 0 is never"
    add("--eval-every", metavar="N", type=number(int, 0, 10**6), default=0, help=about)
    add("--no-eval", action="store_true", help="leave out the evaluation at the end")
    return p, model


def parse(p, argv, defaults):
    """The options, with the data set's settings as defaults or, with --resume, the run's own."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.error = fail
    first.add_argument("--dataset")
    first.add_argument("--resume")
    chosen, _ = first.parse_known_args(argv)
    if not chosen.resume:
        p.set_defaults(**defaults.get(chosen.dataset or p.get_default("dataset"), {}))
        return p.parse_args(argv)
    saved = read_facts(chosen.resume, "--resume ")["options"]
    if differing := saved.keys() ^ vars(p.parse_args([])).keys():
        raise UserError(
            f"--resume {chosen.resume}: is of another script or version than this "
            f"{Path(sys.argv[0]).name}, which differ in the options {', '.join(sorted(differing))}"
        )
    args = p.parse_args(argv, argparse.Namespace(**saved))
    for name in saved.keys() - {"epochs", "device", "data_dir", "cache_dir", "no_eval", "resume"}:
        if getattr(args, name) != saved[name]:
            option = "--" + name.replace("_", "-")
            raise UserError(
                f"{option} {getattr(args, name)}: the run to resume has {saved[name]}; "
                "only --epochs, --device, --data-dir, --cache-dir and --no-eval may differ"
            )
    return args


def read_facts(run, option=""):
    """What `open_run` wrote into a run's args.json, options and source at least; `option` begins
    an error's line."""
    path = Path(run) / "args.json"
    try:
        facts = json.loads(path.read_text())
        if isinstance(facts["options"], dict) and isinstance(facts["source"], str):
            return facts
    except FileNotFoundError:
        raise UserError(f"{option}{run}: is no run (it has no args.json)") from None
    except (ValueError, KeyError, TypeError):  # JSON's and UTF-8's are ValueErrors
        pass
    raise UserError(f"{option}{path}: is damaged")


def parse_device(name, local=0):
    """The device of --device auto, cpu or cuda; `local` numbers the GPUs of a host."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: there is no CUDA device here, use --device cpu")
    cuda = name != "cpu" and torch.cuda.is_available()
    if cuda and local >= torch.cuda.device_count():
        raise UserError(f"--nproc-per-node: at most {torch.cuda.device_count()}, this host's GPUs")
    return torch.device("cuda", local) if cuda else torch.device("cpu")


def tune_cpu():
    """Spare a CPU two slow paths, before its threads start.

    glibc keeps what is freed for the next tensors: by default it gives large blocks back to the
    kernel, and up to two thirds of a step go into mapping them anew. Denormal numbers, below
    1.2e-38 in float32, count as zero: arithmetic on them is many times slower, and the small
    weights of MMVAE's K samples are full of them.
    """
    torch.set_flush_denormal(True)
    if platform.libc_ver()[0] == "glibc":
        libc, M_TRIM_THRESHOLD, M_MMAP_MAX = ctypes.CDLL(None), -1, -4  # as in malloc.h
        libc.mallopt(M_TRIM_THRESHOLD, -1)
        libc.mallopt(M_MMAP_MAX, 0)


def setup(args):
    """(device, rank, world): this process's place among torchrun's; seeds the weights."""
    variables = (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))
    rank, world, local = (int(os.environ.get(name, value)) for name, value in variables)
    device = parse_device(args.device, local)
    tune_cpu()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if args.batch_size % world:
        raise UserError(f"--batch-size {args.batch_size}: must divide among {world} processes")
    if world > 1:
        backend, gpu = ("nccl", device) if device.type == "cuda" else ("gloo", None)
        long = datetime.timedelta(hours=2)  # for a host's first process to download and decode
        torch.distributed.init_process_group(backend, timeout=long, device_id=gpu)
    torch.manual_seed(args.seed)
    return device, rank, world


def seed_of(*numbers):
    """One seed made of several: (seed, epoch) for the order, (seed, epoch, rank) for noise."""
    # With their number in front, since a seed sequence takes (1, 2) and (1, 2, 0) for the same.
    sequence = np.random.SeedSequence((len(numbers), *numbers))
    return int(sequence.generate_state(1, np.uint64)[0])


def open_run(args, script, source, start=0):
    """The run's folder with its args.json, and a TensorBoard writer into it.

    A new folder <runs-dir>/<dataset>__<script>__<seed>__<timestamp>, or that of --resume with its
    logs cut to `start` epochs.
    """
    print(f"{args.dataset}: {source}", flush=True)
    if not Path(script).stem.isidentifier():
        raise UserError(f"{script}: its name must be a Python identifier, for evaluate.py")
    if args.resume:
        run = Path(args.resume)
        before = read_facts(run)["source"]
        if before != source:
            raise UserError(f"--resume {run}: was trained on {before}, here is {source}")
        for half_written in run.glob(".checkpoint.pt.*"):
            half_written.unlink()
        rows = (run / "metrics.csv").read_text().splitlines(keepends=True)
        replace(run / "metrics.csv", "".join(rows[: start + 1]).encode())
    else:
        stamp = time.strftime("%Y%m%d-%H%M%S")
        stem = f"{Path(args.dataset).stem}__{Path(script).stem}__{args.seed}__{stamp}"
        Path(args.runs_dir).mkdir(parents=True, exist_ok=True)
        if not args.no_eval:  # needed after training only, too late to hear that it cannot be
            Path(args.cache_dir).mkdir(parents=True, exist_ok=True)
        for n in itertools.count(1):
            run = Path(args.runs_dir) / (stem if n == 1 else f"{stem}-{n}")
            with contextlib.suppress(FileExistsError):
                run.mkdir()
                break
    device = parse_device(args.device)
    facts = {
        "options": vars(args) | {"resume": ""},
        "source": source,
        "git": git_revision(script),
        "versions": dict(
            python=platform.python_version(),
            torch=torch.__version__,
            numpy=np.__version__,
            sklearn=sklearn.__version__,
        ),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
    }
    replace(run / "args.json", (json.dumps(facts, indent=2) + "\n").encode())
    return run, SummaryWriter(run, purge_step=start + 1)


def git_revision(script):
    """The commit this file is at, "-dirty" when something was changed since or the script is in no
    commit, "unknown" outside git."""

    def git(*arguments):
        options = dict(cwd=Path(__file__).parent, capture_output=True, text=True)
        return subprocess.run(["git", *arguments], check=True, **options).stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        changes = git("status", "--porcelain", "--untracked-files=no")
        return f"{commit}-dirty" if changes or not git("ls-files", str(script)) else commit
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def replace(path, content):
    """Write bytes to path so that it holds the old content or the new, never a part."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:  # a full disk names no file
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)


def save_checkpoint(run, model, optimizer, epoch, config):
    """Write run/checkpoint.pt: which class of which script with which arguments, and its state.
    Raises UserError, leaving the last one, where a weight or a moment of Adam's is not finite."""
    tensors = [*model.parameters(), *(t for s in optimizer.state.values() for t in s.values())]
    # `epoch_row` has seen the values before the last step's update only.
    if not all(t.isfinite().all() for t in tensors):
        raise UserError(f"epoch {epoch}: weights or Adam's moments are not finite; {STOPPED}")
    state = {
        "script": Path(inspect.getfile(type(model))).stem,
        "class": type(model).__name__,
        "kwargs": config,
        "modalities": [dataclasses.asdict(m) for m in model.modalities],
        "epoch": epoch,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    buffer = io.BytesIO()
    torch.save(state, buffer)
    replace(run / "checkpoint.pt", buffer.getbuffer())


def load_checkpoint(run):
    """The dict that save_checkpoint wrote; plain data only, code in it is refused."""
    path = Path(run) / "checkpoint.pt"
    if not path.is_file():
        raise UserError(f"{run}: is no folder of a run, there is no checkpoint.pt in it")
    fault = f"{path}: is damaged, or holds more than plain data"
    with damaged(fault), zipfile.ZipFile(path):  # torch.load would warn of a bare pickle
        state = torch.load(path, map_location="cpu", weights_only=True)
    keys = {"script", "class", "kwargs", "modalities", "epoch", "model", "optimizer"}
    if not isinstance(state, dict) or state.keys() != keys:
        raise UserError(f"{path}: is not a checkpoint of these scripts")
    return state


def restore(args, model, optimizer):
    """Load the run of --resume into model and optimizer; returns the epochs it has done."""
    state, path = load_checkpoint(args.resume), Path(args.resume) / "checkpoint.pt"
    script = Path(inspect.getfile(type(model))).stem
    if (state["script"], state["class"]) != (script, type(model).__name__):
        of = f"{state['class']} of {state['script']}.py"
        raise UserError(f"{path}: holds a {of}, not a {type(model).__name__} of {script}.py")
    with damaged(f"{path}: does not fit {type(model).__name__}"):
        model.load_state_dict(state["model"])
    capturable = optimizer.param_groups[0]["capturable"]  # the device's, which may be another
    with damaged(f"{path}: its optimiser does not fit"):
        optimizer.load_state_dict(state["optimizer"])
        for weight, moments in optimizer.state.items():
            moments["exp_avg"].view_as(weight)  # else of other weights, or in another order
    optimizer.param_groups[0]["capturable"] = capturable
    if args.epochs < state["epoch"]:
        raise UserError(f"--epochs {args.epochs}: the run has done {state['epoch']} already")
    if args.epochs == state["epoch"]:
        print(f"{args.resume}: all {args.epochs} epochs are done; --epochs N goes on to more")
    return state["epoch"]


def epoch_row(epoch, names, log, began, tuples):
    """A row of metrics.csv: the means of an epoch's log (steps, len(names)), here read from the
    device. Raises UserError, naming step and term, where a value is not finite."""
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(log)
        log /= torch.distributed.get_world_size()
    log = log.double().cpu()
    if not log.isfinite().all():
        step, term = (~log.isfinite()).nonzero()[0].tolist()
        raise UserError(
            f"epoch {epoch}, step {step + 1}: {names[term]} is {log[step, term].item()}; {STOPPED}"
        )
    means = dict(zip(names, log.mean(0).tolist(), strict=True))
    return {"epoch": epoch} | means | {"tuples_per_second": tuples / (time.monotonic() - began)}


def write_row(run, writer, row):
    """Append a row to run/metrics.csv and to the TensorBoard log."""
    with open(run / "metrics.csv", "a", newline="") as file:
        table = csv.DictWriter(file, row.keys(), lineterminator="\n")
        if file.tell() == 0:
            table.writeheader()
        table.writerow(row)
    for name, value in row.items():
        writer.add_scalar(name, value, row["epoch"])
    writer.flush()


def progress(args, start, steps, rank):
    """A bar over the tuples of all epochs; silent where standard error is no terminal."""
    tuples = steps * args.batch_size
    return tqdm(
        total=args.epochs * tuples,
        initial=start * tuples,
        desc=args.dataset,
        unit=" tuples",
        unit_scale=True,
        disable=None if rank == 0 else True,
    )


@contextlib.contextmanager
def interruptible(run):
    """Around training: on Ctrl-C say how to go on from the last checkpoint, if there is one."""
    try:
        yield
    except KeyboardInterrupt:
        if run is not None and (run / "checkpoint.pt").exists():
            local = os.environ.get("LOCAL_WORLD_SIZE")  # set by torchrun
            launcher = ["torchrun", "--nproc-per-node", local] if local else ["python"]
            again = shlex.join([*launcher, sys.argv[0], "--resume", str(run)])
            print(f"\nstopped; go on with: {again}", file=sys.stderr)
        elif run is not None:
            print(f"\nstopped before the first checkpoint of {run}", file=sys.stderr)
        raise


class Streams(nn.Module):
    """model(x) for the streams of a batch, x[name] (2B, *shape): B complete tuples, and after them
    B examples of that modality alone (Kutuzova et al. 2021, Algorithm 1). Each stream is a batch of
    its own, so nothing is computed for what is missing. Values ((1 + M) B,), and the terms' means.
    """

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, observed=None):
        if hasattr(self.model, "streams"):  # the same in one pass
            return self.model.streams(x)
        halves = {name: t.chunk(2) for name, t in x.items()}
        streams = [{name: complete for name, (complete, _) in halves.items()}]
        streams += [{name: alone} for name, (_, alone) in halves.items()]
        values, terms = zip(*map(self.model, streams), strict=True)
        means = {k: torch.stack([t[k] for t in terms if k in t]).mean() for k in terms[0]}
        return torch.cat(values), means


def accelerate(model, args, device, world):
    """model(x, observed) as a fast callable: by DistributedDataParallel under torchrun, compiled
    with --compile."""
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # shapes stay: worth a search for the fastest kernels
    if world > 1:
        model = nn.parallel.DistributedDataParallel(model)
    if not compiles(args, device):
        return model
    cpu = device.type == "cpu"
    needed = [os.environ.get("CXX", "g++")] if cpu else [os.environ.get("CC", "gcc"), "clang"]
    if not any(map(shutil.which, needed)):
        message = f"--compile: needs {' or '.join(needed)}, which is not here; see --no-compile"
        raise UserError(message)
    # Else DistributedDataParallel cuts the graph, to send gradients sooner, and a cut between a
    # sample and its use loses DReG's hook.
    torch._dynamo.config.optimize_ddp = False
    # Else the backward pass of what autocast leaves in float32 is traced in bfloat16.
    if hasattr(torch._functorch.config, "backward_pass_autocast"):
        torch._functorch.config.backward_pass_autocast = "off"
    # Else SVAE's encoders get wrong gradients from PyTorch 2.11.
    torch._inductor.config.inplace_buffers = False
    # On a GPU, small operations that do not need each other share a kernel: 2.2 ms a step of MoPoE
    # on PolyMNIST in place of 2.5, on an H100.
    torch._inductor.config.combo_kernels = device.type == "cuda"
    # Else what `as_one` passes on is copied, so that rows begin at multiples of 128 bytes.
    torch._inductor.config.comprehensive_padding = False
    # Of TF32 in matrix products: they stay in float32 where there is no --amp.
    warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")
    return torch.compile(model)


def compiles(args, device):
    """Whether to compile: --compile or --no-compile, else on a GPU."""
    return device.type == "cuda" if args.compile == "auto" else args.compile


def captures(args, device, world):
    """Whether a step becomes one CUDA graph: on one GPU, where compilation is on."""
    return device.type == "cuda" and world == 1 and compiles(args, device)


def capture(step, on):
    """step(rows), if `on` as one CUDA graph.

    The first three calls run as they are (they compile, and set up the optimiser's state), the
    fourth is captured, and from then on only `rows` is copied in and the graph replayed. What the
    step returns is overwritten by the next call.
    """
    if not on:
        return step
    # Adam warns of the three steps before the capture.
    warnings.filterwarnings("ignore", ".*constructed with capturable=True")
    graph, side, calls = torch.cuda.CUDAGraph(), torch.cuda.Stream(), itertools.count()
    static = {}

    def fast(rows):
        if next(calls) < 3:
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                out = step(rows)
            torch.cuda.current_stream().wait_stream(side)
            return out
        if not static:
            static["rows"] = rows.clone()
            with torch.cuda.graph(graph):
                static["out"] = step(static["rows"])
        static["rows"].copy_(rows)
        graph.replay()
        return static["out"]

    return fast


# ----------------------------------------------------------------------------------- networks


def encoder(modality, out_dim, hidden=512):
    """The network (B, *modality.shape) -> (B, out_dim) of the modality's family. Its attribute
    `encodes` is the modality."""
    net = NETWORKS[modality.network][0](modality, out_dim, hidden)
    net.encodes, net.architecture = modality, architecture(net)
    return net


def decoder(modality, latent_dim, hidden=512):
    """The network (..., latent_dim) -> (..., *parameter_shape) of the modality's family."""
    return LeadingDimensions(NETWORKS[modality.network][1](modality, latent_dim, hidden))


class LeadingDimensions(nn.Module):
    """A network (B, D) -> (B, ...) applied to any leading dimensions; on a CPU in blocks of ROWS
    rows, which bounds the memory of what a layer holds only while it computes."""

    ROWS = 1280  # as many as MMVAE decodes of five modalities and a batch of 256

    def __init__(self, net):
        super().__init__()
        self.net, self.architecture = net, architecture(net)

    def forward(self, z):
        rows = z.reshape(-1, z.shape[-1])
        if z.device.type == "cpu" and len(rows) > self.ROWS:
            out = torch.cat([self.net(part) for part in rows.split(self.ROWS)])
        else:
            out = self.net(rows)
        return out.reshape(*z.shape[:-1], *out.shape[1:])


def abreast(names, nets, inputs):
    """{name: net(inputs[name])}, in the order of names, for those that inputs has.

    Compiled for a GPU in bfloat16, networks of one architecture are computed as one, in which a
    layer is a single matrix product over all of them: of images as small as PolyMNIST's the kernels
    of each network alone would leave most of a GPU idle.
    """
    nets = {name: net for name, net in zip(names, nets, strict=True) if name in inputs}
    alike, outputs = {}, {}
    for name, net in nets.items():
        alike.setdefault(getattr(net, "architecture", None), []).append(name)
    for kind, some in alike.items():
        pairs = [(nets[name], inputs[name]) for name in some]
        if kind is not None and len(some) > 1 and runs_abreast(pairs[0][1].device):
            found = as_one(*zip(*pairs, strict=True))
        else:
            found = [net(x) for net, x in pairs]
        outputs |= zip(some, found, strict=True)
    return {name: outputs[name] for name in nets}


def runs_abreast(device):
    """Where it pays: in float32, measured on an H200, it makes no difference."""
    compiled, amp = torch.compiler.is_compiling(), torch.is_autocast_enabled(device.type)
    return device.type == "cuda" and compiled and amp


def architecture(net):
    """What networks must share for `as_one`; None where it lacks a layer of theirs."""
    elementwise = nn.ReLU, nn.ELU, nn.SiLU, nn.Sigmoid, nn.Identity
    weighted = nn.Linear, nn.Conv2d, nn.ConvTranspose2d, Transposed2d
    known = {nn.Sequential, nn.Flatten, nn.Unflatten, *weighted, *elementwise}
    able = all(
        type(layer) in known
        and getattr(layer, "groups", 1) == 1
        and getattr(layer, "dilation", (1, 1)) == (1, 1)
        for layer in net.modules()
    )
    return repr(net) if able else None


# Images (N, B, channels, height, width) of N networks are (N * PARTS, B / PARTS, height, width,
# channels) between convolutions. The gradient of a kernel, few numbers from many pixels, is thus
# summed part by part, else most of a GPU would wait for few of its units.
PARTS = 16


def as_one(nets, inputs):
    """[net(x) for net, x in zip(nets, inputs)] for nets of one `architecture`."""
    leads = [x.shape[: -1 if isinstance(nets[0], LeadingDimensions) else 1] for x in inputs]
    rows = [x.flatten(0, len(lead) - 1) for x, lead in zip(inputs, leads, strict=True)]
    B = -(-max(map(len, rows)) // PARTS) * PARTS  # zeros follow the rows of a shorter input
    x = torch.stack([F.pad(t, (0, 0) * (t.ndim - 1) + (0, B - len(t))) for t in rows])
    x = in_parts(x)
    leaves = ([m for m in net.modules() if not [*m.children()]] for net in nets)
    for layers in zip(*leaves, strict=True):
        layer = layers[0]
        if isinstance(layer, nn.Linear):
            x = linear(layers, x)
        elif isinstance(layer, nn.Conv2d):
            x = convolution(layers, x)
        elif isinstance(layer, nn.ConvTranspose2d):
            x = transposed_convolution(layers, x)
        elif isinstance(layer, nn.Flatten):
            x = whole(x, len(nets)).flatten(2)
        elif isinstance(layer, nn.Unflatten):
            x = in_parts(x.unflatten(2, layer.unflattened_size))
        else:
            x = layer(x)
    outputs = zip(whole(x, len(nets)), leads, strict=True)
    return [y[: lead.numel()].unflatten(0, lead) for y, lead in outputs]


def in_parts(x):
    """Images, if they are, as they are between convolutions."""
    return x.flatten(0, 1).unflatten(0, (len(x) * PARTS, -1)).movedim(2, -1) if x.ndim == 5 else x


def whole(x, N):
    """And back."""
    return x.movedim(-1, 2).flatten(0, 1).unflatten(0, (N, -1)) if x.ndim == 5 else x


def linear(layers, x):
    """x (N, B, inputs) through a layer of each network."""
    weight = stacked(layers, "weight", 0, 1, 2)
    if layers[0].bias is not None:  # one more column, so that its gradient needs no sum of its own
        bias = stacked(layers, "bias", 0, 1)
        x, weight = F.pad(x, (0, 1), value=1.0), torch.cat([weight, bias[..., None]], -1)
    return product(x, weight)


def convolution(layers, x):
    """Images in parts through a layer of each network, as the product of their windows."""
    like = layers[0]
    weight = stacked(layers, "weight", 0, 1, 3, 4, 2).flatten(2)  # (N, outputs, k * l * inputs)
    x = Windows.apply(halved(x), like.kernel_size, like.stride, like.padding)
    y = product(x.flatten(4).flatten(1, 3), weight.repeat_interleave(PARTS, 0))
    return with_bias(layers, y.unflatten(1, x.shape[1:4]))


def transposed_convolution(layers, x):
    """Images in parts through a layer of each network: the products are windows, which overlap."""
    like = layers[0]
    geometry = like.kernel_size, like.stride, like.padding
    axes = zip(x.shape[2:4], *geometry, like.output_padding, strict=True)
    size = [(n - 1) * stride - 2 * pad + k + over for n, k, stride, pad, over in axes]
    weight = stacked(layers, "weight", 0, 3, 4, 2, 1).flatten(1, 3)  # (N, k * l * outputs, inputs)
    y = product(x.flatten(1, 3), weight.repeat_interleave(PARTS, 0))
    y = y.unflatten(1, x.shape[1:4]).unflatten(-1, (*like.kernel_size, -1))
    return with_bias(layers, Overlap.apply(y, size, *geometry))


def with_bias(layers, x):
    if layers[0].bias is None:
        return x
    return x + stacked(layers, "bias", 0, 1).repeat_interleave(PARTS, 0)[:, None, None, None]


def stacked(layers, name, *order):
    """The layers' tensors of this name, (N, *shape), with their dimensions in this order."""
    return Rearranged.apply(torch.stack([getattr(layer, name) for layer in layers]), order)


def halved(x):
    """Under autocast, in its type."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def product(x, weight):
    """x (N, R, K) times weight (N, O, K), transposed: (N, R, O). A GPU's matrix units need rows
    whose length is a multiple of 8."""
    O, K = weight.shape[1:]
    x, weight = halved(x), halved(weight)
    if K % 8 or O % 8:
        x, weight = F.pad(x, (0, -K % 8)), F.pad(weight, (0, -K % 8, 0, -O % 8))
    return torch.bmm(x, weight.mT)[..., :O]


# Each of the following is linear, and its gradient is its adjoint, which is written, not derived.
# Results are copies: of a view, or of its own input, PyTorch 2.11 compiles no gradient.


class Rearranged(torch.autograd.Function):
    """x with its dimensions in this order, and its gradient in x's own, both contiguous, else each
    weight's gradient would be copied once more."""

    @staticmethod
    def forward(ctx, x, order):
        ctx.back = [order.index(i) for i in range(len(order))]
        return x.permute(order).clone(memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx, gradient):
        return gradient.permute(ctx.back).clone(memory_format=torch.contiguous_format), None


class Windows(torch.autograd.Function):
    """What a convolution looks at, (N, B, h, w, *kernel, C) of images (N, B, H, W, C)."""

    @staticmethod
    def forward(ctx, x, *geometry):
        ctx.size, ctx.geometry = x.shape[2:4], geometry
        return windows(x, *geometry)

    @staticmethod
    def backward(ctx, gradient):
        return overlap(gradient, ctx.size, *ctx.geometry), None, None, None


class Overlap(torch.autograd.Function):
    """The sum of windows, each in its place, (N, B, *size, C): the adjoint of `Windows`."""

    @staticmethod
    def forward(ctx, y, size, *geometry):
        ctx.geometry = geometry
        return overlap(y, size, *geometry)

    @staticmethod
    def backward(ctx, gradient):
        return windows(gradient, *ctx.geometry), None, None, None, None


def windows(x, kernel, stride, padding):
    x = F.pad(x, (0, 0, padding[1], padding[1], padding[0], padding[0]))
    x = x.unfold(2, kernel[0], stride[0]).unfold(3, kernel[1], stride[1]).movedim(4, -1)
    return x.clone(memory_format=torch.contiguous_format)


def overlap(y, size, kernel, stride, padding):
    axes = zip(size, y.shape[2:4], kernel, stride, padding, strict=True)
    rows, columns = (covering(*axis, y.device) for axis in axes)
    total = 0.0
    for (row, i, above), (column, j, beside) in itertools.product(rows, columns):
        part = y[:, :, row[:, None], column, i[:, None], j]
        total = total + torch.where((above[:, None] & beside)[..., None], part, 0)
    return total


def covering(pixels, windows, kernel, stride, padding, device):
    """For the pixels of an axis the windows that may cover them, kernel / stride of them, rounded
    up: a list of (the window, the pixel's place in it, whether it covers the pixel)."""
    pixel, found = torch.arange(pixels, device=device) + padding, []
    for before in range(-(-kernel // stride)):
        window, place = pixel // stride - before, pixel % stride + before * stride
        inside = (place < kernel) & (window >= 0) & (window < windows)
        found.append((window.clamp(0, windows - 1), place.clamp(max=kernel - 1), inside))
    return found


# Networks that read symbols also take their probabilities, floats (..., categories): so a metric's
# classifier is shown a generated text.


class Symbols(nn.Module):
    """Integers (B, *shape) as channels (B, categories, *shape)."""

    def __init__(self, categories):
        super().__init__()
        self.categories = categories

    def forward(self, x):
        if not x.is_floating_point():
            x = F.one_hot(x, self.categories).to(torch.get_default_dtype())
        return x.movedim(-1, 1)


class Logits(nn.Module):
    """Channels (B, categories, *shape) as logits (B, *shape, categories)."""

    def forward(self, x):
        return x.movedim(1, -1)


class Words(nn.Embedding):
    """The symbols' vectors, (B, L) -> (B, L, width)."""

    def forward(self, x):
        return x @ self.weight if x.is_floating_point() else super().forward(x)


class BiasApart:
    """Makes a transposed convolution add its bias apart on a CPU in bfloat16: with it PyTorch 2.14
    takes, on some sizes, up to eight times as long, and more than twice for the gradients."""

    def forward(self, x):
        if self.bias is None or not torch.is_autocast_enabled("cpu"):
            return super().forward(x)
        convolve = F.conv_transpose1d if self.weight.ndim == 3 else F.conv_transpose2d
        geometry = self.stride, self.padding, self.output_padding, self.groups, self.dilation
        y = convolve(x, self.weight, None, *geometry)
        return y + self.bias.to(y.dtype).view(-1, *[1] * (y.ndim - 2))


class Transposed1d(BiasApart, nn.ConvTranspose1d):
    pass


class Transposed2d(BiasApart, nn.ConvTranspose2d):
    pass


class Residual(nn.Module):
    """2 f(x) + 0.3 g(x), g of two convolutions, each after a norm and a ReLU (the released code of
    Sutter et al. 2021)."""

    def __init__(self, conv, inner, outer, *geometry, **padding):
        super().__init__()
        self.f = nn.Sequential(conv(inner, outer, *geometry, **padding), group_norm(outer))
        before = group_norm(inner), nn.ReLU(), conv(inner, inner, 1), group_norm(inner), nn.ReLU()
        self.g = nn.Sequential(*before, conv(inner, outer, *geometry, **padding))

    def forward(self, x):
        return 2 * self.f(x) + 0.3 * self.g(x)


def group_norm(channels):
    """In place of the papers' BatchNorm, which would mix the examples of a batch."""
    return nn.GroupNorm(8, channels)


def hidden_layers(widths, activation):
    pairs = itertools.pairwise(widths)
    return [layer for n, m in pairs for layer in (nn.Linear(n, m), activation())]


def perceptron(there=(), back=(), activation=nn.ReLU, last=nn.Identity):
    """A family of fully connected networks, with these widths of the encoder's and the decoder's
    hidden layers; without any it is one affine layer each way. `last` ends the decoder."""

    def encoder(modality, out_dim, hidden):
        widths = [math.prod(modality.parameter_shape), *there]
        symbols = [Symbols(modality.categories)] if modality.likelihood == "categorical" else []
        net = *symbols, nn.Flatten(), *hidden_layers(widths, activation)
        if there and modality.parameter_shape == (modality.categories,):
            # A label is looked up, as in Wu and Goodman's released code: embeddings begin with the
            # classes further apart than a layer of so few inputs would.
            net = nn.Embedding(*widths[:2]), activation(), *hidden_layers(there, activation)
        return nn.Sequential(*net, nn.Linear(widths[-1], out_dim))

    def decoder(modality, latent_dim, hidden):
        widths, shape = [latent_dim, *back], modality.parameter_shape
        net = *hidden_layers(widths, activation), nn.Linear(widths[-1], math.prod(shape))
        return nn.Sequential(*net, last(), nn.Unflatten(1, shape))

    return encoder, decoder


def block(activation=nn.ReLU, norm=nn.Identity, **options):
    """A convolution and what follows it, as a function of its class, channels and geometry."""

    def build(conv, n, m, *geometry, **padding):
        return nn.Sequential(conv(n, m, *geometry, **padding, **options), norm(m), activation())

    return build


relu = block()


def sizes(modality, layers):
    """What `convolutions` make of a modality: (channels, *size) of the data and behind each layer,
    and how much of each size a layer's stride leaves over."""
    symbols = modality.likelihood == "categorical"
    found, over = [(modality.categories, *modality.shape) if symbols else modality.shape], []
    for width, *geometry in layers:
        kernel, stride, padding = map(np.array, geometry)
        steps, left = divmod(np.array(found[-1][1:], int) + 2 * padding - kernel, stride)
        found.append((width, *(steps + 1).tolist()))
        over.append(tuple(left.tolist()))
    if len(found[0]) not in (2, 3) or min(found[-1]) < 1:
        raise UserError(
            f"modality {modality.name!r}: network {modality.network!r} needs larger images "
            f"(channels, height, width) or texts, not {modality.likelihood} {modality.shape}"
        )
    return found, over


def convolutions(
    *layers, inner=relu, first=None, dense=True, back=False, activation=nn.ReLU, last=nn.Identity
):
    """A family of convolutions (channels, kernel, stride, padding) over images or symbols.

    The decoder has the same layers transposed, in reverse. All are `inner` blocks but the decoder's
    last, a convolution alone, and, if it differs, the encoder's `first`. `dense` puts a fully
    connected layer behind the encoder's, `back` one before the decoder's; `last` ends the decoder.
    """

    def encoder(modality, out_dim, hidden):
        found, _ = sizes(modality, layers)
        conv = nn.Conv1d if len(found[0]) == 2 else nn.Conv2d
        net = [Symbols(modality.categories)] if modality.likelihood == "categorical" else []
        for i, (_, *geometry) in enumerate(layers):
            build = inner if i or first is None else first
            net.append(build(conv, found[i][0], found[i + 1][0], *geometry))
        widths = [math.prod(found[-1])] + [hidden] * dense
        net += [nn.Flatten(), *hidden_layers(widths, activation), nn.Linear(widths[-1], out_dim)]
        return nn.Sequential(*net)

    def decoder(modality, latent_dim, hidden):
        found, over = sizes(modality, layers)
        conv = Transposed1d if len(found[0]) == 2 else Transposed2d
        widths = [latent_dim] + [hidden] * back + [math.prod(found[-1])]
        net = [*hidden_layers(widths, activation), nn.Unflatten(1, found[-1])]
        for i, (_, *geometry) in reversed(list(enumerate(layers))):
            build = functools.partial(inner, conv) if i else conv
            # Without what a stride leaves over, the way back would end smaller.
            net.append(build(found[i + 1][0], found[i][0], *geometry, output_padding=over[i]))
        if modality.likelihood == "categorical":
            net.append(Logits())
        return nn.Sequential(*net, last())

    return encoder, decoder


def sentences(width, *layers, **options):
    """A family of convolutions over the plane of places and of words, as vectors of this width."""
    there, back = convolutions(*layers, **options)

    def plane(modality):
        shape = (1, *modality.shape, width)
        return dataclasses.replace(modality, shape=shape, likelihood="normal")

    def encoder(modality, out_dim, hidden):
        words = Words(modality.categories, width)
        one = nn.Unflatten(1, (1, *modality.shape))
        return nn.Sequential(words, one, there(plane(modality), out_dim, hidden))

    def decoder(modality, latent_dim, hidden):
        net = back(plane(modality), latent_dim, hidden), nn.ReLU(), nn.Flatten(1, 2)
        return nn.Sequential(*net, nn.Linear(width, modality.categories))

    return encoder, decoder


class GRUEncoder(nn.Module):
    """A string (B, L) by a bidirectional GRU of 200 units (Wu & Goodman 2018, supplement)."""

    def __init__(self, modality, out_dim, hidden):
        super().__init__()
        self.embedding = Words(modality.categories, 200)
        self.gru = nn.GRU(200, 200, batch_first=True, bidirectional=True)
        self.out = nn.Linear(200, out_dim)

    def forward(self, x):
        # Autocast would have a GPU's GRU in float16, whatever it is told.
        with torch.autocast(self.out.weight.device.type, enabled=False):
            _, last = self.gru(self.embedding(x))  # (2, B, 200)
            return self.out(last.sum(0))


class GRUDecoder(nn.Module):
    """Logits (B, L, categories) of a string by a GRU of two layers, which is given z and its own
    most likely symbol before, so that they depend on z alone."""

    def __init__(self, modality, latent_dim, hidden):
        super().__init__()
        self.length, self.start = modality.shape[0], modality.categories
        self.embedding = nn.Embedding(modality.categories + 1, 200)
        self.first = nn.Linear(latent_dim, 2 * 200)
        self.gru = nn.GRU(200 + latent_dim, 200, num_layers=2, batch_first=True)
        self.out = nn.Linear(200 + latent_dim, modality.categories)

    def forward(self, z):
        with torch.autocast(z.device.type, enabled=False):
            state = self.first(z).unflatten(-1, (2, 200)).movedim(1, 0).contiguous()
            symbol, logits = torch.full_like(z[:, 0], self.start, dtype=torch.long), []
            for _ in range(self.length):
                given = torch.cat([self.embedding(symbol), z], -1)
                seen, state = self.gru(given[:, None], state)
                logits.append(self.out(torch.cat([seen[:, 0], z], -1)))
                symbol = logits[-1].argmax(-1)
            return torch.stack(logits, 1)


def halving(*widths):
    """Layers that halve the size, of these channels."""
    return [(width, 4, 2, 1) for width in widths]


def wide(rows):
    """Layers with a kernel of so many rows and five columns."""
    return [(width, (rows, 5), 2, 0) for width in (56, 112)]


to_split, _ = convolutions(*halving(64, 128, 256), inner=block(bias=False))
swish = dict(inner=block(nn.SiLU), activation=nn.SiLU)
normed_swish = swish | dict(inner=block(nn.SiLU, group_norm), first=block(nn.SiLU))
residual = dict(inner=Residual, first=block(nn.Identity), dense=False, activation=nn.Identity)
# A family is a pair (encoder, decoder); own networks are one more entry.
NETWORKS = {
    "linear": perceptron(),
    # PolyMNIST and MNIST-SVHN-Text of Sutter et al. 2021, from the released code; the latter's
    # MNIST is that of Shi et al. below
    "conv": convolutions((32, 3, 2, 1), (64, 3, 2, 1), (128, 3, 2, 1)),
    "svhn": convolutions(*halving(32, 64, 64), (128, 4, 2, 0), dense=False),
    "text": convolutions(
        (128, 1, 1, 0), (128, 4, 2, 1), (128, 4, 2, 0), dense=False, activation=nn.Identity
    ),
    # Shi et al. 2019, Table 6; (d) with vectors of 128 in place of 256, which would end in 4×8
    "mnist-sigmoid": perceptron((400,), (400,), last=nn.Sigmoid),
    "svhn-sigmoid": convolutions(*halving(32, 64, 128), dense=False, last=nn.Sigmoid),
    "cub-features": perceptron((1024, 512, 256), (256, 512, 1024), nn.ELU),
    "cub-caption": sentences(
        128,
        *halving(32, 64, 128),
        (256, (1, 4), (1, 2), (0, 1)),
        (512, (1, 4), (1, 2), (0, 1)),
        inner=block(norm=group_norm),
        dense=False,
    ),
    # Kutuzova et al. 2021, Tables F.2 and F.7, which misprint it; the thirds' last kernel is 3
    # high, since with 2 the ninth row would be the bias alone
    "split": (to_split, convolutions((28, (2, 4), 2, 0), *wide(3), back=True)[1]),
    "split-3": (to_split, convolutions((28, (3, 4), 2, 0), *wide(2), back=True)[1]),
    # Wu & Goodman 2018, supplement, in the widths of the released code
    "mlp": perceptron((512, 512), (512, 512, 512), nn.SiLU),
    "dcgan-28": convolutions(*halving(64, 128), back=True, **swish),
    "dcgan-50": convolutions(*halving(32, 64, 128), (256, 4, 2, 0), **normed_swish),
    "dcgan-64": convolutions(*halving(32, 64, 128), (256, 4, 1, 0), **normed_swish),
    "gru": (GRUEncoder, GRUDecoder),
    # CelebA of Sutter et al. 2021, App. E, in the widths of the released code
    "residual-image": convolutions(
        (128, 3, 2, 1), *halving(256, 384, 512), (640, 4, 2, 0), **residual
    ),
    "residual-text": convolutions(
        *halving(128, 256, 384, 512, 640, 640), (640, 4, 2, 0), **residual
    ),
}
