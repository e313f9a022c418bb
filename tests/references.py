"""Slow second implementations, one sample and one class at a time, with derivatives taken by hand."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Recipe:
    """A row of the table in science reference 2.4, read anew: the product's table is not used.

    ``margin`` is "", "logit", "multiplicative", "cosine" or "angular"; ``magnitude`` is "", "ring", "os" or "symos".
    """

    head: str
    margin: str = ""
    entropic: bool = False
    magnitude: str = ""
    negatives: bool = False


RECIPES = {
    "softmax": Recipe("linear"),
    "eos": Recipe("linear", "", True, "", True),
    "os": Recipe("linear", "", True, "os", True),
    "sm_softmax": Recipe("linear", "logit"),
    "sphereface": Recipe("hard", "multiplicative"),
    "cosface": Recipe("hard", "cosine"),
    "arcface": Recipe("hard", "angular"),
    "sfn_norm": Recipe("soft", "", False, "ring"),
    "sfn_cosface": Recipe("soft", "cosine", False, "ring"),
    "sfn_arcface": Recipe("soft", "angular", False, "ring"),
    "norm_os": Recipe("soft", "", False, "symos", True),
    "cos_os": Recipe("soft", "cosine", False, "symos", True),
    "arc_os": Recipe("soft", "angular", False, "symos", True),
    "cos_os_nonsym": Recipe("soft", "cosine", False, "os", True),
    "arc_os_nonsym": Recipe("soft", "angular", False, "os", True),
    "norm_eos": Recipe("hard", "", True, "", True),
    "cos_eos": Recipe("hard", "cosine", True, "", True),
    "arc_eos": Recipe("hard", "angular", True, "", True),
    "cos_eos_sfn": Recipe("soft", "cosine", True, "ring", True),
    "arc_eos_sfn": Recipe("soft", "angular", True, "ring", True),
}


def margin_cosine(kind: str, cosine: float) -> float:
    """g(c) with the margins of table 5.2: 0.35, 0.5 and 1.2."""
    theta = math.acos(max(-1.0, min(1.0, cosine)))
    if kind == "cosine":
        return cosine - 0.35
    if kind == "angular":
        return math.cos(min(theta + 0.5, math.pi))
    if kind == "multiplicative":
        k = int(1.2 * theta // math.pi)
        return (-1) ** k * math.cos(1.2 * theta) - 2 * k
    return cosine


def loss_and_gradients(
    name: str, features: Array, centers: Array, labels: list[int], *, scale: float
) -> tuple[float, Array, Array]:
    """Loss of a batch, its gradient for the features (N, D) and for the stored centers (C, D).

    lambda = .01, logit margin .3. The derivative of the target's cosine is that of the plain cosine (section 2.2).
    """
    recipe = RECIPES[name]
    count = len(labels) if recipe.negatives else sum(label >= 0 for label in labels)
    number_of_classes = len(centers)
    total = 0.0
    by_features, by_centers = np.zeros_like(features), np.zeros_like(centers)
    for i, label in enumerate(labels):
        known = label >= 0
        if not known and not recipe.negatives:
            continue
        phi = features[i]
        a = math.sqrt(sum(x * x for x in phi))
        u = phi / a
        logits, of_phi, of_center = [], [], []
        for c in range(number_of_classes):
            length = math.sqrt(sum(x * x for x in centers[c]))
            w = centers[c] / length
            cosine = float(w @ u)
            if recipe.head == "linear":
                z = float(centers[c] @ phi)
                shift = 0.3 if recipe.margin == "logit" and c == label else 0.0
                logits.append(z - shift)
                of_phi.append(centers[c])
                of_center.append(phi)
                continue
            value = margin_cosine(recipe.margin, cosine) if c == label else cosine
            radius = scale if recipe.head == "hard" else a
            logits.append(radius * value)
            along = value * u if recipe.head == "soft" else 0.0 * u  # through the radius
            of_phi.append(along + radius * (w - cosine * u) / a)
            of_center.append(radius * (u - cosine * w) / length)
        largest = max(logits)
        exponentials = [math.exp(z - largest) for z in logits]
        log_sum = largest + math.log(sum(exponentials))
        for c in range(number_of_classes):
            p = exponentials[c] / sum(exponentials)
            if known:
                wanted = 1.0 if c == label else 0.0
            elif recipe.entropic:
                wanted = 1.0 / number_of_classes
            else:
                continue
            total += wanted * (log_sum - logits[c]) / count
            by_features[i] += (p - wanted) * of_phi[c] / count
            by_centers[c] += (p - wanted) * of_center[c] / count
        if recipe.magnitude:
            target = 0.0 if recipe.magnitude != "ring" and not known else scale
            missing = target - a
            if recipe.magnitude == "os" and known:
                missing = max(0.0, missing)
            total += 0.01 * missing**2 / count
            by_features[i] += 0.01 * -2.0 * missing * u / count
    return total, by_features, by_centers
