"""A Keras model as a module of ours: its layers one by one, its weights in torch's order."""

import inspect

from torch import nn

from cnnrnn_ext.interop._keras_layers import is_keras, modules_of, named
from cnnrnn_ext.interop._keras_modules import Chain, TimeDistributed
from cnnrnn_ext.modules import ConvPool1d, ConvPool2d


def from_keras(model):
    """A Keras 3 model as an ``nn.Sequential`` of cnnrnn_ext's and torch's modules, with equal outputs.

    The module takes what the Keras model takes: [N, ...] with channels last, or first where its layers have
    data_format="channels_first", or token ids. Its parts have the names of the Keras layers. A convolution,
    the ReLU after it and the max-pool after that become one ConvPool, neighbouring TimeDistributed layers
    one. LSTM gates are in the same order in Keras (i, f, c, o) and torch; a GRU's z, r, h become r, z, n. A
    GRU with reset_after=False, which is another function than torch's, runs on plain PyTorch
    (``cnnrnn_ext.trace`` says so). Keras itself is not imported: the model hands out its weights.

    Supported layers: InputLayer, Conv1D, Conv2D, MaxPooling1D, MaxPooling2D, AveragePooling1D,
    AveragePooling2D, GlobalAveragePooling1D, GlobalAveragePooling2D, GlobalMaxPooling1D, GlobalMaxPooling2D,
    Flatten, Reshape, Permute, Dense, Activation, ReLU, LeakyReLU, ELU, Softmax, Dropout, BatchNormalization,
    Embedding, Masking, LSTM, GRU, SimpleRNN, Bidirectional of these, TimeDistributed, and a Sequential or a
    linear functional model within the model. Masks, of Embedding(mask_zero=True) or Masking, go where they
    go in Keras: recurrent layers and GlobalAveragePooling1D read them.

    Args:
        model: keras.Sequential, or a functional keras.Model in which each layer reads the one before. It must
            be built.

    Returns:
        nn.Sequential in eval mode. Layers with ``trainable=False`` have no gradient. After ``train()`` it can
        be trained on: Dropout layers drop, BatchNormalization normalises by the batch, and recurrent layers
        have their dropout and recurrent_dropout: one mask for all steps of a row. (With recurrent_dropout
        Keras draws a mask for each gate of an LSTM or GRU; here one serves all gates, as for
        :class:`cnnrnn_ext.LSTM`, which runs on plain PyTorch then.)

    Raises:
        TypeError: model is no Keras model.
        ValueError: a layer or an option that has no equivalent, by name; a model that is not built, or in
            which layers branch.
    """
    if not is_keras(model) or not hasattr(model, "layers"):
        raise TypeError(f"model: expected a Keras model, got {type(model).__name__}")
    parts = named(_joined(modules_of(model)))
    return Chain(parts).eval()


# ---- neighbours that become one ----


def _joined(modules):
    """[(name, module)] with TimeDistributed neighbours in one, and convolutions with what follows them."""
    result = []
    for name, module in modules:
        last = result[-1][1] if result else None
        if isinstance(module, TimeDistributed) and isinstance(last, TimeDistributed):
            inner = [*last.module.named_children(), *module.module.named_children()]
            result[-1] = (result[-1][0], TimeDistributed(nn.Sequential(named(inner))))
        elif not _absorbed(last, module):
            result.append((name, module))
    return [
        (name, TimeDistributed(nn.Sequential(named(_joined(module.module.named_children())))))
        if isinstance(module, TimeDistributed)
        else (name, module)
        for name, module in result
    ]


# an activation by itself -> ConvPool's name of it
OF_MODULES = {nn.ReLU: "relu", nn.ReLU6: "relu6", nn.Tanh: "tanh", nn.Sigmoid: "sigmoid", nn.SiLU: "silu"}


def _absorbed(before, module):
    """Whether the convolution ``before`` took this activation or max-pool into itself."""
    conv = getattr(before, "module", None)
    if not isinstance(conv, (ConvPool1d, ConvPool2d)) or conv.pool != "none":
        return False
    if type(module) in OF_MODULES and conv.activation == "none":
        _set(conv, activation=OF_MODULES[type(module)])
        return True
    pool = getattr(module, "module", None)
    if isinstance(pool, (nn.MaxPool1d, nn.MaxPool2d)) and module.first == before.first:
        _set(conv, pool="max", pool_size=pool.kernel_size, pool_stride=pool.stride, ceil_mode=pool.ceil_mode)
        return True
    return False


def _set(conv, **options):
    """Other options of activation and pool in a ConvPool."""
    names = inspect.signature(conv._set_options).parameters
    conv._set_options(**{name: getattr(conv, name) for name in names} | options)
