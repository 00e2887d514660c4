"""Beam search over a batch, for any decoder that goes one step at a time."""

from typing import NamedTuple

import torch


class Generated(NamedTuple):
    """What a search found, the best hypothesis of each row.

    tokens [N, L] int64, with the end token, then padding; lengths [N], with the end token; scores [N]:
    log-probability / length**length_penalty; attention [N, L, S], 0 behind a row's end. L: the largest one.
    """

    tokens: torch.Tensor
    lengths: torch.Tensor
    scores: torch.Tensor
    attention: torch.Tensor


def beam_search(step, state, rows, device, *, begin_id, end_id, padding_id, max_length, beam_size, penalty):
    """The best hypothesis of each row, by log-probability / length**penalty.

    In each row ``beam_size`` hypotheses go on side by side. At each step, all continuations of the unfinished
    ones compete with the finished ones, which keep their place as long as they are among the best. A row ends
    when none of its hypotheses can overtake its best finished one, or after ``max_length`` steps; a
    hypothesis that has no end token by then counts as it is. A beam of one is the greedy search.

    Args:
        step: (tokens [N, B], state) -> (log-probabilities [N, B, V], attention [N, B, S], state); state is a
            tuple of tensors [..., N * B, H], their rows' hypotheses side by side.
        state: the first one, of a single hypothesis a row: [..., N, H].
        rows, device: N, and where.

    Returns:
        :class:`Generated`.
    """
    tokens = torch.full((rows, 1), begin_id, device=device)
    scores = torch.zeros(rows, 1, dtype=torch.float64, device=device)  # sums of log-probabilities
    lengths = torch.zeros(rows, 1, dtype=torch.int64, device=device)
    finished = torch.zeros(rows, 1, dtype=torch.bool, device=device)
    history = []
    for position in range(max_length):
        log_probabilities, attention, state = step(tokens, state)
        vocabulary = log_probabilities.shape[-1]
        going = scores[..., None] + log_probabilities.double().masked_fill(finished[..., None], -torch.inf)
        # One more column, for a finished hypothesis to stay as it is.
        staying = scores.masked_fill(~finished, -torch.inf)
        candidates = torch.cat((going, staying[..., None]), -1)
        ranks = torch.cat(
            (going / (position + 1.0) ** penalty, _ranks(staying, lengths, penalty)[..., None]), -1
        )
        best = ranks.flatten(1).topk(min(beam_size, ranks[0].numel() if rows else 1), 1).indices
        parents, choice = best // (vocabulary + 1), best % (vocabulary + 1)
        stays = choice == vocabulary
        scores = candidates.flatten(1).gather(1, best)
        lengths = torch.where(stays, lengths.gather(1, parents), position + 1)
        tokens = torch.where(stays, padding_id, choice)
        finished = stays | (choice == end_id)
        history.append((parents, tokens, attention))
        if _settled(scores, lengths, finished, max_length, penalty).all():
            break
        if attention.shape[1] > 1 or parents.shape[1] > 1:
            flat = (torch.arange(rows, device=device)[:, None] * attention.shape[1] + parents).flatten()
            state = tuple(part.index_select(-2, flat) for part in state)
    return _best(history, _ranks(scores, lengths, penalty), lengths, padding_id)


def _ranks(scores, lengths, penalty):
    return scores / lengths.double().clamp(min=1) ** penalty


def _settled(scores, lengths, finished, max_length, penalty):
    """[N]: whether the best hypothesis of a row is finished, and nothing can overtake it.

    A log-probability only falls; what it is divided by grows with the length (or falls, for a penalty < 0).
    """
    ranks = _ranks(scores, lengths, penalty)
    most = torch.maximum(scores / max_length**penalty, ranks).masked_fill(finished, -torch.inf)
    return ranks.masked_fill(~finished, -torch.inf).amax(1) >= most.amax(1)


def _best(history, ranks, lengths, padding_id):
    """Follows each row's best hypothesis back to its beginning."""
    rows = torch.arange(len(ranks), device=ranks.device)
    slot = ranks.argmax(1)
    scores, lengths = ranks[rows, slot], lengths[rows, slot]
    tokens, attention = [], []
    for parents, chosen, weights in reversed(history):
        tokens.append(chosen[rows, slot])
        slot = parents[rows, slot]
        attention.append(weights[rows, slot])
    longest = int(lengths.max()) if len(lengths) else 0
    tokens = torch.stack(tokens[::-1], 1)[:, :longest]
    attention = torch.stack(attention[::-1], 1)[:, :longest]
    behind = torch.arange(longest, device=ranks.device) >= lengths[:, None]
    return Generated(
        tokens.masked_fill(behind, padding_id),
        lengths,
        scores,
        attention.masked_fill(behind[..., None], 0.0),
    )
