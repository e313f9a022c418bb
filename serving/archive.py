"""Pack an artifact into a TorchServe archive: ``python -m serving.archive --artifact runs/X/artifact --name X``.

The archive is reproducible: it is built by torch-model-archiver, then rewritten with fixed times and order, so that the
same input gives the same bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from openset.model_card import ModelCard
from serving.freshness import advice, why_artifact_is_stale

ROOT = Path(__file__).resolve().parents[1]
MODEL_STORE = Path("model_store")
HANDLER = ROOT / "handlers" / "open_set_handler.py"
ARTIFACT_FILES = ("weights.safetensors", "model_card.json", "calibration.npz")

_FIXED_TIME = (1980, 1, 1, 0, 0, 0)
_FIXED_CREATED = "01/01/1980 00:00:00"


class CannotArchive(RuntimeError):
    """The artifact is incomplete or the archiver failed."""


def build_archive(artifact: Path, name: str, out: Path = MODEL_STORE) -> Path:
    """Write ``<out>/<name>.mar`` and return its path.

    Raises:
        CannotArchive: a file of the artifact is missing or the archiver failed.
    """
    for file in ARTIFACT_FILES:
        if not (artifact / file).is_file():
            raise CannotArchive(
                f"{artifact / file} is missing; make it with: make export RUN=<run>"
            )
    card = ModelCard.from_json((artifact / "model_card.json").read_text())
    out.mkdir(parents=True, exist_ok=True)
    # The archiver deletes and rebuilds <temp>/<name>: parallel builds of one name need folders of their own.
    with tempfile.TemporaryDirectory(prefix="openset-archive-") as temporary:
        stage, built = Path(temporary, "stage"), Path(temporary, "built")
        built.mkdir()
        shutil.copytree(
            ROOT / "openset",
            stage / "openset",
            ignore=shutil.ignore_patterns("__pycache__", "*.pyc"),
        )
        for file in ARTIFACT_FILES:
            shutil.copyfile(artifact / file, stage / file)
        # Answers name the model as TorchServe and ?model= do; a name is no part of a model's identity.
        (stage / "model_card.json").write_text(card.with_changes(name=name).to_json())
        command = [
            sys.executable, "-m", "model_archiver.model_packaging", "--model-name", name, "--version", card.version,
            "--handler", str(HANDLER), "--extra-files", str(stage), "--export-path", str(built),
            "--archive-format", "zip-store", "--force",
        ]  # fmt: skip
        environment = {**os.environ, "TMPDIR": temporary}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode or not (built / f"{name}.mar").is_file():
            raise CannotArchive(f"torch-model-archiver failed:\n{done.stdout}{done.stderr}")
        partial = out / f".{name}.mar.partial"
        _rewrite(built / f"{name}.mar", partial)
        partial.chmod(0o644)  # whatever the umask: containers read it as users of their own
        os.replace(partial, out / f"{name}.mar")
    return out / f"{name}.mar"


def _rewrite(source: Path, target: Path) -> None:
    """Copy a zip with sorted names, fixed times and a manifest without a time stamp; nothing is compressed."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as new:
        for name in sorted(old.namelist()):
            if name.endswith("/"):
                continue
            content = old.read(name)
            if name == "MAR-INF/MANIFEST.json":
                manifest = json.loads(content)
                manifest["createdOn"] = _FIXED_CREATED
                content = json.dumps(manifest, indent=2, sort_keys=True).encode()
            entry = zipfile.ZipInfo(name, _FIXED_TIME)
            entry.external_attr = 0o644 << 16
            new.writestr(entry, content)


def main(argv: list[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m serving.archive", description=__doc__)
    parser.add_argument(
        "--artifact", type=Path, required=True, help="folder made by python -m training.export"
    )
    parser.add_argument("--name", help="model name in TorchServe; default: the model card's")
    parser.add_argument("--out", type=Path, default=MODEL_STORE)
    arguments = parser.parse_args(argv)
    try:
        name = arguments.name
        if name is None:
            name = ModelCard.from_json((arguments.artifact / "model_card.json").read_text()).name
        file = build_archive(arguments.artifact, name, arguments.out)
    except (CannotArchive, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    artifact = arguments.artifact
    stale = advice(artifact, lambda: why_artifact_is_stale(artifact, name))
    if stale is not None:
        print(f"warning: {stale}", file=sys.stderr)
    print(f"archived: {file} ({file.stat().st_size / 1e6:.1f} MB; next: make serve MODEL={name})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
