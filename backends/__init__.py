"""The adapters of portacnn, one module per array library. The import name is
``portacnn.backends``.
"""

if __name__ != "portacnn.backends":
    raise ImportError(
        f"expected the import name 'portacnn.backends', got {__name__!r}, which would be a second "
        "copy of the modules; write `import portacnn.backends`"
    )
