"""Recurrent sequence modules: parameters and state handling of torch.nn, one functional call."""

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from cnnrnn_ext._backend import plain
from cnnrnn_ext._checks import check_tensor, shape_of
from cnnrnn_ext._checks_rnn import check_rates
from cnnrnn_ext.functional._rnn import run_sequence
from cnnrnn_ext.modules._streaming import ShortCall, plan_of, stream_sequence
from cnnrnn_ext.modules._weight_dtype import WeightDtype, check_weight_dtype
from cnnrnn_ext.reference._rnn import Options


class _Recurrent(ShortCall, WeightDtype, nn.RNNBase):
    """What the three sequence modules share; each gives its mode and the names of its states.

    nn.LSTM and its neighbours cannot be subclassed: torch.compile breaks its graph there.
    """

    _state_names = ("hx",)

    def __init__(
        self,
        mode,
        *args,
        zoneout=0.0,
        recurrent_dropout=0.0,
        weight_dtype=None,
        recompute_gates=False,
        **kwargs,
    ):
        name = type(self).__name__
        if "proj_size" in kwargs and mode != "LSTM":
            raise ValueError(f"proj_size argument is only supported for LSTM, not {name}")
        check_rates(mode.lower(), zoneout, recurrent_dropout)
        check_weight_dtype(weight_dtype)
        super().__init__(mode, *args, **kwargs)
        if self.proj_size and mode != "LSTM":  # given by position
            raise ValueError(f"proj_size argument is only supported for LSTM, not {name}")
        self.zoneout, self.recurrent_dropout = zoneout, recurrent_dropout
        self.recompute_gates = recompute_gates
        self._init_weight_dtype(weight_dtype, directions=2 if self.bidirectional else 1)

    # ---- parameters: read by name at each call, so that none is ever stale ----

    def flatten_parameters(self):
        """Does nothing: these kernels read the parameters where they are."""

    def _init_flat_weights(self):
        # nn.RNNBase keeps a second list of the parameters, for cuDNN. It could only grow old.
        self._flat_weights, self._flat_weight_refs = [], []

    def _update_flat_weights(self):
        pass

    def __setattr__(self, name, value):
        nn.Module.__setattr__(self, name, value)
        self.__dict__["_plan"] = None

    def __setstate__(self, state):
        super().__setstate__(state)
        self.__dict__["_plan"] = None

    def _weights(self):
        return [getattr(self, name) for name in self._flat_weights_names]

    def _matrix_names(self):
        return [name for name in self._flat_weights_names if name.startswith(("weight_ih", "weight_hh"))]

    # ---- states: a tuple of one or two here, and as torch has them outside ----

    def _expected_sizes(self, input, batch_sizes):
        rows, batch, width = self.get_expected_hidden_size(input, batch_sizes)
        return ((rows, batch, width), (rows, batch, self.hidden_size))[: len(self._state_names)]

    def check_input(self, input, batch_sizes):
        weight = getattr(self, self._flat_weights_names[0])
        if input.dtype != weight.dtype and not torch._C._is_any_autocast_enabled():
            raise ValueError(
                f"RNN input dtype ({input.dtype}) does not match weight dtype ({weight.dtype}). "
                f"Convert input: input.to({weight.dtype}), or convert model: model.to({input.dtype})"
            )
        rank = 2 if batch_sizes is not None else 3
        if input.dim() != rank:
            raise RuntimeError(f"input must have {rank} dimensions, got {input.dim()}")
        if self.input_size != input.size(-1):
            raise RuntimeError(
                "input.size(-1) must be equal to input_size. "
                f"Expected {self.input_size}, got {input.size(-1)}"
            )

    def check_forward_args(self, input, hidden, batch_sizes):
        self.check_input(input, batch_sizes)
        sizes = self._expected_sizes(input, batch_sizes)
        for name, state, size in zip(self._state_names, hidden or (), sizes, strict=False):
            self.check_hidden_size(state, size, name + ": expected size {}, got {}")

    def permute_hidden(self, hx, permutation):
        if hx is None or permutation is None:
            return hx
        return tuple(state.index_select(1, permutation) for state in hx)

    def _check_rank(self, states, rank):
        names = self._state_names
        if len(states) != len(names):
            raise RuntimeError(f"hx: expected two states (h_0, c_0), got {len(states)}")
        for name, state in zip(names, states, strict=True):
            check_tensor(name, state)
        if any(state.dim() != rank for state in states):
            kind = "batched 3-D" if rank == 3 else "unbatched 2-D"
            ranks = ", ".join(f"{state.dim()}-D" for state in states)
            raise RuntimeError(
                f"For {kind} input, {' and '.join(names)} should also be {rank}-D but got ({ranks}) tensors"
            )

    # ---- the call ----

    def forward(self, input, hx=None, *, lengths=None, reset=None, return_all=False):
        if plain(input, 3) and lengths is None and reset is None and not return_all:
            if self._plan is None:
                self.__dict__["_plan"] = plan_of(self)
            result = stream_sequence(self._plan, self, input, hx) if self._plan else None
            if result is not None:
                return result
        states = hx if hx is None or len(self._state_names) == 2 else (hx,)
        if isinstance(input, PackedSequence):
            return self._forward_packed(input, states, lengths, reset, return_all)
        if input.dim() not in (2, 3):
            raise ValueError(
                f"{type(self).__name__}: Expected input to be 2D or 3D, got {input.dim()}D instead"
            )
        if states is not None:
            self._check_rank(states, input.dim())
        if input.dim() == 3:
            return self._run(input, states, lengths=lengths, reset=reset, return_all=return_all)
        return self._forward_unbatched(input, states, lengths, reset, return_all)

    def _forward_unbatched(self, input, states, lengths, reset, return_all):
        batch_dim = 0 if self.batch_first else 1
        for name, value in (("lengths", lengths), ("reset", reset)):
            if value is not None:
                check_tensor(name, value)
        output, states, *everything = self._run(
            input.unsqueeze(batch_dim),
            None if states is None else tuple(state.unsqueeze(1) for state in states),
            lengths=None if lengths is None else lengths.unsqueeze(0),
            reset=None if reset is None else reset.unsqueeze(batch_dim),
            return_all=return_all,
        )
        everything = (_each(part, torch.squeeze, batch_dim + 1) for part in everything)
        return output.squeeze(batch_dim), _each(states, torch.squeeze, 1), *everything

    def _forward_packed(self, input, states, lengths, reset, return_all):
        data, batch_sizes, sorted_indices, unsorted_indices = input
        if lengths is not None:
            raise RuntimeError("lengths: a PackedSequence has its own, expected None")
        if reset is not None:
            reset = self._pack_reset(reset, input)
        if states is not None:
            self._check_rank(states, 3)
        output, states, *everything = self._run(
            data, self.permute_hidden(states, sorted_indices), batch_sizes, reset=reset, return_all=return_all
        )

        def packed(tensor):
            return PackedSequence(tensor, batch_sizes, sorted_indices, unsorted_indices)

        def padded(sequences):  # [num_layers, R, H] -> [num_layers, T, N, H], rows in the caller's order
            rows, _ = pad_packed_sequence(packed(sequences.transpose(0, 1)), self.batch_first)
            return rows.movedim(2, 0)

        if unsorted_indices is not None:
            states = _each(states, torch.index_select, 1, unsorted_indices)
        return packed(output), states, *(_each(part, padded) for part in everything)

    def _pack_reset(self, reset, input):
        """[T, N] in the caller's order of rows -> [R] as input is packed."""
        check_tensor("reset", reset)
        sizes = input.batch_sizes
        steps, batch = len(sizes), int(sizes[0])
        expected = [batch, steps] if self.batch_first else [steps, batch]
        if shape_of(reset) != expected:
            raise RuntimeError(f"reset: expected shape {expected}, got {shape_of(reset)}")
        reset = reset.t() if self.batch_first else reset
        if input.sorted_indices is not None:
            reset = reset.index_select(1, input.sorted_indices)
        present = torch.arange(batch) < sizes[:, None]
        return reset[present.to(reset.device)]

    def _run(self, input, states, batch_sizes=None, *, lengths=None, reset=None, return_all=False):
        self.check_forward_args(input, states, batch_sizes)
        options = Options(
            has_biases=self.bias,
            num_layers=self.num_layers,
            dropout=self.dropout,
            training=self.training,
            bidirectional=self.bidirectional,
            batch_first=self.batch_first,
            proj_size=self.proj_size,
            batch_sizes=batch_sizes,
            lengths=lengths,
            reset=reset,
            return_all=return_all,
            zoneout=self.zoneout,
            recurrent_dropout=self.recurrent_dropout,
            layer_norm=self._norms(),
            recompute_gates=self.recompute_gates,
        )
        op = self.mode.split("_")[0].lower()
        return run_sequence(op, self.mode.lower(), input, states, self._weights(), options, self._narrow)

    def _norms(self):
        """The flat list of the layer normalisations' parameters, or None."""

    def extra_repr(self):
        names = "zoneout", "recurrent_dropout", "recompute_gates"
        options = [(name, getattr(self, name)) for name in names]
        return super().extra_repr() + "".join(f", {name}={value}" for name, value in options if value)


def _each(tensors, function, *arguments):
    """``function`` of a tensor, or of each of a pair."""
    if isinstance(tensors, torch.Tensor):
        return function(tensors, *arguments)
    return tuple(function(t, *arguments) for t in tensors)


class LSTM(_Recurrent):
    """A stack of LSTM layers. Equivalent to ``nn.LSTM`` with the same arguments.

    Parameters, their names, shapes, order and initial values are ``nn.LSTM``'s, so state dicts load both
    ways. The formula stands at ``functional.lstm``.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size, device,
        dtype: as in ``nn.LSTM``.
        zoneout: probability with which a unit of h and c keeps its old value, or a pair (of h, of c).
        recurrent_dropout: probability of a unit of h_{t-1} to be zeroed where it meets weight_hh, one mask
            for the whole sequence.
        layer_norm: whether to normalise weight_ih x, weight_hh h, and c before its tanh. It adds
            parameters: ln_ih_weight_l0, ln_ih_bias_l0, ln_hh_weight_l0, ln_hh_bias_l0 [4*H],
            ln_c_weight_l0, ln_c_bias_l0 [H], and so on for _l0_reverse and each layer; weights of 1, biases
            of 0 at first, and no such biases without ``bias``.
        The last three run on plain PyTorch; their formulas and sources stand at ``functional.lstm``.
        weight_dtype: None, torch.bfloat16 or torch.int8, for inference: where nothing needs a gradient (under
            no_grad or inference_mode, or with frozen parameters), weight_ih and weight_hh are read from
            copies of that dtype; all else stays as it is. A call that needs a gradient, or runs in forward
            mode or in a transform of torch.func, uses the parameters. int8 is symmetric, with a scale
            max|row| / 127 for each row; beside it the CPU kernels round a row of x or h to whole multiples of
            max|row| / 32767 (for at most 32 rows a step), which adds about 1 % of the error that such weights
            make. ``weight_error()`` tells the error of the copies. They follow the parameters; only an edit
            in place through ``.data`` needs ``refresh_weights()``. A graph of torch.compile makes them at
            each call. What runs on plain PyTorch (with these copies, so does float64 and every GPU) computes
            with them too.
        recompute_gates: whether training keeps h and c of every step alone and computes the gates again in
            the backward, as told at ``functional.lstm``.

    On a GPU the recurrent products of float32 are rounded to TF32 where torch's own switch for those of
    nn.LSTM allows it, which it does unless changed: ``torch.backends.cudnn.rnn.fp32_precision``, or the older
    ``torch.backends.cudnn.allow_tf32``. Products with the input follow ``torch.backends.cuda.matmul``.

    Shape (D = 2 if bidirectional, P = proj_size or H):
        input: [T, N, I]; [N, T, I] if batch_first; [T, I] unbatched; or a PackedSequence.
        hx: None for zeros, or (h_0 [num_layers*D, N, P], c_0 [num_layers*D, N, H]).
        lengths: None, or [N] integers, 0 to T: where each row ends; not beside a PackedSequence.
        reset: None, or [T, N] bool ([N, T] if batch_first), for a PackedSequence too, whose rows it lists
            in the caller's order: no state crosses from step t - 1 to t where reset[t] is set.
        Returns output [T, N, D*P] (in input's form) and (h_n, c_n) shaped as hx; and with return_all=True
        (h_all [num_layers, T, N, D*P], c_all [num_layers, T, N, D*H]), [num_layers, N, T, ...] if
        batch_first, padded with 0 where input is a PackedSequence.

    Raises:
        As ``nn.LSTM``: TypeError or ValueError for its arguments (ValueError for another weight_dtype),
        ValueError for an input that is neither 2-D nor 3-D, RuntimeError for sizes, dtypes or devices that
        do not fit.
    """

    _state_names = ("h_0", "c_0")

    def __init__(self, *args, layer_norm=False, **kwargs):
        super().__init__("LSTM", *args, **kwargs)
        if not isinstance(layer_norm, bool):
            raise TypeError(f"layer_norm should be of type bool, got: {type(layer_norm).__name__}")
        self.layer_norm = layer_norm
        self._norm_names = []
        if layer_norm:
            self._add_norms()

    def _add_norms(self):
        for names in self._all_weights:
            w_ih = getattr(self, names[0])
            suffix = names[0].removeprefix("weight_ih")
            widths = {"ln_ih": len(w_ih), "ln_hh": len(w_ih), "ln_c": self.hidden_size}
            for kind, width in widths.items():
                for what, fill in (("weight", 1.0), ("bias", 0.0))[: 1 + self.bias]:
                    name = f"{kind}_{what}{suffix}"
                    self.register_parameter(name, nn.Parameter(w_ih.new_full((width,), fill)))
                    self._norm_names.append(name)

    def reset_parameters(self):
        super().reset_parameters()
        for name, parameter in self.named_parameters():
            if name.startswith("ln_"):
                nn.init.constant_(parameter, 1.0 if "_weight_" in name else 0.0)

    def get_expected_cell_size(self, input, batch_sizes):
        return self._expected_sizes(input, batch_sizes)[1]

    def _norms(self):
        return [getattr(self, name) for name in self._norm_names] if self.layer_norm else None

    def extra_repr(self):
        return super().extra_repr() + (", layer_norm=True" if self.layer_norm else "")


class GRU(_Recurrent):
    """A stack of GRU layers. Equivalent to ``nn.GRU`` with the same arguments.

    Parameters, their names, shapes, order and initial values are ``nn.GRU``'s, so state dicts load both ways.
    The formula stands at ``functional.gru``.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device, dtype: as in
        ``nn.GRU``.
        zoneout, recurrent_dropout, weight_dtype, recompute_gates: as in :class:`LSTM`; zoneout is one number.

    Shape (D = 2 if bidirectional):
        input, lengths, reset: as in :class:`LSTM`.
        hx: None for zeros, or h_0 [num_layers*D, N, H].
        Returns output [T, N, D*H] (in input's form) and h_n shaped as h_0; and with return_all=True h_all
        [num_layers, T, N, D*H], laid out as in :class:`LSTM`.

    Raises:
        As ``nn.GRU``, see :class:`LSTM`.
    """

    def __init__(self, *args, **kwargs):
        super().__init__("GRU", *args, **kwargs)


class RNN(_Recurrent):
    """A stack of Elman layers. Equivalent to ``nn.RNN`` with the same arguments.

    Parameters, their names, shapes, order and initial values are ``nn.RNN``'s, so state dicts load both ways.
    The formula stands at ``functional.rnn``.

    Args:
        input_size, hidden_size, num_layers, nonlinearity, bias, batch_first, dropout, bidirectional, device,
        dtype: as in ``nn.RNN``, in its order.
        zoneout, recurrent_dropout, weight_dtype, recompute_gates: as in :class:`LSTM`; zoneout is one number.

    Shape:
        As in :class:`GRU`.

    Raises:
        As ``nn.RNN``, see :class:`LSTM`; ValueError for a nonlinearity other than "tanh" and "relu".
    """

    def __init__(self, *args, **kwargs):
        if len(args) > 3:
            nonlinearity, args = args[3], args[:3] + args[4:]
        else:
            nonlinearity = kwargs.pop("nonlinearity", "tanh")
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")
        super().__init__(f"RNN_{nonlinearity.upper()}", *args, **kwargs)
        self.nonlinearity = nonlinearity
