"""RNN encoder → RNN decoder with attention: one sequence of tokens into another."""

import torch
from torch import nn

from cnnrnn_ext._checks import integers
from cnnrnn_ext._checks_rnn import check_lengths
from cnnrnn_ext.models._beam import beam_search
from cnnrnn_ext.models._masks import check_tokens, lengths_of, masked_softmax, steps_within
from cnnrnn_ext.models._recurrent import join_directions, make_recurrent, width_of
from cnnrnn_ext.models.rnncnn import make_embedding


class Attention(nn.Module):
    """Which steps of a memory belong to a state, and both made one vector (Luong et al. 2015, "general").

    a = softmax over s of h · W_a m_s, and h~ = tanh(W_c [sum of a_s m_s; h]).

    Args:
        state, memory: features of h and of m.

    Shape: h [N, T, state]; keys [N, S, state], what ``keys(memory)`` makes of memory [N, S, memory]; mask
    [N, S] bool or None. Returns h~ [N, T, state] and a [N, T, S].
    """

    def __init__(self, state, memory):
        super().__init__()
        self.keys = nn.Linear(memory, state, bias=False)
        self.combine = nn.Linear(memory + state, state, bias=False)

    def forward(self, h, keys, memory, mask=None):
        mask = None if mask is None else mask[:, None]
        weights = masked_softmax(h @ keys.transpose(1, 2), mask, -1)
        return torch.tanh(self.combine(torch.cat((weights @ memory, h), -1))), weights


class Seq2Seq(nn.Module):
    """Source tokens [N, S] → RNN encoder → RNN decoder with attention → target tokens.

    The decoder reads the target so far; the attention stands behind it (Luong et al. 2015, without input
    feeding), so that in training the whole target is one call of the RNN.

    Args:
        source_vocabulary, target_vocabulary: number of ids of each.
        embedding_size: of a token.
        hidden_size: H, of the decoder and of each direction of the encoder.
        rnn: "lstm", "gru", "rnn" (tanh) or "rnn_relu", for both.
        num_layers: of both.
        bidirectional: the encoder. Its last states then begin the decoder's through a linear layer for each
            state (h through tanh, as it lies between -1 and 1; c as it is); else they are its first ones.
        dropout: probability, behind the embeddings, between the layers of an RNN and before the output.
        padding_id, begin_id, end_id: of both vocabularies.

    Shape:
        source [N, S], target [N, T] int64 or int32; source_lengths None or [N] integers, 0 to S. None: a row
        ends behind its last token that is not padding. What stands behind its end is not read.
        target begins with begin_id. Returns logits [N, T, target_vocabulary]: those at t are for the token
        that follows target[:, t]. So the loss is
        ``F.cross_entropy(logits[:, :-1].flatten(0, 1), target[:, 1:].flatten(), ignore_index=padding_id)``.

    Raises:
        ValueError: an unknown rnn, or ids that are not below both vocabularies.
        TypeError, RuntimeError, IndexError: tokens or lengths of another type or shape, or ids outside the
            vocabulary, by name.
    """

    def __init__(
        self,
        source_vocabulary,
        target_vocabulary,
        embedding_size=128,
        hidden_size=256,
        *,
        rnn="lstm",
        num_layers=1,
        bidirectional=True,
        dropout=0.0,
        padding_id=0,
        begin_id=1,
        end_id=2,
    ):
        super().__init__()
        for name, value in (("begin_id", begin_id), ("end_id", end_id)):
            integers(name, value, 1, 0)
            if value >= target_vocabulary:
                raise ValueError(f"{name}: expected an id below {target_vocabulary}, got {value}")
        if len({padding_id, begin_id, end_id}) != 3:
            raise ValueError("padding_id, begin_id, end_id: expected three different ids")
        self.padding_id, self.begin_id, self.end_id = padding_id, begin_id, end_id
        self.source_embedding = make_embedding(source_vocabulary, embedding_size, padding_id)
        self.target_embedding = make_embedding(target_vocabulary, embedding_size, padding_id)
        self.encoder = make_recurrent(rnn, embedding_size, hidden_size, num_layers, bidirectional, dropout)
        self.decoder = make_recurrent(rnn, embedding_size, hidden_size, num_layers, False, dropout)
        memory = width_of(self.encoder)
        states = 2 if rnn == "lstm" else 1
        self.bridges = nn.ModuleList(
            nn.Linear(memory, hidden_size) for _ in range(states if bidirectional else 0)
        )
        self.attend = Attention(hidden_size, memory)
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(hidden_size, target_vocabulary)

    def forward(self, source, target, source_lengths=None):
        return self.output(self.dropout(self._teach(source, target, source_lengths)[0]))

    def attention(self, source, target, source_lengths=None):
        """[N, T, S]: which source tokens each step of ``forward`` looks at; each row sums to 1."""
        return self._teach(source, target, source_lengths)[1]

    def _teach(self, source, target, source_lengths):
        check_tokens("target", target, self.target_embedding.num_embeddings)
        states, *memory = self._encode(source, source_lengths)
        hidden, _ = self.decoder(self.dropout(self.target_embedding(target)).transpose(0, 1), states)
        return self.attend(hidden.transpose(0, 1), *memory)

    def _encode(self, source, lengths):
        """(the decoder's first states, keys [N, S, H], memory [N, S, M], mask [N, S])."""
        check_tokens("source", source, self.source_embedding.num_embeddings)
        if lengths is None:
            lengths = lengths_of(source, self.padding_id)
        else:
            check_lengths(lengths, source.shape[1], source.shape[0])
            lengths = lengths.to(source.device)
        x = self.dropout(self.source_embedding(source)).transpose(0, 1)
        memory, states = self.encoder(x, lengths=lengths)
        memory = memory.transpose(0, 1).contiguous()
        mask = steps_within(lengths, source.shape[1]).t()
        return self._bridge(states), self.attend.keys(memory), memory, mask

    def _bridge(self, states):
        if not self.bridges:
            return states
        pair = isinstance(states, tuple)
        states = [
            bridge(join_directions(state, self.encoder))
            for bridge, state in zip(self.bridges, states if pair else (states,), strict=True)
        ]
        states[0] = torch.tanh(states[0])
        return tuple(states) if pair else states[0]

    @torch.no_grad()
    def generate(self, source, source_lengths=None, *, max_length, beam_size=1, length_penalty=1.0):
        """Translates: the best target of each row that a beam search finds (one hypothesis: greedy).

        Args:
            source, source_lengths: as in ``forward``.
            max_length: of the answer, the end token included.
            beam_size: hypotheses that go on side by side in each row.
            length_penalty: hypotheses are ranked by log-probability / length**length_penalty: 0 favours short
                ones, 1 is the mean log-probability of a token.

        Dropout is as the module's mode has it: call it in eval(). padding_id and begin_id are never chosen.

        Returns:
            ``Generated``: tokens [N, L] without begin_id, with end_id where it was reached, then padding_id;
            lengths [N] with end_id; scores [N] float64, the ranked ones; attention [N, L, S].

        Raises:
            RuntimeError: a max_length or beam_size that is not positive; as ``forward``.
        """
        integers("max_length", max_length, 1, 1)
        integers("beam_size", beam_size, 1, 1)
        states, keys, memory, mask = self._encode(source, source_lengths)
        pair = isinstance(states, tuple)

        def step(tokens, state):
            x = self.dropout(self.target_embedding(tokens.flatten()[None]))
            hidden, new = self.decoder(x, state if pair else state[0])
            # The hypotheses of a row are queries to one memory, as the steps of a target are in training.
            hidden, weights = self.attend(hidden.view(*tokens.shape, hidden.shape[-1]), keys, memory, mask)
            log_probabilities = self.output(self.dropout(hidden)).log_softmax(-1)
            log_probabilities[..., [self.padding_id, self.begin_id]] = -torch.inf
            return log_probabilities, weights, new if pair else (new,)

        return beam_search(
            step, states if pair else (states,), len(source), source.device,
            begin_id=self.begin_id, end_id=self.end_id, padding_id=self.padding_id,
            max_length=max_length, beam_size=beam_size, penalty=length_penalty,
        )  # fmt: skip
