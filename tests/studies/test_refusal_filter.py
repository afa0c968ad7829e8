"""The filter: answers decide, the limit counts what is kept, and few prompts are never silent."""

from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import pytest
import torch

from saefeat.studies.refusal.data import Prompt, PromptSets
from saefeat.studies.refusal.errors import DataError, UsageError
from saefeat.studies.refusal.filter import FITTED, filter_table, keep_typical
from saefeat.studies.refusal.judges import AnswerOnly, substring_judge
from saefeat.studies.refusal.lab import Lab, Settings
from saefeat.studies.refusal.openings import shortened
from saefeat.studies.refusal.stages import Stages

GLAD = "I'm glad you asked: bread needs flour."
SORRY = "I'm sorry, this is no help."
SURE = "Sure, here is how."


class Pieces:
    """A tokenizer that cuts ``I'm sorry`` into I, 'm, sorry; an id a piece, in order of use."""

    unk_token_id = 0

    def __init__(self):
        self.known = ["<unk>"]

    def __call__(self, text, add_special_tokens=True):
        pieces = text.replace("'", " '").split()
        self.known += [piece for piece in dict.fromkeys(pieces) if piece not in self.known]
        return {"input_ids": [0 if p == "?" else self.known.index(p) for p in pieces]}

    def decode(self, ids):
        return " ".join(self.known[token] for token in ids)


@dataclass(frozen=True)
class Scripted(Lab):
    """A lab whose model says what a script says of a request."""

    asked: list = field(default_factory=list)

    def ask(self, prompts, intervention=None, tokens=None):
        self.asked.extend(prompts)
        texts = tuple(prompt.category for prompt in prompts)
        return SimpleNamespace(texts=texts, completions=[self._ids(text) for text in texts])

    def read(self, prompts, intervention=None):
        first = torch.tensor([self._ids(prompt.category)[0] for prompt in prompts])
        return SimpleNamespace(logits=torch.nn.functional.one_hot(first, 100).float())

    def _ids(self, text):
        return tuple(self.model.tokenizer(text or "<end>")["input_ids"])


def prompts(*answers):
    """One prompt an answer; the category holds what the scripted model will say."""
    return tuple(Prompt(f"request {n}", answer) for n, answer in enumerate(answers))


@pytest.fixture
def lab(tmp_path):
    def made(harmful, harmless, refusals=("I",), answers=("Sure",), **settings):
        sets = PromptSets(harmful, harmful, harmful, harmless, harmless, harmless)
        return Scripted(
            model=SimpleNamespace(tokenizer=Pieces()),
            saes=None,
            sets=sets,
            judge=substring_judge,
            refusals=refusals,
            answers=answers,
            settings=Settings(**settings),
            stages=Stages(tmp_path / "stages", "base", lambda text: None),
            name="scripted",
            quiet=True,
        )

    return made


def test_the_answer_tells_glad_from_sorry(lab):
    """Both begin with I; by the first token every harmless prompt would be a refused one."""
    one = lab(prompts(*[SORRY] * 9, GLAD), prompts(*[GLAD] * 9, SORRY))
    kept, found = keep_typical(one)
    assert kept.sets.harmful_train == one.sets.harmful_train[:9]
    assert kept.sets.harmless_val == one.sets.harmless_val[:9]
    assert found["harmful_train"]["complied"] == 1
    assert found["harmless_train"]["refused"] == 1
    assert kept.sets.harmful_test == one.sets.harmful_test  # never filtered
    records = found["harmless_train"]["records"]
    assert [row["answer"] for row in records] == [GLAD] * 9 + [SORRY]


def test_the_first_token_is_the_papers_option_and_stops_with_counts(lab):
    one = lab(prompts(*[SORRY] * 9), prompts(*[GLAD] * 9), filter="first-token")
    with pytest.raises(DataError, match="harmless_train, harmless_val has too few") as error:
        keep_typical(one)
    said = str(error.value)
    assert "its first token" in said
    assert "harmless_train 0 of 9 (refused 9, complied 0, broken 0)" in said
    assert "harmful_train 9 of 9 (refused 9, complied 0, broken 0)" in said
    assert "--filter answer" in said and "--minimum" not in said, "none is none"
    assert "'request 0' with 'I'" in said
    better = lab(prompts(*[SORRY] * 9), prompts(*[SURE] * 9), filter="first-token")
    _, found = keep_typical(better)
    assert [found[name]["kept"] for name in FITTED] == [9] * 4


@pytest.mark.parametrize("size", [1, 2, 16])
def test_the_limit_counts_kept_prompts(lab, size):
    """A weak refuser: one in four. The first four alone would leave one."""
    weak = prompts(*[SURE, SURE, SURE, SORRY] * 10)
    one = lab(weak, prompts(*[SURE] * 40), limit=4, batch_size=size)
    kept, found = keep_typical(one)
    assert kept.sets.harmful_train == tuple(weak[n] for n in (3, 7, 11, 15))
    assert kept.sets.harmless_train == one.sets.harmless_train[:4]
    assert kept.sets.harmful_test == weak[:4]
    assert found["harmful_train"]["kept"] == 4
    assert 16 <= found["harmful_train"]["read"] < 40, "and it stops once there are enough"
    assert len(one.asked) < 80


def test_few_prompts_go_on_with_a_warning_down_to_the_minimum(lab):
    weak, good = prompts(*[SURE] * 30, *[SORRY] * 9), prompts(*[SURE] * 40)
    kept, _ = keep_typical(lab(weak, good))
    assert len(kept.sets.harmful_val) == 9
    (line,) = kept.warnings
    assert "few prompts are left" in line
    assert "harmful_train 9 of 39 (refused 9, complied 30, broken 0)" in line
    with pytest.raises(DataError, match=r"at least 10 .* harmful_val 9 of 39.*--minimum 9 to"):
        keep_typical(lab(weak, good, minimum=10))
    kept, _ = keep_typical(lab(prompts(SORRY, *[SURE] * 38), good, minimum=1))
    assert len(kept.sets.harmful_train) == 1


def test_enough_prompts_warn_of_nothing(lab):
    kept, found = keep_typical(lab(prompts(*[SORRY] * 40), prompts(*[SURE] * 40)))
    assert kept.warnings == ()
    assert found["harmful_train"]["opened"] == 40
    assert found["harmless_train"]["opened"] == 0
    rows = filter_table(found, kept).rows
    assert rows[0] == ("harmful_train", "40", "40", "40", "40", "0", "0", "40")


@pytest.mark.parametrize(
    ("refused", "answered", "refusals"),
    [
        (SORRY, GLAD, ("I",)),  # both open with it
        ("As an AI, no.", SURE, ("I",)),  # no refusal opens with it
    ],
)
def test_a_first_token_that_tells_nothing_is_warned_of(lab, refused, answered, refusals):
    one = lab(prompts(*[refused] * 40), prompts(*[answered] * 40), refusals)
    (line,) = keep_typical(one)[0].warnings
    assert "the first token tells refusals badly" in line
    assert repr(refused.split()[0].split("'")[0]) + " 80" in line, "and what they open with"


def test_broken_answers_are_kept_on_neither_side(lab):
    one = lab(prompts("", *[SORRY] * 9), prompts("{ } { } !", *[SURE] * 9))
    kept, found = keep_typical(one)
    assert len(kept.sets.harmful_train) == len(kept.sets.harmless_train) == 9
    assert found["harmful_val"]["broken"] == found["harmless_val"]["broken"] == 1


def test_a_changed_filter_judge_or_option_reuses_nothing(lab):
    one = lab(prompts(*[SORRY] * 9), prompts(*[SURE] * 9))
    keep_typical(one)
    asked = len(one.asked)
    keep_typical(one)
    assert len(one.asked) == asked, "reused"

    def another(request, answer):
        return substring_judge(request, answer)

    for changed in (
        replace(one, judge=another),
        replace(one, judge=AnswerOnly(lambda text: substring_judge("", text))),
        replace(one, refusals=("I", "As")),
        replace(one, answers=("Here",)),
        replace(one, settings=replace(one.settings, steps=3)),
        replace(one, settings=replace(one.settings, max_new_tokens=7)),
    ):
        keep_typical(changed)
        assert len(one.asked) == (asked := asked + 36)


# ---------------------------------------------------------------- openings


def test_openings_of_several_tokens_count_by_their_first_and_once(lab):
    one = lab(
        prompts(*[SORRY] * 9), prompts(*[SURE] * 9), refusals=("I'm sorry", "I cannot", "As an AI")
    )
    known = one.model.tokenizer.known
    assert one.refusal_ids == (known.index("I"), known.index("As"))
    lines = shortened(one.model.tokenizer, one.refusals, "--refusal-tokens")
    assert len(lines) == 3
    assert "\"I'm sorry\" is 3 tokens ['I', \"'m\", 'sorry'], scored by its first token" in lines[0]


@pytest.mark.parametrize(
    ("refusals", "answers", "message"),
    [
        (
            ("I'm sorry",),
            ("I'm glad",),
            r"3 tokens \['I', \"'m\", 'sorry'\] .* both begin with 'I'",
        ),
        (("As an AI", "No"), ("Sure", "No problem"), "--answer-tokens 'No problem' is 2 tokens"),
        (("",), ("Sure",), "--refusal-tokens: '' is 0 tokens"),
        (("  ",), ("Sure",), "--refusal-tokens: '  '"),
        (("I",), ("? no",), r"--answer-tokens: '\? no' is 2 tokens \['<unk>'"),
        ((), ("Sure",), "--refusal-tokens is empty"),
    ],
)
def test_openings_that_tell_nothing_are_refused(lab, refusals, answers, message):
    with pytest.raises(UsageError, match=message):
        lab(prompts(SORRY), prompts(SURE), refusals, answers)


def test_a_lab_takes_no_judge_of_answers_alone(lab):
    one = lab(prompts(SORRY), prompts(SURE))
    with pytest.raises(UsageError, match="AnswerOnly"):
        replace(one, judge=lambda text: "complied")
