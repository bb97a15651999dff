"""The differentiable penalty: the route that a list takes, and the functions of each."""
