"""Default limits of the area of a resized image, in pixels. Source: NEO's inference."""

MIN_PIXELS = 256**2
MAX_PIXELS = 2048**2
