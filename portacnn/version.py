"""The version of portacnn."""

VERSION = "0.1.0"
