"""The differentiable penalty of a list on one device."""
