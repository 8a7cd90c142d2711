"""Losses between a compressed model's logits and the dense model's."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from basiscli.transforms import KVCompression

_LOSS_TOKENS = 64


def loss_and_gradient(method: KVCompression, student: Tensor, teacher: Tensor, labels: Tensor) -> tuple[float, Tensor]:
    """Return a method's loss, mean over counted tokens, and its gradient [windows, tokens, vocabulary].

    Args:
        method: has the loss.
        student: logits of the compressed model [windows, tokens, vocabulary].
        teacher: logits of the dense model, the same shape.
        labels: next tokens [windows, tokens]; −100 where a token does not count.
    """
    total, gradient = 0.0, torch.zeros_like(student)
    for rows, share in _blocks(labels):
        logits = student.flatten(0, 1)[rows].float().requires_grad_(True)
        with torch.enable_grad():
            loss = method.loss(logits, teacher.flatten(0, 1)[rows].float(), labels.flatten()[rows]) * share
        loss.backward()
        assert logits.grad is not None
        gradient.view(-1, gradient.shape[-1])[rows] = logits.grad.to(gradient.dtype)
        total += loss.item()
    return total, gradient


def loss_alone(method: KVCompression, student: Tensor, teacher: Tensor, labels: Tensor) -> float:
    """Return the loss of `loss_and_gradient` without its gradient."""
    total = 0.0
    with torch.no_grad():
        for rows, share in _blocks(labels):
            logits, dense = (x.flatten(0, 1)[rows].float() for x in (student, teacher))
            total += (method.loss(logits, dense, labels.flatten()[rows]) * share).item()
    return total


def _blocks(labels: Tensor) -> Iterator[tuple[Tensor, float]]:
    """Yield indices of a block of counted tokens, and the block's share of all.

    With a vocabulary of 50,000 the intermediate results of a whole batch take more memory and time than the model.
    """
    rows = (labels.flatten() != -100).nonzero().squeeze(1)
    for part in rows.split(_LOSS_TOKENS):
        yield part, len(part) / len(rows)


def divergence(student: Tensor, teacher: Tensor, labels: Tensor) -> float:
    """Return KL(dense ‖ compressed) in nats, summed over counted tokens, of logits [windows, tokens, vocabulary]."""
    total = 0.0
    for q, p, label in zip(student, teacher, labels.to(student.device), strict=True):
        log_p, log_q = p.float().log_softmax(-1), q.float().log_softmax(-1)
        each = (log_p.exp() * (log_p - log_q)).sum(-1)
        total += float(each[label != -100].sum(dtype=torch.float64))
    return total
