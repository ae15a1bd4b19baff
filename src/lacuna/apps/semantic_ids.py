"""Semantic ids: each item's vector as three words, coarse to fine, so that items that are alike share their first ones.

Residual k-means (Juang & Gray 1982; for recommendation Luo et al. 2024, after the learned quantiser of Rajput et al.
2023): a level clusters what the levels before it left over.
"""

import re
import zlib
from collections import Counter
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from lacuna.config import UserError
from lacuna.documents import progress

LEVELS = "abc"
COLLISION_LEVEL = "d"
ROUNDS = 20
LEARNED_FROM = 2**17  # vectors that centres are learned from; all are assigned
CHUNK_VALUES = 2**24  # distances that are held at once
HASHED_WORDS, TITLE_CHANNELS = 2048, 256

Vectors = Float[np.ndarray, "item channel"]


def semantic_ids(vectors: Vectors, codebook: int, seed: int) -> list[tuple[str, ...]]:
    """Three words for each vector, of at most `codebook` a level; those of several items take one more, which tells
    them apart."""
    random, rest, words = np.random.default_rng(seed), np.asarray(vectors, np.float32), []
    with progress() as line:
        for level in line.track(LEVELS, description="Clustering vectors"):
            centres = k_means(rest[random.permutation(len(rest))[:LEARNED_FROM]], codebook, random)
            nearest = nearest_centres(rest, centres)
            rest = rest - centres[nearest]
            words.append([f"<{level}_{number}>" for number in nearest])
    ids = list(zip(*words, strict=True))
    shared, seen = Counter(ids), Counter[tuple[str, ...]]()
    for place, each in enumerate(ids):
        if shared[each] > 1:
            ids[place] = (*each, f"<{COLLISION_LEVEL}_{seen[each]}>")
            seen[each] += 1
    return ids


def k_means(points: Vectors, count: int, random: np.random.Generator) -> Float[np.ndarray, "centre channel"]:
    """Centres of at most `count` clusters (Lloyd 1982), begun as k-means++ does (Arthur & Vassilvitskii 2007); one that
    loses all its points moves to the point that is farthest from its own."""
    centres = points[random.integers(len(points), size=1)]
    distance = squared_distances(points, centres)[:, 0]
    while len(centres) < count and (total := distance.sum(dtype=np.float64)) > 0:
        chosen = points[random.choice(len(points), size=1, p=distance / total)]
        centres = np.concatenate([centres, chosen])
        distance = np.minimum(distance, squared_distances(points, chosen)[:, 0])
    for _ in range(ROUNDS):
        nearest = nearest_centres(points, centres)
        sizes = np.bincount(nearest, minlength=len(centres))
        order = np.argsort(nearest, kind="stable")
        starts = np.cumsum(sizes) - sizes
        held = sizes > 0
        moved = centres.copy()
        moved[held] = np.add.reduceat(points[order], starts[held]) / sizes[held, None]
        if not held.all():
            far = np.argsort(-np.square(points - centres[nearest]).sum(1), kind="stable")
            moved[~held] = points[far[: np.count_nonzero(~held)]]
        if np.array_equal(moved, centres):
            break
        centres = moved
    return centres


def squared_distances(points: Vectors, centres: Vectors) -> Float[np.ndarray, "item centre"]:
    """Distances as differences, not as expanded squares: a point on its centre is at exactly zero."""
    return np.stack([np.square(points - centre).sum(1) for centre in centres], 1)


def nearest_centres(points: Vectors, centres: Vectors) -> Int[np.ndarray, " item"]:
    """The centre of each point, the first of those that are equally near."""
    rows, offset = max(CHUNK_VALUES // len(centres), 1), np.square(centres).sum(1)
    chunks = (points[begin : begin + rows] for begin in range(0, len(points), rows))
    return np.concatenate([np.argmin(offset - 2 * chunk @ centres.T, 1) for chunk in chunks])


def nearest_vectors(
    vectors: Vectors, count: int
) -> tuple[Int[np.ndarray, "item near"], Float[np.ndarray, "item near"]]:
    """The `count` other vectors at the smallest angles to each, or all where there are fewer, and the cosines."""
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-6)
    rows, count, found = max(CHUNK_VALUES // len(unit), 1), min(count, len(unit) - 1), []
    with progress() as line:
        for begin in line.track(range(0, len(unit), rows), description="Comparing items"):
            cosines = unit[begin : begin + rows] @ unit.T
            cosines[np.arange(len(cosines)), np.arange(begin, begin + len(cosines))] = -np.inf
            near = np.argpartition(-cosines, count - 1, axis=1)[:, :count]
            found.append((near, np.take_along_axis(cosines, near, 1)))
    near, cosines = (np.concatenate(part) for part in zip(*found, strict=True))
    return near, cosines


def title_vectors(titles: Sequence[str]) -> Vectors:
    """Vectors of titles by the words they share: hashed counts, weighted by rarity, on their principal axes (latent
    semantic analysis, Deerwester et al. 1990).

    Raises:
        UserError: the titles hold no words.
    """
    counts = np.zeros((len(titles), HASHED_WORDS), np.float32)
    for row, title in enumerate(titles):
        for word in re.findall(r"\w+", title.lower()):
            counts[row, zlib.crc32(word.encode()) % HASHED_WORDS] += 1
    holders = np.count_nonzero(counts, axis=0)
    if not holders.any():
        raise UserError("the items have no titles with words to make semantic ids of; give --vectors FILE.npy")
    weighted = np.log1p(counts) * np.log((1 + len(titles)) / (1 + holders))
    weighted /= np.maximum(np.linalg.norm(weighted, axis=1, keepdims=True), 1e-6)
    values, axes = np.linalg.eigh(weighted.T @ weighted)
    kept = axes[:, np.argsort(-values, kind="stable")[:TITLE_CHANNELS]]
    return weighted @ (kept * np.where(kept[np.abs(kept).argmax(0), range(kept.shape[1])] < 0, -1, 1))
