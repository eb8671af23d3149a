"""The families of networks: shapes, sizes that do not divide, and that no example sees another."""

import pytest
import torch
import torch.nn.functional as F

import common
from common import NETWORKS, Modality, UserError

IMAGES = {
    "linear": (3, 5, 7),
    "conv": (3, 28, 28),
    "mnist-sigmoid": (1, 28, 28),
    "svhn": (3, 32, 32),
    "svhn-sigmoid": (3, 32, 32),
    "cub-features": (2048,),
    "split": (1, 14, 28),
    "split-3": (1, 9, 28),
    "mlp": (1, 8, 8),
    "dcgan-28": (1, 28, 28),
    "dcgan-50": (1, 50, 50),
    "dcgan-64": (3, 64, 64),
    "residual-image": (3, 64, 64),
}
MODALITIES = [Modality("x", shape, network=name) for name, shape in IMAGES.items()]
MODALITIES += [
    Modality("x", (3, 16, 16), network="conv"),
    Modality("x", (3, 19, 30), network="conv"),
    Modality("x", (), "categorical", network="mlp", categories=10),
    Modality("x", (8,), "categorical", network="text", categories=71),
    Modality("x", (6,), "categorical", network="linear", categories=4),
    Modality("x", (5,), "categorical", network="gru", categories=11),
    Modality("x", (256,), "categorical", network="residual-text", categories=71),
    Modality("x", (32,), "categorical", network="cub-caption", categories=50),
]
every_modality = pytest.mark.parametrize("m", MODALITIES, ids=lambda m: f"{m.network}{m.shape}")


def test_every_family_is_tested():
    assert {m.network for m in MODALITIES} == set(NETWORKS)


@every_modality
def test_every_transposed_convolution_can_add_its_bias_apart(m):
    kinds = {type(layer) for layer in common.decoder(m, 4).modules()}
    assert not kinds & {torch.nn.ConvTranspose1d, torch.nn.ConvTranspose2d}


@every_modality
def test_shapes_and_no_example_sees_another(float64, m):
    encoder, decoder = common.encoder(m, 6), common.decoder(m, 4)
    x = torch.randn(3, *m.shape)
    if m.categories:
        x = torch.randint(m.categories, (3, *m.shape))
    z = torch.randn(2, 3, 4)
    h, parameters = encoder(x), decoder(z)
    assert h.shape == (3, 6) and parameters.shape == (2, 3, *m.parameter_shape)
    torch.testing.assert_close(encoder(x[1:2]), h[1:2])
    torch.testing.assert_close(decoder(z[1, 2]), parameters[1, 2])


@pytest.mark.parametrize("m", [m for m in MODALITIES if m.categories and m.shape], ids=str)
def test_encoders_of_texts_take_probabilities(float64, m):
    """Of one-hot ones they make what they make of the symbols."""
    torch.manual_seed(0)
    x, net = torch.randint(m.categories, (3, *m.shape)), common.encoder(m, 4)
    certain = torch.nn.functional.one_hot(x, m.categories).double()
    torch.testing.assert_close(net(certain), net(x))
    assert not torch.allclose(net(0.5 * certain + 0.5 / m.categories), net(x))


@pytest.mark.parametrize("name", ["conv", "svhn", "text"])
def test_data_that_a_family_cannot_take_are_one_line(name):
    for shape in ((4,), (3, 2), (1, 2, 28)):
        for make in (common.encoder, common.decoder):
            if name == "conv" and len(shape) > 1:
                continue  # halves anything
            with pytest.raises(UserError, match=f"modality 'x': network '{name}' needs"):
                make(Modality("x", shape, network=name), 5)


def test_layers_of_the_convolutions():
    """Those that Sutter et al. print for PolyMNIST, there and back."""
    m = Modality("x", (3, 28, 28), network="conv")
    there = [p.shape for p in common.encoder(m, 1024).parameters() if p.ndim > 1]
    back = [p.shape for p in common.decoder(m, 512).parameters() if p.ndim > 1]
    assert there == [(32, 3, 3, 3), (64, 32, 3, 3), (128, 64, 3, 3), (512, 2048), (1024, 512)]
    assert back == [(2048, 512), (128, 64, 3, 3), (64, 32, 3, 3), (32, 3, 3, 3)]


@pytest.mark.parametrize(
    "name, shape, there, back, activation",
    [
        (
            "mlp",  # Wu & Goodman 2018, supplement
            (1, 28, 28),
            [(512, 784), (512, 512), (6, 512)],
            [(512, 4), (512, 512), (512, 512), (784, 512)],
            "SiLU",
        ),
        ("mnist-sigmoid", (1, 28, 28), [(400, 784), (6, 400)], [(400, 4), (784, 400)], "ReLU"),
        (
            "svhn",  # Sutter et al. 2021, released code
            (3, 32, 32),
            [(32, 3, 4, 4), (64, 32, 4, 4), (64, 64, 4, 4), (128, 64, 4, 4), (6, 128)],
            [(128, 4), (128, 64, 4, 4), (64, 64, 4, 4), (64, 32, 4, 4), (32, 3, 4, 4)],
            "ReLU",
        ),
        (
            "split",  # Kutuzova et al. 2021, Table F.2, as the released code has it
            (1, 14, 28),
            [(64, 1, 4, 4), (128, 64, 4, 4), (256, 128, 4, 4), (512, 768), (6, 512)],
            [(512, 4), (112, 512), (112, 56, 3, 5), (56, 28, 3, 5), (28, 1, 2, 4)],
            "ReLU",
        ),
        (
            "split-3",
            (1, 9, 28),
            [(64, 1, 4, 4), (128, 64, 4, 4), (256, 128, 4, 4), (512, 768), (6, 512)],
            [(512, 4), (112, 512), (112, 56, 2, 5), (56, 28, 2, 5), (28, 1, 3, 4)],
            "ReLU",
        ),
        (
            "svhn-sigmoid",  # Shi et al. 2019, Table 6
            (3, 32, 32),
            [(32, 3, 4, 4), (64, 32, 4, 4), (128, 64, 4, 4), (6, 2048)],
            [(2048, 4), (128, 64, 4, 4), (64, 32, 4, 4), (32, 3, 4, 4)],
            "ReLU",
        ),
    ],
)
def test_layers_of_the_other_papers(name, shape, there, back, activation):
    m = Modality("x", shape, network=name)
    for net, expected in ((common.encoder(m, 6), there), (common.decoder(m, 4), back)):
        assert [tuple(p.shape) for p in net.parameters() if p.ndim > 1] == expected
        kinds = {type(layer).__name__ for layer in net.modules()}
        assert kinds & {"ReLU", "SiLU", "ELU"} == {activation}


@pytest.mark.parametrize(
    "name, widths",
    [
        ("dcgan-28", [64, 128]),  # Wu & Goodman 2018, released code
        ("dcgan-50", [32, 64, 128, 256]),
        ("dcgan-64", [32, 64, 128, 256]),
        ("cub-caption", [32, 64, 128, 256, 512]),  # Shi et al. 2019, Table 6
        ("text", [128, 128, 128]),  # Sutter et al. 2021, released code
        ("residual-image", [128, 256, 384, 512, 640]),
        ("residual-text", [128, 256, 384, 512, 640, 640, 640]),
    ],
)
def test_channels_there_and_back(name, widths):
    """Of a residual layer those of its first branch; a transposed layer's are those it takes."""
    (m,) = (m for m in MODALITIES if m.network == name)
    kinds = torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.ConvTranspose1d, torch.nn.ConvTranspose2d
    for net, expected in ((common.encoder(m, 6), widths), (common.decoder(m, 4), widths[::-1])):
        branches = {n for n, layer in net.named_modules() if isinstance(layer, common.Residual)}
        inner = tuple(f"{branch}.g." for branch in branches)
        weights = [
            layer.weight
            for n, layer in net.named_modules()
            if isinstance(layer, kinds) and not n.startswith(inner)
        ]
        assert [w.shape[0] for w in weights] == expected


def test_the_other_widths_of_the_papers():
    there = common.encoder(Modality("x", (2048,), "normal", network="cub-features"), 6)
    back = common.decoder(Modality("x", (2048,), "normal", network="cub-features"), 4)
    widths = [
        [layer.out_features for layer in net.modules() if hasattr(layer, "out_features")]
        for net in (there, back)
    ]
    assert widths == [[1024, 512, 256, 6], [256, 512, 1024, 2048]]  # Shi et al. 2019, Table 6
    text = Modality("x", (5,), "categorical", network="gru", categories=11)
    for net in (common.encoder(text, 6), common.decoder(text, 4).net):
        assert net.gru.hidden_size == net.embedding.embedding_dim == 200
    assert (
        common.encoder(text, 6).gru.bidirectional
        and common.decoder(text, 4).net.gru.num_layers == 2
    )


@pytest.mark.parametrize("m", MODALITIES, ids=lambda m: m.network)
def test_decoders_end_in_a_sigmoid_where_shi_et_al_have_one(m):
    x = common.decoder(m, 4)(100 * torch.randn(200, 4))
    bounded = bool(x.min() >= 0 and x.max() <= 1)
    assert bounded == m.network.endswith("-sigmoid")


def test_the_texts_decoder_is_affine_up_to_its_first_convolution():
    """As in the released code of Sutter et al. 2021, unlike SVHN's."""
    torch.manual_seed(0)
    m = Modality("x", (8,), "categorical", network="text", categories=71)
    features, z = common.decoder(m, 4).net[:3], torch.randn(2, 4)
    torch.testing.assert_close(
        features(z[:1] + z[1:]) + features(0 * z[:1]), features(z).sum(0)[None]
    )
    assert "ReLU" in {type(layer).__name__ for layer in common.decoder(m, 4).modules()}


def test_a_residual_layer_weighs_its_branches():
    net, x = common.Residual(torch.nn.Conv1d, 8, 16, 4, 2, 1), torch.randn(2, 8, 6)
    torch.testing.assert_close(net(x), 2 * net.f(x) + 0.3 * net.g(x))


@pytest.mark.parametrize("n", [1, 2])
def test_transposed_convolutions_in_bfloat16_add_their_bias_apart(n, monkeypatch):
    torch.manual_seed(0)
    name, geometry = f"conv_transpose{n}d", dict(stride=2, padding=1, output_padding=1)
    ours = (common.Transposed1d, common.Transposed2d)[n - 1](4, 2, 3, **geometry)
    plain = (torch.nn.ConvTranspose1d, torch.nn.ConvTranspose2d)[n - 1](4, 2, 3, **geometry)
    plain.load_state_dict(ours.state_dict())
    x, convolve, biases = torch.randn(3, 4, *[5] * n), getattr(F, name), []
    expected = plain(x)

    def watched(x, weight, bias, *rest):
        biases.append(bias)
        return convolve(x, weight, bias, *rest)

    monkeypatch.setattr(F, name, watched)
    assert torch.equal(ours(x), expected)  # in float32 PyTorch's own
    with torch.autocast("cpu", torch.bfloat16):
        found = ours(x)
    assert biases[0] is ours.bias and biases[1:] == [None] and found.dtype == torch.bfloat16
    # Three roundings to eight bits: of x, of the weights and of the sum, and one of the bias.
    assert (found - expected).norm() < 4 * 2**-9 * expected.norm()
    found.sum().backward()
    assert ours.bias.grad.tolist() == [expected[:, 0].numel()] * 2


def test_symbols_may_fill_a_plane():
    m = Modality("x", (8, 9), "categorical", network="conv", categories=5)
    assert common.encoder(m, 6)(torch.randint(5, (2, 8, 9))).shape == (2, 6)
    assert common.decoder(m, 3)(torch.randn(2, 3)).shape == (2, 8, 9, 5)


def test_a_label_is_looked_up_unless_the_family_is_affine():
    label = dict(name="x", shape=(), likelihood="categorical", categories=10)
    assert isinstance(common.encoder(Modality(**label, network="mlp"), 6)[0], torch.nn.Embedding)
    assert isinstance(common.encoder(Modality(**label, network="linear"), 6)[0], common.Symbols)


def test_a_family_with_a_norm_has_it_between_the_layers_only():
    def kinds(net):
        names = [type(layer).__name__ for layer in net.modules() if not list(layer.children())]
        return [name for name in names if name != "Identity"]

    m = Modality("x", (1, 50, 50), network="dcgan-50")
    assert kinds(common.encoder(m, 8))[:5] == ["Conv2d", "SiLU", "Conv2d", "GroupNorm", "SiLU"]
    back = kinds(common.decoder(m, 8))
    assert back[-4:] == ["Transposed2d", "GroupNorm", "SiLU", "Transposed2d"]
    m = Modality("x", (1, 28, 28), network="dcgan-28")  # whose released code has none
    assert "GroupNorm" not in kinds(common.encoder(m, 8)) + kinds(common.decoder(m, 8))


def test_the_strings_networks_stay_in_float32():
    """On a GPU autocast would have a GRU in float16."""
    m = Modality("x", (5,), "categorical", network="gru", categories=11)
    nets = (
        (common.encoder(m, 6), torch.randint(11, (3, 5))),
        (common.decoder(m, 4), torch.ones(3, 4)),
    )
    for net, given in nets:
        with torch.autocast("cpu", torch.bfloat16):
            found = net(given)
        assert found.equal(net(given)) and found.dtype == torch.float32


def test_the_strings_decoder_goes_by_its_own_symbols():
    """The logits of a place depend on z and on the most likely symbols before, on nothing else."""
    torch.manual_seed(0)
    m = Modality("x", (5,), "categorical", network="gru", categories=11)
    decoder = common.decoder(m, 4)
    z = torch.randn(50, 4)
    logits = decoder(z)
    assert len(logits.argmax(-1).unique(dim=0)) > 1
    with torch.no_grad():
        decoder.net.embedding.weight[11] += 1.0  # the symbol that begins
    assert not decoder(z)[:, 0].equal(logits[:, 0])
    with torch.no_grad():
        decoder.net.embedding.weight[11] -= 1.0
        decoder.net.embedding.weight[:11] += 1.0
    torch.testing.assert_close(decoder(z)[:, 0], logits[:, 0])
    assert not torch.isclose(decoder(z)[:, 1], logits[:, 1]).any(1).any()


# ---------------------------------------------------------------------- networks side by side

PLAIN = [m for m in MODALITIES if common.architecture(common.encoder(m, 6))]


def gradients(outputs, tensors):
    return torch.autograd.grad(sum(t.square().sum() for t in outputs), tensors)


def test_what_can_be_one_network():
    """Convolutions and fully connected layers without norms, embeddings and residual blocks."""
    assert {m.network for m in PLAIN} == {
        "linear", "conv", "mnist-sigmoid", "svhn", "svhn-sigmoid", "split", "split-3", "mlp",
        "dcgan-28", "cub-features",
    }  # fmt: skip
    conv = torch.nn.Conv2d
    for layer in (conv(4, 4, 3, groups=2), conv(4, 4, 3, dilation=2), torch.nn.GroupNorm(2, 4)):
        assert common.architecture(torch.nn.Sequential(torch.nn.ReLU(), layer)) is None


@pytest.mark.parametrize("m", PLAIN, ids=lambda m: f"{m.network}{m.shape}")
def test_networks_as_one_are_each_alone(float64, m):
    """Values and all gradients, also where one has fewer rows than another."""
    encoders, decoders = [
        [make(m, 6) for _ in range(3)] for make in (common.encoder, common.decoder)
    ]
    x = [torch.randn(B, *m.shape, requires_grad=True) for B in (17, 3, 5)]
    z = [torch.randn(*lead, 6, requires_grad=True) for lead in ((2, 2), (1,), (18,))]
    for nets, inputs in ((encoders, x), (decoders, z)):
        weights = [weight for net in nets for weight in net.parameters()]
        alone = [net(t) for net, t in zip(nets, inputs, strict=True)]
        together = common.as_one(nets, inputs)
        for one, other in zip(alone, together, strict=True):
            torch.testing.assert_close(one, other)
        expected = gradients(alone, [*inputs, *weights])
        for one, other in zip(expected, gradients(together, [*inputs, *weights]), strict=True):
            torch.testing.assert_close(one, other)


def test_networks_as_one_whose_rows_and_columns_differ(float64):
    def net():
        geometry = (3, 2), (2, 1), (1, 0)
        there, back = torch.nn.Conv2d(2, 3, *geometry, bias=False), torch.nn.ConvTranspose2d
        return torch.nn.Sequential(there, torch.nn.SiLU(), back(3, 2, *geometry, (1, 0)))

    nets, x = [net(), net()], [torch.randn(3, 2, 8, 9, requires_grad=True) for _ in range(2)]
    tensors = [*x, *(weight for one in nets for weight in one.parameters())]
    alone, together = [one(t) for one, t in zip(nets, x, strict=True)], common.as_one(nets, x)
    assert alone[0].shape == x[0].shape
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(one, other)
    for one, other in zip(*(gradients(t, tensors) for t in (alone, together)), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("compiling", [False, True])
@pytest.mark.parametrize("amp", [False, True])
def test_networks_run_abreast_compiled_for_a_gpu_in_bfloat16(compiling, amp, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: amp)
    assert not common.runs_abreast(torch.device("cpu"))
    assert common.runs_abreast(torch.device("cuda")) == (compiling and amp)


def test_networks_run_abreast_only_where_they_are_alike(monkeypatch):
    calls = []
    monkeypatch.setattr(common, "as_one", lambda nets, inputs: calls.append(len(nets)) or inputs)
    image = Modality("x", (3, 16, 16), network="conv")
    other = Modality("y", (3, 17, 17), network="conv")
    normed = Modality("z", (3, 64, 64), network="dcgan-64")
    for runs in (False, True):
        monkeypatch.setattr(common, "runs_abreast", lambda device, runs=runs: runs)
        for mods in ((image, image), (image, other), (normed, normed), (other, image, normed) * 3):
            nets, names = [common.encoder(m, 4) for m in mods], "abcdefghi"[: len(mods)]
            inputs = {n: torch.randn(2, *m.shape) for n, m in zip(names, mods, strict=True)}
            inputs = dict(reversed(inputs.items()))
            found = common.abreast(names, nets, inputs)
            assert [*found] == [*names]
            for name, net in zip(names, nets, strict=True):
                as_one = runs and mods != (image, other) and net.architecture is not None
                assert found[name].equal(inputs[name] if as_one else net(inputs[name]))
            assert [*common.abreast(names, nets, {"b": inputs["b"]})] == ["b"]
    assert calls == [2, 3, 3]
