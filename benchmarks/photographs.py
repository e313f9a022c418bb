"""Ask a running stack about a folder of photographs whose names begin with their class, ``<wnid>_<anything>.JPEG``.

    python benchmarks/photographs.py FOLDER --fpr 1e-2 1e-1 3e-1 [--url http://127.0.0.1:8000] [--json FILE]

Prints, for each target FPR, how many photographs of known classes were accepted with the right and with another label,
and how many foreign ones were answered "unknown". Changes no operating point: every request asks for its own target.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import httpx

EXTENSIONS = (".jpeg", ".jpg", ".png", ".webp")
HEADERS = {"content-type": "application/octet-stream"}


def judge(
    client: httpx.Client, files: list[Path], class_ids: list[str], fpr: float
) -> dict[str, Any]:
    """One row: counts over all photographs at one target FPR, and the answers to the known ones one by one."""
    row: dict[str, Any] = {
        "fpr": fpr, "known": 0, "accepted_right": 0, "accepted_wrong": 0, "foreign": 0, "foreign_unknown": 0, "answers": [],
    }  # fmt: skip
    for file in files:
        reply = client.post(
            "/predict", params={"fpr": fpr}, content=file.read_bytes(), headers=HEADERS
        )
        reply.raise_for_status()
        answer = reply.json()
        class_id = file.name.split("_")[0]
        if class_id not in class_ids:
            row["foreign"] += 1
            row["foreign_unknown"] += not answer["accepted"]
            continue
        right = class_ids[answer["nearest"]["index"]] == class_id
        row["known"] += 1
        row["accepted_right"] += answer["accepted"] and right
        row["accepted_wrong"] += answer["accepted"] and not right
        row["answers"].append(
            {
                "file": file.name,
                **{key: answer[key] for key in ("label", "score", "tau", "p_value")},
            }
        )
    return row


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--fpr", type=float, nargs="+", default=[1e-2, 1e-1, 3e-1])
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    files = sorted(file for file in arguments.folder.iterdir() if file.suffix.lower() in EXTENSIONS)
    if not files:
        sys.exit(
            f"{arguments.folder} holds no photographs; expected <wnid>_<anything>{EXTENSIONS[0]}"
        )
    with httpx.Client(base_url=arguments.url, timeout=60, trust_env=False) as client:
        card = client.get("/model").json()["card"]
        rows = [judge(client, files, card["class_ids"], fpr) for fpr in arguments.fpr]
    print("| fpr | known, right label | known, another label | known, unknown | foreign, unknown |")
    print("|---|---|---|---|---|")
    for row in rows:
        rejected = row["known"] - row["accepted_right"] - row["accepted_wrong"]
        print(
            f"| {row['fpr']:g} | {row['accepted_right']} of {row['known']} | {row['accepted_wrong']} | {rejected} "
            f"| {row['foreign_unknown']} of {row['foreign']} |"
        )
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"model": card["name"], "rows": rows}, indent=2) + "\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
