"""Steering at run time, beside C-ΔΘ: activation addition, directional ablation, a bias instead of a
hook, and a system prompt.

Vectors are read and added at the same place, the output of a block, i.e. the residual stream after
it. Strength 0 changes nothing.

Sources: activation addition by difference of means (Rimsky et al., arXiv 2312.06681); directional
ablation and addition (Arditi et al., arXiv 2406.11717). Where ours differs from their code, the
docstring says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from cdelta.errors import CdeltaError
from cdelta.methods.base import Applied
from cdelta.methods.residual import last_token, mean_difference, mean_token, principal_direction
from cdelta.models.hooks import after, before, hooked
from cdelta.models.spec import Block, ModelSpec

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

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
        blocks = ModelSpec.from_model(model).blocks(model)
        layers = self.vectors if strength else ()
        with hooked(*(self._adding(blocks[layer], layer, strength) for layer in layers)):
            yield

    def _adding(self, block: Block, layer: int, strength: float):
        shift = strength * self.vectors[layer].to(block.down.weight)
        return after(block.module, shift.add)

    def at(self, *layers: int) -> Addition:
        """Only the vectors of these layers."""
        return Addition({layer: self.vectors[layer] for layer in layers})


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
        unit = self.direction.double() / self.direction.double().norm()

        def project(hidden: Tensor) -> Tensor:
            return hidden - strength * (hidden @ unit.to(hidden))[..., None] * unit.to(hidden)

        blocks = ModelSpec.from_model(model).blocks(model) if strength else []
        outputs = [after(module, project) for block in blocks for module in writers(block)]
        inputs = [before(block.module, project) for block in blocks[:1]]
        with hooked(*outputs, *inputs):
            yield


@dataclass(frozen=True)
class Bias(Applied):
    """Activation steering without a hook: the vectors become biases of the blocks' last linear
    layer.

    Exact where nothing follows that layer before the residual stream: GPT-2 has the bias; Llama's
    configuration has ``mlp_bias``, so `save` writes an ordinary checkpoint. Mistral, Qwen and Phi-3
    have no such bias in their configuration: the same context works in memory, but `save` refuses.
    Gemma normalises after that layer, so no constant can be added there: refused. (A vector
    *before* the first block could go into the embeddings of any of them; tied ones too unless the
    logits are soft-capped, since a shift common to all logits leaves the softmax as it is.)
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
        """Write the biased model as an ordinary checkpoint.

        Raises `CdeltaError` where the architecture has no such bias.
        """
        kind = model.config.model_type
        if kind not in ("llama", "gpt2"):
            raise CdeltaError(
                f"{kind} checkpoints hold no MLP output bias: steer with a hook, "
                "or use Llama or GPT-2."
            )
        with self.applied(model, strength):
            state = {name: value.clone() for name, value in model.state_dict().items()}
            model.save_pretrained(folder, state_dict=state | _zero_biases(model, state))
        if kind == "llama":
            config = type(model.config).from_pretrained(folder)
            config.mlp_bias = True
            config.save_pretrained(folder)
        tok.save_pretrained(folder)
        return Path(folder)

    def _modules(self, model) -> dict[int, nn.Module]:
        blocks = ModelSpec.from_model(model).blocks(model)
        if any(blocks[layer].mlp_post is not None for layer in self.vectors):
            raise CdeltaError(
                f"{model.config.model_type} normalises the MLP's output, so no bias equals "
                "a steering vector: use a hook."
            )
        return {layer: blocks[layer].down for layer in self.vectors}


@dataclass(frozen=True)
class SystemPrompt(Applied):
    """Refuse by instruction: nothing about the model changes, a system prompt goes before every
    prompt.
    """

    system: str
    strengths = (1.0,)

    @contextmanager
    def applied(self, model, strength: float = 1.0) -> Iterator[None]:
        """The model as it is."""
        yield


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
    refused = mean_token(model, tok, prompts, refusals)
    differences = refused - mean_token(model, tok, prompts, compliances)
    vectors = {
        layer: principal_direction(own) if principal else own.mean(0)
        for layer, own in enumerate(differences.unbind(1))
    }
    return Addition(vectors)


def prompt_vectors(model, tok, harmful: Sequence[str], harmless: Sequence[str]) -> Addition:
    """Arditi's directions of all layers: difference of means at the prompts' last token, harmful
    minus harmless.
    """
    directions = mean_difference(last_token(model, tok, harmful), last_token(model, tok, harmless))
    return Addition(dict(enumerate(directions)))


def writers(block: Block) -> tuple[nn.Module, nn.Module]:
    """The modules whose outputs a block adds to the residual stream."""
    return block.attn_post or block.o, block.mlp_post or block.down


def _zero_biases(model, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The biases that ``mlp_bias`` brings along and nothing has set."""
    zeros = {}
    for name, weight in state.items():
        bias = name.removesuffix("weight") + "bias"
        if ".mlp." in name and name.endswith("weight") and bias not in state:
            zeros[bias] = weight.new_zeros(weight.shape[0])
    return zeros
