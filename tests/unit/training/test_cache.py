"""The cache of decoded photographs: same bits as the files give, survives kills, refuses what is not right."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import logging
import os
import resource
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import training.cache as cache
import training.cache_build as cache_build
import training.decoded as decoded_module
from openset.image_headers import UnreadableImage
from openset.preprocessing import Preprocessing
from training.augmentation import resample
from training.batches import Share, epoch_order, training_loader
from training.cache import open_cache
from training.cache_build import CacheDamaged
from training.data import ProtocolData, Split, load_protocol
from training.decoded import CachedImages, DecodedImages, residence
from training.engine import Trainer
from training.protocols import get_protocol
from training.runs import make_config

ROOT = Path(__file__).parents[3]
FORM = Preprocessing(mode="RGB", image_size=28, resize=32)


def write_image(file: Path, seed: int) -> None:
    """A photograph of some odd size, portrait or landscape; every third one larger, with an EXIF rotation."""
    random = np.random.default_rng(seed)
    height, width = (int(side) for side in random.integers(33, 90, 2))
    pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
    file.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    if seed % 3 == 0:
        exif[0x0112] = 6
    Image.fromarray(pixels).save(file, quality=90, exif=exif)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("photographs")
    paths = [root / f"{number:02}.jpeg" for number in range(20)]
    for number, path in enumerate(paths):
        write_image(path, number)
    return [str(path) for path in paths]


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (cache, cache_build):
        monkeypatch.setattr(module, "CHUNK", 4)


def opened(files: list[str], folder: Path, **changes: Any) -> Any:
    values = {"root": Path(files[0]).parent, "preprocessing": FORM, "show_progress": False}
    return open_cache(folder, files, **(values | changes))


def place_of(folder: Path) -> Path:
    (place,) = (path for path in folder.iterdir() if path.is_dir())
    return place


# -- the same images --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, protocol = tmp_path_factory.mktemp("tree"), get_protocol("p2")
    seed = 0
    for group in ("known", "negative", "unknown"):
        for wnid in getattr(protocol, group)[:2]:
            for part, count in (("train", 0 if group == "unknown" else 10), ("val", 3)):
                for number in range(count):
                    write_image(root / part / wnid / f"{wnid}_{number}.JPEG", seed := seed + 1)
    return root


def load_tree(tree: Path, image_cache: Path | None, **changes: Any) -> ProtocolData:
    options = {"allow_missing_classes": True, "image_size": 28} | changes
    return load_protocol("p2", data=tree, image_cache=image_cache, **options)


def images_of(split: Split, form: Preprocessing) -> torch.Tensor:
    return torch.cat([images for images, _, _ in split.batches(7, form)])


def test_cache_and_files_give_the_same_evaluation_tensors(tree: Path, tmp_path: Path) -> None:
    plain, cached = load_tree(tree, None), load_tree(tree, tmp_path)
    for part in ("train", "validation", "test"):
        left, right = getattr(plain, part), getattr(cached, part)
        assert isinstance(right.images, CachedImages)
        assert torch.equal(images_of(left, plain.preprocessing), images_of(right, FORM))
        np.testing.assert_array_equal(left.labels, right.labels)
        picked = np.array([5, 1, 3])
        assert torch.equal(
            images_of(left.subset(picked), FORM), images_of(right.subset(picked), FORM)
        )


def test_splits_of_another_seed_share_the_cache(tree: Path, tmp_path: Path) -> None:
    for seed in (1, 2):
        load_tree(tree, tmp_path, seed=seed, parts=("train", "validation"))
    assert len(list(tmp_path.iterdir())) == 1
    load_tree(tree, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2  # the test part has a cache of its own


def views(data: ProtocolData, augmentation: str, **changes: Any) -> list[Any]:
    values = {"batch_size": 7, "seed": 3, "epoch": 0} | changes
    return list(
        training_loader(
            data.train, preprocessing=data.preprocessing, augmentation=augmentation, **values
        )
    )


def test_crops_and_flips_from_the_cache_are_those_of_the_files(tree: Path, tmp_path: Path) -> None:
    plain, cached = load_tree(tree, None), load_tree(tree, tmp_path)
    for left, right in zip(views(plain, "thesis"), views(cached, "thesis"), strict=True):
        assert torch.equal(left[0], right[0])
        assert torch.equal(left[1], right[1])


@pytest.mark.parametrize("augmentation", ["thesis", "modern"])
def test_views_do_not_depend_on_resume_or_neighbours(
    tree: Path, tmp_path: Path, augmentation: str
) -> None:
    data = load_tree(tree, tmp_path)
    whole = views(data, augmentation)
    resumed = views(data, augmentation, skip_batches=2)
    for left, right in zip(whole[2:], resumed, strict=True):
        assert torch.equal(left[0], right[0])
    other_epoch = views(data, augmentation, epoch=1)
    assert not torch.equal(whole[0][0], other_epoch[0][0])
    in_halves = [views(data, augmentation, share=Share(rank, 2)) for rank in (0, 1)]
    for batch, even, odd in zip(whole, *in_halves, strict=True):
        assert torch.equal(batch[0][0::2], even[0])
        assert torch.equal(batch[0][1::2], odd[0])
        assert torch.equal(batch[1], even[1])


def test_resampling_is_pillows_up_to_one_level() -> None:
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (6, 50, 60, 3), dtype=np.uint8)
    boxes = np.array(
        [[0, 0, 60, 50], [3.31, 1.73, 20.17, 18.29], [10, 5, 38, 33], [0.5, 0.5, 59.5, 49], [30, 20, 60, 50],
         [20.2, 10.9, 51.4, 37.7]]
    ).T  # fmt: skip
    limits = torch.tensor([[60] * 6, [50] * 6])
    ours = resample(
        torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.from_numpy(boxes), limits, 28
    )
    for image, box, result in zip(pixels, boxes.T, ours, strict=True):
        theirs = Image.fromarray(image).resize((28, 28), Image.Resampling.BILINEAR, box=tuple(box))
        difference = np.asarray(theirs).astype(int) - result.permute(1, 2, 0).numpy()
        assert abs(difference).max() <= 1
        assert (difference != 0).mean() < 0.02


def test_modern_views_from_the_cache_are_boxes_of_the_resized_image(
    files: list[str], tmp_path: Path
) -> None:
    from training.augmentation import draw_view

    images = CachedImages(opened(files, tmp_path), np.arange(len(files))[::-1].copy())
    indices = np.array([2, 11, 17])
    ours = images.views(indices, FORM, "modern", (5, 6), torch.device("cpu"))
    for index, view in zip(indices, ours, strict=True):
        resized = FORM.resized(FORM.open(files[len(files) - 1 - index]))
        random = np.random.default_rng([5, 6, index])
        *box, flipped = draw_view("modern", resized.width, resized.height, 28, random)
        expected = FORM.to_tensor(
            resized.resize((28, 28), Image.Resampling.BILINEAR, box=tuple(box))
        )
        difference = (expected.flip(2) if flipped else expected).int() - view.int()
        assert difference.abs().max() <= 1


def test_a_gpus_way_of_gathering_windows_gives_the_same_bytes(
    files: list[str], tmp_path: Path
) -> None:
    decoded = opened(files, tmp_path)
    rows = np.array([3, 3, 0, 19])
    tops, lefts = np.array([0, 4, 2, 1]), np.array([3, 0, 2, 4])
    by_slices = decoded._by_slices(rows, tops, lefts, 28, 28)
    assert torch.equal(by_slices, decoded._by_index(rows, tops, lefts, 28, 28))


def test_images_live_where_there_is_room() -> None:
    assert residence(10, 10, 0) == "GPU memory"
    assert residence(10, 9, 10) == "pinned memory"
    assert residence(10, 9, 9) == "the memory map"


def test_processes_of_one_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    offered = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (0, 0))
    monkeypatch.setattr(decoded_module, "_available_host_memory", lambda: 800)
    monkeypatch.setattr(
        decoded_module, "residence", lambda _, __, host: offered.append(host) or "the memory map"
    )
    images = DecodedImages(torch.zeros(3, dtype=torch.uint8), *[np.arange(1)] * 3, 3, {})
    for count in ("1", "4"):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", count)
        assert images.on(torch.device("cuda")) is images
    assert offered == [400, 100]


# -- kills, disks, damage ---------------------------------------------------------------------------------------------


def built(files: list[str], folder: Path) -> tuple[bytes, dict[str, Any]]:
    place = place_of(folder)
    facts = json.loads((place / "cache.json").read_text())
    return (place / "images.u8").read_bytes(), facts


def test_build_that_was_cut_off_goes_on_where_it_stopped(
    files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened(files, tmp_path / "whole")

    class Killed(BaseException):
        pass

    decoded: list[str] = []
    working = cache_build._decode

    def decode(paths: list[str], *rest: Any) -> Any:
        if len(paths) > 1:
            decoded.extend(paths)
            if files[14] in paths and len(decoded) < 20:
                raise Killed
        return working(paths, *rest)

    monkeypatch.setattr(cache_build, "_decode", decode)
    monkeypatch.setattr(cache_build.os, "sched_getaffinity", lambda process: {0})
    with pytest.raises(Killed):
        opened(files, tmp_path / "broken")
    place = place_of(tmp_path / "broken")
    # A kill may also leave half a chunk, and half a line of the journal.
    with (place / "images.u8.partial").open("ab") as stream:
        stream.write(b"half")
    with (place / "journal.jsonl").open("a") as lines:
        lines.write('{"bytes": 12')
    decoded.clear()
    decoded.extend(["not", "again"] * 10)
    opened(files, tmp_path / "broken")
    assert decoded[20:] == files[12:]
    assert built(files, tmp_path / "broken") == built(files, tmp_path / "whole")
    assert sorted(path.name for path in place.iterdir()) == [
        "cache.json", "images.u8", "index.npz", "lock",
    ]  # fmt: skip


def test_process_killed_while_building_continues(files: list[str], tmp_path: Path) -> None:
    """kill -9 right after the second chunk was written, of the real thing in a process of its own."""
    program = f"""
import os, sys, training.cache as cache, training.cache_build as cache_build
from pathlib import Path
from openset.preprocessing import Preprocessing
cache.CHUNK = cache_build.CHUNK = 4
written = []
class Bar:
    def __init__(self, **options): pass
    def __enter__(self): return self
    def __exit__(self, *error): pass
    def update(self, count):
        written.append(count)
        if len(written) == 2: os.kill(os.getpid(), 9)
cache_build.tqdm = Bar
form = Preprocessing(mode="RGB", image_size=28, resize=32)
files = {files!r}
cache.open_cache(Path({str(tmp_path / "killed")!r}), files, root=Path(files[0]).parent, preprocessing=form)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False)
    assert done.returncode == -9
    journal = place_of(tmp_path / "killed") / "journal.jsonl"
    assert len(journal.read_text().splitlines()) == 2
    opened(files, tmp_path / "killed")
    opened(files, tmp_path / "whole")
    assert built(files, tmp_path / "killed") == built(files, tmp_path / "whole")


def test_need_of_disk_is_announced_and_a_disk_too_small_is_refused_before_the_start(
    files: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO):
        decoded = opened(files, tmp_path / "large")
    assert f"about {decoded.pixels.numel() / 1e6:.3f} MB" in caplog.text
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1000, 0, 1000))
    with pytest.raises(OSError, match=r"needs about .* are free.*CACHE="):
        opened(files, tmp_path / "small")
    assert [path.name for path in place_of(tmp_path / "small").iterdir()] == ["lock"]


def test_disk_that_fills_up_keeps_what_was_decoded(files: list[str], tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))
    try:
        with pytest.raises(OSError, match="what was decoded is kept"):
            opened(files, tmp_path / "full")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len((place_of(tmp_path / "full") / "journal.jsonl").read_text().splitlines()) > 0
    opened(files, tmp_path / "full")
    opened(files, tmp_path / "whole")
    assert built(files, tmp_path / "full") == built(files, tmp_path / "whole")


@pytest.mark.parametrize("name", ["images.u8", "index.npz"])
def test_one_changed_byte_is_refused(files: list[str], tmp_path: Path, name: str) -> None:
    opened(files, tmp_path)
    file = place_of(tmp_path) / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(CacheDamaged, match="Remove that folder and rerun"):
        opened(files, tmp_path)


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"[]", b"null", b"\xff\xfe\x00garbage", b'{"identity": {}, "bytes": 1, "index_sha256": "", "unreadable": []}'],
)  # fmt: skip
def test_facts_that_cannot_be_read_are_refused(
    files: list[str], tmp_path: Path, content: bytes
) -> None:
    opened(files, tmp_path)
    (place_of(tmp_path) / "cache.json").write_bytes(content)
    with pytest.raises(
        CacheDamaged, match=r"cache\.json cannot be read.*Remove that folder and rerun"
    ):
        opened(files, tmp_path)


def test_facts_cut_short_or_with_another_unreadable_file_are_refused(
    files: list[str], tmp_path: Path
) -> None:
    opened(files, tmp_path)
    file = place_of(tmp_path) / "cache.json"
    whole = file.read_text()
    file.write_text(whole[: len(whole) // 2])
    with pytest.raises(CacheDamaged, match=r"cache\.json cannot be read"):
        opened(files, tmp_path)
    file.write_text(json.dumps(json.loads(whole) | {"unreadable": {"3": "no picture"}}))
    with pytest.raises(CacheDamaged, match="other unreadable files"):
        opened(files, tmp_path)


@pytest.mark.parametrize(
    "line",
    [b"\xff\xfe garbage", b"{}", b"[]", b"7", b'{"bytes": 3, "crc32": 0, "sizes": [[1, 2]], "unreadable": {}}',
     b'{"bytes": 3, "sizes": [[1, 1]], "unreadable": {}}', b'{"bytes": 3, "crc32": 0, "sizes": 5, "unreadable": {}}'],
)  # fmt: skip
def test_journal_that_cannot_be_read_is_refused(
    files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: bytes
) -> None:
    finish = cache_build._finish
    monkeypatch.setattr(cache_build, "_finish", lambda *_: sys.exit("killed"))
    with pytest.raises(SystemExit):
        opened(files, tmp_path)
    monkeypatch.setattr(cache_build, "_finish", finish)
    journal = place_of(tmp_path) / "journal.jsonl"
    lines = journal.read_bytes().splitlines()
    journal.write_bytes(b"\n".join([lines[0], line, *lines[2:]]) + b"\n")
    with pytest.raises(
        CacheDamaged, match=r"line 2 of journal\.jsonl.*Remove that folder and rerun"
    ):
        opened(files, tmp_path)


def test_files_of_which_none_can_be_read_are_refused_by_name(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.jpeg" for number in range(3)]
    for path in paths:
        path.write_bytes(b"no picture")
    for _ in range(2):  # also where the cache is there already
        with pytest.raises(UnreadableImage, match=r"none of the 3 files.*0\.jpeg"):
            opened([str(path) for path in paths], tmp_path / "caches", on_unreadable="skip")


def test_first_process_of_a_machine_checks_the_bytes_for_all(
    files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened(files, tmp_path)
    checked = []
    original = cache._check
    monkeypatch.setattr(cache, "_check", lambda *a: checked.append(1) or original(*a))
    for rank, count in (("1", 0), ("0", 1)):
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("LOCAL_RANK", rank)
        opened(files, tmp_path)
        assert len(checked) == count


def test_first_process_of_a_machine_builds_and_announces_while_others_wait(
    files: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The others log errors alone: what they announced nobody would see."""
    waits: list[float] = []

    def first_process_builds(seconds: float) -> None:
        waits.append(seconds)
        assert "cache of 20 images" not in caplog.text
        with monkeypatch.context() as first:
            first.setenv("WORLD_SIZE", "2")
            first.setenv("LOCAL_RANK", "0")
            opened(files, tmp_path)

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(cache.time, "sleep", first_process_builds)
    with caplog.at_level(logging.INFO):
        decoded = opened(files, tmp_path)
    assert len(waits) == 1
    assert len(decoded) == len(files)
    assert caplog.text.count("cache of 20 images") == 1


def test_processes_that_need_not_check_open_the_cache_at_the_same_time(
    files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened(files, tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    original = cache._open

    def open_while_another_reads(*arguments: Any, **options: Any) -> Any:
        with (place_of(tmp_path) / "lock").open() as other:
            fcntl.flock(other, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return original(*arguments, **options)

    monkeypatch.setattr(cache, "_open", open_while_another_reads)
    opened(files, tmp_path)


def test_shortened_cache_is_refused(files: list[str], tmp_path: Path) -> None:
    opened(files, tmp_path)
    os.truncate(place_of(tmp_path) / "images.u8", 1000)
    with pytest.raises(CacheDamaged, match="another length"):
        opened(files, tmp_path)


def test_other_files_or_settings_never_meet_an_old_cache(
    files: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copies = [shutil.copy2(path, tmp_path) for path in files[:6]]
    folder = tmp_path / "caches"
    opened(copies, folder)
    opened(copies, folder, preprocessing=dataclasses.replace(FORM, resize=40))
    opened(copies, folder, preprocessing=dataclasses.replace(FORM, interpolation="bicubic"))
    assert len(list(folder.iterdir())) == 3
    write_image(Path(copies[0]), 77)
    with caplog.at_level(logging.INFO):
        decoded = opened(copies, folder)
    assert len(list(folder.iterdir())) == 4
    assert "remove those that are out of date" in caplog.text
    images = CachedImages(decoded, np.array([0])).evaluation_form(np.array([0]), FORM)
    assert torch.equal(images[0], FORM.transform(FORM.open(copies[0])))


def test_unreadable_file_is_fatal_or_left_out_by_name(
    tree: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(tree, tmp_path / "tree")
    plain = load_tree(tmp_path / "tree", None, on_unreadable="skip")
    broken = Path(plain.test.images.paths[2])
    broken.write_bytes(b"no picture")
    with pytest.raises(UnreadableImage, match=rf"{broken.name}.*on_unreadable=skip"):
        load_tree(tmp_path / "tree", tmp_path / "caches")
    data = load_tree(tmp_path / "tree", tmp_path / "caches", on_unreadable="skip")
    seen = np.concatenate([indices for _, _, indices in data.test.batches(4, FORM)])
    assert seen.tolist() == [index for index in range(len(data.test)) if index != 2]
    assert broken.name in caplog.text
    assert torch.equal(images_of(plain.test, FORM), images_of(data.test, FORM))
    # Built with "skip", then read with "fail": refused when the file is asked for.
    data = load_tree(tmp_path / "tree", tmp_path / "caches")
    with pytest.raises(UnreadableImage, match=broken.name):
        list(data.test.batches(4, FORM))


@pytest.mark.parametrize("cached", [False, True])
def test_resume_counts_a_batch_of_which_no_file_can_be_read(
    tree: Path, tmp_path: Path, cached: bool
) -> None:
    shutil.copytree(tree, tmp_path / "tree")
    options = {"data": tmp_path / "tree", "cache": tmp_path / "caches" if cached else None}

    def trainer() -> Trainer:
        config = make_config(
            "p2", "cos_os", epochs=1, device="cpu", **options,
            options={"allow_missing_classes": True, "on_unreadable": "skip", "image_size": 28, "batch_size": 4},
        )  # fmt: skip
        made = Trainer(
            config, config.load_data(("train", "validation"), decoded=True), tmp_path / "run", show_progress=False
        )  # fmt: skip
        made._step = lambda images, labels: seen.append((images, labels)) or torch.zeros(())  # type: ignore
        return made

    seen: list[Any] = []
    whole = load_tree(tmp_path / "tree", None).train
    for index in epoch_order(whole, seed=42, epoch=0)[8:12]:
        Path(whole.images.paths[index]).write_bytes(b"no picture")
    uninterrupted = trainer()
    uninterrupted._train_epoch(None)
    steps = uninterrupted.steps_per_epoch
    assert uninterrupted.progress.step == steps
    assert uninterrupted.progress.sample_count == len(whole) - 4
    expected, done = seen, 5  # the third of five could not be read
    assert len(expected) == steps - 1
    seen = []
    continued = trainer()
    continued.progress.step = done
    continued._train_epoch(None)
    for left, right in zip(expected[done - 1 :], seen, strict=True):
        assert torch.equal(left[0], right[0])
        assert torch.equal(left[1], right[1])
