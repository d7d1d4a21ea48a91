"""Cost models that others published, beside the project's own: small, jittable, over the same kind of pytrees."""
