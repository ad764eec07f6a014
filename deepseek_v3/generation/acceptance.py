"""Which drafts are right: exact match for greedy decoding, rejection sampling for sampling.

Rejection sampling accepts a draft d of distribution q with probability min(1, p(d) / q(d)) under the main model's
distribution p, and draws from max(p - q, 0), normalised, where it rejects: the result is distributed as p.

Letters: B rows, K drafts a row, V vocabulary.
"""

import torch


def choose(scores: torch.Tensor, sample: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Tokens [n] from processed scores [n, V], and the distribution [n, V] they were drawn from (None if greedy)."""
    if not sample:
        return scores.argmax(dim=-1), None
    distribution = torch.softmax(scores, dim=-1, dtype=torch.float32)
    return draw(distribution), distribution


def draw(distribution: torch.Tensor) -> torch.Tensor:
    """One token [n] of each row of [n, V] weights, which need not add up to 1; made of launches alone.

    The smallest of exponential variables of rates w is the i-th with probability w_i / sum(w): what
    `torch.multinomial` does for one draw after it has read from the device whether the weights are valid.
    """
    return (distribution / torch.empty_like(distribution).exponential_()).argmax(dim=-1)


def accept(
    scores: torch.Tensor, drafts: torch.Tensor, drawn_from: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Verify all drafts of all rows at once.

    Args:
        scores: [B, K + 1, V] processed scores of the main model, position j following draft j.
        drafts: [B, K].
        drawn_from: [B, K, V] the drafts' distributions; None for greedy decoding.

    Returns:
        How many drafts each row accepts, [B], and the token that follows them, [B].
    """
    count = drafts.shape[1]
    if drawn_from is None:
        choices = scores.argmax(dim=-1)  # [B, K + 1]
        accepted = (choices[:, :count] == drafts).long().cumprod(dim=1).sum(dim=1)
        return accepted, choices.gather(1, accepted[:, None])[:, 0]
    target = torch.softmax(scores, dim=-1, dtype=torch.float32)
    p = target[:, :count].gather(2, drafts[..., None])[..., 0]
    q = drawn_from.gather(2, drafts[..., None])[..., 0]
    # u < p / q, written so that a draft of probability zero under p is never accepted
    kept = torch.rand_like(p) * q < p
    accepted = kept.long().cumprod(dim=1).sum(dim=1)
    rows = torch.arange(len(drafts), device=drafts.device)
    follows = target[rows, accepted]
    drawn = torch.cat((drawn_from, torch.zeros_like(follows)[:, None]), dim=1)[rows, accepted]
    return accepted, draw(_residual(follows, drawn))


def accept_one(scores: torch.Tensor, draft: int, drawn_from: torch.Tensor | None) -> tuple[bool, int]:
    """Verify one draft of one row against processed scores [V]; where it is rejected, what replaces it."""
    if drawn_from is None:
        choice = int(scores.argmax())
        return choice == draft, choice
    target = torch.softmax(scores, dim=-1, dtype=torch.float32)
    if torch.rand((), device=scores.device) * drawn_from[draft] < target[draft]:
        return True, draft
    return False, int(draw(_residual(target[None], drawn_from[None])))


def _residual(target: torch.Tensor, drawn_from: torch.Tensor) -> torch.Tensor:
    rest = (target - drawn_from).clamp(min=0)
    total = rest.sum(dim=-1, keepdim=True)
    # p and q equal to rounding: a rejection is then itself rounding, and p is what is left to draw from
    return torch.where(total > 0, rest / total.clamp(min=torch.finfo(rest.dtype).tiny), target)
