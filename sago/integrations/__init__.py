"""Adapters to other libraries, with one module for each. `import sago` imports none of them."""
