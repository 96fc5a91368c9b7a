"""Ray at the rim: the only package that imports it."""
