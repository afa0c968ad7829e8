"""Folders of cross-layer transcoders, written here as their libraries write them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import saefeat as sf
from helpers import RAGGED, D, build, wrapped

N, LAYERS = 20, 3
HOOKS = {"feature_input_hook": "hook_resid_mid", "feature_output_hook": "hook_mlp_out"}


def layer(n: int, jumps: bool = False) -> dict[str, torch.Tensor]:
    """circuit-tracer's tensors of one layer, without the number in their names."""
    g = torch.Generator().manual_seed(n)
    found = {
        "W_enc": torch.randn(N, D, generator=g) / 3,
        "b_enc": torch.randn(N, generator=g) / 3,
        "b_dec": torch.randn(D, generator=g),
        "W_dec": torch.randn(N, LAYERS - n, D, generator=g) / 3,
    }
    return found | ({"threshold": torch.rand(N, generator=g) / 2} if jumps else {})


def tracer(folder: Path, jumps: bool = False, dtype=torch.float32, **config) -> Path:
    """As circuit-tracer's to_safetensors writes it, and a config.yaml as its releases have."""
    for n in range(LAYERS):
        named = {f"{key}_{n}": t.to(dtype) for key, t in layer(n, jumps).items()}
        decoder = {f"W_dec_{n}": named.pop(f"W_dec_{n}")}
        save_file(named, folder / f"W_enc_{n}.safetensors")
        save_file(decoder, folder / f"W_dec_{n}.safetensors")
    text = "\n".join(f"{key}: {value}" for key, value in (HOOKS | config).items() if value)
    (folder / "config.yaml").write_text(text)
    return folder


def scope(folder: Path) -> Path:
    """Gemma Scope 2's: every layer's stack has a matrix for every layer, zeros before its own."""
    for n in range(LAYERS):
        own = layer(n, jumps=True)
        stack = torch.cat([torch.zeros(N, n, D), own["W_dec"]], 1)
        named = {"w_enc": own["W_enc"].T.contiguous(), "w_dec": stack}
        named |= {key: own[key] for key in ("b_enc", "b_dec", "threshold")}
        named |= {"affine_skip_connection": torch.randn(D, D)}
        save_file(named, folder / f"params_layer_{n}.safetensors")
    return folder


def encoded(x: torch.Tensor, own: dict[str, torch.Tensor]) -> torch.Tensor:
    h = torch.einsum("...d,fd->...f", x, own["W_enc"]) + own["b_enc"]
    return h * (h > own["threshold"]) if "threshold" in own else h.relu()


@pytest.mark.parametrize("layout", ["relu", "jump", "scope"])
def test_each_layer_is_a_dictionary_written_at_all_later_ones(tmp_path, layout):
    jumps = layout != "relu"
    saes = sf.load_saes(scope(tmp_path) if layout == "scope" else tracer(tmp_path, jumps))
    kind = "mlp_in" if layout == "scope" else "resid_mid"
    assert [str(site) for site in saes] == [f"{kind}.{n}" for n in range(LAYERS)]
    x = torch.randn(2, 5, D)
    for n, sae in enumerate(saes.values()):
        own = layer(n, jumps)
        assert [str(s) for s in sae.write_sites] == [f"mlp_out.{m}" for m in range(n, LAYERS)]
        assert torch.allclose(sae.encode(x), encoded(x, own), atol=1e-5)
        assert torch.allclose(
            sae.encode(x, [3, 17, 5]), encoded(x, own)[..., [3, 17, 5]], atol=1e-5
        )
        for m, rows in enumerate(sae.writes([3, 17, 5]).values()):
            assert torch.equal(rows, own["W_dec"][[3, 17, 5], m])
        sf.dictionaries.check_dictionary(sae)


def test_a_file_and_memory_are_one_dictionary_and_files_are_hashed_anew(tmp_path):
    sae = sf.load_saes(tracer(tmp_path))[1]
    own = layer(1)
    single = {
        "W_enc": own["W_enc"].T[None],
        "b_enc": own["b_enc"],
        "W_dec": own["W_dec"].transpose(0, 1),
    }
    twin = sf.dictionaries.CrossLayer.from_tensors(
        single, read=["resid_mid.1"], write=["mlp_out.1", "mlp_out.2"]
    )
    assert sae.fingerprint() == twin.fingerprint()
    assert sae.fingerprint([2, 3]) == twin.fingerprint([2, 3]) != sae.fingerprint([2, 4])
    before = sae.fingerprint()
    changed = own["W_dec"].clone()
    changed[7, 1] += 1.0  # at the second write site alone
    save_file({"W_dec_1": changed}, tmp_path / "W_dec_1.safetensors")
    assert sae.fingerprint() != before
    assert sf.load_saes(tmp_path)[1].fingerprint([7]) != twin.fingerprint([7])


def test_only_rows_that_are_selected_are_read(tmp_path, monkeypatch):
    from saefeat.dictionaries import planes

    sae, rows = sf.load_saes(tracer(tmp_path))[0], []
    original = planes.Planes._rows

    def counted(self, name, some):
        found = original(self, name, some)
        rows.append(len(found))
        return found

    monkeypatch.setattr(planes.Planes, "_rows", counted)
    sf.run(wrapped(build("llama")), RAGGED, sf.Ablate(sae.latents([4, 9])))
    # the first site's directions come with the columns, and once more with those of all sites
    assert sum(rows) <= 2 * (LAYERS + 1) * 2


def test_half_precision_is_read_in_single(tmp_path):
    sae = sf.load_saes(tracer(tmp_path, dtype=torch.bfloat16))[0]
    assert sae.directions([1]).dtype == torch.float32
    assert torch.equal(sae.directions([1])[0], layer(0)["W_dec"][1, 0].bfloat16().float())


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"feature_input_hook": None}, "feature_input_hook and feature_output_hook"),
        ({"model_kind": "transcoder_set"}, "model_kind = 'transcoder_set'"),
        ({"gate": "true"}, "gate"),
        ({"feature_output_hook": "mlp.hook_out"}, "no site for blocks.0.mlp.hook_out"),
    ],
)
def test_what_a_configuration_does_not_say_is_refused(tmp_path, config, said):
    with pytest.raises(sf.errors.DictionaryError, match=said):
        sf.load_saes(tracer(tmp_path, **config))


def test_files_that_are_not_whole_are_refused(tmp_path):
    tracer(tmp_path)
    with pytest.raises(sf.errors.DictionaryError, match=r"load_saes\(folder\)\[3\]"):
        sf.load_sae(tmp_path)
    (tmp_path / "W_dec_1.safetensors").unlink()
    assert len(sf.load_saes(tmp_path, sites="resid_mid.0")) == 1
    with pytest.raises(sf.errors.DictionaryError, match="W_dec_1"):
        sf.load_saes(tmp_path)
    own = layer(2, jumps=True)
    own["threshold"][3] = -0.1
    named = {f"{key}_2": t for key, t in own.items() if key != "W_dec"}
    save_file(named, tmp_path / "W_enc_2.safetensors")
    with pytest.raises(sf.errors.DictionaryError, match="thresholds below zero"):
        sf.load_saes(tmp_path, sites="resid_mid.2")


def test_gemma_scopes_configuration_is_obeyed(tmp_path):
    scope(tmp_path)
    config = {"hf_hook_point_in": "model.layers.0.pre_feedforward_layernorm.output"}
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_name": "gemma-v3-1b-pt"}))
    assert str(sf.load_saes(tmp_path)[0].site) == "mlp_in.0"
    (tmp_path / "config.json").write_text(json.dumps({"hf_hook_point_in": "model.layers.0.output"}))
    with pytest.raises(sf.errors.DictionaryError, match=r"model\.layers\.0\.output"):
        sf.load_saes(tmp_path)
