"""Whether what is packed or served is still what its run holds: training may go on after an export, exports after packing."""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

from openset.model_card import ModelCard

# As openset.artifact and the training write them; neither is imported: the one brings torch, the other is not on a serving host.
RUNS = Path("runs")
CARD = "model_card.json"
CALIBRATION = "calibration.npz"


def advice(about: Path, why_stale: Callable[[], str | None]) -> str | None:
    """The answer to one of the questions below, or a line that it cannot be told; advice stops nothing.

    Args:
        about: the artifact or archive in question.
        why_stale: asks; may raise whatever a run's folder causes, since cards hold any JSON and files are another user's.
    """
    try:
        return why_stale()
    except Exception as error:
        return f"whether {about} is older than its run cannot be told: {error}"


def trained_since_export(run: Path, card: ModelCard) -> bool:
    """Whether the run's checkpoint is another than the one that the card's export took.

    False also where nothing tells: no checkpoint in ``run``, or a card of an earlier release, which names none.
    """
    facts = card.training
    checkpoint = run / f"{facts.get('checkpoint', 'last')}.pt"
    if "checkpoint_sha256" not in facts or not checkpoint.is_file():
        return False
    with checkpoint.open("rb") as stream:
        return bool(hashlib.file_digest(stream, "sha256").hexdigest() != facts["checkpoint_sha256"])


def why_artifact_is_stale(artifact: Path, name: str) -> str | None:
    """One sentence with the command to run if the run went on after its export, else None.

    Args:
        artifact: folder of the artifact, inside its run's.
        name: of the archive.

    Raises:
        ValueError: the model card cannot be read.
    """
    run = artifact.parent
    if not trained_since_export(run, ModelCard.from_json((artifact / CARD).read_text())):
        return None
    commands = f"{_export(run)} && {_pack(run, name)}"
    return f"{run} was trained after its export, the older weights are packed; for the newer ones: {commands}"


def why_archive_is_stale(archive: Path, runs: Path = RUNS) -> str | None:
    """One sentence with the command to run if the archive's run was trained, exported or calibrated after packing, else None.

    None also where the run is not on this machine or the archive does not name one; an archive that cannot be read is
    refused elsewhere.
    """
    try:
        with zipfile.ZipFile(archive) as content:
            card = ModelCard.from_json(content.read(CARD))
            calibration_crc = content.getinfo(CALIBRATION).CRC
    except (zipfile.BadZipFile, KeyError, ValueError, OSError):
        return None
    if "run" not in card.training:
        return None
    run = runs / card.training["run"]
    pack = _pack(run, archive.stem)
    if trained_since_export(run, card):
        export = "" if _is_exported(run) else f"{_export(run)} && "
        return f"{run} was trained after {archive} was packed; to serve the newer weights: {export}{pack}"
    artifact = run / "artifact"
    if not (artifact / CARD).is_file() or not (artifact / CALIBRATION).is_file():
        return None
    newer = ModelCard.from_json((artifact / CARD).read_text()).with_changes(name=card.name)
    if newer != card or zlib.crc32((artifact / CALIBRATION).read_bytes()) != calibration_crc:
        return (
            f"{artifact} was exported or calibrated after {archive} was packed; to serve it: {pack}"
        )
    return None


def _is_exported(run: Path) -> bool:
    """Whether the artifact is of the run's checkpoint as it is now."""
    card = run / "artifact" / CARD
    return card.is_file() and not trained_since_export(run, ModelCard.from_json(card.read_text()))


def _export(run: Path) -> str:
    return f"make export RUN={run}"


def _pack(run: Path, name: str) -> str:
    return f"make archive RUN={run}" + ("" if name == run.name else f" NAME={name}")
