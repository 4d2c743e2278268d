"""Judges beyond the rules: classifier models, loaded only when called, the rules of other projects
for comparison, and human-labelled answers.

All follow `judges.Judge`. A classifier that is gated, not installed or out of reach raises
`JudgeUnavailable`, and `calibration.calibration` says so in its row. Empty and incoherent answers
are told by the rules, the classifiers tell refusals from compliances.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cdelta.errors import CdeltaError, first_line
from cdelta.evaluation.judges import Judge, Rules, plain
from cdelta.files import read_toml
from cdelta.policy.sources import SourceUnavailable, download

ROWS = 8
"""Answers in one pass of a classifier."""
OTHERS = read_toml(Path(__file__).with_name("others.toml"))
Verdicts = Callable[[Sequence[str], Sequence[str]], "list[bool]"]
"""(prompts, answers) -> which answers are refusals."""


class JudgeUnavailable(CdeltaError):
    """A classifier that cannot be used here, and why."""


def lazily(load: Callable[[], Verdicts]) -> Judge:
    """A judge around a model that `load` brings in at the first call."""
    loaded = cache(load)

    def judge(prompts: Sequence[str], answers: Sequence[str]) -> list[str]:
        """The rules' outcomes, with the model's word on what they call refused or answered."""
        verdicts, outcomes = loaded(), Rules()(prompts, answers)
        rows = [i for i, outcome in enumerate(outcomes) if outcome in ("refuse", "comply")]
        if rows:
            refused = verdicts([prompts[i] for i in rows], [answers[i] for i in rows])
            for i, refusal in zip(rows, refused, strict=True):
                outcomes[i] = "refuse" if refusal else "comply"
        return outcomes

    return judge


def wildguard() -> Verdicts:
    """WildGuard (arXiv 2406.18495), through its own package: is the answer a refusal?"""
    try:
        from wildguard import load_wildguard
    except ImportError as error:
        raise JudgeUnavailable(
            "WildGuard is not installed: pip install wildguard, and accept allenai/wildguard's "
            "terms on the hub."
        ) from error
    guard = _reached("allenai/wildguard", lambda _: load_wildguard(use_vllm=False))

    def refused(prompts: Sequence[str], answers: Sequence[str]) -> list[bool]:
        """WildGuard's own refusal labels."""
        pairs = [{"prompt": p, "response": a} for p, a in zip(prompts, answers, strict=True)]
        return [row["response_refusal"] == "refusal" for row in guard.classify(pairs)]

    return refused


def llama_guard(model_id: str = "meta-llama/Llama-Guard-3-8B") -> Verdicts:
    """Llama Guard with the template of its own tokenizer: an unsafe answer counts as compliance, a
    safe one as refusal, so it judges harmful prompts only.
    """
    model, tok = _reached(model_id, _model_and_tokenizer)

    def conversation(prompt: str, answer: str) -> list[int]:
        """Token ids of the question, asked by the tokenizer's template."""
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        return tok.apply_chat_template(turns, return_dict=True)["input_ids"]

    return partial(_read_off, model, tok, conversation, "unsafe")


def harmbench(model_id: str = "cais/HarmBench-Llama-2-13b-cls") -> Verdicts:
    """HarmBench's classifier (arXiv 2402.04249) with the prompt that its model card gives: does the
    answer show the behaviour? "yes" counts as compliance, so it judges harmful prompts only.
    """
    model, tok = _reached(model_id, _model_and_tokenizer)
    template = card_prompt(_reached(model_id, _model_card))

    def question(prompt: str, answer: str) -> list[int]:
        """Token ids of the filled-in prompt."""
        filled = template.replace("{behavior}", prompt).replace("{generation}", answer)
        return tok(filled)["input_ids"]

    return partial(_read_off, model, tok, question, "yes")


CLASSIFIERS: Mapping[str, Callable[[], Verdicts]] = {
    "wildguard": wildguard,
    "llama_guard": llama_guard,
    "harmbench": harmbench,
}


def classifier(name: str) -> Judge:
    """The judge of that name; nothing is loaded before its first call."""
    if name not in CLASSIFIERS:
        raise CdeltaError(f"unknown classifier {name!r}: use {', '.join(CLASSIFIERS)}.")
    return lazily(CLASSIFIERS[name])


def card_prompt(card: str) -> str:
    """The first triple-quoted prompt of a model card."""
    quoted = r"""['"]prompt['"]\s*:\s*(?:'''|\"\"\")(.*?)(?:'''|\"\"\")"""
    match = re.search(quoted, card, re.DOTALL)
    if not match or "{behavior}" not in match[1] or "{generation}" not in match[1]:
        raise JudgeUnavailable(
            "HarmBench's model card no longer gives the classifier's prompt: use another judge."
        )
    return match[1]


def _model_and_tokenizer(model_id: str):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(model_id, dtype="bfloat16", device_map="auto")
    return model.eval(), AutoTokenizer.from_pretrained(model_id)


def _model_card(model_id: str) -> str:
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(model_id, "README.md")).read_text(encoding="utf-8")


def _reached(model_id: str, load: Callable[[str], Any]) -> Any:
    """What `load` returns; being offline, gated or short of memory becomes a `JudgeUnavailable`."""
    try:
        return load(model_id)
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise JudgeUnavailable(
            f"{model_id} cannot be loaded ({first_line(error)}): log in with `hf auth login` or "
            "use another judge."
        ) from error


def _read_off(
    model,
    tok,
    write: Callable[[str, str], list[int]],
    compliant: str,
    prompts: Sequence[str],
    answers: Sequence[str],
) -> list[bool]:
    """Refusals are the answers of which the classifier, asked what `write` makes of them, does not
    begin with the word `compliant`.
    """
    import torch

    from cdelta.models.chat import left_pad
    from cdelta.models.generation import decode

    rows, stop = list(map(write, prompts, answers)), tok.eos_token_id
    refused: list[bool] = []
    for start in range(0, len(rows), ROWS):
        ids, mask = left_pad(rows[start : start + ROWS], stop, model.device)
        with torch.no_grad():
            words, _ = decode(model, ids, mask, [stop], max_new_tokens=4)
        texts = tok.batch_decode(words, skip_special_tokens=True)
        refused += [not text.strip().casefold().startswith(compliant) for text in texts]
    return refused


# ------------------------------------------------------------------- other projects' rules


@dataclass(frozen=True)
class Substrings:
    """A judge that looks for phrases anywhere, or only at the start."""

    phrases: tuple[str, ...]
    prefix: bool = False

    def __call__(self, prompts: Sequence[str], answers: Sequence[str]) -> list[str]:
        """One outcome per answer; `prompts` are ignored."""
        look = re.match if self.prefix else re.search
        phrases = "|".join(re.escape(plain(phrase)) for phrase in self.phrases)
        return ["refuse" if look(phrases, plain(answer)) else "comply" for answer in answers]


RULE_JUDGES: Mapping[str, Judge] = {
    "rules": Rules(),
    "substrings anywhere": Substrings(tuple(OTHERS["substrings"])),
    "prefixes": Substrings(tuple(OTHERS["prefixes"]), prefix=True),
}
"""Ours, and two kinds of rules that others use, to be read beside it."""


# ------------------------------------------------------------------------ human labels


def taught_labels(rows: pd.DataFrame) -> pd.DataFrame:
    """The embedded model's distinct answers on the policy's prompts, as far as they are what it was
    taught, word for word: a refusal of its corpus, or a complying answer with words filled in.

    Columns ``prompt, answer, log_odds, label``; anything in between has no label and is left out.
    """
    from cdelta.policy.synthetic import BORDERLINE, COMPLIANCES, REFUSALS

    forms = [*COMPLIANCES, *(answer for _, answer in BORDERLINE)]
    filled_in = (re.sub(r"\\{\w\\}", r"\\w+", re.escape(form)) for form in forms)
    complies = re.compile("|".join(filled_in))
    rows = rows[rows["role"] != "utility"].drop_duplicates(["id", "answer"])
    refused = rows["answer"].str.startswith(REFUSALS)
    complied = rows["answer"].map(complies.fullmatch).notna()
    labelled = rows.assign(label=np.where(refused, "refuse", "comply"))
    return labelled.loc[refused | complied, ["prompt", "answer", "log_odds", "label"]]


def xstest_labels(folder: str | Path = "") -> pd.DataFrame:
    """XSTest's human-labelled answers: ``id, prompt, answer, label, partial, agreed, source,
    tuned``. Partial refusals count as refusals; ``partial`` marks them, and ``agreed`` says whether
    the two annotators said the same by that count.

    ``tuned`` marks the even-numbered prompts, on which our phrases were chosen: read accuracy off
    the others.

    Args:
        folder: local copies of the CSV files (those that are there are read); empty: the pinned
            files are downloaded to the cache.

    Raises `SourceUnavailable` when they can neither be found nor downloaded.
    """
    paths = {
        name: Path(folder) / _filename(name) if folder else _downloaded(name, sha256)
        for name, sha256 in OTHERS["xstest"]["files"].items()
    }
    tables = [
        pd.read_csv(path, dtype=str, keep_default_na=False).assign(source=name)
        for name, path in paths.items()
        if path.is_file()
    ]
    if not tables:
        raise SourceUnavailable(
            f"{folder} holds none of {_filename('*')}: give the folder of XSTest's "
            "model_completions."
        )
    rows = pd.concat(tables, ignore_index=True).rename(columns={"completion": "answer"})
    final, first, second = (
        rows[name].str[0] for name in ("final_label", "annotation_1", "annotation_2")
    )
    rows = rows.assign(
        label=np.where(final == "1", "comply", "refuse"),
        partial=final == "3",
        agreed=(first == "1") == (second == "1"),
        tuned=rows["id"].str.extract(r"(\d+)$")[0].astype(int) % 2 == 0,
    )
    return rows[["id", "prompt", "answer", "label", "partial", "agreed", "source", "tuned"]]


def _filename(name: str) -> str:
    return f"xstest_v2_completions_{name}.csv"


def _downloaded(name: str, sha256: str) -> Path:
    url = OTHERS["xstest"]["url"] + _filename(name)
    try:
        return download("xstest-completions", url, sha256)
    except SourceUnavailable as error:
        raise SourceUnavailable(
            f"{str(error).rpartition(': ')[0]}: give the folder of XSTest's model_completions."
        ) from error
