"""Everything once, from nothing: ``make demo``.

Trains the embedded ``glyphs`` protocol, exports, archives, starts TorchServe and the gateway, sets a threshold for one
per cent of foreign images, and asks about a digit and a letter in fonts the model has never seen.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import FrameType
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from serving.stack import require_free_port
from serving.torchserve import TorchServeFailed, die_with_parent

RUN = Path("runs/demo")
MODEL = "demo"
EPOCHS = 1
FPR = 1e-2

_SAMPLES = Path(".run/demo")


def say(text: str) -> None:
    """A line of the story, at once."""
    print(text, flush=True)


def step(title: str, *arguments: str) -> None:
    """Run one of the product's own commands; stop here if it fails."""
    say(f"\n== {title}\n   python -m {' '.join(arguments)}")
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-m", *arguments], check=False)
    if done.returncode:
        sys.exit(
            f"the demo stopped: that command ended with code {done.returncode}; its message stands above"
        )
    say(f"   ({time.monotonic() - started:.0f} s)")


def call(method: str, url: str, data: bytes | None = None) -> dict[str, Any]:
    """One HTTP call that must succeed."""
    headers = {"content-type": "image/png"} if data else {}
    request = urllib.request.Request(url, data=data, method=method, headers=headers)
    # Past the environment's proxy, which would ask its own loopback.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=60) as reply:
            body: dict[str, Any] = json.load(reply)
            return body
    except urllib.error.HTTPError as error:
        sys.exit(f"{method} {url} answered {error.code}: {error.read().decode()}")


def draw(character: str, file: Path) -> bytes:
    """A character as a PNG, light on dark, in a font that training never shows."""
    import matplotlib as mpl

    font_file = Path(mpl.get_data_path()) / "fonts" / "ttf" / "STIXGeneralBol.ttf"
    image = Image.new("L", (112, 112), 0)
    font = ImageFont.truetype(str(font_file), 96)
    left, top, right, bottom = font.getbbox(character)
    position = ((112 - left - right) / 2, (112 - top - bottom) / 2)
    ImageDraw.Draw(image).text(position, character, fill=255, font=font)
    stream = io.BytesIO()
    image.save(stream, "PNG")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(stream.getvalue())
    return stream.getvalue()


def start_stack(port: int, *, keep: bool = False) -> subprocess.Popen[bytes]:
    """Start ``serving.stack`` and return when it is ready; unless kept, it ends with this process, even by kill -9."""
    say(
        f"\n== TorchServe and the gateway\n   python -m serving.stack --model {MODEL} --device cpu --port {port}"
    )
    log = _SAMPLES / "stack.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as stream:
        stack = subprocess.Popen(
            # Calibrated on the CPU, so served on it, whatever else the host has.
            [sys.executable, "-m", "serving.stack", "--model", MODEL, "--device", "cpu", "--port", str(port)],
            stdout=stream, stderr=stream, start_new_session=True, preexec_fn=None if keep else die_with_parent,
        )  # fmt: skip
    started = time.monotonic()
    try:
        while "ready: " not in log.read_text():
            if stack.poll() is not None:
                sys.exit(f"the stack did not start:\n{log.read_text()[-3000:]}")
            time.sleep(0.2)
    except BaseException:  # Ctrl-C and SIGTERM too
        stop(stack)
        raise
    say(f"   ready after {time.monotonic() - started:.0f} s (log: {log})")
    return stack


def stop(stack: subprocess.Popen[bytes]) -> None:
    """Stop what ``start_stack`` started."""
    stack.send_signal(signal.SIGTERM)
    stack.wait()


def _end(number: int, frame: FrameType | None) -> None:
    """SIGTERM ends the demo like Ctrl-C: what it started is stopped."""
    sys.exit(128 + number)


def main(argv: list[str] | None = None) -> int:
    """Run the demo."""
    parser = argparse.ArgumentParser(
        prog="python -m serving.demo", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--keep", action="store_true", help="leave the stack running")
    arguments = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, _end)
    if sys.stdout.isatty():
        say(
            "The demo takes 2 to 5 minutes on two CPU cores; all it makes lies in runs/, model_store/ and .run/."
        )
    try:
        require_free_port("127.0.0.1", arguments.port)  # said before minutes of training, not after
    except TorchServeFailed as error:
        sys.exit(f"error: {error}")
    try:
        show(arguments.port, keep=arguments.keep)
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on where it stopped")
    return 0


def show(port: int, *, keep: bool) -> None:
    """Train, export, archive, serve, ask."""
    step(
        f"training: digits known, letters negative, {EPOCHS} epoch", "training.train", "--protocol", "glyphs", "--loss",
        "cos_eos", "--epochs", str(EPOCHS), "--precision", "auto", "--device", "cpu", "--name", RUN.name,
        *([] if sys.stderr.isatty() else ["--quiet"]),
    )  # fmt: skip
    step(
        "export: artifact with a certified threshold",
        "training.export",
        "--run",
        str(RUN),
        "--name",
        MODEL,
    )
    step("archive", "serving.archive", "--artifact", str(RUN / "artifact"), "--name", MODEL)
    stack = start_stack(port, keep=keep)
    url = f"http://127.0.0.1:{port}"
    try:
        tell_story(url)
    finally:
        if not keep:
            stop(stack)
    if keep:
        say(f"\nThe stack goes on: {url} (page), {url}/docs (API). Stop it with: kill {stack.pid}")
    else:
        say("\nThe stack was stopped; make demo KEEP=1 leaves it running with its page.")


def tell_story(url: str) -> None:
    """Calibrate, ask twice, show the answers."""
    point = call("POST", f"{url}/calibrate?fpr={FPR:g}&reason=demo")["operating_point"]
    say(f"\n== POST /calibrate?fpr={FPR:g}")
    say(
        f"   tau {point['tau']:.4f} ({point['score_type']}): from n = {point['n']} negatives at most k = {point['k']} "
        f"accepted;\n   FPR bound {point['fpr_upper_bound']:.5f} with confidence {point['confidence']:g}, "
        f"expected CCR {point['expected_ccr']:.4f}"
    )
    say(
        "   (calibration and these images differ in fonts, as in life: the bound is for the fonts of the calibration)"
    )
    for kind, character in (("a known digit", "7"), ("an unknown letter", "W")):
        file = _SAMPLES / f"{character}.png"
        answer = call("POST", f"{url}/predict?top_k=3", draw(character, file))
        nearest = answer["nearest"]
        say(f"\n== POST /predict with {kind}, {file}")
        say(f"   label: {answer['label']}")
        say(
            f"   score {answer['score']:.3f} {'>=' if answer['accepted'] else '<'} tau {answer['tau']:.3f}, "
            f"p-value {answer['p_value']:.4f}, nearest class {nearest['label']} at {nearest['angle_deg']:.1f} degrees"
        )
        say(
            f"   curl -s --data-binary @{os.fspath(file)} -H 'content-type: image/png' {url}/predict"
        )


if __name__ == "__main__":
    if not sys.platform.startswith("linux"):
        sys.exit(
            "the serving stack needs Linux (Unix sockets, prctl); on other systems use the containers: make up"
        )
    sys.exit(main())
