"""Send a run's whole test part through ``POST /predict`` and compare with the offline evaluation.

    python benchmarks/realised_rates.py --run runs/toy-emnist --url http://127.0.0.1:8000 [--json FILE]

Prints CCR and FPR realised over the wire at the operating point the gateway applied, the same from the stored offline
scores, and the largest difference of a score. Needs ``make evaluate RUN=...`` first.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import sys
import time
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from openset import metrics
from openset.decision import accept
from openset.labels import GROUP_NAMES, is_known
from training.files import ImageFiles
from training.runs import Run
from training.scoring import Scored

CONCURRENCY = 16


def encoded_images(run: Run) -> tuple[list[bytes], Scored]:
    """The test part as uploads (files as they are, characters as PNG), and its offline scores."""
    scored = Scored.load(run.folder / "scores.npz")
    split = run.protocol_data(("test",)).test
    if isinstance(split.images, ImageFiles):
        return [Path(path).read_bytes() for path in split.images.paths], scored
    uploads = []
    for image in split.images[:, 0].numpy():
        stream = io.BytesIO()
        Image.fromarray(image).save(stream, "PNG")
        uploads.append(stream.getvalue())
    return uploads, scored


async def ask_all(url: str, uploads: list[bytes]) -> list[dict[str, Any]]:
    """Every answer, in order."""
    places = asyncio.Semaphore(CONCURRENCY)
    async with aiohttp.ClientSession(url) as session:

        async def one(upload: bytes) -> dict[str, Any]:
            headers = {"content-type": "application/octet-stream"}
            async with (
                places,
                session.post("/predict?top_k=1", data=upload, headers=headers) as response,
            ):
                body: dict[str, Any] = await response.json(content_type=None)
                if response.status != 200:
                    raise RuntimeError(f"status {response.status}: {body}")
                return body

        return list(await asyncio.gather(*(one(upload) for upload in uploads)))


def main() -> int:
    """Run the comparison."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    run = Run(arguments.run)
    uploads, scored = encoded_images(run)
    if len(uploads) != len(scored):
        sys.exit(
            f"the data hold {len(uploads)} images, the evaluation {len(scored)}; evaluate the run again"
        )
    started = time.perf_counter()
    answers = asyncio.run(ask_all(arguments.url, uploads))
    seconds = time.perf_counter() - started
    first = answers[0]
    if any(answer["calibration"] != first["calibration"] for answer in answers):
        sys.exit("the operating point changed during the run; nothing can be compared")
    offline = scored.scores[first["score_type"]]
    tau = np.float32(first["tau"])
    online_scores = np.array([answer["score"] for answer in answers], np.float32)
    accepted = np.array([answer["accepted"] for answer in answers])
    names = np.array([answer["nearest"]["index"] for answer in answers])
    known = is_known(scored.labels)
    rows: dict[str, Any] = {
        "run": run.folder.name,
        "images": len(answers),
        "images_per_second": len(answers) / seconds,
        "score_type": first["score_type"],
        "tau": float(tau),
        "fpr_promised": first["calibration"]["fpr"],
        "largest_score_difference": float(np.abs(online_scores - offline).max()),
        "decisions_that_differ": int((accepted != accept(offline, tau)).sum()),
        "predictions_that_differ": int((names != scored.predictions).sum()),
        "ccr": {
            "online": float((accepted & (names == scored.labels))[known].mean()),
            "offline": metrics.ccr_at_tau(offline, scored.predictions, scored.labels, tau=tau),
        },
    }
    for label, name in GROUP_NAMES.items():
        mask = scored.labels == label
        if mask.any():
            rows[f"fpr_{name}"] = {
                "online": float(accepted[mask].mean()),
                "offline": metrics.fpr_at_tau(offline, scored.labels, tau=tau, against=label),
                "interval": metrics.clopper_pearson(int(accepted[mask].sum()), int(mask.sum())),
            }
    text = json.dumps(rows, indent=2)
    print(text)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
