"""The source `file`, with real files and virtual time."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from support.source_notes import Notes
from vllm_router.config.discovered import MAX_TARGETS
from vllm_router.config.discovery import FileSource
from vllm_router.discovery.file_sd import MAX_BYTES, BadDocument, read_groups, read_json, read_yaml
from vllm_router.discovery.file_source import Files
from vllm_router.discovery.source import Again


def group(*targets: str, **labels: str) -> str:
    return json.dumps([{"targets": targets, "labels": labels}])


@asynccontextmanager
async def following(*paths: Path | str) -> AsyncIterator[Notes]:
    notes = Notes()
    source = Files(FileSource(name="file", paths=tuple(map(str, paths)), interval=0.01))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(source.run, notes, Again())
        yield notes
        nursery.cancel_scope.cancel()


async def test_files_replaced_file_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text(group("a:1"))
    async with following(file) as notes:
        await notes.until(lambda it: it.sets == [["a:1"]])
        other = tmp_path / "new"
        other.write_text(group("a:1", "b:1"))
        os.replace(other, file)
        await notes.until(lambda it: it.sets[-1] == ["a:1", "b:1"])


async def test_files_link_swap_is_noticed(tmp_path: Path) -> None:
    for name in "xy":
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.json").write_text(group(f"{name}:1"))
    link = tmp_path / "data"
    link.symlink_to(tmp_path / "x")
    async with following(link / "a.json") as notes:
        await notes.until(lambda it: it.sets == [["x:1"]])
        swap = tmp_path / "swap"
        swap.symlink_to(tmp_path / "y")
        os.replace(swap, link)
        await notes.until(lambda it: it.sets[-1] == ["y:1"])


async def test_files_broken_file_keeps_its_targets_and_others_go_on(tmp_path: Path) -> None:
    first, second = tmp_path / "a.json", tmp_path / "b.yml"
    first.write_text(group("a:1"))
    second.write_text("- targets: [b:1]\n")
    async with following(tmp_path / "*.json", tmp_path / "*.yml") as notes:
        await notes.until(lambda it: it.sets[-1:] == [["a:1", "b:1"]])
        first.write_text('[{"targets": ["a:1"')
        await notes.until(lambda it: it.problem is not None)
        assert f"{first}: expected JSON" in notes.problem
        second.write_text("- targets: [b:1, c:1]\n")
        await notes.until(lambda it: it.sets[-1] == ["a:1", "b:1", "c:1"])
        first.write_text(group("z:1"))
        await notes.until(lambda it: it.sets[-1] == ["b:1", "c:1", "z:1"] and it.problem is None)


async def test_files_new_and_removed_files_of_a_pattern_are_noticed(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(group("a:1"))
    async with following(tmp_path / "*.json") as notes:
        await notes.until(lambda it: it.sets == [["a:1"]])
        (tmp_path / "b.json").write_text(group("b:1"))
        await notes.until(lambda it: it.sets[-1] == ["a:1", "b:1"])
        (tmp_path / "a.json").unlink()
        await notes.until(lambda it: it.sets[-1] == ["b:1"])
        (tmp_path / "b.json").unlink()
        await notes.until(lambda it: it.problem is not None)
        assert "no file matches" in notes.problem
        assert notes.sets[-1] == ["b:1"], "the last set stays"


async def test_files_removed_file_without_wildcard_keeps_its_set(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text(group("a:1"))
    async with following(file) as notes:
        await notes.until(lambda it: it.sets == [["a:1"]])
        file.unlink()
        await notes.until(lambda it: it.problem is not None)
        assert "No such file" in notes.problem
        assert notes.sets[-1] == ["a:1"]


async def test_files_empty_array_is_an_empty_set_and_empty_file_is_not(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text(group("a:1"))
    async with following(file) as notes:
        await notes.until(lambda it: it.sets == [["a:1"]])
        file.write_text("")
        await notes.until(lambda it: it.problem is not None)
        file.write_text("[]")
        await notes.until(lambda it: it.sets[-1] == [])


async def test_files_unchanged_file_confirms_its_set(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text(group("a:1"))
    async with following(file) as notes:
        await notes.until(lambda it: it.confirmations > 2)
        assert notes.sets == [["a:1"]]


async def test_files_unreadable_for_a_moment_are_read_without_a_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The router had no descriptor left when the file changed."""

    def refuse(*args: object, **options: object) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    file = tmp_path / "a.json"
    file.write_text(group("a:1"))
    async with following(file) as notes:
        await notes.until(lambda it: it.sets == [["a:1"]])
        with monkeypatch.context() as patch:
            patch.setattr(os, "open", refuse)
            file.write_text(group("b:1"))
            await notes.until(lambda it: it.failures > 5)
            # Offered once more with the first failure; a source that answers would not have failed.
            assert notes.sets == [["a:1"]] * 2
        await notes.until(lambda it: it.sets[-1] == ["b:1"])
        assert notes.problem is None


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
async def test_files_what_is_no_file_fails_without_blocking(tmp_path: Path, make: Any) -> None:
    path = tmp_path / "a.json"
    make(path)
    async with following(path) as notes:
        await notes.until(lambda it: it.problem is not None)
        assert "expected a file" in notes.problem


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "empty document"),
        (b"{}", "expected an array of groups, got a table"),
        (b'"x"', "expected an array of groups"),
        (b"[" * 10_000, "expected JSON"),
        (b"\xff\xfe[\x00]\x00", "expected JSON"),
        (b" " * (MAX_BYTES + 1), "expected at most"),
    ],
)
def test_read_json_bad_document_is_refused(data: bytes, problem: str) -> None:
    with pytest.raises(BadDocument, match=problem):
        read_json(data)


@pytest.mark.parametrize(
    "data",
    [
        *(b"a: [1", b"!!python/object/apply:os.system ['true']", b"- &a [*a", b"\x00", b"x: y"),
        *(b"- targets: [!!%s x y]" % tag for tag in (b"bool", b"timestamp", b"float", b"int")),
        *(b'- targets: [!!%s ""]' % tag for tag in (b"bool", b"timestamp", b"float", b"int")),
    ],
)
def test_read_yaml_bad_document_is_refused(data: bytes) -> None:
    with pytest.raises(BadDocument):
        read_yaml(data)


def test_read_groups_bad_parts_are_named_and_others_used() -> None:
    document = [
        {"targets": ["a:1", 7, None]},
        {"targets": "b:1"},
        3,
        {"targets": ["c:1"], "labels": {"__weight": True, "__meta_x": 1, "zone": 9, "__name__": 1}},
        {"targets": ["d:1"], "labels": ["x"]},
    ]
    found, problems = read_json(json.dumps(document).encode())
    assert [target.address for target in found] == ["a:1", "c:1", "d:1"]
    assert found[1].labels == {}
    assert problems == [
        "[0].targets[1]: expected host:port, got 7",
        "[0].targets[2]: expected host:port, got a NoneType",
        '[1]: expected a group like {"targets": ["host:8000"]}',
        '[2]: expected a group like {"targets": ["host:8000"]}',
        '[3].labels."__weight": expected a string, got true',
        "[4].labels: expected a table, got an array",
    ]


def test_read_yaml_label_that_is_no_text_is_left_out() -> None:
    # Python refuses to write a number of more than 4300 decimal digits.
    huge = b"0x" + b"f" * 6000
    found, problems = read_yaml(b"- {targets: [a], labels: {__weight: %s, __name: b}}" % huge)
    assert (found[0].labels, len(problems)) == ({"name": "b"}, 1)


def test_read_yaml_aliases_do_not_explode() -> None:
    """A document of a few hundred bytes that expands to billions of elements."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    with pytest.raises(BadDocument, match="got a table"):
        read_yaml("\n".join(lines).encode())


class _Counted(list[Any]):
    """A list that counts the elements that were read."""

    read = 0

    def __getitem__(self, place: Any) -> Any:
        part = super().__getitem__(place)
        self.read += len(part) if isinstance(place, slice) else 1
        return part

    def __iter__(self) -> Iterator[Any]:
        for one in super().__iter__():
            self.read += 1
            yield one


@pytest.mark.parametrize("target", ["a:1", 7])
def test_read_groups_aliases_of_a_large_group_are_read_up_to_the_limit(target: object) -> None:
    """`- &a {targets: [...]}` and then `- *a` again and again: 1 MB names billions."""
    targets = _Counted([target] * 30_000)
    found, problems = read_groups([{"targets": targets}] * 100)
    assert targets.read == MAX_TARGETS + 1
    assert len(found) + len(problems) == MAX_TARGETS + 1
    assert problems[-1] == f"expected at most {MAX_TARGETS} targets, got more: left out the rest"


def test_read_groups_labels_of_many_groups_are_read_once() -> None:
    class Labels(dict[str, Any]):
        reads = 0

        def items(self) -> Any:
            self.reads += 1
            return super().items()

    labels = Labels(__weight=2, __name=True)
    found, problems = read_groups([{"targets": ["a:1"], "labels": labels}] * 1000)
    assert labels.reads == 1
    assert (len(found), len(problems)) == (1000, 1000)
    assert problems[999] == '[999].labels."__name": expected a string, got true'


def test_read_groups_as_many_targets_as_allowed_are_all_read() -> None:
    found, problems = read_groups([{"targets": ["a:1"] * MAX_TARGETS}])
    assert (len(found), problems) == (MAX_TARGETS, [])
