from neo_components.packing import pack, patchify  # noqa: F401  (temporary)
