"""The commands of ``portacnn``, one module each: ``add_options(parser)`` and ``run(options)``."""
