"""Making the pre-Buffer assets that ship with the library."""
