"""Models to fuse."""

import pytest
import torch
from torch import nn

IMAGES = (3, 3, 33, 30)


def drawn(model, dtype=torch.float32):
    """The model with BatchNorms as training leaves them, scales of both signs among them."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            if module.affine:
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
            if module.running_mean is not None:
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
    return model.to(dtype)


class Attributes(nn.Module):
    """The way most people write it: modules as attributes, a forward that joins them."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.conv2 = nn.Conv2d(16, 24, 3, padding="same")
        self.act2 = nn.LeakyReLU()
        self.fc = nn.Linear(24, 5)

    def forward(self, x):
        x = self.pool(self.relu(self.bn1(self.conv1(x))))
        return self.fc(self.act2(self.conv2(x)).mean((2, 3)))


class Residual(nn.Module):
    """A block that calls one ReLU twice."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8, affine=False)
        self.relu = nn.ReLU()
        self.shortcut = nn.Conv2d(3, 8, 1)

    def forward(self, x):
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(y + self.shortcut(x))


class Recurrent(nn.Module):
    """A CNN, an LSTM, a GRU cell; the forward looks at values, so that it cannot be followed."""

    def __init__(self):
        super().__init__()
        self.cnn = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3), nn.Tanh()
        )
        self.lstm = nn.LSTM(8, 12, 2, batch_first=True, bidirectional=True, proj_size=6)
        self.cell = nn.GRUCell(12, 7)
        self.elman = nn.RNN(7, 5, nonlinearity="relu")

    def forward(self, x):
        if x.sum() > 1e30:
            raise ValueError("too bright")
        y, _ = self.lstm(self.cnn(x).flatten(2).mT)
        return self.elman(self.cell(y[:, -1])[None])[0]


def sequences():
    return nn.Sequential(
        nn.Conv1d(3, 8, 5, padding=2), nn.BatchNorm1d(8), nn.ReLU(), nn.AvgPool1d(2),
        nn.Conv1d(8, 8, 3, stride=2), nn.MaxPool1d(2), nn.ReLU(),
        nn.Conv1d(8, 4, 3, padding=1, padding_mode="reflect"), nn.Dropout(0.0), nn.ReLU(),
    )  # fmt: skip


def images():
    return nn.Sequential(
        nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.MaxPool2d(2),
        nn.Conv2d(12, 16, 3, groups=2), nn.BatchNorm2d(16, track_running_stats=False), nn.GELU(),
        nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16), nn.SiLU(), nn.AvgPool2d(2, ceil_mode=True),
    )  # fmt: skip


MODELS = {
    "attributes": (Attributes, IMAGES, ["conv1", "conv2"]),
    "residual": (Residual, IMAGES, ["conv1", "conv2"]),
    "recurrent": (Recurrent, IMAGES, ["cnn.0", "cnn.3", "lstm", "cell", "elman"]),
    "sequences": (sequences, (2, 3, 61), ["0", "4"]),
    "images": (images, IMAGES, ["0", "3", "6"]),
}
each_model = pytest.mark.parametrize("kind", list(MODELS))


def run(model, x):
    """(output, {name: gradient}) of a fixed random loss."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = model(x)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    (y * weights.cos()).sum().backward()
    return y.detach(), {"input": x.grad} | {name: p.grad for name, p in model.named_parameters()}
