"""TODO models.hooks."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Callable, Iterator

from torch import nn

if TYPE_CHECKING:
    from torch import Tensor
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


# ---------------------------------------------------------------------- hooks and weights


@contextmanager
def hooked(*registrations: Callable[[], object]) -> Iterator[None]:
    """Make the hooks that `registrations` register, and remove every one of them on exit, however it is left."""
    handles = []
    try:
        for register in registrations:
            handles.append(register())
        yield
    finally:
        for handle in handles:
            handle.remove()


def before(module: nn.Module, look: Callable) -> Callable[[], object]:
    """Registration: ``look(input)`` before the module runs; a tensor that it returns replaces the input."""

    def hook(_, args):
        new = look(args[0])
        return None if new is None else (new, *args[1:])

    return lambda: module.register_forward_pre_hook(hook)


def after(module: nn.Module, look: Callable) -> Callable[[], object]:
    """Registration: ``look(output)`` after the module has run; a tensor that it returns replaces the output."""
    return lambda: module.register_forward_hook(lambda _, args, out: look(out))


@contextmanager
def loaded(module: nn.Module) -> Iterator[nn.Module]:
    """The module with its weights in memory, also where accelerate keeps them on CPU or disk between calls."""
    offload = getattr(module, "_hf_hook", None)
    if offload is None:
        yield module
        return
    offload.pre_forward(module)
    try:
        yield module
    finally:
        offload.post_forward(module, None)


@contextmanager
def frozen(model) -> Iterator[None]:
    """No parameter of the model requires a gradient inside; each is as before on exit, however it is left."""
    trained = [p for p in model.parameters() if p.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


@contextmanager
def trainable(model) -> Iterator[dict[str, Tensor]]:
    """The model's parameters with gradients on; how they were comes back."""
    parameters = dict(model.named_parameters())
    before = {name: p.requires_grad for name, p in parameters.items()}
    try:
        model.requires_grad_(True)
        yield parameters
    finally:
        for name, p in parameters.items():
            p.requires_grad_(before[name])
