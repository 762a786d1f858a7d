# A package, because libraries (Opacus) install one of this name, which would be found in its place.
