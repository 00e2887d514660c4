"""Each Keras layer as modules: a converter for every class, and a table of them."""

import warnings
from collections import OrderedDict

import torch
from torch import nn

from cnnrnn_ext.interop._keras_modules import (
    MERGES,
    ChannelsLast,
    GlobalPool,
    OverLast,
    Pad,
    Permute,
    Recurrent,
    Reshape,
    TimeDistributed,
)
from cnnrnn_ext.modules import GRU, LSTM, RNN, ConvPool1d, ConvPool2d

# ---- the chain of layers ----


def is_keras(value):
    return any(kind.__module__.split(".")[0] == "keras" for kind in type(value).__mro__)


def chain(model):
    """The layers of a Sequential or of a functional model without branches, in order."""
    config = model.get_config()
    entries = {entry["config"]["name"]: entry for entry in config.get("layers", ())}
    if "input_layers" not in config:  # a Sequential
        if not getattr(model, "built", False):
            raise ValueError(f"model: {model.name!r} is not built; call it, or give it an Input, first")
        return model.layers
    if len(model.outputs) != 1:
        raise ValueError(f"model: {model.name!r} has {len(model.outputs)} outputs; only one is supported")
    parents = {name: list(_parents(entry.get("inbound_nodes", ()))) for name, entry in entries.items()}
    followed = None
    for layer in model.layers:
        found = parents[layer.name]
        if found != ([] if followed is None else [followed]):
            raise ValueError(
                f"layer {layer.name!r} ({type(layer).__name__}): it reads {', '.join(found) or 'nothing'}, "
                f"not the layer before alone ({followed}); only a linear chain of layers is supported"
            )
        followed = layer.name
    return model.layers


def _parents(value):
    """The names of the layers whose outputs stand anywhere in a config's inbound nodes."""
    if isinstance(value, dict):
        if "keras_history" in value:
            yield value["keras_history"][0]
            return
        value = value.values()
    if not isinstance(value, (str, bytes)) and hasattr(value, "__iter__"):
        for part in value:
            yield from _parents(part)


def modules_of(model):
    """[(layer name, module)] of a model's chain."""
    return [pair for layer in chain(model) for pair in _converted(layer)]


def _converted(layer):
    """[(name, module)] of one layer."""
    if hasattr(layer, "layers"):  # a model within
        return modules_of(layer)
    kind = type(layer).__name__
    options = _Options(layer)
    if kind not in CONVERTERS or not type(layer).__module__.startswith("keras."):
        raise options.error("this kind of layer is not supported")
    if getattr(layer, "compute_dtype", None) != getattr(layer, "variable_dtype", None):
        raise options.error(f"dtype={layer.dtype_policy.name} is not supported, only one dtype for all")
    modules = CONVERTERS[kind](layer, options)
    if not layer.trainable:
        for module in modules:
            module.requires_grad_(False)
            if isinstance(module, OverLast):
                module.keep_statistics()
    return [(layer.name, module) for module in modules]


class _Options:
    """A layer's configuration, whose refusals name the layer and the option."""

    def __init__(self, layer):
        self.layer, self.config = layer, layer.get_config()

    def __getitem__(self, name):
        return self.config[name]

    def error(self, why):
        return ValueError(f"layer {self.layer.name!r} ({type(self.layer).__name__}): {why}")

    def require(self, **values):
        """Refuses options that are there and have another value."""
        for name, value in values.items():
            if name in self.config and self.config[name] != value:
                raise self.error(f"{name}={self.config[name]!r} is not supported, only {value!r}")

    def weights(self, count):
        arrays = self.layer.get_weights()
        if len(arrays) != count:
            raise self.error(f"expected {count} weights, it has {len(arrays)}; is the model built?")
        return [torch.tensor(array) for array in arrays]


# ---- activations ----

ACTIVATIONS = {
    "linear": nn.Identity,
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "elu": nn.ELU,
    "silu": nn.SiLU,
    "swish": nn.SiLU,
    "gelu": nn.GELU,
    "selu": nn.SELU,
    "leaky_relu": lambda: nn.LeakyReLU(0.2),  # Keras' slope
    "softplus": nn.Softplus,
    "softsign": nn.Softsign,
    "softmax": lambda: nn.Softmax(-1),
    "log_softmax": lambda: nn.LogSoftmax(-1),
}


def _activation(options):
    """Whatever the option "activation" is, as modules: none for "linear"."""
    name = options["activation"]
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise options.error(f"activation={name!r} is not supported, only {', '.join(ACTIVATIONS)}")
    return [] if name == "linear" else [ACTIVATIONS[name]()]


def _relu(layer, options):
    options.require(threshold=0.0)
    slope, largest = options["negative_slope"], options["max_value"]
    if slope and largest is not None:
        raise options.error(f"max_value={largest} beside negative_slope={slope} is not supported")
    if slope:
        return [nn.LeakyReLU(slope)]
    if largest is None:
        return [nn.ReLU()]
    return [nn.ReLU6() if largest == 6 else nn.Hardtanh(0.0, largest)]


# ---- convolutions and pools ----


def _convolution(dims):
    def convert(layer, options):
        options.require(data_format="channels_last")
        size, stride, dilation = options["kernel_size"], options["strides"], options["dilation_rate"]
        kernel, *bias = options.weights(1 + options["use_bias"])
        before, padding = [], 0
        if options["padding"] == "same" and all(s == 1 for s in stride):
            padding = "same"
        elif options["padding"] != "valid":
            before = [Pad(size, stride, dilation, causal=options["padding"] == "causal")]
        groups = options["groups"]
        conv = (ConvPool1d, ConvPool2d)[dims - 1](
            kernel.shape[-2] * groups, kernel.shape[-1], tuple(size), tuple(stride), padding, tuple(dilation),
            groups, bool(bias), activation="none", pool="none", dtype=kernel.dtype,
        )  # fmt: skip
        _set(conv.weight, kernel.movedim((-1, -2), (0, 1)))
        if bias:
            _set(conv.bias, bias[0])
        return [*before, ChannelsLast(conv), *_activation(options)]

    return convert


def _pool(kind, dims):
    def convert(layer, options):
        options.require(data_format="channels_last")
        size, stride = tuple(options["pool_size"]), tuple(options["strides"])
        same = options["padding"] == "same"
        if same and kind == "avg":
            raise options.error("padding='same' is not supported, only 'valid'")
        if kind == "avg":
            return [ChannelsLast((nn.AvgPool1d, nn.AvgPool2d)[dims - 1](size, stride))]
        # Windows of 2 need at most one more place, behind: what ceil_mode is.
        short = same and size == stride and all(s <= 2 for s in size)
        pool = ChannelsLast((nn.MaxPool1d, nn.MaxPool2d)[dims - 1](size, stride, ceil_mode=short))
        if same and not short:
            return [Pad(size, stride, (1,) * dims, value=-torch.inf), pool]
        return [pool]

    return convert


def _global_pool(kind):
    def convert(layer, options):
        options.require(data_format="channels_last")
        return [GlobalPool(kind, options["keepdims"])]

    return convert


# ---- recurrent layers ----


def _gates(order):
    """Rows of torch's order from columns of Keras': [I, gates*H] -> [gates*H, I]."""

    def convert(kernel):
        parts = kernel.chunk(len(order), -1)
        return torch.cat([parts[index] for index in order], -1).t()

    return convert


# Keras' class -> (ours, the place of each of torch's gates in Keras' order, options that must be so)
RECURRENT = {
    "LSTM": (LSTM, (0, 1, 2, 3), {"activation": "tanh", "recurrent_activation": "sigmoid"}),
    "GRU": (GRU, (1, 0, 2), {"activation": "tanh", "recurrent_activation": "sigmoid", "reset_after": True}),
    "SimpleRNN": (RNN, (0,), {}),
}


def _recurrent(layer, options):
    rnn = _recurrent_of([(layer, options)])
    return [Recurrent(rnn, options["return_sequences"])]


def _bidirectional(layer, options):
    merge = options["merge_mode"]
    if merge not in MERGES:
        raise options.error(f"merge_mode={merge!r} is not supported, only {', '.join(MERGES)}")
    pair = layer.forward_layer, layer.backward_layer
    for direction in pair:
        if type(direction).__name__ not in RECURRENT:
            raise options.error(f"a layer of {type(direction).__name__} is not supported")
    forward, backward = map(_Options, pair)
    if not backward["go_backwards"]:
        raise backward.error("go_backwards=False is not supported in the backward layer")
    for name in ("units", "use_bias", "return_sequences", "activation"):
        if type(pair[0]) is not type(pair[1]) or forward[name] != backward[name]:
            raise options.error(f"the backward layer differs from the forward layer in {name}")
    rnn = _recurrent_of([(pair[0], forward), (pair[1], backward)])
    return [Recurrent(rnn, forward["return_sequences"], merge)]


def _recurrent_of(directions):
    """Our layer of one or two directions, from (Keras layer, options) of each."""
    layer, options = directions[0]
    ours, order, required = RECURRENT[type(layer).__name__]
    more = {}
    if ours is RNN:
        if options["activation"] not in ("tanh", "relu"):
            raise options.error(f"activation={options['activation']!r} is not supported, only tanh, relu")
        more["nonlinearity"] = options["activation"]
    rnn, suffixes = None, ("", "_reverse")
    for index, (_, each) in enumerate(directions):
        each.require(**required, return_state=False, stateful=False)
        if index == 0:
            each.require(go_backwards=False)
        _warn_of_dropout(each)
        kernel, recurrent, *bias = each.weights(2 + each["use_bias"])
        if rnn is None:
            rnn = ours(
                kernel.shape[0], each["units"], bias=bool(bias), batch_first=True,
                bidirectional=len(directions) == 2, dtype=kernel.dtype, **more,
            )  # fmt: skip
        rows = _gates(order)
        _set(getattr(rnn, f"weight_ih_l0{suffixes[index]}"), rows(kernel))
        _set(getattr(rnn, f"weight_hh_l0{suffixes[index]}"), rows(recurrent))
        if bias:
            # A GRU with reset_after has a bias on each side; the others one for both.
            both = bias[0] if bias[0].dim() == 2 else torch.stack((bias[0], torch.zeros_like(bias[0])))
            for name, row in zip(("bias_ih", "bias_hh"), both, strict=True):
                _set(getattr(rnn, f"{name}_l0{suffixes[index]}"), rows(row[None]).squeeze(1))
    return rnn


def _warn_of_dropout(options):
    for name in ("dropout", "recurrent_dropout"):
        if options[name]:
            layer = f"layer {options.layer.name!r} ({type(options.layer).__name__})"
            warnings.warn(
                f"{layer}: {name}={options[name]} is left out; it matters in training only", stacklevel=2
            )


# ---- the other layers ----


def _dense(layer, options):
    kernel, *bias = options.weights(1 + options["use_bias"])
    linear = nn.Linear(*kernel.shape, bias=bool(bias), dtype=kernel.dtype)
    _set(linear.weight, kernel.t())
    if bias:
        _set(linear.bias, bias[0])
    return [linear, *_activation(options)]


def _batch_norm(layer, options):
    if options["axis"] not in (-1, layer.input_spec.ndim - 1):
        raise options.error(f"axis={options['axis']!r} is not supported, only the last one")
    options.require(renorm=False, synchronized=False)
    scale, center = options["scale"], options["center"]
    *affine, mean, variance = options.weights(2 + scale + center)
    norm = nn.BatchNorm1d(len(mean), options["epsilon"], 1 - options["momentum"], dtype=mean.dtype)
    _set(norm.running_mean, mean)
    _set(norm.running_var, variance)
    for parameter, there in ((norm.weight, scale), (norm.bias, center)):
        if there:
            _set(parameter, affine.pop(0))
        else:
            parameter.requires_grad_(False)  # 1, or 0, for good
    return [OverLast(norm)]


def _embedding(layer, options):
    options.require(mask_zero=False)
    (vectors,) = options.weights(1)
    return [nn.Embedding.from_pretrained(vectors, freeze=False)]


def _flatten(layer, options):
    options.require(data_format="channels_last")
    return [nn.Flatten()]


def _softmax(layer, options):
    if not isinstance(options["axis"], int):
        raise options.error(f"axis={options['axis']!r} is not supported, only one axis")
    return [nn.Softmax(options["axis"])]


def _time_distributed(layer, options):
    return [TimeDistributed(nn.Sequential(named(_converted(layer.layer))))]


CONVERTERS = {
    "InputLayer": lambda layer, options: [],
    "Conv1D": _convolution(1),
    "Conv2D": _convolution(2),
    "MaxPooling1D": _pool("max", 1),
    "MaxPooling2D": _pool("max", 2),
    "AveragePooling1D": _pool("avg", 1),
    "AveragePooling2D": _pool("avg", 2),
    "GlobalAveragePooling1D": _global_pool("avg"),
    "GlobalAveragePooling2D": _global_pool("avg"),
    "GlobalMaxPooling1D": _global_pool("max"),
    "GlobalMaxPooling2D": _global_pool("max"),
    "Flatten": _flatten,
    "Reshape": lambda layer, options: [Reshape(options["target_shape"])],
    "Permute": lambda layer, options: [Permute(options["dims"])],
    "Dense": _dense,
    "Activation": lambda layer, options: _activation(options),
    "ReLU": _relu,
    "LeakyReLU": lambda layer, options: [nn.LeakyReLU(options["negative_slope"])],
    "ELU": lambda layer, options: [nn.ELU(options["alpha"])],
    "Softmax": _softmax,
    "Dropout": lambda layer, options: [nn.Dropout(options["rate"])],
    "BatchNormalization": _batch_norm,
    "Embedding": _embedding,
    "LSTM": _recurrent,
    "GRU": _recurrent,
    "SimpleRNN": _recurrent,
    "Bidirectional": _bidirectional,
    "TimeDistributed": _time_distributed,
}


def _set(parameter, value):
    with torch.no_grad():
        parameter.copy_(value)


def named(modules):
    """{name: module}, a name that came before with a number behind it."""
    named = OrderedDict()  # what nn.Sequential takes
    for name, module in modules:
        name = name.replace(".", "_")
        count = sum(known == name or known.startswith(f"{name}#") for known in named)
        named[f"{name}#{count + 1}" if count else name] = module
    return named
