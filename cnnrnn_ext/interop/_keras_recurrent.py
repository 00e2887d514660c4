"""Keras' recurrent layers as modules of ours: gates in torch's order, both directions in one."""

import torch

from cnnrnn_ext.interop._keras_modules import MERGES, Recurrent, ResetBeforeGRU
from cnnrnn_ext.interop._keras_options import Options, set_
from cnnrnn_ext.modules import GRU, LSTM, RNN


def _gates(order):
    """Rows of torch's order from columns of Keras': [I, gates*H] -> [gates*H, I]."""

    def convert(kernel):
        parts = kernel.chunk(len(order), -1)
        return torch.cat([parts[index] for index in order], -1).t()

    return convert


# Keras' class -> (ours, the place of each of torch's gates in Keras' order, options that must be so)
RECURRENT = {
    "LSTM": (LSTM, (0, 1, 2, 3), {"activation": "tanh", "recurrent_activation": "sigmoid"}),
    "GRU": (GRU, (1, 0, 2), {"activation": "tanh", "recurrent_activation": "sigmoid"}),
    "SimpleRNN": (RNN, (0,), {}),
}


def recurrent(layer, options):
    rnn = _recurrent_of([(layer, options)])
    more = {"zeros": layer.zero_output_for_mask, "backwards": options["go_backwards"]}
    return [Recurrent(rnn, options["return_sequences"], dropout=options["dropout"], **more)]


def bidirectional(layer, options):
    merge = options["merge_mode"]
    if merge not in MERGES:
        raise options.error(f"merge_mode={merge!r} is not supported, only {', '.join(MERGES)}")
    pair = layer.forward_layer, layer.backward_layer
    for direction in pair:
        if type(direction).__name__ not in RECURRENT:
            raise options.error(f"a layer of {type(direction).__name__} is not supported")
    forward, backward = map(Options, pair)
    if not backward["go_backwards"]:
        raise backward.error("go_backwards=False is not supported in the backward layer")
    if type(pair[0]) is not type(pair[1]):
        raise options.error("the backward layer is of another class than the forward layer")
    for name in ("units", "use_bias", "return_sequences", "activation", "reset_after", "dropout",
                 "recurrent_dropout"):  # fmt: skip
        if forward.config.get(name) != backward.config.get(name):
            raise options.error(f"the backward layer differs from the forward layer in {name}")
    if forward["go_backwards"]:
        raise forward.error("go_backwards=True is not supported in the forward layer")
    rnn = _recurrent_of([(pair[0], forward), (pair[1], backward)])
    more = {"zeros": pair[0].zero_output_for_mask, "dropout": forward["dropout"]}
    return [Recurrent(rnn, forward["return_sequences"], merge, **more)]


def _recurrent_of(directions):
    """Our layer of one or two directions, from (Keras layer, options) of each."""
    layer, options = directions[0]
    ours, order, required = RECURRENT[type(layer).__name__]
    more = {"batch_first": True, "recurrent_dropout": options["recurrent_dropout"]}
    if ours is GRU and not options["reset_after"]:
        ours = ResetBeforeGRU
        del more["batch_first"]  # it always is
    if ours is RNN:
        if options["activation"] not in ("tanh", "relu"):
            raise options.error(f"activation={options['activation']!r} is not supported, only tanh, relu")
        more["nonlinearity"] = options["activation"]
    rnn, suffixes = None, ("", "_reverse")
    for index, (_, each) in enumerate(directions):
        each.require(**required, return_state=False, stateful=False)
        kernel, recurrent, *bias = each.weights(2 + each["use_bias"])
        if rnn is None:
            rnn = ours(
                kernel.shape[0], each["units"], bias=bool(bias), bidirectional=len(directions) == 2,
                dtype=kernel.dtype, **more,
            )  # fmt: skip
        rows = _gates(order)
        set_(getattr(rnn, f"weight_ih_l0{suffixes[index]}"), rows(kernel))
        set_(getattr(rnn, f"weight_hh_l0{suffixes[index]}"), rows(recurrent))
        if bias:
            # A GRU with reset_after has a bias on each side; the others one for both.
            both = bias[0] if bias[0].dim() == 2 else torch.stack((bias[0], torch.zeros_like(bias[0])))
            for name, row in zip(("bias_ih", "bias_hh"), both, strict=True):
                if hasattr(rnn, f"{name}_l0"):
                    set_(getattr(rnn, f"{name}_l0{suffixes[index]}"), rows(row[None]).squeeze(1))
    return rnn
