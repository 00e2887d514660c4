"""from_keras: equal outputs, against Keras itself on its torch backend, with random weights."""

import numpy as np
import pytest
import torch
from _keras_models import RECURRENT, compare, keras, layers, quiet, sequential
from _oracle import running_on

import cnnrnn_ext as cx

pytestmark = quiet


def seed_frame():
    return keras.Sequential(
        [
            layers.Input((28, 28, 1)),
            layers.Conv2D(32, 3, activation="relu"),
            layers.MaxPooling2D(),
            layers.Conv2D(64, 3, activation="relu"),
            layers.MaxPooling2D(),
            layers.Flatten(),
        ]
    )


# ---- whole networks ----


@pytest.mark.parametrize("form", ["a model in time", "each layer in time", "functional"])
def test_the_seeds_network(mode, form):
    """Conv2D, MaxPooling2D, twice, Flatten, LSTM(128), Dense, given a time axis in each of Keras' ways."""
    frame = seed_frame()
    if form == "a model in time":
        model = sequential((5, 28, 28, 1), layers.TimeDistributed(frame), layers.LSTM(128), layers.Dense(10))
    elif form == "each layer in time":
        chain = [layers.TimeDistributed(layer) for layer in frame.layers]
        model = sequential((5, 28, 28, 1), *chain, layers.LSTM(128), layers.Dense(10))
    else:
        x = inputs = layers.Input((5, 28, 28, 1))
        for layer in (layers.TimeDistributed(frame), layers.LSTM(128), layers.Dense(10)):
            x = layer(x)
        model = keras.Model(inputs, x)
    with running_on(mode, "conv_pool2d", "lstm"):
        module = compare(model)
    convs = [part for part in module.modules() if isinstance(part, cx.ConvPool2d)]
    assert [(conv.activation, conv.pool, conv.pool_size) for conv in convs] == [("relu", "max", (2, 2))] * 2
    assert isinstance(module[1].rnn, cx.LSTM)
    # and it trains: a gradient reaches everything
    module.train()(torch.randn(2, 5, 28, 28, 1)).square().sum().backward()
    assert all(p.grad.any() for name, p in module.named_parameters() if "hh_l0" not in name)


def test_text_network(mode):
    """Embedding, Conv1D, pools, a bidirectional GRU, softmax."""
    model = sequential(
        (12,),
        layers.Embedding(30, 8),
        layers.Conv1D(10, 3, padding="same", activation="relu"),
        layers.MaxPooling1D(),
        layers.Dropout(0.3),
        layers.Bidirectional(layers.GRU(6, return_sequences=True)),
        layers.GlobalMaxPooling1D(),
        layers.Dense(5, activation="softmax"),
    )
    with running_on(mode, "conv_pool2d", "gru"):
        compare(model, torch.randint(0, 30, (4, 12)))


def test_batch_normalisation_network():
    """Convolution, BatchNormalization as training leaves it, activation, pool, all layers by themselves."""
    model = sequential(
        (13, 12, 3),
        layers.Conv2D(8, 3, use_bias=False),
        layers.BatchNormalization(),
        layers.Activation("relu"),
        layers.AveragePooling2D(2),
        layers.Conv2D(6, (2, 3), strides=(1, 2)),
        layers.ReLU(),
        layers.MaxPooling2D((2, 1)),
        layers.BatchNormalization(scale=False, epsilon=0.01),
        layers.Reshape((-1, 6)),
        layers.Permute((2, 1)),
        layers.BatchNormalization(center=False),
        layers.SimpleRNN(7),
        layers.BatchNormalization(),
        layers.Dense(4),
    )
    module = compare(model)
    fused = [part for part in module.modules() if isinstance(part, cx.ConvPool2d)]
    assert [(conv.activation, conv.pool) for conv in fused] == [("none", "none"), ("relu", "max")]


# ---- layers ----


@pytest.mark.parametrize("sequences", [False, True])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", RECURRENT)
def test_recurrent(mode, kind, bias, sequences):
    layer = RECURRENT[kind](use_bias=bias, return_sequences=sequences)
    if kind == "gru, reset before":
        mode = "reference"  # always
    with running_on(mode, {"tanh": "rnn", "relu": "rnn", "gru, reset before": "gru"}.get(kind, kind)):
        compare(sequential((7, 5), layer))


def test_a_reset_gate_before_the_product_says_what_it_runs_on():
    module = compare(sequential((7, 5), layers.GRU(6, reset_after=False)))
    x = torch.randn(2, 7, 5)
    with cx.trace() as log:
        module(x)
    assert [(call.op, call.backend) for call in log] == [("gru", "reference")]
    assert "reset_after=False" in log[0].reason
    with cx.backend("compiled"), pytest.raises(RuntimeError, match="reset_after=False"):
        module(x)
    module.train()(x).square().sum().backward()
    assert all(p.grad.any() for p in module.parameters())


@pytest.mark.parametrize("sequences", [False, True])
@pytest.mark.parametrize("merge", ["concat", "sum", "ave", "mul"])
@pytest.mark.parametrize("kind", RECURRENT)
def test_bidirectional(kind, merge, sequences):
    layer = RECURRENT[kind](return_sequences=sequences)
    compare(sequential((7, 5), layers.Bidirectional(layer, merge_mode=merge)))


@pytest.mark.parametrize("sequences", [False, True])
@pytest.mark.parametrize("kind", RECURRENT)
def test_going_backwards(kind, sequences):
    chain = [RECURRENT[kind](go_backwards=True, return_sequences=sequences)]
    compare(sequential((7, 5), *chain, *[layers.LSTM(3)] * sequences))


ROWS = 4000  # of the same sequence, each with a mask of its own


@pytest.mark.parametrize("going", ["one way", "both ways"])
@pytest.mark.parametrize(
    ("kind", "rates"),
    [
        ("lstm", {"dropout": 0.4}),
        ("gru", {"dropout": 0.4}),
        ("gru, reset before", {"dropout": 0.4}),
        ("tanh", {"dropout": 0.4, "recurrent_dropout": 0.3}),
        ("tanh", {"recurrent_dropout": 0.5}),
    ],
)
def test_dropout_within_recurrent_layers(kind, rates, going):
    """Means and deviations over many masks are Keras' own, in training; without training nothing is left
    out."""
    layer = RECURRENT[kind](**rates)
    model = sequential((4, 3), layer if going == "one way" else layers.Bidirectional(layer))
    module = compare(model).train()
    x = torch.randn(1, 4, 3).expand(ROWS, 4, 3)
    with torch.no_grad():
        ours, theirs = module(x), model(x, training=True)
    spread = theirs.std(0)
    assert spread.min() > 1e-3, "the case says nothing: nothing was left out"
    noise = 5 * spread / ROWS**0.5
    assert ((ours.mean(0) - theirs.mean(0)).abs() < 2 * noise).all()
    assert ((ours.std(0) / spread - 1).abs() < 0.15).all()


@pytest.mark.parametrize("kind", ["lstm", "gru", "gru, reset before"])
def test_recurrent_dropout_of_gated_layers(kind):
    """From the second step on (the first reads a state of zero), and in training alone. Keras draws a mask
    for each gate: its numbers are others."""
    model = sequential((5, 3), RECURRENT[kind](recurrent_dropout=0.5, return_sequences=True))
    module = compare(model).train()
    x = torch.randn(1, 5, 3).expand(ROWS, 5, 3)
    with torch.no_grad():
        ours = module(x)
    assert ours[:, 0].std(0).max() < 1e-6
    assert ours[:, 1:].std(0).min() > 1e-3
    assert torch.equal(module.eval()(x), module(x))


def test_stacked_recurrent_layers():
    chain = [
        layers.LSTM(6, return_sequences=True),
        layers.GRU(5, return_sequences=True),
        layers.Bidirectional(layers.SimpleRNN(4)),
        layers.Dense(3),
    ]
    compare(sequential((7, 5), *chain))


CONVOLUTIONS = {
    "strides": lambda: layers.Conv2D(4, 3, strides=2, activation="tanh"),
    "dilation": lambda: layers.Conv2D(4, (3, 2), dilation_rate=(2, 1), activation="elu"),
    "groups": lambda: layers.Conv2D(6, 3, groups=3, activation="sigmoid"),
    "same": lambda: layers.Conv2D(4, (3, 4), padding="same", activation="silu"),
    "same, strides": lambda: layers.Conv2D(4, (3, 2), strides=(2, 3), padding="same"),
    "no bias": lambda: layers.Conv2D(4, 3, use_bias=False, activation="gelu"),
    "leaky": lambda: layers.Conv2D(4, 3, activation="leaky_relu"),
}


@pytest.mark.parametrize("pool", ["none", "max", "max same", "max 3 same", "avg"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_conv2d(name, pool):
    pools = {
        "none": [],
        "max": [layers.MaxPooling2D(2)],
        "max same": [layers.MaxPooling2D(2, padding="same")],
        "max 3 same": [layers.MaxPooling2D(3, strides=2, padding="same")],
        "avg": [layers.AveragePooling2D((2, 1), strides=(1, 2))],
    }
    compare(sequential((11, 14, 3), CONVOLUTIONS[name](), *pools[pool]))


FIRST = {"data_format": "channels_first"}


@pytest.mark.parametrize("padding", ["valid", "same"])
@pytest.mark.parametrize("stride", [1, 2])
def test_channels_first(padding, stride):
    convolution = layers.Conv2D(4, 3, strides=stride, padding=padding, activation="relu", **FIRST)
    pool = layers.MaxPooling2D(2, padding=padding, **FIRST)
    last = [layers.BatchNormalization(axis=1), layers.AveragePooling2D(2, **FIRST), layers.Flatten(**FIRST)]
    module = compare(sequential((3, 12, 13), convolution, pool, *last, layers.Dense(3)))
    (conv,) = [part for part in module.modules() if isinstance(part, cx.ConvPool2d)]
    assert (conv.activation, conv.pool) == ("relu", "max")


@pytest.mark.parametrize(
    "last",
    [
        lambda: layers.MaxPooling1D(3, 2, padding="same", **FIRST),
        lambda: layers.GlobalAveragePooling1D(**FIRST),
        lambda: layers.GlobalMaxPooling1D(keepdims=True, **FIRST),
        lambda: layers.Flatten(**FIRST),
        lambda: layers.MaxPooling1D(2),  # over the channels, which are last for it
    ],
)
def test_channels_first_1d(last):
    compare(sequential((4, 13), layers.Conv1D(6, 3, padding="same", strides=2, **FIRST), last()))


@pytest.mark.parametrize("padding", ["valid", "same", "causal"])
@pytest.mark.parametrize("options", [{}, {"dilation_rate": 2}, {"strides": 2}, {"groups": 2}])
def test_conv1d(padding, options):
    compare(sequential((13, 4), layers.Conv1D(6, 3, padding=padding, **options), layers.MaxPooling1D(3, 2)))


@pytest.mark.parametrize(
    "name",
    [
        "linear", "relu", "relu6", "tanh", "sigmoid", "elu", "silu", "swish", "gelu", "selu", "leaky_relu",
        "softplus", "softsign", "softmax", "log_softmax",
    ],
)  # fmt: skip
def test_activations(name):
    compare(sequential((5,), layers.Dense(6, activation=name)))
    compare(sequential((4, 5), layers.Dense(6), layers.Activation(name)))


@pytest.mark.parametrize(
    "layer",
    [
        lambda: layers.ReLU(max_value=6.0),
        lambda: layers.ReLU(max_value=0.7),
        lambda: layers.ReLU(negative_slope=0.3),
        lambda: layers.LeakyReLU(negative_slope=0.2),
        lambda: layers.ELU(alpha=0.5),
        lambda: layers.Softmax(axis=-1),
        lambda: layers.Softmax(axis=1),
        lambda: layers.GlobalAveragePooling2D(),
        lambda: layers.GlobalAveragePooling2D(keepdims=True),
        lambda: layers.GlobalMaxPooling2D(),
        lambda: layers.BatchNormalization(axis=3),
        lambda: layers.BatchNormalization(axis=1),
        lambda: layers.BatchNormalization(axis=-2),
        lambda: layers.TimeDistributed(layers.GlobalMaxPooling1D()),
        lambda: layers.TimeDistributed(layers.LSTM(3)),
        lambda: layers.TimeDistributed(layers.Dense(3, use_bias=False)),
        lambda: layers.Flatten(),
        lambda: layers.Permute((3, 1, 2)),
    ],
)
def test_other_layers(layer):
    compare(sequential((4, 5, 6), layer()))


def test_pool_of_negative_numbers_padded():
    """Padding of a max-pool is less than any number: without a ReLU before it that shows."""
    model = sequential((5, 5, 2), layers.MaxPooling2D(3, strides=2, padding="same"))
    x = -torch.rand(2, 5, 5, 2) - 1.0
    torch.testing.assert_close(cx.from_keras(model)(x), model(x))


def test_order_of_relu_and_pool_is_kept():
    """A pool and then an activation that is not monotonic: they are not taken for one another."""
    compare(sequential((8, 8, 3), layers.Conv2D(4, 3), layers.MaxPooling2D(), layers.Activation("gelu")))


def test_names_and_frozen_layers():
    model = sequential((6, 4), layers.LSTM(5, name="reads"), layers.Dense(3, name="answers"))
    model.layers[0].trainable = False
    module = compare(model)
    assert [name for name, _ in module.named_children()] == ["reads", "answers"]
    assert not any(p.requires_grad for p in module.reads.parameters())
    assert all(p.requires_grad for p in module.answers.parameters())
    assert not module.training


@pytest.mark.parametrize("trainable", [True, False])
def test_batch_normalisation_in_training(trainable):
    """It normalises by the batch, as Keras does, and updates its statistics; not so where it is frozen."""
    model = sequential((6, 4), layers.BatchNormalization(momentum=0.9), layers.Dense(3))
    model.layers[0].trainable = trainable
    module, x = compare(model).train(), torch.randn(8, 6, 4)
    before = module[0].module.running_mean.clone()
    torch.testing.assert_close(module(x), model(x, training=True), rtol=1e-4, atol=1e-5)
    mean = model.layers[0].moving_mean.value
    torch.testing.assert_close(module[0].module.running_mean, mean, rtol=1e-4, atol=1e-6)
    assert mean.equal(before) != trainable


def test_models_within_a_model():
    inner = keras.Sequential([layers.Input((8,)), layers.Dense(6, activation="tanh"), layers.Dense(5)])
    inputs = layers.Input((8,))
    functional = keras.Model(inputs, layers.Dense(8)(inputs))
    compare(sequential((8,), functional, inner, layers.Dense(3)))


def test_weights_are_copied():
    model = sequential((5,), layers.Dense(3))
    module = compare(model)
    x = torch.randn(2, 5)
    before = module(x)
    model.layers[0].kernel.assign(np.zeros((5, 3)))
    assert module(x).equal(before)


def test_what_comes_out_is_an_ordinary_module():
    """The imported module is an ordinary one: it has a state dict, and a stock twin."""
    model = sequential(
        (9, 9, 2), layers.Conv2D(4, 3, activation="relu"), layers.MaxPooling2D(), layers.Flatten()
    )
    module = compare(model)
    twin = cx.from_keras(model)
    twin.load_state_dict(module.state_dict(), strict=True)
    x = torch.randn(2, 9, 9, 2)
    torch.testing.assert_close(module(x), twin(x))
    cx.unfuse_(twin)
    torch.testing.assert_close(module(x), twin(x))
