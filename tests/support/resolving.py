"""What the tests of ``resolve`` share."""

REMEDIES = {
    "cupy": 'CuPy is not installed: pip install "portacnn[cuda13]" (or "portacnn[cuda12]", to fit '
    "the driver)",
    "torch": 'PyTorch is not installed: pip install "portacnn[torch]"',
    "array_api_strict": "array-api-strict is not installed: pip install array-api-strict",
    "jax": 'JAX is not installed: pip install "portacnn[jax]" (for a GPU: "jax[cuda13]")',
}


def told(backend):
    return backend.name, str(backend.device)


NUMPY, TORCH = ("numpy", "cpu"), ("torch", "cpu")
