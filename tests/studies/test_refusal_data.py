"""Prompt sets in the layout of andyrdt/refusal_direction: good, missing and malformed."""

import json

import pytest

from saefeat.studies.refusal.data import OPTIONAL, SPLITS, DataError, Prompt, chats, load_folder

NEEDED = [name for name in SPLITS if name not in OPTIONAL]


@pytest.fixture
def folder(tmp_path):
    for name in NEEDED:
        rows = [{"instruction": f"{name} {n}", "category": "c" if n else None} for n in range(3)]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    return tmp_path


def test_a_whole_folder_loads_in_order(folder):
    sets = load_folder(folder)
    assert sets.harmful_val == tuple(Prompt(f"harmful_val {n}", "c" if n else "") for n in range(3))
    assert sets.sensitive_test == ()
    assert sets.limited(2).sizes() == {**dict.fromkeys(NEEDED, 2), "sensitive_test": 0}
    assert sets.limited(None) == sets


def test_the_optional_split_loads_where_it_is(folder):
    (folder / "sensitive_test.json").write_text('[{"instruction": "Größe \\u2026"}]')
    assert load_folder(folder).sensitive_test == (Prompt("Größe …"),)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(DataError, match=r"nowhere is no folder; wanted .*harmful_train\.json"):
        load_folder(tmp_path / "nowhere")


def test_a_missing_split_is_named(folder):
    (folder / "harmless_val.json").unlink()
    with pytest.raises(DataError, match=r"has no harmless_val\.json"):
        load_folder(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not JSON"),
        ('[{"instruction": "cut o', "is not JSON"),
        ("[]", "is empty"),
        ('{"instruction": "one"}', "holds a dict"),
        ('["plain text"]', 'entry 0: .* has no "instruction"'),
        ('[{"instruction": "x"}, {"prompt": "y"}]', "entry 1"),
        ('[{"instruction": 7}]', "entry 0"),
        ('[{"instruction": "  "}]', "entry 0"),
    ],
)
def test_a_malformed_split_is_named(folder, text, message):
    (folder / "harmful_test.json").write_text(text)
    with pytest.raises(DataError, match=rf"harmful_test\.json.*{message}"):
        load_folder(folder)


def test_a_split_that_is_not_text_is_named(folder):
    (folder / "harmful_test.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="is not JSON"):
        load_folder(folder)


def test_prompts_become_chats():
    assert chats([Prompt("hi")]) == [[{"role": "user", "content": "hi"}]]
