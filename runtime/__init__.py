"""The runtime half: loads a model, edits its quantized weights in place, switches personas, generates. Never torch.

Nothing is imported here, so that `import persona_edge.runtime` costs nothing: import the module you need
(`switcher`, `session`, ...) by its own name.
"""
