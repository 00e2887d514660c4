"""Each model of cnnrnn_ext once more, written with torch.nn alone, for one row without padding.

They hold parameters of the same names, so that ours load into them strictly and gradients compare by name.
Time is a Python loop where ours is one call, and nothing here knows masks or lengths.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import nn


def stock_rnn(ours):
    """The torch.nn layer of one of our recurrent layers' options."""
    more = {"nonlinearity": ours.nonlinearity} if ours.mode.startswith("RNN") else {}
    kind = getattr(nn, ours.mode.partition("_")[0])
    return kind(
        ours.input_size, ours.hidden_size, ours.num_layers, bidirectional=ours.bidirectional, **more
    ).double()


def twin(stock, ours):
    """``stock`` in float64 with ours' parameters and buffers."""
    stock = stock.double()
    stock.load_state_dict(ours.double().state_dict(), strict=True)
    return stock.train(ours.training)


class Heads(nn.ModuleDict):
    def forward(self, x):
        return {name: head(x) for name, head in self.items()}


def heads_of(ours):
    if isinstance(ours, nn.Linear):
        return nn.Linear(ours.in_features, ours.out_features)
    return Heads({name: nn.Linear(head.in_features, head.out_features) for name, head in ours.items()})


class Readout(nn.Module):
    def __init__(self, ours):
        super().__init__()
        self.kind = ours.kind
        if self.kind == "attention":
            size = ours.attention.project.in_features
            self.attention = nn.ModuleDict(
                {"project": nn.Linear(size, size), "score": nn.Linear(size, 1, bias=False)}
            )

    def forward(self, y, last):
        """y: [T, D]."""
        if self.kind in ("last", "steps"):
            return last if self.kind == "last" else y
        if self.kind == "mean":
            return y.mean(0)
        scores = [self.attention["score"](torch.tanh(self.attention["project"](step))) for step in y]
        weights = F.softmax(torch.cat(scores), 0)
        return sum(weight * step for weight, step in zip(weights, y, strict=True))


# ---- CNN → RNN ----


class Seed(nn.Sequential):
    """nn.Conv2d of each block; with ReLU and max-pool 2."""

    def __init__(self, widths):
        super().__init__(*(nn.Conv2d(a, b, 3) for a, b in itertools.pairwise(widths)), nn.Flatten())

    def forward(self, x):
        for conv in list(self)[:-1]:
            x = F.max_pool2d(F.relu(conv(x)), 2)
        return x.flatten(1)


class Vgg(nn.Sequential):
    def __init__(self, widths):
        convs, self.pooled = [], []
        for stage, (a, b) in enumerate(itertools.pairwise(widths)):
            if stage >= 2:
                convs.append(nn.Conv2d(a, b, 3, padding=1))
                self.pooled.append(False)
                a = b
            convs.append(nn.Conv2d(a, b, 3, padding=1))
            self.pooled.append(True)
        pooled = self.pooled
        super().__init__(*convs)
        self.pooled = pooled

    def forward(self, x):
        for conv, pooled in zip(self, self.pooled, strict=True):
            x = F.relu(conv(x))
            x = F.max_pool2d(x, 2) if pooled else x
        return x.flatten(1)


class Block(nn.Module):
    def __init__(self, a, b, halve):
        super().__init__()
        self.halve = halve
        self.conv1, self.norm1 = nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b)
        self.conv2, self.norm2 = nn.Conv2d(b, b, 3, padding=1, bias=False), nn.BatchNorm2d(b)
        if halve or a != b:
            self.shortcut = nn.Sequential(nn.Conv2d(a, b, 1, bias=False), nn.BatchNorm2d(b))

    def forward(self, x):
        def pool(t):
            return F.max_pool2d(t, 2) if self.halve else t

        y = self.norm2(self.conv2(F.relu(self.norm1(pool(self.conv1(x))))))
        if hasattr(self, "shortcut"):
            x = self.shortcut[1](pool(self.shortcut[0](x)))
        return F.relu(y + x)


class Resnet(nn.Sequential):
    def __init__(self, widths):
        channels = widths[1:]
        layers = [nn.Conv2d(widths[0], channels[0], 3, padding=1)]
        for stage, (a, b) in enumerate(itertools.pairwise((channels[0], *channels))):
            layers += [Block(a, b, stage > 0), Block(b, b, False)]
        super().__init__(*layers)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self[0](x)), 2)
        for block in list(self)[1:]:
            x = block(x)
        return x.mean((2, 3))


PRESETS = {"seed": Seed, "vgg": Vgg, "resnet": Resnet}


class CNNRNN(nn.Module):
    def __init__(self, ours, cnn, channels):
        super().__init__()
        self.cnn = PRESETS[cnn]((ours.frame_shape[0], *channels))
        self.rnn, self.readout, self.heads = stock_rnn(ours.rnn), Readout(ours.readout), heads_of(ours.heads)

    def forward(self, clip):
        """clip: [T, C, H, W]."""
        y, states = self.rnn(self.cnn(clip))
        h_n = states[0] if isinstance(states, tuple) else states
        last = torch.cat((h_n[-2], h_n[-1])) if self.rnn.bidirectional else h_n[-1]
        return self.heads(self.readout(y, last))


# ---- RNN → CNN ----


class RNNCNN(nn.Module):
    def __init__(self, ours):
        super().__init__()
        self.embedding = nn.Embedding(ours.embedding.num_embeddings, ours.embedding.embedding_dim)
        self.rnn, self.heads = stock_rnn(ours.rnn), heads_of(ours.heads)
        self.convolutions = nn.ModuleList(
            nn.Conv1d(c.in_channels, c.out_channels, c.kernel_size, bias=False) for c in ours.convolutions
        )

    def forward(self, tokens):
        """tokens: [T]."""
        y, _ = self.rnn(self.embedding(tokens))
        features = []
        for conv in self.convolutions:
            around = conv.kernel_size[0] - 1
            maps = F.relu(conv(F.pad(y.t(), (around, around))))
            features.append(maps.max(1).values)
        return self.heads(torch.cat(features))


# ---- CNN ∥ RNN ----


class ParallelCNNRNN(nn.Module):
    def __init__(self, ours):
        super().__init__()
        self.reduction, self.kind = ours.time_reduction, ours.fusion.kind
        self.cnn = nn.ModuleList(nn.Conv2d(c.in_channels, c.out_channels, 3, padding=1) for c in ours.cnn)
        self.pools = [c.pool_size for c in ours.cnn]
        self.rnn, self.readout, self.heads = stock_rnn(ours.rnn), Readout(ours.readout), heads_of(ours.heads)
        self.fusion = fusion_of(ours.fusion)

    def forward(self, spectrogram):
        """spectrogram: [T, F]."""
        x = spectrogram[None]
        for conv, pool in zip(self.cnn, self.pools, strict=True):
            x = F.max_pool2d(F.relu(conv(x)), pool)
        seen = x.transpose(0, 1).flatten(1)
        steps = len(spectrogram) // self.reduction
        stacked = [
            torch.cat(tuple(spectrogram[step * self.reduction : (step + 1) * self.reduction]))
            for step in range(steps)
        ]
        heard, _ = self.rnn(torch.stack(stacked))
        fused = torch.stack([fuse(self.fusion, self.kind, pair) for pair in zip(seen, heard, strict=True)])
        return self.heads(self.readout(fused, None))


def fusion_of(ours):
    """The parameters of a Fusion, under the same names."""
    parts = {}
    if ours.kind != "concatenate":
        parts["project"] = nn.ModuleList(nn.Linear(p.in_features, p.out_features) for p in ours.project)
    if ours.kind == "gated":
        parts["gate"] = nn.Linear(ours.gate.in_features, ours.gate.out_features)
    if ours.kind == "attention":
        size = ours.features
        parts["score"] = nn.Sequential(nn.Linear(size, size), nn.Tanh(), nn.Linear(size, 1, bias=False))
    return nn.ModuleDict(parts)


def fuse(parts, kind, vectors, present=None):
    """One row's vectors [D_i] made one, by the formulas of Fusion's docstring."""
    present = [True] * len(vectors) if present is None else present
    vectors = [v if here else torch.zeros_like(v) for v, here in zip(vectors, present, strict=True)]
    if kind == "concatenate":
        return torch.cat(vectors)
    projected = [torch.tanh(layer(v)) for layer, v in zip(parts["project"], vectors, strict=True)]
    if kind == "gated":
        gates = parts["gate"](torch.cat(vectors)).view(-1, len(vectors)).unbind(1)
    else:
        gates = [parts["score"](p) for p in projected]
    shares = [torch.exp(gate) * here for gate, here in zip(gates, present, strict=True)]
    return sum(share / sum(shares) * p for share, p in zip(shares, projected, strict=True))


# ---- RNN → RNN ----


class Seq2Seq(nn.Module):
    """The attention and the decoder one step at a time."""

    def __init__(self, ours):
        super().__init__()

        def linear(layer):
            return nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)

        def embedding(layer):
            return nn.Embedding(layer.num_embeddings, layer.embedding_dim)

        self.source_embedding = embedding(ours.source_embedding)
        self.target_embedding = embedding(ours.target_embedding)
        self.encoder, self.decoder = stock_rnn(ours.encoder), stock_rnn(ours.decoder)
        self.bridges = nn.ModuleList(map(linear, ours.bridges))
        self.attend = nn.Module()
        self.attend.keys, self.attend.combine = linear(ours.attend.keys), linear(ours.attend.combine)
        self.output = linear(ours.output)

    def forward(self, source, target):
        """source: [S], target: [T]. Returns (logits [T, V], attention [T, S])."""
        memory, states = self.encoder(self.source_embedding(source))
        pair = isinstance(states, tuple)
        states = list(states) if pair else [states]
        for index, bridge in enumerate(self.bridges):
            forward, backward = states[index][0::2], states[index][1::2]
            states[index] = bridge(torch.cat((forward, backward), -1))
            if index == 0:
                states[index] = torch.tanh(states[index])
        states, logits, maps = tuple(states) if pair else states[0], [], []
        for token in target:
            h, states = self.decoder(self.target_embedding(token)[None], states)
            h = h[0]
            scores = torch.stack([h @ self.attend.keys(m) for m in memory])
            weights = F.softmax(scores, 0)
            context = sum(weight * m for weight, m in zip(weights, memory, strict=True))
            logits.append(self.output(torch.tanh(self.attend.combine(torch.cat((context, h))))))
            maps.append(weights)
        return torch.stack(logits), torch.stack(maps)
