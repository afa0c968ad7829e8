"""What an ``Attribution`` is read with: by token, as a file, as text and as a page.

* ``texts``: the prompts' tokens behind a result, and rules on them.
* ``totals``: scores summed by latent, site and position.
* ``file``: a result as a safetensors file.
* ``show``: a screen of text, an HTML page, a pandas table.
"""
