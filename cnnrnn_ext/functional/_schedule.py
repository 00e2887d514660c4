"""How the CUDA kernels run a layer, in words, for ``trace()``."""

import torch

SCHEDULES = (
    "a launch a step",
    "one block a tile",
    "clusters of {}",
    "groups of {} blocks",
)  # RnnSchedule's order


def describe_plan(operators, cell, x, batch, hidden_size, directions, train):
    """What ``operators.rnn_plan`` chooses, as in "forward: clusters of 4, tensor cores"."""

    def one(forward):
        schedule, blocks, tensor_cores = operators.rnn_plan(cell, x, batch, hidden_size, directions, forward)
        return SCHEDULES[schedule].format(blocks) + (", tensor cores" if tensor_cores else "")

    told = f"forward: {one(True)}"
    return f"{told}; backward: {one(False)}" if train else told


def schedule_note(cell, input, batch, hidden_size, directions, train):
    """The plan of a layer on a GPU, or None elsewhere."""
    if input.device.type != "cuda" or not hasattr(torch.ops.cnnrnn_ext, "rnn_plan"):
        return None
    return describe_plan(torch.ops.cnnrnn_ext, cell, input, batch, hidden_size, directions, train)
