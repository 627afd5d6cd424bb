"""Adapters to other libraries, one a module. Nothing here is imported by `import sago`."""
