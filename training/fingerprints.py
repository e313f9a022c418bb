"""Whether images are still those that a run was trained and validated on.

The published protocols split by how many images there are: after one file more or less, most of what validates, and so
calibrates, may be what the model was trained on. A checkpoint therefore holds digests of its images.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from training.data import ProtocolData, Split
from training.protocols import FOLDERS
from training.runs import Run, require_same_classes

logger = logging.getLogger(__name__)

# Entries of a checkpoint: of the images that train and validate, and of those that validate alone.
IMAGES, VALIDATION = "images_sha256", "validation_sha256"

# Protocols whose split does not depend on the number of images, and what another digest means there.
_SPLIT_APART = {
    FOLDERS: (
        "added files leave each image in its part, but one that was renamed is dealt out anew, and in a class of few images "
        "others stand in for those that were removed: these may be ones that it was trained on"
    ),
    "glyphs": "its parts are rendered apart from each other, and another processor or release draws some pixels differently",
}


def fingerprint(*parts: Split) -> str:
    """Digest of parts: which samples, of which classes, in which order; not where they lie.

    Of characters every pixel counts, of photographs the names alone: to read them all again would take as long as an epoch.
    """
    digest = hashlib.sha256()
    for split in parts:
        for values in (split.sample_ids, split.groups):
            digest.update("\n".join(values.tolist()).encode() + b"\0")
        if isinstance(split.images, Tensor):
            digest.update(split.images.contiguous().cpu().numpy().data)
    return digest.hexdigest()


def fingerprints(data: ProtocolData, calibration: Split) -> dict[str, str]:
    """What a checkpoint says of its images.

    Those that validate are told apart because they calibrate: where they are the same, none of them was trained on, though a
    run may have been trained on a part of the images only.

    Args:
        data: with the images that train and validate.
        calibration: all that may calibrate; those that validate, or more.
    """
    return {
        IMAGES: fingerprint(data.train, data.validation),
        VALIDATION: fingerprint(calibration),
    }


def require_former_validation(run: Run, data: ProtocolData, *, which: str = "last") -> list[str]:
    """Refuse validation images other than those that a run was validated with; nothing is decoded.

    Args:
        run: whose model is to be calibrated or judged.
        data: with the validation part.
        which: checkpoint. Where it is not here, as with an artifact alone, nothing is compared and a warning says so.

    Returns:
        What was warned of.

    Raises:
        ValueError: they are others, and the protocol's split may have brought training images among them; or other classes.
    """
    try:
        state = run.load_checkpoint(which)
        require_same_classes(state["class_ids"], data, what=run.folder)
    except FileNotFoundError:
        state = {}
    if VALIDATION not in state and IMAGES in state:  # of an earlier release
        data = run.protocol_data(("train", "validation"))
    return compare_validation(state, data, what=str(run.folder), root=run.config.data)


def compare_validation(
    state: Mapping[str, Any],
    data: ProtocolData,
    *,
    what: str,
    root: str | None,
    is_other_tree: bool = False,
) -> list[str]:
    """Refuse validation images other than a checkpoint's, or warn where the protocol's split makes that harmless.

    Photographs of another tree that have the names and classes of the checkpoint's are taken with a warning.

    Args:
        state: of the checkpoint.
        data: what is to validate; with the training part, which earlier releases did not tell apart.
        what: the checkpoint is of, for messages.
        root: of the data, for messages.
        is_other_tree: the checkpoint's images were elsewhere, so that names do not tell which are the same.

    Returns:
        What was warned of.

    Raises:
        ValueError: they are others.
    """
    if VALIDATION in state:
        expected, found = state[VALIDATION], fingerprint(data.validation)
    elif IMAGES in state:
        expected, found = state[IMAGES], fingerprint(data.train, data.validation)
    else:
        return _warned(
            f"nothing here says which images {what} was trained and validated on (its checkpoint is missing or of an earlier "
            "release); if files were removed or added since, what calibrates or judges it may have been trained on"
        )
    here = root or "the data"
    if found == expected:
        if is_other_tree and not isinstance(data.validation.images, Tensor):
            return _warned(
                f"{what} was trained on photographs that lay elsewhere. Those in {here} have the same names and classes, and "
                "more is not compared: if they are other pictures, what validates and calibrates here may have been trained on "
                "there"
            )
        return []
    if data.name in _SPLIT_APART and not is_other_tree:
        return _warned(
            f"{what} was trained and validated on other images than {here} now holds: {_SPLIT_APART[data.name]}"
        )
    raise ValueError(
        f"{what} was trained and validated on other images than {here} now holds (expected those of SHA-256 "
        f"{expected[:12]}, got {len(data.validation)} validation images, {found[:12]}): the split of {data.name} is another "
        "one now, and what would calibrate may have been trained on; restore the former files, or train anew (another NAME=)"
    )


def _warned(text: str) -> list[str]:
    logger.warning("%s", text)
    return [text]
