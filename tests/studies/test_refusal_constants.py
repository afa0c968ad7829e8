"""Constants: each has an option, and whose they are is said where they are another model's."""

import json
from types import SimpleNamespace

import pytest

import saefeat as sf
from saefeat.studies.refusal import cli
from saefeat.studies.refusal.constants import (
    GEMMA,
    LLAMA,
    published,
    require_layer,
    settled,
    taken,
    warning,
)
from saefeat.studies.refusal.errors import UsageError
from saefeat.studies.refusal.lab import Settings, counted
from saefeat.studies.refusal.setup import TINY


def config(*shape):
    names = ("model_type", "num_hidden_layers", "hidden_size", "vocab_size")
    return SimpleNamespace(**dict(zip(names, shape, strict=True)))


def parsed(*arguments):
    return cli.parser().parse_args(arguments)


def test_the_papers_models_get_the_papers_constants():
    gemma, exact = published(config("gemma2", 26, 2304, 256000))
    assert exact and gemma is GEMMA and gemma.settings == Settings()
    llama, exact = published(config("llama", 32, 4096, 128256))
    assert exact and llama is LLAMA
    assert (llama.settings.scales, llama.settings.skipped) == ((-1.0,), 26)
    assert llama.settings.values == (1.0, 2.0, 3.0, 4.0, 5.0)


@pytest.mark.parametrize(
    "shape",
    [
        ("gemma2", 42, 3584, 256000),  # gemma-2-9b-it: the same family
        ("llama", 32, 4096, 32000),  # Llama-2-7b-chat
        ("llama", 30, 576, 49152),  # SmolLM2-135M
        ("qwen3", 36, 4096, 151936),
        ("gemma2", None, None, None),
    ],
)
def test_any_other_model_is_told_whose_constants_it_gets(shape):
    origin, exact = published(config(*shape))
    assert not exact
    options = parsed("--model", "some/model")
    found = taken(options, settled(options, origin.settings), origin.name, exact)
    (line,) = warning(found, "some/model")
    assert line.startswith(
        "constants of gemma-2-2b-it, not calibrated for some/model: K0 = 10, K* = 20, c = -3, "
        "v = 10 15 20 25 30, skip = 1; options: --candidates --budgets --scales --values --skip"
    )


def test_what_is_given_is_not_warned_of():
    options = parsed("--scales", "-1", "-2", "--values", "3", "--candidates", "5", "--budgets", "9")
    settings = settled(options, Settings())
    found = taken(options, settings, "gemma-2-2b-it", False)
    assert found["taken"] == {"skipped": 1}
    (line,) = warning(found, "m")
    assert "skip = 1; options: --skip" in line and "c =" not in line
    options = parsed(
        *["--scales", "-1", "--values", "3", "--candidates", "5", "--budgets", "9", "--skip", "1"]
    )
    assert warning(taken(options, settings, "gemma-2-2b-it", False), "m") == []
    assert warning(taken(parsed(), settings, "gemma-2-2b-it", True), "m") == []


def test_every_constant_has_an_option():
    arguments = "--scales 0 -1.5 --values 2 4 --candidates 3 --budgets 7 8 --steps 4 --layer 2"
    arguments += " --skip 26 --filter first-token --minimum 3 --limit 9"
    for base in (Settings(), TINY):
        found = settled(parsed(*arguments.split()), base)
        assert (found.scales, found.values) == ((0.0, -1.5), (2.0, 4.0))
        assert (found.candidates, found.budgets, found.steps) == ((3,), (7, 8), 4)
        assert (found.layer, found.skipped, found.filter) == (2, 26, "first-token")
        assert (found.minimum, found.limit) == (3, 9)
        assert settled(parsed(), base) == base


def test_the_tokens_of_a_study():
    assert counted(1) == ~sf.Tokens.first(1)
    assert counted(26) == ~sf.Tokens.first(26)
    assert counted(0) == sf.Tokens.all()


def test_a_layer_the_model_lacks_is_refused(tmp_path, capsys):
    require_layer(Settings(layer=3), 4)
    with pytest.raises(UsageError, match=r"--layer 4 is no layer of this model, wanted 0\.\.3"):
        require_layer(Settings(layer=4), 4)
    assert cli.main(["--output", str(tmp_path), "--quiet", "--layer", "9"]) == 2
    assert "--layer 9 is no layer" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [["--layer", "-1"], ["--skip", "-2"], ["--budgets", "0"], ["--scales"], ["--filter", "words"]],
)
def test_constants_out_of_range_are_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        cli.parser().parse_args(arguments)
    assert arguments[0] in capsys.readouterr().err


def test_constants_are_plain_data():
    found = taken(parsed("--skip", "4"), Settings(skipped=4), "gemma-2-2b-it", False)
    assert json.loads(json.dumps(found))["given"] == {"skipped": 4}
