"""The scalars that attribution explains and faithfulness compares: callables on logits, one a
row.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Callable, Mapping, Sequence

import torch

from cdelta.errors import CdeltaError
from cdelta.policy.pairs import PromptPairs

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor


MOST = 64
"""First tokens of a side. It must not cut off openings that the model does use: with 8, the
embedded model's "Crime: …" counted as nothing, and the log-odds of such prompts were up to 12 nats
too high."""
Metric = Callable[["Float[Tensor, 'row vocab']"], "Float[Tensor, 'row']"]


def refusal_log_odds(refuse_ids: Sequence[int], comply_ids: Sequence[int]) -> Metric:
    """Logsumexp of the refusal tokens' logits minus the compliance tokens', in nats, at the last
    token.

    Raises `CdeltaError` if a set is empty or a token is in both.
    """
    if not len(refuse_ids) or not len(comply_ids):
        raise CdeltaError(
            "refusal log-odds need at least one refusal token and one compliance token."
        )
    shared = sorted(set(refuse_ids) & set(comply_ids))
    if shared:
        raise CdeltaError(
            f"tokens {shared[:5]} are in both sets: "
            "a first token must tell refusal from compliance."
        )
    refuse, comply = list(refuse_ids), list(comply_ids)
    return lambda logits: logits[:, refuse].logsumexp(-1) - logits[:, comply].logsumexp(-1)


@dataclass(frozen=True)
class TokenSets:
    """First tokens of refusals and of compliances: token id -> share of that side's answers that
    start with it.
    """

    refuse: Mapping[int, float]
    comply: Mapping[int, float]

    def metric(self) -> Metric:
        """`refusal_log_odds` on these sets."""
        return refusal_log_odds(list(self.refuse), list(self.comply))


def first_token_sets(
    tok, answers: Sequence[str | Sequence[int]], outcomes: Sequence[str]
) -> TokenSets:
    """The tokens that start the model's own refusals and compliances, at most `MOST` a side.

    Args:
        answers: generated text, or (exact for any tokenizer) generated token ids.
        outcomes: "refuse" or "comply" per answer; rows with other outcomes are left out.

    A token stands on the side where its share is at least twice the other side's, and nowhere
    otherwise.

    Raises `CdeltaError` if a side ends up without tokens: then the answers differ later, and
    `SequenceMetric` is the metric.
    """
    shares, sets = [], []
    for side in ("refuse", "comply"):
        rows = [
            encode_answer(tok, answer)
            for answer, outcome in zip(answers, outcomes, strict=True)
            if outcome == side
        ]
        counts = Counter(row[0] for row in rows if row)
        shares.append({token: n / counts.total() for token, n in counts.most_common()})
    for name, own, other in zip(("refusals", "compliances"), shares, reversed(shares)):
        tokens = [token for token, share in own.items() if share >= 2 * other.get(token, 0.0)]
        if not tokens:
            raise CdeltaError(
                f"no first token tells {name} apart: label more answers, or use SequenceMetric."
            )
        sets.append({token: own[token] for token in tokens[:MOST]})
    return TokenSets(*sets)


def encode_answer(tok, answer: str | Sequence[int]) -> list[int]:
    """Token ids of an answer, without special tokens; ids stay as they are."""
    if isinstance(answer, str):
        return tok(answer, add_special_tokens=False)["input_ids"]
    return list(answer)


@dataclass(frozen=True)
class SequenceMetric:
    """log p(refusal | prompt) − log p(compliance | prompt), teacher-forced, in nats.

    Both answers are cut to the length of the shorter one and appended to the prompts by `extend`,
    so that every pair becomes two rows; `__call__` then takes the logits of the last `kept`
    positions.
    """

    refusal: tuple[int, ...]
    compliance: tuple[int, ...]

    def __post_init__(self) -> None:
        n = min(len(self.refusal), len(self.compliance))
        object.__setattr__(self, "refusal", tuple(self.refusal[:n]))
        object.__setattr__(self, "compliance", tuple(self.compliance[:n]))
        if self.refusal == self.compliance:
            raise CdeltaError(
                "the refusal and the compliance start with the same tokens: give longer or other "
                "answers."
            )

    @property
    def kept(self) -> int:
        """How many last positions' logits the metric needs."""
        return len(self.refusal) + 1

    def extend(self, pairs: PromptPairs) -> PromptPairs:
        """Each pair twice: followed by the refusal and by the compliance."""
        both = (self.refusal, self.compliance)
        clean, corrupted = (
            [row + answer for row in side for answer in both]
            for side in (pairs.clean, pairs.corrupted)
        )
        return PromptPairs.from_tokens(clean, corrupted, pairs.split)

    def __call__(
        self, logits: Float[Tensor, "row kept vocab"], ids: Int[Tensor, "row kept"]
    ) -> Float[Tensor, "row"]:
        """Signed log-probability of each row's own answer; a pair's two rows sum to the metric."""
        answers = ids[:, 1:]
        log_p = logits[:, :-1].log_softmax(-1).gather(-1, answers[..., None])[..., 0].sum(-1)
        refused = (answers == answers.new_tensor(self.refusal)).all(-1)
        return torch.where(refused, log_p, -log_p)


def kl_divergence(
    logits: Float[Tensor, "row vocab"], reference: Float[Tensor, "row vocab"]
) -> Float[Tensor, "row"]:
    """KL(reference ‖ logits) in nats: 0 where the distributions are equal."""
    log_q, log_p = logits.log_softmax(-1), reference.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


@dataclass(frozen=True)
class WithKL:
    """A metric, and how far the next token is from what a reference run predicts: Float[row, 2].

    Both in nats. The second value is `kl_divergence` from `reference`, the logits of that run; rows
    given several times over (`Batch.repeat`) are held against the same reference rows.
    """

    metric: Metric | SequenceMetric
    reference: Float[Tensor, "row vocab"]

    @property
    def kept(self) -> int:
        """How many last positions' logits are needed."""
        return getattr(self.metric, "kept", 1)

    def __call__(self, logits: Tensor, *ids: Tensor) -> Float[Tensor, "row 2"]:
        """Takes what the metric takes."""
        times = len(logits) // len(self.reference)
        kl = kl_divergence(after_prompt(logits), self.reference.repeat(times, 1))
        return torch.stack([self.metric(logits, *ids), kl], -1)


def after_prompt(logits: Tensor) -> Float[Tensor, "row vocab"]:
    """Logits at the last prompt token: the first kept position (an answer follows), or the only
    one.
    """
    return logits[:, 0] if logits.dim() == 3 else logits
