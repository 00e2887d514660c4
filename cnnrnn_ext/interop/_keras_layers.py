"""Each Keras layer as modules: a converter for every class, and a table of them."""

from collections import OrderedDict

import torch
from torch import nn

from cnnrnn_ext.interop._keras_modules import (
    ChannelsLast,
    Flatten,
    GlobalPool,
    Masking,
    MaskingEmbedding,
    OverAxis,
    Pad,
    Permute,
    Reshape,
    TimeDistributed,
)
from cnnrnn_ext.interop._keras_options import Options, set_
from cnnrnn_ext.interop._keras_recurrent import bidirectional, recurrent
from cnnrnn_ext.modules import ConvPool1d, ConvPool2d

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
    return _followed(model, masked=False)[0]


def _followed(layer, masked):
    """([(name, module)] of a layer, or of a model's chain; whether a mask goes on behind it).

    masked: whether a mask comes with its input.
    """
    if not hasattr(layer, "layers"):
        pairs = _converted(layer)
        return pairs, _mask_behind(layer, [module for _, module in pairs], masked)
    pairs = []
    for part in chain(layer):
        found, masked = _followed(part, masked)
        pairs += found
    return pairs, masked


READ_MASKS = ("LSTM", "GRU", "SimpleRNN", "Bidirectional", "GlobalAveragePooling1D")
PASS_MASKS_ON = ("InputLayer", "Dense", "Dropout", "Activation", "ReLU", "LeakyReLU", "ELU")


def _mask_behind(layer, modules, masked):
    """Whether a mask goes on behind a layer, as Keras has it; its modules that read one are told to."""
    if any(hasattr(module, "mask_of") for module in modules):
        return True
    if not masked:
        return False
    inner = layer.layer if type(layer).__name__ == "TimeDistributed" else layer
    if type(inner).__name__ in PASS_MASKS_ON:
        return True
    if type(layer).__name__ in READ_MASKS:
        modules[-1].reads_mask = True
        return getattr(modules[-1], "return_sequences", False)
    if layer.supports_masking:
        raise Options(layer).error("it would read a mask here, which is not supported")
    return False  # Keras drops it too


def _converted(layer):
    """[(name, module)] of one layer."""
    kind = type(layer).__name__
    options = Options(layer)
    if kind not in CONVERTERS or not type(layer).__module__.startswith("keras."):
        raise options.error("this kind of layer is not supported")
    if getattr(layer, "compute_dtype", None) != getattr(layer, "variable_dtype", None):
        raise options.error(f"dtype={layer.dtype_policy.name} is not supported, only one dtype for all")
    modules = CONVERTERS[kind](layer, options)
    if not layer.trainable:
        for module in modules:
            module.requires_grad_(False)
            if isinstance(module, OverAxis):
                module.keep_statistics()
    return [(layer.name, module) for module in modules]


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
        first = options.channels_first
        size, stride, dilation = options["kernel_size"], options["strides"], options["dilation_rate"]
        kernel, *bias = options.weights(1 + options["use_bias"])
        before, padding = [], 0
        if options["padding"] == "same" and all(s == 1 for s in stride):
            padding = "same"
        elif options["padding"] != "valid":
            before = [Pad(size, stride, dilation, causal=options["padding"] == "causal", first=first)]
        groups = options["groups"]
        conv = (ConvPool1d, ConvPool2d)[dims - 1](
            kernel.shape[-2] * groups, kernel.shape[-1], tuple(size), tuple(stride), padding, tuple(dilation),
            groups, bool(bias), activation="none", pool="none", dtype=kernel.dtype,
        )  # fmt: skip
        set_(conv.weight, kernel.movedim((-1, -2), (0, 1)))
        if bias:
            set_(conv.bias, bias[0])
        return [*before, ChannelsLast(conv, first), *_activation(options)]

    return convert


def _pool(kind, dims):
    def convert(layer, options):
        first = options.channels_first
        size, stride = tuple(options["pool_size"]), tuple(options["strides"])
        same = options["padding"] == "same"
        if same and kind == "avg":
            raise options.error("padding='same' is not supported, only 'valid'")
        if kind == "avg":
            return [ChannelsLast((nn.AvgPool1d, nn.AvgPool2d)[dims - 1](size, stride), first)]
        # Windows of 2 need at most one more place, behind: what ceil_mode is.
        short = same and size == stride and all(s <= 2 for s in size)
        pool = ChannelsLast((nn.MaxPool1d, nn.MaxPool2d)[dims - 1](size, stride, ceil_mode=short), first)
        if same and not short:
            return [Pad(size, stride, (1,) * dims, value=-torch.inf, first=first), pool]
        return [pool]

    return convert


def _global_pool(kind):
    def convert(layer, options):
        return [GlobalPool(kind, options["keepdims"], options.channels_first)]

    return convert


# ---- the other layers ----


def _dense(layer, options):
    kernel, *bias = options.weights(1 + options["use_bias"])
    linear = nn.Linear(*kernel.shape, bias=bool(bias), dtype=kernel.dtype)
    set_(linear.weight, kernel.t())
    if bias:
        set_(linear.bias, bias[0])
    return [linear, *_activation(options)]


def _batch_norm(layer, options):
    if not isinstance(options["axis"], int):
        raise options.error(f"axis={options['axis']!r} is not supported, only one axis")
    options.require(renorm=False, synchronized=False)
    scale, center = options["scale"], options["center"]
    *affine, mean, variance = options.weights(2 + scale + center)
    norm = nn.BatchNorm1d(len(mean), options["epsilon"], 1 - options["momentum"], dtype=mean.dtype)
    set_(norm.running_mean, mean)
    set_(norm.running_var, variance)
    for parameter, there in ((norm.weight, scale), (norm.bias, center)):
        if there:
            set_(parameter, affine.pop(0))
        else:
            parameter.requires_grad_(False)  # 1, or 0, for good
    return [OverAxis(norm, options["axis"])]


def _embedding(layer, options):
    (vectors,) = options.weights(1)
    kind = MaskingEmbedding if options["mask_zero"] else nn.Embedding
    return [kind.from_pretrained(vectors, freeze=False)]


def _masking(layer, options):
    if not isinstance(options["mask_value"], (int, float)):
        raise options.error(f"mask_value={options['mask_value']!r} is not supported, only a number")
    return [Masking(options["mask_value"])]


def _softmax(layer, options):
    if not isinstance(options["axis"], int):
        raise options.error(f"axis={options['axis']!r} is not supported, only one axis")
    return [nn.Softmax(options["axis"])]


def _time_distributed(layer, options):
    inner, _ = _followed(layer.layer, masked=False)
    if any(hasattr(module, "mask_of") for _, module in inner):
        raise options.error("masks within it are not supported")
    return [TimeDistributed(nn.Sequential(named(inner)))]


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
    "Flatten": lambda layer, options: [Flatten(options.channels_first)],
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
    "Masking": _masking,
    "LSTM": recurrent,
    "GRU": recurrent,
    "SimpleRNN": recurrent,
    "Bidirectional": bidirectional,
    "TimeDistributed": _time_distributed,
}


def named(modules):
    """{name: module}, a name that came before with a number behind it."""
    named = OrderedDict()  # what nn.Sequential takes
    for name, module in modules:
        name = name.replace(".", "_")
        count = sum(known == name or known.startswith(f"{name}#") for known in named)
        named[f"{name}#{count + 1}" if count else name] = module
    return named
