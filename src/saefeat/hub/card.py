"""A model card made from a file's own document, so that it cannot say anything else."""

from __future__ import annotations

from typing import Any

from ..files.container import Contents
from .files import built

FILE = "intervention.safetensors"
"""The file of a repository that ``pull`` takes unless told otherwise."""

_CARD = """---
library_name: saefeat
tags:
- saefeat
- steering
- sparse-autoencoder
{base}---

# {title}

An intervention on a language model, saved by [saefeat](https://pypi.org/project/saefeat/).

    {shown}

## Use it

```python
import saefeat as sf

intervention = {call}
with sf.hooked(model, intervention):
    model.generate(...)
```

It needs neither the sparse autoencoder nor sae-lens. The file holds no code.

## Made on

{model}

## What it reads and writes

| dictionary | reads | writes | latents | origin | fingerprint |
|---|---|---|---|---|---|
{rows}

Format version {version}; written with {written}; SHA-256 of the contents `{sha}`.
"""


def card(contents: Contents, repo: str, file: str) -> str:
    """The README of a repository that holds one intervention."""
    document = contents.document
    spec, made_on = document["spec"], document["spec"].get("model")
    name = made_on["name"] if made_on else ""
    made = "The file does not say; it fits any model with these sites and widths."
    if made_on:
        shape = "family {family}, {layers} layers, d_model {d_model}, vocabulary {vocab}"
        made = f"{code(name or 'a model without a name')}: {shape.format(**made_on)}"
        made += f"; revision {code(made_on['revision'])}" if made_on["revision"] else ""
    shown = repr(built(contents, "card", None)).replace(" | ", "\n    | ")
    return _CARD.format(
        base=f"base_model: {name}\n" if repository(name) else "",
        title=repo.split("/")[-1],
        shown="\n    ".join(line.strip() for line in shown.splitlines()),
        call=f"sf.hub.pull({repo!r})" if file == FILE else f"sf.hub.pull({repo!r}, file={file!r})",
        model=made,
        rows="\n".join(map(_row, spec["dictionaries"])),
        version=document["version"],
        written=", ".join(f"{k} {v}" for k, v in sorted(document["written"].items())),
        sha=document["sha256"],
    )


def repository(name: str) -> bool:
    """Whether a model's name is one that the hub could link to."""
    owner, _, model = name.partition("/")
    return all(
        part and part.replace("-", "").replace(".", "").replace("_", "").isalnum()
        for part in (owner, model)
    )


def code(text: object) -> str:
    """Text from a file as code on one line; it cannot end the span, the cell or the line."""
    plain = "".join(c if c.isprintable() else " " for c in str(text))
    return "`" + plain.replace("`", "'").replace("|", "¦") + "`"


def _row(entry: dict[str, Any]) -> str:
    count = len({i for selection in entry["selections"] for i in selection["latents"]})
    cells = (
        code(entry["name"]),
        entry["site"],
        entry.get("write_site", entry["site"]),
        f"{count} of {entry['d_sae']:,}" if "d_sae" in entry else str(count),
        code(entry["origin"]) if entry.get("origin") else "",
        code(entry["fingerprint"]) if entry.get("fingerprint") else "",
    )
    return "| " + " | ".join(cells) + " |"
