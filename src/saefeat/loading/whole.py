"""sae-lens SAEs of which no latent can be computed alone: matching pursuit and temporal.

Matching pursuit picks one latent after another, each from what the ones before left; a temporal
SAE predicts a token from those before it. Both are encoded by sae-lens's own code, all of it.
"""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from ..dictionaries.latents import Dictionary
from ..dictionaries.sae import norm_of
from ..kernel.encode import NORMS
from ..model.sites import Site
from .declaration import Facts, Origin, no_site, refuse

ARCHITECTURES = ("matching_pursuit", "temporal")
_ASIDE = ("metadata", "device", "dtype")
"""Settings of sae-lens that say where an SAE came from, or where it lies."""


@final
class Whole(Dictionary):
    """A matching-pursuit or temporal SAE, encoded by its sae-lens object; made by ``load_sae``.

    A few latents cost as much as all of them. Edits keep the delta form: other latents stay as
    they were. A temporal SAE's latents are its novel codes, and depend on every earlier token of
    their sequence. What it runs is a sae-lens object, which cannot be sent to a server.
    The object is shared, and neither changed nor asked to keep state.
    """

    def __init__(
        self, sae: Any, facts: Facts, origin: Origin, *, name: str, site: Site | str | None = None
    ) -> None:
        hook = site if site is not None else facts.hook
        if hook is None:
            raise no_site(origin.file)
        self.site = self.write_site = Site.parse(hook)
        self.architecture, self.norm, self.centered = facts.architecture, facts.norm, facts.centered
        self.prefix = facts.architecture == "temporal"
        self.excluded, self.name, self.origin = facts.excluded, name, origin
        self.declared = facts.declared
        self.d_sae, self.d_in = sae.W_dec.shape
        self.d_out, self.joint = self.d_in, True
        # sae-lens keeps the scale of its norms on the module between encode and decode; so a twin,
        # which shares the tensors, leaves norm and reshape to the kernel.
        self._sae = copy.copy(sae)
        if facts.norm != "none":
            self._sae.run_time_activation_norm_fn_in = _same
            self._sae.run_time_activation_norm_fn_out = _same
        self._sae.reshape_fn_in = self._sae.reshape_fn_out = _same
        self._factor = 1.0
        if sae.cfg.normalize_activations == "constant_scalar_rescale":
            self._factor = float(sae.cfg.activation_normalization_factor)

    def columns(self, indices: Tensor) -> dict[str, Any]:
        return {
            "activation": partial(_encode, self._sae, self.centered, indices),
            "directions": self._sae.W_dec.detach()[indices].float() / self._factor,  # [k, d_out]
            "norm": norm_of(self.norm, self.centered),
            "prefix": self.prefix,
            "local": f"{self.name} is encoded by a sae-lens object, which cannot be sent",
        }

    def reconstruct(self, x: Tensor) -> Tensor:
        """The SAE's own reconstruction of x; for a temporal SAE the predicted part included.

        Args:
            x: [..., d_in]; for a temporal SAE [..., tokens, d_in], whole sequences.

        Returns:
            [..., d_out] in the compute dtype.
        """
        dtype = torch.promote_types(x.dtype, torch.float32)
        x = x.to(dtype)
        mean = x.mean(-1, keepdim=True) if self.centered else 0.0
        norm, sae = NORMS[self.norm], self._sae
        z, scale = (x - mean, None) if norm is None else norm.normalize(x - mean)
        z = z.to(sae.W_dec.device)
        with torch.no_grad():
            if self.prefix:
                out = sae(z.reshape(-1, *z.shape[-2:])).reshape(z.shape)
            else:
                bias = sae.b_dec if sae.cfg.apply_b_dec_to_input else 0.0
                out = sae.encode(z) @ sae.W_dec + bias
        out = out.to(x.device, dtype)
        out = out if scale is None else out * scale
        return out + (x.mean(-1, keepdim=True) if self.norm == "layer_norm" else mean)

    def content(self, indices: Tensor) -> object:
        config = self._sae.cfg.to_dict()
        settings = {name: config[name] for name in sorted(config) if name not in _ASIDE}
        tensors = self._sae.state_dict()
        return settings, self.norm, self.centered, self._factor, tensors, indices.tolist()


def load(
    folder: Path, facts: Facts, origin: Origin, *, name: str, site: Site | str | None
) -> Whole:
    """One from a sae-lens folder; imports sae-lens."""
    from sae_lens import SAE as SaeLens

    try:
        sae = SaeLens.load_from_disk(folder, device="cpu", dtype="float32")
    except Exception as error:
        got = f"which sae-lens cannot read ({type(error).__name__}: {error})"
        wanted = f"a whole {facts.architecture!r} SAE"
        cause = "an interrupted copy, or tensors that do not fit the configuration"
        raise refuse(folder, got, wanted, cause, "fetch the files again") from error
    return Whole(sae, facts, origin, name=name, site=site)


def _same(x: Tensor, *_: object) -> Tensor:
    return x


def _encode(sae: Any, centered: bool, indices: Tensor, x: Tensor) -> Tensor:
    """The chosen latents [..., k] of normalized values, in the values' dtype and place."""
    value = x - x.mean(-1, keepdim=True) if centered else x
    sequences = value.reshape(-1, *value.shape[-2:]) if x.ndim > 1 else value
    with torch.no_grad():
        f = sae.encode(sequences.to(sae.W_dec.device))
    f = f[..., indices.to(f.device)].to(x.device, x.dtype)
    return f.reshape(*x.shape[:-1], len(indices))
