"""How large images are, unless a recipe says otherwise: the area after resizing, in pixels. Source: NEO's inference."""

MIN_PIXELS = 256**2
MAX_PIXELS = 2048**2
