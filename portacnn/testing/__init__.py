"""Examples of how every op is called, for tests and checks. Nothing in the library imports it."""
