"""The archive: reproducible, complete, and importable where nothing else of ours is."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from api.archive import read_archive
from api.backend import HandlerAnswer
from openset.artifact import read_card, weights_digest
from openset.model_card import ModelCard
from serving.archive import CannotArchive, build_archive
from tests.factories import image_bytes, tiny_artifact


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_artifact(tmp_path_factory.mktemp("artifact"))


@pytest.fixture(scope="module")
def archive(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_archive(artifact, "tiny", tmp_path_factory.mktemp("store"))


def test_same_input_gives_the_same_bytes(artifact: Path, archive: Path, tmp_path: Path) -> None:
    assert build_archive(artifact, "tiny", tmp_path).read_bytes() == archive.read_bytes()


def test_archive_can_be_read_by_the_containers_users_whatever_the_umask(
    artifact: Path, tmp_path: Path
) -> None:
    before = os.umask(0o077)
    try:
        file = build_archive(artifact, "tiny", tmp_path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(file.stat().st_mode) == 0o644


def test_gateway_reads_card_scores_and_digest_from_it(artifact: Path, archive: Path) -> None:
    model = read_archive(archive)
    assert model.sha256 == weights_digest(artifact)
    assert model.card.factory is not None
    assert model.card.factory["path"] in model.score_sets


def test_unpacked_archive_answers_in_a_clean_process_as_the_gateway_expects(
    archive: Path, tmp_path: Path
) -> None:
    with zipfile.ZipFile(archive) as content:
        content.extractall(tmp_path)
    (tmp_path / "image.png").write_bytes(image_bytes())
    program = """
import sys
sys.path[:] = [p for p in sys.path if p and "site-packages" in p or "lib/python" in p or p.endswith(".zip")]
sys.path.insert(0, ".")
import open_set_handler, openset
assert openset.__file__.startswith(sys.argv[1]), openset.__file__
class Context:
    system_properties = {"model_dir": ".", "gpu_id": None, "batch_size": 1}
    model_yaml_config = {}
    def get_request_header(self, index, name): return {"x-openset-angles": "all"}.get(name)
    def set_response_status(self, *a): raise SystemExit(str(a))
    def set_response_content_type(self, *a): pass
handler = open_set_handler.OpenSetHandler()
handler.initialize(Context())
sys.stdout.buffer.write(handler.handle([{"body": bytearray(open("image.png", "rb").read())}], Context())[0])
assert not {"training", "serving", "api", "ts"} & {name.partition(".")[0] for name in sys.modules}
"""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        cwd=tmp_path, env=environment, capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    answer = HandlerAnswer.model_validate_json(done.stdout)
    assert answer.angles is not None
    assert set(answer.model_dump()) >= {"label", "score", "tau", "path"}


def test_handler_module_defines_one_class_and_no_handle_function() -> None:
    import ast

    tree = ast.parse(Path(__file__).parents[2].joinpath("handlers/open_set_handler.py").read_text())
    assert [node.name for node in tree.body if isinstance(node, ast.ClassDef)] == ["OpenSetHandler"]
    assert "handle" not in [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]


def test_incomplete_artifact_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(CannotArchive, match="make export"):
        build_archive(tmp_path, "x", tmp_path)


def test_answers_name_the_model_as_the_archive_is_called(tmp_path: Path) -> None:
    artifact = tiny_artifact(tmp_path / "artifact")
    archive = build_archive(artifact, "dogs", tmp_path)
    with zipfile.ZipFile(archive) as content:
        card = ModelCard.from_json(content.read("model_card.json").decode())
    original = read_card(artifact)
    assert card.name == "dogs" != original.name
    assert card.digest() == original.digest()
