"""Files of our own: written whole or not at all, read without trusting them.

* ``container``: safetensors with a JSON document and a hash.
* ``checkpoint``: the finished batches of a long job.
* ``paths``: ``~`` in a path.
* ``hashing``: the one content hash.
* ``packed``: all numbers a module computes with, quantized weights included.
"""
