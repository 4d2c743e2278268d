"""One category's data, from which every method is made: the same rows for all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from cdelta.circuit.mask import ParameterMask
from cdelta.edit.fit import train
from cdelta.edit.recipe import Recipe
from cdelta.edit.rows import Reply, TrainingRows
from cdelta.edit.verdict import Stop
from cdelta.errors import refuse_test
from cdelta.methods.base import Edited
from cdelta.models.spec import ModelSpec


@dataclass(frozen=True)
class Task:
    """A model, and what a method may see to make it refuse a category. Test rows are refused."""

    model: object = field(repr=False)
    tok: object = field(repr=False)
    category: str
    mask: ParameterMask = field(repr=False)
    """The circuit's mask."""
    rows: TrainingRows = field(repr=False)
    benign: Sequence[str] = field(repr=False)
    """Prompts of the benign counterparts."""
    recipe: Recipe = field(default_factory=Recipe, repr=False)
    """Its edit section, with this task's seed, trains every method."""
    val_target: Sequence[str] = field(default=(), repr=False)
    """Validation prompts of the category, for CAST's condition point."""
    val_others: Sequence[str] = field(default=(), repr=False)
    """Validation prompts that must not be steered."""
    other_mask: ParameterMask | None = field(default=None, repr=False)
    """Another category's circuit mask, for the control."""
    layers: tuple[int, ...] = ()
    """Layers that single-layer steering may choose from; empty: a third, half and two thirds of the
    depth."""
    rates: tuple[float, ...] = (1.0,)
    """Factors on the recipe's learning rate from which a trained method's is chosen; with one
    factor it is not tuned."""
    stop: Stop | None = field(default=None, repr=False)
    folder: Path | None = field(default=None, repr=False)
    """Where trained deltas and training states are kept, so that a killed job goes on."""

    def __post_init__(self) -> None:
        rows = self.rows
        asked = (rows.positive, rows.negative, rows.retain)
        for part in (*asked, self.benign, self.val_target, self.val_others):
            refuse_test(part, "fitting a baseline")

    @property
    def spec(self) -> ModelSpec:
        """The model's sizes."""
        return ModelSpec.from_model(self.model)

    @property
    def seed(self) -> int:
        """Seed of everything that is drawn at random."""
        return self.recipe.edit.seed

    @property
    def prompts(self) -> list[str]:
        """The category's prompts."""
        return [prompt for prompt, _ in self.rows.positive]

    @property
    def refusals(self) -> list[str | Sequence[int]]:
        """What θ⁺ learns to answer them."""
        return [_words(reply) for _, reply in self.rows.positive]

    @property
    def compliances(self) -> list[str | Sequence[int]]:
        """What θ⁻ learns to answer them."""
        return [_words(reply) for _, reply in self.rows.negative]

    def depths(self) -> tuple[int, ...]:
        """Layers for steering at one layer."""
        n = self.spec.n_layers
        return self.layers or tuple(sorted({n // 3, n // 2, 2 * n // 3}))

    def upper_half(self) -> range:
        """Layers for steering at several: from the middle to 72 % of the depth (CAST steers 15-23
        of 32).
        """
        n = self.spec.n_layers
        return range(n // 2, max(n // 2 + 1, round(0.72 * n)))

    def fit(
        self,
        mask: ParameterMask,
        rate: float = 1.0,
        rows: TrainingRows | None = None,
        **changes: object,
    ) -> Edited:
        """An update trained on a mask by the recipe, with its learning rate times `rate` and other
        fields of `EditRecipe` changed; on other rows, without stop rule, where `rows` are given.
        """
        how = replace(self.recipe.edit, lr=rate * self.recipe.edit.lr, **changes)
        if rows is not None:
            return Edited(train(self.model, self.tok, mask, rows, how).delta)
        state = self.folder / f"training-{rate:g}" if self.folder else None
        asked = {"stop": self.stop, "checkpoint": state}
        return Edited(train(self.model, self.tok, mask, self.rows, how, **asked).delta)


def _words(reply: Reply) -> str | Sequence[int]:
    return reply if isinstance(reply, str) else reply.ids
