"""What a user's model can do wrong: every fault is one sentence, or is not one any more."""

import json
from datetime import datetime

import pytest
import torch
import toys
import transformers as hf
from safetensors.torch import load_file, save_file

from cdelta.errors import CdeltaError
from cdelta.models import chat
from cdelta.models.chat import by_length, chat_ids, example_ids
from cdelta.models.checkpoint import Checkpoint, read_config
from cdelta.models.generation import answer, checkpoint_penalties, first_logits
from cdelta.models.loading import check_model, load_model, resolve_device
from cdelta.models.spec import UnsupportedArchitecture
from cdelta.models.templates import bind_template, parse_template_args, template_facts

PROMPTS = ["make a cake", "tell me about red", "count one two please sort blue"]
THINKS = (
    "{% for m in messages %}<|{{ m['role'] }}|> {% if loop.last and m['role'] == 'assistant' %}"
    "<think> </think> {% endif %}{{ m['content'] }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% if enable_thinking is defined and "
    "enable_thinking is false %}<think> </think> {% endif %}{% endif %}"
)


def with_template(template: str | None):
    tok = toys.toy_tokenizer()
    tok.chat_template = template
    return tok


def edited_config(folder, **changes):
    """Change config.json of a checkpoint; returns the folder."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def problems(folder, **options) -> list[str]:
    options = {"dtype": "float32", "device": "cpu"} | options
    return [each.text for each in check_model(folder, **options) if each.level == "problem"]


# ---------------------------------------------------------------------- answers are ids


def test_fault_01_an_answer_that_was_cut_gets_no_end_token(tokenizer):
    for given in ("song story", tokenizer("song story")["input_ids"]):
        cut = example_ids(tokenizer, "red", given, [1], finished=False)
        ended = example_ids(tokenizer, "red", given, [1], finished=True)
        assert tokenizer.decode(cut[1]) == "song story"
        assert tokenizer.decode(ended[1]) == "song story <eos>"
        assert cut[0] == ended[0]


def test_fault_01_an_empty_answer_that_was_cut_is_refused(tokenizer):
    with pytest.raises(CdeltaError, match="is empty"):
        example_ids(tokenizer, "red", (), [1], finished=False)
    assert example_ids(tokenizer, "red", (), [1])[1] == [1]


def test_fault_01_generation_says_which_answers_ended(llama, tokenizer):
    model = toys.toy("llama")
    free = answer(model, tokenizer, PROMPTS, max_new_tokens=3)
    model.generation_config.eos_token_id = free[0].ids[2]
    first, *others = answer(model, tokenizer, PROMPTS, max_new_tokens=3)
    assert first.finished and first.ids == free[0].ids[: len(first.ids)] and len(first.ids) < 3
    assert all(each.finished or len(each.ids) == 3 for each in others)
    assert all(not each.finished and each.n_tokens == 3 for each in free)


@pytest.mark.parametrize("template", [toys.TEMPLATE, None])
def test_fault_02_labels_are_the_generated_ids(tmp_path, template):
    folder = toys.save_chat_toy(tmp_path, ["I like red songs. Tell me more!"], "gpt2", 300)
    model, tok = load_model(folder, dtype="float32", device="cpu")
    tok.chat_template = template
    for prompt, found in zip(PROMPTS, answer(model, tok, PROMPTS, max_new_tokens=6)):
        start, labels = example_ids(tok, prompt, found.ids, [1], found.finished)
        assert labels == [*found.ids, *([1] if found.finished else [])]
        assert start == chat_ids(tok, prompt)


def test_fault_02_a_written_answer_has_the_space_that_the_prompt_asks_for(tmp_path):
    folder = toys.save_chat_toy(
        tmp_path, ["User: hi\nAssistant: I like I like I like"], "gpt2", 300
    )
    tok = hf.AutoTokenizer.from_pretrained(folder)
    tok.chat_template = None
    assert tok.decode(example_ids(tok, "hi", "I like", [1])[1]) == " I like<eos>"


# ---------------------------------------------------------------------- templates


def test_fault_03_thinking_is_skipped_to_where_the_answer_begins():
    plain, told = with_template(THINKS), bind_template(with_template(THINKS), enable_thinking=False)
    assert template_facts(plain).reasons and not template_facts(told).prefix
    assert chat_ids(plain, "red") == chat_ids(told, "red")
    for tok in (plain, told):
        start, labels = example_ids(tok, "red", "song", [1])
        assert tok.decode(labels) == "song <eos>"
        assert start == chat_ids(tok, "red")


def test_fault_03_a_template_that_opens_the_reasoning_has_it_closed():
    template = toys.TEMPLATE.replace("<|assistant|> {% endif", "<|assistant|> <think>\n{% endif")
    tok = with_template(template)
    assert template_facts(tok).prefix == "\n</think>\n\n" and template_facts(tok).reasons
    assert example_ids(tok, "red", "song", [1])[1][-1] == 1


def test_fault_03_asking_for_reasoning_is_refused():
    tok = bind_template(with_template(THINKS), enable_thinking=True)
    with pytest.raises(CdeltaError, match="enable_thinking=True asks for reasoning"):
        chat_ids(tok, "red")


def test_fault_03_template_arguments_are_json_or_words():
    found = parse_template_args(["enable_thinking=false", "tone=kind", "n=3"])
    assert found == {"enable_thinking": False, "tone": "kind", "n": 3}
    with pytest.raises(CdeltaError, match="NAME=VALUE"):
        parse_template_args(["enable_thinking"])


@pytest.mark.parametrize("name", ["messages", "tokenize", "add_generation_prompt", "return_dict"])
def test_fault_03_keywords_that_are_not_the_templates_are_refused(name):
    tok = bind_template(toys.toy_tokenizer(), **{name: True})
    with pytest.raises(CdeltaError, match=f"{name}=True is none of the template's own keywords"):
        chat_ids(tok, "red")


def test_fault_03_the_same_prompt_reaches_metric_generation_and_training(llama):
    tok = bind_template(with_template(toys.TEMPLATE), system="please")
    ids = chat_ids(tok, "red")
    assert tok.decode(ids).index("please") < tok.decode(ids).index("red")
    assert example_ids(tok, "red", "song", [1])[0] == ids
    (rows, batch, mask), *_ = chat.batches(llama, tok, ["red"], 4)
    assert batch[0].tolist() == ids
    assert chat_ids(tok, "red", system="make") != ids


@pytest.mark.parametrize(
    "template",
    [
        toys.TEMPLATE.replace("<|{{", "{% if m['role'] == 'system' %}{{ 1 / 0 }}{% endif %}<|{{"),
        toys.TEMPLATE.replace("in messages %}", "in messages if m['role'] != 'system' %}"),
    ],
    ids=["rejected", "dropped"],
)  # fmt: skip
def test_fault_03_a_system_prompt_is_never_lost(template):
    tok = with_template(template)
    assert not template_facts(tok).takes_system
    assert "please red" in tok.decode(chat_ids(tok, "red", system="please"))


def test_fault_03_a_template_that_ignores_the_generation_prompt_gets_its_role():
    template = "{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }} {% endfor %}"
    tok = with_template(template)
    assert tok.decode(chat_ids(tok, "red")) == "<|user|> red <|assistant|>"
    assert tok.decode(example_ids(tok, "red", "song", [1])[1]) == "song <eos>"


@pytest.mark.parametrize("how", ["strftime_now('%d %b %Y')", 'strftime_now( "%Y-%m-%d" )'])
def test_dates_in_templates_are_frozen(monkeypatch, how):
    tok = with_template("{% set today = " + how + " %}{{ today }} " + toys.TEMPLATE)
    facts = template_facts(tok)
    assert facts.date in ("26 Jul 2024", "2024-07-26")
    assert datetime.now().strftime("%Y-%m-%d") not in tok.decode(chat_ids(tok, "red"))
    assert template_facts(with_template(toys.TEMPLATE)).date == ""


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no') }}",
        "{% for m in messages %}",
        "{{ messages[5].content }}",
        "{{ 1 / 0 }}",
        "hello",
        "",
        "{{ messages | nosuchfilter }}",
        {"default": 3},
    ],
)
def test_fault_16_a_template_that_fails_is_one_sentence(tmp_path, template):
    tok = with_template(template)
    with pytest.raises(CdeltaError, match="template"):
        chat_ids(tok, "red")
    if isinstance(template, str) and template:
        folder = toys.save_toy(tmp_path)
        tok.save_pretrained(folder)
        assert [each for each in problems(folder) if "template" in each] == problems(folder)[:1]


# ---------------------------------------------------------------------- batches


def longrope(**more):
    factors = {"short_factor": [1.0] * 4, "long_factor": [9.0] * 4}
    return toys.toy(
        "phi3",
        rope_parameters={"rope_type": "longrope", "rope_theta": 10000.0, **factors}
        | {"original_max_position_embeddings": 16, "partial_rotary_factor": 1.0},
        original_max_position_embeddings=16,
        **more,
    )


def test_fault_07_rows_beyond_the_original_context_leave_the_others_alone(tokenizer):
    model = longrope()
    prompts = [" ".join(["red"] * n) for n in (4, 9, 10, 11, 12, 24)]
    alone, together = (
        answer(model, tokenizer, prompts, max_new_tokens=6, batch_size=size) for size in (1, 6)
    )
    assert [each.ids for each in alone] == [each.ids for each in together]
    one, six = (first_logits(model, tokenizer, prompts, batch_size=size) for size in (1, 6))
    assert torch.allclose(one, six, atol=1e-4)


def test_fault_07_crossing_the_boundary_equals_hugging_faces_generate(tokenizer):
    model = longrope()
    ids = chat_ids(tokenizer, " ".join(["red"] * 10))
    found = answer(model, tokenizer, [" ".join(["red"] * 10)], max_new_tokens=8)[0].ids
    theirs = model.generate(
        torch.tensor([ids]), max_new_tokens=8, do_sample=False, eos_token_id=1, pad_token_id=1
    )
    assert list(found) == theirs[0, len(ids) :].tolist()[: len(found)]


def test_fault_07_batches_never_mix_the_two_sides():
    lengths = [3, 20, 15, 16, 17, 12, 16]
    for growth in (0, 4):
        for batch in by_length(lengths, 10, boundary=16, growth=growth):
            sizes = [lengths[row] for row in batch]
            assert all(n <= 16 for n in sizes) or all(n > 16 for n in sizes)
            if growth and any(n <= 16 < n + growth for n in sizes):
                assert len(set(sizes)) == 1
    assert sorted(sum(by_length(lengths, 2, 16), [])) == list(range(7))


def test_fault_08_penalties_of_the_checkpoint_are_named_and_offered(tokenizer, tmp_path):
    model = toys.toy("llama")
    assert checkpoint_penalties(model) == {}
    model.generation_config.repetition_penalty = 1.8
    model.generation_config.no_repeat_ngram_size = 2
    assert set(checkpoint_penalties(model)) == {"repetition_penalty", "no_repeat_ngram_size"}
    for prompt in PROMPTS:
        ids = torch.tensor([chat_ids(tokenizer, prompt)])
        theirs = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=1)
        found = answer(model, tokenizer, PROMPTS, max_new_tokens=8, penalties=True)
        ours = found[PROMPTS.index(prompt)]
        assert list(ours.ids) == theirs[0, ids.shape[1] :].tolist()[: len(ours.ids)]
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert any("repetition_penalty" in each.text for each in check_model(tmp_path, device="cpu"))


def test_fault_14_a_padding_token_without_an_embedding_is_not_used(llama):
    tok = toys.toy_tokenizer()
    tok.add_special_tokens({"pad_token": "[PAD]"})
    tok.add_tokens([f"new{i}" for i in range(toys.VOCAB)])
    tok.pad_token = f"new{toys.VOCAB - 1}"
    assert tok.pad_token_id >= toys.VOCAB
    assert chat.pad_id(llama, tok) == 1
    assert len(answer(llama, tok, PROMPTS, max_new_tokens=2)) == 3


def test_fault_27_logits_are_reduced_where_they_are(llama, tokenizer):
    whole = first_logits(llama, tokenizer, PROMPTS)
    few = first_logits(llama, tokenizer, PROMPTS, batch_size=2, read=lambda x: x[:, [3, 7]])
    assert few.shape == (3, 2) and torch.allclose(few, whole[:, [3, 7]], atol=1e-5)
    best = first_logits(llama, tokenizer, PROMPTS, read=lambda x: x.argmax(-1))
    assert best.tolist() == whole.argmax(-1).tolist()


def test_prompts_that_do_not_fit_are_refused_before_the_first_answer(tokenizer):
    model = toys.toy("gpt2")
    with pytest.raises(CdeltaError, match="exceed the model's context of 64"):
        answer(model, tokenizer, ["red", " ".join(["red"] * 60)], max_new_tokens=8)


# ---------------------------------------------------------------------- checkpoints


def gemma3_in_the_hubs_layout(folder):
    text = dict(
        vocab_size=toys.VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=64,
    )  # fmt: skip
    vision = dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        image_size=28, patch_size=14, vision_use_head=False,
    )  # fmt: skip
    model = hf.Gemma3ForConditionalGeneration(
        hf.Gemma3Config(text_config=text, vision_config=vision)
    )
    model.save_pretrained(folder)
    toys.toy_tokenizer().save_pretrained(folder)
    tensors = {
        name.replace("vision_tower.", "vision_tower.vision_model."): tensor.clone()
        for name, tensor in load_file(folder / "model.safetensors").items()
    }
    assert any(name.startswith("vision_tower.vision_model.encoder") for name in tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return model


def test_fault_09_gemma_3_of_the_hub_opens(tmp_path):
    model = gemma3_in_the_hubs_layout(tmp_path)
    found = dict(Checkpoint(tmp_path).check().parameters())
    assert found.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(found[name], p) for name, p in model.named_parameters())
    assert problems(tmp_path) == []
    loaded, _ = load_model(tmp_path, dtype="float32", device="cpu")
    assert all(torch.equal(found[name], p) for name, p in loaded.named_parameters())


def test_fault_09_a_mixture_of_experts_is_told_so_first(tmp_path):
    folder = toys.save_toy(tmp_path)
    edited_config(folder, model_type="mixtral", num_local_experts=8)
    with pytest.raises(UnsupportedArchitecture, match="mixture of experts"):
        Checkpoint(folder).check()
    with pytest.raises(UnsupportedArchitecture, match="mixture of experts"):
        load_model(folder)
    assert "mixture of experts" in problems(folder)[0]


@pytest.mark.parametrize("device", ["cuda:7", "gpu", "", "cuda:-1", "npu", "meta", "cpu:x"])
def test_fault_11_devices_that_are_not_there(checkpoint, device):
    if device.startswith("cuda") and torch.cuda.device_count() > 7:
        pytest.skip("a machine with eight GPUs")
    with pytest.raises(CdeltaError, match="device"):
        load_model(checkpoint, device=device)
    assert any("device" in text for text in problems(checkpoint, device=device))


def test_fault_11_devices_that_are_there():
    assert resolve_device("cpu").type == "cpu"
    assert resolve_device("auto").type in ("cpu", "cuda")


def test_fault_12_a_dtype_that_rounds_the_weights_is_said_before(tmp_path):
    folder = toys.save_toy(tmp_path, dtype=torch.bfloat16)
    found = check_model(folder, dtype="float16", device="cpu")
    assert any(each.level == "warning" and "rounded to float16" in each.text for each in found)
    assert not any("rounded" in each.text for each in check_model(folder, dtype="bfloat16"))


@pytest.mark.parametrize("dtype", ["int8", "float99", "Tensor", "", "uint8"])
def test_fault_12_words_that_are_no_dtype(checkpoint, dtype):
    with pytest.raises(CdeltaError, match="unknown dtype"):
        load_model(checkpoint, dtype=dtype, device="cpu")


def test_fault_13_tied_in_the_configuration_and_another_head_on_disk(tmp_path):
    folder = edited_config(toys.save_toy(tmp_path), tie_word_embeddings=True)
    for call in (lambda: load_model(folder, device="cpu"), lambda: Checkpoint(folder).check()):
        with pytest.raises(CdeltaError, match="tie_word_embeddings to false"):
            call()
    assert any("tie_word_embeddings" in text for text in problems(folder))


def test_fault_13_a_copy_of_the_embedding_is_no_conflict(tmp_path):
    folder = edited_config(toys.save_toy(tmp_path), tie_word_embeddings=True)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert problems(folder) == []
    assert load_model(folder, device="cpu")[0].lm_head.weight is not None


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "nosuch"},
        {"model_type": ["llama"]},
        {"model_type": None},
        {"hidden_size": "x"},
        {"num_attention_heads": 0},
        {"num_hidden_layers": -1},
        {"vocab_size": None},
        {"rope_parameters": {"rope_type": "nosuch"}},
        {"num_hidden_layers": 4},
        {"intermediate_size": 40},
        {"hidden_act": "nosuch"},
        {"text_config": 3},
    ],
    ids=str,
)
def test_fault_15_an_odd_configuration_is_one_sentence(tmp_path, changes):
    folder = edited_config(toys.save_toy(tmp_path), **changes)
    found = problems(folder)
    if changes == {"text_config": 3}:
        return  # a field that Llama does not have
    assert len(found) == 1 and "upgrade" not in found[0] and "\n" not in found[0]
    with pytest.raises(CdeltaError):
        load_model(folder, dtype="float32", device="cpu")
    with pytest.raises(CdeltaError):
        Checkpoint(folder).check()


@pytest.mark.parametrize("content", ["", "{", "[1]", "null", '"llama"', "\x00"])
def test_fault_15_a_damaged_configuration_is_one_sentence(tmp_path, content):
    folder = toys.save_toy(tmp_path)
    (folder / "config.json").write_text(content)
    with pytest.raises(CdeltaError, match="config.json.*copy it again"):
        read_config(folder)
    assert len(problems(folder)) == 1


@pytest.mark.parametrize("end", ["<eos>", [1, "x"], 1.5, True])
def test_fault_15_an_end_that_is_no_token_id_is_one_sentence(tmp_path, end):
    folder = toys.save_toy(tmp_path)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))
    assert ["mend or remove it" in text for text in problems(folder)] == [True]


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_fault_15_a_damaged_tokenizer_has_a_remedy(tmp_path, file):
    folder = toys.save_toy(tmp_path)
    (folder / file).write_text("{}" if file == "tokenizer.json" else "[3]")
    assert ["copy its tokenizer files again" in text for text in problems(folder)] == [True]


def test_fault_17_a_git_lfs_pointer_is_named(tmp_path):
    folder = toys.save_toy(tmp_path)
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid x\n")
    with pytest.raises(CdeltaError, match="git lfs pull"):
        Checkpoint(folder).check()


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq", "fp8", "unheard-of"])
def test_fault_18_a_quantised_base_is_refused_first(tmp_path, method):
    folder = edited_config(
        toys.save_toy(tmp_path), quantization_config={"quant_method": method, "bits": 4}
    )
    for call in (lambda: load_model(folder), lambda: Checkpoint(folder).check()):
        with pytest.raises(CdeltaError, match="use the unquantised checkpoint"):
            call()
    assert "unquantised" in problems(folder)[0]


def test_a_missing_licence_is_said(monkeypatch, checkpoint):
    def gated(*args, **kw):
        raise OSError("You are trying to access a gated repo.\nMake sure to have access")

    monkeypatch.setattr(hf.AutoTokenizer, "from_pretrained", gated)
    with pytest.raises(CdeltaError, match="hf auth login"):
        load_model(checkpoint, device="cpu")


def test_check_of_a_good_checkpoint_finds_facts_only(checkpoint, tmp_path):
    found = check_model(
        checkpoint,
        dtype="float32",
        device="cpu",
        prompts=PROMPTS,
        max_new_tokens=8,
        out=tmp_path / "x",
    )
    assert {each.level for each in found} == {"fact"}
    assert any("llama" in each.text and "3 layers" in each.text for each in found)
    assert problems(checkpoint, prompts=[" ".join(["red"] * 80)], max_new_tokens=8)


def test_check_counts_memory_and_disk(checkpoint, monkeypatch, tmp_path):
    monkeypatch.setattr("cdelta.models.loading.free_memory", lambda device: 1000)
    monkeypatch.setattr("shutil.disk_usage", lambda place: type("Usage", (), {"free": 1000}))
    found = problems(checkpoint, out=tmp_path / "a" / "b")
    assert sum("left" in text for text in found) == 2


def test_check_of_tokens_outside_the_embedding(tmp_path):
    folder = toys.save_toy(tmp_path)
    tok = toys.toy_tokenizer()
    tok.add_tokens([f"new{i}" for i in range(toys.VOCAB)])
    tok.chat_template = toys.TEMPLATE.replace("<|{{", f"new{toys.VOCAB - 1} <|{{{{")
    tok.save_pretrained(folder)
    assert any("embedding has 96 rows" in text for text in problems(folder))
