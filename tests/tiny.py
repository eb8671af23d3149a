"""A data set that trains in milliseconds; `python tiny.py SCRIPT OPTION...` runs a script on it.

Two modalities say a class of three: four numbers, and the class itself.
"""

import importlib
import signal
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import datasets
from common import Modality

MODALITIES = [
    Modality("vector", (4,), "normal", 0.5, network="linear"),
    Modality("label", (), "categorical", network="linear", categories=3),
]
SETTINGS = dict(epochs=3, batch_size=16, lr=1e-2, latent_dim=3, beta=1.0)


def tuples(n, seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (n,), generator=generator)
    centers = torch.eye(4)[labels] * 4
    vectors = centers + 0.5 * torch.randn(n, 4, generator=generator)
    return {"vector": vectors, "label": labels}, labels


def load(args):
    return datasets.from_tensors(tuples(200, 1), tuples(60, 2), MODALITIES, "made for tests")


def add_to(script):
    """The script's module, knowing the data set."""
    module = importlib.import_module(script)
    module.DEFAULTS["tiny"] = SETTINGS
    datasets.LOADERS["tiny"] = load
    return module


def main(script, options):
    """Run a script on it as a process of its own does."""
    # A shell's background jobs ignore Ctrl-C, and so do their children.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv[0] = script + ".py"
    add_to(script).main(["--dataset", "tiny", *options])


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
