import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sbi_slotflow.storage import read_tensors, write_atomically, write_tensors

META: dict[str, Any] = {"format": "test", "version": 2, "nested": {"a": [1, 2.5, None]}}
TENSORS = {
    "float": torch.randn(3, 2),
    "double": torch.randn(4, dtype=torch.float64),
    "integer": torch.arange(5),
    "boolean": torch.tensor([True, False]),
    "scalar": torch.tensor(1.5),
    "empty": torch.zeros(0, 3),
}


@pytest.fixture(name="path")
def _path(tmp_path: Path) -> Path:
    return tmp_path / "weights.safetensors"


def written(path: Path) -> Path:
    write_tensors(path, TENSORS, META)
    return path


def same(found: dict[str, torch.Tensor]) -> bool:
    return found.keys() == TENSORS.keys() and all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype
        for name, tensor in TENSORS.items()
    )


def test_what_is_read_is_what_was_written(path: Path) -> None:
    tensors, meta = read_tensors(written(path), "test", 2)
    assert same(tensors)
    assert meta == META
    assert os.listdir(path.parent) == [path.name]


def test_paths_may_be_strings_and_folders_are_made(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "c.safetensors"
    write_tensors(str(path), TENSORS, META)
    assert same(read_tensors(str(path), "test", 2)[0])


def test_views_aliases_and_parameters_are_written_as_plain_tensors(path: Path) -> None:
    base = torch.nn.Parameter(torch.randn(3, 4))
    views = {"whole": base, "same": base, "transposed": base.mT, "row": base[1]}
    write_tensors(path, views, META)
    tensors, _ = read_tensors(path, "test", 2)
    for name, view in views.items():
        assert torch.equal(tensors[name], view)
        assert not tensors[name].requires_grad


def test_an_older_version_is_read(path: Path) -> None:
    assert same(read_tensors(written(path), "test", 3)[0])


def test_overwriting_replaces_the_file(path: Path) -> None:
    write_tensors(path, {"other": torch.zeros(2)}, META)
    assert same(read_tensors(written(path), "test", 2)[0])


@pytest.mark.parametrize("step", ["replace", "fsync"])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_failing_write_leaves_the_old_file_and_nothing_else(
    step: str,
    error: type[BaseException],
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    old = written(path).read_bytes()

    def fail(*args: object, **kwargs: object) -> None:
        raise error("stop")

    with monkeypatch.context() as patch:
        patch.setattr(os, step, fail)
        with pytest.raises(error, match="stop"):
            write_tensors(path, {"other": torch.zeros(2)}, META)
    assert path.read_bytes() == old
    assert os.listdir(path.parent) == [path.name]


def test_a_description_that_is_no_json_leaves_the_old_file(path: Path) -> None:
    old = written(path).read_bytes()
    with pytest.raises(TypeError, match="JSON"):
        write_tensors(path, TENSORS, {**META, "bad": torch.zeros(2)})
    assert path.read_bytes() == old
    assert os.listdir(path.parent) == [path.name]


def test_bytes_are_written_as_they_are(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a.txt", b"one\r\n\x00two", "text", lambda _: False)
    assert (tmp_path / "a.txt").read_bytes() == b"one\r\n\x00two"


def put_text(path: Path) -> None:
    path.write_text("a user's notes")


def put_weights(path: Path) -> None:
    save_file({"weight": torch.ones(3)}, path)


def put_another_format(path: Path) -> None:
    write_tensors(path, TENSORS, {**META, "format": "another"})


def put_cut_off(path: Path) -> None:
    written(path).write_bytes(path.read_bytes()[:-7])


@pytest.mark.parametrize(
    "put", [put_text, put_weights, put_another_format, put_cut_off]
)
@pytest.mark.parametrize("link", [False, True])
def test_what_was_not_written_as_this_format_is_not_replaced(
    put: Callable[[Path], None], link: bool, path: Path
) -> None:
    real = path.with_name("real") if link else path
    put(real)
    if link:
        path.symlink_to(real)
    before, names = real.read_bytes(), sorted(os.listdir(path.parent))
    with pytest.raises(FileExistsError, match="no test that sbi_slotflow wrote"):
        write_tensors(path, TENSORS, META)
    assert real.read_bytes() == before
    assert sorted(os.listdir(path.parent)) == names


def test_a_folder_and_a_link_to_nothing_are_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    for name in ("folder", "link"):
        with pytest.raises(FileExistsError, match="not overwritten"):
            write_tensors(tmp_path / name, TENSORS, META)
    assert (tmp_path / "link").is_symlink()


def test_a_link_to_a_file_of_ours_stays_a_link(path: Path) -> None:
    link = path.with_name("link")
    link.symlink_to(written(path))
    write_tensors(link, {"other": torch.zeros(2)}, META)
    assert link.is_symlink()
    assert set(read_tensors(path, "test", 2)[0]) == {"other"}


def test_an_empty_file_may_be_written_to(path: Path) -> None:
    path.touch()
    assert same(read_tensors(written(path), "test", 2)[0])


def test_a_missing_file_is_reported(tmp_path: Path) -> None:
    for path in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(FileNotFoundError, match="no file at"):
            read_tensors(path, "test", 2)


def test_a_file_cut_short_is_corrupt(path: Path) -> None:
    content = written(path).read_bytes()
    for size in (0, 4, 8, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(ValueError, match="is corrupt or no safetensors file"):
            read_tensors(path, "test", 2)


@pytest.mark.parametrize(
    "content",
    [b"hello world, this is text", b"\x80\x04\x95" * 50, b"\xff" * 200, b"\x00" * 200],
    ids=["text", "pickle", "ones", "zeros"],
)
def test_a_file_of_another_kind_is_corrupt(content: bytes, path: Path) -> None:
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is corrupt or no safetensors file"):
        read_tensors(path, "test", 2)


FOREIGN = {
    "no-description": None,
    "other-description": {"format": "pt"},
    "no-json": {"sbi_slotflow": "{"},
    "list": {"sbi_slotflow": "[1, 2]"},
    "number": {"sbi_slotflow": "1"},
    "null": {"sbi_slotflow": "null"},
    "no-format": {"sbi_slotflow": json.dumps({"version": 1})},
    "no-version": {"sbi_slotflow": json.dumps({"format": "test"})},
    "text-version": {"sbi_slotflow": json.dumps({"format": "test", "version": "2"})},
    "null-version": {"sbi_slotflow": json.dumps({"format": "test", "version": None})},
}


@pytest.mark.parametrize("metadata", FOREIGN.values(), ids=FOREIGN)
def test_a_safetensors_file_of_another_origin_is_rejected(
    metadata: dict[str, str] | None, path: Path
) -> None:
    save_file({"a": torch.zeros(2)}, path, metadata=metadata)
    with pytest.raises(ValueError, match="was not written by sbi_slotflow"):
        read_tensors(path, "test", 2)


def test_another_format_is_rejected(path: Path) -> None:
    with pytest.raises(ValueError, match="holds test, expected estimator"):
        read_tensors(written(path), "estimator", 2)


def test_a_newer_version_is_rejected(path: Path) -> None:
    with pytest.raises(ValueError, match=r"has version 2 .*reads up to 1"):
        read_tensors(written(path), "test", 1)
