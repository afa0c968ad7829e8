"""Sparse autoencoders and transcoders, computed from their weights without sae-lens's modules.

What was checked against sae-lens 6.54, one architecture at a time:

* Encoding only the columns S is exact for standard, gated and jumprelu (saved BatchTopK and
  Matryoshka SAEs are jumprelu) and for every transcoder; topk kinds need every pre-activation.
* The direction of a latent is its row of W_dec, except with ``rescale_acts_by_decoder_norm``
  (divided by the row's norm, and pre-activations multiplied by it).
* ``b_dec`` is subtracted after the input normalization, so it folds into the encoder bias.
* SAEs trained on a model with centered writing weights want x − mean(x), which folds too.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, final

import torch
from torch import Tensor

from ..arguments import checked
from ..errors import DictionaryError
from ..files.hashing import digest
from ..kernel.encode import decoder_of, encode
from ..model.sites import Site
from .derived import First, UnitNorms, require_first, require_separate, unit_rows
from .exclusion import Excluded, untrained
from .finite import require_finite
from .latents import Dictionary, cast
from .weights import InMemory, Weights, require_shape

ACTIVATIONS = {
    "standard": "relu",
    "gated": "gated",
    "jumprelu": "jumprelu",
    "topk": "topk",
    "abstopk": "abstopk",
    "transcoder": "relu",
    "skip_transcoder": "relu",
    "jumprelu_transcoder": "jumprelu",
    "jumprelu_skip_transcoder": "jumprelu",
}
"""sae-lens architecture → activation function of the kernel."""

_EXTRA = {"relu": (), "jumprelu": ("threshold",), "gated": ("b_gate", "b_mag", "r_mag")}
NORMS = ("none", "layer_norm", "constant_norm_rescale")


@checked(own=("excluded", "count"))
@final
class SAE(Dictionary):
    """A sparse autoencoder or transcoder; nothing is read until latents are selected.

    Args:
        weights: sae-lens tensor names: W_enc [d_in, d_sae], b_enc [d_sae], W_dec [d_sae, d_out],
            b_dec [d_out], and threshold [d_sae] | b_gate, b_mag, r_mag [d_sae] | W_skip
            [d_out, d_in] as the architecture has them.
        architecture: one of sae-lens's names, a key of ``ACTIVATIONS``.
        site: where it reads.
        write_site: where it writes; the read site unless it is a transcoder.
        norm: ``none``, ``layer_norm`` or ``constant_norm_rescale``.
        subtract_bias: whether b_dec is subtracted from the input.
        centered: whether the input's mean over d_model is subtracted first, for SAEs trained with
            TransformerLens's center_writing_weights. Such an SAE belongs to a model with
            LayerNorm, which does not see the mean; it is left in the value, and in what
            ``reconstruct`` gives.
        k: active latents, for topk kinds.
        rescale: sae-lens's ``rescale_acts_by_decoder_norm``.
        excluded: tokens it was not trained on: ids, ``"special"``, or a token rule.
        name: a label for reports.

    Raises:
        DictionaryError: for missing tensors, wrong shapes or an unknown architecture.

    Examples:
        >>> tensors = {"W_enc": torch.randn(8, 32), "b_enc": torch.zeros(32),
        ...            "W_dec": torch.randn(32, 8), "b_dec": torch.zeros(8)}
        >>> sf.SAE.from_tensors(tensors, site="resid_post.1").encode(torch.randn(2, 5, 8)).shape
        torch.Size([2, 5, 32])
    """

    def __init__(
        self,
        weights: Weights,
        *,
        architecture: str = "standard",
        site: Site | str,
        write_site: Site | str | None = None,
        norm: str = "none",
        subtract_bias: bool = True,
        centered: bool = False,
        k: int | None = None,
        rescale: bool = False,
        excluded: Excluded = (),
        name: str = "sae",
    ) -> None:
        self.site = Site.parse(site)
        self.write_site = Site.parse(write_site) if write_site is not None else self.site
        self.architecture, self.norm, self.k = architecture, norm, k
        self.subtract_bias, self.centered, self.rescale = subtract_bias, centered, rescale
        self.excluded, self.name = excluded, name
        self._weights = weights
        self._hashed: tuple[object, str] | None = None
        untrained(excluded)
        _one_of("architecture", architecture, ACTIVATIONS)
        _one_of("norm", norm, NORMS)
        self.activation = ACTIVATIONS[architecture]  # the kernel's name for it
        self.joint = self.activation in ("topk", "abstopk")
        self._rescaled = self.joint and rescale  # by the norms of all decoder rows
        self._check_tensors()
        self._check_shapes()
        self.d_in, self.d_sae = weights.shape("W_enc")
        self.d_out = weights.shape("W_dec")[1]

    @classmethod
    def from_tensors(
        cls,
        tensors: dict[str, Tensor],
        *,
        site: Site | str,
        architecture: str = "standard",
        write_site: Site | str | None = None,
        subtract_bias: bool = False,
        k: int | None = None,
        name: str = "sae",
    ) -> SAE:
        """An SAE from tensors in memory, with the names and shapes of the class docstring."""
        return cls(
            InMemory(tensors),
            architecture=architecture,
            site=site,
            write_site=write_site,
            subtract_bias=subtract_bias,
            k=k,
            name=name,
        )

    def columns(self, indices: Tensor) -> dict[str, Any]:
        weights = self._weights
        encoded = torch.arange(self.d_sae) if self.joint else indices
        encoder = weights.take("W_enc", encoded, axis=1)  # [d_in, k]
        # b_dec is subtracted after the input normalization and the centering, so it folds into
        # the bias, by the encoder as it is.
        shift = weights.read("b_dec") @ encoder if self.subtract_bias else 0.0  # [k]
        norm = norm_of(self.norm, self.centered)
        columns: dict[str, Any] = {"activation": self.activation, "norm": norm}
        if self.activation == "gated":
            gain = weights.take("r_mag", encoded).exp()
            columns |= {"gain": gain, "gate_bias": weights.take("b_gate", encoded) - shift}
            columns["bias"] = weights.take("b_mag", encoded) - shift * gain
        else:
            columns["bias"] = weights.take("b_enc", encoded) - shift
        if self.activation == "jumprelu":
            columns["threshold"] = weights.take("threshold", encoded)
        if self.centered:  # (x − mean(x)) W = x (W − column means)
            encoder = encoder - encoder.mean(0, keepdim=True)
        directions = weights.take("W_dec", indices)  # [k, d_out]
        if self.joint:
            columns |= {"k": self.k, "selected": indices.clone()}
        if self._rescaled:
            norms = weights.read("W_dec").norm(dim=1)  # [d_sae]
            encoder, columns["bias"] = encoder * norms, columns["bias"] * norms
            directions = unit_rows(directions)
        return columns | {"encoder": encoder, "directions": directions}

    def directions(self, indices: Iterable[int] | Tensor | None = None) -> Tensor:
        rows = self._weights.take("W_dec", self._index(indices))  # without touching the encoder
        return unit_rows(rows) if self._rescaled else rows

    def reconstruct(self, x: Tensor) -> Tensor:
        """The SAE's own reconstruction of x (or of the write site's value, for a transcoder).

        Args:
            x: [..., d_in].

        Returns:
            [..., d_out] in the compute dtype, without the error term.
        """
        dtype = torch.promote_types(x.dtype, torch.float32)
        columns = cast(self._whole(), dtype, x.device)
        x = x.to(dtype)
        f, scale = encode(columns, x)
        out = decoder_of(columns).decode(f, x, scale)
        if "W_skip" in self._wanted():
            skip = self._weights.read("W_skip")
            require_finite(self, {"W_skip": skip})
            out = out + x @ skip.to(x.device, dtype).T
        return out

    def error(self) -> ErrorTerm:
        """What the SAE leaves unexplained, x − x̂, as a dictionary of one latent that is 1.

        ``Ablate(sae.error())`` puts the reconstruction in place of x; ``Clamp(sae.error(),
        scale=0.5)`` halves the error. It reads the whole SAE, not a selection.

        Raises:
            DictionaryError: for a transcoder, whose error lies at another site than its input.
        """
        return ErrorTerm(self)

    def prefix_of(self, count: int) -> SAE:
        """The first latents as an SAE of its own, as Matryoshka SAEs are nested.

        Raises:
            DictionaryError: for a count outside 1..d_sae, or a topk SAE, whose latents depend on
                those that would be left out.

        Examples:
            >>> from saefeat.studies.refusal import tiny
            >>> sf.load_sae(tiny.saes_folder("chat") / "resid_post_1").prefix_of(64).d_sae
            64
        """
        require_first(count, self.d_sae)
        return self._derived("prefix_of", First(self._weights, count), f"first {count} of")

    def fold_norms(self) -> SAE:
        """The same SAE in other units: every direction has length 1, and f is as much larger.

        f · direction, and so every ablation, is as before to rounding; values that are set, added
        or compared with are in the new units, and the fingerprint is another.

        Raises:
            DictionaryError: for a topk SAE, of which other latents would be the largest.

        Examples:
            >>> from saefeat.studies.refusal import tiny
            >>> sae = sf.load_sae(tiny.saes_folder("chat") / "resid_post_1").fold_norms()
            >>> torch.allclose(sae.directions([1, 2]).norm(dim=1), torch.ones(2))
            True
        """
        return self._derived("fold_norms", UnitNorms(self._weights), "unit norms of")

    def _derived(self, function: str, weights: Weights, what: str) -> SAE:
        """This SAE with other tensors."""
        require_separate(function, self)
        found = copy.copy(self)
        found._weights, found._hashed = weights, None
        found.d_sae, found.name = weights.shape("W_enc")[1], f"{what} {self.name}"
        return found

    def _whole(self) -> dict[str, Any]:
        """All columns, with the decoder and its bias."""
        columns = self.columns(torch.arange(self.d_sae))
        bias = {"decoder_bias": self._weights.read("b_dec")}
        require_finite(self, bias)
        whole = {"decoder": columns["directions"], "centered": self.centered}
        return columns | whole | bias

    def content(self, indices: Tensor) -> object:
        encoded = torch.arange(self.d_sae) if self.joint else indices
        weights, names = self._weights, self._wanted()
        tensors = {
            "W_enc": digest(weights.take("W_enc", encoded, axis=1)),
            "W_dec": digest(weights.take("W_dec", encoded if self._rescaled else indices)),
            "b_dec": digest(weights.read("b_dec")),
        }
        for name in names - {"W_enc", "W_dec", "b_dec", "W_skip"}:
            tensors[name] = digest(weights.take(name, encoded))
        if len(indices) == self.d_sae and "W_skip" in names:
            tensors["W_skip"] = digest(weights.read("W_skip"))
        return self._settings(), tensors, indices.tolist() if self.joint else len(indices)

    def _settings(self) -> tuple[object, ...]:
        """What decides, beside the tensors, what is computed."""
        joint = (self.k, self.rescale) if self.joint else ()
        return (self.activation, self.norm, self.subtract_bias, self.centered, *joint)

    def fingerprint(self, indices: Iterable[int] | Tensor | None = None) -> str:
        every = indices is None or (isinstance(indices, range) and len(indices) == self.d_sae)
        if not every:
            return super().fingerprint(indices)
        stamp = self._weights.stamp()
        if stamp is None:
            return super().fingerprint()
        known = (stamp, self._settings(), self.excluded)
        if self._hashed is None or self._hashed[0] != known:  # a file is hashed once
            self._hashed = known, super().fingerprint()
        return self._hashed[1]

    def _wanted(self) -> set[str]:
        """The tensors that an SAE of this architecture has."""
        bias = () if self.activation == "gated" else ("b_enc",)
        # Layouts beside sae-lens's have it without saying so in the name of an architecture.
        may = "transcoder" in self.architecture or self.joint
        skips = "skip" in self.architecture or (may and "W_skip" in self._weights.names())
        skip = ("W_skip",) if skips else ()
        return {"W_enc", "W_dec", "b_dec", *bias, *skip, *_EXTRA.get(self.activation, ())}

    def _check_tensors(self) -> None:
        """Refuse an SAE without the tensors of its architecture, or with those of another."""
        wanted, there = self._wanted(), self._weights.names()
        missing = sorted(wanted - there)
        strange = sorted(there - wanted)  # whoever made them computes something with them
        parameter, cause = "weights", "a file of another architecture, or a renamed tensor"
        if missing:
            got = f"without {', '.join(missing)}"
        elif self.joint and not self.k:
            parameter, got = "k", repr(self.k)
        elif strange:
            parameter = "architecture"
            got = f"{self.architecture}, with {', '.join(strange)} among the weights, unused there"
            cause = "an architecture that is not declared, or one that computes more; without"
            cause += " these it computes something else"
        else:
            return
        raise DictionaryError(
            f"SAE {self.name!r}: `{parameter}` is {got}, wanted what a {self.architecture} SAE has."
            f" Likely cause: {cause}. Try: pass architecture= as the release declares it"
        )

    def _check_shapes(self) -> None:
        """Tensors that fit each other, a k that there are latents for, and a place to write."""
        shape = self._weights.shape
        for name, symbols in (("W_enc", ("d_in", "d_sae")), ("W_dec", ("d_sae", "d_out"))):
            if len(shape(name)) != 2:
                require_shape(name, shape(name), symbols)
        (d_in, d_sae), d_out = shape("W_enc"), shape("W_dec")[-1]
        if self.joint and not 1 <= (self.k or 0) <= d_sae:
            _one_of("k", str(self.k), (f"1..{d_sae}",))
        require_shape("W_dec", shape("W_dec"), (d_sae, d_out))
        require_shape("b_dec", shape("b_dec"), (d_out,))
        for name in self._wanted() - {"W_enc", "W_dec", "b_dec", "W_skip"}:
            require_shape(name, shape(name), (d_sae,))
        if "W_skip" in self._wanted():
            require_shape("W_skip", shape("W_skip"), (d_out, d_in))
        if self.site != self.write_site:
            if self.norm != "none":  # its scale belongs to the input, its directions to the output
                _one_of("norm of a transcoder", self.norm, ("none",))
        elif "transcoder" in self.architecture:
            raise DictionaryError(
                f"transcoder {self.name!r}: `write_site` is not declared by the file, wanted"
                " metadata.hook_name_out, or write_site=. Likely cause: a transcoder saved without"
                " its output hook; its directions do not belong where it reads. Try:"
                ' load_sae(folder, write_site="mlp_out.3")'
            )
        else:
            require_shape("W_dec", shape("W_dec"), (d_sae, d_in))


@checked
@final
class ErrorTerm(Dictionary):
    """An SAE's error term as a dictionary; made by ``SAE.error``.

    Args:
        sae: the SAE whose error it is.

    Raises:
        DictionaryError: for a transcoder.

    Examples:
        >>> tensors = {"W_enc": torch.randn(8, 32), "b_enc": torch.zeros(32),
        ...            "W_dec": torch.randn(32, 8), "b_dec": torch.zeros(8)}
        >>> sf.SAE.from_tensors(tensors, site="resid_post.1").error().d_sae
        1
    """

    def __init__(self, sae: SAE) -> None:
        if sae.site != sae.write_site:
            _one_of("kind of dictionary", "a transcoder", ("an SAE, to have an error term",))
        if "W_skip" in sae._wanted():
            _one_of("kind of dictionary", "an SAE with W_skip", ("an SAE without, for its error",))
        self._sae = sae
        self.site = self.write_site = sae.site
        self.d_in = self.d_out = sae.d_in
        self.d_sae, self.joint = 1, True
        self.name = f"error of {sae.name}"
        self.excluded, self.centered = sae.excluded, sae.centered

    def columns(self, indices: Tensor) -> dict[str, Any]:
        columns = self._sae._whole()
        own = {"inner": columns["activation"], "activation": "error"}
        return (
            columns | own | {"directions": torch.ones(len(indices), self.d_in, dtype=torch.float32)}
        )

    def content(self, indices: Tensor) -> object:
        return "error", self._sae.fingerprint()


def norm_of(norm: str, centered: bool) -> str:
    """The kernel's norm. A mean folds into the encoder, but a length must be taken without it."""
    return "centered_norm_rescale" if centered and norm == "constant_norm_rescale" else norm


def _one_of(parameter: str, got: str, wanted: Iterable[str]) -> None:
    if got not in wanted:
        raise DictionaryError(
            f"SAE: `{parameter}` is {got!r}, wanted one of {', '.join(wanted)}. Likely cause: an"
            " architecture that cannot be computed from selected columns. Try: an SAE of a"
            " supported architecture"
        )
