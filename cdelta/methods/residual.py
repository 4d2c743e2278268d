"""The residual stream after every block, and directions in it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch

from cdelta.attribution.metrics import encode_answer
from cdelta.errors import CdeltaError, refuse_test
from cdelta.models.chat import by_length, chat_ids, left_pad, pad_id, positions, rope_boundary
from cdelta.models.hooks import after, hooked
from cdelta.models.spec import ModelSpec

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@torch.no_grad()
def read_residual(
    model,
    tok,
    prompts: Sequence[str],
    answers: Sequence[str | Sequence[int]] | None = None,
    pool: str = "last",
    batch_size: int = 64,
) -> Float[Tensor, "row layer d_model"]:
    """The residual stream after every block, one vector per row, in fp32 on the CPU. Padding never
    counts.

    Args:
        prompts: strings, or `SplitRows` of records (test rows are refused).
        answers: texts or token ids that follow the prompts; then only their tokens are read, else
            only the prompts'.
        pool: ``last`` reads the last token, ``mean`` averages over the tokens.
    """
    if pool not in ("last", "mean"):
        raise CdeltaError(f"unknown pool {pool!r}: use last or mean.")
    refuse_test(prompts, "fitting a steering vector")
    heads = [chat_ids(tok, prompt) for prompt in getattr(prompts, "prompts", prompts)]
    tails = heads if answers is None else [encode_answer(tok, answer) for answer in answers]
    if not all(len(tail) for tail in tails):
        raise CdeltaError(
            "an answer without tokens has no activations to read: leave empty answers out."
        )
    whole = heads if answers is None else [h + t for h, t in zip(heads, tails, strict=True)]
    sizes = [len(tail) if pool == "mean" else 1 for tail in tails]
    found: list = [None] * len(whole)
    for rows in by_length([len(ids) for ids in whole], batch_size, rope_boundary(model)):
        ids, mask = left_pad([whole[row] for row in rows], pad_id(model, tok), model.device)
        for row, vectors in zip(
            rows, _pooled(model, ids, mask, [sizes[row] for row in rows]), strict=True
        ):
            found[row] = vectors
    return torch.stack(found)


def _pooled(model, ids: Tensor, mask: Tensor, sizes: Sequence[int]) -> Tensor:
    """Mean over each row's last `sizes` tokens after every block, [row layer d_model]."""
    share = torch.zeros(mask.shape, device=mask.device)
    for row, size in enumerate(sizes):
        share[row, -size:] = 1 / size
    seen: list[Tensor] = []

    def read(hidden: Tensor) -> None:
        pooled = torch.einsum("rp,rpd->rd", share.to(hidden.device), hidden.float())
        seen.append(pooled.cpu())

    blocks = ModelSpec.from_model(model).blocks(model)
    with hooked(*(after(block.module, read) for block in blocks)):
        model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions(mask),
            logits_to_keep=1,
            use_cache=False,
        )
    return torch.stack(seen, dim=1)


# ---------------------------------------------------------------------- directions


def mean_difference(
    positive: Float[Tensor, "row *rest"], negative: Float[Tensor, "row *rest"]
) -> Float[Tensor, "*rest"]:
    """Mean of the positive rows minus mean of the negative rows."""
    return positive.mean(0) - negative.mean(0)


def principal_direction(differences: Float[Tensor, "row d_model"]) -> Float[Tensor, "d_model"]:
    """First principal axis of pairwise differences (uncentred, as CAST), scaled to their mean
    projection on it: strength 1 moves as far as the pairs lie apart.
    """
    axis = _first_axis(differences)
    return ((differences.double() @ axis).mean() * axis).float()


def centred_direction(
    positive: Float[Tensor, "row d_model"], negative: Float[Tensor, "row d_model"]
) -> Float[Tensor, "d_model"]:
    """First principal axis of both groups around the midpoint of their means (CAST's condition
    vector), unit length, towards the positive.
    """
    middle = (positive.mean(0) + negative.mean(0)) / 2
    axis = _first_axis(torch.cat([positive, negative]) - middle).float()
    return axis * torch.sign(mean_difference(positive, negative) @ axis)


def _first_axis(rows: Tensor) -> Tensor:
    return torch.linalg.svd(rows.double(), full_matrices=False).Vh[0]


last_token = partial(read_residual, pool="last")
mean_token = partial(read_residual, pool="mean")
