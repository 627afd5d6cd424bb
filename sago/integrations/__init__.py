"""Training frameworks, one a module, each imported by those who use it."""
