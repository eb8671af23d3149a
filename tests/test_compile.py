"""torch.compile, which is the default on a GPU, changes neither value nor gradient."""

import pytest
import torch
from exact import five

import mmvae
from mmvae import MMVAE
from mopoe import MoPoE
from mvae import MVAE
from svae import SVAE
from vaevae import VAEVAE

STREAMS = dict(streams=True)
KINDS = {
    "mvae": (MVAE, {}, {}),
    "mvae quotient": (MVAE, dict(product="quotient", private_dim=2), {}),
    "mopoe": (MoPoE, {}, {}),
    "mopoe all mixture": (MoPoE, dict(expectation="all", kl="mixture", private_dim=2), {}),
    **{f"mmvae {name}": (MMVAE, dict(objective=name, K=2), {}) for name in mmvae.OBJECTIVES},
    "svae": (SVAE, {}, STREAMS),
    "svae stratified": (SVAE, dict(expectation="stratified"), STREAMS),
    "vaevae": (VAEVAE, {}, STREAMS),
    "vaevae stratified": (VAEVAE, dict(joint="poe", expectation="stratified"), STREAMS),
}


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_is_as_uncompiled(float64, kind):
    """Through Dynamo and AOTAutograd, without the code generator, so that the noise is the same."""
    make, options, streams = KINDS[kind]
    mods, x = five()
    mods = mods[:3]
    x = {m.name: x[m.name][torch.arange(24) % 6] for m in mods}
    model, found = make(mods, 3, beta=1.3, **options), []
    torch._dynamo.reset()
    for call in (model, torch.compile(model, backend="aot_eager")):
        torch.manual_seed(1)
        model.zero_grad()
        value, terms = call(x, None, **streams)
        value.sum().backward()
        found.append([value, *terms.values(), *(p.grad for p in model.parameters())])
    for plain, compiled in zip(*found, strict=True):
        assert (plain is None) == (compiled is None)
        if plain is not None:
            torch.testing.assert_close(plain, compiled, rtol=1e-10, atol=1e-10)
