"""RNN → CNN: a recurrent network over tokens, convolutions over its outputs."""

import torch
from torch import nn

from cnnrnn_ext._checks import check_tensor, integers, shape_of
from cnnrnn_ext._checks_rnn import check_lengths
from cnnrnn_ext.models._masks import check_tokens, lengths_of
from cnnrnn_ext.models._readout import make_heads
from cnnrnn_ext.models._recurrent import make_recurrent, width_of
from cnnrnn_ext.modules import ConvPool1d


class RNNCNN(nn.Module):
    """Tokens [N, T] → embedding → bidirectional RNN → convolutions of several widths over time → classes.

    The RNN puts each token into its context; each convolution looks for patterns of ``width`` neighbours
    there, and the largest answer over time is a feature::

        f[k] = max over t of ReLU(sum over d, u of W[k, d, u] y[d, t + u])

    (max-over-time pooling: Collobert et al. 2011, Kim 2014; RNN before CNN: Lai et al. 2015). The outputs y
    have width - 1 zeros at both ends, so a text may be shorter than a filter. The convolutions have no bias:
    a window of nothing but padding then answers 0, which is no larger than any other answer.

    Args:
        vocabulary_size: number of token ids.
        heads: the number of classes, or {"name": number}.
        embedding_size: of a token.
        hidden_size: of each direction of the RNN.
        rnn: "lstm", "gru", "rnn" (tanh) or "rnn_relu".
        num_layers: of the RNN.
        channels: patterns of each width.
        widths: of the convolutions, in tokens.
        padding_id: the id of padding. Its embedding stays 0.
        dropout: probability, behind the embedding, between the layers of the RNN and before the heads.
        embedding: None, or pretrained vectors [vocabulary_size, E], copied; E then stands for embedding_size.
        freeze_embedding: whether the embedding gets no gradient.

    Shape:
        tokens [N, T] int64 or int32; lengths None or [N] integers, 0 to T. None: a row ends behind its last
        token that is not padding. What stands behind a row's end is not read. Returns logits [N, classes], or
        a dict of these.

    Attributes: ``feature_size`` = channels * len(widths), of ``features``.

    Raises:
        ValueError: an unknown rnn; no heads; no widths.
        TypeError, RuntimeError: tokens, lengths or embedding of another type, dtype or shape, by name.
        IndexError: a token id outside the vocabulary.
    """

    def __init__(
        self,
        vocabulary_size,
        heads,
        embedding_size=64,
        hidden_size=64,
        *,
        rnn="lstm",
        num_layers=1,
        channels=64,
        widths=(3, 4, 5),
        padding_id=0,
        dropout=0.0,
        embedding=None,
        freeze_embedding=False,
    ):
        super().__init__()
        widths = tuple(widths)
        if not widths:
            raise ValueError("widths: expected at least one")
        integers("widths", widths, len(widths), 1)
        self.embedding = make_embedding(vocabulary_size, embedding_size, padding_id, embedding)
        self.embedding.weight.requires_grad_(not freeze_embedding)
        self.rnn = make_recurrent(rnn, self.embedding.embedding_dim, hidden_size, num_layers, True, dropout)
        # Pairs of windows are pooled in the convolution: the maximum over time reads half a map.
        self.convolutions = nn.ModuleList(
            ConvPool1d(width_of(self.rnn), channels, width, padding=width - 1, bias=False, ceil_mode=True)
            for width in widths
        )
        self.feature_size = channels * len(widths)
        self.dropout = nn.Dropout(dropout)
        self.heads = make_heads(self.feature_size, heads)

    def forward(self, tokens, lengths=None):
        return self.heads(self.dropout(self.features(tokens, lengths)))

    def features(self, tokens, lengths=None):
        """[N, feature_size], what the heads read."""
        check_tokens("tokens", tokens, self.embedding.num_embeddings)
        if lengths is None:
            lengths = lengths_of(tokens, self.embedding.padding_idx)
        else:
            check_lengths(lengths, tokens.shape[1], tokens.shape[0])
        if tokens.shape[1] == 0:
            return self.embedding.weight.new_zeros(tokens.shape[0], self.feature_size)
        x = self.dropout(self.embedding(tokens)).transpose(0, 1)
        y, _ = self.rnn(x, lengths=lengths)
        y = y.permute(1, 2, 0)
        return torch.cat([convolution(y).amax(-1) for convolution in self.convolutions], 1)


def make_embedding(vocabulary_size, embedding_size, padding_id, vectors=None):
    """An embedding whose padding is 0 and stays so; its weights from ``vectors`` [V, E] if given."""
    integers("vocabulary_size", vocabulary_size, 1, 1)
    integers("padding_id", padding_id, 1, 0)
    if padding_id >= vocabulary_size:
        raise ValueError(
            f"padding_id: expected an id below vocabulary_size {vocabulary_size}, got {padding_id}"
        )
    if vectors is not None:
        check_tensor("embedding", vectors)
        if vectors.dim() != 2 or len(vectors) != vocabulary_size:
            raise RuntimeError(f"embedding: expected [{vocabulary_size}, E], got shape {shape_of(vectors)}")
        embedding_size = vectors.shape[1]
    embedding = nn.Embedding(vocabulary_size, embedding_size, padding_idx=padding_id)
    if vectors is not None:
        with torch.no_grad():
            embedding.weight.copy_(vectors)
            embedding.weight[padding_id] = 0.0
    return embedding
