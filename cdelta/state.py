"""The state of long work, from which a killed run goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from cdelta.errors import CdeltaError, first_line
from cdelta.files import replacing

if TYPE_CHECKING:
    from torch import Tensor

HASHED_AT_ONCE = 1 << 24


@dataclass(frozen=True)
class StateFile:
    """What long work has reached, in one safetensors file that is replaced atomically.

    `identity` says which run it belongs to.
    """

    path: Path
    identity: str

    def write(self, tensors: Mapping[str, Tensor], facts: Mapping[str, object]) -> None:
        """Replace the state."""
        header = {"identity": self.identity, "facts": json.dumps(facts)}
        tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
        header["sha256"] = _content_hash(tensors, header)
        with replacing(self.path) as partial:
            save_file(tensors, partial, metadata=header)

    def read(self) -> tuple[dict[str, Tensor], dict] | None:
        """The state, or None if there is none yet. Raises `CdeltaError` if it is damaged or another
        run's.
        """
        if not self.path.is_file():
            return None
        try:
            with safe_open(self.path, framework="pt") as file:
                header, names = file.metadata(), list(file.keys())
                tensors = {name: file.get_tensor(name) for name in names}
                if header.pop("sha256", "") != _content_hash(tensors, header):
                    raise OSError("its checksum is another")
        except (SafetensorError, OSError, AttributeError) as error:
            raise CdeltaError(
                f"the state of a begun run {self.path} is damaged ({first_line(error)}): "
                "remove it and start again."
            ) from error
        if header["identity"] != self.identity:
            raise CdeltaError(
                f"{self.path} belongs to a run with other data, mask or settings: "
                "choose another checkpoint folder."
            )
        return tensors, json.loads(header["facts"])


def _content_hash(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    add_tensors(digest, sorted(tensors.items()))
    return digest.hexdigest()


def add_tensors(digest: hashlib._Hash, named: Iterable[tuple[str, Tensor]]) -> None:
    """Names, dtypes, shapes and bits into a digest."""
    for name, tensor in named:
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        for chunk in tensor.detach().reshape(-1).split(HASHED_AT_ONCE):
            digest.update(chunk.cpu().contiguous().view(torch.uint8).numpy().data)
