"""Studies: whole investigations written against saefeat's public surface alone.

* ``refusal``: refusal in chat models.
"""
