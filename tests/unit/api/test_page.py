"""The page in a real browser, without a gateway: what it sends is recorded."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[3] / "api" / "page.html"
HINT = "Nothing is drawn yet"
RECORD = """<script>
window.fetch = url => {
  document.body.dataset.sent = (document.body.dataset.sent || "") + " " + url;
  return new Promise(() => {});
};
</script>"""


def shown_after(script: str, folder: Path) -> str:
    """The page's document after a script has acted on it."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("Chromium is not installed (Debian: apt-get install chromium)")
    page = folder / "page.html"
    text = PAGE.read_text().replace("<main>", f"{RECORD}<main>")
    page.write_text(f"{text}<script>{script}</script>")
    command = [
        chromium, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=3000",
        "--dump-dom", page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert 'id="result"' in done.stdout, done.stderr[-2000:]
    # What was put into the page, not the scripts that put it.
    return done.stdout.partition('id="result"')[2].partition("</section>")[0] + "".join(
        part.partition(">")[0] for part in done.stdout.split("<body")[1:2]
    )


@pytest.mark.parametrize(
    "script",
    [
        '$("ask").click()',
        'pen.fillStyle = "#fff"; pen.fillRect(90, 90, 60, 60); $("clear").click(); $("ask").click()',
    ],
    ids=["never drawn", "cleared"],
)
def test_empty_canvas_is_not_sent_and_the_page_says_why(script: str, tmp_path: Path) -> None:
    shown = shown_after(script, tmp_path)
    assert "/predict" not in shown
    assert HINT in shown


def test_drawing_is_sent(tmp_path: Path) -> None:
    shown = shown_after(
        'pen.fillStyle = "#fff"; pen.fillRect(90, 90, 60, 60); $("ask").click()', tmp_path
    )
    assert "/predict" in shown
    assert HINT not in shown
