"""Protocols and data: published facts, splits, order, refusals."""

from __future__ import annotations

import fcntl
import gzip
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from openset.image_headers import UnreadableImage
from openset.labels import NEGATIVE, UNKNOWN
from tests.factories import write_idx
from training import batches
from training.augmentation import TurnedNegatives
from training.batches import Share, training_loader
from training.data import MissingClasses, load_protocol, stratified_split
from training.protocols import PROTOCOLS, get_protocol
from training.runs import make_config

# -- class lists -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "sizes"), [("p1", (116, 67, 166)), ("p2", (30, 31, 55)), ("p3", (151, 97, 164))]
)
def test_imagenet_protocols_have_the_published_sizes_and_are_disjoint(
    name: str, sizes: tuple[int, ...]
) -> None:
    protocol = get_protocol(name)
    groups = (protocol.known, protocol.negative, protocol.unknown)
    assert tuple(map(len, groups)) == sizes
    assert all(list(group) == sorted(group) for group in groups)
    assert len(set().union(*groups)) == sum(sizes)
    assert len(set(protocol.class_names.values())) == sum(sizes)


def test_facts_that_tie_the_protocols_together() -> None:
    p1, p2, p3 = (get_protocol(name) for name in ("p1", "p2", "p3"))
    assert max(p2.known) < min(p2.negative)
    assert set(p2.known) | set(p2.negative) <= set(p1.known)
    dogs = list(p1.known)
    counts = [len(set(dogs) & set(group)) for group in (p3.known, p3.unknown, p3.negative)]
    assert counts == [58, 19, 39]
    assert set(dogs[::2]) == set(dogs) & set(p3.known)


def test_damaged_class_list_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from training import protocols

    monkeypatch.setattr(
        protocols.hashlib, "sha256", lambda content: protocols.hashlib.sha1(content)
    )
    protocols.get_protocol.cache_clear()
    with pytest.raises(ValueError, match="checksum"):
        protocols.get_protocol("p2")
    monkeypatch.undo()
    protocols.get_protocol.cache_clear()


def test_letters_that_look_like_digits_are_in_no_group() -> None:
    toy = get_protocol("toy")
    assert not {"G", "I", "L", "O"} & set(toy.negative + toy.unknown)
    assert (len(toy.negative), len(toy.unknown)) == (11, 11)


def test_unknown_protocol_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"glyphs.*p3"):
        get_protocol("p4")
    assert PROTOCOLS[-1] == "folders"


# -- toy -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def emnist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten images of each class; pixel (row 2, column 5) of the upright image is lit."""
    root = tmp_path_factory.mktemp("emnist")
    upright = np.zeros((28, 28), np.uint8)
    upright[2, 5] = 255
    for part, prefix in (("train", "train"), ("test", "t10k")):
        digits, letters = np.repeat(np.arange(10), 10), np.repeat(np.arange(1, 27), 10)
        for name, labels in (("emnist-mnist", digits), ("emnist-letters", letters)):
            write_idx(
                root / "emnist" / f"{name}-{part}-images-idx3-ubyte.gz",
                np.tile(upright.T, (len(labels), 1, 1)),
            )
            write_idx(root / "emnist" / f"{name}-{part}-labels-idx1-ubyte.gz", labels)
        write_idx(root / "mnist" / f"{prefix}-images-idx3-ubyte.gz", np.tile(upright, (100, 1, 1)))
        write_idx(root / "mnist" / f"{prefix}-labels-idx1-ubyte.gz", digits)
    return root


@pytest.mark.parametrize("digits", ["emnist", "mnist"])
def test_toy_images_stand_upright_whatever_their_source(emnist: Path, digits: str) -> None:
    data = load_protocol("toy", data=emnist, digits=digits)
    for split in (data.train, data.validation, data.test):
        assert (split.images[:, 0, 2, 5] == 255).all()
        assert int((split.images > 0).sum()) == len(split)


def test_toy_groups_and_split(emnist: Path) -> None:
    data = load_protocol("toy", data=emnist)
    assert data.counts["train"] == {"known": 80, "negative": 88, "unknown": 0}
    assert data.counts["validation"] == {"known": 20, "negative": 22, "unknown": 0}
    assert data.counts["test"] == {"known": 100, "negative": 110, "unknown": 110}
    assert set(data.test.groups[data.test.labels == UNKNOWN]) == set("PQRSTUVWXYZ")
    assert not set(data.train.sample_ids) & set(data.validation.sample_ids)
    assert any("official" in note for note in data.notes)


def test_torchvisions_layout_is_read_too(emnist: Path, tmp_path: Path) -> None:
    raw = tmp_path / "EMNIST" / "raw"
    raw.mkdir(parents=True)
    for file in (emnist / "emnist").iterdir():
        (raw / file.name.removesuffix(".gz")).write_bytes(gzip.decompress(file.read_bytes()))
    ours, theirs = load_protocol("toy", data=emnist), load_protocol("toy", data=tmp_path)
    assert torch.equal(ours.train.images, theirs.train.images)
    np.testing.assert_array_equal(ours.test.labels, theirs.test.labels)


@pytest.mark.parametrize("download", [True, False])
def test_download_is_one_process_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, download: bool
) -> None:
    held: list[bool] = []

    def fetch(*_: object, **__: object) -> None:
        lock = tmp_path / ".download.lock"
        if not lock.is_file():
            held.append(False)
        else:
            with lock.open("a+") as stream:
                try:
                    fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    held.append(False)
                except BlockingIOError:
                    held.append(True)
        raise RuntimeError("nothing to fetch from")

    monkeypatch.setattr("training.characters.datasets.EMNIST", fetch)
    with pytest.raises(FileNotFoundError):
        load_protocol("toy", data=tmp_path, download=download)
    assert held == [download]


def test_missing_emnist_says_where_it_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="download=true"):
        load_protocol("toy", data=tmp_path)
    with pytest.raises(FileNotFoundError, match="DATA="):
        load_protocol("toy")


# -- glyphs ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def glyphs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_protocol("glyphs", size="small", cache_dir=tmp_path_factory.mktemp("cache"))


def test_fonts_of_the_test_are_never_trained_on(glyphs: Any) -> None:
    fonts = [
        {name.split("/")[2] for name in split.sample_ids}
        for split in (glyphs.train, glyphs.validation, glyphs.test)
    ]
    assert fonts[0] == fonts[1]
    assert not fonts[0] & fonts[2]


def test_unknowns_appear_in_the_test_only(glyphs: Any) -> None:
    assert glyphs.counts["train"]["unknown"] == glyphs.counts["validation"]["unknown"] == 0
    assert glyphs.counts["test"]["unknown"] > 0


def test_glyphs_are_drawn_light_on_dark_and_differ(glyphs: Any) -> None:
    images = glyphs.train.images.float()
    assert images.mean() < 80
    assert (images.amax(dim=(1, 2, 3)) > 100).all()
    assert len(torch.unique(images.flatten(1), dim=0)) == len(images)


def test_rendering_is_a_function_of_the_seed(glyphs: Any, tmp_path: Path) -> None:
    again = load_protocol("glyphs", size="small", cache_dir=tmp_path)
    other = load_protocol("glyphs", size="small", cache_dir=tmp_path, seed=7)
    assert torch.equal(again.test.images, glyphs.test.images)
    assert not torch.equal(other.test.images, glyphs.test.images)


# -- imagenet --------------------------------------------------------------------------------------------------------

SHARED = {"known": 3, "negative": 2, "unknown": 2}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some classes of p2 with ten training and three test images each."""
    root, protocol = tmp_path_factory.mktemp("tree"), get_protocol("p2")
    random = np.random.default_rng(0)
    for group, count in SHARED.items():
        for wnid in getattr(protocol, group)[1 : 2 * count : 2]:
            for part, images in (("train", 10), ("val", 3)):
                if group == "unknown" and part == "train":
                    continue
                folder = root / part / wnid
                folder.mkdir(parents=True)
                for number in range(images):
                    pixels = random.integers(0, 256, (40, 50, 3), dtype=np.uint8)
                    Image.fromarray(pixels).save(folder / f"{wnid}_{number}.JPEG")
    return root


def load_tree(tree: Path, **changes: Any) -> Any:
    return load_protocol(
        "p2", data=tree, **({"allow_missing_classes": True, "image_size": 28} | changes)
    )


def test_missing_classes_are_refused_with_a_list(tree: Path) -> None:
    with pytest.raises(MissingClasses) as caught:
        load_protocol("p2", data=tree)
    protocol = get_protocol("p2")
    assert protocol.known[0] in str(caught.value)
    assert protocol.known[1] not in str(caught.value)
    assert "--allow-missing-classes" in str(caught.value)


@pytest.mark.parametrize(
    ("left", "message"),
    [
        ([10, 10, 10, 10, 1], "of 5 classes, the fewest \\(1\\) in n"),
        ([4, 4, 4, 4, 4], "have 20 images of 5 classes, the fewest \\(4\\) in n.*, n"),
        ([10, 10, 2, 2, 2], None),
    ],
)
def test_too_few_images_to_validate_with_are_refused_with_their_classes(
    tree: Path, tmp_path: Path, left: list[int], message: str | None
) -> None:
    shutil.copytree(tree, tmp_path / "tree")
    for folder, count in zip(sorted((tmp_path / "tree/train").iterdir()), left, strict=True):
        for file in sorted(folder.iterdir())[count:]:
            file.unlink()
    if message is None:
        assert len(load_tree(tmp_path / "tree").validation) == 6
    else:
        with pytest.raises(ValueError, match=message):
            load_tree(tmp_path / "tree")


def test_restricted_protocol_relabels_and_says_so(tree: Path) -> None:
    data = load_tree(tree)
    assert len(data.class_ids) == 3
    assert "3 of 30 known" in data.notes[0]
    assert set(data.train.labels) == {0, 1, 2, NEGATIVE}
    assert set(data.test.labels) == {0, 1, 2, NEGATIVE, UNKNOWN}
    for label, wnid in enumerate(data.class_ids):
        assert set(data.test.groups[data.test.labels == label]) == {wnid}


def test_split_is_the_published_rule(tree: Path) -> None:
    from sklearn.model_selection import train_test_split

    data = load_tree(tree)
    protocol = get_protocol("p2")
    classes = [w for w in protocol.known + protocol.negative if (tree / "train" / w).is_dir()]
    paths = [
        f"train/{w}/{name}"
        for w in classes
        for name in sorted(p.name for p in (tree / "train" / w).iterdir())
    ]
    train, validation = train_test_split(
        paths, train_size=0.8, stratify=[path.split("/")[1] for path in paths], random_state=4242
    )
    assert data.train.sample_ids.tolist() == train
    assert data.validation.sample_ids.tolist() == validation


def test_unreadable_image_is_fatal_or_skipped_by_name(
    tree: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import shutil

    shutil.copytree(tree, tmp_path / "tree")
    data = load_tree(tmp_path / "tree")
    broken = Path(data.test.images.paths[2])
    broken.write_bytes(b"no picture")
    with pytest.raises(UnreadableImage, match=broken.name):
        list(data.test.batches(4, data.preprocessing))
    data = load_tree(tmp_path / "tree", on_unreadable="skip")
    seen = np.concatenate([indices for _, _, indices in data.test.batches(4, data.preprocessing)])
    assert seen.tolist() == [index for index in range(len(data.test)) if index != 2]
    assert broken.name in caplog.text
    assert "1 unreadable" in caplog.text


# -- batches ---------------------------------------------------------------------------------------------------------


def loader(data: Any, **changes: Any) -> Any:
    values = {
        "preprocessing": data.preprocessing,
        "augmentation": "thesis",
        "batch_size": 7,
        "seed": 3,
        "epoch": 0,
    }
    return list(training_loader(data.train, **(values | changes)))


@pytest.mark.parametrize("augmentation", ["thesis", "modern"])
def test_photographs_come_alike_whatever_the_workers_or_the_resume(
    tree: Path, augmentation: str
) -> None:
    data = load_tree(tree)
    alone = loader(data, augmentation=augmentation)
    with_worker = loader(data, augmentation=augmentation, workers=1)
    resumed = loader(data, augmentation=augmentation, skip_batches=3)
    for expected, got in [
        *zip(alone, with_worker, strict=True),
        *zip(alone[3:], resumed, strict=True),
    ]:
        assert torch.equal(expected[0], got[0])
        assert torch.equal(expected[1], got[1])
    assert not torch.equal(alone[0][0], loader(data, augmentation=augmentation, epoch=1)[0][0])


def test_every_sample_is_seen_once_an_epoch(glyphs: Any) -> None:
    labels = torch.cat([labels for _, labels in loader(glyphs)])
    assert sorted(labels.tolist()) == sorted(glyphs.train.labels.tolist())
    knowns = torch.cat([labels for _, labels in loader(glyphs, include_negatives=False)])
    assert sorted(knowns.tolist()) == sorted(glyphs.train.labels[glyphs.train.labels >= 0].tolist())


def test_stratified_split_takes_the_share_of_every_group() -> None:
    groups = np.repeat(["a", "b"], [50, 10])
    first, rest = stratified_split(groups, 0.2, 0)
    assert [(groups[first] == g).sum() for g in "ab"] == [10, 2]
    assert sorted([*first, *rest]) == list(range(60))


# -- turned negatives ------------------------------------------------------------------------------------------------


def shown(data: Any, **changes: Any) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = zip(*loader(data, turned_negatives=0.5, **changes), strict=True)
    return torch.cat(images), torch.cat(labels)


def test_a_share_of_the_negatives_is_turned_and_no_known_is(glyphs: Any) -> None:
    plain = [torch.cat(parts) for parts in zip(*loader(glyphs), strict=True)]
    images, labels = shown(glyphs)
    assert torch.equal(labels, plain[1])
    changed = (images != plain[0]).flatten(1).any(dim=1)
    assert not changed[labels >= 0].any()
    assert changed[labels < 0].float().mean().item() == pytest.approx(0.5, abs=0.1)
    ways: dict[int, int] = {}
    for before, after in zip(plain[0][changed], images[changed], strict=True):
        turns = [torch.rot90(image, k, (1, 2)) for image in (before, before.flip(2)) for k in range(4)]  # fmt: skip
        same = [number for number, turned in enumerate(turns) if torch.equal(turned, after)]
        assert same
        ways[same[0]] = ways.get(same[0], 0) + 1
    assert set(ways) == set(range(1, 8))


def test_what_is_turned_depends_on_seed_epoch_and_sample_alone(glyphs: Any) -> None:
    whole = loader(glyphs, turned_negatives=0.5)
    resumed = loader(glyphs, turned_negatives=0.5, skip_batches=3)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(whole[3:], resumed, strict=True))
    halves = [loader(glyphs, turned_negatives=0.5, share=Share(rank, 2)) for rank in (0, 1)]
    for (images, _), first, second in zip(whole, *halves, strict=True):
        assert torch.equal(images[0::2], first[0])
        assert torch.equal(images[1::2], second[0][: len(images) // 2])
    assert not torch.equal(shown(glyphs)[0], shown(glyphs, epoch=1)[0])


@pytest.mark.parametrize("name", ["turned_negatives", "composed_negatives"])
@pytest.mark.parametrize(
    ("protocol", "loss", "share", "message"),
    [
        ("p1", "cos_eos", 0.5, "{name} is for characters"),
        ("glyphs", "softmax", 0.5, "losses that learn from negatives"),
        ("glyphs", "cos_eos", 1.5, "at most 1"),
    ],
)
def test_what_is_done_to_negative_characters_is_refused_where_it_means_nothing(
    protocol: str, loss: str, share: float, message: str, name: str
) -> None:
    with pytest.raises(ValueError, match=message.format(name=name)):
        make_config(protocol, loss, device="cpu", options={name: share})


def test_an_option_that_came_later_leaves_the_names_of_runs_without_it() -> None:
    names = [
        make_config("glyphs", "cos_eos", device="cpu", options=options).name
        for options in (
            {}, {"turned_negatives": 0.0}, {"composed_negatives": 0.0},
            {"turned_negatives": 0.5}, {"composed_negatives": 0.5},
        )
    ]  # fmt: skip
    assert set(names[:3]) == {"glyphs-cos_eos-thesis-s42-b813c6"}
    assert len(set(names)) == 3


@pytest.mark.parametrize(("device", "chosen"), [("cpu", []), ("cuda", []), ("cuda:1", [1])])
def test_thread_that_makes_batches_takes_the_gpu_that_was_named(
    monkeypatch: pytest.MonkeyPatch, device: str, chosen: list[int]
) -> None:
    """Torch refuses to set a device without a number."""
    taken: list[int | None] = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: taken.append(device.index))
    batch = (torch.zeros(1), torch.zeros(1))
    assert list(batches._ahead(iter([batch]), torch.device(device))) == [batch]
    assert taken == chosen


def test_turned_negatives_of_a_later_epoch_lie_where_the_former_did() -> None:
    """A recorded step reads that memory; new memory would leave it with the first epoch's."""
    labels = np.array([NEGATIVE, 0] * 50)
    made = {"labels": labels, "seed": 1, "share": 0.875, "device": torch.device("cpu")}
    turned, fresh = TurnedNegatives(**made, epoch=0), TurnedNegatives(**made, epoch=3)
    place, before = turned._ways.data_ptr(), turned._ways.clone()
    turned.start_epoch(3)
    assert turned._ways.data_ptr() == place
    assert torch.equal(turned._ways, fresh._ways)
    assert not torch.equal(turned._ways, before)
