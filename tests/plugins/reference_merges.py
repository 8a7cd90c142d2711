"""The merge family in numpy and float64, one tensor at a time, written from the papers' formulas and mergekit's rules.

Nothing here is shared with the product: whole arrays are sorted, masks are made by index, and points on the sphere are
moved about as vectors.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def trim(delta: Array, density: float) -> Array:
    """Keep the share with the largest magnitudes, the first of equal ones."""
    if density >= 1:
        return delta
    kept = np.zeros(delta.size)
    if density > 0 and delta.size:
        order = np.lexsort((np.arange(delta.size), -np.abs(delta.ravel())))
        kept[order[: max(1, int(density * delta.size))]] = 1
    return delta * kept.reshape(delta.shape)


def breadcrumb(delta: Array, density: float, gamma: float) -> Array:
    """Drop the largest, keep the share next to them."""
    if density >= 1:
        return delta
    order = np.lexsort((np.arange(delta.size), -np.abs(delta.ravel())))
    target = int(density * delta.size)
    top = min(int(gamma * delta.size), delta.size - target)
    kept = np.zeros(delta.size)
    kept[order[top : top + target]] = 1
    return delta * kept.reshape(delta.shape)


def to_old_length(before: Array, after: Array) -> Array:
    """Scale to the old sum of magnitudes."""
    old, new = np.abs(before).sum(), np.abs(after).sum()
    return after * (old / new) if min(old, new) >= 1e-7 else after


def consensus(deltas: list[Array], weights: list[float], normalize: bool) -> Array:
    """TIES: the signed majority's sum, and its mean."""
    stack = np.stack([w * d for w, d in zip(weights, deltas, strict=True)])
    sign = np.where(stack.sum(0) >= 0, 1, -1)
    agrees = np.sign(stack) == sign
    total = (stack * agrees).sum(0)
    if not normalize:
        return np.asarray(total)
    divisor = sum(w * a for w, a in zip(weights, agrees, strict=True))
    return np.asarray(total / np.where(divisor == 0, 1, divisor))


def plain_sum(deltas: list[Array], weights: list[float], normalize: bool) -> Array:
    total = np.asarray(sum(w * d for w, d in zip(weights, deltas, strict=True)))
    return total / sum(weights) if normalize else total


def sce(deltas: list[Array], share: float) -> Array:
    stack = np.stack(deltas)
    if share < 1:
        variance = stack.var(axis=0)
        wanted = int(np.count_nonzero(variance) * share)
        mask = np.zeros(variance.size)
        mask[np.argsort(-variance.ravel(), kind="stable")[:wanted]] = 1
        stack = stack * mask.reshape(variance.shape)
    energy = np.array([(x**2).mean() if x.size else 0.0 for x in stack])
    weights = energy / energy.sum() if energy.sum() >= 1e-6 else np.full(len(stack), 1 / len(stack))
    agrees = np.sign(stack) == np.where(stack.sum(0) >= 0, 1, -1)
    shares = weights.reshape(-1, *[1] * (stack.ndim - 1)) * agrees
    return np.asarray((stack * shares).sum(0) / np.maximum(shares.sum(0), 1e-6))


def arc(x: Array, y: Array, t: float, collinear: float) -> Array:
    """Interpolate two flat vectors along the arc between them."""
    lengths = np.linalg.norm(x) * np.linalg.norm(y)
    cosine = float(np.clip(x @ y / lengths, -1, 1)) if lengths > 0 else 0.0
    if abs(cosine) >= collinear:
        return (1 - t) * x + t * y
    theta = np.arccos(cosine)
    return np.asarray((np.sin((1 - t) * theta) * x + np.sin(t * theta) * y) / np.sin(theta))


def arcs(x: Array, y: Array, t: float, axis: int) -> Array:
    """Interpolate vector by vector along an axis."""
    if x.size == 0:
        return x
    axis = axis if x.ndim else 0
    x, y = np.atleast_1d(x), np.atleast_1d(y)
    rows_of_x, rows_of_y = (np.moveaxis(z, axis, -1).reshape(-1, z.shape[axis]) for z in (x, y))
    rows = [arc(a, b, t, 1 - 1e-6) for a, b in zip(rows_of_x, rows_of_y, strict=True)]
    moved = np.moveaxis(x, axis, -1).shape
    return np.asarray(np.moveaxis(np.stack(rows).reshape(moved), -1, axis))


def multislerp(models: list[Array], weights: list[float]) -> Array:
    """Step through the tangent space, as the method is described."""
    norms = [float(np.linalg.norm(x)) for x in models]
    units = [x / n if n else x for x, n in zip(models, norms, strict=True)]
    share = np.array(weights) / sum(weights)
    mean = sum(s * u for s, u in zip(share, units, strict=True))
    length = np.linalg.norm(mean)
    if length < 1e-8:
        return np.asarray(sum(s * x for s, x in zip(share, models, strict=True)))
    mean = mean / length
    tangent = sum(s * (u - (u * mean).sum() * mean) for s, u in zip(share, units, strict=True))
    angle = np.linalg.norm(tangent)
    point = mean if angle < 1e-12 else np.cos(angle) * mean + np.sin(angle) * tangent / angle
    return np.asarray(point * float(share @ norms))


def karcher(models: list[Array], steps: int = 200) -> Array:
    """Move the mean in the tangent space until it rests."""
    norms = [float(np.linalg.norm(x)) for x in models]
    units = [x / n for x, n in zip(models, norms, strict=True) if n > 1e-5]
    if not units:
        return np.zeros_like(models[0])
    mean = sum(units) / np.linalg.norm(sum(units))
    for _ in range(steps):
        logs = []
        for unit in units:
            cosine = np.clip((mean * unit).sum(), -1, 1)
            flat = unit - cosine * mean
            logs.append(np.arccos(cosine) * flat / max(np.linalg.norm(flat), 1e-300))
        step = sum(logs) / len(logs)
        length = np.linalg.norm(step)
        if length < 1e-12:
            break
        mean = np.cos(length) * mean + np.sin(length) * step / length
    return np.asarray(mean * np.mean(norms))


def stock(base: Array, models: list[Array], filter_wise: bool) -> Array:
    shape = base.shape
    rows = lambda x: x.reshape(-1, shape[-1]) if filter_wise and len(shape) > 1 else x.reshape(1, -1)  # noqa: E731
    offsets = [rows(m - base) for m in models]
    cosines = []
    for i, x in enumerate(offsets):
        for y in offsets[i + 1 :]:
            lengths = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
            cosines.append(np.clip((x * y).sum(1) / np.maximum(lengths, 1e-6), -1, 1))
    cosine = np.mean(cosines, axis=0)[:, None]
    k = len(models)
    ratio = k * cosine / (1 + (k - 1) * cosine)
    return np.asarray(base + (ratio * np.mean(offsets, axis=0)).reshape(shape))


def fusion(first: Array, second: Array) -> Array:
    if first.size == 0:
        return first

    def softmax(x: Array) -> Array:
        powers = np.exp(x - x.max(axis=-1, keepdims=True))
        return np.asarray(powers / powers.sum(axis=-1, keepdims=True) + 1e-8)

    x, y = np.atleast_1d(first), np.atleast_1d(second)
    p, q = softmax(y), softmax(x)
    importance = np.abs(y - x) * np.maximum((p * np.log(p / q)).sum(axis=-1, keepdims=True), 0)
    ordered = np.sort(importance.ravel())
    lower, median, upper = (ordered[int(s * (ordered.size - 1))] for s in (0.25, 0.5, 0.75))
    return np.asarray(np.where(importance >= median + 1.5 * (upper - lower), y, x).reshape(first.shape))
