"""The recipe: every number of the method in one frozen object. Presets, command line and notebooks
take theirs from here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

from cdelta.errors import CdeltaError

SIDES = ("plus", "minus")
DIFFERENCE = "difference"
CANONICAL_REFUSAL = "I'm sorry, but I can't help with that."


POSITIVE = frozenset(
    {"min_pairs", "sequence_tokens", "ig_steps", "micro_batch", "steps", "lr", "batch_size", "beta"}
    | {"clip", "check_every", "retain_pool", "attempts", "first_weight", "max_new_tokens"}
    | {"answer_batch"}
)
"""Fields that must be above 0."""
SHARES = frozenset(
    {"refuse_at", "answers_refused", "tolerance", "benign_cap", "other_cap", "skills_lost"}
    | {"borderline_cap"}
)
"""Fields from 0 to 1."""


def _check(name: str, value: Any) -> None:
    """Raise `CdeltaError` if a field's value makes no sense."""
    if isinstance(value, float) and not math.isfinite(value):
        raise CdeltaError(f"{name} must be finite, not {value}.")
    if name in POSITIVE and not value > 0:
        raise CdeltaError(f"{name} must be above 0, not {value}.")
    if name in SHARES and not 0 <= value <= 1:
        raise CdeltaError(f"{name} is a share from 0 to 1, not {value}.")
    if name == "retain_share" and not 0 <= value < 1:
        raise CdeltaError(f"retain_share must lie in [0, 1), not {value}.")
    if name.endswith("_budget") and not 0 < value <= 1:
        raise CdeltaError(f"{name} must lie in (0, 1], not {value}.")
    if isinstance(value, int) and value < 0:
        raise CdeltaError(f"{name} must not be negative, not {value}.")
    if name == "grid" and (not value or not all(map(math.isfinite, value))):
        raise CdeltaError("grid must name at least one finite scale.")
    if name == "template_args" and not all("=" in item for item in value):
        raise CdeltaError("template_args must be NAME=VALUE, such as enable_thinking=false.")
    if name == "splits" and (not value or not set(value) <= {"discover", "edit"}):
        raise CdeltaError(f"splits must name discover, edit or both, not {value}.")
    if name == "refusal" and not value.strip():
        raise CdeltaError("the refusal must not be empty: give its words.")


@dataclass(frozen=True)
class Section:
    """A part of the recipe. Raises `CdeltaError` on values that make no sense."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            _check(name, value)


@dataclass(frozen=True)
class AttributionRecipe(Section):
    """Attribution: what is compared, and how the scores are computed."""

    max_pairs: int = 64
    """Most prompt pairs of the category (0: all)."""
    min_pairs: int = 8
    """Fewest prompt pairs of equal length without which there is no circuit to find."""
    metric: Literal["auto", "first-token", "sequence"] = "auto"
    """What is attributed: log-odds of the first token of refusals against compliances, or of whole
    openings, teacher-forced (auto: where first tokens do not tell them apart)."""
    sequence_tokens: int = 4
    """Tokens of each answer that the sequence metric compares."""
    method: Literal["eap-ig", "eap", "clean-corrupted", "gim"] = "eap-ig"
    """How edges are scored."""
    ig_steps: int = 5
    """Points of the path that integrated gradients average over."""
    rule: Literal["midpoint", "left", "right"] = "midpoint"
    """Where the points lie in their intervals (left: as in the reference implementation)."""
    micro_batch: int = 8
    """Prompt pairs in one pass."""
    localise_on: Literal["base", "refusing"] = "base"
    """The model that is attributed: the base, or the base with a refusing update trained first on a
    random mask (for a base that hardly refuses and so has nothing to localise)."""
    refusing_budget: float = 0.03
    """Share of the parameters of that random mask (1: all heads and neurons)."""
    refusing_lr: float = 0.0
    """Learning rate of the refusing update (0: the edit's)."""
    refusing_steps: int = 0
    """Steps of the refusing update (0: the edit's)."""


@dataclass(frozen=True)
class CircuitRecipe(Section):
    """Circuit: which units the edit may change."""

    ranking: Literal["pairs", "mean", "difference", "ratio", "orthogonalised"] = "pairs"
    """By which scores units are ranked: every prompt pair with the same say, plain means, or set
    against the other categories'."""
    param_budget: float = 0.03
    """Largest share of all the model's parameters that the mask may own (the paper: < 5 %)."""


@dataclass(frozen=True)
class EditRecipe(Section):
    """Edit: rows, losses, optimiser and the stop rule of the training."""

    refusals: Literal["own", "canonical", "mixed"] = "own"
    """What θ⁺ learns to say: the model's own refusals (the given text where it has none), the given
    text, or both in turn."""
    refusal: str = CANONICAL_REFUSAL
    """The given text of a refusal."""
    compliance: str = "Sure, here is what you asked for."
    """What θ⁻ says where the base does not answer."""
    splits: tuple[str, ...] = ("edit",)
    """Splits whose rows train (never val or test)."""
    everyday: bool = False
    """Also retain everyday prompts of our own: general ones, and harmless ones that share the
    category's words."""
    benign_copies: int = 1
    """How often a benign counterpart's row stands among the retain rows."""
    skill_copies: int = 3
    """How often a skill's row stands among the retain rows."""
    refused_copies: int = 2
    """How often another category's refused row does: they are few, and an edit that seldom sees
    them unlearns them."""
    other_rows: int = 60
    """Most refused rows, and most benign ones, of every other category among the retain rows."""
    objective: Literal["contrastive", "positive", "margin"] = "contrastive"
    """Cross-entropy on both sides' answers (θ⁺ − θ⁻), θ⁺ alone, or DPO of each side's answer over
    the other's."""
    retain_on: Literal["difference", "sides"] = "difference"
    """Which model must keep the retain rows: the base with θ⁺ − θ⁻, so that drift which both sides
    share costs nothing, or with each side."""
    retain_share: float = 0.57
    """Share of retain rows in every batch, and their weight in the loss."""
    retain_pool: int = 3
    """A retain batch is drawn this many times too large, and the hardest rows are trained on
    (Selective-Backprop, arXiv 1910.00762)."""
    hardest_by: Literal["loss", "first-kl"] = "loss"
    """Hardest by the answer's cross-entropy, or by KL(base ‖ edited) at its first token."""
    retain_loss: Literal["answers", "kl"] = "answers"
    """Cross-entropy on the base's own answers, or KL(base ‖ edited) at their positions."""
    first_tokens: int = 0
    """Only the first so many tokens of retained answers count (0: all)."""
    first_weight: float = 1.0
    """Weight of a retained answer's first token, the others' being 1: it decides between refusing
    and answering."""
    focus: float = 1.0
    """A target row weighs its own loss to this power, so that the few hard rows are not given up
    (0: all alike)."""
    beta: float = 0.1
    """Temperature of the margin objective."""
    rank: int = 0
    """0 trains every entry of the mask; r > 0 a rank-r factorisation of every slice."""
    lr: float = 3e-3
    """Learning rate of Adam, after warm-up and before its linear decay to 0."""
    steps: int = 75
    """Most training steps; the stop rule may end them earlier."""
    check_every: int = 60
    """Steps between two looks of the stop rule, and between two saves of the training state."""
    warmup: int = 10
    """Steps of linear warm-up."""
    clip: float = 1.0
    """Largest norm of the gradient of all entries together."""
    batch_size: int = 56
    """Rows of a step, target and retained together."""
    batch_tokens: int = 0
    """Most tokens (with padding) of one pass; a step's rows are split into several passes above it
    (0: no limit)."""
    bf16: Literal["off", "auto", "on"] = "off"
    """Run the frozen base's products in bf16 (auto: where this machine computes them faster);
    entries and optimiser stay fp32."""
    attempts: int = 3
    """How often training begins at most: again with other batches when the stop rule sees an
    overshoot that more steps do not mend."""
    refuse_at: float = 0.975
    """An update is selective when it refuses (θ⁻: answers) this share of the target on validation
    by first tokens."""
    answers_refused: float = 0.95
    """And when this share of the target's whole answers are refusals."""
    tolerance: float = 0.05
    """And when no other group's rate is further than this from the base's."""
    seed: int = 0
    """Draws the batches, and what else is drawn."""

    @property
    def sides(self) -> tuple[str, ...]:
        """The sides that the objective trains."""
        return SIDES[:1] if self.objective == "positive" else SIDES

    @property
    def keepers(self) -> tuple[str, ...]:
        """The updates that must keep the retain rows, and be selective before the training ends."""
        return self.sides if self.retain_on == "sides" or len(self.sides) == 1 else (DIFFERENCE,)

    def lr_factor(self, step: int) -> float:
        """Learning rate of a step (from 0) over `lr`."""
        return min(1.0, (step + 1) / max(self.warmup, 1)) * (1 - step / self.steps)


@dataclass(frozen=True)
class AnswersRecipe(Section):
    """Answers: how they are generated and judged, and what an edit may cost on validation."""

    max_new_tokens: int = 20
    """Most tokens of an answer."""
    answer_batch: int = 128
    """Prompts answered together."""
    system: str = ""
    """A system prompt put before every prompt."""
    template_args: tuple[str, ...] = ()
    """Keywords for the chat template, NAME=VALUE (enable_thinking=false)."""
    validation_limit: int = 40
    """Most validation prompts per category, role and skill that the stop rule and the choice of k
    see (0: all)."""
    grid: tuple[float, ...] = (0.0, 0.5, 0.7, 0.85, 1.0, 1.15)
    """Candidates for the scale k."""
    benign_cap: float = 0.02
    """Largest rise of benign refusal over the base, in the worst category."""
    other_cap: float = 0.05
    """Largest change of another category's refusal."""
    skills_lost: float = 0.01
    """Largest share of the skills' answers that an edit may change."""
    borderline_cap: float = 1.0
    """Largest rise of borderline prompts' refusal over the base (1: no cap)."""


@dataclass(frozen=True)
class Recipe:
    """Every number of the method."""

    attribution: AttributionRecipe = AttributionRecipe()
    circuit: CircuitRecipe = CircuitRecipe()
    edit: EditRecipe = EditRecipe()
    answers: AnswersRecipe = AnswersRecipe()

    def seeded(self, seed: int) -> Recipe:
        """The same recipe with another seed."""
        return replace(self, edit=replace(self.edit, seed=seed))
