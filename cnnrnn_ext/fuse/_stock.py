"""Which stock module each of ours is, both ways; ours have more, and what only they have stays theirs."""

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from cnnrnn_ext import modules, reference
from cnnrnn_ext.fuse._modules import ConvNormPool1d, ConvNormPool2d, share

OURS = {
    nn.LSTM: modules.LSTM,
    nn.GRU: modules.GRU,
    nn.RNN: modules.RNN,
    nn.LSTMCell: modules.LSTMCell,
    nn.GRUCell: modules.GRUCell,
    nn.RNNCell: modules.RNNCell,
}
CONVOLUTIONS = {nn.Conv1d: modules.ConvPool1d, nn.Conv2d: modules.ConvPool2d}
NORMS = {nn.BatchNorm1d: nn.Conv1d, nn.BatchNorm2d: nn.Conv2d}


def recurrent_arguments(module):
    """The constructor's arguments of a recurrent layer or cell, stock or ours."""
    arguments = {name: getattr(module, name) for name in ("input_size", "hidden_size", "bias")}
    if isinstance(module, nn.RNNCellBase):
        return arguments | ({"nonlinearity": module.nonlinearity} if hasattr(module, "nonlinearity") else {})
    arguments |= {name: getattr(module, name) for name in ("num_layers", "batch_first", "dropout")}
    arguments["bidirectional"] = module.bidirectional
    if module.mode == "LSTM":
        arguments["proj_size"] = module.proj_size
    if module.mode.startswith("RNN"):
        arguments["nonlinearity"] = module.mode.removeprefix("RNN_").lower()
    return arguments


def convolution_arguments(module):
    names = (
        "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups",
        "padding_mode",
    )  # fmt: skip
    return {name: getattr(module, name) for name in names} | {"bias": module.bias is not None}


# ---- options of a ConvPool from stock modules, or None where a ConvPool has no such option ----


def activation_of(module):
    """The name of a stock activation with arguments that ConvPool has too, or None."""
    kind = type(module)
    if (
        (kind is nn.LeakyReLU and module.negative_slope != 0.01)
        or (kind is nn.ELU and module.alpha != 1.0)
        or (kind is nn.GELU and module.approximate != "none")
    ):
        return None
    return {
        nn.ReLU: "relu",
        nn.ReLU6: "relu6",
        nn.LeakyReLU: "leaky_relu",
        nn.Tanh: "tanh",
        nn.Sigmoid: "sigmoid",
        nn.GELU: "gelu",
        nn.SiLU: "silu",
        nn.ELU: "elu",
    }.get(kind)


def pool_of(module, dims):
    """The pool options of a stock pooling module, or None."""
    kind = type(module)
    if kind is (nn.MaxPool1d, nn.MaxPool2d)[dims - 1]:
        dilated = module.dilation not in (1, (1,) * dims)
        name = None if dilated or module.return_indices else "max"
    elif kind is (nn.AvgPool1d, nn.AvgPool2d)[dims - 1]:
        divided = not module.count_include_pad or getattr(module, "divisor_override", None) is not None
        name = None if divided else "avg"
    else:
        name = None
    return name and {
        "pool": name,
        "pool_size": module.kernel_size,
        "pool_stride": module.stride,
        "pool_padding": module.padding,
        "ceil_mode": module.ceil_mode,
    }


# ---- the way back ----


class _Lengths:
    """A stock recurrent layer that also takes ``lengths=``, by packing."""

    def forward(self, input, hx=None, *, lengths=None):
        if lengths is None:
            return super().forward(input, hx)
        # Packing has no rows of no steps: those go one, which is taken back.
        empty = (lengths < 1).to(input.device)
        lengths = lengths.clamp(min=1).cpu()
        packed = pack_padded_sequence(input, lengths, self.batch_first, enforce_sorted=False)
        output, new = super().forward(packed, hx)
        steps = input.shape[1 if self.batch_first else 0]
        output, _ = pad_packed_sequence(output, self.batch_first, total_length=steps)
        output = output.masked_fill(empty[:, None, None] if self.batch_first else empty[:, None], 0.0)
        if isinstance(new, tuple):
            return output, tuple(_kept(empty, *pair) for pair in zip(hx or (0.0, 0.0), new, strict=True))
        return output, _kept(empty, 0.0 if hx is None else hx, new)


def _kept(empty, old, new):
    """The new states, and the old ones of rows that are empty. empty: [N]; states: [num_layers*D, N, H]."""
    return torch.where(empty[:, None], old, new)


class StockLSTM(_Lengths, nn.LSTM):
    """``nn.LSTM`` with ``lengths=``."""


class StockGRU(_Lengths, nn.GRU):
    """``nn.GRU`` with ``lengths=``."""


class StockRNN(_Lengths, nn.RNN):
    """``nn.RNN`` with ``lengths=``."""


class _StockConvPool:
    """A stock convolution, then activation and pool of torch: the parameters have the same names."""

    def follow(self, ours):
        kinds = {"max": (nn.MaxPool1d, nn.MaxPool2d), "avg": (nn.AvgPool1d, nn.AvgPool2d)}.get(ours.pool)
        self.activation, self.pooling = ours.activation, nn.Identity()
        if kinds is not None:
            kind = kinds[len(ours.kernel_size) - 1]
            size, stride, padding = ours.pool_size, ours.pool_stride, ours.pool_padding
            self.pooling = kind(size, stride, padding, ceil_mode=ours.ceil_mode)
        return self

    def forward(self, input):
        return self.pooling(reference.ACTIVATIONS[self.activation](super().forward(input)))


class StockConvPool1d(_StockConvPool, nn.Conv1d):
    """``nn.Conv1d``, activation and pool."""


class StockConvPool2d(_StockConvPool, nn.Conv2d):
    """``nn.Conv2d``, activation and pool."""


_STOCK = {
    modules.LSTM: StockLSTM,
    modules.GRU: StockGRU,
    modules.RNN: StockRNN,
    modules.LSTMCell: nn.LSTMCell,
    modules.GRUCell: nn.GRUCell,
    modules.RNNCell: nn.RNNCell,
    modules.ConvPool1d: StockConvPool1d,
    modules.ConvPool2d: StockConvPool2d,
    # only fuse_ makes these
    ConvNormPool1d: nn.Conv1d,
    ConvNormPool2d: nn.Conv2d,
}


def our_recurrent(stock):
    """A stock recurrent layer or cell as ours, with the same parameters."""
    ours = share(stock, OURS[type(stock)](**recurrent_arguments(stock), device="meta"))
    ours.__dict__["stock"] = type(stock)
    return ours


def only_ours(module):
    """The options of this module of ours that no stock module has and whose results would be other ones."""
    names = ("zoneout", "recurrent_dropout", "layer_norm")
    return [name for name in names if getattr(module, name, False)]


def stock_of(module):
    """The stock module that computes what this module of ours does, with the same parameters, or None."""
    kind = _STOCK.get(type(module))
    if kind is None:
        return None
    kind = module.__dict__.get("stock", kind)  # what fuse_ found there
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        return share(module, kind(**recurrent_arguments(module), device="meta"))
    stock = kind(**convolution_arguments(module), device="meta")
    if isinstance(stock, _StockConvPool):
        stock.follow(module)
    return share(module, stock)
