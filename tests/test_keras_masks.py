"""from_keras: masks go where they go in Keras, whichever steps they leave out."""

import pytest
import torch
from _keras_models import RECURRENT, compare, keras, layers, quiet, sequential

import cnnrnn_ext as cx

# said of models within models too, where it is not so
pytestmark = [quiet, pytest.mark.filterwarnings("ignore:.*does not support masking")]

# 0 is padding: behind, before, within, nowhere, everywhere but once
TOKENS = torch.tensor(
    [[3, 5, 2, 0, 0, 0], [0, 0, 4, 1, 6, 2], [0, 3, 0, 0, 7, 0], [1, 2, 3, 4, 5, 6], [0, 0, 0, 8, 0, 0]]
)


def embedding():
    return layers.Embedding(9, 5, mask_zero=True)


@pytest.mark.parametrize("sequences", [False, True])
@pytest.mark.parametrize("kind", RECURRENT)
def test_recurrent(kind, sequences):
    model = sequential((6,), embedding(), RECURRENT[kind](return_sequences=sequences))
    module = compare(model, TOKENS)
    with torch.no_grad():
        expected = module(TOKENS)
        module[0].weight[0] += 1.0  # the padding's vector makes no difference
        torch.testing.assert_close(module(TOKENS), expected)


@pytest.mark.parametrize("sequences", [False, True])
@pytest.mark.parametrize("kind", RECURRENT)
def test_bidirectional(kind, sequences):
    layer = layers.Bidirectional(RECURRENT[kind](return_sequences=sequences))
    compare(sequential((6,), embedding(), layer), TOKENS)


@pytest.mark.parametrize("kind", RECURRENT)
def test_going_backwards(kind):
    """Where outputs of single steps are wanted, Keras leaves the mask in the order of the input."""
    compare(sequential((6,), embedding(), RECURRENT[kind](go_backwards=True)), TOKENS)
    chain = [RECURRENT[kind](go_backwards=True, return_sequences=True), layers.LSTM(3)]
    compare(sequential((6,), embedding(), *chain), TOKENS)


@pytest.mark.parametrize("sequences", [False, True])
def test_zero_output_for_mask(sequences):
    layer = layers.LSTM(4, return_sequences=sequences, zero_output_for_mask=True)
    compare(sequential((6,), embedding(), layer), TOKENS)


def test_a_mask_passes_through_layers_that_keep_it():
    chain = [
        layers.Dropout(0.2),
        layers.TimeDistributed(layers.Dense(4)),
        layers.Activation("relu"),
        keras.Sequential([layers.Input((6, 4)), layers.GRU(4, return_sequences=True), layers.Dense(3)]),
        layers.Bidirectional(layers.LSTM(3, return_sequences=True), merge_mode="ave"),
        layers.LSTM(4, return_sequences=True),
    ]
    compare(sequential((6,), embedding(), *chain, layers.SimpleRNN(3), layers.Dense(2)), TOKENS)
    compare(sequential((6,), embedding(), *chain, layers.GlobalAveragePooling1D()), TOKENS)
    compare(sequential((6,), embedding(), layers.GlobalAveragePooling1D(keepdims=True)), TOKENS)


@pytest.mark.parametrize(
    "between", [layers.GlobalMaxPooling1D, layers.Flatten, lambda: layers.Conv1D(4, 2, activation="relu")]
)
def test_a_mask_ends_at_layers_that_drop_it(between):
    last = [layers.GRU(3)] if isinstance(between(), layers.Conv1D) else [layers.Dense(3)]
    compare(sequential((6,), embedding(), between(), *last), TOKENS)


@pytest.mark.parametrize("value", [0.0, -1.0])
def test_masking(value):
    x = torch.randn(5, 6, 3)
    x[TOKENS == 0] = value
    x[3, 2, 1] = value  # one feature alone leaves no step out
    compare(sequential((6, 3), layers.Masking(value), layers.Bidirectional(layers.GRU(4))), x)
    compare(sequential((6, 3), layers.Masking(value), layers.Dense(4)), x)


def test_a_row_without_any_step():
    model = sequential((6,), embedding(), layers.Bidirectional(layers.LSTM(4)))
    module = compare(model, TOKENS)
    nothing = torch.zeros(2, 6, dtype=torch.long)
    assert not module(nothing).any()
    assert not model(nothing).any()


def test_it_trains_and_has_a_stock_twin():
    module = compare(sequential((6,), embedding(), layers.Bidirectional(layers.GRU(4))), TOKENS)
    module.train()(TOKENS).square().sum().backward()
    assert all(p.grad.any() for p in module.parameters())
    assert not module[0].weight.grad[0].any()
    expected = module(TOKENS)
    cx.unfuse_(module)
    torch.testing.assert_close(module(TOKENS), expected)
