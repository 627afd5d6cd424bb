"""Adapters to other libraries. `import sago` imports none of them."""
