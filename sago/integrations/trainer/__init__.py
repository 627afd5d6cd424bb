"""The parts of `sago.integrations.transformers`."""
