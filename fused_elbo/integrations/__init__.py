"""Drop-in parts for other packages: ``diffusers`` and ``pyro``, each a module that alone needs its package."""
