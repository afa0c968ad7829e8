"""The refusal case study: which few latents make a chat model refuse.

It reproduces section 4.1 of "Understanding Refusal in Language Models with Sparse Autoencoders"
(arXiv 2505.23556) on an embedded tiny model, in minutes and without a network, and runs
unchanged on real models. Everything is said in saefeat's public surface: nothing here reaches
into the library, and the prompts, the judges and the report belong to the study alone.

* ``data``: prompt sets, embedded or read from files.
* ``judges``: refused, complied or broken, by request and answer.
* ``errors``: what the study cannot go on with.
* ``openings``: the tokens that refusals and answers begin with.
* ``identity``: what finished work was made from: code, judge, weights.
* ``lab``: model, dictionaries, prompts and settings in one place.
* ``constants``: whose numbers are used, and for which model they were found.
* ``filter``: the fitting prompts that the model treats as labeled.
* ``dictionaries``: whether the SAEs fit the model at all.
* ``direction``: the refusal direction and the layer sweep.
* ``selection``: CosSim, ActDiff, AP, CosSim+AP and random sets.
* ``clamping``: sets of latents made into edits.
* ``tuning``: budget, candidates and clamp, chosen on the val split.
* ``suppression``, ``induction``, ``side_effects``, ``check``: the experiments.
* ``experiments``: all of them in order; the results as data.
* ``stats``, ``tables``, ``plots``, ``report``: how numbers are given and shown.
* ``answers``: every judged answer, as JSON lines.
* ``stages``: finished work on disk, so that an interrupted study resumes.
* ``setup``, ``cli``: a lab from the command line.
* ``tiny``: the embedded models, their SAEs and their language.

From a shell: ``python -m saefeat.studies.refusal --output results``. From Python:
``from saefeat.studies.refusal.cli import main``.
"""
