"""Ways of running an intervention: ``run``, ``sweep``, ``edit`` and ``hooked``."""
