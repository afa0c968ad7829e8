"""The places the tiny SAEs read and write, in TransformerLens's names and as Hugging Face modules.

========== =================================== ==================================================
kind       reads                               writes
========== =================================== ==================================================
resid_post output of ``model.layers.L``        the same
mlp_out    output of ``model.layers.L``        the same
           ``.post_feedforward_layernorm``
transcoder input of ``model.layers.L``         output of ``model.layers.L``
           ``.pre_feedforward_layernorm``,     ``.post_feedforward_layernorm``
           divided by its root mean square
========== =================================== ==================================================

The transcoder's input is TransformerLens's ``ln2.hook_normalized``: the normalization *without*
its weight, ``x / sqrt(mean(x²) + eps)``. No Hugging Face module puts that tensor out; times
``1 + weight`` (the norm's parameter) it is the output of ``pre_feedforward_layernorm``, the
input of the MLP.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch
    from transformers import Gemma2ForCausalLM


@dataclass(frozen=True)
class Site:
    """One place in one layer; a transcoder's has two ends."""

    kind: Literal["resid_post", "mlp_out", "transcoder"]
    layer: int

    @property
    def folder(self) -> str:
        """The name of the SAE's folder, as in ``resid_post_2``."""
        return f"{self.kind}_{self.layer}"

    @property
    def hook_name(self) -> str:
        """What the SAE reads, in TransformerLens's names."""
        name = "ln2.hook_normalized" if self.kind == "transcoder" else f"hook_{self.kind}"
        return f"blocks.{self.layer}.{name}"

    @property
    def hook_name_out(self) -> str:
        """What the SAE writes, in TransformerLens's names."""
        if self.kind == "transcoder":
            return f"blocks.{self.layer}.hook_mlp_out"
        return self.hook_name


def sites(layers: int, middle: int) -> list[Site]:
    """The sites that have an SAE: resid_post everywhere, mlp_out and a transcoder in the middle."""
    found = [Site("resid_post", layer) for layer in range(layers)]
    return [*found, Site("mlp_out", middle), Site("transcoder", middle)]


def parse(folder: Path) -> Site:
    """The site of an SAE folder, from its name."""
    kind, layer = folder.name.rsplit("_", 1)
    if kind not in ("resid_post", "mlp_out", "transcoder"):
        raise ValueError(f"{folder} is not named after a site")
    return Site(kind, int(layer))


def output_module(model: "Gemma2ForCausalLM", site: Site) -> "torch.nn.Module":
    """The module whose output the site's SAE writes."""
    block: Any = model.model.layers[site.layer]
    return block if site.kind == "resid_post" else block.post_feedforward_layernorm


def input_norm(model: "Gemma2ForCausalLM", site: Site) -> "torch.nn.Module":
    """The norm in front of the site's MLP, whose input a transcoder reads."""
    block: Any = model.model.layers[site.layer]
    return block.pre_feedforward_layernorm


def normalized(norm: Any, x: "torch.Tensor") -> "torch.Tensor":
    """What an RMS norm makes of ``x`` before its weight comes in."""
    import torch

    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps)


def read(
    model: "Gemma2ForCausalLM", wanted: list[Site], **inputs: Any
) -> dict[Site, tuple["torch.Tensor", "torch.Tensor"]]:
    """What the SAE of each site reads and what it should write, (batch, position, d_model) each.

    The two are one tensor but for a transcoder. ``inputs`` go to the model.
    """
    import torch

    inputs_of: dict[Site, torch.Tensor] = {}
    found: dict[Site, tuple[torch.Tensor, torch.Tensor]] = {}

    def before(site: Site) -> Any:
        def hook(module: Any, args: tuple["torch.Tensor"], output: Any) -> None:
            inputs_of[site] = normalized(module, args[0])

        return input_norm(model, site).register_forward_hook(hook)

    def after(site: Site) -> Any:
        def hook(module: Any, args: Any, output: "torch.Tensor") -> None:
            found[site] = (inputs_of.get(site, output), output)

        return output_module(model, site).register_forward_hook(hook)

    handles = [before(site) for site in wanted if site.kind == "transcoder"]
    handles += [after(site) for site in wanted]
    try:
        with torch.no_grad():
            model(**inputs, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found
