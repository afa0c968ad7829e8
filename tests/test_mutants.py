"""The proof that the tests can fail: the package broken by hand, each break killed by a test.

Every mutant is a mistake that somebody in this field has made. One whose source text is no longer
there fails loudly: then look where the code has gone, and break it anew.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

pytestmark = pytest.mark.slow  # thirty runs of pytest, each on a package of its own
HERE = Path(__file__).resolve().parent


class Mutant(NamedTuple):
    """What stands in the package, what is put in its place, and the test that must fail."""

    old: str
    new: str
    test: str


def failure(name: str) -> str:
    return f"test_silent_failures.py::test_{name}"


MUTANTS = {
    "W_dec read for W_enc": Mutant(
        'encoder = weights.take("W_enc", encoded, axis=1)',
        'encoder = weights.take("W_dec", encoded).T',
        failure("topk_read_as_relu"),
    ),
    "one layer on": Mutant(
        '{container}.{site.layer}"',
        '{container}.{(site.layer + 1) % layers}"',
        failure("sae_of_another_layer"),
    ),
    "mask dropped": Mutant(
        "(new if mask is None else torch.where(mask, new, x))",
        "new",
        failure("column_index_hits_a_left_pad"),
    ),
    "error term forgotten": Mutant(
        "new = x.to(delta.dtype) + delta",
        "new = delta",
        failure("reconstruction_written_without_the_error"),
    ),
    "an edited copy fires once": Mutant(
        "for _ in Iterations()[1:] if loops else ():",
        "for _ in ():",
        failure("steering_fires_once[edit]"),
    ),
    "inline fires once": Mutant(
        "loops = decodes and step is None",
        "loops = False",
        failure("steering_fires_once[inline]"),
    ),
    "gradient doubled": Mutant(
        "weight * slope",
        "2 * weight * slope",
        "test_attribution.py::test_finite_differences[resid_post.1]",
    ),
    "a transcoder's gradient at its read site": Mutant(
        "slope = part.read_at(values, mask), part.written_at(slopes, mask)",
        "slope = part.read_at(values, mask), slopes[sorted(slopes)[0]][mask]",
        "test_attribution.py::test_every_architecture_against_the_naive_form[transcoder-AtP()-zero]",
    ),
    "a cross-layer latent written at one site": Mutant(
        "(first | form.further(dictionary, indices)).items()",
        "first.items()",
        "test_cross_layer.py::test_an_edit_is_written_at_every_site[transcoder-relu-llama-ablate]",
    ),
    "no path between clean and baseline": Mutant(
        "torch.lerp(x.detach().to(dtype), target.to(dtype), share)",
        "target.to(dtype)",
        "test_attribution.py::test_three_sites_against_the_naive_form"
        "[llama-IG(steps=3, rule='midpoint')-zero]",
    ),
    "threshold ignored": Mutant(
        "return torch.relu(h) * (h > self.threshold)",
        "return torch.relu(h)",
        "test_kernel.py::test_encode_computes_in_float32_whatever_came",
    ),
    "encoded in bfloat16": Mutant(
        """        columns = cast(self.columns(index), dtype, x.device)
        return encode(columns, x.to(dtype))[0]""",
        """        columns = cast(self.columns(index), x.dtype, x.device)
        return encode(columns, x)[0].to(dtype)""",
        "test_kernel.py::test_encode_computes_in_float32_whatever_came",
    ),
    "last(n) is one token too long": Mutant(
        "return (position >= lengths - rest[0]) & (position < lengths)",
        "return (position >= lengths - rest[0] - 1) & (position < lengths)",
        "test_ways.py::test_receipts_count_exactly",
    ),
    "topk as relu": Mutant(
        "return torch.zeros_like(h).scatter(-1, index, values.relu())",
        "return h.relu()",
        failure("topk_read_as_relu"),
    ),
    "b_dec forgotten": Mutant(
        'shift = weights.read("b_dec") @ encoder if self.subtract_bias else 0.0',
        "shift = 0.0",
        failure("topk_read_as_relu"),
    ),
    "norm folded by half": Mutant(
        "delta = delta * scale",
        "delta = delta",
        failure("normalization_half_folded"),
    ),
    "norm scale kept from the first call": Mutant(
        "    return centered / (scale + 1e-5), scale",
        '    kept = vars(type(self)).get("kept", scale)\n'
        "        type(self).kept = kept\n"
        "        return centered / (scale + 1e-5), kept[..., :1, :] if kept.ndim > 1 else kept",
        failure("normalization_half_folded"),
    ),
    "pads have positions": Mutant(
        "position = (mask != 0).long()",
        "position = (mask >= 0).long()",
        failure("column_index_hits_a_left_pad"),
    ),
    "hooks left behind": Mutant(
        "stack.callback(self._at(visit).remove)",
        "self._at(visit)",
        failure("edits_survive_an_exception"),
    ),
    "a second generate goes on with the first prompt": Mutant(
        "self._sequences, self._decodes = Sequences(), True",
        "self._decodes = True",
        "test_sequences.py::test_generate_on_the_last_output_is_another_prompt[prompt-False]",
    ),
    "a copy made in a block is hooked": Mutant(
        "return self._call(module, *rest) if module is self._module else None",
        "return self._call(module, *rest)",
        "test_sequences.py::test_a_shallow_copy_is_not_hooked",
    ),
    "positions counted from padding on the right": Mutant(
        "first = view.shown.int().argmax(1, keepdim=True)",
        "first = torch.full_like(view.position[:, :1], view.shown.shape[1] - 1)",
        "test_sequences.py::test_a_model_patched_to_its_own_values_stays_as_it_is",
    ),
    "a joint edit read in turn": Mutant(
        "for step, numbers in together:\n            builder.writes(step, numbers)",
        "for step, numbers in together[:1]:\n            builder.writes(step, numbers)",
        "test_joint.py::test_in_generation_at_every_token",
    ),
    "condition ignored": Mutant(
        "if self.when is not None:",
        "if False:",
        "test_conditions.py",
    ),
    "special tokens included": Mutant(
        "return Tokens.all() if rule is None else _without(rule, model)",
        "return Tokens.all()",
        failure("bos_and_special_tokens_are_included"),
    ),
    "the MLP's own output on Gemma": Mutant(
        '"mlp_out": ("post_feedforward_layernorm", "output"),',
        '"mlp_out": ("mlp", "output"),',
        failure("wrong_tensor_on_sandwich_norm_models"),
    ),
    "a chunk taken for the prompt": Mutant(
        "memory.blocks = memory.blocks or (bool(past) and not begins and columns > 1)",
        "pass",
        "test_machine.py::test_a_prompt_fed_in_chunks_has_no_known_length",
    ),
    "pads that are EOS as well are text": Mutant(
        "if most > 1 or differ:",
        "if most > 1:",
        "test_prompts.py::test_a_pad_that_is_eos_is_padding_where_rows_differ[lists]",
    ),
    "the assistant's last turn is closed": Mutant(
        """if turns[-1]["role"] not in ANSWERS:""",
        "if turns:",
        "test_chats.py::test_a_last_turn_of_the_assistant_is_continued[Gemma]",
    ),
    "roles are not held against chats": Mutant(
        "if chosen != wanted and place not in chat.edges and place >= from_place:",
        "if False:",
        "test_roles.py::test_a_role_is_its_contents_or_refused[Zephyr-joined]",
    ),
    "train mode allowed": Mutant(
        "    if active:\n        raise ModelError(",
        "    if False:\n        raise ModelError(",
        failure("train_mode"),
    ),
    "an edit that never fires is fine": Mutant(
        "    if receipt.unfired:",
        "    if False:",
        failure("a_missing_hook_only_logs"),
    ),
    "quadrature weights of another rule": Mutant(
        "(float((p + 1) / 2), float(w / 2)) for p, w in zip(points, weights, strict=True)",
        "(float((p + 1) / 2), 1 / self.steps) for p, w in zip(points, weights, strict=True)",
        "test_convergence.py::test_given_nodes_integrate_what_their_rule_promises",
    ),
    "panels of adaptive nodes weigh the same at any width": Mutant(
        "weights = torch.stack([width * kronrod, width * (kronrod - gauss)]).flatten(1)",
        "weights = torch.stack([width**0 * kronrod / 2, width * (kronrod - gauss)]).flatten(1)",
        "test_convergence.py::test_adaptive_nodes_reach_their_tolerance",
    ),
    "the verdict averages over tokens that are not scored": Mutant(
        "slopes * chosen.cpu()",
        "slopes",
        "test_convergence.py::test_tokens_that_are_not_scored_do_not_count",
    ),
    "pads count in a mean over tokens": Mutant(
        "scored = torch.stack(path.scored).any(0).cpu()",
        "scored = torch.ones_like(torch.stack(path.scored).any(0).cpu())",
        "test_attribution.py::test_pads_are_never_scored_and_never_counted",
    ),
    "a condition once met is held where it is tested again": Mutant(
        "if self.name in kept and not state.view.whole:",
        "if self.name in kept:",
        "test_sequences.py::test_held_conditions_follow_beams",
    ),
    "a held condition stays with the row when beams change places": Mutant(
        "reorder_memory(memory, moves(old, now))",
        "moves(old, now)",
        "test_sequences.py::test_held_conditions_follow_beams",
    ),
    "a layer-normed SAE's directions are not scaled back": Mutant(
        "        delta = delta * scale\n",
        "        delta = delta * 1.0\n",
        "test_dictionaries.py",
    ),
    "the way of resid_mid carries its block's graph": Mutant(
        "target = None if target is None else target.detach()",
        "target = None if target is None else target",
        "test_methods.py::test_a_path_moves_resid_mid_by_a_constant",
    ),
    "batches each count the most that one dictionary selected": Mutant(
        "[sum(each) for each in zip(*(row.selected for row in batches), strict=True)],",
        "[sum(row.tokens for row in batches)],",
        "test_receipts.py::"
        "test_tokens_of_dictionaries_that_skip_different_tokens_do_not_depend_on_batches",
    ),
    "a word for a baseline is no baseline": Mutant(
        "if not fits(value, hint):",
        "if value is hint:",
        "test_arguments.py::test_what_users_give_is_refused_where_they_give_it",
    ),
}
"""Name → the mistake."""

KILLERS = sorted({mutant.test for mutant in MUTANTS.values()})


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory) -> dict[str, dict]:
    """All mutants, and the package as it is, in one process and its children."""
    folder = tmp_path_factory.mktemp("mutants")
    jobs = {name: [m.old, m.new, [f"tests/{m.test}"]] for name, m in MUTANTS.items()}
    jobs["as it is"] = ["", "", [f"tests/{test}" for test in KILLERS]]
    done = subprocess.run(
        [sys.executable, str(HERE / "mutate.py"), str(folder)],
        input=json.dumps(jobs),
        capture_output=True,
        text=True,
        timeout=3600,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="mutants run in forks of one process")
@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_killed(name, verdicts):
    found = verdicts[name]
    assert found["wrong"] is None, found["wrong"]
    assert found["code"] == 1, f"exit code {found['code']} of\n{found['log']}"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="mutants run in forks of one process")
def test_the_package_as_it_is_passes(verdicts):
    """The same tests on an unbroken copy: what killed the mutants was the mutation."""
    assert verdicts["as it is"]["code"] == 0, verdicts["as it is"]["log"]
