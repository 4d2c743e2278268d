"""Steering at run time, beside C-ΔΘ: activation addition, directional ablation, a bias instead of a hook, and CAST.

Every method is a frozen object with ``applied(model, strength)``, as `WeightDelta` has: a context in which the model is steered, and after
which, also after an exception, it is as it was. Strength 0 changes nothing. Vectors are read and added at the same place, the output of a
block, i.e. the residual stream after it.

Sources: activation addition by difference of means (Rimsky et al., arXiv 2312.06681); directional ablation and addition (Arditi et al.,
arXiv 2406.11717); CAST (Lee et al., arXiv 2409.05907). Where ours differs from their code, the docstring says so.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Callable, Iterator, Mapping, Sequence

import torch
from torch import nn

from cdelta.errors import CdeltaError, refuse_test
from cdelta.models.chat import chat_ids, left_pad, positions
from cdelta.models.spec import Block, ModelSpec

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor


Vectors = Mapping[int, "Float[Tensor, 'd_model']"]
"""Layer -> what strength 1 adds to the residual stream after that block."""


# ---------------------------------------------------------------------- reading activations


@torch.no_grad()
def read_residual(
    model,
    tok,
    prompts: Sequence[str],
    answers: Sequence[str] | None = None,
    pool: str = "last",
    batch_size: int = 64,
) -> Float[Tensor, "row layer d_model"]:
    """The residual stream after every block, one vector per row, in fp32 on the CPU. Padding never counts.

    Args:
        prompts: strings, or `SplitRows` of records (test rows are refused).
        answers: appended to the prompts; then only their tokens are read, else only the prompts'.
        pool: ``last`` reads the last token, ``mean`` averages over the tokens.
    """
    if pool not in ("last", "mean"):
        raise CdeltaError(f"unknown pool {pool!r}: use last or mean.")
    refuse_test(prompts, "fitting a steering vector")
    heads = [chat_ids(tok, prompt) for prompt in getattr(prompts, "prompts", prompts)]
    tails = (
        heads
        if answers is None
        else [tok(a, add_special_tokens=False)["input_ids"] for a in answers]
    )
    if not all(tails):
        raise CdeltaError(
            "an answer without tokens has no activations to read: leave empty answers out."
        )
    whole = heads if answers is None else [h + t for h, t in zip(heads, tails, strict=True)]
    order = sorted(range(len(whole)), key=lambda i: -len(whole[i]))
    found: list = [None] * len(whole)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        ids, mask = left_pad([whole[i] for i in rows], 0, model.device)
        for i, vectors in zip(
            rows, _pooled(model, ids, mask, [len(tails[i]) if pool == "mean" else 1 for i in rows])
        ):
            found[i] = vectors
    return torch.stack(found)


def _pooled(
    model, ids: Int[Tensor, "row pos"], mask: Int[Tensor, "row pos"], sizes: Sequence[int]
) -> Float[Tensor, "row layer d_model"]:
    """Mean over each row's last `sizes` tokens after every block."""
    share = torch.zeros(mask.shape, device=mask.device)
    for row, size in enumerate(sizes):
        share[row, -size:] = 1 / size
    seen: list[Tensor] = []
    read = lambda module, inputs, output: seen.append(
        torch.einsum("rp,rpd->rd", share.to(_hidden(output).device), _hidden(output).float()).cpu()
    )
    with hooks(*((block.module, read) for block in ModelSpec.from_model(model).blocks(model))):
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
    """First principal axis of pairwise differences (uncentred, as CAST), scaled to their mean projection on it: strength 1 moves as far as
    the pairs lie apart.
    """
    axis = torch.linalg.svd(differences.double(), full_matrices=False).Vh[0]
    return ((differences.double() @ axis).mean() * axis).float()


def centred_direction(
    positive: Float[Tensor, "row d_model"], negative: Float[Tensor, "row d_model"]
) -> Float[Tensor, "d_model"]:
    """First principal axis of both groups around the midpoint of their means (CAST's condition vector), unit length, towards the positive."""
    middle = (positive.mean(0) + negative.mean(0)) / 2
    axis = (
        torch.linalg.svd((torch.cat([positive, negative]) - middle).double(), full_matrices=False)
        .Vh[0]
        .float()
    )
    return axis * torch.sign((positive.mean(0) - negative.mean(0)) @ axis)


# ---------------------------------------------------------------------- methods


@dataclass(frozen=True)
class Addition:
    """Activation steering: ``strength × vectors[layer]`` is added after the block, at every position."""

    vectors: Vectors = field(repr=False)

    @contextmanager
    def applied(self, model, strength: float = 1.0) -> Iterator[None]:
        """The steered model."""
        blocks = ModelSpec.from_model(model).blocks(model)
        with hooks(
            *(
                (blocks[l].module, _adding(strength * v.to(blocks[l].down.weight)))
                for l, v in self.vectors.items()
                if strength
            )
        ):
            yield

    def at(self, *layers: int) -> Addition:
        """Only the vectors of these layers."""
        return Addition({layer: self.vectors[layer] for layer in layers})


@dataclass(frozen=True)
class Ablation:
    """Directional ablation (Arditi, equation 4): ``x − strength · r̂ r̂ᵀ x`` on everything that is written to the residual stream (the
    embedding, attention and MLP outputs). At strength 1 the stream is orthogonal to r̂ at every layer and position.
    """

    direction: Float[Tensor, "d_model"] = field(repr=False)

    @contextmanager
    def applied(self, model, strength: float = 1.0) -> Iterator[None]:
        """The steered model."""
        blocks = ModelSpec.from_model(model).blocks(model)
        unit = self.direction.double() / self.direction.double().norm()
        project = lambda x: x - strength * (x @ unit.to(x))[..., None] * unit.to(x)
        enter = lambda module, args, kwargs: _replaced_input(args, kwargs, project)
        with (
            hooks(
                *(
                    (module, _changing(project))
                    for block in blocks
                    for module in writers(block)
                    if strength
                )
            ),
            ExitStack() as stack,
        ):
            if strength:
                stack.callback(
                    blocks[0].module.register_forward_pre_hook(enter, with_kwargs=True).remove
                )
            yield


@dataclass(frozen=True)
class Bias:
    """Activation steering without a hook: the vectors become biases of the blocks' last linear layer.

    Exact where nothing follows that layer before the residual stream: GPT-2 has the bias; Llama's configuration has ``mlp_bias``, so
    `save` writes an ordinary checkpoint. Mistral, Qwen and Phi-3 have no such bias in their configuration: the same context works in memory,
    but `save` refuses. Gemma normalises after that layer, so no constant can be added there: refused. (A vector *before* the first block
    could go into the embeddings of any of them; tied ones too unless the logits are soft-capped, since a shift common to all logits leaves
    the softmax as it is.)
    """

    vectors: Vectors = field(repr=False)

    @contextmanager
    def applied(self, model, strength: float = 1.0) -> Iterator[None]:
        """The biased model; the old biases, or their absence, come back."""
        modules = self._modules(model)
        old = {layer: module.bias for layer, module in modules.items()}
        try:
            for layer, module in modules.items():
                shift = (strength * self.vectors[layer]).to(module.weight)
                held = shift if old[layer] is None else (old[layer] + shift)
                module.bias = nn.Parameter(held, requires_grad=False)
            yield
        finally:
            for layer, module in modules.items():
                module.bias = old[layer]

    def save(self, model, tok, folder: str | Path, strength: float = 1.0) -> Path:
        """Write the biased model as an ordinary checkpoint. Raises `CdeltaError` where the architecture has no such bias."""
        if model.config.model_type not in ("llama", "gpt2"):
            raise CdeltaError(
                f"{model.config.model_type} checkpoints hold no MLP output bias: steer with a hook, or use Llama or GPT-2."
            )
        with self.applied(model, strength):
            state = {name: value.clone() for name, value in model.state_dict().items()}
            model.save_pretrained(folder, state_dict=state | _zero_biases(model, state))
        if model.config.model_type == "llama":
            config = type(model.config).from_pretrained(folder)
            config.mlp_bias = True
            config.save_pretrained(folder)
        tok.save_pretrained(folder)
        return Path(folder)

    def _modules(self, model) -> dict[int, nn.Module]:
        blocks = ModelSpec.from_model(model).blocks(model)
        if any(blocks[layer].mlp_post is not None for layer in self.vectors):
            raise CdeltaError(
                f"{model.config.model_type} normalises the MLP's output, so no bias equals a steering vector: use a hook."
            )
        return {layer: blocks[layer].down for layer in self.vectors}


@dataclass(frozen=True)
class SystemPrompt:
    """Refuse by instruction: nothing about the model changes, `evaluate` puts `system` before every prompt."""

    system: str

    @contextmanager
    def applied(self, model, strength: float = 1.0) -> Iterator[None]:
        """The model as it is."""
        yield


# ---------------------------------------------------------------------- fitting


def behaviour_vectors(
    model,
    tok,
    prompts: Sequence[str],
    refusals: Sequence[str],
    compliances: Sequence[str],
    how: str = "mean",
) -> Addition:
    """Vectors of all layers that turn answers into refusals, from the same prompts refused and answered (activations over the answers' tokens).

    Args:
        how: ``mean``: difference of means (activation steering). ``pca``: first principal axis of the pairwise differences (CAST).
    """
    read = lambda answers: read_residual(model, tok, prompts, answers, pool="mean")
    differences = read(refusals) - read(compliances)
    pooled = {"mean": lambda d: d.mean(0), "pca": principal_direction}[how]
    return Addition({layer: pooled(differences[:, layer]) for layer in range(differences.shape[1])})


def prompt_vectors(model, tok, harmful: Sequence[str], harmless: Sequence[str]) -> Addition:
    """Arditi's directions of all layers: difference of means at the prompts' last token, harmful minus harmless."""
    read = lambda prompts: read_residual(model, tok, prompts, pool="last")
    directions = mean_difference(read(harmful), read(harmless))
    return Addition(dict(enumerate(directions)))


# ---------------------------------------------------------------------- hooks


@contextmanager
def hooks(*pairs: tuple[nn.Module, Callable]) -> Iterator[None]:
    """Forward hooks on modules, removed on exit."""
    handles = []
    try:
        for module, hook in pairs:
            handles.append(module.register_forward_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


def writers(block: Block) -> tuple[nn.Module, nn.Module]:
    """The modules whose outputs a block adds to the residual stream."""
    return block.attn_post or block.o, block.mlp_post or block.down


def _hidden(output) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _with_hidden(output, hidden: Tensor):
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def _changing(change: Callable[[Tensor], Tensor]) -> Callable:
    return lambda module, inputs, output: _with_hidden(output, change(_hidden(output)))


def _adding(vector: Tensor) -> Callable:
    return _changing(lambda x: x + vector)


def _replaced_input(
    args: tuple, kwargs: dict, change: Callable[[Tensor], Tensor]
) -> tuple[tuple, dict]:
    if args:
        return (change(args[0]), *args[1:]), kwargs
    return args, kwargs | {"hidden_states": change(kwargs["hidden_states"])}


def _zero_biases(model, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The biases that ``mlp_bias`` brings along and nothing has set."""
    zeros = {}
    for name, weight in state.items():
        bias = name.removesuffix("weight") + "bias"
        if ".mlp." in name and name.endswith("weight") and bias not in state:
            zeros[bias] = weight.new_zeros(weight.shape[0])
    return zeros
