"""The adapters of portacnn: one module for each array library. Import name:
``portacnn.backends``."""

if __name__ != "portacnn.backends":
    raise ImportError(
        f"this folder is the package 'portacnn.backends', not {__name__!r}: a second copy of its "
        "modules would not be "
        "the one portacnn uses. Write `import portacnn.backends`"
    )
