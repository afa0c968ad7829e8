"""Selecting 20 latents from a native SAE file of 65,536 x 2,304 (1.2 GB, float32).

python benchmarks/loading.py [--latents 65536 --width 2304]

Memory is what the process does not share with the page cache (USS), measured by psutil's file of
the same name on Linux: /proc/self/smaps_rollup.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

import saefeat as sf


def unshared_mb() -> float:
    """Private memory of this process, in MB (Linux)."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    private = [line.split() for line in lines if line.startswith("Private_")]
    return sum(int(fields[1]) for fields in private) / 1024


def write(folder: Path, width: int, latents: int) -> None:
    tensors = {
        "W_enc": torch.randn(width, latents),
        "b_enc": torch.zeros(latents),
        "W_dec": torch.randn(latents, width),
        "b_dec": torch.zeros(width),
        "threshold": torch.ones(latents),
    }
    save_file(tensors, folder / "sae_weights.safetensors")
    config = {
        "architecture": "jumprelu",
        "d_in": width,
        "d_sae": latents,
        "apply_b_dec_to_input": False,
        "metadata": {"hook_name": "blocks.12.hook_resid_post"},
    }
    (folder / "cfg.json").write_text(json.dumps(config))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--latents", type=int, default=65536)
    parser.add_argument("--width", type=int, default=2304)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), args.width, args.latents)
        index = torch.randperm(args.latents)[:20]
        sf.load_sae(folder).columns(index)  # warms the page cache
        before, times = unshared_mb(), []
        for _ in range(5):
            start = time.perf_counter()
            columns = sf.load_sae(folder).columns(index)
            times.append(time.perf_counter() - start)
        grown = unshared_mb() - before
    held = sum(t.numel() * t.element_size() for t in columns.values() if torch.is_tensor(t))
    print(f"20 of {args.latents} x {args.width}: {min(times) * 1000:.0f} ms warm")
    print(f"unshared memory grew by {grown:.1f} MB; the columns are {held / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
