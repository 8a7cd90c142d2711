"""Output heads that are tied to an embedding: which they are, and what becomes of one that an input changes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol

from basiscli.checkpoints.digests import stored_digest
from basiscli.checkpoints.header import StoredTensor, TensorSpec
from basiscli.checkpoints.views import Checkpoint


class HasTensors(Protocol):
    """A checkpoint, or an adapter on one."""

    tensors: Any

    @property
    def config(self) -> dict[str, Any]: ...  # noqa: D102


_HEAD = re.compile(r"(^|\.)(lm_head|embed_out)\.weight$")
_EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|shared|embed_in)\.weight$")


def tied_pair(config: Mapping[str, Any], tensors: Mapping[str, TensorSpec]) -> tuple[str, str] | None:
    """Return the names (output head, embedding) of two stored tensors that the config may tie, else None.

    Whether they are tied is for their bytes to say: a config that leaves `tie_word_embeddings` out means its class's
    default, and old checkpoints store the same matrix twice.
    """
    if config.get("tie_word_embeddings") is False:
        return None
    embeddings = [name for name in tensors if _EMBEDDING.search(name)]
    for head in filter(_HEAD.search, tensors):
        for embedding in embeddings:
            if tensors[head].shape == tensors[embedding].shape:
                return head, embedding
    return None


def tied_head(checkpoint: Checkpoint) -> str | None:
    """Return the name of an output head that is stored byte for byte like the embedding it is tied to, else None."""
    pair = tied_pair(checkpoint.config, checkpoint.tensors)
    if pair is None:
        return None
    head, embedding = (checkpoint.tensors[name] for name in pair)
    return head.name if head.dtype == embedding.dtype and same_bytes(head, embedding) else None


def same_bytes(a: StoredTensor, b: StoredTensor) -> bool:
    """Return whether two tensors are stored alike; of files whose headers alone are here, they are taken to be.

    Of what transformers or PEFT saves of a tied pair, that nearly always is so.
    """
    hollow = any(t.file.stat().st_size < t.offset + t.nbytes for t in (a, b))
    return hollow or (a.file, a.offset) == (b.file, b.offset) or stored_digest(a) == stored_digest(b)


def show_head(model: HasTensors, head: str) -> None:
    """Let a model that stores an output head only as the embedding it is tied to have it under its own name."""
    if head in model.tensors or not _HEAD.search(head) or model.config.get("tie_word_embeddings") is False:
        return
    for name, embedding in list(model.tensors.items()):
        if _EMBEDDING.search(name):
            model.tensors[head] = replace(embedding, name=head)
            return
