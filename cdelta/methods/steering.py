"""Steering at run time, beside C-ΔΘ: activation addition, directional ablation, a bias instead of a
hook, and a system prompt.

Vectors are read and added at the same place, the output of a block, i.e. the residual stream after
it. Strength 0 changes nothing.

Sources: activation addition by difference of means (Rimsky et al., arXiv 2312.06681); directional
ablation and addition (Arditi et al., arXiv 2406.11717). Where ours differs from their code, the
docstring says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from cdelta.attribution.linear import writers
from cdelta.attribution.metrics import encode_answer
from cdelta.errors import CdeltaError
from cdelta.methods.tuning import Applied
from cdelta.models.chat import by_length, chat_ids, left_pad, pad_id, positions, rope_boundary
from cdelta.models.hooks import after, before, hooked, read_end
from cdelta.models.spec import ModelSpec

if TYPE_CHECKING:
    from jaxtyping import Float

Vectors = Mapping[int, "Float[Tensor, 'd_model']"]
"""Layer -> what strength 1 adds to the residual stream after that block."""


@dataclass(frozen=True)
class Addition(Applied):
    """Activation steering: ``strength × vectors[layer]`` is added after the block, at every
    position.
    """

    vectors: Vectors = field(repr=False)

    @contextmanager
    def applied(self, model, strength: float = 1.0) -> Iterator[None]:
        """The steered model."""
        with hooked(*self.hooks(model, strength, lambda hidden: 1.0)):
            yield

    def hooks(self, model, strength: float, share: Callable[[Tensor], Tensor | float]) -> list:
        """Hooks that add the vectors, times each row's `share` of what is done."""
        blocks = ModelSpec.from_model(model).blocks(model)
        return [
            after(
                blocks[layer].module,
                partial(_shifted, share, strength * vector.to(blocks[layer].down.weight)),
            )
            for layer, vector in self.vectors.items()
            if strength
        ]

    def at(self, *layers: int) -> Addition:
        """Only the vectors of these layers."""
        return Addition({layer: self.vectors[layer] for layer in layers})


def _shifted(share: Callable, shift: Tensor, hidden: Tensor) -> Tensor:
    """The hidden states with each row's share of the shift."""
    return hidden + share(hidden) * shift


@dataclass(frozen=True)
class Ablation(Applied):
    """Directional ablation (Arditi, equation 4): ``x − strength · r̂ r̂ᵀ x`` on everything that is
    written to the residual stream (the embedding, attention and MLP outputs).

    At strength 1 the stream is orthogonal to r̂ at every layer and position.
    """

    direction: Float[Tensor, "d_model"] = field(repr=False)

    @contextmanager
    def applied(self, model, strength: float = 1.0) -> Iterator[None]:
        """The steered model."""
        spec, project = ModelSpec.from_model(model), partial(self._project, strength)
        blocks = spec.blocks(model) if strength else []
        written = [w.out for block in blocks for w in writers(spec, block).values()]
        inputs = [before(block.module, project) for block in blocks[:1]]
        with hooked(*inputs, *(after(module, project) for module in written)):
            yield

    def _project(self, strength: float, hidden: Tensor) -> Tensor:
        """Hidden states without (so much of) their part along the direction."""
        direction = self.direction.double()
        unit = (direction / direction.norm()).to(hidden)
        return hidden - strength * (hidden @ unit)[..., None] * unit


@dataclass(frozen=True)
class Bias(Applied):
    """Activation steering without a hook: the vectors become biases of the blocks' last linear
    layer.

    Exact where nothing follows that layer before the residual stream, so not in Gemma, which
    normalises after it.
    """

    vectors: Vectors = field(repr=False)

    @contextmanager
    def applied(self, model, strength: float = 1.0) -> Iterator[None]:
        """The biased model; the old biases, or their absence, come back."""
        blocks = ModelSpec.from_model(model).blocks(model)
        modules = [blocks[layer].down for layer in self.vectors]
        old = [module.bias for module in modules]
        try:
            for module, bias, vector in zip(modules, old, self.vectors.values(), strict=True):
                shift = (strength * vector).to(module.weight)
                held = shift if bias is None else bias + shift
                module.bias = nn.Parameter(held, requires_grad=False)
            yield
        finally:
            for module, bias in zip(modules, old, strict=True):
                module.bias = bias


@dataclass(frozen=True)
class SystemPrompt(Applied):
    """Refuse by instruction: nothing about the model changes, a system prompt goes before every
    prompt.
    """

    system: str
    strengths = (1.0,)


# ---------------------------------------------------------------------- fitting


def behaviour_vectors(
    model,
    tok,
    prompts: Sequence[str],
    refusals: Sequence[str | Sequence[int]],
    compliances: Sequence[str | Sequence[int]],
    principal: bool = False,
) -> Addition:
    """Vectors of all layers that turn answers into refusals, from the same prompts refused and
    answered (activations over the answers' tokens).

    Args:
        principal: first principal axis of the pairwise differences (CAST), instead of the
            difference of means (activation steering).
    """
    refused = read_residual(model, tok, prompts, refusals, mean=True)
    differences = refused - read_residual(model, tok, prompts, compliances, mean=True)
    direction = principal_direction if principal else partial(torch.mean, dim=0)
    return Addition(dict(enumerate(map(direction, differences.unbind(1)))))


def prompt_vectors(model, tok, harmful: Sequence[str], harmless: Sequence[str]) -> Addition:
    """Arditi's directions of all layers: difference of means at the prompts' last token, harmful
    minus harmless.
    """
    ends = [read_residual(model, tok, prompts) for prompts in (harmful, harmless)]
    return Addition(dict(enumerate(mean_difference(*ends))))


@torch.no_grad()
def read_residual(
    model,
    tok,
    prompts: Sequence[str],
    answers: Sequence[str | Sequence[int]] | None = None,
    mean: bool = False,
    batch_size: int = 64,
) -> Float[Tensor, "row layer d_model"]:
    """The residual stream after every block at every row's last token, in fp32 on the CPU. Padding
    never counts.

    Args:
        answers: texts or token ids that follow the prompts.
        mean: the mean over the answers' tokens, or without answers over the prompts', instead.
    """
    heads = [chat_ids(tok, prompt) for prompt in prompts]
    tails = heads if answers is None else [encode_answer(tok, answer) for answer in answers]
    if not all(tails):
        raise CdeltaError(
            "an answer without tokens has no activations to read: leave empty answers out."
        )
    whole = heads if answers is None else [h + t for h, t in zip(heads, tails, strict=True)]
    sizes = torch.tensor([len(tail) if mean else 1 for tail in tails])
    found: dict[int, Tensor] = {}
    for rows in by_length([len(ids) for ids in whole], batch_size, rope_boundary(model)):
        ids, mask = left_pad([whole[row] for row in rows], pad_id(model, tok), model.device)
        found |= zip(rows, _pooled(model, ids, mask, sizes[rows]))
    return torch.stack([found[row] for row in range(len(whole))])


def _pooled(model, ids: Tensor, mask: Tensor, sizes: Tensor) -> Float[Tensor, "row layer d_model"]:
    """Mean over each row's last `sizes` tokens after every block."""
    from_the_end = torch.arange(ids.shape[1], 0, -1)
    share = (from_the_end <= sizes[:, None]) / sizes[:, None]
    seen: list[Tensor] = []

    def read(hidden: Tensor) -> None:
        pooled = torch.einsum("rp,rpd->rd", share.to(hidden.device), hidden.float())
        seen.append(pooled.cpu())

    blocks = ModelSpec.from_model(model).blocks(model)
    with hooked(*(after(block.module, read) for block in blocks)):
        read_end(model, 1, ids, mask, positions(mask))
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
