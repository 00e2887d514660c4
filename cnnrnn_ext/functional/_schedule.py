"""How the CUDA kernels run a layer, in words, for ``trace()``."""

import torch

SCHEDULES = (
    "a launch a step",
    "one block a tile",
    "clusters of {}",
    "groups of {} blocks",
)  # RnnSchedule's order


PRODUCTS = (  # RnnProducts' order
    "",
    ", tensor cores",
    ", tensor cores, TF32",
    ", tensor cores, three TF32 products each",
)


def tf32_allowed(x):
    """Whether the recurrent products of this input may be rounded to TF32, by torch's own switch for them.

    ``torch.backends.cudnn.rnn.fp32_precision``, which ``torch.backends.cudnn.allow_tf32`` sets too, is "tf32"
    unless somebody changes it: nn.LSTM on a GPU runs so.
    """
    if x.device.type != "cuda" or x.dtype != torch.float32:
        return False
    if hasattr(torch.backends.cudnn, "rnn"):
        return torch.backends.cudnn.rnn.fp32_precision == "tf32"
    return torch.backends.cudnn.allow_tf32


def describe_plan(operators, cell, x, batch, hidden_size, directions, train, tf32=False):
    """What ``operators.rnn_plan`` chooses, as in "forward: clusters of 4, tensor cores"."""

    def one(forward):
        schedule, blocks, products = operators.rnn_plan(
            cell, x, batch, hidden_size, directions, tf32, forward
        )
        return SCHEDULES[schedule].format(blocks) + PRODUCTS[products]

    told = f"forward: {one(True)}"
    return f"{told}; backward: {one(False)}" if train else told


def schedule_note(cell, input, batch, hidden_size, directions, train):
    """The plan of a layer on a GPU, or None elsewhere."""
    if input.device.type != "cuda" or not hasattr(torch.ops.cnnrnn_ext, "rnn_plan"):
        return None
    return describe_plan(
        torch.ops.cnnrnn_ext, cell, input, batch, hidden_size, directions, train, tf32_allowed(input)
    )
