"""The tables of the grid: figures as they are written, who is compared with whom, and commands for what is missing."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from openset.labels import UNKNOWN
from tests.grid_runs import NOTES, cells, finished_run, line_of, section, written
from training.evaluation import REPORT, SCORES_FILE
from training.grid import pages, tables
from training.grid.formatting import number, signed
from training.grid.plan import RANKING, plan
from training.grid.results import Difference, Entry, difference, group_rows, published_setting
from training.grid.rows import CELL_FILE, read_rows, stored_rows
from training.losses import THESIS_LOSSES
from training.scoring import Scored


def test_foreign_classes_that_pass_are_counted_by_what_they_are_taken_for(grid: Path) -> None:
    text = (grid / "results/toy.md").read_text()
    table = section(section(text, "## The published setting in detail"), "### Who passes")
    line = line_of(table, "cos_eos")
    sample = Scored.load(grid / "runs" / cells("cos_eos")[0].name / SCORES_FILE)
    unknown = sample.labels == UNKNOWN
    passed = np.flatnonzero(unknown)[np.argsort(-sample.scores["softmax"][unknown])][:12]
    pairs = Counter((sample.groups[i], str(sample.predictions[i])) for i in passed)
    (letter, digit), count = min(pairs.items(), key=lambda item: (-item[1], item[0]))
    # Of 120 unknown images.
    lines = [part.split("|") for part in table.splitlines() if part.startswith("| `cos_eos` | 1e-1")]  # fmt: skip
    assert lines[0][3].strip() == "12"
    assert lines[0][4].strip().startswith(f"{letter} → {digit} {count}")
    shown = sum(int(part.split()[-1]) for part in lines[0][4].split(","))
    assert shown + int(lines[0][5]) == 12
    assert line[1:3] == ["1e-2", "1"]


def test_bfloat16_rows_stand_in_the_published_table_and_are_marked(grid: Path) -> None:
    for cell in cells("arc_eos", options={"precision": "bfloat16"}):
        finished_run(grid / "runs", cell)
    table = section(written(grid), "## The thesis' table 6.1 and ours")
    assert line_of(table, "arc_eos")[1] == "2 (2 bf16)"
    assert line_of(table, "arc_eos")[3] != ""
    assert "the thesis trained in float32" in table
    # The same seed in float32 takes its place; the other row is kept.
    finished_run(grid / "runs", cells("arc_eos", seeds=1)[0], quality=1.0)
    rows = read_rows(grid / "results/toy.json")
    table = section(written(grid), "## The thesis' table 6.1 and ours")
    assert line_of(table, "arc_eos")[1] == "2 (1 bf16)"
    assert len(read_rows(grid / "results/toy.json")) == len(rows) + 4


def test_sample_counts_and_notes_stand_under_the_table(grid: Path) -> None:
    table = section((grid / "results/toy.md").read_text(), "## The thesis' table 6.1 and ours")
    assert (
        "- Samples: train 48,000 known / 42,240 negative; test 10,000 known / 8,800 negative / 8,144 unknown\n"
        f"- {NOTES[0]}\n"
    ) in table


def test_share_of_knowns_missed_is_shown_for_both_sources_of_digits(grid: Path) -> None:
    style = section(
        (grid / "results/toy.md").read_text(), "## How much of the separation is style?"
    )
    settings = group_rows(read_rows(grid / "results/toy.json"), grid / "runs", grid / "results")
    missed = {
        setting.digits: 1 - entry.mean("0.1")
        for setting, found in settings.items()
        for entry in found
        if entry.loss == "cos_eos"
    }
    line = line_of(style.split("1 − CCR:")[1], "cos_eos")
    assert line[5:7] == [number(missed["mnist"]), number(missed["emnist"])]


def test_options_are_compared_with_the_same_loss_without_them(grid: Path) -> None:
    heading = "### What options change"
    assert heading not in written(grid)
    one, two = {"feature_dim": 40}, {"feature_dim": 40, "activation": "prelu"}
    for loss, options in (("cos_eos", one), ("cos_eos", two), ("arc_eos", one)):  # no plain arc_eos
        for cell in cells(loss, options=options):
            finished_run(grid / "runs", cell)
    table = section(written(grid), heading)
    compared = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| `")]
    assert sorted(compared) == [
        "`cos_eos (activation=prelu feature_dim=40)` − `cos_eos (feature_dim=40)`",
        "`cos_eos (feature_dim=40)` − `cos_eos`",
    ]


def test_digits_are_compared_loss_by_loss(grid: Path) -> None:
    style = section(
        (grid / "results/toy.md").read_text(), "## How much of the separation is style?"
    )
    line = line_of(style, "cos_eos")
    settings = group_rows(read_rows(grid / "results/toy.json"), grid / "runs", grid / "results")
    entries = {
        setting.digits: next(entry for entry in found if entry.loss == "cos_eos")
        for setting, found in settings.items()
    }
    assert line[1].startswith(number(entries["mnist"].mean("0.001")))
    assert line[2].startswith(number(entries["emnist"].mean("0.001")))
    change = difference(entries["mnist"], entries["emnist"], "0.1")
    assert change is not None
    assert change.value > 0.1
    assert signed(change.value) in line[9]
    assert "`eos`" not in style


def test_conclusion_counts_what_both_intervals_establish(monkeypatch: pytest.MonkeyPatch) -> None:
    up, down, open_ = (0.1, 0.3), (-0.3, -0.1), (-0.1, 0.3)
    found = [
        Difference(0.2, up, up), Difference(0.2, up, up), Difference(-0.2, down, down), Difference(0.1, up, open_),
        Difference(0.1, open_, up), Difference(0.2, None, up), Difference(0.2, up, None), None,
    ]  # fmt: skip
    monkeypatch.setattr(tables, "COLUMNS", ("0.01",))
    monkeypatch.setattr(tables, "benchmarks_of", lambda *_: [None])
    monkeypatch.setattr(tables, "difference", lambda entry, *_: entry)
    text = tables.conclusion(found)
    assert "CCR@1e-2: 2 better and 1 worse than a benchmark, 2 open. Of 5 comparisons" in text
    assert "about 0.2 would" in text
    assert tables.conclusion(found[5:]).startswith("No difference has both intervals yet")


def test_what_sees_no_negative_is_compared_with_softmax_alone() -> None:
    setting = replace(published_setting("toy"), as_published=False)
    benchmarks = [Entry(setting, loss, {}) for loss in ("softmax", "eos", "os")]
    composed, mixed = (
        Entry(setting, "cos_eos", {"composed_negatives": share}) for share in (1, 0.5)
    )
    entries = [*benchmarks, composed, mixed]
    assert tables.benchmarks_of(entries, composed) == benchmarks[:1]
    assert tables.benchmarks_of(entries, mixed) == benchmarks


def test_ccr_without_a_foreign_image_is_the_mean_with_its_range_and_needs_every_seed() -> None:
    models: list[Any] = [
        SimpleNamespace(rows={("unknowns", "softmax"): {"ccr_at_zero_fpr": value}}, diverged=None)
        for value in (0.2, 0.3, 0.7)
    ]
    entry = Entry(published_setting("toy"), "eos", {}, models)
    assert line_of(tables.zero_table([entry]), "eos")[3] == ".4000 (.2000 to .7000)"
    models[1].rows.clear()
    assert line_of(tables.zero_table([entry]), "eos")[3] == ""


def test_losses_that_a_setting_lacks_stand_there_with_their_command(tmp_path: Path) -> None:
    for loss in ("cos_eos", "eos"):
        [cell] = cells(loss, seeds=1, digits=["emnist"])
        finished_run(tmp_path / "runs", cell)
    assert "Not run here" not in written(tmp_path)  # a trial of two
    [cell] = cells("os", seeds=1, digits=["emnist"])
    finished_run(tmp_path / "runs", cell)
    [note] = [line for line in written(tmp_path).splitlines() if line.startswith("Not run here")]
    names, command = note.removeprefix("Not run here: ").split(". To run them: `")
    missing = [name.strip("`") for name in names.split(", ")]
    assert set(missing) == set(THESIS_LOSSES) - {"cos_eos", "eos", "os"}
    asked = (
        f"make reproduce PROTOCOL=toy LOSSES={','.join(missing)} SEEDS=1 DIGITS=emnist DATA=$DATA"
    )
    assert command == f"{asked}`."


def test_one_loss_on_photographs_names_those_worth_knowing_first_with_the_options_they_can_have(
    tmp_path: Path,
) -> None:
    options = {"feature_dim": 64, "margin_warmup_epochs": 10}
    [cell] = plan("p1", losses=["cos_eos"], seeds=1, epochs=40, preset="modern", options=options)
    rows = stored_rows(finished_run(tmp_path / "runs", cell))
    [(setting, entries)] = group_rows(rows, tmp_path, tmp_path).items()
    note = tables.missing_note(setting, entries)
    asked = {
        loss: options
        for losses, options in re.findall(
            r"LOSSES=(\S+) SEEDS=1 EPOCHS=40 .*? OPTIONS=(.*?)`", note
        )
        for loss in losses.split(",")
    }
    assert asked == {
        loss: '"feature_dim=64 margin_warmup_epochs=10"' if "cos" in loss or "arc" in loss else "feature_dim=64"
        for loss in RANKING
        if loss != "cos_eos"
    }  # fmt: skip


def differences(grid: Path) -> list[str]:
    text = section(written(grid), "### Differences to the benchmarks")
    return re.findall(r"^\| `(.*?)` \|", text.replace("` − `", " − "), re.MULTILINE)


def test_loss_with_negatives_is_compared_with_softmax_eos_and_os(grid: Path) -> None:
    for cell in [*cells("os"), *cells("softmax"), *cells("cosface")]:
        finished_run(grid / "runs", cell, quality=3.0)
    assert set(differences(grid)) == {
        "cos_eos − softmax", "cos_eos − eos", "cos_eos − os", "os − softmax", "os − eos", "eos − softmax",
        "cosface − softmax",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("option", "benchmarks"),
    [({"scale": 20.0}, {"softmax", "eos"}), ({"turned_negatives": 0.5}, {"softmax"})],
)
def test_benchmark_need_not_have_what_means_nothing_to_it(
    grid: Path, option: dict[str, float], benchmarks: set[str]
) -> None:
    of_all = {"feature_dim": 40}
    for loss in ("eos", "softmax"):
        for cell in [*cells(loss), *cells(loss, options=of_all)]:
            if not (grid / "runs" / cell.name).exists():
                finished_run(grid / "runs", cell)
    for cell in cells("cos_eos", options=of_all | option):
        finished_run(grid / "runs", cell)
    compared = {
        name.split(" − ")[1]
        for name in differences(grid)
        if name.startswith("cos_eos (feature_dim=40 ")
    }
    assert {f"{loss} (feature_dim=40)" for loss in benchmarks} <= compared


def test_benchmark_need_not_have_the_options_of_a_margin(grid: Path) -> None:
    # Another network is another experiment, also for a loss without a margin.
    shutil.rmtree(grid / "runs" / cells("eos")[0].name)
    shutil.rmtree(grid / "runs" / cells("eos")[1].name)
    (grid / "results/toy.json").unlink()
    of_all = {"feature_dim": 40}
    warm = {"margin_warmup_epochs": 3}
    for cell in [
        *cells("eos", options=of_all),
        *cells("cos_eos", options=of_all | warm),
        *cells("arc_eos", options=warm),
    ]:
        finished_run(grid / "runs", cell)
    found = differences(grid)
    assert "cos_eos (feature_dim=40 margin_warmup_epochs=3) − eos (feature_dim=40)" in found
    assert not [name for name in found if name.startswith("arc_eos")]


def test_published_score_stands_beside_the_log_odds(grid: Path) -> None:
    folder = grid / "runs" / cells("eos", seeds=1)[0].name
    record = json.loads((folder / CELL_FILE).read_text())
    report = json.loads((folder / REPORT).read_text())
    score = report["scores"]["softmax"]
    reached = score["unknown"]["ccr_at_fpr"]["0.01"]["value"]
    score["unknown"]["ccr_at_fpr"]["0.01"] |= {
        "value": None,
        "interval": None,
        "interval_clustered": None,
    }
    record["published_score"] = {key: report[key] for key in ("rule", "accuracy")}
    record["published_score"]["scores"] = {"softmax_float32": score}
    (folder / CELL_FILE).write_text(json.dumps(record))
    shutil.rmtree(grid / "runs" / cells("eos")[1].name)
    (grid / "results/toy.json").unlink()
    text = written(grid)
    line = line_of(section(text, "### No saturation"), "eos")
    assert line[3:5] == ["–", number(reached)]


def test_models_are_shown_with_the_digits_that_they_were_not_trained_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pages.drawing, "draw_all", lambda *_: {})
    older, newer = cells("cos_eos", seeds=2)
    finished_run(tmp_path / "runs", older, quality=3.0)
    finished_run(tmp_path / "runs", newer, quality=6.0, on_other_digits=1.0)
    for cell in cells("eos", seeds=1):
        finished_run(tmp_path / "runs", cell, quality=6.0)
    text = section(written(tmp_path), "## Tested with the other source's digits")
    assert "`eos`" not in text  # an older evaluation, which did not test that
    line = line_of(text, "cos_eos")
    rows = {
        row["group"]: row
        for row in read_rows(tmp_path / "results/toy.json")
        if (row["loss"], row["score"], row["seed"]) == ("cos_eos", "softmax", newer.seed)
    }
    own, other = (
        rows[group]["ccr_at_fpr"]["0.1"]["value"] for group in ("unknowns", "unknowns_other_digits")
    )
    assert other < 0.5 < own
    assert line[1] == str(
        newer.seed
    )  # the other seed was not tested so, and has no part in either figure
    assert line[8].startswith(number(own))
    assert line[9].startswith(number(other))
