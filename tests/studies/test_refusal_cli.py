"""The whole study on a few prompts, from the command line: results, report, resuming, errors."""

import json
from dataclasses import asdict, replace

import pytest
from test_refusal_report import check_page

from saefeat.studies.refusal import cli, stages, tiny
from saefeat.studies.refusal.constants import settled
from saefeat.studies.refusal.data import OPTIONAL, SPLITS
from saefeat.studies.refusal.lab import Settings
from saefeat.studies.refusal.setup import TINY, one_thread, tiny_sets

SMALL = replace(
    TINY,
    candidates=(4,),
    budgets=(4,),
    scales=(0.0, -1.0),
    values=(4.0,),
    steps=2,
    random_seeds=(0,),
)
ARGUMENTS = ["--limit", "4", "--batch-size", "8", "--max-new-tokens", "16"]


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """A finished run on four prompts a split."""
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "TINY", SMALL)
        assert cli.main(["--output", str(folder), "--quiet", *ARGUMENTS]) == 0
    return folder


def test_results_hold_every_table_and_their_provenance(output):
    results = json.loads((output / "results.json").read_text())
    assert list(results["tables"]) == [
        "prompts",
        "dictionaries",
        "layers",
        "sets",
        "suppression",
        "induction",
        "side effects",
        "check",
    ]
    methods = [row["method"] for row in results["data"]["suppression"]["held-out"]["rows"]]
    assert methods == [
        *("base", "AS", "CosSim", "ActDiff", "AP", "AP local"),
        *("CosSim+AP", "CosSim+AP local", "random 0"),
    ]
    for row in results["data"]["suppression"]["held-out"]["rows"]:
        assert row["refused"] + row["complied"] + row["broken"] == row["n"] == 4
    found = results["provenance"]
    layers = len(results["data"]["layers"]["rows"])
    assert set(found["dictionaries"]) == {f"resid_post.{n}" for n in range(layers)}
    assert found["interventions"]["AS"].startswith(f"Ablate(Latents({layers}:")
    assert {"saefeat", "torch", "nnsight"} <= set(found["versions"])
    assert results["settings"] == json.loads(json.dumps(asdict(replace(SMALL, **{
        "limit": 4, "batch_size": 8, "max_new_tokens": 16,
    }))))  # fmt: skip


def test_every_answer_is_kept_whole_beside_the_results(output):
    results = json.loads((output / "results.json").read_text())
    lines = [json.loads(one) for one in (output / results["answers"]).read_text().splitlines()]
    row = results["data"]["suppression"]["held-out"]["rows"][2]
    found = [
        line
        for line in lines
        if line["section"] == "suppression/held-out" and line.get("method") == row["method"]
    ]
    assert [line["number"] for line in found] == list(range(row["n"]))
    keys = ("request", "category", "outcome", "answer")
    assert [{key: line[key] for key in keys} for line in found[:6]] == row["examples"]
    for outcome in ("refused", "complied", "broken"):
        assert sum(line["outcome"] == outcome for line in found) == row[outcome]
        by_category = [one[outcome] for one in row["categories"].values()]
        assert sum(by_category) == row[outcome]
    assert "answers.jsonl, beside this file" in (output / "report.html").read_text()
    assert "4b. The same by category" in (output / "report.html").read_text()


def test_the_report_is_self_contained(output):
    page = (output / "report.html").read_text()
    check_page(page)
    assert "10. Do the scores add up?" in page
    assert "Answers before and after" in page


def test_a_second_run_reuses_everything_and_agrees(output, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "TINY", SMALL)
    before = json.loads((output / "results.json").read_text())
    assert cli.main(["--output", str(output), "--quiet", *ARGUMENTS]) == 0
    assert "\n0 stages computed" in capsys.readouterr().out
    after = json.loads((output / "results.json").read_text())
    assert after["tables"] == before["tables"]
    assert after["data"] == before["data"]


@pytest.mark.slow
def test_an_interrupted_run_keeps_its_tables_and_resumes(output, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(cli, "TINY", SMALL)
    for file in (output / "stages").rglob("*.json"):  # as if interrupted after the suppression
        place = file.relative_to(output / "stages")
        if place.parts[0] not in {"induction", "side effects", "check"}:
            stages.write_atomically(tmp_path / "stages" / place, file.read_text())
    original = stages.Stages.run

    def interrupted(self, name, inputs, work):
        if name.startswith("side effects"):
            raise KeyboardInterrupt
        return original(self, name, inputs, work)

    with monkeypatch.context() as patch:
        patch.setattr(stages.Stages, "run", interrupted)
        assert cli.main(["--output", str(tmp_path), "--quiet", *ARGUMENTS]) == 130
    said = capsys.readouterr()
    assert "6. Refusal induced" in said.out
    assert "run again to go on" in said.err
    assert "Traceback" not in said.err
    assert not (tmp_path / "report.html").exists()
    assert cli.main(["--output", str(tmp_path), "--quiet", *ARGUMENTS]) == 0
    resumed = json.loads((tmp_path / "results.json").read_text())
    assert any(name.startswith("induction/") for name in resumed["stages"]["reused"])
    assert all(n.split("/")[0] in {"side effects", "check"} for n in resumed["stages"]["computed"])
    assert resumed["tables"] == json.loads((output / "results.json").read_text())["tables"]


def test_progress_bars_can_be_switched_off(output, monkeypatch, capsys):
    monkeypatch.setattr(cli, "TINY", SMALL)
    cli.main(["--output", str(output), *ARGUMENTS])
    assert "layer sweep" in capsys.readouterr().err
    cli.main(["--output", str(output), "--quiet", *ARGUMENTS])
    assert capsys.readouterr().err == ""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The tiny model and its prompts as files, as a real model and real data would be given."""
    folder = tmp_path_factory.mktemp("real")
    model, tokenizer = tiny.load("chat")
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "data").mkdir()
    sets = tiny_sets()
    for name in SPLITS:
        if name not in OPTIONAL:
            rows = [asdict(prompt) for prompt in getattr(sets, name)]
            (folder / "data" / f"{name}.json").write_text(json.dumps(rows))
    return folder


@pytest.mark.slow  # the study once more
def test_a_model_from_files_runs_the_same_study(saved, tmp_path, capsys):
    arguments = ["--model", str(saved / "model"), "--data", str(saved / "data")]
    arguments += ["--candidates", "4", "--budgets", "4", "--values", "4", "--steps", "2"]
    arguments += ["--saes", str(tiny.saes_folder("chat")), "--dtype", "float32"]
    arguments += ["--refusal-tokens", *tiny.REFUSAL_OPENINGS]
    arguments += ["--answer-tokens", *tiny.COMPLY_OPENINGS]
    with one_thread():
        assert cli.main([*arguments, "--output", str(tmp_path), "--quiet", *ARGUMENTS]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["data"]["sets"]["rows"] == []  # one setting: nothing to choose, nothing run
    assert str(saved / "model") in results["title"]
    line = f"constants of gemma-2-2b-it, not calibrated for {saved / 'model'}: c = -3, skip = 1; "
    assert results["warnings"][0].startswith(line + "options: --scales --skip")
    assert f"warning: {line}" in capsys.readouterr().out
    assert results["constants"]["given"] == {"candidates": [4], "budgets": [4], "values": [4.0]}
    assert "Read this first" in (tmp_path / "report.html").read_text()


def test_the_papers_constants_are_the_defaults_for_real_models():
    options = cli.parser().parse_args(["--model", "google/gemma-2-2b-it"])
    found = settled(options, Settings())
    assert found == Settings()
    assert (found.candidates, found.budgets, found.scales) == ((10,), (20,), (-3.0,))
    assert (found.values, found.steps, found.rule) == ((10.0, 15.0, 20.0, 25.0, 30.0), 10, "left")
    assert found.max_new_tokens == 256


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "x"], "--data without --model"),
        (["--refusal-tokens", "I"], "--refusal-tokens without --model"),
        (["--dtype", "float32", "--device", "cpu"], "--device, --dtype without --model"),
        (["--model", "x"], "also needs --saes and --data"),
        (
            ["--model", "x", "--saes", "y", "--data", "no/such/folder"],
            "no/such/folder is no folder",
        ),
    ],
)
def test_options_that_do_not_fit_are_refused_with_a_way_out(arguments, message, tmp_path, capsys):
    assert cli.main([*arguments, "--output", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_a_wrong_model_or_saes_folder_is_named(saved, tmp_path, capsys):
    data = ["--data", str(saved / "data"), "--output", str(tmp_path)]
    saes = ["--saes", str(tiny.saes_folder("chat"))]
    assert cli.main(["--model", str(tmp_path / "nowhere"), *saes, *data]) == 2
    assert "nowhere cannot be loaded" in capsys.readouterr().err
    assert cli.main(["--model", str(saved / "model"), "--saes", str(tmp_path), *data]) == 2
    assert "cannot be loaded: load_sae" in capsys.readouterr().err
    wrong = ["--device", "nowhere:7", "--dtype", "float32"]
    assert cli.main(["--model", str(saved / "model"), *saes, *wrong, *data]) == 2
    assert "--device nowhere:7 cannot be used" in capsys.readouterr().err


def test_an_output_that_is_a_file_is_named(tmp_path, capsys):
    (tmp_path / "taken").write_text("")
    assert cli.main(["--output", str(tmp_path / "taken")]) == 2
    assert "taken cannot be made" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["0", "-3", "many"])
def test_counts_must_be_positive(value, capsys):
    with pytest.raises(SystemExit):
        cli.main(["--limit", value])
    assert "--limit" in capsys.readouterr().err
