"""Train the SAEs and the transcoder of a tiny model on activations of its own conversations.

The SAEs are sae-lens's: BatchTopK in training, JumpReLU on disk. sae-lens 6 cannot train
transcoders (its trainer reconstructs its own input), so the transcoder has a short loop of its
own and is saved through sae-lens's ``JumpReLUTranscoder``. No token is left out: BOS is no
outlier in models this small, and refusal lives in the template's tokens.
"""

import contextlib
import io
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .sites import Site, read

if TYPE_CHECKING:
    import torch
    from transformers import Gemma2ForCausalLM


@dataclass(frozen=True)
class Dictionary:
    """Size, sparsity and training of one SAE."""

    latents: int = 512
    k: int = 12
    steps: int = 2000
    batch: int = 512
    rate: float = 2e-3
    seed: int = 0


def activations(
    model: "Gemma2ForCausalLM", sites: list[Site], ids: "torch.Tensor", keep: "torch.Tensor"
) -> dict[Site, tuple["torch.Tensor", "torch.Tensor"]]:
    """What each SAE reads and writes at the kept positions, (token, d_model) float32 each.

    Args:
        ids: right-padded conversations, (batch, position).
        keep: which positions to take, (batch, position) bool.
    """
    import torch

    parts: dict[Site, list[tuple[torch.Tensor, torch.Tensor]]] = {site: [] for site in sites}
    for rows, mask in zip(ids.split(256), keep.split(256), strict=True):
        for site, (source, target) in read(model, sites, input_ids=rows).items():
            parts[site].append((source[mask], target[mask]))
    return {
        site: (torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs]))
        for site, pairs in parts.items()
    }


def _orders(count: int, settings: Dictionary) -> Iterator["torch.Tensor"]:
    """Endless index batches, a fresh shuffle every epoch."""
    import torch

    generator = torch.Generator().manual_seed(settings.seed)
    while True:
        order = torch.randperm(count, generator=generator)
        yield from order.split(settings.batch)[: count // settings.batch]


def metadata(site: Site, model_name: str) -> dict[str, Any]:
    """What ``cfg.json`` tells a reader about where the SAE belongs."""
    facts: dict[str, Any] = {
        "model_name": model_name,
        "hook_name": site.hook_name,
        "hook_head_index": None,
        "prepend_bos": True,
        "context_size": 256,
        "dataset_path": "the model's own conversations",
    }
    if site.kind == "transcoder":
        facts |= {"hook_name_out": site.hook_name_out, "hook_layer_out": site.layer}
    return facts


def _train_sae(source: "torch.Tensor", facts: dict[str, Any], settings: Dictionary) -> Any:
    """A trained sae-lens BatchTopK SAE."""
    import torch
    from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.saes.sae import SAEMetadata
    from sae_lens.training.sae_trainer import SAETrainer

    torch.manual_seed(settings.seed)
    sae = BatchTopKTrainingSAE(
        BatchTopKTrainingSAEConfig(
            d_in=source.shape[1],
            d_sae=settings.latents,
            k=settings.k,
            normalize_activations="expected_average_only_in",
            metadata=SAEMetadata(**facts),
        )
    )
    trainer_config = SAETrainerConfig(
        total_training_samples=settings.steps * settings.batch,
        train_batch_size_samples=settings.batch,
        lr=settings.rate,
        lr_end=settings.rate / 20,
        lr_scheduler_name="cosineannealing",
        lr_warm_up_steps=settings.steps // 20,
        dead_feature_window=100,
        # The trainer makes a wandb histogram whenever a window is full, logging or not.
        feature_sampling_window=settings.steps + 1,
        n_batches_for_norm_estimate=20,
        logger=LoggingConfig(log_to_wandb=False),
    )
    batches = (source[order] for order in _orders(len(source), settings))
    # fit() always draws a progress bar; ours counts whole SAEs.
    with contextlib.redirect_stderr(io.StringIO()):
        return SAETrainer(trainer_config, sae, batches).fit()


def _new_transcoder(
    source: "torch.Tensor", target: "torch.Tensor", facts: dict[str, Any], settings: Dictionary
) -> Any:
    """An untrained sae-lens ``JumpReLUTranscoder`` that puts out the mean of its target."""
    import torch
    from sae_lens.saes.sae import SAEMetadata
    from sae_lens.saes.transcoder import JumpReLUTranscoder, JumpReLUTranscoderConfig

    torch.manual_seed(settings.seed)
    config = JumpReLUTranscoderConfig(
        d_in=source.shape[1],
        d_out=target.shape[1],
        d_sae=settings.latents,
        apply_b_dec_to_input=False,
        metadata=SAEMetadata(**facts),
    )
    coder = JumpReLUTranscoder(config)
    with torch.no_grad():
        coder.b_dec.copy_(target.mean(0))
        coder.W_dec.mul_(0.1)
    return coder


def _train_transcoder(
    source: "torch.Tensor", target: "torch.Tensor", facts: dict[str, Any], settings: Dictionary
) -> Any:
    """A BatchTopK transcoder, as a sae-lens ``JumpReLUTranscoder``.

    The threshold follows the smallest activation a batch keeps, as in sae-lens's BatchTopK.
    """
    import torch
    from sae_lens.saes.batchtopk_sae import BatchTopK

    coder = _new_transcoder(source, target, facts, settings)
    keep_top, threshold = BatchTopK(settings.k), 0.0
    scale = target.square().mean()
    weights = [coder.W_enc, coder.b_enc, coder.W_dec, coder.b_dec]
    optimizer = torch.optim.Adam(weights, lr=settings.rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.rate, settings.steps)
    for order in itertools.islice(_orders(len(source), settings), settings.steps):
        latents = keep_top(source[order] @ coder.W_enc + coder.b_enc)
        loss = (coder.decode(latents) - target[order]).square().mean() / scale
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        smallest = latents.detach()[latents > 0].min().item()
        threshold += 0.01 * (smallest - threshold)
    with torch.no_grad():
        coder.threshold.fill_(threshold)
    coder.fold_W_dec_norm()
    return coder


def train_sae(
    pair: tuple["torch.Tensor", "torch.Tensor"],
    site: Site,
    model_name: str,
    folder: Path,
    settings: Dictionary,
) -> None:
    """Train the SAE of one site and save it in sae-lens's native format.

    Args:
        pair: what it reads and what it should write, (token, d_model) float32 each.
        folder: receives ``cfg.json`` and ``sae_weights.safetensors``.
    """
    facts = metadata(site, model_name)
    if site.kind == "transcoder":
        _train_transcoder(*pair, facts, settings).save_model(folder)
    else:
        _train_sae(pair[0], facts, settings).save_inference_model(folder)
    # One key a line, in a fixed order: the file is package data, and read by people.
    config = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
