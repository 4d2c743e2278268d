"""Templates as the families' chat models have them: one prompt, one answer, the same everywhere."""

import pytest
import toys
import transformers as hf

from cdelta.models.chat import chat_ids, collate, example_ids, pad_id, stop_ids
from cdelta.models.generation import answer
from cdelta.models.loading import check_model, load_model
from cdelta.models.templates import template_facts

PROMPT, ANSWER = "How do I steal the bench?", "I'm sorry, but no."


@pytest.fixture(scope="module")
def subjects(tmp_path_factory):
    """Family -> model and tokenizer that behave as its chat models'; made once."""
    return {
        name: load_model(toys.family_folder(name, tmp_path_factory.mktemp(name)), "float32", "cpu")
        for name in toys.FAMILIES
    }


@pytest.mark.long
def test_a_prompt_begins_once_and_an_answer_ends_once(subjects, family):
    model, tok = subjects[family]
    stops = stop_ids(model, tok)
    start, labels = example_ids(tok, PROMPT, ANSWER, stops)
    assert start == chat_ids(tok, PROMPT)
    assert start.count(tok.bos_token_id) == (toys.STYLES[family].bos != "")
    assert labels[-1] == tok.convert_tokens_to_ids(toys.STYLES[family].end)
    assert not set(labels[:-1]) & set(stops)
    assert tok.decode(labels[:-1]).strip() == ANSWER


def test_an_answer_as_ids_is_the_answer_as_text(subjects, family):
    model, tok = subjects[family]
    stops = stop_ids(model, tok)
    start, labels = example_ids(tok, PROMPT, ANSWER, stops)
    assert example_ids(tok, PROMPT, labels[:-1], stops) == (start, labels)
    assert example_ids(tok, PROMPT, ANSWER, stops, finished=False) == (start, labels[:-1])


def test_every_end_token_ends_an_answer(subjects, family):
    model, tok = subjects[family]
    free = answer(model, tok, [PROMPT], max_new_tokens=3)[0]
    assert len(free.ids) == 3 and not free.finished
    for end in stop_ids(model, tok):
        assert example_ids(tok, PROMPT, [*free.ids, end, 9], [end])[1] == [*free.ids, end]


def test_a_system_prompt_comes_first_in_every_family(subjects, family):
    _, tok = subjects[family]
    text = tok.decode(chat_ids(tok, PROMPT, "Be kind."))
    assert text.index("Be kind.") < text.index(PROMPT)
    if tok.chat_template:
        assert template_facts(tok).takes_system == (family != "gemma2")


def test_what_each_template_does_is_known(subjects):
    facts = {name: template_facts(tok) for name, (_, tok) in subjects.items() if name != "gpt2"}
    assert [name for name, each in facts.items() if each.reasons] == ["qwen3"]
    assert [name for name, each in facts.items() if each.date] == ["llama"]
    assert facts["qwen3"].prefix == "<think>\n\n</think>\n\n"
    assert all(not each.prefix for name, each in facts.items() if name != "qwen3")


def test_check_finds_no_problem_in_any_family(tmp_path, family):
    found = check_model(toys.family_folder(family, tmp_path), dtype="float32", device="cpu")
    assert [each.text for each in found if each.level == "problem"] == []


def test_the_saved_tokenizer_writes_the_same(subjects, family, tmp_path):
    _, tok = subjects[family]
    tok.save_pretrained(tmp_path)
    assert chat_ids(hf.AutoTokenizer.from_pretrained(tmp_path), PROMPT) == chat_ids(tok, PROMPT)


def test_collate_puts_answers_last(subjects):
    model, tok = subjects["llama"]
    batch = collate([([5, 6, 7], [8, 2]), ([5], [9, 9, 2])], pad_id(model, tok))
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 2], [2, 2, 5, 9, 9]]
    assert batch.labels.tolist() == [[8, 2, -100], [9, 9, 2]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 0], [0, 0, 1, 1, 1]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 3], [0, 0, 0, 1, 2]]
