"""Programs for maintainers; tests use parts of them."""
