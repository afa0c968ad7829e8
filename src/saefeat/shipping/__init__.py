"""How a program travels to a server.

* ``server``: ``Server``, where it runs and what its requests may be.
* ``program``: what crosses: the kernel and a plain program.
* ``narrow``: its matrices in the narrowest dtype that holds them.
* ``upstream``: visits moved off the inputs of blocks, of which a server may hand out copies.
* ``client``: how a server is asked, up to a deadline.
* ``payload``: what a request weighs, and what in it a server does not have.
"""
