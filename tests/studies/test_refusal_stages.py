"""Stages: finished work survives an interruption, and nothing stale or damaged is used."""

import json

import pytest

from saefeat.studies.refusal.stages import Stages, fingerprint, write_atomically


def work(stages, names, calls, fail_at=None):
    """A study of several stages that counts its work and may be interrupted."""

    def one(name):
        if name == fail_at:
            raise KeyboardInterrupt
        calls.append(name)
        return {"name": name, "numbers": [1, 2.5]}

    return [stages.run(name, {"of": name}, lambda n=name: one(n)) for name in names]


@pytest.fixture
def said():
    return []


@pytest.fixture
def fresh(tmp_path, said):
    return lambda base="base": Stages(tmp_path / "stages", base, said.append)


def test_an_interrupted_study_goes_on_where_it_stopped(fresh):
    names, calls = ["a", "b/x y", "b/z", "c"], []
    with pytest.raises(KeyboardInterrupt):
        work(fresh(), names, calls, fail_at="b/z")
    assert calls == ["a", "b/x y"]
    again = fresh()
    resumed = work(again, names, calls)
    assert calls == ["a", "b/x y", "b/z", "c"]
    assert (again.reused, again.made) == (["a", "b/x y"], ["b/z", "c"])
    assert resumed == work(fresh(), names, calls)
    assert len(calls) == 4


def test_an_interrupted_stage_leaves_no_file(fresh, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        work(fresh(), ["a"], [], fail_at="a")
    assert list(tmp_path.rglob("*.json")) == []


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[]",
        lambda text: "{}",
        lambda text: text.replace("2.5", "2.6"),
        lambda text: "\udcff",
    ],
)
def test_a_damaged_stage_is_said_and_made_again(fresh, said, tmp_path, damage):
    calls = []
    first = work(fresh(), ["a"], calls)
    path = tmp_path / "stages" / "a.json"
    path.write_text(damage(path.read_text()), errors="surrogateescape")
    assert work(fresh(), ["a"], calls) == first
    assert calls == ["a", "a"]
    assert len(said) == 1
    assert "a.json is damaged" in said[0]
    work(fresh(), ["a"], calls)
    assert calls == ["a", "a"]


def test_changed_settings_or_inputs_never_reuse(fresh, said):
    calls = []
    work(fresh("old"), ["a"], calls)
    work(fresh("new"), ["a"], calls)
    assert calls == ["a", "a"]
    assert fresh("new").run("a", {"of": "other"}, lambda: 5) == 5
    assert said == []


def test_results_are_what_a_resumed_study_would_see(fresh):
    made = fresh().run("a", None, lambda: {"pair": (1, 2), 3: "x"})
    assert made == {"pair": [1, 2], "3": "x"}
    assert fresh().run("a", None, lambda: None) == made


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "file.json"
    write_atomically(path, "old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in path.parent.iterdir()] == ["file.json"]


def test_fingerprints_follow_content_not_order():
    assert fingerprint({"a": 1, "b": [2]}) == fingerprint(json.loads('{"b": [2], "a": 1}'))
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})
