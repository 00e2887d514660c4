"""from_keras: what has no equivalent is refused, or told, by name."""

import pytest
import torch
from _keras_models import keras, layers, quiet, sequential

import cnnrnn_ext as cx

pytestmark = quiet


def branching():
    inputs = layers.Input((5,))
    a, b = layers.Dense(4)(inputs), layers.Dense(4)(inputs)
    return keras.Model(inputs, layers.Add(name="joins")([a, b]))


def two_answers():
    inputs = layers.Input((5,))
    between = layers.Dense(4)(inputs)
    return keras.Model(inputs, [between, layers.Dense(3)(between)])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: sequential((7, 5), layers.LSTM(6, activation="relu", name="l")), "'l' .*activation='relu'"),
        (
            lambda: sequential((7, 5), layers.LSTM(6, recurrent_activation="hard_sigmoid", name="l")),
            "'l' .*recurrent_activation='hard_sigmoid'",
        ),
        (
            lambda: sequential((7, 5), layers.SimpleRNN(6, activation="elu", name="s")),
            "'s' .*activation='elu'",
        ),
        (
            lambda: sequential(
                (7, 5),
                layers.Bidirectional(
                    layers.LSTM(3, go_backwards=True), backward_layer=layers.LSTM(3), name="b"
                ),
            ),
            "go_backwards=False",
        ),
        (
            lambda: keras.Sequential(
                [layers.Input(batch_shape=(2, 7, 5)), layers.LSTM(6, stateful=True, name="l")]
            ),
            "'l' .*stateful=True",
        ),
        (
            lambda: sequential((7, 5), layers.Masking(), layers.BatchNormalization(name="b")),
            "'b' .*read a mask",
        ),
        (
            lambda: sequential(
                (3, 7), layers.TimeDistributed(layers.Embedding(9, 4, mask_zero=True), name="t")
            ),
            "'t' .*masks within",
        ),
        (lambda: sequential((8, 8, 3), layers.SeparableConv2D(4, 3, name="c")), "'c' .SeparableConv2D"),
        (
            lambda: sequential((8, 8, 3), layers.AveragePooling2D(2, padding="same", name="p")),
            "'p' .*padding='same'",
        ),
        (lambda: sequential((8,), layers.Activation("hard_silu", name="a")), "'a' .*activation='hard_silu'"),
        (lambda: sequential((8,), layers.ReLU(threshold=1.0, name="r")), "'r' .*threshold=1.0"),
        (
            lambda: sequential(
                (7, 5), layers.Bidirectional(layers.LSTM(3, return_sequences=True), merge_mode=None, name="b")
            ),
            "'b' .*merge_mode=None",
        ),
        (
            lambda: sequential(
                (7, 5),
                layers.Bidirectional(
                    layers.LSTM(3), backward_layer=layers.LSTM(4, go_backwards=True), name="b"
                ),
            ),
            "'b' .*units",
        ),
        (
            lambda: sequential(
                (7, 5),
                layers.Bidirectional(
                    layers.GRU(3),
                    backward_layer=layers.GRU(3, go_backwards=True, reset_after=False),
                    name="b",
                ),
            ),
            "'b' .*reset_after",
        ),
        (lambda: keras.Sequential([layers.Dense(3)]), "not built"),
        (branching, "only a linear chain"),
        (two_answers, "2 outputs"),
        (
            lambda: sequential((5,), layers.Dense(4, dtype="mixed_bfloat16", name="d")),
            "'d' .*mixed_bfloat16",
        ),
    ],
)
def test_what_has_no_equivalent_is_named(make, words):
    with pytest.raises(ValueError, match=words):
        cx.from_keras(make())


def test_other_objects_are_refused():
    for value in (torch.nn.Linear(2, 2), layers.Dense(3), "model.keras"):
        with pytest.raises(TypeError, match="model"):
            cx.from_keras(value)
