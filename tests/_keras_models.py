"""What the tests of from_keras share: Keras on its torch backend, random weights, and the comparison."""

import os

os.environ.setdefault("KERAS_BACKEND", "torch")

import numpy as np
import pytest
import torch

keras = pytest.importorskip("keras", reason="keras is not installed")
if keras.backend.backend() != "torch":
    pytest.skip(f"keras runs on {keras.backend.backend()}, not on torch", allow_module_level=True)

import cnnrnn_ext as cx  # noqa: E402

layers = keras.layers
# numpy tells Keras 3.15 of an argument to come
quiet = pytest.mark.filterwarnings("ignore:__array__ implementation")

RECURRENT = {
    "lstm": lambda **o: layers.LSTM(6, **o),
    "gru": lambda **o: layers.GRU(6, **o),
    "gru, reset before": lambda **o: layers.GRU(6, reset_after=False, **o),
    "tanh": lambda **o: layers.SimpleRNN(6, **o),
    "relu": lambda **o: layers.SimpleRNN(6, activation="relu", **o),
}


def drawn(model):
    """Random weights everywhere, biases and BatchNormalization's statistics among them."""
    random = np.random.default_rng(torch.initial_seed() % 2**32)
    for weight in model.weights:
        shape = tuple(weight.shape)
        if "variance" in weight.path:
            value = random.uniform(0.3, 2.0, shape)
        else:
            fan = np.prod(shape[:-1]) if len(shape) > 1 else 4
            value = random.normal(0.0, 1.0 / np.sqrt(fan), shape)
        weight.assign(value.astype("float32"))
    return model


def compare(model, x=None):
    """The converted module, whose outputs are those of the Keras model within 1e-5 (of the largest)."""
    drawn(model)
    module = cx.from_keras(model)
    if x is None:
        x = torch.randn(3, *model.input_shape[1:])
    with torch.no_grad():
        expected = model(x, training=False)
        result = module(x)
    assert result.shape == expected.shape
    assert expected.std() > 1e-3, "the case says nothing: its answers are all alike"
    assert (result - expected).abs().max() <= 1e-5 * max(1.0, expected.abs().max())
    return module


def sequential(shape, *chain):
    return keras.Sequential([layers.Input(shape), *chain])
