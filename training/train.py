"""Train a model: ``python -m training.train --protocol glyphs --loss cos_eos``."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.choices import IMAGE_CACHE, LOSSES, PRECISIONS, RUNS
from training.presets import PRESETS
from training.protocols import PROTOCOLS
from training.recommendations import RECOMMENDED, recommendation

# Torch takes seconds: what needs it is imported after the command line was read.
if TYPE_CHECKING:
    from training.data import ProtocolData, Split
    from training.runs import Run, TrainConfig

logger = logging.getLogger(__name__)


def parse_option(text: str) -> tuple[str, Any]:
    """Read ``key=value``; the value is JSON where that parses (numbers, true, null), else text."""
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise argparse.ArgumentTypeError(f"expected key=value, got {text!r}")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, {"True": True, "False": False, "None": None}.get(value, value)


def train(
    config: TrainConfig,
    *,
    runs: Path = RUNS,
    show_progress: bool = True,
    data: ProtocolData | None = None,
    calibration: Split | None = None,
) -> Run:
    """Train, or continue, the run of a configuration and return it; on its protocol's data, or a part given as ``data``.

    ``calibration`` is the protocol's validation part, where ``data`` holds only some of it: the model can be exported with all.

    Raises:
        TrainingDiverged: the loss is not finite.
        ValueError: the folder holds another run, or data or options do not fit.
    """
    from training.engine import Trainer
    from training.parallel import is_writer, process_group
    from training.run_folder import check_folder
    from training.runs import Run

    folder = runs / config.name
    if is_writer():
        check_folder(folder, config)  # before hours of decoding for a run that is refused
    # Before the processes of a run join: the cache may take long to build, and nobody must wait for it with a deadline.
    if data is None:
        data = config.load_data(("train", "validation"), decoded=True)
    for note in data.notes:
        logger.warning("%s", note)
    with process_group(config.device) as (share, device):
        trainer = Trainer(
            config,
            data,
            folder,
            show_progress=show_progress,
            device=device,
            share=share,
            calibration=calibration,
        )
        with trainer.opened():
            trainer.run()
    return Run(folder, None if is_writer() else config)


def _tell_recommended(config: TrainConfig) -> None:
    choice = recommendation(config.protocol, config.digits)
    logger.info(
        "recommended for %s: loss %s, preset %s, scores %s, options %s%s (evidence: %s)",
        config.protocol, config.loss, config.preset, ",".join(config.scores or []), choice.options or "none",
        "; provisional" if choice.provisional else "", choice.evidence,
    )  # fmt: skip


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m training.train", description=__doc__)
    parser.add_argument("--protocol", choices=sorted(PROTOCOLS))
    parser.add_argument(
        "--loss",
        choices=[*LOSSES, RECOMMENDED],
        metavar="LOSS",
        help=", ".join([*LOSSES, RECOMMENDED]),
    )
    parser.add_argument(
        "--data",
        type=Path,
        help="root of the data set (toy: EMNIST; p1-p3: ImageNet; folders: known/<class>/, negative/, unknown/)",
    )
    parser.add_argument("--epochs", type=int, help="default: the protocol's")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument(
        "--preset", choices=sorted(PRESETS), help="default: thesis, or the recommended one"
    )
    parser.add_argument(
        "--digits", choices=("emnist", "mnist"), help="source of the toy protocol's digits"
    )
    parser.add_argument(
        "--image-size",
        type=int,
        help="side of the model's input, pixels (p1-p3, folders; default 224)",
    )
    parser.add_argument(
        "--allow-missing-classes",
        action="store_true",
        help="restrict the protocol to what is there",
    )
    parser.add_argument(
        "--option", "-o", type=parse_option, action="append", default=[], metavar="KEY=VALUE",
        help="any option of the loss, network, data or preset, e.g. feature_dim=117; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--list-options",
        action="store_true",
        help="only list these options with types and defaults, of a protocol and loss (default: glyphs, cos_eos)",
    )
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda")
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        help="of the backbone; auto: bfloat16 where the hardware has it; default: the preset's",
    )
    parser.add_argument(
        "--workers", type=int, default=0, help="data loading processes, without a cache"
    )
    parser.add_argument(
        "--cache",
        default="auto",
        help=f"folder of decoded photographs; auto: {IMAGE_CACHE} where a GPU trains; none: decode on the way",
    )
    parser.add_argument(
        "--name", help="folder below runs/; default: protocol, loss, preset, seed and a digest"
    )
    parser.add_argument("--runs", type=Path, default=RUNS)
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; 0 on success, 1 with one clear line otherwise."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    if arguments.list_options:
        from training.options import listing

        protocol, loss = arguments.protocol or "glyphs", arguments.loss or "cos_eos"
        print(listing(protocol, loss, arguments.preset, digits=arguments.digits))
        return 0
    missing = [f"--{name}" for name in ("protocol", "loss") if getattr(arguments, name) is None]
    if missing:
        parser.error(f"the following arguments are required: {', '.join(missing)}")
    from training.data import MissingClasses
    from training.engine import TrainingDiverged
    from training.parallel import is_writer
    from training.runs import make_config

    level = logging.INFO if is_writer() else logging.ERROR  # one of several processes speaks
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr)
    options = dict(arguments.option)
    for key in ("digits", "image_size", "precision"):
        if getattr(arguments, key) is not None:
            options[key] = getattr(arguments, key)
    if arguments.allow_missing_classes:
        options["allow_missing_classes"] = True
    try:
        config = make_config(
            arguments.protocol,
            arguments.loss,
            preset=arguments.preset,
            seed=arguments.seed,
            epochs=arguments.epochs,
            data=arguments.data,
            options=options,
            device=arguments.device,
            workers=arguments.workers,
            name=arguments.name,
            cache=arguments.cache,
        )
        if arguments.loss == RECOMMENDED:
            _tell_recommended(config)
        run = train(config, runs=arguments.runs, show_progress=not arguments.quiet)
    except (ValueError, MissingClasses, TrainingDiverged, OSError) as error:
        logger.error("error: %s", error)
        return 1
    except KeyboardInterrupt:
        logger.error("interrupted; the same command continues where it stopped")
        return 130
    logger.info(
        "trained: %s (next: make evaluate RUN=%s, make export RUN=%s)",
        run.folder,
        run.folder,
        run.folder,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
