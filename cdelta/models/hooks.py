"""Hooks and gradients of a model, switched on inside a block and off again however it is left."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import Any, Callable, Iterator

from torch import Tensor, nn
from transformers import PreTrainedModel

Registration = Callable[[], Any]
"""Makes one hook when called, and returns its handle."""


@contextmanager
def hooked(*registrations: Registration) -> Iterator[None]:
    """Make the hooks that `registrations` register, and remove every one of them on exit, however
    it is left.
    """
    with ExitStack() as stack:
        for register in registrations:
            stack.callback(register().remove)
        yield


def before(module: nn.Module, look: Callable) -> Registration:
    """Registration: ``look(input)`` before the module runs; a tensor that it returns replaces the
    input.

    The input is the first positional argument, or ``hidden_states`` where a block is called by
    keyword.
    """

    def hook(_, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """What torch calls: show `look` the input, and pass on what it returns."""
        new = look(args[0] if args else kwargs["hidden_states"])
        if new is None:
            return None
        return ((new, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": new})

    return lambda: module.register_forward_pre_hook(hook, with_kwargs=True)


def after(module: nn.Module, look: Callable) -> Registration:
    """Registration: ``look(output)`` after the module has run; a tensor that it returns replaces
    the output.

    A module that returns a tuple is looked at, and changed, in its first member, the hidden states.
    """

    def hook(_, args: tuple, output: Any) -> Any:
        """What torch calls: show `look` the output, and pass on what it returns."""
        if not isinstance(output, tuple):
            return look(output)
        new = look(output[0])
        return None if new is None else (new, *output[1:])

    return lambda: module.register_forward_hook(hook)


def read_end(
    model: PreTrainedModel,
    kept: int,
    ids: Tensor,
    mask: Tensor,
    positions: Tensor,
    cache: Any = None,
    keep: bool = False,
) -> Any:
    """The model's output on rows with the logits of the last `kept` positions; with `keep`, also
    their keys and values.

    A slice of the hidden states is not contiguous, and a linear layer copies its whole weight for
    every row of such a batch: 40 % of a batch of answers at 135 million parameters.
    """
    with hooked(before(model.get_output_embeddings(), Tensor.contiguous)):
        return model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=keep or cache is not None,
            logits_to_keep=kept,
        )


@contextmanager
def loaded(module: nn.Module) -> Iterator[nn.Module]:
    """The module with its weights in memory, also where accelerate keeps them on CPU or disk
    between calls.
    """
    offload = getattr(module, "_hf_hook", None)
    if offload:
        offload.pre_forward(module)
    try:
        yield module
    finally:
        if offload:
            offload.post_forward(module, None)


@contextmanager
def requires_grad(model: nn.Module, on: bool) -> Iterator[dict[str, Tensor]]:
    """All parameters by name, with gradients on or off inside; each is as before on exit, however
    it is left.
    """
    parameters: dict[str, Tensor] = dict(model.named_parameters())
    old = {name: parameter.requires_grad for name, parameter in parameters.items()}
    try:
        model.requires_grad_(on)
        yield parameters
    finally:
        for name, parameter in parameters.items():
            parameter.requires_grad_(old[name])
