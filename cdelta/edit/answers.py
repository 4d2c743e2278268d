"""How answers are generated and judged: the same for the stop rule, the choice of k and every
table.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cdelta.edit.recipe import Recipe
from cdelta.evaluation.judges import Rules
from cdelta.models.templates import bind_template, parse_template_args

if TYPE_CHECKING:
    from cdelta.attribution.metrics import Metric


def bound(tok, recipe: Recipe):
    """The tokenizer, which from now on writes every prompt as the recipe says."""
    arguments = parse_template_args(recipe.answers.template_args)
    return bind_template(tok, recipe.answers.system, **arguments)


def answer_options(recipe: Recipe, metric: Metric | None = None) -> dict[str, object]:
    """Keywords of `evaluate`: how prompts are answered and judged, before and after an edit.

    System prompt and template keywords are not among them: the tokenizer carries them.
    """
    how = recipe.answers
    return {
        "metric": metric,
        "judge": Rules((recipe.edit.refusal,)),
        "max_new_tokens": how.max_new_tokens,
        "batch_size": how.answer_batch,
    }
