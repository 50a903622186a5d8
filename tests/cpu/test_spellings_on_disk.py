"""Traced spellings of patterns are the same whatever the program has set, and the same again from disk."""

import contextlib
import copy
import os
import pickle

import pytest
import torch

import rewriter
from rewriter import spellings
from rewriter.library import built_in
from rewriter.pattern import Reference, TracedReference, _trace


def of_each_pattern(number):
    for pattern in built_in().values():
        for references in (pattern.references, *pattern.within.values()):
            yield from references[:number]


def written(traced: TracedReference):
    """All that a match reads of it, as plain data."""
    place = {value: i for i, value in enumerate(traced.shadow.values)}
    values = [(v.op, v.attrs, v.meta, [place[i] for i in v.inputs], [place[u] for u in v.users]) for v in place]
    by_operator = {op: [place[v] for v in found] for op, found in traced.shadow.by_op.items()}
    numbers = [v.number for v in place]
    equal = [numbers.index(n) for n in numbers]
    named = {name: place[v] for v, name in traced.holes.items()}
    factors = {place[v]: (name, place[other]) for v, (name, other) in traced.factors.items()}
    roots = [place[v] for v in (traced.root, *traced.others)], [place[v] for v in traced.operators]
    return values, by_operator, equal, named, traced.consts, factors, roots, [place[v] for v in traced.needed]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("REWRITER_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(spellings, "_stored", set())
    spellings._file.cache_clear()
    yield tmp_path / "spellings"
    spellings._file.cache_clear()


class Some:
    """What `restore` and `keep` read of a pattern."""

    def __init__(self):
        self.references = tuple(copy.copy(r) for r in of_each_pattern(3))
        self.within = {"x": (Reference(lambda x: torch.sin(x), {"x": (2, 3)}),)}
        for reference in self.references:
            reference.__dict__.pop("traced", None)

    def all(self):
        return (*self.references, *self.within["x"])


def test_the_same_from_disk(folder):
    first, second = Some(), Some()
    spellings.keep({"some": first})
    assert not folder.exists(), "nothing has been traced"
    expected = [written(r.traced) for r in first.all()]
    spellings.keep({"some": first})
    spellings.restore({"some": second})
    assert all("traced" in r.__dict__ for r in second.all())
    assert [written(r.traced) for r in second.all()] == expected
    assert all(v.node is None for r in second.all() for v in r.traced.shadow.values)


def test_what_is_traced_later_is_added(folder):
    first, second = Some(), Some()
    for reference in first.all():
        reference.traced  # noqa: B018
        spellings.keep({"some": first})
    spellings.restore({"some": second})
    assert all("traced" in r.__dict__ for r in second.all())
    (file,) = folder.iterdir()
    was = file.stat().st_mtime_ns
    spellings.keep({"some": second})
    assert file.stat().st_mtime_ns == was, "there is nothing new"


@pytest.mark.parametrize("content", [b"", b"no pickle", pickle.dumps([1, 2]), pickle.dumps({"some  0": 1})[:-3]])
def test_a_file_that_is_damaged_is_none(folder, content):
    spellings._file().parent.mkdir(parents=True)
    spellings._file().write_bytes(content)
    some = Some()
    spellings.restore({"some": some})
    assert not any("traced" in r.__dict__ for r in some.all())


def test_a_folder_that_can_not_be_written(tmp_path, monkeypatch, folder):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("REWRITER_CACHE_DIR", str(tmp_path / "file"))
    some = Some()
    some.references[0].traced  # noqa: B018
    spellings.keep({"some": some})
    spellings.restore({"some": some})


def test_its_name_tells_sources_and_versions_apart(folder, monkeypatch):
    file = spellings._file()
    assert file.parent == folder and spellings._file.__wrapped__() == file
    monkeypatch.setattr(torch, "__version__", "1.2.3")
    assert spellings._file.__wrapped__() != file
    monkeypatch.undo()
    monkeypatch.setattr(spellings, "__file__", os.path.join(os.path.dirname(rewriter.__file__), "canonical", "x.py"))
    assert spellings._file.__wrapped__().name != file.name


def test_old_files_are_removed(folder):
    folder.mkdir(parents=True)
    for age in range(20):
        (folder / f"{age}.pickle").write_text("")
        os.utime(folder / f"{age}.pickle", (10**9 - age,) * 2)
    some = Some()
    some.references[0].traced  # noqa: B018
    spellings.keep({"some": some})
    assert spellings._file().exists() and len(list(folder.iterdir())) == 8


@contextlib.contextmanager
def bfloat16_by_default():
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    "setting",
    [
        bfloat16_by_default,
        torch.no_grad,
        lambda: torch.device("meta"),
        lambda: torch.autocast("cpu", torch.bfloat16),
    ],
    ids=["dtype", "no_grad", "device", "autocast"],
)
def test_the_same_whatever_the_program_has_set(setting):
    for reference in of_each_pattern(2):
        with setting():
            found = _trace(reference)
        assert written(found) == written(reference.traced)
