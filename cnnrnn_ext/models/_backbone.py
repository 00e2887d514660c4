"""The CNN of a frame: presets built of ConvPool2d, or the user's own module."""

import itertools

import torch
from torch import nn

from cnnrnn_ext._checks import integers
from cnnrnn_ext.modules import ConvPool2d


def seed_stack(in_channels, frame_size, channels):
    """(3×3 convolution, ReLU, max-pool 2) for each of ``channels``, flattened."""
    blocks = [ConvPool2d(c_in, c_out, 3) for c_in, c_out in itertools.pairwise((in_channels, *channels))]
    pixels = _pixels(frame_size, channels, lambda size: (size - 2) // 2)
    return nn.Sequential(*blocks, nn.Flatten()), channels[-1] * pixels


def vgg_stack(in_channels, frame_size, channels):
    """As VGG-11 (Simonyan and Zisserman 2015): 3×3 convolutions of padding 1, one in each of the first two
    stages and two in the later ones, a max-pool of 2 at each stage's end; flattened."""
    layers = []
    for stage, (c_in, c_out) in enumerate(itertools.pairwise((in_channels, *channels))):
        if stage >= 2:
            layers.append(ConvPool2d(c_in, c_out, 3, padding=1, pool="none"))
            c_in = c_out
        layers.append(ConvPool2d(c_in, c_out, 3, padding=1))
    pixels = _pixels(frame_size, channels, lambda size: size // 2)
    return nn.Sequential(*layers, nn.Flatten()), channels[-1] * pixels


def resnet_stack(in_channels, frame_size, channels):
    """As a small ResNet (He et al. 2016): a 3×3 convolution with max-pool 2, then for each of ``channels``
    two residual blocks, all but the first of these stages halving the frame; features: means of pixels."""
    _pixels(frame_size, channels, lambda size: size // 2)
    layers = [ConvPool2d(in_channels, channels[0], 3, padding=1)]
    for stage, (c_in, c_out) in enumerate(itertools.pairwise((channels[0], *channels))):
        layers += [ResidualBlock(c_in, c_out, halve=stage > 0), ResidualBlock(c_out, c_out)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), channels[-1]


PRESETS = {"seed": seed_stack, "vgg": vgg_stack, "resnet": resnet_stack}


def _pixels(frame_size, channels, stage):
    """The pixels that are left of a frame after as many stages as there are ``channels``."""
    height, width = frame_size
    for _ in channels:
        height, width = stage(height), stage(width)
    if min(height, width) < 1:
        raise ValueError(
            f"frame_size: {tuple(frame_size)} is too small for {len(channels)} convolution blocks"
        )
    return height * width


class ResidualBlock(nn.Module):
    """ReLU(x + BN(conv(ReLU(BN(conv(x)))))), 3×3; the shortcut is a 1×1 convolution where channels or size
    differ.

    Args:
        halve: whether the first convolution and the shortcut end in a max-pool of 2.
    """

    def __init__(self, in_channels, out_channels, halve=False):
        super().__init__()
        options = {"bias": False, "activation": "none"}
        pool = "max" if halve else "none"
        self.conv1 = ConvPool2d(in_channels, out_channels, 3, padding=1, pool=pool, **options)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.conv2 = ConvPool2d(out_channels, out_channels, 3, padding=1, pool="none", **options)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Identity()
        if halve or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                ConvPool2d(in_channels, out_channels, 1, pool=pool, **options), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x):
        y = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


def make_backbone(cnn, in_channels, frame_size, channels, feature_size):
    """(module, features of a frame). cnn: the name of a preset, or a module [B, C, H, W] -> [B, ...]."""
    if isinstance(cnn, nn.Module):
        if feature_size is None:
            if frame_size is None:
                raise ValueError("frame_size: needed to find out the features of cnn; or give feature_size")
            feature_size = _features_of(cnn, (in_channels, *frame_size))
        return cnn, feature_size
    if cnn not in PRESETS:
        names = ", ".join(map(repr, PRESETS))
        raise ValueError(f"cnn: expected one of {names}, or a module, got {cnn!r}")
    if frame_size is None or feature_size is not None:
        raise ValueError(f"cnn: {cnn!r} takes frame_size, and finds feature_size by itself")
    channels = tuple(channels)
    if not channels:
        raise ValueError("channels: expected at least one convolution block")
    integers("channels", channels, len(channels), 1)
    return PRESETS[cnn](in_channels, frame_size, channels)


def _features_of(cnn, frame_shape):
    """How many features the module makes of a frame: tried, in eval mode, on a frame of zeros."""
    tensor = next(itertools.chain(cnn.parameters(), cnn.buffers()), torch.zeros(()))
    modes = {module: module.training for module in cnn.modules()}
    try:
        with torch.no_grad():
            y = cnn.eval()(torch.zeros(1, *frame_shape, device=tensor.device, dtype=tensor.dtype))
    finally:
        for module, training in modes.items():
            module.training = training
    if not isinstance(y, torch.Tensor) or y.dim() < 2 or y.shape[0] != 1:
        got = f"shape {list(y.shape)}" if isinstance(y, torch.Tensor) else type(y).__name__
        raise TypeError(f"cnn: expected a module that makes [B, ...] of [B, C, H, W], it made {got}")
    return y[0].numel()
