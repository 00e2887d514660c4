"""Where padded rows end, and what that leaves out."""

import torch

from cnnrnn_ext._checks import shape_of


def steps_within(lengths, steps):
    """[T, N] bool: whether step t of row n lies before its end. lengths: [N]; steps: T."""
    return torch.arange(steps, device=lengths.device)[:, None] < lengths


def masked_softmax(scores, mask, dim):
    """The softmax over ``dim`` of the scores where ``mask`` is set (broadcast; None: everywhere), else 0.

    A row without any such place is all 0, and so is its gradient: never NaN.
    """
    if mask is None:
        return scores.softmax(dim)
    weights = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(dim)
    return weights.masked_fill(~mask, 0.0)


def check_tokens(name, tokens, vocabulary_size):
    """[N, T] integers below vocabulary_size, or torch's exception that names them."""
    if not isinstance(tokens, torch.Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(tokens).__name__}")
    if tokens.dtype not in (torch.int64, torch.int32) or tokens.dim() != 2:
        raise RuntimeError(
            f"{name}: expected [N, T] int64 or int32, got {tokens.dtype} of shape {shape_of(tokens)}"
        )
    if torch.compiler.is_compiling() or tokens.is_meta or tokens.numel() == 0:
        return
    least, largest = tokens.aminmax()
    if least < 0 or largest >= vocabulary_size:
        raise IndexError(f"{name}: expected ids from 0 to {vocabulary_size - 1}, got {least} to {largest}")


def lengths_of(tokens, padding_id):
    """[N]: the place behind each row's last token that is not padding. tokens: [N, T]."""
    places = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
    ends = torch.where(tokens != padding_id, places, 0)
    return ends.amax(1) if tokens.shape[1] else ends.sum(1)
