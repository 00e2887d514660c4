"""What it takes for a refusal of ours to be torch's own."""

import torch


def raised(function):
    try:
        function()
    except Exception as error:  # which type it is, is what the test asks
        return error
    return None


def check_refusal(ours, stock, words):
    expected = raised(stock)
    assert expected is not None, "torch itself accepts this"
    error = raised(ours)
    assert error is not None, f"accepted, where torch raises {type(expected).__name__}: {expected}"
    assert isinstance(error, type(expected)), f"{type(error).__name__}: {error}, torch: {expected!r}"
    assert any(word in str(error) for word in words), str(error)


X, W, B = torch.randn(2, 4, 8, 9), torch.randn(6, 4, 3, 3), torch.randn(6)
