"""The page in a real browser, without a gateway: what it sends is recorded."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[3] / "api" / "page.html"
HINT = "Nothing is drawn yet"
RECORD = """
window.fetch = (url, options) => {
  document.body.dataset.sent = (document.body.dataset.sent || "") + ` ${url} ${options.headers.authorization}`;
  return new Promise(() => {});
};
"""
# Answers "first" after a second and "second" at once.
OVERTAKING = """
let number = 0;
window.fetch = async url => {
  if (!url.startsWith("/predict")) return new Promise(() => {});
  const label = number++ ? "second" : "first";
  if (label === "first") await new Promise(done => setTimeout(done, 1000));
  const calibration = {fpr: .01, fpr_upper_bound: .0097, confidence: .95, id: 1};
  const answer = {label, accepted: true, score: 1, tau: 0, score_type: "softmax", p_value: .1, top_k: [], calibration};
  return new Response(JSON.stringify({...answer, timing_ms: {total: 1}}));
};
"""
# A proxy whose gateway is gone, from the second question on.
GONE = OVERTAKING.replace(
    'const label = number++ ? "second" : "first";',
    'if (number++) return new Response("<html>Bad Gateway", {status: 502}); const label = "first";',
)
ASK_TWICE = "ask(new Blob([1])); setTimeout(() => ask(new Blob([2])), {})"


def shown_after(script: str, folder: Path, *, fetch: str = RECORD) -> str:
    """The page's document after a script has acted on it; ``fetch`` stands in for the gateway."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("Chromium is not installed (Debian: apt-get install chromium)")
    page = folder / "page.html"
    text = PAGE.read_text().replace("<main>", f"<script>{fetch}</script><main>")
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


def test_answer_that_comes_late_is_not_shown_beside_the_next_image(tmp_path: Path) -> None:
    shown = shown_after(ASK_TWICE.format(100), tmp_path, fetch=OVERTAKING)
    assert ">second<" in shown
    assert ">first<" not in shown


def test_no_answer_is_a_problem_and_the_former_answer_goes(tmp_path: Path) -> None:
    shown = shown_after(ASK_TWICE.format(1500), tmp_path, fetch=GONE)
    assert "No answer" in shown
    assert ">first<" not in shown


def refusing(status: int, slug: str) -> str:
    """A gateway that refuses every question."""
    answer = f"""new Response('{{"type": "/problems/{slug}"}}', {{status: {status}}})"""
    refusal = f"setTimeout(() => answer({answer}), 200)"
    return RECORD.replace("new Promise(() => {})", f"new Promise(answer => {refusal})")


BLOCKED = """
Object.defineProperty(window, "sessionStorage", {get() { throw new DOMException("blocked", "SecurityError"); }});
"""
FIELD = '$("with-key")'
SHOWS = f'document.body.dataset.sent += " " + getComputedStyle({FIELD}).display'


@pytest.mark.parametrize(
    ("status", "slug", "storage"),
    [(401, "missing-key", ""), (403, "key-not-allowed", ""), (401, "missing-key", BLOCKED)],
    ids=["no key", "key without the scope", "site data blocked"],
)
def test_key_is_asked_for_once_and_sent_with_every_question(
    tmp_path: Path, status: int, slug: str, storage: str
) -> None:
    use = f'$("key").value = "secret", {FIELD}.requestSubmit()'
    script = f"{SHOWS}; setTimeout(() => {{ {SHOWS}; {use} }}, 500)"
    shown = shown_after(script, tmp_path, fetch=storage + refusing(status, slug))
    asked, _, with_key = shown.partition("/model undefined")[2].partition("/model Bearer secret")
    assert asked.split() == ["none", "flex"]  # the field is there once it is wanted
    assert "undefined" not in with_key


def test_no_key_is_asked_for_where_none_would_help(tmp_path: Path) -> None:
    script = f"setTimeout(() => {{ {SHOWS} }}, 500)"
    shown = shown_after(script, tmp_path, fetch=refusing(403, "foreign-origin"))
    assert "/model undefined none" in shown


def luminance(color: str) -> float:
    """Relative luminance of ``#rgb`` or ``#rrggbb`` (WCAG 2)."""
    digits = color.removeprefix("#")
    if len(digits) == 3:
        digits = "".join(2 * digit for digit in digits)
    channels = [int(digits[at : at + 2], 16) / 255 for at in (0, 2, 4)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_text_is_told_from_its_ground(scheme: int) -> None:
    """4.5:1 at least, for every rule that colors text: on the ground that it sets, else on a card's."""
    style = PAGE.read_text().partition("</style>")[0]
    root = re.findall(r":root \{(.*?)\}", style)[scheme]
    colors = dict(re.findall(r"(--[\w-]+):(#\w+)", root))
    seen = set()
    for selector, rule in re.findall(r"([^{}]+)\{([^{}]*)\}", style):
        text = re.search(r"(?<![-\w])color:([^; ]+)", rule)
        if text is None:
            continue
        ground = re.search(r"background:([^; ]+)", rule)
        both = [text.group(1), ground.group(1) if ground else "var(--card)"]
        values = [colors.get(value.removeprefix("var(").rstrip(")"), value) for value in both]
        darker, lighter = sorted(luminance(value) for value in values)
        assert (lighter + 0.05) / (darker + 0.05) >= 4.5, (selector, *values)
        seen.add(selector.strip())
    assert {"body", "button.go", ".problem", ".small"} <= seen


def test_choice_of_the_rate_has_a_name_and_what_setting_it_gave_is_announced() -> None:
    page = PAGE.read_text()
    assert re.search(r'<select id="fpr" aria-label="[^"]+">', page)
    assert re.search(r'id="set-said" role="status"', page)
